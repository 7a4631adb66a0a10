"""One TorchServe endpoint for one archive: started, looked at and stopped by its run directory.

Everything a server writes lies in its run directory (mode 0700): config.properties, a store with the archive alone, logs,
scratch space, TorchServe's key_file.json and ``server.json``, by which clients find URL and token (mode 0600). Java is
started without TorchServe's launcher, which hides its exit code and keeps one pid file for the whole machine. The server
leads its own process group, outlives whoever started it, and is ended by the ids of its own processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import psutil

import deepdisc_ops
from deepdisc_ops.config import InferenceSettings, TrainingConfig, validate
from deepdisc_ops.errors import ConfigError, ServerError, ServerUnreachable, SetupError
from deepdisc_ops.installation import java_home
from deepdisc_ops.serving.archive import verify_archive
from deepdisc_ops.serving.client import Client
from deepdisc_ops.serving.wire import MODEL_NAME
from deepdisc_ops.sky.dust import EbvPlane

DISCOVERY = "server.json"
CONFIG = "config.properties"
LOG_CONFIG = "log4j2.xml"
KEY_FILE = "key_file.json"
LOCK = ".deepdisc-server.lock"
MARK = "DEEPDISC_OPS_RUN_DIR"
HOST = "127.0.0.1"

TOKEN_DAYS = 30
QUEUE_PER_WORKER = 8
REQUESTS_IN_HEAP = 8
RESPONSE_TIMEOUT_S = 1800
STOP_GRACE_S = 15.0
START_ATTEMPTS = 3
LONGEST_SOCKET_PATH = 100
OVERLAP_ALLOWANCE = 1.5

_EXCEPTION_LINE = re.compile(r"(?:^|MODEL_LOG - )((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Interrupt)\b(?::.*)?)$")

log = logging.getLogger(__name__)

State = Literal["ready", "unready", "stopped"]


@dataclass(frozen=True)
class Ports:
    """TorchServe's five listeners on the loopback interface."""

    inference: int
    management: int
    metrics: int
    grpc_inference: int
    grpc_management: int


@dataclass(frozen=True)
class ServerInfo:
    """A running server as the discovery file tells it; times in seconds since 1970."""

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
    pid: int
    worker_pids: tuple[int, ...]
    started: float
    token_expires: str
    temp_dir: str
    package_version: str


@dataclass(frozen=True)
class ServerStatus:
    """State of a run directory's server, one line about it, and what its discovery file says, if there is one."""

    state: State
    what: str
    info: ServerInfo | None = None


@dataclass(frozen=True)
class _Plan:
    """What is to be served, and with what means."""

    archive: Path
    version: str
    bands: tuple[str, ...]
    pixel_scale: float | None
    workers: int
    threads: int
    max_window: int
    request_bytes: int
    response_bytes: int


class _PortTaken(Exception):
    """Another process took one of the ports between choosing and binding."""


def start(
    mar: Path,
    run_dir: Path,
    *,
    workers: int = 1,
    threads: int | None = None,
    wait_s: float = 180.0,
    max_window: int = 2048,
    progress: Callable[[str], None] | None = None,
) -> ServerInfo:
    """Serve ``mar`` from ``run_dir`` and return once every worker is ready and a canary was predicted.

    ``threads`` per worker default to OMP_NUM_THREADS or an equal share of the cores. ``max_window`` is the side in pixels
    of the largest window accepted. `ArchiveError` names a damaged member; `ServerError` carries the reason from the log.
    """
    tell = progress or log.info
    if workers < 1 or max_window < 64:
        raise ConfigError(f"{workers} workers for windows of up to {max_window} pixels; give at least 1 and 64")
    plan = _plan(mar, workers, threads or default_threads(workers, os.environ), max_window)
    run_dir = run_dir.absolute()
    _check_own(run_dir)
    with _locked(run_dir):
        _prepare(run_dir)
        for attempt in range(START_ATTEMPTS):
            try:
                return _start_once(plan, run_dir, wait_s, tell)
            except _PortTaken as taken:
                log.warning("attempt %d: %s", attempt + 1, taken)
    raise ServerError(f"no free loopback ports after {START_ATTEMPTS} attempts; see {run_dir / 'logs'}")


