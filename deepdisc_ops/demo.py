"""The main job on a small simulated sky, verb by verb: ``python -m deepdisc_ops.demo``, or scripts/demo.

Every step is a command of ``deepdisc-ops`` that could be typed; the program prints it, runs it and times it.
A second run keeps the simulated scenes and does the rest again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deepdisc_ops import resources
from deepdisc_ops.config import read_yaml
from deepdisc_ops.errors import DeepdiscOpsError
from deepdisc_ops.sky.catalog import read_catalog

console = Console(highlight=False)


class StepFailed(Exception):
    """The demo cannot go on; a verb that failed has already printed why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything the demo makes")
    parser.add_argument("--sweep", type=Path, default=resources.find("tune/quick.yaml"), help="sweep specification")
    parser.add_argument("--scenes", type=int, default=240, help="training scenes of 256x256 pixels")
    parser.add_argument("--mosaic", type=int, default=2048, help="side of the held-out mosaic in pixels")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        run(options.out, options.sweep, options.scenes, options.mosaic)
    except (StepFailed, DeepdiscOpsError) as failure:
        console.print(f"[bold red]demo stopped:[/] {failure}")
        return 2
    summarise(options.out, time.monotonic() - started)
    return 0


def run(out: Path, sweep: Path, scenes: int, mosaic: int) -> None:
    """Simulate, sweep, select, archive, serve, predict, evaluate."""
    claim(out)
    name = str(read_yaml(sweep).get("name"))
    if (out / "server").exists():
        step("the endpoint of an earlier run, if it was left", "serve", "stop", "--run-dir", out / "server")
    for stale in ("sweep", "server"):
        shutil.rmtree(out / stale, ignore_errors=True)
    store = f"sqlite:///{(out / 'sweep' / 'mlflow.db').absolute()}"
    sky = ("simulate", "--survey", "lsst", "--out")
    counts = ("--train", str(scenes), "--validation", str(max(4, scenes // 12)), "--seed", "1")
    step("a training sky with its truth", *sky, out / "scenes", *counts)
    step("a mosaic that no training sees", *sky, out / "mosaic.fits", "--mosaic", str(mosaic), "--seed", "77")
    data = f"base.data.path={out / 'scenes'}"
    step("a Ray Tune sweep tracked in MLflow", "sweep", "run", sweep, "--out", out / "sweep", "--set", data)
    step("the two best members", "members", "select", name, "--tracking-uri", store, "-k", "2", "--out", out / "members.yaml")
    step("one archive of both", "archive", "build", "--members", out / "members.yaml", "--out", out / "ensemble.mar")
    step("the endpoint", "serve", "start", out / "ensemble.mar", "--run-dir", out / "server")
    try:
        catalogs = ("--out", out / "catalog.parquet", "--out", out / "catalog.fits")
        step("the mosaic, window by window, to the endpoint", "predict", out / "mosaic.fits", "--server", out / "server", *catalogs)
    finally:
        step("endpoint down", "serve", "stop", "--run-dir", out / "server")
    truth = ("--truth", out / "mosaic.fits", "--out", out / "evaluation")
    step("the catalogue against the truth", "evaluate", out / "catalog.parquet", *truth)


def claim(out: Path) -> None:
    """Take ``out`` for the demo, which deletes the sweep and server of an earlier one in it, and of nobody else."""
    marker = out / ".deepdisc-demo"
    if out.is_dir() and any(out.iterdir()) and not marker.exists():
        raise StepFailed(f"{out} is not empty and not from an earlier demo; give another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    marker.touch()


def step(what: str, *arguments: str | Path) -> None:
    """Print a command of ``deepdisc-ops``, run it, and print how long it took."""
    words = [str(argument) for argument in arguments]
    console.print(f"\n[bold]{what}[/]\n$ deepdisc-ops {shlex.join(words)}", soft_wrap=True)
    started = time.monotonic()
    answer = subprocess.run([sys.executable, "-m", "deepdisc_ops", *words], check=False)
    if answer.returncode:
        raise StepFailed(f"`deepdisc-ops {words[0]}` ended with exit code {answer.returncode}")
    console.print(f"[dim]{time.monotonic() - started:.0f} s[/]")


def summarise(out: Path, seconds: float) -> None:
    """The figures of the run and where its files are."""
    figures = json.loads((out / "evaluation" / "metrics.json").read_text())
    catalog = read_catalog(out / "catalog.parquet")
    lsst, completeness, purity = figures["lsst"], figures["completeness"], figures["purity"]
    table = Table("figure", "value", title=f"\nfrom an empty sky to a redshift catalogue in {seconds / 60:.1f} minutes")
    for name, value in {
        "objects": f"{len(catalog)}",
        "completeness of gold": f"{completeness['value']:.3f} (by chance {figures['completeness_chance']:.3f})",
        "purity": f"{purity['value']:.3f} (by chance {figures['purity_chance']:.3f})",
        "bias": f"{lsst['bias']:+.4f}",
        "sigma_IQR": f"{lsst['sigma_iqr']:.4f}, {figures['gain_over_constant']:.1f} x better than the n(z)'s mode",
        "outlier fraction": f"{lsst['outlier_fraction']:.4f}",
        "PIT KS": f"{figures['pit_ks']:.4f}",
        "objects per second": f"{len(catalog) / float(catalog.meta['seconds']):.0f}",
    }.items():
        table.add_row(name, value)
    console.print(table)
    places = Table("file", "what it is")
    for name, what in {
        "catalog.parquet, catalog.fits": "the catalogue: positions, boxes, redshifts, mixtures",
        "evaluation/picture.png": "the middle of the mosaic in colour with boxes",
        "evaluation/redshifts.png": "true against photometric redshift",
        "evaluation/pit.png": "are the densities honest?",
        "evaluation/densities.png": "three of them",
        "ensemble.mar": "the archive that was served",
        "sweep/mlflow.db": f"every trial: mlflow ui --backend-store-uri sqlite:///{out}/sweep/mlflow.db",
    }.items():
        places.add_row(str(out / name.split(",")[0]) + ("," + name.split(",", 1)[1] if "," in name else ""), what)
    console.print(places)


if __name__ == "__main__":
    sys.exit(main())
