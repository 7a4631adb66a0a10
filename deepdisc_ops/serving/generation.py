"""One JVM of a run directory with its workers: started on free ports, proved by canaries, given new tokens, drained, ended.

A generation lives in a folder of its own, ``g<N>``, so that the next one can be brought up beside it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import httpx
import numpy as np
import psutil

import deepdisc_ops
from deepdisc_ops.errors import DeepdiscOpsError, ServerError, SetupError
from deepdisc_ops.installation import java_home
from deepdisc_ops.serving import logs, management, processes, render
from deepdisc_ops.serving.discovery import ServerInfo, trust, write_private
from deepdisc_ops.serving.metrics import render_metrics_config
from deepdisc_ops.serving.plan import Plan, ServerSettings, default_threads, service_settings, tls
from deepdisc_ops.serving.wire import IMAGE_TYPE, MODEL_NAME, PREDICT_PATH, decode_detections, encode_image
from deepdisc_ops.sky.dust import EbvPlane

KEY_FILE = "key_file.json"
STOP_GRACE_S = 15.0
START_ATTEMPTS = 3
CANARY_ROUNDS = 20
CANARY_SIDE = 64
LONGEST_SOCKET_PATH = 100
RENEWED_AFTER = 2 / 3

log = logging.getLogger(__name__)

Tick = Callable[[], None]
"""Called while something is waited for; it may raise to give up."""


class _PortTaken(Exception):
    """Another process took one of the ports between choosing and binding."""


@dataclass
class Generation:
    """The N-th JVM of ``run_dir``; what asks it can be called once `start` has returned."""

    number: int
    plan: Plan
    settings: ServerSettings
    run_dir: Path

    def __post_init__(self) -> None:
        self.folder = self.run_dir / f"g{self.number}"
        self.logs = logs.folder_of(self.run_dir, self.number)
        self.busy = self.folder / "busy"
        self._info: ServerInfo | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._renewal = ""
        self._renewed = 0.0

    def start(self, tick: Tick, tell: Callable[[str], None]) -> ServerInfo:
        """Return once every worker is ready and has answered a canary; nothing is left running when it fails."""
        for attempt in range(START_ATTEMPTS):
            try:
                self._info = self._start_once(tick, tell)
            except _PortTaken as taken:
                log.warning("attempt %d: %s", attempt + 1, taken)
                self.end()
            except OSError as error:
                self.end()
                raise ServerError(f"{self.folder} cannot be laid out ({error}); is the disk full?") from None
            except BaseException:
                self.end()
                raise
            else:
                return self._info
        raise ServerError(f"no free ports after {START_ATTEMPTS} attempts; see {self.logs}")

    @property
    def info(self) -> ServerInfo:
        """What clients need of it."""
        if self._info is None:
            raise ServerError(f"server {self.number} of {self.run_dir} has not started; see {self.logs}")
        return self._info

    def exit_code(self) -> int | None:
        """Of the JVM, None while it lives; 128 and the signal's number where a signal ended it."""
        code = None if self._process is None else self._process.poll()
        return 128 - code if code is not None and code < 0 else code

    def model(self) -> management.ModelStatus:
        """What the management API says of the model; httpx.HTTPError when it does not answer."""
        return management.model_status(self.info.management_url, self.info.management_token)

    def renewal_due(self, now: float) -> bool:
        """Whether two thirds of the tokens' life are over; ``now`` in seconds since 1970."""
        return now >= self._renewed + RENEWED_AFTER * 60 * self.settings.token_minutes

    def renew(self) -> ServerInfo:
        """New tokens in place of the old; may be tried again after a `ServerError`."""
        keys = self._renew(self.info.management_url)
        self._info = replace(
            self.info, token=keys.inference, management_token=keys.management, token_expires=keys.expires, worker_pids=self._pids()
        )
        return self.info

    def close_door(self) -> None:
        """Accept nothing more: from now on nobody has a token; what was accepted goes on."""
        with contextlib.suppress(ServerError):  # it has ended, or is about to
            management.renew_token(self.info.management_url, self._renewal, "inference")

    def unanswered(self) -> int:
        """Requests that wait or are worked at; 0 when the JVM does not answer, for then it cannot answer them either."""
        try:
            return self.model().pending + len(self._at_work())
        except httpx.HTTPError:
            return 0

    def end(self, grace_s: float = STOP_GRACE_S) -> None:
        """End all its processes and remove what must not outlive it: keys, store, scratch space. The logs stay."""
        if self._process is not None:
            processes.end_group(self._process.pid, self.run_dir, grace_s)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=grace_s)
        remove_folder(self.folder)

    def _at_work(self) -> list[Path]:
        """Files of workers that live and answer; a worker that was killed leaves its file behind."""
        files = self.busy.iterdir() if self.busy.is_dir() else ()
        return [file for file in files if not file.name.isdigit() or psutil.pid_exists(int(file.name))]

    def _keys(self, url: str) -> management.Keys:
        """The tokens of a server that is starting, renewed where its start takes longer than they live."""
        keys = management.read_keys(self.folder / KEY_FILE)
        self._renewal = keys.renewal
        if self.renewal_due(time.time()):
            with contextlib.suppress(ServerError):
                return self._renew(url)
        return keys

    def _renew(self, url: str) -> management.Keys:
        moment = time.time()
        for kind in ("management", "inference"):
            management.renew_token(url, self._renewal, kind)
        try:
            keys = management.read_keys(self.folder / KEY_FILE)
        except (OSError, ValueError) as error:
            raise ServerError(f"TorchServe's new tokens cannot be read ({error}); it is tried again") from None
        self._renewed = moment
        return keys

    def _pids(self) -> tuple[int, ...]:
        with contextlib.suppress(httpx.HTTPError):
            if pids := tuple(worker.pid for worker in self.model().workers):
                return pids
        return self.info.worker_pids

    def _start_once(self, tick: Tick, tell: Callable[[str], None]) -> ServerInfo:
        ports = self._lay_out()
        threads = self.settings.threads or default_threads(self.settings.workers, os.environ)
        java, assigned = java_home(), (self.folder / "tmp").resolve()
        heap = render.heap_mb(self.settings.workers, self.plan.request_bytes, self.plan.reply_bytes)
        command = render.java_command(java / "bin" / "java", _torchserve(), self.folder, assigned, heap)
        environment = render.server_environment(os.environ, java, self.run_dir, self.folder, self.logs, assigned, threads)
        tell(f"starting TorchServe, {self.settings.workers} worker(s) of {threads} thread(s)")
        self._renewed = time.time()
        self._process = processes.launch(command, environment, self.folder, self.logs / "console.log")
        keys = self._wait_until_ready(self._process, ports, tick)
        info = self._describe(ports, keys, self._process.pid)
        tell("workers are ready, each predicts a canary")
        self._canaries(info, tick)
        return info

    def _lay_out(self) -> render.Ports:
        """Write the folder of this generation: settings, log settings, what workers are told, and the store."""
        settings = self.settings
        remove_folder(self.folder)
        for folder in (self.folder, self.busy, self.folder / "store"):
            folder.mkdir(mode=0o700)
        self.logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        place(self.plan.archive, self.folder / "store" / f"{MODEL_NAME}.mar")
        make_temp_dir(self.folder)
        inner = processes.free_ports(len(fields(render.Ports)))
        ports = render.Ports(processes.free_ports(1, settings.host)[0], *inner[1:])
        config = render.render_config(
            store=self.folder / "store",
            ports=ports,
            workers=settings.workers,
            request_bytes=self.plan.request_bytes,
            response_bytes=self.plan.reply_bytes,
            startup_timeout_s=math.ceil(settings.wait_s),
            response_timeout_s=settings.response_timeout_s,
            token_minutes=settings.token_minutes,
            host=settings.host,
            tls=tls(settings),
            metrics_config=self.folder / render.METRICS_CONFIG,
        )
        write_private(self.folder / render.CONFIG, config)
        write_private(self.folder / render.LOG_CONFIG, render.render_log_config())
        write_private(self.folder / render.METRICS_CONFIG, render_metrics_config())
        told = service_settings(self.plan, settings, self.busy)
        write_private(self.folder / render.SERVICE, told.model_dump_json(indent=2) + "\n")
        return ports

    def _wait_until_ready(self, process: subprocess.Popen[bytes], ports: render.Ports, tick: Tick) -> management.Keys:
        """Poll until all workers are READY; `ServerError` with the reason when they will not be."""
        url, wait_s = f"http://{render.LOOPBACK}:{ports.management}", self.settings.wait_s
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            tick()
            if (code := process.poll()) is not None:
                console = logs.tail(self.logs / "console.log")
                if any("already in use" in line or "Failed to bind" in line for line in console):
                    raise _PortTaken("another process took a port that was free; choosing others")
                raise ServerError(
                    f"TorchServe ended with code {code} before it was ready ({logs.summary(console)}); the logs are in {self.logs}"
                )
            told = [*logs.tail(self.logs / "ts_log.log"), *logs.tail(self.logs / "model_log.log")]
            if reason := logs.failure_in_log("\n".join(told)):
                raise ServerError(f"the archive could not be loaded: {reason}; the logs are in {self.logs}")
            with contextlib.suppress(httpx.TransportError, OSError, ValueError):
                keys = self._keys(url)
                if management.model_status(url, keys.management).ready >= self.settings.workers:
                    return keys
            time.sleep(0.5)
        latest = logs.summary(logs.tail(self.logs / "model_log.log") or logs.tail(self.logs / "ts_log.log"))
        raise ServerError(f"not ready after {wait_s:.0f} s ({latest}); wait longer with --wait, or see the logs in {self.logs}")

    def _describe(self, ports: render.Ports, keys: management.Keys, pid: int) -> ServerInfo:
        settings, files = self.settings, tls(self.settings)
        url = f"http://{render.LOOPBACK}:{ports.management}"
        return ServerInfo(
            url=f"{'https' if files else 'http'}://{settings.host}:{ports.inference}",
            token=keys.inference,
            management_url=url,
            management_token=keys.management,
            metrics_url=f"http://{render.LOOPBACK}:{ports.metrics}",
            model=MODEL_NAME,
            archive=self.plan.source,
            model_version=self.plan.version,
            bands=self.plan.bands,
            pixel_scale=self.plan.pixel_scale,
            workers=settings.workers,
            max_window=settings.max_window,
            request_bytes=self.plan.request_bytes,
            reply_bytes=self.plan.reply_bytes,
            pid=pid,
            worker_pids=tuple(worker.pid for worker in management.model_status(url, keys.management).workers),
            supervisor_pid=os.getpid(),
            generation=self.number,
            started=time.time(),
            token_expires=keys.expires,
            certificate=str(files.certificate) if files else None,
            run_dir=str(self.run_dir),
            package_version=deepdisc_ops.__version__,
        )

    def _canaries(self, info: ServerInfo, tick: Tick) -> None:
        """Predict a window of noise on every worker, through the door that clients take.

        TorchServe hands requests to whichever worker is free; its access log tells which was. Rounds of as many as there are
        workers go on until each has had one.
        """
        noise = np.random.default_rng(0).normal(size=(len(info.bands), CANARY_SIDE, CANARY_SIDE)).astype(np.float32)
        body, headers = encode_image(noise, info.bands, None, EbvPlane.constant(0.0))
        headers |= {"content-type": IMAGE_TYPE, "authorization": f"Bearer {info.token}", "x-deepdisc-request": "canary"}
        timeout = httpx.Timeout(self.settings.wait_s, connect=10.0)
        with (
            httpx.Client(base_url=info.url, verify=trust(info.certificate), timeout=timeout, trust_env=False) as http,
            ThreadPoolExecutor(info.workers) as pool,
        ):
            proved = set[str]()
            for _ in range(CANARY_ROUNDS):
                tick()
                for sent in [pool.submit(http.post, PREDICT_PATH, content=body, headers=headers) for _ in range(info.workers)]:
                    _check_canary(info, sent.result)
                if len(proved := logs.answered(self.logs / "access_log.log")) >= info.workers:
                    return
        silent = info.workers - len(proved)
        raise ServerError(f"{silent} of {info.workers} workers took no canary in {CANARY_ROUNDS} rounds; see {self.logs}")


