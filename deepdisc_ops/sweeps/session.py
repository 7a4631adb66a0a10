"""A Ray instance that lives as long as one sweep, and signals that end the sweep in order."""

from __future__ import annotations

import logging
import os
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType

import psutil

from deepdisc_ops.errors import ConfigError, SetupError
from deepdisc_ops.sweeps.space import Resources

log = logging.getLogger(__name__)

LONGEST_TEMPORARY = 40
"""Ray appends up to 67 characters to its folder for a socket, whose path may have 107 bytes."""
OBJECT_STORE_BYTES = 200 * 1024**2
STARTS = 3
ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}
"""No tables on the terminal, no calls home, no change of folder in workers, no event files, our own signal handlers."""


@contextmanager
def ray_session(resources: Resources) -> Iterator[None]:
    """Ray on this machine alone, on free ports behind a token, without dashboard; nothing of it outlives the block.

    Raises SetupError if Ray does not start, ConfigError if one trial asks for more than the machine has.
    """
    import ray

    temporary = _temporary_folder()
    with _environment(ENVIRONMENT | {"RAY_AUTH_TOKEN": _token()}):
        try:
            _start(temporary)
            check_room(resources, ray.cluster_resources())
            yield
        finally:
            _stop(temporary)
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Let SIGTERM and SIGINT end Ray Tune's loop in order; the list tells which came. A second one interrupts at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        caught.append(number)
        # Tune saves its state and returns from its loop on SIGUSR1; outside of that loop nobody listens.
        if len(caught) == 1 and signal.getsignal(signal.SIGUSR1) not in (signal.SIG_DFL, signal.SIG_IGN, None):
            signal.raise_signal(signal.SIGUSR1)
        else:
            raise SystemExit(128 + number)

    with _signals_restored():
        signal.signal(signal.SIGTERM, handle)
        signal.signal(signal.SIGINT, handle)
        yield caught


@contextmanager
def _signals_restored() -> Iterator[None]:
    """Put back the handlers that Ray, Tune and we replace; only the main thread may, and only there they are replaced."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _start(temporary: Path) -> None:
    """Start Ray; it gives a node 30 s, which a busy machine may not keep, hence the second and third try."""
    import ray

    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    fault = ""
    for _ in range(STARTS):
        try:
            with _signals_restored():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=str(temporary),
                    # Ray hands its workers' interpreter to a shell as it is; a path with a space would start none
                    runtime_env={"py_executable": shlex.quote(sys.executable)},
                )
            logging.getLogger("ray.tune").setLevel(logging.ERROR)
        except Exception as error:  # noqa: BLE001  Ray raises the bare class here
            fault = " ".join(str(error).split())[:300]
            log.warning("Ray did not start: %s", fault)
            _stop(temporary)
        else:
            return
    raise SetupError(f"Ray did not start in {STARTS} attempts ({fault}); free the processors and start again")


def _stop(temporary: Path) -> None:
    """Stop Ray, and then whatever of it is still there."""
    import ray

    processes = _processes_of(temporary)
    ray.shutdown()
    _end(processes)


def _temporary_folder() -> Path:
    parent = tempfile.gettempdir()
    job = os.environ.get("SLURM_JOB_ID", "")
    name = f"r-{job}-" if job else "r-"
    short = parent if len(parent) + len(name) + 9 <= LONGEST_TEMPORARY else "/tmp"
    return Path(tempfile.mkdtemp(prefix=name, dir=short))


@cache
def _token() -> str:
    """A token of this process's own: other users stay out, the home folder stays as it is. Ray keeps the first it sees."""
    return secrets.token_hex(32)


def check_room(resources: Resources, available: dict[str, float]) -> None:
    """Raise ConfigError if one trial asks for more than Ray has in all; it would wait for ever."""
    for key, wanted, found in (
        ("cpus", resources.cpus, available.get("CPU", 0.0)),
        ("gpus", resources.gpus, available.get("GPU", 0.0)),
    ):
        if wanted > found:
            raise ConfigError(f"resources.{key}: a trial asks for {wanted:g}, this machine has {found:g}; lower it")


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables that the user has not set, for the block and the processes it starts."""
    new = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for key in new:
            os.environ.pop(key, None)


def _processes_of(temporary: Path) -> list[psutil.Process]:
    """Our descendants that belong to the Ray instance in ``temporary``, with theirs."""
    found: dict[int, psutil.Process] = {}
    for child in psutil.Process().children(recursive=True):
        try:
            if any(str(temporary) in part for part in child.cmdline()):
                found |= {process.pid: process for process in (child, *child.children(recursive=True))}
        except psutil.NoSuchProcess:
            continue
    return list(found.values())


def _end(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    for process in alive:
        log.warning("ending Ray's process %d, which outlived its shutdown", process.pid)
        process.kill()
    psutil.wait_procs(alive, timeout=5)
