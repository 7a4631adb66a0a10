"""What a TorchServe server is started with, as text: its settings, its log settings, its command line and its environment."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deepdisc_ops.serving import service
from deepdisc_ops.serving.memory import ALLOCATOR
from deepdisc_ops.serving.wire import MODEL_NAME

CONFIG = "config.properties"
LOG_CONFIG = "log4j2.xml"
METRICS_CONFIG = "metrics.yaml"
SERVICE = "service.json"
MARK = "DEEPDISC_OPS_RUN_DIR"
LOOPBACK = "127.0.0.1"

QUEUE_PER_WORKER = 8
LARGEST_LIMIT = 2**31 - 1
"""TorchServe holds its limits in 32 bits."""


@dataclass(frozen=True)
class Ports:
    """TorchServe's five listeners; all but the first are on the loopback interface, wherever the first is."""

    inference: int
    management: int
    metrics: int
    grpc_inference: int
    grpc_management: int


@dataclass(frozen=True)
class Tls:
    """PEM files of a certificate (chain) and of its RSA key in PKCS #8."""

    certificate: Path
    private_key: Path


def render_config(
    *,
    store: Path,
    ports: Ports,
    workers: int,
    request_bytes: int,
    response_bytes: int,
    startup_timeout_s: int,
    response_timeout_s: int = 1800,
    token_minutes: float = 1440.0,
    host: str = LOOPBACK,
    tls: Tls | None = None,
    metrics_config: Path | None = None,
) -> str:
    """TorchServe's config.properties: token required, model API off, this store's archive only, all but predictions on loopback."""
    addresses = {
        "inference_address": f"{'https' if tls else 'http'}://{host}:{ports.inference}",
        "management_address": f"http://{LOOPBACK}:{ports.management}",
        "metrics_address": f"http://{LOOPBACK}:{ports.metrics}",
        "grpc_inference_address": LOOPBACK,
        "grpc_management_address": LOOPBACK,
        "grpc_inference_port": ports.grpc_inference,
        "grpc_management_port": ports.grpc_management,
    }
    access = {
        "disable_token_authorization": "false",
        "token_expiration_min": token_minutes,
        "enable_model_api": "false",
        "enable_envvars_config": "false",
        "allowed_urls": f"file://{re.escape(str(store))}/.*",
    }
    if tls:
        access |= {"certificate_file": str(tls.certificate), "private_key_file": str(tls.private_key)}
    work = {
        "model_store": store,
        "load_models": f"{MODEL_NAME}={MODEL_NAME}.mar",
        "default_workers_per_model": workers,
        "job_queue_size": QUEUE_PER_WORKER * workers,
        "max_request_size": request_bytes,
        "max_response_size": response_bytes,
        "default_response_timeout": response_timeout_s,
        "default_startup_timeout": startup_timeout_s,
        "metrics_mode": "prometheus",
        "disable_system_metrics": "true",
    }
    if metrics_config:
        work["metrics_config"] = metrics_config
    settings = {**addresses, **access, **work}
    return "".join(f"{key}={_escape_property(str(value))}\n" for key, value in settings.items())


def render_log_config() -> str:
    """Log4j settings: three rotated files in $LOG_LOCATION, errors of the server on its console."""
    layout = '<PatternLayout pattern="%d{ISO8601} [%-5p] %t %c - %m%n"/>'
    folder, policy = "${env:LOG_LOCATION}", '<Policies><SizeBasedTriggeringPolicy size="20 MB"/></Policies>'
    files = "".join(
        f'<RollingFile name="{name}" fileName="{folder}/{name}.log" filePattern="{folder}/{name}.%i.log.gz">'
        f'{layout}{policy}<DefaultRolloverStrategy max="5"/></RollingFile>'
        for name in ("access_log", "model_log", "ts_log")
    )
    console = f'<Console name="console" target="SYSTEM_ERR">{layout}</Console>'
    loggers = "".join(
        f'<Logger name="{name}" level="{level}" additivity="false"><AppenderRef ref="{file}"/></Logger>'
        for name, level, file in (("ACCESS_LOG", "info", "access_log"), ("MODEL_LOG", "all", "model_log"))
    )
    quiet = "".join(f'<Logger name="{name}" level="off"/>' for name in ("MODEL_METRICS", "TS_METRICS", "org.apache"))
    root = '<Root level="info"><AppenderRef ref="ts_log"/><AppenderRef ref="console" level="error"/></Root>'
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Configuration><Appenders>{files}{console}</Appenders>'
        f"<Loggers>{loggers}{quiet}{root}</Loggers></Configuration>\n"
    )


def java_command(java: Path, torchserve: Path, folder: Path, temp_dir: Path, heap_mb: int) -> list[str]:
    """The command of the server process; ``torchserve`` is the folder of the package ``ts``, ``folder`` holds the settings."""
    return [
        str(java),
        f"-Xmx{heap_mb}m",
        "-XX:+ExitOnOutOfMemoryError",
        "-XX:-UsePerfData",
        f"-Djava.io.tmpdir={temp_dir}",
        f"-Dmodel_server_home={torchserve.parent}",
        f"-Dlog4j.configurationFile={(folder / LOG_CONFIG).as_uri()}",
        "-cp",
        f"{torchserve / 'frontend'}/*",
        "org.pytorch.serve.ModelServer",
        "--python",
        sys.executable,
        "-f",
        str(folder / CONFIG),
        "-s",
        str(folder / "store"),
        "-ncs",
    ]


def server_environment(
    base: Mapping[str, str], java: Path, run_dir: Path, folder: Path, logs: Path, temp_dir: Path, threads: int
) -> dict[str, str]:
    """Environment of the server and its workers: ``base`` without TorchServe's own settings, paths inside the run directory.

    What ``base`` says of the allocator stands.
    """
    kept = {name: value for name, value in base.items() if not name.startswith("TS_") and name != "JDK_JAVA_OPTIONS"}
    return {**ALLOCATOR, **kept} | {
        "JAVA_HOME": str(java),
        "PATH": os.pathsep.join([str(java / "bin"), str(Path(sys.executable).parent), base.get("PATH", os.defpath)]),
        "TEMP": str(temp_dir),
        "TMPDIR": str(temp_dir),
        "LOG_LOCATION": str(logs),
        "METRICS_LOCATION": str(logs),
        "OMP_NUM_THREADS": str(threads),
        "LC_ALL": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        service.VARIABLE: str(folder / SERVICE),
        MARK: str(run_dir),
    }


def heap_mb(workers: int, request_bytes: int, reply_bytes: int) -> int:
    """Megabytes of Java's heap: a full queue of the largest requests, one more for each worker, and a reply."""
    return 512 + ((QUEUE_PER_WORKER + 1) * workers * request_bytes + reply_bytes) // (1 << 20)


def _escape_property(value: str) -> str:
    """A value as java.util.Properties reads it back: backslashes doubled, other than ASCII escaped."""
    return "".join("\\\\" if c == "\\" else c if " " <= c <= "~" else "".join(f"\\u{u:04x}" for u in _utf16(c)) for c in value)


def _utf16(character: str) -> list[int]:
    units = character.encode("utf-16-be")
    return [int.from_bytes(units[i : i + 2], "big") for i in range(0, len(units), 2)]
