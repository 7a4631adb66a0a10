"""The processes of a server: started in a group of their own, found by their mark, ended by their ids and nobody else's."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from deepdisc_ops.serving.render import LOOPBACK, MARK

PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


def launch(command: Sequence[str], environment: Mapping[str, str], folder: Path, console: Path) -> subprocess.Popen[bytes]:
    """Start a server as leader of its own group, with ``folder`` as working directory; it ends when this process dies."""
    library = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def end_with_parent() -> None:
        if library is not None:
            library.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    with console.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=folder,  # TorchServe writes its key file into the working directory
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - the supervisor has one thread
        )


def free_ports(count: int, host: str = LOOPBACK) -> list[int]:
    """Ports of ``host`` that nothing listens on now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for candidate in sockets:
            candidate.bind((host, 0))
        return [int(candidate.getsockname()[1]) for candidate in sockets]


def group(pid: int, run_dir: Path) -> list[psutil.Process]:
    """Live processes of the group that ``pid`` leads and that carry our mark; never another's, should the id be reused."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) != pid or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(MARK) == str(run_dir):
                members.append(process)
    return members


def leads(pid: int, run_dir: Path) -> bool:
    """Whether the server process itself lives; its workers end by themselves without it."""
    return any(process.pid == pid for process in group(pid, run_dir))


def end_group(pid: int, run_dir: Path, grace_s: float) -> None:
    """Ask the server to end, then kill what is left of its group.

    Workers have nothing to finish once the server is gone, so they are not waited for.
    """
    leader = [process for process in group(pid, run_dir) if process.pid == pid]
    for process in leader:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    wait_gone(leader, grace_s)
    remaining = group(pid, run_dir)
    for process in remaining:
        if process.pid == pid:
            log.warning("the server (pid %d) did not end in %.0f s and is killed", pid, grace_s)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    wait_gone(remaining, grace_s)


def wait_gone(processes: Sequence[psutil.Process], timeout_s: float) -> None:
    """Wait for processes to end; one that its parent has not collected yet counts as ended."""
    deadline = time.monotonic() + timeout_s
    while any(lives(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)


def lives(process: psutil.Process) -> bool:
    """Whether a process runs, and is not one that only waits to be collected."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
