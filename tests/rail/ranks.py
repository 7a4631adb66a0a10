"""Two processes of one stage without MPI: threads with the part of a communicator that our stages use."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Communicator:
    """As mpi4py's, between the threads that share ``told`` and ``barrier``."""

    def __init__(self, rank: int, told: list[Any], barrier: threading.Barrier) -> None:
        self._rank, self._told, self._barrier = rank, told, barrier

    def Get_rank(self) -> int:  # noqa: N802  # MPI's name
        return self._rank

    def Get_size(self) -> int:  # noqa: N802  # MPI's name
        return len(self._told)

    def Barrier(self) -> None:  # noqa: N802  # MPI's name
        self._barrier.wait(60)

    def allgather(self, value: Any) -> list[Any]:
        self._told[self._rank] = value
        self._barrier.wait(60)
        everything = list(self._told)
        self._barrier.wait(60)
        return everything


def run_ranks(count: int, work: Callable[[Communicator], Any]) -> list[Any]:
    """What ``work`` gave, or raised, in each of so many ranks."""
    told: list[Any] = [None] * count
    barrier = threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(work, Communicator(rank, told, barrier)) for rank in range(count)]
    return [future.exception() or future.result() for future in futures]
