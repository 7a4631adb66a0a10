"""A mosaic of 16384 x 16384 pixels against one of 4096 x 4096: ``python -m benchmarks.mosaic [--quick]``.

Six bands of simulated LSST sky, one scene repeated side by side, through ``deepdisc-ops predict`` with a committed ensemble: peak
memory of the process, and CPU time per megapixel without that of starting (that of a mosaic of one window), in turn, median over
the repeats. Two actors against one process: `benchmarks.actors`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from rich.console import Console

from benchmarks import record
from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.scenes import Scene, simulate_scene

SCENE = 1024
MODEL = Path(__file__).parent.parent / "models" / "lsst-small"
console = Console(width=110, record=True)


@dataclass(frozen=True)
class Run:
    """What one call of the command needed: peak memory in MB, CPU and wall time in seconds."""

    memory_mb: float
    cpu: float
    wall: float


def write_mosaic(scene: Scene, side: int, path: Path) -> Path:
    """The scene repeated to ``side`` pixels, an extension a band, written row of scenes by row of scenes."""
    with path.open("wb") as file:
        file.write(bytes(fits.PrimaryHDU().header.tostring(), "ascii"))
        for band, plane in zip(scene.survey.bands, scene.image, strict=True):
            header = scene.wcs.to_header()
            header["NAXIS1"] = header["NAXIS2"] = side
            hdu = fits.ImageHDU(np.zeros((1, 1), np.float32), header=header, name=band)
            hdu.header["NAXIS1"] = hdu.header["NAXIS2"] = side
            hdu.header["BUNIT"] = "nJy"
            file.write(bytes(hdu.header.tostring(), "ascii"))
            rows = np.tile(plane.astype(">f4"), (1, side // SCENE)).tobytes()
            for _ in range(side // SCENE):
                file.write(rows)
            file.write(b"\0" * (-(side * side * 4) % 2880))
    return path


def predict(mosaic: Path, out: Path, *options: str, threads: int = 2) -> Run:
    """Run the command on a mosaic, in a process of its own."""
    command = [sys.executable, "-m", "deepdisc_ops", "predict", str(mosaic), "--model", str(MODEL), "--out", str(out), *options]
    started = time.monotonic()
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=subprocess.PIPE, text=True)
    _, status, usage = os.wait4(process.pid, 0)
    told = process.stdout.read() if process.stdout else ""
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}: {told}")
    console.print(f"{mosaic.name}{' ' + ' '.join(options) if options else ''}: {told.strip().splitlines()[-1]}")
    return Run(usage.ru_maxrss / 1000, usage.ru_utime + usage.ru_stime, time.monotonic() - started)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2048 against 1024 pixels, once; figures mean little")
    quick = parser.parse_args().quick
    small, large, repeats = (1024, 2048, 1) if quick else (4096, 16384, 3)
    scene = simulate_scene(SkySettings(), size=SCENE, seed=7)
    runs: dict[int, list[Run]] = {SCENE: [], small: [], large: []}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        mosaics = {side: write_mosaic(scene, side, work / f"{side}.fits") for side in dict.fromkeys((SCENE, small, large))}
        for _ in range(repeats):
            for side, mosaic in mosaics.items():
                runs[side].append(predict(mosaic, work / f"{side}.parquet"))
    idle = statistics.median(run.cpu for run in runs[SCENE]) if small > SCENE else 0.0
    megapixels = {side: side**2 / 1e6 for side in (small, large)}
    memory = {side: statistics.median(run.memory_mb for run in runs[side]) for side in (small, large)}
    cpu = {side: (statistics.median(run.cpu for run in runs[side]) - idle) / megapixels[side] for side in (small, large)}
    ratios = {
        f"memory_{large // 1024}k_over_{small // 1024}k": memory[large] / memory[small],
        f"seconds_per_megapixel_{large // 1024}k_over_{small // 1024}k": cpu[large] / cpu[small],
    }
    figures: dict[str, Any] = {
        "memory_mb": memory,
        "cpu_seconds_per_megapixel": cpu,
        "cpu_seconds_to_start": idle,
        "wall_seconds_of_runs": {side: [run.wall for run in runs[side]] for side in runs},
    }
    console.print(figures, ratios)
    if not quick:
        console.print(str(record.write("mosaic", ratios=ratios, figures=figures, log=console.export_text().splitlines())))


if __name__ == "__main__":
    main()
