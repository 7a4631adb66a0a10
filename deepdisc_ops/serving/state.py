"""What supervisor and commands tell each other through files of the run directory.

The supervisor holds the lock for its life and writes ``supervisor.json``. A command leaves one order at a time; the
supervisor takes it away, and leaves an answer under the order's id.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from deepdisc_ops.errors import ServerError
from deepdisc_ops.serving.discovery import write_private

LOCK = ".deepdisc-server.lock"
STATE = "supervisor.json"
ORDER = "order.json"
ANSWER = "answer.json"
LOCK_ATTEMPTS = 10

Stage = Literal["starting", "serving", "restarting", "draining"]
Verb = Literal["upgrade", "rollback", "renew"]


@dataclass(frozen=True)
class SupervisorState:
    """What the supervisor of a run directory is at; ``retiring`` are generations that answer their last requests."""

    pid: int
    stage: Stage
    generation: int
    jvm: int | None
    archive: str
    previous: str | None
    retiring: tuple[int, ...]
    restarts: int
    drain_s: float
    since: float


@dataclass(frozen=True)
class Order:
    """Something to do beside serving; ``archive`` is for an upgrade."""

    id: str
    verb: Verb
    archive: str | None = None


@dataclass(frozen=True)
class Answer:
    """The outcome of an order: ``error`` is the name of the error's class where it failed."""

    id: str
    what: str
    error: str | None = None


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory, made when it is not there; `ServerError` when a supervisor holds it."""
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (run_dir / LOCK).open("w") as file:
        for _ in range(LOCK_ATTEMPTS):  # whoever asks is_supervised holds it for an instant
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.05)
        else:
            raise ServerError(f"a server already serves from {run_dir}; stop it first with deepdisc-ops serve stop")
        yield


def is_supervised(run_dir: Path) -> bool:
    """Whether a supervisor holds the run directory."""
    try:
        with (run_dir / LOCK).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def write_state(run_dir: Path, state: SupervisorState) -> None:
    """Tell what the supervisor is at."""
    write_private(run_dir / STATE, json.dumps(asdict(state)) + "\n")


def read_state(run_dir: Path) -> SupervisorState | None:
    """What the supervisor says it is at; None where none has said so."""
    try:
        tree = json.loads((run_dir / STATE).read_text())
        return SupervisorState(**{**tree, "retiring": tuple(tree["retiring"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def place_order(run_dir: Path, verb: Verb, archive: Path | None = None) -> Order:
    """Leave an order for the supervisor; `ServerError` when another one waits to be taken."""
    order = Order(secrets.token_hex(8), verb, None if archive is None else str(archive.absolute()))
    scratch = run_dir / f".{ORDER}.{order.id}"
    try:
        write_private(scratch, json.dumps(asdict(order)))
        os.link(scratch, run_dir / ORDER)
    except FileExistsError:
        raise ServerError(f"{run_dir} has another order to carry out; try again when it is done") from None
    finally:
        scratch.unlink(missing_ok=True)
    return order


def take_order(run_dir: Path) -> Order | None:
    """The order that waits, if any, which then waits no more."""
    path = run_dir / ORDER
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        tree = {}
    path.unlink(missing_ok=True)
    if not isinstance(tree, dict) or tree.get("verb") not in get_args(Verb) or "id" not in tree:
        return None
    return Order(str(tree["id"]), tree["verb"], tree.get("archive"))


def write_answer(run_dir: Path, answer: Answer) -> None:
    """Tell the outcome of an order."""
    write_private(run_dir / ANSWER, json.dumps(asdict(answer)))


def read_answer(run_dir: Path, order: Order) -> Answer | None:
    """The answer to ``order``, if it is there yet."""
    try:
        tree = json.loads((run_dir / ANSWER).read_text())
    except (OSError, ValueError):
        return None
    return Answer(**tree) if tree.get("id") == order.id else None
