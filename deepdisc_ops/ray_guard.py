"""Ends what a killed process would leave of its Ray: ``python -m deepdisc_ops.ray_guard FOLDER``, as `ray_session.own_ray` runs it.

The guard reads its standard input, which nobody writes to: it ends with the process that started the guard, in whatever way.
Ray's own processes take a minute to notice that, and hold the machine's CPUs, memory and temporary files until then.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
from pathlib import Path

import psutil

NAME = "deepdisc_ops.ray_guard"
PERIOD_S = 2.0
"""Between two looks at which processes there are; workers that nobody has seen end by themselves, later."""


def ray_processes(owner: psutil.Process, folder: Path) -> list[psutil.Process]:
    """Descendants of ``owner`` that belong to the Ray instance in ``folder``, with theirs."""
    found: dict[int, psutil.Process] = {}
    for child in owner.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = child.cmdline()
            if NAME not in command and any(str(folder) in part for part in command):
                found |= {process.pid: process for process in (child, *child.children(recursive=True))}
    return list(found.values())


def guard(owner: psutil.Process, folder: Path) -> None:
    """Wait for the end of standard input, then end all of Ray that is left and remove its folder."""
    seen: dict[int, psutil.Process] = {}
    mine = os.getpid()
    while not select.select([sys.stdin], [], [], PERIOD_S)[0]:
        with contextlib.suppress(psutil.Error):
            seen |= {process.pid: process for process in ray_processes(owner, folder)}
    for process in list(seen.values()):
        with contextlib.suppress(psutil.Error):
            seen |= {child.pid: child for child in process.children(recursive=True)}
    for process in seen.values():
        with contextlib.suppress(psutil.Error):
            if process.pid != mine:
                process.kill()  # psutil makes sure that the id is still that process's
    psutil.wait_procs(list(seen.values()), timeout=5)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # what is sent to the whole group is not meant for the guard
    guard(psutil.Process(os.getppid()), Path(sys.argv[1]))
