"""Ray for as long as a block lasts: one of this machine's own, or a cluster that is there already."""

from __future__ import annotations

import gc
import logging
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepdisc_ops.errors import SetupError

if TYPE_CHECKING:
    import psutil

log = logging.getLogger(__name__)

LONGEST_TEMPORARY = 40
"""Ray appends up to 67 characters to its folder for a socket, whose path may have 107 bytes."""
OBJECT_STORE_BYTES = 200 * 1024**2
STARTS = 3
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""No calls home; GPUs stay visible to who asks for none."""


@contextmanager
def session(address: str | None = None) -> Iterator[None]:
    """The Ray that this process has begun already, else the cluster at ``address``, else one of this machine's own.

    Raises `SetupError` where Ray is not installed.
    """
    missing = [name for name in ("ray", "psutil") if find_spec(name) is None]
    if missing:
        raise SetupError(f"{' and '.join(missing)} not installed; install deepdisc-ops[sweep]")
    import ray

    if ray.is_initialized():
        yield
        return
    with own_ray() if address is None else joined_ray(address):
        yield


@contextmanager
def own_ray(environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Ray on this machine alone, on free ports behind a token, without dashboard.

    Nothing of it outlives the block, nor this process if it is killed.
    ``environment`` is set for the block and the processes it starts, where the user has not set it. Raises `SetupError` if Ray
    does not start.
    """
    temporary = _temporary_folder()
    with _environment({**ENVIRONMENT, **(environment or {}), "RAY_AUTH_TOKEN": _token()}), _guarded(temporary):
        try:
            _start(temporary)
            yield
        finally:
            _stop(temporary)
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def joined_ray(address: str, environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """The cluster at ``address`` (HOST:PORT, or auto for the one that this machine belongs to), left again after the block.

    ``environment`` is set here and in what is started there. What was started in the block and does not ask to stay ends with
    it. Raises `SetupError` where nothing answers.
    """
    import ray

    python = shlex.quote(sys.executable)
    runtime: dict[str, Any] = {"py_executable": python} if python != sys.executable else {}  # see _start
    if environment:
        runtime["env_vars"] = dict(environment)
    with _environment({**ENVIRONMENT, **(environment or {})}):
        try:
            with signals_restored():
                ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, runtime_env=runtime or None)
        except Exception as error:  # noqa: BLE001  Ray raises the bare class here
            fault = " ".join(str(error).split())[:300]
            raise SetupError(
                f"no Ray cluster can be joined at {address} ({fault}); give the HOST:PORT that `ray start --head` told, "
                "with the same versions of Python and Ray"
            ) from None
        try:
            yield
        finally:
            with _no_collection():
                ray.shutdown()


@contextmanager
def signals_restored() -> Iterator[None]:
    """Put back the handlers that Ray, Tune and we replace; only the main thread may, and only there they are replaced."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _guarded(temporary: Path) -> Iterator[None]:
    """A process beside this one that cleans up if this one cannot, see `deepdisc_ops.ray_guard`."""
    from deepdisc_ops.ray_guard import NAME

    command = [sys.executable, "-m", NAME, str(temporary)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        yield  # the end of the block closes the guard's input and waits for it


def _start(temporary: Path) -> None:
    """Start Ray; it gives a node 30 s, which a busy machine may not keep, hence the second and third try."""
    import ray

    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    fault = ""
    for _ in range(STARTS):
        try:
            with signals_restored():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    object_store_memory=OBJECT_STORE_BYTES,
                    num_cpus=_job_cpus(),
                    _temp_dir=str(temporary),
                    # Ray hands its workers' interpreter to a shell as it is; a path with a space would start none
                    runtime_env={"py_executable": shlex.quote(sys.executable)},
                )
        except Exception as error:  # noqa: BLE001  Ray raises the bare class here
            fault = " ".join(str(error).split())[:300]
            log.warning("Ray did not start: %s", fault)
            _stop(temporary)
        else:
            return
    raise SetupError(f"Ray did not start in {STARTS} attempts ({fault}); free the processors and start again")


def _stop(temporary: Path) -> None:
    """Stop Ray, and then whatever of it is still there."""
    import psutil
    import ray

    from deepdisc_ops.ray_guard import ray_processes

    processes = ray_processes(psutil.Process(), temporary)
    with _no_collection():
        ray.shutdown()
    _end(processes)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect what refers to Ray while it is there, and nothing while it ends.

    Another thread whose collection comes upon such a reference just then asks a core worker that is no more, and Ray ends the
    process for it, without a word to Python.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _job_cpus() -> int | None:
    """The CPUs that SLURM gave the job on this node; None, all that Ray sees, where there is no job."""
    found = os.environ.get("SLURM_CPUS_ON_NODE", "")
    return int(found) if found.isdecimal() and int(found) > 0 else None


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


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that the user has not set, for the block and the processes it starts."""
    new = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for key in new:
            os.environ.pop(key, None)


def _end(processes: list[psutil.Process]) -> None:
    import psutil

    _, alive = psutil.wait_procs(processes, timeout=10)
    for process in alive:
        log.warning("ending Ray's process %d, which outlived its shutdown", process.pid)
        process.kill()
    psutil.wait_procs(alive, timeout=5)
