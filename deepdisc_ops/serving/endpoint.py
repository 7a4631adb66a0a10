"""One endpoint as a client sees it: an address, or a discovery file that is followed wherever its server goes.

A server that renews its token, restarts, drains or hands over to the next version says so by rewriting its server.json; an
`Endpoint` looks at the file before every request.
"""

from __future__ import annotations

import logging
import re
import ssl
import threading
from collections.abc import Mapping
from pathlib import Path

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deepdisc_ops.errors import AccessDenied, ConfigError, ServerUnreachable
from deepdisc_ops.serving.discovery import DISCOVERY, trust
from deepdisc_ops.serving.failures import Passing, failure
from deepdisc_ops.serving.wire import MODEL_NAME, PREDICT_PATH

MOST_CONNECTIONS = 64
TIMEOUT_S = 900.0

log = logging.getLogger(__name__)


class Address(BaseModel):
    """What a client has to know of a server; a discovery file holds more.

    certificate: the certificate, or that of its authority, that is trusted where the URL is https; bands, pixel_scale (arcsec) and
    model_version: of the model, None where nobody said; max_window: side of the largest window, pixels; archive: the file that is
    served, where it can be seen from here; draining: it takes nothing new.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    url: str
    token: str = Field(repr=False)
    certificate: Path | None = None
    model: str = MODEL_NAME
    model_version: str | None = None
    bands: tuple[str, ...] | None = None
    pixel_scale: float | None = None
    workers: int = Field(1, ge=1)
    max_window: int | None = Field(None, ge=64)
    archive: Path | None = None
    draining: bool = False


def read_address(path: Path) -> Address:
    """The address of the server that wrote ``path``: its run directory or the server.json in it."""
    file = discovery_file(path)
    try:
        return Address.model_validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ServerUnreachable(f"no endpoint runs there: {file} does not exist; start one with deepdisc-ops serve start") from None
    except PermissionError:
        raise AccessDenied(f"{file} cannot be read, which only the server's owner may; ask them for the token") from None
    except (OSError, ValidationError):
        raise ServerUnreachable(f"{file} is no discovery file; start the endpoint anew with deepdisc-ops serve start") from None


def discovery_file(path: Path) -> Path:
    """The discovery file that ``path``, a run directory or the file itself, stands for."""
    return path if path.suffix == ".json" else path / DISCOVERY


class Endpoint:
    """Sends windows to one server: the one at an address, or the one that a discovery file names at the time.

    Threads may share it. ``timeout_s`` is for one window.
    """

    def __init__(self, source: Address | Path, *, timeout_s: float = TIMEOUT_S) -> None:
        self.file = discovery_file(source) if isinstance(source, Path) else None
        self._timeout = httpx.Timeout(timeout_s, connect=10.0)
        self._lock = threading.Lock()
        self._stamp: tuple[int, ...] | None = None
        self._address: Address | None = None
        self._connections: httpx.Client | None = None
        self._retired: list[httpx.Client] = []
        if isinstance(source, Address):
            self._take(source)

    def __str__(self) -> str:
        return self._address.url if self._address else str(self.file)

    def address(self) -> Address:
        """Where the server is now; raises `ServerUnreachable` where none is."""
        return self._current()[0]

    @property
    def known(self) -> Address | None:
        """Where the server was when last looked for, None before it was ever found."""
        return self._address

    def post(self, body: bytes, headers: Mapping[str, str], size: str) -> bytes:
        """The reply to one request; raises `Passing`, `TooLarge`, or an error. ``size`` is what they call the window."""
        try:
            address, connections = self._current()
        except ServerUnreachable as error:
            raise Passing(str(error), "refused") from None
        if address.draining:
            raise Passing(f"{address.url} is about to stop", "busy")
        own = {**headers, "authorization": f"Bearer {address.token}"}
        try:
            reply = connections.post(f"{address.url}{PREDICT_PATH}", content=body, headers=own)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self._missed(Passing(f"nothing answers at {address.url} ({error})", "refused")) from None
        except httpx.TransportError as error:
            raise self._missed(Passing(f"connection lost: {type(error).__name__} {error}".rstrip(), "lost")) from None
        if reply.status_code == httpx.codes.OK:
            return reply.content
        raise self._missed(failure(address.url, reply.status_code, reply.content, size))

    def close(self) -> None:
        """Close the connections."""
        for connections in (*self._retired, self._connections):
            if connections is not None:
                connections.close()

    def _missed(self, error: Exception) -> Exception:
        """Let the file be read anew next time: over a network its time may be an old one."""
        self._stamp = None
        return error

    def _current(self) -> tuple[Address, httpx.Client]:
        with self._lock:
            if self.file is not None:
                self._follow(self.file)
            if self._address is None or self._connections is None:
                raise ServerUnreachable(f"no endpoint is known for {self.file}")
            return self._address, self._connections

    def _follow(self, file: Path) -> None:
        """Read the discovery file if it is another than before."""
        try:
            stat = file.stat()
            stamp = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        except OSError:
            stamp = None
        if stamp is None or stamp != self._stamp:
            self._take(read_address(file))
            self._stamp = stamp

    def _take(self, address: Address) -> None:
        if not re.fullmatch(r"[!-~]+", address.token):
            raise AccessDenied(f"the token for {address.url} is empty or no plain text; read it from the server's server.json")
        old, self._address = self._address, address
        if old is None or (old.url, old.certificate) != (address.url, address.certificate):
            if old is not None:
                log.info("%s moved from %s to %s", self.file, old.url, address.url)
            if self._connections is not None:
                self._retired.append(self._connections)  # requests may still be under way on them
            self._connections = httpx.Client(
                verify=_trusted(address),
                timeout=self._timeout,
                limits=httpx.Limits(max_connections=MOST_CONNECTIONS),
                trust_env=False,  # a proxy of the site must not see loopback addresses
            )


def endpoint_at(
    source: str | Path, token: str | None = None, certificate: Path | None = None, *, timeout_s: float = TIMEOUT_S
) -> Endpoint:
    """The endpoint of a run directory or a discovery file, or at a URL with its ``token``."""
    if not isinstance(source, str) or not source.startswith(("http://", "https://")):
        return Endpoint(Path(source), timeout_s=timeout_s)
    if token is None:
        raise ConfigError(f"{source} needs a token; give it, or the server's run directory or server.json instead of the URL")
    return Endpoint(Address(url=source.rstrip("/"), token=token, certificate=certificate), timeout_s=timeout_s)


def _trusted(address: Address) -> ssl.SSLContext | bool:
    """What a https address is verified with."""
    try:
        return trust(None if address.certificate is None else str(address.certificate))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{address.certificate}, the certificate of {address.url}, cannot be used ({error}); give a PEM"
        ) from None
