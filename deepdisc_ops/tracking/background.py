"""Work on records beside the work that is recorded."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from deepdisc_ops.errors import DeepdiscOpsError

log = logging.getLogger(__name__)


class Background:
    """A thread that brings records up to date while its owner goes on; the owner never waits for a store.

    Work is handed over under a key. Later work of a key replaces what has not begun yet: whoever brings a run up to the newest
    state leaves nothing for earlier calls to do, so a slow store gets fewer, larger calls. Work that fails (`DeepdiscOpsError`)
    is told once, kept, and tried again after ``pause_s`` unless newer work of its key came in between.
    """

    def __init__(self, pause_s: float = 30.0) -> None:
        """``pause_s``: seconds without any attempt after a failure."""
        self._pause_s = pause_s
        self._waiting: dict[str, Callable[[], object]] = {}
        self._changed = threading.Condition()
        self._busy = self._closing = self._away = False
        self._thread = threading.Thread(target=self._run, name="records", daemon=True)
        self._thread.start()

    def submit(self, key: str, work: Callable[[], object]) -> None:
        """Have ``work`` done soon; returns at once."""
        with self._changed:
            self._waiting[key] = work
            self._changed.notify_all()

    def drain(self) -> None:
        """Do all that waits, in this thread, and let its failures through; what failed waits on for another attempt."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._busy)
                if not self._waiting:
                    return
                key, work = self._take()
            try:
                work()
            except BaseException:
                self._give_back(key, work)
                raise
            finally:
                self._free()

    def close(self) -> None:
        """End the thread after the work at hand; what still waits is dropped."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._away:
                    self._changed.wait_for(lambda: self._closing, self._pause_s)
                self._changed.wait_for(lambda: self._closing or (self._waiting and not self._busy))
                if self._closing:
                    return
                key, work = self._take()
            try:
                work()
            except DeepdiscOpsError as error:
                if not self._away:
                    log.warning("%s; it is kept and tried again", error)
                self._away = True
                self._give_back(key, work)
            else:
                self._away = False
            finally:
                self._free()

    def _take(self) -> tuple[str, Callable[[], object]]:
        key = next(iter(self._waiting))
        self._busy = True
        return key, self._waiting.pop(key)

    def _give_back(self, key: str, work: Callable[[], object]) -> None:
        with self._changed:
            self._waiting.setdefault(key, work)

    def _free(self) -> None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()
