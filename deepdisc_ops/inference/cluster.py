"""Windows of a mosaic looked at by Ray's actors, on this machine or a cluster's: the same answers, in the same order.

Each actor builds what it needs itself, from a recipe; windows go out and objects come back, pixels are read where they are used.
The asking process hands out what is asked first, a few windows an actor at a time; an actor that is lost (killed, out of memory,
its node gone) is replaced, and others look at its windows meanwhile.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from deepdisc_ops.errors import ConfigError, DeepdiscOpsError, SetupError
from deepdisc_ops.inference.journal import Found
from deepdisc_ops.ray_session import session
from deepdisc_ops.sky.dust import EbvPlane
from deepdisc_ops.sky.tiling import Window

if TYPE_CHECKING:
    import ray

    from deepdisc_ops.inference.recipe import EnsembleLooker
    from deepdisc_ops.sky.detections import Detections
    from deepdisc_ops.sky.images import SkyImage

log = logging.getLogger(__name__)

AT_ONCE = 2
"""Windows an actor has at once: it reads one while it predicts the other."""
AHEAD = 4
"""Windows an actor that may be under way or wait to be handed on, because one before them is not there yet."""
PATIENCE_S = 60.0
"""After so long without an actor, it is said that they wait for room."""

Factory = Callable[[], "EnsembleLooker"]
"""Builds a looker in an actor; has to be picklable, as `Recipe.looker` is."""
Demand = Mapping[str, float]
"""What an actor occupies, by Ray's names: CPU, GPU, or a cluster's own."""


class RayLooker:
    """A `Looker` over Ray actors that live as long as its ``with`` block.

    Each of ``actors`` occupies ``cpus`` (default: an equal share of the processors; torch takes as many threads), ``gpus`` and
    further ``resources`` of the cluster's own; Ray spreads them over the nodes. ``address`` is a cluster to join (HOST:PORT, or
    auto), by default Ray is started on this machine for the block; a Ray that this process has begun already is used as it is.
    A window that was lost with its actor more than ``retries`` times fails the run. ``failures`` holds the members that some
    actor left out, and why. One thread at a time may use it.

    Entering raises `ConfigError` where there is no room for the actors, `SetupError` where there is no Ray.
    """

    def __init__(
        self,
        factory: Factory,
        actors: int = 2,
        *,
        cpus: float | None = None,
        gpus: float = 0,
        resources: Demand | None = None,
        address: str | None = None,
        retries: int = 3,
    ) -> None:
        self.failures: dict[str, str] = {}
        self._factory, self._number, self._cpus, self._retries = factory, actors, cpus, retries
        self._demand = {**(resources or {}), "GPU": gpus}
        self._address = address
        self._actors: list[_Actor] = []
        self._running: dict[ray.ObjectRef, tuple[_Actor, _Job | None]] = {}
        self._waiting: list[deque[_Job]] = []
        self._lost_starts = 0
        self._stack = ExitStack()

    def __enter__(self) -> RayLooker:
        with ExitStack() as stack:
            stack.enter_context(session(self._address))
            import ray

            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            self._demand["CPU"] = share(nodes, self._number, self._demand) if self._cpus is None else self._cpus
            check_room(nodes, self._number, self._demand, joined=self._address is not None)
            stack.callback(self._end_actors)
            for _ in range(self._number):
                self._start_actor()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def look(self, windows: Iterable[Window]) -> Generator[Found]:
        """As `Looker` says; what an actor's predictor raises comes out here when its window's turn comes."""
        jobs: deque[_Job] = deque()
        waiting: deque[_Job] = deque()
        self._waiting.append(waiting)
        try:
            for window in windows:
                job = _Job(window, waiting)
                jobs.append(job)
                waiting.append(job)
                self._collect(0)
                if len(jobs) >= AHEAD * self._number:
                    yield self._answer(jobs.popleft())
            while jobs:
                yield self._answer(jobs.popleft())
        finally:
            self._waiting = [queue for queue in self._waiting if queue is not waiting]  # empty ones are equal

    def _answer(self, job: _Job) -> Found:
        while job.answer is None:
            self._collect(PATIENCE_S)
        if isinstance(job.answer, BaseException):
            raise job.answer
        return job.answer

    def _collect(self, timeout_s: float) -> None:
        """Hand out what there are actors for, and take in what is ready, at least one answer if it comes within ``timeout_s``."""
        import ray

        self._hand_out()
        refs = list(self._running)
        ready, rest = ray.wait(refs, num_returns=1, timeout=timeout_s, fetch_local=False)
        if not ready and timeout_s and not any(actor.ready for actor in self._actors):
            log.warning("no actor is ready after %g s; each waits for %s", timeout_s, _told(self._demand))
        more, _ = ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False) if ready and rest else ([], [])
        for ref in (*ready, *more):
            self._take(ref)
        if ready:
            self._hand_out()

    def _hand_out(self) -> None:
        """What was asked last goes first: it is waited for."""
        for waiting in reversed(self._waiting):
            while waiting:
                job = waiting[0]
                free = [actor for actor in self._actors if actor.ready and actor.load + job.weight <= AT_ONCE]
                if not free:
                    return
                actor = min(free, key=lambda actor: actor.load)
                actor.load += job.weight
                waiting.popleft()
                self._running[actor.handle.look.remote(job.window)] = actor, job

    def _take(self, ref: ray.ObjectRef) -> None:
        """What an actor answered: it is ready, or of a window, or it is lost."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        actor, job = self._running.pop(ref)
        answer: Any
        try:
            answer = ray.get(ref)
        except RayTaskError as failure:
            answer = failure.cause
            answer.__cause__ = failure  # with the actor's traceback
        except RayError as loss:
            self._lose(actor, job, _reason(loss))
            return
        if job is None:
            if isinstance(answer, BaseException):
                raise answer
            actor.ready, self._lost_starts = True, 0
            return
        actor.load -= job.weight
        if isinstance(answer, BaseException):
            job.answer = answer
            return
        job.answer, failures = answer
        for name in failures.keys() - self.failures.keys():
            log.warning("member %s is left out from now on by an actor: %s", name, failures[name])
        self.failures |= failures

    def _lose(self, actor: _Actor, job: _Job | None, reason: str) -> None:
        """Replace a lost actor, and put the window it had first in its queue; other windows of it come here one by one."""
        import ray

        if actor in self._actors:
            self._actors.remove(actor)
            ray.kill(actor.handle)
            if not actor.ready:
                self._lost_starts += 1
                if self._lost_starts > self._retries:
                    raise SetupError(f"{self._lost_starts} actors in a row were lost before they were ready ({reason})")
            log.warning("an actor was lost (%s); another takes its place", reason)
            self._start_actor()
        if job is None:
            return
        job.losses += 1
        if job.losses <= self._retries:
            job.home.appendleft(job)
        else:
            job.answer = SetupError(
                f"{job.losses} actors were lost with window {tuple(job.window)} ({reason}); give them more memory by smaller "
                "windows or fewer actors, and run the same again"
            )

    def _start_actor(self) -> None:
        import ray

        named = {key: value for key, value in self._demand.items() if key not in ("CPU", "GPU") and value}
        options: dict[str, Any] = {"num_cpus": self._demand["CPU"], "num_gpus": self._demand["GPU"], "resources": named}
        remote = ray.remote(Outpost).options(**options, max_concurrency=AT_ONCE, scheduling_strategy="SPREAD")
        actor = _Actor(remote.remote())
        self._actors.append(actor)
        self._running[actor.handle.open.remote(self._factory)] = actor, None

    def _end_actors(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor.handle)
        self._actors.clear()
        self._running.clear()


