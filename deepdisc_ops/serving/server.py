"""The endpoint of a run directory, as commands see it: start, status, stop, upgrade, rollback.

Everything a server writes lies in its run directory (mode 0700): settings, a store with its archives, logs, scratch space,
TorchServe's tokens and ``server.json``, by which clients find address and token (mode 0600). A supervisor of its own keeps
it in service, outlives whoever started it, and is found by the lock it holds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import httpx
import psutil

from deepdisc_ops import errors
from deepdisc_ops.errors import DeepdiscOpsError, ServerError
from deepdisc_ops.serving import management, state
from deepdisc_ops.serving.discovery import DISCOVERY, ServerInfo, discover, read_discovery, trust
from deepdisc_ops.serving.generation import STOP_GRACE_S, Generation
from deepdisc_ops.serving.plan import ServerSettings, check_settings
from deepdisc_ops.serving.processes import free_ports, lives, wait_gone
from deepdisc_ops.serving.remains import check_own, clear_remains
from deepdisc_ops.serving.render import MARK
from deepdisc_ops.serving.state import SupervisorState
from deepdisc_ops.serving.supervisor import supervise

__all__ = [
    "DISCOVERY",
    "MARK",
    "ServerInfo",
    "ServerSettings",
    "ServerStatus",
    "discover",
    "free_ports",
    "renew_tokens",
    "rollback",
    "run_foreground",
    "start",
    "status",
    "stop",
    "trust",
    "upgrade",
]

POLL_S = 0.2
RENEWAL_S = 5.0
"""How long new tokens may take from TorchServe, where the old ones end, to the discovery file."""

log = logging.getLogger(__name__)

State = Literal["ready", "unready", "stopped"]


@dataclass(frozen=True)
class ServerStatus:
    """State of a run directory's server and one line about it.

    healthy: the supervisor lives and its server answers, or is being started; state "ready": every worker can predict and
    clients can find it. ``info`` is the discovery file, ``supervisor`` what the supervisor is at, ``pending`` the requests
    that wait for a worker.
    """

    state: State
    what: str
    info: ServerInfo | None = None
    healthy: bool = False
    supervisor: SupervisorState | None = None
    workers: tuple[management.Worker, ...] = ()
    pending: int = 0

    def public(self) -> dict[str, Any]:
        """As a tree for JSON, without the tokens."""
        tree = asdict(self) | {"ready": self.state == "ready"}
        if tree["info"]:
            tree["info"] = {name: value for name, value in tree["info"].items() if "token" not in name or "expires" in name}
        return tree


def start(mar: Path, run_dir: Path, *, progress: Callable[[str], None] | None = None, **settings: object) -> ServerInfo:
    """Serve ``mar`` from ``run_dir`` in the background; returns once every worker is ready and has predicted a canary.

    ``settings`` are those of `ServerSettings`. `ArchiveError` names a damaged member; `ServerError` carries the reason from
    the log.
    """
    tell = progress or log.info
    run_dir, checked = run_dir.absolute(), check_settings(settings)
    check_own(run_dir)
    command = [sys.executable, "-m", "deepdisc_ops.serving.supervisor", str(run_dir), str(mar.absolute())]
    command.append(checked.model_dump_json())
    with subprocess.Popen(
        command,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            _await_ready(process, tell)
        except BaseException:
            _end(process.pid, STOP_GRACE_S)
            raise
        process.returncode = 0  # it goes on without us
    return discover(run_dir)


def run_foreground(mar: Path, run_dir: Path, *, progress: Callable[[str], None], **settings: object) -> int:
    """Serve in this process until SIGTERM or SIGINT, draining first; returns 0 then, otherwise the server's own exit code."""

    def ready(generation: Generation) -> None:
        progress(f"{generation.info.url} is ready; clients find it through {run_dir / DISCOVERY}")

    return supervise(run_dir, mar, settings, progress, ready)


