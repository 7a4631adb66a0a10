"""Ten kills of one run over a mosaic: ``python -m benchmarks.kills [--quick]``.

``deepdisc-ops predict`` with a committed ensemble on a simulated LSST mosaic, ended by SIGKILL at random points of its work, spread
evenly, and started anew each time. A line is written before every window that is looked at: which windows are looked at again is
held against the pages that were on disk at each start. The last run's catalogue is compared with that of a run left alone, row for
row and bit for bit.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy.table import Table
from rich.console import Console

from benchmarks import record
from benchmarks.mosaic import MODEL
from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.simulate import simulate_scene, write_scene
from deepdisc_ops.sky.catalog import read_catalog

WATCHED = """
import sys
from deepdisc_ops import cli
from deepdisc_ops.inference.mosaic import LocalLooker

log, sys.argv[1:] = sys.argv[1], sys.argv[2:]
look = LocalLooker._predict

def watched(self, window, image):
    with open(log, "a") as file:
        print(*window, sep="-", file=file)
    return look(self, window, image)

LocalLooker._predict = watched
cli.main()
"""
"""The command, which writes each window that it begins to look at to the file named first."""
WORKERS = 1
IN_FLIGHT = WORKERS + 1
"""One window that is looked at, one that waits for its page to be written."""
console = Console(width=110, record=True)


@dataclass(frozen=True)
class Run:
    """Windows that one start of the command looked at, those it found pages of, and how it ended."""

    looked: list[str]
    kept: set[str]
    status: int
    seconds: float


def pages(out: Path) -> set[str]:
    """Windows that the journal of a catalogue holds, of both passes."""
    return {page.stem.partition("-")[2] for page in out.with_name(f"{out.name}.unfinished").glob("*.npz")}


def start(mosaic: Path, out: Path, window: int, *, kill_at: tuple[int, float] | None = None) -> Run:
    """Run the command, killed so many seconds after it has so many pages where ``kill_at`` says so."""
    log, kept = out.with_name("looked.txt"), pages(out)
    log.write_text("")
    words = ["predict", mosaic, "--model", MODEL, "--out", out, "--window", window, "--workers", WORKERS]
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", WATCHED, log, *map(str, words)], stdout=subprocess.PIPE, text=True)
    if kill_at is not None:
        while len(pages(out)) < kill_at[0] and process.poll() is None:
            time.sleep(0.01)
        time.sleep(kill_at[1])
        process.send_signal(signal.SIGKILL)
    told, _ = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"predict ended with {process.returncode}: {told}")
    return Run(log.read_text().split(), kept, process.returncode, time.monotonic() - began)


def differing(one: Table, other: Table) -> list[str]:
    """Columns of two catalogues that are not the same bit for bit, or all of them."""
    if one.colnames != other.colnames or len(one) != len(other):
        return sorted({*one.colnames, *other.colnames})
    return [name for name in one.colnames if np.asarray(one[name]).tobytes() != np.asarray(other[name]).tobytes()]


def judged(whole: Run, runs: Sequence[Run]) -> dict[str, Any]:
    """What the windows of the ``runs`` say against those of the one that was left alone."""
    count = Counter(window for run in runs for window in run.looked)
    killed = [run for run in runs if run.status]
    return {
        "windows": len(set(whole.looked)),
        "kills": len(killed),
        "windows_looked_at_again": sum(count.values()) - len(count),
        "most_looked_at_again_by_a_kill": max(
            (len(set(run.looked) & set(before.looked)) for before, run in zip(killed, runs[1:], strict=False)), default=0
        ),
        "looked_at_although_kept": sum(len(set(run.looked) & run.kept) for run in runs),
        "never_looked_at": len(set(whole.looked) - set(count)),
        "pages_at_starts": [len(run.kept) for run in runs],
        "seconds": {"left alone": whole.seconds, "all starts": sum(run.seconds for run in runs)},
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a mosaic of 512 pixels, three kills; nothing is kept")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    arguments = parser.parse_args()
    side, window, kills = (512, 128, 3) if arguments.quick else (2048, 256, 10)
    rng = np.random.default_rng(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        for name in ("whole", "killed"):
            (work / name).mkdir()
        mosaic, out = work / "mosaic.fits", work / "killed" / "catalog.parquet"
        write_scene(simulate_scene(SkySettings(), size=side, seed=7), mosaic)
        whole = start(mosaic, work / "whole" / out.name, window)
        total = len(set(whole.looked))
        console.print(f"left alone: {total} windows in {whole.seconds:.1f} s")
        pace, runs = whole.seconds / total, list[Run]()
        for point in sorted(rng.integers(0, total, kills)):
            runs.append(start(mosaic, out, window, kill_at=(int(point), rng.uniform(0, pace))))
            console.print(f"killed: {len(runs[-1].looked)} windows begun, {len(pages(out))} pages of {total}")
        runs.append(start(mosaic, out, window))
        tables = [read_catalog(path) for path in (work / "whole" / out.name, out)]
        differences = differing(*tables)
        left = sorted(path.name for path in out.parent.iterdir() if path.name not in (out.name, "looked.txt"))
    figures = judged(whole, runs) | {"rows": len(tables[0]), "columns_that_differ": differences, "files_left_behind": len(left)}
    console.print(figures, left)
    ratios = {"windows_looked_at_over_windows": sum(len(run.looked) for run in runs) / total}
    kept = figures["looked_at_although_kept"] == figures["never_looked_at"] == len(differences) == 0
    if not kept or figures["most_looked_at_again_by_a_kill"] > IN_FLIGHT:
        raise SystemExit("a window was looked at twice that was not in flight, or the catalogues differ")
    if not arguments.quick:
        console.print(str(record.write("kills", ratios=ratios, figures=figures, log=console.export_text().splitlines())))


if __name__ == "__main__":
    main()
