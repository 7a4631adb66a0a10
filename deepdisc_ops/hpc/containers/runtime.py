"""The Apptainer or Singularity of this machine, what it may do here, and calls to it through spython's Client.

spython 0.3.14 forgets exit codes: its ``build`` returns the path of an image that an earlier build has left, its ``instance``
logs a failure and returns, its bind list ends the process, its ``run`` raises at any word on stderr. So commands are made and run
by the two parts of its Client that do tell, and everything is judged by exit codes and files here.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from deepdisc_ops.errors import SetupError

PROGRAMS = ("apptainer", "singularity")
CAP_SYS_RESOURCE = 24
FULL = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)
NO_TEST = "--notest"
"""Then the test is run on the finished image, before it has its name."""


@dataclass(frozen=True)
class Machine:
    """What decides how images are built and run here."""

    root: bool
    resources: bool
    """Root may raise its limits (CAP_SYS_RESOURCE), which Apptainer asks of it outside user namespaces."""
    namespaces: bool
    """Users may make user namespaces."""
    ranges: bool
    """The user has a range of ids in /etc/subuid and /etc/subgid, and newuidmap is there."""
    user: str


class Mode(NamedTuple):
    """Options of a command, and why."""

    options: tuple[str, ...]
    why: str


class Answer(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def fault(self) -> str:
        """The last thing that was said to be wrong, without colours."""
        lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in f"{self.out}\n{self.err}".splitlines()]
        lines = [line for line in lines if line]
        full = [line for line in lines if re.search(FULL, line)]
        serious = [line for line in lines if line.startswith(("FATAL", "ERROR"))]
        return " ".join((full or serious or lines or [f"no words, exit code {self.code}"])[-1].split())


@dataclass(frozen=True)
class Runtime:
    """A program, its version and its machine."""

    program: Path
    version: str
    machine: Machine

    def call(
        self, action: Sequence[str], words: Sequence[str], *, capture: bool = True, environ: dict[str, str] | None = None
    ) -> Answer:
        """Run ``apptainer ACTION WORDS``; never raises for its exit code. Without ``capture`` its output goes to ours."""
        with _client() as client, self._as_singularity() as path:
            command = [*client._init_command(list(action)), *words]
            variables = {**os.environ, **(environ or {}), "PATH": path}
            result = client._run_command(command, quiet=True, capture=capture, return_result=True, environ=variables)
        message = result["message"] if isinstance(result["message"], list) else [result["message"]]
        out, err = (message[0], "".join(message[1:])) if capture and len(message) > 1 else ("", "".join(message))
        if capture and result["return_code"] == 0 and len(message) == 1:
            out, err = message[0], ""
        return Answer(result["return_code"], out, err)

    def command(self, action: Sequence[str], words: Sequence[str]) -> list[str]:
        """The command as a person would type it."""
        return [str(self.program), *action, *words]

    @contextmanager
    def _as_singularity(self) -> Iterator[str]:
        """A PATH on which spython finds the program under the one name that it knows."""
        with tempfile.TemporaryDirectory(prefix="dd-bin-") as folder:
            link = Path(folder, "singularity")
            link.write_text(f'#!/bin/sh\nexec "{self.program}" "$@"\n')
            link.chmod(0o755)
            yield f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


@contextmanager
def _client() -> Iterator[Any]:
    """The Client of spython, silent."""
    try:
        from spython.main import get_client
    except ImportError:
        raise SetupError("spython is not installed; install deepdisc-ops[containers]") from None
    yield get_client(quiet=False)


def find_runtime(program: Path | None = None) -> Runtime:
    """Apptainer, else Singularity, from PATH or as given. Raises `SetupError` if there is none that runs."""
    found = [path for name in PROGRAMS if (path := shutil.which(name))]
    path = str(program) if program else next(iter(found), None)
    if path is None:
        raise SetupError(
            "neither apptainer nor singularity is on PATH; load the site's module, or run scripts/install-apptainer DIR"
        )
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupError(f"{path} cannot be run: {error}; give another with --program") from None
    if done.returncode or not (version := re.search(r"\d+\.\d+\S*", done.stdout)):
        raise SetupError(f"{path} --version answered {done.stdout.strip() or done.stderr.strip()!r}; expected its version")
    return Runtime(Path(path).absolute(), version[0], look_around())


def look_around() -> Machine:
    """This machine, as far as it matters here."""
    user = pwd.getpwuid(os.getuid()).pw_name if _known_user() else str(os.getuid())
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return Machine(
        root=os.getuid() == 0,
        resources=bool(effective and int(effective[1], 16) >> CAP_SYS_RESOURCE & 1),
        namespaces=_number("/proc/sys/user/max_user_namespaces", 1) > 0
        and _number("/proc/sys/kernel/unprivileged_userns_clone", 1) > 0,
        ranges=all(_has_range(Path(f"/etc/{name}"), user) for name in ("subuid", "subgid"))
        and shutil.which("newuidmap") is not None,
        user=user,
    )


def build_mode(machine: Machine, bootstrap: str) -> Mode:
    """Options of ``build`` on a machine. Raises `SetupError` where it cannot be built at all, with what would help."""
    if bootstrap == "debootstrap":
        if not machine.root:
            raise SetupError("debootstrap makes a base as root only; build it where you are root, or take --base registry")
        if machine.resources:
            return Mode((), "as root, as debootstrap must")
        return Mode((NO_TEST,), "as root, as debootstrap must; its test comes after it, for root here lacks CAP_SYS_RESOURCE")
    if machine.root and machine.resources:
        return Mode((), "as root, who may do everything here")
    if not machine.namespaces:
        raise SetupError("user namespaces are switched off here, so images cannot be built without root; build on another machine")
    if machine.root and not machine.ranges:
        raise SetupError(
            "root without CAP_SYS_RESOURCE builds with --fakeroot, which needs newuidmap (package uidmap) and a range of ids: "
            "echo root:200000:65536 | tee -a /etc/subuid /etc/subgid"
        )
    if machine.root:
        return Mode(("--fakeroot",), "--fakeroot: root here lacks CAP_SYS_RESOURCE")
    if machine.ranges:
        return Mode(("--fakeroot",), f"--fakeroot: {machine.user} has ids in /etc/subuid and /etc/subgid")
    return Mode(
        ("--fakeroot",), f"--fakeroot, with {machine.user} as its only user: no range in /etc/subuid; enough for our images"
    )


def run_mode(machine: Machine) -> Mode:
    """Options of ``exec``, ``run``, ``test`` and ``instance start``."""
    if machine.root and not machine.resources:
        return Mode(("--userns",), "--userns: root here lacks CAP_SYS_RESOURCE")
    return Mode((), "as Apptainer finds best: its setuid starter where installed, a user namespace else")


def _known_user() -> bool:
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


def _has_range(path: Path, user: str) -> bool:
    names = {user, str(os.getuid())}
    return path.is_file() and any(line.partition(":")[0] in names for line in path.read_text().splitlines())


def _number(path: str, otherwise: int) -> int:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return otherwise


def is_image(path: Path) -> bool:
    """Whether a file begins as SIF images do."""
    try:
        with path.open("rb") as file:
            return stat.S_ISREG(path.stat().st_mode) and b"SIF_MAGIC" in file.read(64)
    except OSError:
        return False
