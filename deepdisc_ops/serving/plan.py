"""What is to be served and with what means: the operator's settings, and what follows from an archive."""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from deepdisc_ops.config import InferenceSettings, Settings, TrainingConfig, validate
from deepdisc_ops.errors import ConfigError
from deepdisc_ops.serving.archive import verify_archive
from deepdisc_ops.serving.contents import DustSource
from deepdisc_ops.serving.render import LARGEST_LIMIT, LOOPBACK, Tls
from deepdisc_ops.serving.service import ServiceSettings

OVERLAP_ALLOWANCE = 1.5
COLUMNS_PER_ROW = 64
CHARACTERS_PER_NUMBER = 20
MARGIN_BYTES = 4 << 20


class ServerSettings(Settings):
    """How an archive is served; the archive itself may change while the server runs.

    threads: of a worker, by default OMP_NUM_THREADS or an equal share of the cores; wait_s: until all workers are ready;
    max_window: side in pixels of the largest window accepted; host: address that clients connect to; roots: folders below
    which requests may name files; memory: members stay in a worker's memory or are read one after the other; token_minutes:
    life of a token, renewed after two thirds of it; drain_s: how long requests in flight are waited for; restart: start the
    server anew when it dies; response_timeout_s: after which a worker counts as hung and is replaced.
    """

    workers: int = Field(1, ge=1)
    threads: int | None = Field(None, ge=1)
    wait_s: float = Field(180.0, gt=0)
    max_window: int = Field(2048, ge=64)
    host: str = LOOPBACK
    certificate: Path | None = None
    private_key: Path | None = None
    roots: tuple[Path, ...] = ()
    memory: Literal["keep", "swap"] = "keep"
    dust_map: str | None = None
    dust_folder: Path | None = None
    dust_scale: float = Field(1.0, gt=0)
    token_minutes: float = Field(1440.0, gt=0)
    drain_s: float = Field(60.0, ge=0)
    restart: bool = False
    response_timeout_s: int = Field(1800, ge=1)


@dataclass(frozen=True)
class Plan:
    """An archive and the limits that follow from its members; ``source`` is the path its user gave, ``digest`` its SHA-256.

    dust: the E(B-V) that its members were trained with, where that is told.
    """

    archive: Path
    source: str
    version: str
    digest: str
    bands: tuple[str, ...]
    pixel_scale: float | None
    request_bytes: int
    reply_bytes: int
    dust: DustSource | None = None


def check_settings(tree: Mapping[str, Any]) -> ServerSettings:
    """Settings from a mapping; `ConfigError` for what is unknown, out of range, or would lay a server open."""
    settings = validate(ServerSettings, tree, "server settings")
    paths = {name: getattr(settings, name) for name in ("certificate", "private_key", "dust_folder")}
    absolute = {name: path.absolute() for name, path in paths.items() if path is not None}
    roots = tuple(root.absolute() for root in settings.roots)
    for root in roots:
        if not root.is_dir():
            raise ConfigError(f"root {root} is no folder; name folders below which requests may read")
    settings = settings.model_copy(update={**absolute, "roots": roots})
    _check_access(settings)
    return settings


def tls(settings: ServerSettings) -> Tls | None:
    """The files of the certificate and its key, None for plain HTTP."""
    if settings.certificate is None or settings.private_key is None:
        return None
    return Tls(settings.certificate, settings.private_key)


def make_plan(mar: Path, settings: ServerSettings, source: str | None = None) -> Plan:
    """Check the archive and work out limits from its members' settings; `ArchiveError` names a damaged member."""
    contents = verify_archive(mar)
    configs = [validate(TrainingConfig, member["config"], f"{mar}, {member['name']}") for member in contents["members"]]
    components = sum(config.model.redshift_head.components for config in configs)
    detections = max(detections_per_megapixel(config.inference) for config in configs)
    bands, scale = configs[0].model.bands, configs[0].model.pixel_scale
    window = settings.max_window
    limits = request_limit(len(bands), window), response_limit(components, detections, window)
    dust = DustSource(**contents["dust"]) if contents["dust"] else None
    return Plan(mar.absolute(), source or str(mar.absolute()), contents["version"], contents["sha256"], bands, scale, *limits, dust)


