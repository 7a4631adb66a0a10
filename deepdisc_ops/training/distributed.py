"""Several processes that train one network together: how they are found or started, and how they talk.

A rank is one of them. Ranks come from torchrun or from SLURM's srun (`world_from_environment`), or are started here, on this
machine (`spawn`). Small values travel over gloo on the CPU, gradients over gloo or, between GPUs, nccl.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported without being announced

from deepdisc_ops.config import TrainSettings
from deepdisc_ops.errors import ConfigError, DeepdiscOpsError, Requeue, TrainingError
from deepdisc_ops.training.signals import stop_requests

Report = Callable[[int, Mapping[str, float]], None]
LOOPBACK = "127.0.0.1"
PR_SET_PDEATHSIG = 1
PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others; validation shards and file systems are never all alike."""
GRACE_S = 60.0
"""How long ranks that were told to stop may take to end after the first of them has."""
CAUSE_S = 3.0
"""How long after the error of one rank another may tell its own, which may be the cause of the first."""


@dataclass(frozen=True)
class World:
    """The ranks of a run and which of them this process is.

    ``local_rank`` counts the ranks of one machine and chooses the GPU; ``meeting`` is where they find each other
    (``env://`` or ``tcp://host:port``), ``hosted`` whether another process listens there already.
    """

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    meeting: str = "env://"
    hosted: bool = False

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes files and reports."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks, the same on each of them to the last bit."""
        if self.ranks == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def any(self, value: bool) -> bool:
        """Whether ``value`` holds on one rank at least."""
        return self.sum([float(value)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on each of them."""
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum([0.0])

    def share_buffers(self, network: nn.Module) -> None:
        """Give every rank the buffers (batch statistics) of the first."""
        if self.ranks > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, src=0)

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Meet the other ranks, and part from them at the end; after an error other than `Requeue` the process has to end."""
        if self.ranks == 1:
            yield
            return
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        place: dict[str, Any] = {"init_method": self.meeting}
        if self.hosted:
            host, _, port = self.meeting.removeprefix("tcp://").rpartition(":")
            place = {"store": TCPStore(host, int(port), is_master=False, timeout=PATIENCE)}
        dist.init_process_group(backend, rank=self.rank, world_size=self.ranks, timeout=PATIENCE, **place)
        together = False  # where the others still compute, parting could wait for them, or fail them before our error is told
        try:
            yield
            together = True
        except Requeue:
            together = True
            raise
        finally:
            if together:
                dist.destroy_process_group()


def world_from_environment(environment: Mapping[str, str]) -> World | None:
    """The ranks that torchrun or srun started, by their variables; None where nobody started more than one."""
    if int(environment.get("WORLD_SIZE", 1)) > 1 and "RANK" in environment:
        rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return World(rank, ranks, int(environment.get("LOCAL_RANK", rank)))
    # SLURM_NTASKS is also set in a batch script, which runs once; the step's number only in what srun started
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        hosts = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
        host = environment.get("MASTER_ADDR") or first_host(hosts)
        job, step = int(environment.get("SLURM_JOB_ID", 0)), int(environment.get("SLURM_STEP_ID", 0))
        port = environment.get("MASTER_PORT") or str(20000 + (7 * job + step) % 12000)  # below the ephemeral ports
        return World(
            rank=int(environment["SLURM_PROCID"]),
            ranks=int(environment["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(environment.get("SLURM_LOCALID", 0)),
            meeting=f"tcp://{host}:{port}",
        )
    return None


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list, such as node[003-007,9],login1: node003."""
    found = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    if found is None:
        raise ConfigError(f"SLURM's node list {nodes!r} names no machine; set MASTER_ADDR")
    return found[1] + (found[2] or "")


def check_devices(settings: TrainSettings, world: World | None = None) -> torch.device:
    """The device of this process (of the first rank, where they are yet to be started); `ConfigError` if it does not exist."""
    try:
        device = torch.device(settings.device)
    except RuntimeError:
        raise ConfigError(f"train.device {settings.device!r} is no device of torch; use cpu or cuda") from None
    if world is not None and settings.ranks not in (1, world.ranks):
        raise ConfigError(
            f"train.ranks is {settings.ranks} but {world.ranks} processes were started; leave it out under torchrun or srun"
        )
    ranks = world.ranks if world else settings.ranks
    if settings.batch_size % (ranks * settings.accumulate):
        raise ConfigError(
            f"train.batch_size {settings.batch_size} cannot be shared equally by {ranks} ranks in {settings.accumulate} parts; "
            f"make it a multiple of {ranks * settings.accumulate}"
        )
    if device.type != "cuda":
        if settings.precision == "fp16":
            raise ConfigError(f"train.precision fp16 needs a GPU, train.device is {settings.device}; use bf16 or float32")
        return device
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if world is None and ranks == 1:
        needed, index = (device.index or 0) + 1, device.index or 0
    else:
        own = os.environ.get("SLURM_GPUS_PER_TASK") == "1"  # a task then sees its own GPU alone, as the first
        index = world.local_rank if world and not own else 0
        needed = index + 1 if world else ranks
    if needed > there:
        raise ConfigError(
            f"train.device {settings.device} with {ranks} ranks needs {needed} GPUs on this machine, found {there}; "
            "lower train.ranks, or set train.device to cpu"
        )
    return torch.device("cuda", index)


def spawn(work: Callable[..., None], arguments: tuple[Any, ...], ranks: int, report: Report | None) -> None:
    """Run ``work(world, report, *arguments)`` in ``ranks`` new processes, ``work`` being importable by its name.

    Reports of the first rank arrive in this process while the ranks wait; what ``report`` raises ends them. So does an error
    of one of them, which is raised here, and the death of this process, however it comes. SIGTERM and SIGUSR1 are passed on.
    """
    store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)  # the kernel chooses the port: nobody can take it
    context = multiprocessing.get_context("spawn")
    level = logging.getLogger("deepdisc_ops").getEffectiveLevel()
    running: dict[Connection, BaseProcess] = {}
    processes: list[BaseProcess] = []

    def pass_on() -> None:
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)

    try:
        for rank in range(ranks):
            world = World(rank, ranks, rank, f"tcp://{LOOPBACK}:{store.port}", hosted=True)
            here, there = context.Pipe()
            process: BaseProcess = context.Process(target=_run_rank, args=(there, world, os.getpid(), level, work, arguments))
            process.start()
            there.close()
            processes.append(process)
            running[here] = process
        with stop_requests(pass_on) as stop:
            _listen(running, report, lambda: stop.came)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        for connection in running:
            connection.close()


class Origin(IntEnum):
    """Where an error came from; what has a lower number may be the cause of what has a higher one, never its consequence."""

    RAISED = 0
    KILLED = 1
    UNEXPECTED = 2


class Fault(NamedTuple):
    """How a rank failed; of several faults the smallest is the cause. ``moment`` in seconds of the monotonic clock."""

    origin: Origin
    moment: float
    error: Exception


def _listen(running: dict[Connection, BaseProcess], report: Report | None, told_to_stop: Callable[[], bool]) -> None:
    """Serve the ranks until all have ended; the cause of the errors is raised.

    After the first error the others have ``CAUSE_S`` to tell theirs, or ``GRACE_S`` to save where they were told to stop.
    """
    pending: set[Connection] = set(running)
    faults: list[Fault] = []
    deadline: float | None = None
    while pending:
        ready = wait(list(pending), timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in pending.intersection(ready):
            try:
                kind, value = connection.recv()
            except (EOFError, ConnectionResetError):
                kind, value = "error", _death(running[connection], told_to_stop())
            if kind == "report":
                if report:
                    report(*value)
                connection.send("go on")
                continue
            pending.discard(connection)
            if kind == "error":
                faults.append(value)
        if faults and deadline is None:
            deadline = time.monotonic() + (GRACE_S if any(isinstance(fault.error, Requeue) for fault in faults) else CAUSE_S)
    if faults:
        raise min(faults, key=lambda fault: fault[:2]).error


def _death(process: BaseProcess, told_to_stop: bool) -> Fault:
    process.join(5)
    if told_to_stop:
        error: Exception = Requeue("training was told to stop before it had begun; the same command starts it")
    else:
        error = TrainingError(f"a rank ended without a word (exit code {process.exitcode}); memory is the usual reason")
    killed = process.exitcode == -signal.SIGKILL  # by a lack of memory; nccl aborts ranks that lose another
    return Fault(Origin.KILLED if killed else Origin.UNEXPECTED, time.monotonic(), error)


def _run_rank(
    connection: Connection, world: World, parent: int, level: int, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """The main function of a started rank: it lives no longer than its parent and tells it how it ended."""
    die_with_parent(parent)
    warnings.simplefilter("ignore")
    logging.basicConfig(level=level, format=f"%(levelname)s rank {world.rank} %(name)s: %(message)s")
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # all ranks are here, whatever the host's name resolves to

    def report(step: int, metrics: Mapping[str, float]) -> None:
        connection.send(("report", (step, dict(metrics))))
        connection.recv()

    try:
        work(world, report if world.main else None, *arguments)
        connection.send(("done", None))
    except DeepdiscOpsError as error:
        _tell(connection, Fault(Origin.RAISED, time.monotonic(), error))
    except Exception as caught:
        moment = time.monotonic()
        logging.getLogger(__name__).exception("rank %d failed", world.rank)
        told = TrainingError(f"rank {world.rank} failed with {type(caught).__name__}: {caught}")  # not all can be pickled
        _tell(connection, Fault(Origin.UNEXPECTED, moment, told))


def _tell(connection: Connection, fault: Fault) -> None:
    """Tell the parent, and end without parting from ranks that still compute."""
    connection.send(("error", fault))
    os._exit(1)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it is gone; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
