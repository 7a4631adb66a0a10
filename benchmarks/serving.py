"""The endpoint against the same ensemble in process: ``python -m benchmarks.serving [--quick]``.

A committed ensemble and a simulated LSST mosaic of 4096 pixels, in process with one thread, and through one worker of one
thread, in turn, the order changing from round to round: megapixels per second with windows of 1024 and of 512 pixels, and the
median over the rounds of one over the other. Before the first round the worker has answered a window of each size. Whether the
catalogues are the same, row for row, with one worker, with two, and with two servers; a difference ends the program with exit
code 1. Windows by reference against windows in the body; latency at 1, 4 and 16 requests at once; from the start of a server to
its first catalogue.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import record
from benchmarks.endpoints import EBV, Work, catalogue, differences, equal, latencies, local, percentiles, prepared, serving
from deepdisc_ops.serving import server
from deepdisc_ops.serving.fleet import Fleet
from deepdisc_ops.sky.tiling import Window

WINDOWS = (1024, 512)
console = Console(width=120, record=True)


def first_catalogue(work: Work, window: int) -> dict[str, float]:
    """Seconds from the start of a server until it is ready, and until it has answered its first window."""
    run = work.folder / "first"
    began = time.monotonic()
    try:
        server.start(work.mar, run, threads=1)
        ready = time.monotonic() - began
        with Fleet.open([run]) as fleet:
            fleet.predict(work.mosaic.read(Window(0, 0, window, window)), EBV)
        return {"ready": ready, "first catalogue": time.monotonic() - began}
    finally:
        server.stop(run)


def rates(work: Work, run: Path, rounds: int) -> dict[str, dict[int, list[float]]]:
    """Megapixels per second in process and through the endpoint, by the side of the windows, round by round."""
    megapixels = work.mosaic.width * work.mosaic.height / 1e6
    found: dict[str, dict[int, list[float]]] = {door: {window: [] for window in WINDOWS} for door in ("in process", "served")}
    with Fleet.open([run]) as fleet:
        doors = [("in process", local(work), 1), ("served", fleet.predict, fleet.room)]
        for window, (_, predictor, _) in itertools.product(WINDOWS, doors):
            predictor(work.mosaic.read(Window(0, 0, window, window)), EBV)
        for _ in range(rounds):
            doors.reverse()
            for window in WINDOWS:
                for door, predictor, workers in doors:
                    began = time.monotonic()
                    catalogue(work, predictor, window, workers)
                    found[door][window].append(megapixels / (time.monotonic() - began))
                    console.print(f"{door}, windows of {window}: {found[door][window][-1]:.4f} megapixels a second")
    return found


def by_reference(work: Work, run: Path, window: int, count: int) -> dict[str, float]:
    """Median seconds of a window that is sent, reading included, and of one that the server reads."""
    across = max(1, work.mosaic.width // window)
    places = [Window(x := n % across * window, y := n // across % across * window, x + window, y + window) for n in range(count)]
    with Fleet.open([run]) as fleet:
        sent, _ = latencies(lambda n: fleet.predict(work.mosaic.read(places[n]), EBV), count, 1)
        read, _ = latencies(lambda n: fleet.predict_files([work.path], places[n], EBV), count, 1)
    return {"body": statistics.median(sent), "reference": statistics.median(read)}


def waiting(work: Work, run: Path, window: int, count: int) -> dict[int, dict[str, Any]]:
    """Latency at several requests at once, more than a client would send by itself."""
    image, told = work.mosaic.read(Window(0, 0, window, window)), {}
    for concurrency in (1, 4, 16):
        with Fleet.open([run], most=concurrency) as fleet:
            seconds, wall = latencies(lambda _: fleet.predict(image, EBV), count, concurrency)
            told[concurrency] = percentiles(seconds) | {"a second": count / wall, "waited out": sum(fleet.trouble.values())}
    return told


def doors(work: Work, window: int) -> dict[str, dict[str, Any]]:
    """How the served catalogues differ from the one made in process."""
    expected, told = catalogue(work, local(work), window), {}
    for name, servers, workers in (("one worker", 1, 1), ("two workers", 1, 2), ("two servers", 2, 1)):
        with serving(work, name.replace(" ", "-"), servers, workers=workers) as runs, Fleet.open(runs) as fleet:
            told[name] = differences(catalogue(work, fleet.predict, window, fleet.room), expected)
            console.print(f"{name}: {told[name]}")
    return told


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a mosaic of 1024 pixels, once; figures mean little")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    side, rounds, count = (1024, 1, 4) if arguments.quick else (4096, arguments.rounds, 100)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="serving-") as scratch, prepared(Path(scratch), side) as work:
        start = first_catalogue(work, 512)
        with serving(work, "rates") as (run,):
            found = rates(work, run, rounds)
        with serving(work, "run", roots=(work.folder,)) as (run,):
            references = by_reference(work, run, 1024, min(count, 16))
            latency = waiting(work, run, 256, count)
        differing = doors(work, 512 if arguments.quick else 1024)
    speed = {door: {window: statistics.median(values) for window, values in told.items()} for door, told in found.items()}
    pairs = {window: zip(found["served"][window], found["in process"][window], strict=True) for window in WINDOWS}
    ratios = {f"served_over_in_process_{window}": statistics.median(a / b for a, b in pairs[window]) for window in WINDOWS}
    ratios["reference_over_body"] = references["reference"] / references["body"]
    figures = {
        "megapixels": side * side / 1e6,
        "megapixels_per_second": speed,
        "rounds": found,
        "seconds_of_a_window_of_1024": references,
        "seconds_of_a_window_of_256_by_requests_at_once": latency,
        "seconds_from_start": start,
        "served_against_in_process": differing,
    }
    console.print(figures, ratios)
    same = all(equal(one) for one in differing.values())
    if not arguments.quick:
        console.print(str(record.write("serving", ratios=ratios, figures=figures, log=console.export_text().splitlines())))
    if not same:
        sys.exit("the served catalogue is not the one made in process")


if __name__ == "__main__":
    main()
