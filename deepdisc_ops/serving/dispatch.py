"""Requests sent to several endpoints: whoever has room gets the next, and a failure that may pass is waited out.

A failed request goes to another endpoint, or waits for one with growing pauses. Nothing here knows what is in a request.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from deepdisc_ops.errors import ServerError, ServerUnreachable
from deepdisc_ops.serving.endpoint import Endpoint
from deepdisc_ops.serving.failures import Kind, Passing
from deepdisc_ops.serving.outgoing import Outgoing
from deepdisc_ops.serving.wire import REQUEST_HEADER

PATIENCE_S = 300.0
LOSSES = 3
"""So often a request is sent anew after a worker or connection ended under it, or said that it failed."""
DENIED_S = 5.0
"""A token that was just renewed is in the discovery file by then."""
LONGEST_REST_S = 8.0
LONGEST_BUSY_S = 1.0
"""A queue that others have filled has room again when a window is done."""

log = logging.getLogger(__name__)


class Lost(ServerError):
    """Workers or connections ended under a window again and again."""


@dataclass
class _Line:
    """An endpoint and what this process has to do with it.

    failures: in a row; rest_until: nothing is sent before, by the monotonic clock; refused: nothing listened there last time;
    limit: windows under way at once that its queue has taken lately, as others may fill it too.
    """

    endpoint: Endpoint
    most: int | None
    in_flight: int = 0
    failures: int = 0
    rest_until: float = 0.0
    met: bool = False
    refused: bool = False
    limit: float = math.inf

    @property
    def workers(self) -> int:
        known = self.endpoint.known
        return 1 if known is None else known.workers

    @property
    def room(self) -> int:
        """Windows that may be under way at once: one that is computed and one that waits, a worker."""
        return self.most or 2 * self.workers

    @property
    def has_room(self) -> bool:
        """Whether one more may be sent now."""
        return self.in_flight < min(self.room, self.limit)

    def answered(self) -> None:
        """It is well; its queue may take one more in a round of its windows."""
        self.failures, self.met, self.refused = 0, True, False
        self.limit += 1 / max(self.limit, 1)

    def failed(self, kind: Kind, now: float) -> None:
        """Send fewer at once where its queue was full, which ends as soon as one of ours is answered; else pause."""
        self.failures += 1
        self.refused = kind == "refused"
        self.met = self.met or not self.refused
        if kind == "busy":
            self.limit = max(1, self.in_flight)
            if self.in_flight:
                return
        longest = LONGEST_BUSY_S if kind == "busy" else LONGEST_REST_S
        rest = min(longest, 0.1 * 2 ** min(self.failures, 8))
        self.rest_until = max(self.rest_until, now + rest * random.uniform(0.5, 1.0))


class Dispatcher:
    """Sends requests to ``endpoints``. Threads may share it; the options are those of `Fleet`.

    trouble: how often which failure was waited out.
    """

    def __init__(self, endpoints: Sequence[Endpoint], *, patience_s: float = PATIENCE_S, most: int | None = None) -> None:
        self.trouble: Counter[str] = Counter()
        self._lines = [_Line(endpoint, most) for endpoint in endpoints]
        self._patience_s = patience_s
        self._free = threading.Condition()
        self._answered = 0.0

    @property
    def workers(self) -> int:
        """Of all endpoints."""
        return sum(line.workers for line in self._lines)

    @property
    def room(self) -> int:
        """Requests that may be under way at once, at all of them."""
        return sum(line.room for line in self._lines)

    def send(self, outgoing: Outgoing, name: str) -> tuple[bytes, Endpoint]:
        """The reply to one request, however often it has to be sent, and who gave it."""
        headers = {**outgoing.headers, REQUEST_HEADER: name}
        began: float | None = None
        losses, failed_at = 0, list[_Line]()
        while True:
            line = self._take(failed_at)
            try:
                body = line.endpoint.post(outgoing.body, headers, outgoing.size)
            except Passing as failure:
                self._give_back(line, failure)
                began = time.monotonic() if began is None else began
                losses += failure.kind in ("lost", "failed")
                failed_at.append(line)
                self._judge(failure, line, began, losses, outgoing.size)
                log.warning("request %s at %s: %s; trying again", name, line.endpoint, failure)
            except BaseException:
                self._give_back(line)
                raise
            else:
                self._give_back(line)
                return body, line.endpoint

    def _take(self, failed_at: Sequence[_Line]) -> _Line:
        """An endpoint with room, the least busy one, once there is one; not one at which the window failed if another is well."""
        with self._free:
            while True:
                now = time.monotonic()
                well = [line for line in self._lines if line not in failed_at and not line.failures] if failed_at else []
                awake = [line for line in well or self._lines if line.rest_until <= now]
                free = [line for line in awake if line.has_room]
                if free:
                    line = min(free, key=lambda line: line.in_flight / line.workers)
                    line.in_flight += 1
                    return line
                resting = [line.rest_until - now for line in self._lines if line.rest_until > now]
                self._free.wait(min(resting, default=None))

    def _give_back(self, line: _Line, failure: Passing | None = None) -> None:
        with self._free:
            now = time.monotonic()
            line.in_flight -= 1
            if failure is None:
                self._answered = now
                line.answered()
            else:
                self.trouble[str(failure)] += 1
                line.failed(failure.kind, now)
            self._free.notify_all()

    def _judge(self, failure: Passing, line: _Line, began: float, losses: int, size: str) -> None:
        """Raise what a failure is if it is not waited out any longer."""
        now = time.monotonic()
        if failure.kind == "denied" and failure.error and (line.endpoint.file is None or now - began > DENIED_S):
            raise failure.error
        if all(other.refused and not other.met for other in self._lines):
            raise ServerUnreachable(f"{failure}; start an endpoint with deepdisc-ops serve start")
        if losses >= LOSSES:
            raise failure.error or Lost(f"the window of {size} was lost {losses} times at {line.endpoint} ({failure})")
        if now - max(began, self._answered) > self._patience_s:
            who = ", ".join(str(other.endpoint) for other in self._lines)
            what = f"the endpoint {who} failed for {self._patience_s:.0f} s ({failure})"
            raise ServerUnreachable(f"{what}; see deepdisc-ops serve status")
