"""`--json`: JSON alone on stdout, whatever else there is to say goes to stderr."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deepdisc_ops.cli import app
from deepdisc_ops.cli.console import console, print_json
from deepdisc_ops.resources import find


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The console writes to stdout again for the next test."""
    monkeypatch.setattr(console, "stderr", False)


def told(*words: object, code: int = 0) -> Any:
    """What a command prints with --json."""
    result = CliRunner().invoke(app, [*map(str, words), "--json"], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_numbers_that_are_none_are_null(capsys: pytest.CaptureFixture[str], spaced: Path) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": spaced})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": str(spaced)}


def test_networks() -> None:
    light, heavy = told("model", "table", "tiny", "vitdet_b", "--bands", 2, "--size", 64, "--set", "fpn_channels=16")
    assert light["backbone"] == "tiny"
    assert light["cost"]["parameters"] > 1000
    assert light["step"]["without_gradient"] == 0
    assert heavy["step"] is None


def test_data_sets(mini_dataset: Path, spaced: Path) -> None:
    found = told("data", "describe", mini_dataset, "--out", spaced / "description")
    assert found == json.loads((spaced / "description" / "description.json").read_text())
    assert [band["band"] for band in found["pixels"]] == list("ugrizy")
    copy = shutil.copytree(mini_dataset, spaced / "copy")
    split = told("data", "split", copy, "--train", 0.5, "--validation", 0.5, "--test", 0, "--partitions", 0)
    assert sum(split["records"].values()) == 6


def test_the_cost_of_a_sweep(spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(spaced)
    rows = told("sweep", "run", find("tune/scaling.yaml"), "--dry-run")
    assert [(row["backbone"], row["trials"], row["most_steps"]) for row in rows] == [("tiny", 6, 4800), ("small", 6, 4800)]
    assert list(spaced.iterdir()) == []


def test_thresholds(tiny_checkpoints: list[Path], mini_dataset: Path) -> None:
    found = told("members", "tune", tiny_checkpoints[0], "--data", mini_dataset, "--dry-run")
    assert found["best"] in found["trials"]
    assert found["gold"] > 0


def test_records_and_members(tiny_checkpoints: list[Path], spaced: Path) -> None:
    from deepdisc_ops.tracking import (
        CHECKPOINT_FOLDER,
        KIND_TAG,
        STATE_TAG,
        SWEEP_NAME_TAG,
        SWEEP_TAG,
        TRIAL_TAG,
        Tracker,
        default_uri,
    )

    uri = default_uri(spaced)
    tracker = Tracker(uri)
    parent = tracker.find_or_create("s", (SWEEP_TAG, "s"), tags={KIND_TAG: "sweep", SWEEP_NAME_TAG: "s", "metric": "val_nll"})
    run = tracker.find_or_create("s-0", (TRIAL_TAG, "s_0"), parent=parent, tags={STATE_TAG: "finished", "drawn": "{}"})
    tracker.log_summary(run, 1, {"best_val_nll": 0.1, "best_val_completeness": 0.5})
    tracker.log_artifact(run, tiny_checkpoints[0], CHECKPOINT_FOLDER)
    for one in (run, parent):
        tracker.end(one)
    tracker.register("lsst", run, ["champion"])

    (sweep,) = told("track", "list", spaced)
    assert (sweep["run_id"], sweep["name"], sweep["trials"]) == (parent, "s", {"finished": 1})
    (member,) = told("track", "list", spaced, "--model", "lsst")
    assert (member["run_id"], member["aliases"]) == (run, ["champion"])
    (trial,) = told("sweep", "compare", "s", "--tracking-uri", uri, "--no-log")
    assert trial["val_nll"] == 0.1
    chosen = told("members", "select", "s", "--tracking-uri", uri, "-k", 1, "--out", spaced / "members.yaml")
    assert [member["run_id"] for member in chosen["members"]] == [run]


def test_an_endpoint_that_does_not_run(spaced: Path) -> None:
    assert told("serve", "status", "--run-dir", spaced / "server", code=1)["state"] != "ready"


def test_what_images_can_be_made_for() -> None:
    targets = {target["name"]: target for target in told("images", "targets")}
    assert {name: target["built"] for name, target in targets.items()} == {"cpu": True, "cuda": False, "rocm": False}


def test_doctor(spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepdisc_ops import doctor

    monkeypatch.setattr(doctor, "_GPUS", "print('[]')")
    monkeypatch.setattr(doctor, "ROOM_GB", 0.0)
    monkeypatch.setattr(doctor, "SHARED_GB", 0.0)
    assert {"name", "state", "found", "enables", "remedy"} == set(told("doctor", "--folder", spaced)[0])
