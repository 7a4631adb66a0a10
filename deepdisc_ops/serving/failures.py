"""What a reply other than 200 means to the client: an error, a failure that may pass, or a window that is too large.

What TorchServe's front end answers by itself (400 for a wrong token, an empty 413, 503 for a full queue) carries no JSON of ours
and is told by its words.
"""

from __future__ import annotations

import json
from typing import Literal

import httpx

from deepdisc_ops.errors import AccessDenied, RequestRejected, ServerError
from deepdisc_ops.serving.wire import decode_fault

Kind = Literal["refused", "busy", "denied", "lost", "failed"]
"""refused: nothing listens; busy: it takes no more now; denied: the token is not accepted (any more); lost: worker or connection
ended under the window; failed: the worker says so. The last two may be the window's own doing."""


class Passing(Exception):
    """A failure that may pass by itself or at another endpoint; ``error`` is what it is if it does not."""

    def __init__(self, what: str, kind: Kind, error: ServerError | None = None) -> None:
        super().__init__(what)
        self.kind, self.error = kind, error


class TooLarge(RequestRejected):
    """A window that is more than an endpoint takes in, holds, or may give back: its parts may not be.

    ``lasting``: no window of this size will ever be taken, whatever is in it.
    """

    def __init__(self, what: str, *, lasting: bool = False) -> None:
        super().__init__(what)
        self.lasting = lasting


def failure(url: str, status: int, body: bytes, size: str) -> Exception:
    """What a reply of ``status`` other than 200 stands for; ``size`` describes the window that was sent."""
    if fault := decode_fault(body):
        if status in (httpx.codes.REQUEST_ENTITY_TOO_LARGE, httpx.codes.INSUFFICIENT_STORAGE):
            return TooLarge(f"the endpoint refused the window of {size}: {fault}", lasting=fault.code == "window_too_large")
        if 400 <= status < 500:
            return RequestRejected(f"the endpoint refused the window of {size}: {fault}")
        return Passing(f"{status} {fault}", "failed", ServerError(f"the endpoint {url} failed: {fault}"))
    message = _message(body)
    if status == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
        what = f"the window of {size} is larger than {url} accepts"
        return TooLarge(f"{what}; use a smaller --window or start it with a larger --max-window", lasting=True)
    if status in (400, 401, 403) and "token" in message.lower():
        why = f"{url} does not accept the token ({message}); read it anew from the server's server.json"
        return Passing(f"{status} {message}", "denied", AccessDenied(why))
    if status in (429, 502, 503, 504):
        return Passing(f"{status} {message}".rstrip(), "busy")
    if status in (500, 507) and "worker" in message.lower():
        return Passing(f"{status} {message}", "lost")
    if 400 <= status < 500:
        return RequestRejected(f"{url} answered {status} ({message}); is a deepdisc-ops endpoint serving there?")
    why = f"{url} answered {status} ({message}); see deepdisc-ops serve status and its logs"
    return Passing(f"{status} {message}".rstrip(), "failed", ServerError(why))


def _message(body: bytes) -> str:
    """TorchServe's own explanation, or the start of the body."""
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        tree = None
    message = tree.get("message") if isinstance(tree, dict) else None
    return " ".join(str(message or body[:200].decode("utf-8", "replace")).split())