def status(run_dir: Path) -> ServerStatus:
    """Look at a run directory's server without changing anything."""
    run_dir = run_dir.absolute()
    info, said = read_discovery(run_dir), state.read_state(run_dir)
    if not state.is_supervised(run_dir):
        what = f"no server in {run_dir}" if said is None else f"the server of {run_dir} has died; see its logs, then start it anew"
        return ServerStatus("stopped", what, info, supervisor=said)
    if said is None or info is None:
        stage = said.stage if said else "starting"
        return ServerStatus("unready", f"the server of {run_dir} is {stage}", info, healthy=True, supervisor=said)
    try:
        info, model = _ask(run_dir, info)
    except httpx.HTTPError as error:
        return ServerStatus("unready", f"{info.url} runs but does not answer ({type(error).__name__})", info, supervisor=said)
    if model.denied:
        what = f"{info.url} does not accept the token in {run_dir / DISCOVERY}; deepdisc-ops serve renew makes new ones"
        return ServerStatus("unready", what, info, healthy=True, supervisor=said)
    what = f"{info.url} serves {info.archive}: {model.ready} of {info.workers} workers ready"
    if said.retiring:
        what += f"; server {', '.join(map(str, said.retiring))} finishes its requests"
    complete: State = "ready" if model.ready >= info.workers else "unready"
    return ServerStatus(complete, what, info, True, said, model.workers, model.pending)


def _ask(run_dir: Path, info: ServerInfo) -> tuple[ServerInfo, management.ModelStatus]:
    """What the server says of its model, asked again when its token was renewed between our reading and our asking."""
    deadline = time.monotonic() + RENEWAL_S
    while True:
        model = management.model_status(info.management_url, info.management_token)
        if not model.denied or time.monotonic() > deadline:
            return info, model
        time.sleep(POLL_S)
        info = read_discovery(run_dir) or info


def stop(run_dir: Path, *, grace_s: float = STOP_GRACE_S) -> bool:
    """End the server of ``run_dir`` after the requests in flight, all of its processes; False when there was none.

    One that does not end ``grace_s`` after its time to drain is killed.
    """
    run_dir = run_dir.absolute()
    if not run_dir.is_dir():
        return False
    supervised = state.is_supervised(run_dir)
    if supervised:
        said = _await_state(run_dir)
        _end(said.pid, said.drain_s + 2 * grace_s)
    with state.locked(run_dir):
        return clear_remains(run_dir) or supervised


def upgrade(run_dir: Path, mar: Path) -> str:
    """Put another archive into service without losing a request; when it cannot be served, the present one goes on."""
    return _order(run_dir.absolute(), "upgrade", mar)


def rollback(run_dir: Path) -> str:
    """Go back to the archive that was served before the last upgrade or rollback."""
    return _order(run_dir.absolute(), "rollback")


def renew_tokens(run_dir: Path) -> str:
    """Make the present tokens worthless, as when one has leaked; clients read the new one from the discovery file."""
    return _order(run_dir.absolute(), "renew")


def _order(run_dir: Path, verb: state.Verb, mar: Path | None = None) -> str:
    discover(run_dir)
    order = state.place_order(run_dir, verb, mar)
    while (answer := state.read_answer(run_dir, order)) is None:
        if not state.is_supervised(run_dir):
            raise ServerError(f"the server of {run_dir} ended before it had carried out the {verb}; see deepdisc-ops serve logs")
        time.sleep(POLL_S)
    if answer.error:
        raise _error(answer.error, answer.what)
    return answer.what


def _await_ready(process: subprocess.Popen[str], tell: Callable[[str], None]) -> None:
    """Pass on the supervisor's steps until it is ready; its failure is raised."""
    said: list[str] = []
    for line in process.stdout or ():
        try:
            report = json.loads(line)
        except ValueError:
            said.append(line)
            continue
        if "step" in report:
            tell(report["step"])
        elif "failed" in report:
            raise _error(report["failed"], report["what"])
        elif "ready" in report:
            return
    reason = said[-1].strip() if said else "it said nothing"
    raise ServerError(f"the supervisor ended with code {process.wait()} before the server was ready ({reason})")


def _error(name: str, what: str) -> DeepdiscOpsError:
    kind = getattr(errors, name, ServerError)
    return cast("DeepdiscOpsError", kind(what))


def _await_state(run_dir: Path) -> SupervisorState:
    """What the supervisor says of itself; it writes so at once, but not before it holds the lock."""
    for _ in range(50):
        if said := state.read_state(run_dir):
            return said
        time.sleep(0.1)
    raise ServerError(f"{run_dir} is held by a supervisor that does not say which it is; end it by its process id")


def _end(pid: int, patience_s: float) -> None:
    """Tell a supervisor to end and wait for it; it is killed when it does not, and takes its server along."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.terminate()
        wait_gone([process], patience_s)
        if lives(process):
            log.warning("the supervisor (pid %d) did not end in %.0f s and is killed", pid, patience_s)
            process.kill()
            wait_gone([process], STOP_GRACE_S)
