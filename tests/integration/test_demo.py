"""The demo, small: the whole chain through the command line, with real Ray, MLflow and TorchServe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from deepdisc_ops.sky.catalog import read_catalog
from deepdisc_ops.tracking import KIND_TAG, Tracker

pytestmark = pytest.mark.integration

SWEEP = """
name: shortest
base:
  data: {crop: 96}
  model: {backbone: {fpn_channels: 32}}
  train: {steps: 100, batch_size: 3, warmup_steps: 10, validate_every: 50}
space:
  model.backbone.name: {grid: [tiny, small]}
  train.lr: {loguniform: [2.0e-3, 4.0e-3]}
metric: val_nll
scheduler: {name: fifo}
resources: {cpus: 1}
seed: 1
"""


def test_from_an_empty_folder_to_a_served_catalogue(spaced: Path) -> None:
    (spaced / "sweep.yaml").write_text(SWEEP)
    out = spaced / "demo"
    options = ("--out", out, "--sweep", spaced / "sweep.yaml", "--scenes", "24", "--mosaic", "512")
    answer = subprocess.run([sys.executable, "-m", "deepdisc_ops.demo", *options], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "from an empty sky to a redshift catalogue" in answer.stdout

    tables = [read_catalog(out / name) for name in ("catalog.parquet", "catalog.fits")]
    assert len(tables[0]) == len(tables[1]) > 50
    figures = json.loads((out / "evaluation" / "metrics.json").read_text())
    assert figures["completeness"]["value"] > 0.5
    pictures = {path.stem for path in (out / "evaluation").glob("*.png")}
    assert {"picture", "redshifts", "pit", "densities"} <= pictures

    tracker = Tracker(f"sqlite:///{out / 'sweep' / 'mlflow.db'}")
    (parent,) = tracker.runs({KIND_TAG: "sweep"})
    children = tracker.children(parent.run_id)
    assert len(children) == 2
    for child in children:
        assert {"checkpoint", "config.yaml", "loss.png"} <= set(tracker.artifacts(child.run_id))
        assert [step for step, _ in tracker.history(child.run_id, "val_nll")] == [50, 100]

    mine = [process for process in psutil.process_iter(["cmdline"]) if str(out) in " ".join(process.info["cmdline"] or [])]
    assert mine == []
