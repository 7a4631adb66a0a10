"""The process that keeps an endpoint in service: ``python -m deepdisc_ops.serving.supervisor RUN_DIR ARCHIVE SETTINGS``.

It owns the JVM: starts it, publishes its address once it has proved itself, renews its tokens, starts it anew when it
dies, puts a newer one in its place, and lets it finish before it ends it. It does one thing at a time, in one loop; while
it waits for a new JVM it goes on looking after the present one.

Settings are JSON. On standard output go lines of JSON, one a step, until the endpoint is ready or
has failed; then nothing more, for whoever started it may have gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from deepdisc_ops.errors import DeepdiscOpsError, ServerError
from deepdisc_ops.serving import logs, plan, state
from deepdisc_ops.serving.discovery import DISCOVERY, TARGETS, encode_discovery, encode_targets, reserved, write_private
from deepdisc_ops.serving.generation import Generation, place
from deepdisc_ops.serving.remains import ARCHIVES, check_own, clean_up, clear_remains, prune_logs

PAUSE_S = 0.2
QUIET_LOOKS = 3
RESTARTS = 5
RESTARTS_WITHIN_S = 600.0
RETRY_RENEWAL_S = 5.0

Tell = Callable[[str], None]

log = logging.getLogger("deepdisc_ops.serving.supervisor")  # also when it runs as __main__


class _Stopped(Exception):
    """Told to end while something was being started."""


@dataclass
class _Retiring:
    """A generation that accepts nothing more; ``quiet`` counts the looks in a row that found it idle."""

    generation: Generation
    deadline: float
    quiet: int = 0


class Supervisor:
    """Serves an archive from ``run_dir`` until it is told to stop; `run` returns the exit code."""

    def __init__(self, run_dir: Path, wanted: plan.Plan, settings: plan.ServerSettings) -> None:
        self.run_dir, self.settings = run_dir, settings
        self._first = wanted
        self._current: Generation | None = None
        self._previous: plan.Plan | None = None
        self._retiring: list[_Retiring] = []
        self._number = max((0, *logs.generations(run_dir)))
        self._deaths: list[float] = []
        self._restarts = 0
        self._renewal_again = 0.0
        self._answer: state.Answer | None = None
        self._stopping = self._hurrying = False

    def stop(self, *_: object) -> None:
        """End after what is in flight, or told twice, at once; safe in a signal handler."""
        self._hurrying, self._stopping = self._stopping, True

    def run(self, tell: Tell, ready: Callable[[Generation], None]) -> int:
        """Serve; ``ready`` is called once. The errors of a failed start are raised."""
        try:
            self._say("starting")
            first = self._bring_up(self._keep(self._first), tell)
            self._switch(first)
            ready(first)
            code = self._serve()
            self._retire()
            self._say("draining")
            while self._retiring:
                self._look_at_retiring()
                time.sleep(PAUSE_S)
        except _Stopped:
            return 0
        except OSError as error:
            raise ServerError(f"{self.run_dir} cannot be written ({error}); is the disk full?") from None
        finally:
            self._clear()
        return code

    def _serve(self) -> int:
        while not self._stopping:
            self._tend()
            if self._current is not None and (code := self._current.exit_code()) is not None:
                dead = self._current
                self._withdraw()
                log.error("TorchServe (pid %d) ended with code %d", dead.info.pid, code)
                dead.end()
                if not self._restart(dead.plan):
                    return code or 1
            elif self._answer is not None:
                self._reply()
            elif order := state.take_order(self.run_dir):
                self._obey(order)
            time.sleep(PAUSE_S)
        return 0

    def _tend(self) -> None:
        """What must not wait, whatever else is being done."""
        self._look_at_retiring()
        now = time.time()
        if self._current is None or self._current.exit_code() is not None or not self._current.renewal_due(now):
            return
        if now >= self._renewal_again:
            self._renewal_again = now + RETRY_RENEWAL_S
            try:
                self._renew(self._current)
            except (OSError, ServerError) as error:
                log.warning("tokens were not renewed: %s", error)

    def _tick(self) -> None:
        if self._stopping:
            raise _Stopped
        self._tend()

    def _renew(self, generation: Generation) -> None:
        with reserved(self.run_dir / DISCOVERY) as write:
            write(encode_discovery(generation.renew()))
        log.info("tokens renewed; they expire at %s", generation.info.token_expires)

    def _bring_up(self, wanted: plan.Plan, tell: Tell) -> Generation:
        self._number += 1
        prune_logs(self.run_dir)
        generation = Generation(self._number, wanted, self.settings, self.run_dir)
        generation.start(self._tick, tell)
        return generation

    def _switch(self, generation: Generation) -> None:
        """Send clients to ``generation``; the one they went to takes nothing more."""
        try:
            with reserved(self.run_dir / DISCOVERY) as write:
                write(encode_discovery(generation.info))
        except OSError:
            generation.end()
            raise
        with contextlib.suppress(OSError):
            write_private(self.run_dir / TARGETS, encode_targets(generation.info))
        self._retire()
        self._current = generation
        self._say("serving")
        log.info("server %d serves %s at %s", generation.number, generation.plan.source, generation.info.url)

    def _retire(self) -> None:
        if self._stopping:
            self._withdraw_file()
        if self._current is not None:
            self._current.close_door()
            self._retiring.append(_Retiring(self._current, time.monotonic() + self.settings.drain_s))
            self._current = None

    def _look_at_retiring(self) -> None:
        for old in tuple(self._retiring):
            late = self._hurrying or time.monotonic() >= old.deadline
            unanswered = old.generation.unanswered()
            old.quiet = 0 if unanswered else old.quiet + 1
            if old.quiet >= QUIET_LOOKS or late or old.generation.exit_code() is not None:
                if unanswered:
                    log.warning("server %d ends with %d requests unanswered", old.generation.number, unanswered)
                old.generation.end()
                self._retiring.remove(old)
                log.info("server %d has ended", old.generation.number)
                if self._current is not None:
                    self._say("serving")

    def _may_restart(self) -> bool:
        now = time.monotonic()
        self._deaths = [moment for moment in self._deaths if moment > now - RESTARTS_WITHIN_S] + [now]
        if not self.settings.restart:
            return False
        if len(self._deaths) > RESTARTS:
            log.error("it died %d times within %.0f s and is given up", len(self._deaths), RESTARTS_WITHIN_S)
            return False
        return True

    def _restart(self, wanted: plan.Plan) -> bool:
        """Start the archive anew, after a pause that doubles with every death; False when it is given up."""
        while self._may_restart():
            self._restarts += 1
            self._say("restarting")
            until = time.monotonic() + 2.0 ** (len(self._deaths) - 2)
            while time.monotonic() < until:
                self._tick()
                time.sleep(PAUSE_S)
            try:
                checked = plan.make_plan(wanted.archive, self.settings, wanted.source)
                self._switch(self._bring_up(checked, log.info))
            except (DeepdiscOpsError, OSError) as error:
                log.error("it could not be started anew: %s", error)
            else:
                return True
        return False

    def _obey(self, order: state.Order) -> None:
        try:
            answer = state.Answer(order.id, self._carry_out(order))
        except _Stopped:
            answer = state.Answer(order.id, "the server was told to stop meanwhile", ServerError.__name__)
        except (DeepdiscOpsError, OSError) as error:
            log.warning("%s failed, all stays as it was: %s", order.verb, error)
            kind = type(error).__name__ if isinstance(error, DeepdiscOpsError) else ServerError.__name__
            answer = state.Answer(order.id, str(error), kind)
        self._answer = answer
        self._reply()

    def _reply(self) -> None:
        """Leave the answer to the last order; on a full disk, when it has space again."""
        if self._answer is not None:
            with contextlib.suppress(OSError):
                state.write_answer(self.run_dir, self._answer)
                self._answer = None

    def _carry_out(self, order: state.Order) -> str:
        current = self._current
        if current is None:
            raise ServerError(f"nothing is served from {self.run_dir} now; try again when it is")
        if order.verb == "renew":
            self._renew(current)
            return f"tokens renewed; they expire at {current.info.token_expires}"
        if order.verb == "upgrade":
            wanted = plan.make_plan(Path(order.archive or ""), self.settings)
        elif self._previous is None:
            raise ServerError(f"{self.run_dir} has served one archive only; there is none to go back to")
        else:
            wanted = plan.make_plan(self._previous.archive, self.settings, self._previous.source)
        if wanted.digest == current.plan.digest:
            raise ServerError(f"{wanted.source} is version {wanted.version}, which is served already; name another archive")
        self._change(current, wanted)
        return f"{self.run_dir} serves {wanted.source}, version {wanted.version}"

    def _change(self, current: Generation, wanted: plan.Plan) -> None:
        kept = self._keep(wanted)
        try:
            self._switch(self._bring_up(kept, log.info))
        except BaseException:
            self._forget_archives(current.plan, self._previous)
            raise
        self._previous = current.plan
        self._forget_archives(kept, current.plan)
        self._say("serving")

    def _keep(self, wanted: plan.Plan) -> plan.Plan:
        """The plan with the archive as it is now under the run directory, whatever becomes of the user's file."""
        kept = self.run_dir / ARCHIVES / f"{wanted.digest[:16]}.mar"
        kept.parent.mkdir(mode=0o700, exist_ok=True)
        if not kept.exists():
            place(wanted.archive, kept)
        return replace(wanted, archive=kept)

    def _forget_archives(self, *wanted: plan.Plan | None) -> None:
        names = {one.archive.name for one in wanted if one is not None}
        for path in (self.run_dir / ARCHIVES).glob("*.mar"):
            if path.name not in names:
                path.unlink()

    def _say(self, stage: state.Stage) -> None:
        current = self._current
        retiring = tuple(old.generation.number for old in self._retiring)
        jvm = current.info.pid if current else None
        archive = current.plan.source if current else self._first.source
        previous = self._previous.source if self._previous else None
        number = current.number if current else self._number
        restarts, drain_s = self._restarts, self.settings.drain_s
        said = state.SupervisorState(os.getpid(), stage, number, jvm, archive, previous, retiring, restarts, drain_s, time.time())
        try:
            state.write_state(self.run_dir, said)
        except OSError as error:  # a full disk ends no service
            log.warning("%s is not up to date: %s", self.run_dir / state.STATE, error)

    def _withdraw(self) -> None:
        self._withdraw_file()
        self._current = None

    def _withdraw_file(self) -> None:
        for name in (DISCOVERY, TARGETS):
            (self.run_dir / name).unlink(missing_ok=True)

    def _clear(self) -> None:
        self._withdraw_file()
        for generation in (self._current, *(old.generation for old in self._retiring)):
            if generation is not None:
                generation.end()
        clean_up(self.run_dir)