def service_settings(plan: Plan, settings: ServerSettings, busy: Path) -> ServiceSettings:
    """What the workers are told."""
    dust_map, dust_scale = _dust(plan, settings)
    return ServiceSettings(
        roots=settings.roots,
        max_window=settings.max_window,
        request_bytes=plan.request_bytes,
        reply_bytes=plan.reply_bytes,
        busy=busy,
        memory=settings.memory,
        dust_map=dust_map,
        dust_folder=settings.dust_folder,
        dust_scale=dust_scale,
    )


def _dust(plan: Plan, settings: ServerSettings) -> tuple[str | None, float]:
    """The source of E(B-V) and its scale: those asked for, or those of the archive, whose maps need a folder of this machine."""
    if settings.dust_map is not None or plan.dust is None:
        return settings.dust_map, settings.dust_scale
    if settings.dust_folder is None and plan.dust.number is None:
        return None, settings.dust_scale
    return plan.dust.source, plan.dust.scale


def request_limit(bands: int, max_window: int) -> int:
    """Bytes of the largest request: a window of ``max_window`` x ``max_window`` pixels, 4 bytes in each band and in its mask."""
    return min(4 * (bands + 1) * max_window**2 + MARGIN_BYTES, LARGEST_LIMIT)


def detections_per_megapixel(inference: InferenceSettings) -> float:
    """The most that a member can find: half its proposals in a crowd, or what it is capped at in a tile."""
    if inference.max_detections is None:
        return inference.crowding * inference.proposals_per_megapixel / 2
    return inference.max_detections * 1e6 / (inference.tile - inference.overlap) ** 2


def response_limit(components: int, detections_per_megapixel: float, max_window: int) -> int:
    """Bytes of the largest reply; TorchServe kills a worker that goes over it, so it is generous.

    Tiles overlap; a row of the widest form, JSON, writes COLUMNS_PER_ROW numbers and three of each component of the
    ensemble's mixture.
    """
    rows = int(OVERLAP_ALLOWANCE * detections_per_megapixel * max_window**2 / 1e6)
    return min(rows * CHARACTERS_PER_NUMBER * (COLUMNS_PER_ROW + 3 * components) + MARGIN_BYTES, LARGEST_LIMIT)


def default_threads(workers: int, environment: Mapping[str, str]) -> int:
    """Threads of one worker: OMP_NUM_THREADS where it is set, otherwise an equal share of the usable cores."""
    wish = environment.get("OMP_NUM_THREADS", "")
    return int(wish) if wish.isdigit() and int(wish) > 0 else max(1, len(os.sched_getaffinity(0)) // workers)


def _check_access(settings: ServerSettings) -> None:
    if (settings.certificate is None) != (settings.private_key is None):
        raise ConfigError("a certificate needs its private key and the key its certificate; give --certificate and --private-key")
    if not _is_loopback(settings.host) and settings.certificate is None:
        raise ConfigError(f"{settings.host} can be reached by others; serve there only with --certificate and --private-key")
    if files := tls(settings):
        _check_tls(files)


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(socket.gethostbyname(host))
    except (OSError, UnicodeError):
        raise ConfigError(f"host {host!r} is no IPv4 address or name of this machine; give one that clients can reach") from None
    if address.is_unspecified:
        raise ConfigError(f"{host} means every address; give the one that clients are to connect to")
    return address.is_loopback


def _check_tls(files: Tls) -> None:
    """TorchServe reads RSA keys in PKCS #8 alone, and tells of others by a stack trace."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files.certificate, files.private_key, password=_no_password)
        encoded = files.private_key.read_text("ascii", "replace")
    except (OSError, ConfigError) as error:  # ssl.SSLError is an OSError
        reason = error.strerror if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else error
        both = f"{files.certificate} and {files.private_key}"
        raise ConfigError(
            f"{both} are no certificate and its private key ({reason}); give PEM files that belong together"
        ) from None
    if "-----BEGIN PRIVATE KEY-----" not in encoded:
        remedy = f"openssl pkcs8 -topk8 -nocrypt -in {files.private_key}"
        raise ConfigError(f"{files.private_key} is not in PKCS #8, which TorchServe wants; convert it: {remedy}")


def _no_password() -> str:
    raise ConfigError("it is encrypted; give one without a password, mode 0600")
