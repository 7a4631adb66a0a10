"""Two Ray actors on two cores against one process: ``python -m benchmarks.actors [--quick]``.

``deepdisc-ops predict`` with a committed ensemble on a mosaic of simulated LSST sky (one scene repeated), in turn: one process of
one thread, one process of two threads, two actors of one thread each. Wall time of the command, and the seconds that the
catalogue's provenance tells, from the first window asked for to the last row (they hold the actors' start); median over the
repeats. Then two actors again, of which one is killed midway. Catalogues are compared bit for bit with that of one thread; with
that of two threads, whose sums round otherwise, by the objects that are in both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from astropy.table import Table
from rich.console import Console

from benchmarks import record
from benchmarks.kills import differing, pages
from benchmarks.mosaic import MODEL, SCENE, Run, predict, write_mosaic
from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.scenes import simulate_scene
from deepdisc_ops.inference.mosaic import Survey
from deepdisc_ops.sky.catalog import read_catalog
from deepdisc_ops.sky.matching import match_boxes

WINDOW = 512
WAYS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one thread": (1, ()),
    "two threads": (2, ()),
    "two actors": (1, ("--actors", "2")),
}
"""Threads and options of the command."""
console = Console(width=110, record=True)


def predict_with_a_loss(mosaic: Path, out: Path, at: int) -> str:
    """Run the command with two actors, of which one is killed when there are ``at`` pages; what the command told."""
    command = [sys.executable, "-m", "deepdisc_ops", "predict", str(mosaic), "--model", str(MODEL), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--window", str(WINDOW), "--actors", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while len(pages(out)) < at and process.poll() is None:
        time.sleep(0.01)
    actors = [child for child in psutil.Process(process.pid).children(recursive=True) if "Outpost" in " ".join(child.cmdline())]
    if len(actors) == 2:
        actors[0].kill()
    told, _ = process.communicate()
    if process.returncode or len(actors) != 2 or "an actor was lost" not in told:
        raise SystemExit(f"{len(actors)} actors, ended with {process.returncode}: {told}")
    return told


def near(one: Table, other: Table) -> dict[str, float]:
    """How much two catalogues differ that need not be the same bit for bit."""
    boxes = [np.stack([table[name] for name in ("x0", "y0", "x1", "y1")], axis=1) for table in (one, other)]
    pairs = match_boxes(*boxes, 0.5)
    apart = [np.abs(np.asarray(one[name])[pairs.index1] - np.asarray(other[name])[pairs.index2]) for name in ("z_median", "z_mean")]
    return {
        "objects_in_one_alone": len(one) + len(other) - 2 * len(pairs.iou),
        "boxes_px": float(np.abs(boxes[0][pairs.index1] - boxes[1][pairs.index2]).max()),
        "z_median": float(apart[0].max()),
        "z_mean": float(apart[1].max()),
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a mosaic of 1024 pixels, once; nothing is kept")
    arguments = parser.parse_args()
    side, repeats = (1024, 1) if arguments.quick else (4096, 3)
    runs: dict[str, list[Run]] = {way: [] for way in WAYS}
    inside: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        mosaic = write_mosaic(simulate_scene(SkySettings(), size=SCENE, seed=7), side, work / "mosaic.fits")
        for _ in range(repeats):
            for way, (threads, options) in WAYS.items():
                out = work / f"{way}.parquet"
                runs[way].append(predict(mosaic, out, "--window", str(WINDOW), *options, threads=threads))
                inside[way].append(float(read_catalog(out).meta["seconds"]))
        windows = len(Survey(side, side, WINDOW).tiles())
        predict_with_a_loss(mosaic, work / "loss.parquet", int(np.random.default_rng(0).uniform(0.3, 0.7) * windows))
        tables = {name: read_catalog(work / f"{name}.parquet") for name in (*WAYS, "loss")}
    wall = {way: statistics.median(run.wall for run in runs[way]) for way in WAYS}
    seconds = {way: statistics.median(inside[way]) for way in WAYS}
    ratios = {
        "two_actors_over_two_threads": wall["two threads"] / wall["two actors"],
        "two_actors_over_one_thread": wall["one thread"] / wall["two actors"],
        "two_actors_over_two_threads_without_start": seconds["two threads"] / seconds["two actors"],
        "two_actors_over_one_thread_without_start": seconds["one thread"] / seconds["two actors"],
    }
    figures: dict[str, Any] = {
        "megapixels": side**2 / 1e6,
        "windows": windows,
        "objects": {name: len(table) for name, table in tables.items()},
        "wall_seconds": wall,
        "wall_seconds_of_runs": {way: [run.wall for run in runs[way]] for way in WAYS},
        "seconds": seconds,
        "columns_that_differ_from_one_thread": {
            name: differing(tables["one thread"], tables[name]) for name in ("two actors", "loss")
        },
        "most_that_two_threads_differ": near(tables["one thread"], tables["two threads"]),
    }
    console.print(figures, ratios)
    if any(figures["columns_that_differ_from_one_thread"].values()):
        raise SystemExit("the catalogue of actors is not that of one process")
    if not arguments.quick:
        console.print(str(record.write("actors", ratios=ratios, figures=figures, log=console.export_text().splitlines())))


if __name__ == "__main__":
    main()
