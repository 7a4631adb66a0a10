"""Keeps what a benchmark found: benchmarks/results/NAME.json, with the commit, the machine and the command it came from."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from deepdisc_ops.data.reference import reference_names

RESULTS = Path(__file__).with_name("results")
GEMM_SIDE = 2048


def write(
    name: str,
    *,
    ratios: Mapping[str, float],
    figures: Mapping[str, Any],
    log: str | Iterable[str] = (),
    arguments: Sequence[str] | None = None,
    folder: Path = RESULTS,
    module: str | None = None,
) -> Path:
    """Write the result of ``python -m benchmarks.NAME``: ratios are named after what they claim, figures are the rest.

    module: the program, where it keeps results of several names.

    arguments of the command are this process's unless given; of paths in them only the name is kept.
    """
    words = [_public(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    result = {
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "gemm_gflops": round(gemm_gflops(), 1),
        "ratios": dict(ratios),
        "figures": dict(figures),
        "command": shlex.join(["python", "-m", f"benchmarks.{module or name}", *words]),
        "log": log if isinstance(log, str) else list(log),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(json.dumps(result, indent=2, default=float) + "\n")
    unfinished.replace(path)
    return path


def of_sky(name: str, sky: str) -> str:
    """The name of a result of one frozen sky: the first sky's are those without one."""
    return name if sky == reference_names()[0] else f"{name}_{sky}"


def _public(word: str) -> str:
    """An argument without the folders of this machine."""
    option, separator, value = word.rpartition("=")
    return f"{option}{separator}{Path(value).name}" if Path(value).is_absolute() else word


def commit() -> str:
    """The commit that is checked out, marked with + where code differs from it; "unknown" outside of a checkout.

    Results, and the figures and pages in docs/, are what programs write.
    """
    here = Path(__file__).parents[1]
    status = ["git", "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs"]
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changes = subprocess.run(status, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip() + ("+" if changes.stdout.strip() else "")


def gemm_gflops(repeats: int = 5) -> float:
    """The fastest single-precision matrix product of this process, in 1e9 operations a second."""
    return max(peaks_gflops(repeats).values())


def peaks_gflops(repeats: int = 5) -> dict[str, float]:
    """1e9 operations a second of products of `GEMM_SIDE` by NumPy and by torch, and by oneDNN as a convolution of such size."""
    one, other = torch.randn(2, GEMM_SIDE, GEMM_SIDE)
    features = torch.randn(1024, 256, 7, 7).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(1024, 256, 7, 7).contiguous(memory_format=torch.channels_last)
    matrix, others = one.numpy(), other.numpy()
    runs: dict[str, tuple[int, Callable[[], object]]] = {
        "numpy": (2 * GEMM_SIDE**3, lambda: matrix @ others),
        "torch": (2 * GEMM_SIDE**3, lambda: one @ other),
        "onednn": (2 * 1024 * 12544 * 1024, lambda: functional.conv2d(features, kernel)),
    }
    with torch.inference_mode():
        return {name: operations / _best_seconds(run, repeats) / 1e9 for name, (operations, run) in runs.items()}


def _best_seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
