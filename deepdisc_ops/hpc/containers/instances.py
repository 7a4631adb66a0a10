"""Services: instances started from an app of an image, by a name, and stopped by it."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepdisc_ops.errors import ConfigError, SetupError
from deepdisc_ops.hpc.containers.run import Place, check_app, options
from deepdisc_ops.hpc.containers.runtime import Runtime

SETTLE_S = 2.0
"""A service that cannot run at all ends within this time."""
TEMPORARY = "dd-instance-"
FOLDER = "DEEPDISC_OPS_FOLDER"


@dataclass(frozen=True)
class Instance:
    """An instance that runs."""

    name: str
    pid: int
    image: str
    out: str
    err: str


def start(
    runtime: Runtime,
    image: Path,
    name: str,
    words: Sequence[str],
    place: Place,
    *,
    app: str | None = None,
    settle_s: float = SETTLE_S,
) -> Instance:
    """Start an instance and see that it goes on running.

    Raises `ConfigError` if the name is taken or is none, `SetupError` with the instance's own last words if it does not run.
    """
    check_app(app)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}", name):
        raise ConfigError(f"{name!r} is no name of an instance; letters, digits, dots, dashes and underscores")
    if any(one.name == name for one in running(runtime)):
        raise ConfigError(f"an instance {name} runs already; stop it with `deepdisc-ops images stop {name}`, or take another name")
    held = place if place.temporary else Place(place.folder, place.binds, Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{name}-")))
    chosen = [*options(runtime, image, held, instance=True), *(["--app", app] if app else [])]
    answer = runtime.call(["instance", "start"], [*chosen, str(image), name, *words], capture=False, environ=_folder(place))
    found = None if answer.code else _settled(runtime, name, settle_s, service=bool(app or words))
    if found is None:
        last = answer.fault if answer.code else _last_words(runtime, name)
        stop(runtime, name)
        if held is not place and held.temporary:
            shutil.rmtree(held.temporary, ignore_errors=True)
        raise SetupError(f"instance {name} does not run: {last}")
    return found


def stop(runtime: Runtime, name: str, *, timeout_s: int = 60) -> bool:
    """Stop one instance, whose service may take ``timeout_s`` to end; False if none of that name runs."""
    if not any(one.name == name for one in running(runtime)):
        return False
    answer = runtime.call(["instance", "stop"], ["--timeout", str(timeout_s), name])
    if answer.code or any(one.name == name for one in running(runtime)):
        raise SetupError(f"instance {name} was not stopped: {answer.fault}")
    for folder in Path(tempfile.gettempdir()).glob(f"{TEMPORARY}{name}-????????"):
        shutil.rmtree(folder, ignore_errors=True)
    return True


def running(runtime: Runtime) -> list[Instance]:
    """All instances of this user on this machine. Raises `SetupError` if they cannot be listed."""
    answer = runtime.call(["instance", "list"], ["--json"])
    try:
        listed: list[dict[str, Any]] = json.loads(answer.out).get("instances") or []
    except ValueError:
        raise SetupError(f"instances cannot be listed: {answer.fault}") from None
    return [
        Instance(one["instance"], int(one["pid"]), one.get("img", ""), one.get("logOutPath", ""), one.get("logErrPath", ""))
        for one in listed
    ]


def _settled(runtime: Runtime, name: str, settle_s: float, *, service: bool) -> Instance | None:
    """The instance, if it still runs after a while; its ``service`` is a child of its first process, which outlives it."""
    end = time.monotonic() + settle_s
    while True:
        found = next((one for one in running(runtime) if one.name == name), None)
        if found is not None and service and not _has_children(found.pid):
            found = None
        if found is None or time.monotonic() > end:
            return found
        time.sleep(min(0.2, settle_s))


def _has_children(pid: int) -> bool:
    """Whether a process has children; taken for granted where the kernel does not tell."""
    try:
        return bool(Path(f"/proc/{pid}/task/{pid}/children").read_text().strip())
    except OSError:
        return True


def _last_words(runtime: Runtime, name: str) -> str:
    """The end of the log of an instance whose service has ended."""
    logs = [Path(one.err) for one in running(runtime) if one.name == name]
    text = logs[0].read_text(errors="replace").strip() if logs and logs[0].is_file() else ""
    return f"it ended at once and said {text.splitlines()[-1]!r}" if text else "it ended at once and said nothing"


def _folder(place: Place) -> dict[str, str]:
    """Where the start scripts of our images go first."""
    return {f"{prefix}ENV_{FOLDER}": str(place.folder.absolute()) for prefix in ("APPTAINER", "SINGULARITY")}