class Outpost:
    """What runs in an actor: a looker called from `AT_ONCE` threads, of which one at a time predicts."""

    _looker: EnsembleLooker

    def open(self, factory: Factory) -> DeepdiscOpsError | None:
        """Build the looker, or tell why it cannot be built."""
        try:
            looker = factory()
        except DeepdiscOpsError as error:
            return error
        turn = threading.Lock()

        def in_turn(image: SkyImage, ebv: EbvPlane) -> Detections:
            with turn:
                return looker.predictor(image, ebv)

        self._looker = replace(looker, predictor=in_turn, workers=AT_ONCE)
        return None

    def look(self, window: Window) -> tuple[Found, dict[str, str]] | DeepdiscOpsError:
        """What ``window`` holds, and the members left out so far."""
        try:
            (found,) = self._looker.look([window])
        except DeepdiscOpsError as error:
            return error
        return found, dict(self._looker.failures)


@dataclass(eq=False)
class _Actor:
    """Ray's handle of an actor, whether it is ready, and how much of `AT_ONCE` is taken."""

    handle: Any
    ready: bool = False
    load: int = 0


@dataclass(eq=False)
class _Job:
    """A window to look at, the queue it waits in, and what came of it."""

    window: Window
    home: deque[_Job] = field(repr=False)
    losses: int = 0
    answer: Found | BaseException | None = None

    @property
    def weight(self) -> int:
        """Of the `AT_ONCE` windows of an actor: one that was lost with its actor is looked at alone, lest it takes others along."""
        return AT_ONCE if self.losses else 1


def share(nodes: Sequence[Demand], actors: int, others: Demand) -> float:
    """The most whole CPUs that each of ``actors`` may occupy so that all find room on the nodes, at least 1."""
    most = int(max((node.get("CPU", 0) for node in nodes), default=1))
    return float(next((cpus for cpus in range(most, 0, -1) if places(nodes, {**others, "CPU": cpus}) >= actors), 1))


def places(nodes: Sequence[Demand], demand: Demand) -> int:
    """How many actors of this ``demand``, some of it above 0, the nodes can hold at once."""
    asked = {name: amount for name, amount in demand.items() if amount > 0}
    return sum(min(int(node.get(name, 0) / amount + 1e-9) for name, amount in asked.items()) for node in nodes)


def check_room(nodes: Sequence[Demand], actors: int, demand: Demand, *, joined: bool) -> None:
    """Raise `ConfigError` where actors would wait for ever: any of them on one machine, all of them on a cluster."""
    room = places(nodes, demand)
    if room >= actors:
        return
    have = "; ".join(_told({name: node.get(name, 0) for name in demand}) for node in nodes)
    told = f"{actors} actors of {_told(demand)} do not fit on nodes of {have}"
    if room and joined:
        log.warning("%s: %d of them work, the others wait for room", told, room)
    else:
        raise ConfigError(f"{told}; ask for fewer actors, or less for each")


def _told(demand: Demand) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in demand.items() if amount or name == "CPU")


def _reason(loss: Exception) -> str:
    """Why Ray says that it lost something, in a line, without its guesses and its table of ids."""
    lines = [line.strip() for line in str(loss).splitlines() if line.strip()]
    told = [line for line in lines if ":" not in line.split(" ")[0]]
    text = (told or lines or [type(loss).__name__])[-1].partition(" Some common causes")[0]
    return " ".join(text.split())[:300]
