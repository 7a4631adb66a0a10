"""How fast training goes: images per second, the share of the time spent waiting for data, and memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from typing import TypeVar

import torch

from deepdisc_ops.training.distributed import World

T = TypeVar("T")
TIMINGS = ("images_per_s", "data_wait", "memory_gb")
"""Metrics that depend on the machine; all others of a run are decided by its config and data."""


class Meter:
    """Times the steps of one rank since it was last read."""

    def __init__(self) -> None:
        self._started, self._waited, self._images = time.monotonic(), 0.0, 0

    def restart(self) -> None:
        """Begin anew, after work that is no step."""
        self._started, self._waited, self._images = time.monotonic(), 0.0, 0

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; the time spent on getting them counts as waiting."""
        while True:
            asked = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.monotonic() - asked
            yield batch

    def count(self, images: int) -> None:
        """Images trained on by this rank."""
        self._images += images

    def read(self, device: torch.device, world: World | None = None) -> dict[str, float]:
        """`TIMINGS`: images of all ranks per second, largest share of waiting (0 to 1) and largest memory of a rank (GB)."""
        elapsed = max(time.monotonic() - self._started, 1e-9)
        ranks = (world or World()).gather((self._images / elapsed, self._waited / elapsed, memory_gb(device)))
        rates, waits, memories = zip(*ranks, strict=True)
        return dict(zip(TIMINGS, (sum(rates), max(waits), max(memories)), strict=True))


def memory_gb(device: torch.device) -> float:
    """The most memory, in 1e9 bytes, that this process has had: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
