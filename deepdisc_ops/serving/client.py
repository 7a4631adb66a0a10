"""The Python side of one endpoint: windows in, detections out, and every failure as one of our errors."""

from __future__ import annotations

from pathlib import Path

from deepdisc_ops.serving.dispatch import PATIENCE_S
from deepdisc_ops.serving.endpoint import TIMEOUT_S, endpoint_at
from deepdisc_ops.serving.fleet import Fleet


class Client(Fleet):
    """A `Fleet` of one: the endpoint at a URL with its ``token``, or that of a run directory or discovery file.

    ``certificate`` (PEM) is what a https URL is verified with. ``patience_s``: for how long a failure that may pass is waited out;
    ``timeout_s``: for one window.
    """

    def __init__(
        self,
        source: str | Path,
        token: str | None = None,
        *,
        certificate: Path | None = None,
        timeout_s: float = TIMEOUT_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        super().__init__([endpoint_at(source, token, certificate, timeout_s=timeout_s)], patience_s=patience_s)

    @classmethod
    def from_discovery(cls, path: Path, *, timeout_s: float = TIMEOUT_S, patience_s: float = PATIENCE_S) -> Client:
        """The client of the server that wrote ``path``, its run directory or the ``server.json`` in it, wherever that moves."""
        return cls(path, timeout_s=timeout_s, patience_s=patience_s)

    @property
    def url(self) -> str:
        """Where the endpoint was when last looked for."""
        return str(self._endpoints[0])