def status(run_dir: Path) -> ServerStatus:
    """Look at a run directory's server without changing anything."""
    info = _read_discovery(run_dir.absolute())
    if info is None:
        return ServerStatus("stopped", f"no server in {run_dir}")
    if not _leads(info.pid, run_dir.absolute()):
        return ServerStatus("stopped", f"the server of {run_dir} (pid {info.pid}) has ended; see {run_dir / 'logs'}", info)
    try:
        states = _worker_states(info.management_url, info.management_token)
    except httpx.HTTPError as error:
        return ServerStatus("unready", f"{info.url} runs but does not answer ({type(error).__name__})", info)
    ready = sum(state == "READY" for state in states.values())
    what = f"{info.url} serves {info.archive}: {ready} of {info.workers} workers ready"
    return ServerStatus("ready" if ready >= info.workers else "unready", what, info)


def discover(path: Path) -> ServerInfo:
    """What clients need of the server that wrote ``path``: its run directory or the server.json in it."""
    run_dir = path.parent if path.suffix == ".json" else path
    info = _read_discovery(run_dir)
    if info is None:
        raise ServerUnreachable(f"no endpoint runs in {run_dir}; start one with deepdisc-ops serve start")
    return info


def stop(run_dir: Path, *, grace_s: float = STOP_GRACE_S) -> bool:
    """End the server of ``run_dir``, all of its processes; False when there was none."""
    run_dir = run_dir.absolute()
    if not run_dir.is_dir():
        return False
    with _locked(run_dir):
        info = _read_discovery(run_dir)
        if info is None:
            return False
        _end(info.pid, run_dir, grace_s)
        _clean_up(run_dir, Path(info.temp_dir))
    return True


def render_config(
    *, store: Path, ports: Ports, workers: int, request_bytes: int, response_bytes: int, startup_timeout_s: int
) -> str:
    """TorchServe's config.properties: loopback only, token required, model API off, this store's archive only."""
    addresses = {
        "inference_address": f"http://{HOST}:{ports.inference}",
        "management_address": f"http://{HOST}:{ports.management}",
        "metrics_address": f"http://{HOST}:{ports.metrics}",
        "grpc_inference_address": HOST,
        "grpc_management_address": HOST,
        "grpc_inference_port": ports.grpc_inference,
        "grpc_management_port": ports.grpc_management,
    }
    access = {
        "disable_token_authorization": "false",
        "token_expiration_min": TOKEN_DAYS * 24 * 60,
        "enable_model_api": "false",
        "enable_envvars_config": "false",
        "allowed_urls": f"file://{re.escape(str(store))}/.*",
    }
    service = {
        "model_store": store,
        "load_models": f"{MODEL_NAME}={MODEL_NAME}.mar",
        "default_workers_per_model": workers,
        "job_queue_size": QUEUE_PER_WORKER * workers,
        "max_request_size": request_bytes,
        "max_response_size": response_bytes,
        "default_response_timeout": RESPONSE_TIMEOUT_S,
        "default_startup_timeout": startup_timeout_s,
        "metrics_mode": "prometheus",
        "disable_system_metrics": "true",
    }
    settings = {**addresses, **access, **service}
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


def java_command(java: Path, torchserve: Path, run_dir: Path, temp_dir: Path, heap_mb: int) -> list[str]:
    """The command of the server process; ``torchserve`` is the folder of the package ``ts``."""
    return [
        str(java),
        f"-Xmx{heap_mb}m",
        "-XX:+ExitOnOutOfMemoryError",
        "-XX:-UsePerfData",
        f"-Djava.io.tmpdir={temp_dir}",
        f"-Dmodel_server_home={torchserve.parent}",
        f"-Dlog4j.configurationFile={(run_dir / LOG_CONFIG).as_uri()}",
        "-cp",
        f"{torchserve / 'frontend'}/*",
        "org.pytorch.serve.ModelServer",
        "--python",
        sys.executable,
        "-f",
        str(run_dir / CONFIG),
        "-s",
        str(run_dir / "store"),
        "-ncs",
    ]


def server_environment(base: Mapping[str, str], java: Path, run_dir: Path, temp_dir: Path, threads: int) -> dict[str, str]:
    """Environment of the server and its workers: ``base`` without TorchServe's own settings, paths inside the run directory."""
    kept = {name: value for name, value in base.items() if not name.startswith("TS_") and name != "JDK_JAVA_OPTIONS"}
    logs, temp = str(run_dir / "logs"), str(temp_dir)
    return kept | {
        "JAVA_HOME": str(java),
        "PATH": os.pathsep.join([str(java / "bin"), str(Path(sys.executable).parent), base.get("PATH", os.defpath)]),
        "TEMP": temp,
        "TMPDIR": temp,
        "LOG_LOCATION": logs,
        "METRICS_LOCATION": logs,
        "OMP_NUM_THREADS": str(threads),
        "LC_ALL": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        MARK: str(run_dir),
    }


