"""A refusal: JSON with a code, what was found and expected, the remedy and the request's name."""

from __future__ import annotations

import json
from dataclasses import dataclass

from deepdisc_ops.errors import RequestRejected
from deepdisc_ops.serving.wire.protocol import REASONS


@dataclass(frozen=True)
class Fault:
    """Why a request was not answered: a short code, what was found and expected, the remedy, and the request's name."""

    code: str
    what: str
    remedy: str
    request: str = ""

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}" if self.remedy else self.what


class Refused(RequestRejected):
    """A request that breaks the protocol, with the `Fault` that the endpoint answers and its HTTP status."""

    def __init__(self, code: str, what: str, remedy: str) -> None:
        self.fault = Fault(code, what, remedy)
        self.status = REASONS[code].status
        super().__init__(str(self.fault))


def encode_fault(fault: Fault) -> str:
    """The JSON of a refusal."""
    return json.dumps({"code": fault.code, "what": fault.what, "remedy": fault.remedy, "request": fault.request})


def decode_fault(body: bytes) -> Fault | None:
    """The refusal in a reply's body, or None when it is no JSON of ours."""
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(tree, dict) or not all(isinstance(tree.get(key), str) for key in ("code", "what", "remedy")):
        return None
    return Fault(tree["code"], tree["what"], tree["remedy"], str(tree.get("request", "")))
