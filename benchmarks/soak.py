"""An endpoint at work for long: ``python -m benchmarks.soak [--quick] [--requests N]``.

Requests of mixed sizes to one worker, eight at once: searches, given boxes, empty windows, windows by reference. Every answer is
held against the first to the same question. Memory of the JVM and its worker is measured throughout: at the end it must be within
5 % of that after the first tenth. A failed request, another answer or more memory ends the program with exit code 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console

from benchmarks import record
from benchmarks.endpoints import EBV, Work, cut, noise, percentiles, prepared, serving
from deepdisc_ops.serving import server
from deepdisc_ops.serving.fleet import Fleet
from deepdisc_ops.sky.detections import Detections
from deepdisc_ops.sky.tiling import Window

SIDES = (64, 96, 128, 192, 256, 384)
CONCURRENCY = 8
GROWTH = 0.05
BOX = np.array([[20, 20, 40, 40], [30, 10, 52, 33]], np.float32)
console = Console(width=120, record=True)


class Soak:
    """Questions to an endpoint, and what came back to each kind of them first."""

    def __init__(self, fleet: Fleet, work: Work, seed: int = 0) -> None:
        self.fleet = fleet
        self.wrong: list[str] = []
        self.seconds: list[float] = []
        self._path, self._image = work.path, work.mosaic.read(Window(0, 0, max(SIDES), max(SIDES)))
        self._empty = noise(fleet, max(SIDES))
        self._first: dict[str, Detections] = {}
        self._lock, self._seed = threading.Lock(), seed

    def ask(self, number: int) -> None:
        """One question, drawn by its number."""
        draw = np.random.default_rng((self._seed, number))
        side, kind = int(draw.choice(SIDES)), str(draw.choice(["search", "reference", "given", "empty"], p=[0.6, 0.1, 0.2, 0.1]))
        image, began = cut(self._empty if kind == "empty" else self._image, side), time.monotonic()
        try:
            if kind == "given":
                found = self.fleet.redshift(image, BOX, EBV)
            elif kind == "reference":
                found = self.fleet.predict_files([self._path], Window(0, 0, side, side), EBV)
            else:
                found = self.fleet.predict(image, EBV)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is counted
            with self._lock:
                self.wrong.append(f"{kind} {side}: {type(error).__name__}: {error}")
            return
        with self._lock:
            self.seconds.append(time.monotonic() - began)
            first = self._first.setdefault(f"{kind} {side}", found)
        if not all(np.allclose(getattr(found, name), getattr(first, name), atol=1e-4) for name in ("boxes", "means", "weights")):
            with self._lock:
                self.wrong.append(f"{kind} {side}: {len(found)} objects, other than the {len(first)} of the first time")


def memory_mb(run: Path) -> dict[str, float]:
    """Resident memory of the JVM and of its workers."""
    info = server.discover(run)
    workers = sum(psutil.Process(pid).memory_info().rss for pid in info.worker_pids)
    return {"jvm": psutil.Process(info.pid).memory_info().rss / 1e6, "workers": workers / 1e6}


def main() -> None:
    """Ask, measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--quick", action="store_true", help="40 requests; nothing is kept, and memory is only told")
    arguments = parser.parse_args()
    count = 40 if arguments.quick else arguments.requests
    course: list[dict[str, float]] = []
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as scratch,
        prepared(Path(scratch), 512) as work,
        serving(work, "run", roots=(work.folder,)) as (run,),
        Fleet.open([run], most=CONCURRENCY) as fleet,
        ThreadPoolExecutor(CONCURRENCY) as pool,
    ):
        soak, began, step = Soak(fleet, work), time.monotonic(), max(1, count // 10)
        for start in range(0, count, step):
            list(pool.map(soak.ask, range(start, min(start + step, count))))
            course.append({"requests": float(min(start + step, count)), **memory_mb(run)})
            console.print(f"{course[-1]}, {len(soak.wrong)} wrong")
        seconds, waited = time.monotonic() - began, dict(fleet.trouble)
    whole = [one["jvm"] + one["workers"] for one in course]
    ratios = {"memory_at_end_over_after_first_tenth": whole[-1] / whole[0]}
    figures = {
        "requests": count,
        "at_once": CONCURRENCY,
        "wrong": soak.wrong,
        "waited_out": waited,
        "memory_mb": course,
        "seconds": seconds,
        "latency": percentiles(soak.seconds),
    }
    console.print(figures, ratios)
    if not arguments.quick:
        console.print(str(record.write("soak", ratios=ratios, figures=figures, log=console.export_text().splitlines())))
    if soak.wrong or (whole[-1] > (1 + GROWTH) * whole[0] and not arguments.quick):
        sys.exit("a request failed or was answered otherwise, or the server's memory grew")


if __name__ == "__main__":
    main()
