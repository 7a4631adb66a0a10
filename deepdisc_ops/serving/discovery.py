"""The file by which clients find a server: address, token and limits, readable by its owner alone."""

from __future__ import annotations

import contextlib
import json
import os
import ssl
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from deepdisc_ops.errors import ServerUnreachable

DISCOVERY = "server.json"
TARGETS = "targets.json"
RESERVED_BYTES = 1 << 14


@dataclass(frozen=True)
class ServerInfo:
    """A running server as the discovery file tells it; times in seconds since 1970.

    ``pid`` is that of the JVM, which leads the group of its workers; ``generation`` counts the JVMs of a run directory;
    ``certificate`` is the path of the PEM that clients trust, None for plain HTTP.
    """

    url: str
    token: str = field(repr=False)
    management_url: str
    management_token: str = field(repr=False)
    metrics_url: str
    model: str
    archive: str
    model_version: str
    bands: tuple[str, ...]
    pixel_scale: float | None
    workers: int
    max_window: int
    request_bytes: int
    reply_bytes: int
    pid: int
    worker_pids: tuple[int, ...]
    supervisor_pid: int
    generation: int
    started: float
    token_expires: str
    certificate: str | None
    run_dir: str
    package_version: str


def discover(path: Path) -> ServerInfo:
    """What clients need of the server that wrote ``path``: its run directory or the server.json in it."""
    run_dir = path.parent if path.suffix == ".json" else path
    info = read_discovery(run_dir)
    if info is None:
        raise ServerUnreachable(f"no endpoint runs in {run_dir}; start one with deepdisc-ops serve start")
    return info


def read_discovery(run_dir: Path) -> ServerInfo | None:
    """The discovery file of ``run_dir``, None where there is none."""
    try:
        tree = json.loads((run_dir / DISCOVERY).read_text())
        return ServerInfo(**{**tree, "bands": tuple(tree["bands"]), "worker_pids": tuple(tree["worker_pids"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ServerUnreachable(
            f"{run_dir / DISCOVERY} is no discovery file of this version ({error}); start the server anew"
        ) from None


def trust(certificate: Path | str | None) -> ssl.SSLContext | bool:
    """What httpx takes as ``verify`` for a server with this certificate."""
    return True if certificate is None else ssl.create_default_context(cafile=certificate)


def encode_discovery(info: ServerInfo) -> str:
    """The text of the discovery file."""
    return json.dumps(asdict(info), indent=2) + "\n"


def encode_targets(info: ServerInfo) -> str:
    """Where the metrics are, in the form of Prometheus' file_sd_configs; ports change with every start and upgrade."""
    labels = {"run_dir": info.run_dir, "generation": str(info.generation), "model_version": info.model_version}
    return json.dumps([{"targets": [info.metrics_url.partition("://")[2]], "labels": labels}]) + "\n"


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner reads, complete or not at all."""
    with reserved(path, len(text.encode())) as write:
        write(text)


@contextlib.contextmanager
def reserved(path: Path, size: int = RESERVED_BYTES) -> Iterator[Callable[[str], None]]:
    """Take the space for ``path`` first, raising OSError on a full disk; the function writes it, complete or not at all.

    Tokens are renewed in between: those that could not be told to clients must not come into being.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))

            def write(text: str) -> None:
                encoded = text.encode()
                if file.write(encoded) != len(encoded):
                    raise OSError(f"no space for {path}")
                file.truncate(len(encoded))
                os.fsync(file.fileno())
                scratch.replace(path)

            yield write
        finally:
            scratch.unlink(missing_ok=True)