def _check_canary(info: ServerInfo, answer: Callable[[], httpx.Response]) -> None:
    try:
        reply = answer()
        if reply.status_code == httpx.codes.OK:
            decode_detections(reply.content)
            return
        why = f"{reply.status_code} {' '.join(reply.text.split())[:300]}"
    except (httpx.HTTPError, DeepdiscOpsError) as error:
        why = f"{type(error).__name__}: {error}"
    where = logs.folder_of(Path(info.run_dir), info.generation)
    raise ServerError(f"{info.url} does not answer a canary as it should ({why}); see {where}")


def place(mar: Path, target: Path) -> None:
    """Put an archive somewhere, without a copy where the file system allows it."""
    try:
        os.link(mar.resolve(), target)
    except OSError:
        shutil.copyfile(mar, target)


def make_temp_dir(folder: Path) -> None:
    """Scratch space ``tmp`` in ``folder``; a link where its path is too long for the workers' sockets, which lie in it."""
    inside = folder / "tmp"
    if len(os.fsencode(inside.resolve() / ".ts.sock.65535")) <= LONGEST_SOCKET_PATH:
        inside.mkdir(mode=0o700)
    else:
        inside.symlink_to(tempfile.mkdtemp(prefix="deepdisc-", dir="/tmp"))


def remove_folder(folder: Path) -> None:
    """Remove the folder of a generation and its scratch space."""
    if (folder / "tmp").is_symlink():
        shutil.rmtree((folder / "tmp").resolve(), ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def _torchserve() -> Path:
    found = importlib.util.find_spec("ts")
    if found is None or found.origin is None:
        raise SetupError("torchserve is not installed; run: pip install 'deepdisc-ops[serve]'")
    return Path(found.origin).parent