def request_limit(bands: int, max_window: int) -> int:
    """Bytes of the largest request: a window of ``max_window`` x ``max_window`` float32 pixels in ``bands`` bands."""
    return 4 * bands * max_window**2 + (1 << 16)


def detections_per_megapixel(inference: InferenceSettings) -> float:
    """The most that a member can find: half its proposals in a crowd, or what it is capped at in a tile."""
    if inference.max_detections is None:
        return inference.crowding * inference.proposals_per_megapixel / 2
    return inference.max_detections * 1e6 / (inference.tile - inference.overlap) ** 2


def response_limit(components: int, detections_per_megapixel: float, max_window: int) -> int:
    """Bytes of the largest reply; TorchServe kills a worker that goes over it, so it is generous.

    Tiles overlap; a row holds a box, five numbers and three of each component of the ensemble's mixture.
    """
    rows = OVERLAP_ALLOWANCE * detections_per_megapixel * max_window**2 / 1e6
    return int(rows) * 4 * (4 + 5 + 3 * components) + (4 << 20)


def default_threads(workers: int, environment: Mapping[str, str]) -> int:
    """Threads of one worker: OMP_NUM_THREADS where it is set, otherwise an equal share of the usable cores."""
    wish = environment.get("OMP_NUM_THREADS", "")
    return int(wish) if wish.isdigit() and int(wish) > 0 else max(1, len(os.sched_getaffinity(0)) // workers)


def failure_in_log(text: str) -> str | None:
    """Why the model could not be loaded, from the logs of server and worker: the last exception in them.

    TorchServe's worker ends with an exception of its own (``RuntimeError: 500 - ...``), which says nothing.
    """
    if "Backend worker process died" not in text and "Failed to load model" not in text:
        return None
    reasons = [match[1] for line in text.splitlines() if (match := _EXCEPTION_LINE.search(line.rstrip()))]
    telling = [reason for reason in reasons if not re.match(r"RuntimeError: \d{3} - ", reason)]
    return telling[-1].removeprefix("deepdisc_ops.errors.") if telling else None


def free_ports(count: int) -> list[int]:
    """Loopback ports that nothing listens on now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for candidate in sockets:
            candidate.bind((HOST, 0))
        return [int(candidate.getsockname()[1]) for candidate in sockets]


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory, made when it is not there, against another start or stop."""
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (run_dir / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServerError(f"another start or stop is at work in {run_dir}; wait for it to end") from None
        yield


def _check_own(run_dir: Path) -> None:
    """Refuse a folder that holds other things than a server's."""
    others = sorted(path.name for path in run_dir.iterdir()) if run_dir.is_dir() else []
    if others and LOCK not in others:
        raise ServerError(f"{run_dir} holds other files ({others[0]}, ...); give the server a directory of its own")


def _prepare(run_dir: Path) -> None:
    """Make the run directory private and empty it, unless its server runs."""
    info = _read_discovery(run_dir)
    if info is not None and _leads(info.pid, run_dir):
        raise ServerError(f"{run_dir} already serves {info.archive} at {info.url}; stop it first with deepdisc-ops serve stop")
    if info is not None:
        _end(info.pid, run_dir, STOP_GRACE_S)
    run_dir.chmod(0o700)
    _clean_up(run_dir, run_dir / "tmp")
    shutil.rmtree(run_dir / "logs", ignore_errors=True)
    (run_dir / "logs").mkdir(mode=0o700)


def _place(mar: Path, target: Path) -> None:
    """Put the archive into its store, without a copy where the file system allows it."""
    target.parent.mkdir(mode=0o700)
    try:
        os.link(mar.resolve(), target)
    except OSError:
        shutil.copyfile(mar, target)


def _temp_dir(run_dir: Path) -> Path:
    """Scratch space whose path is short enough for the workers' sockets, which lie in it."""
    inside = run_dir / "tmp"
    if len(os.fsencode(inside / ".ts.sock.65535")) <= LONGEST_SOCKET_PATH:
        inside.mkdir(mode=0o700)
        return inside
    return Path(tempfile.mkdtemp(prefix="deepdisc-", dir="/tmp"))


def _plan(mar: Path, workers: int, threads: int, max_window: int) -> _Plan:
    """Check the archive and work out limits from its members' settings."""
    contents = verify_archive(mar)
    configs = [validate(TrainingConfig, member["config"], f"{mar}, {member['name']}") for member in contents["members"]]
    components = sum(config.model.redshift_head.components for config in configs)
    detections = max(detections_per_megapixel(config.inference) for config in configs)
    bands, scale = configs[0].model.bands, configs[0].model.pixel_scale
    limits = request_limit(len(bands), max_window), response_limit(components, detections, max_window)
    return _Plan(mar.absolute(), contents["version"], bands, scale, workers, threads, max_window, *limits)


def _start_once(plan: _Plan, run_dir: Path, wait_s: float, tell: Callable[[str], None]) -> ServerInfo:
    """One attempt on freshly chosen ports; nothing is left running when it fails."""
    torchserve = importlib.util.find_spec("ts")
    if torchserve is None or torchserve.origin is None:
        raise SetupError("torchserve is not installed; run: pip install 'deepdisc-ops[serve]'")
    _place(plan.archive, run_dir / "store" / f"{MODEL_NAME}.mar")
    ports = Ports(*free_ports(len(fields(Ports))))
    config = render_config(
        store=run_dir / "store",
        ports=ports,
        workers=plan.workers,
        request_bytes=plan.request_bytes,
        response_bytes=plan.response_bytes,
        startup_timeout_s=math.ceil(wait_s),
    )
    _write_private(run_dir / CONFIG, config)
    _write_private(run_dir / LOG_CONFIG, render_log_config())
    java, temp_dir = java_home(), _temp_dir(run_dir)
    heap_mb = 512 + REQUESTS_IN_HEAP * plan.request_bytes // (1 << 20)
    command = java_command(java / "bin" / "java", Path(torchserve.origin).parent, run_dir, temp_dir, heap_mb)
    tell(f"starting TorchServe, {plan.workers} worker(s) of {plan.threads} thread(s)")
    process = _launch(command, server_environment(os.environ, java, run_dir, temp_dir, plan.threads), run_dir)
    try:
        keys = _wait_until_ready(process, run_dir, ports, plan.workers, wait_s)
        info = _describe(plan, ports, keys, process.pid, temp_dir)
        tell("workers are ready, predicting a canary")
        _canary(info)
        _write_private(run_dir / DISCOVERY, json.dumps(asdict(info), indent=2) + "\n")
    except BaseException:
        _end(process.pid, run_dir, STOP_GRACE_S)
        _clean_up(run_dir, temp_dir)
        raise
    return info


def _describe(plan: _Plan, ports: Ports, keys: Mapping[str, Any], pid: int, temp_dir: Path) -> ServerInfo:
    management_url, management_token = f"http://{HOST}:{ports.management}", str(keys["management"]["key"])
    return ServerInfo(
        url=f"http://{HOST}:{ports.inference}",
        token=keys["inference"]["key"],
        management_url=management_url,
        management_token=management_token,
        metrics_url=f"http://{HOST}:{ports.metrics}",
        model=MODEL_NAME,
        archive=str(plan.archive),
        model_version=plan.version,
        bands=plan.bands,
        pixel_scale=plan.pixel_scale,
        workers=plan.workers,
        max_window=plan.max_window,
        pid=pid,
        worker_pids=tuple(_worker_states(management_url, management_token)),
        started=time.time(),
        token_expires=keys["inference"]["expiration time"],
        temp_dir=str(temp_dir),
        package_version=deepdisc_ops.__version__,
    )


_launched: dict[int, subprocess.Popen[bytes]] = {}
"""Servers started by this process, kept so that their exit codes can be collected when they end."""


def _launch(command: Sequence[str], environment: Mapping[str, str], run_dir: Path) -> subprocess.Popen[bytes]:
    with (run_dir / "logs" / "console.log").open("wb") as console:
        process = subprocess.Popen(
            command,
            cwd=run_dir,  # TorchServe writes its key file into the working directory
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _launched[process.pid] = process
    return process


def _wait_until_ready(process: subprocess.Popen[bytes], run_dir: Path, ports: Ports, workers: int, wait_s: float) -> dict[str, Any]:
    """Poll until all workers are READY; the keys of the key file. `ServerError` with the reason when it will not be."""
    url, logs = f"http://{HOST}:{ports.management}", run_dir / "logs"
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        if (code := process.poll()) is not None:
            console = _tail(logs / "console.log")
            if any("already in use" in line or "Failed to bind" in line for line in console):
                raise _PortTaken("another process took a port that was free; choosing others")
            raise ServerError(
                f"TorchServe ended with code {code} before it was ready ({_summary(console)}); the logs are in {logs}"
            )
        if reason := failure_in_log("\n".join(_tail(logs / "ts_log.log") + _tail(logs / "model_log.log"))):
            raise ServerError(f"the archive could not be loaded: {reason}; the logs are in {logs}")
        with contextlib.suppress(httpx.TransportError, OSError, ValueError):
            keys: dict[str, Any] = json.loads((run_dir / KEY_FILE).read_text())
            states = _worker_states(url, keys["management"]["key"])
            if len(states) >= workers and all(state == "READY" for state in states.values()):
                return keys
        time.sleep(0.25)
    latest = _summary(_tail(logs / "model_log.log") or _tail(logs / "ts_log.log"))
    raise ServerError(f"not ready after {wait_s:.0f} s ({latest}); wait longer with --wait, or see the logs in {logs}")


def _worker_states(management_url: str, token: str) -> dict[int, str]:
    """State of each worker process by its pid, READY when it can predict."""
    headers = {"Authorization": f"Bearer {token}"}
    reply = httpx.get(f"{management_url}/models/{MODEL_NAME}", headers=headers, timeout=10, trust_env=False)
    if reply.status_code != httpx.codes.OK:
        return {}
    return {int(worker["pid"]): str(worker["status"]) for model in reply.json() for worker in model["workers"]}


def _canary(info: ServerInfo) -> None:
    """Predict on a small window of noise through the inference port."""
    noise = np.random.default_rng(0).normal(size=(len(info.bands), 64, 64)).astype(np.float32)
    with Client(info.url, info.token, patience_s=10.0) as client:
        client.predict_array(noise, info.bands, None, EbvPlane.constant(0.0))


def _leads(pid: int, run_dir: Path) -> bool:
    """Whether the server process itself lives; its workers end by themselves without it."""
    return any(process.pid == pid for process in _group(pid, run_dir))


def _group(pid: int, run_dir: Path) -> list[psutil.Process]:
    """Live processes of the group that ``pid`` leads and that carry our mark; never another's, should the id be reused."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) != pid or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(MARK) == str(run_dir):
                members.append(process)
    return members


def _end(pid: int, run_dir: Path, grace_s: float) -> None:
    """Ask the server to end, then kill what is left of its group, and collect the exit code where it is our child.

    Workers have nothing to finish once the server is gone, so they are not waited for.
    """
    leader = [process for process in _group(pid, run_dir) if process.pid == pid]
    for process in leader:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _wait_gone(leader, grace_s)
    remaining = _group(pid, run_dir)
    for process in remaining:
        if process.pid == pid:
            log.warning("the server (pid %d) did not end in %.0f s and is killed", pid, grace_s)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _wait_gone(remaining, grace_s)
    if child := _launched.pop(pid, None):
        child.wait(timeout=grace_s)


def _wait_gone(processes: Sequence[psutil.Process], timeout_s: float) -> None:
    """Wait for processes to end; one that its parent has not collected yet counts as ended."""
    deadline = time.monotonic() + timeout_s
    while any(_lives(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _clean_up(run_dir: Path, temp_dir: Path | None) -> None:
    """Remove what must not outlive a server: keys, discovery file, store, scratch space. Settings and logs stay."""
    for name in (DISCOVERY, KEY_FILE):
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / "store", ignore_errors=True)
    if temp_dir is not None:
        shutil.rmtree(temp_dir, ignore_errors=True)


def _read_discovery(run_dir: Path) -> ServerInfo | None:
    try:
        tree = json.loads((run_dir / DISCOVERY).read_text())
        return ServerInfo(**{**tree, "bands": tuple(tree["bands"]), "worker_pids": tuple(tree["worker_pids"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ServerUnreachable(
            f"{run_dir / DISCOVERY} is no discovery file of this version ({error}); start the server anew"
        ) from None


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner reads, complete or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    scratch.replace(path)


def _tail(path: Path, lines: int = 400) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []


def _summary(lines: Sequence[str]) -> str:
    """The line that says most: the last one that names an exception, or the last one."""
    telling = [line for line in lines if _EXCEPTION_LINE.search(line)] or [line for line in lines if line.strip()]
    return telling[-1].strip() if telling else "its log is empty"


def _escape_property(value: str) -> str:
    """A value as java.util.Properties reads it back: backslashes doubled, other than ASCII escaped."""
    return "".join("\\\\" if c == "\\" else c if " " <= c <= "~" else "".join(f"\\u{u:04x}" for u in _utf16(c)) for c in value)


def _utf16(character: str) -> list[int]:
    units = character.encode("utf-16-be")
    return [int.from_bytes(units[i : i + 2], "big") for i in range(0, len(units), 2)]