def supervise(run_dir: Path, archive: Path, tree: Mapping[str, Any], tell: Tell, ready: Callable[[Generation], None]) -> int:
    """Check, take the run directory and serve from it until SIGTERM or SIGINT; the exit code."""
    settings, run_dir = plan.check_settings(tree), run_dir.absolute()
    wanted = plan.make_plan(archive, settings)
    check_own(run_dir)
    with state.locked(run_dir):
        run_dir.chmod(0o700)
        clear_remains(run_dir)
        (run_dir / logs.FOLDER).mkdir(mode=0o700, exist_ok=True)
        supervisor = Supervisor(run_dir, wanted, settings)
        with _logging_to(run_dir / logs.FOLDER / "supervisor.log"), _signals(supervisor.stop):
            return supervisor.run(tell, ready)


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=5 << 20, backupCount=3)
    handler.setFormatter(logging.Formatter("%(asctime)s [%(levelname)-5s] %(name)s - %(message)s"))
    room = logging.getLogger("deepdisc_ops")
    before = room.level
    room.addHandler(handler)
    room.setLevel(logging.INFO)
    try:
        yield
    finally:
        room.removeHandler(handler)
        room.setLevel(before)
        handler.close()


@contextlib.contextmanager
def _signals(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: list[str]) -> int:
    """Supervise in the background, as `deepdisc_ops.serving.server.start` asks; reports on standard output until ready."""
    run_dir, archive, settings = Path(arguments[0]), Path(arguments[1]), json.loads(arguments[2])

    def report(**what: object) -> None:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()

    def ready(generation: Generation) -> None:
        report(ready=generation.number)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.dup2(nowhere, sys.stderr.fileno())

    try:
        return supervise(run_dir, archive, settings, lambda step: report(step=step), ready)
    except DeepdiscOpsError as error:
        report(failed=type(error).__name__, what=str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
