"""Being told to stop: a run saves after the step in flight and ends with a code that asks for its job to be queued again.

SLURM sends SIGTERM (or, with ``--signal=B:USR1@120``, SIGUSR1) before it takes a machine away.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process was told to stop; ``passed_on`` is called with every signal that comes."""

    def __init__(self, passed_on: Callable[[], None] | None = None) -> None:
        self.came = False
        self._passed_on = passed_on

    def handle(self, _number: int, _frame: FrameType | None) -> None:
        """Remember it: whoever runs the steps looks between two of them."""
        self.came = True
        if self._passed_on:
            self._passed_on()


@contextmanager
def stop_requests(passed_on: Callable[[], None] | None = None) -> Iterator[StopRequest]:
    """Listen for `STOPPING` inside of the block; outside of the main thread Python cannot, and nothing ever comes."""
    request = StopRequest(passed_on)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.handle) for number in STOPPING}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
