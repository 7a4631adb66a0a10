"""A Ray instance that lives as long as one sweep, and signals that end the sweep in order."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

from deepdisc_ops.errors import ConfigError, TrainingError
from deepdisc_ops.ray_session import joined_ray, own_ray, signals_restored
from deepdisc_ops.sweeps.space import Resources

log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}
"""No tables on the terminal, no change of folder in workers, no event files, our own signal handlers."""


@contextmanager
def ray_session(resources: Resources, address: str | None = None) -> Iterator[None]:
    """Ray on this machine alone, see `own_ray`, or the cluster at ``address``.

    Raises `ConfigError` if one trial asks for more than any one node has, `SetupError` if there is no Ray.
    """
    import ray

    with own_ray(ENVIRONMENT) if address is None else joined_ray(address, ENVIRONMENT):
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        check_room(resources, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        yield


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Let SIGTERM and SIGINT end Ray Tune's loop in order; the list tells which came. A second one interrupts at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        caught.append(number)
        # Tune saves its state and returns from its loop on SIGUSR1; outside of that loop nobody listens.
        if len(caught) == 1 and signal.getsignal(signal.SIGUSR1) not in (signal.SIG_DFL, signal.SIG_IGN, None):
            signal.raise_signal(signal.SIGUSR1)
        else:
            raise SystemExit(128 + number)

    with signals_restored():
        signal.signal(signal.SIGTERM, handle)
        signal.signal(signal.SIGINT, handle)
        yield caught


class NodeWatch:
    """Ends Ray Tune's loop when Ray has no node left, where it would wait for one for ever; ``lost`` tells that it did."""

    def __init__(self) -> None:
        self.lost = False
        self._next = 0.0

    def look(self) -> None:
        """Look at the nodes, if that was not done just now."""
        if self.lost or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOOK_EVERY_S
        import ray

        if any(node["Alive"] for node in ray.nodes()):
            return
        self.lost = True
        log.warning("Ray has lost its last node; what was running goes on from its last checkpoint")
        if signal.getsignal(signal.SIGUSR1) in (signal.SIG_DFL, signal.SIG_IGN, None):  # Tune does not listen in a thread
            raise TrainingError("Ray has lost its last node; the same command goes on from the last checkpoints")
        signal.raise_signal(signal.SIGUSR1)


def check_room(resources: Resources, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise ConfigError if one trial asks for more than the largest of the ``nodes`` has; it would wait for ever."""
    if any(resources.cpus <= node.get("CPU", 0.0) and resources.gpus <= node.get("GPU", 0.0) for node in nodes):
        return
    found = " and ".join(sorted({f"{node.get('CPU', 0.0):g} CPUs with {node.get('GPU', 0.0):g} GPUs" for node in nodes})) or "none"
    raise ConfigError(
        f"resources: a trial asks for {resources.cpus:g} CPUs and {resources.gpus:g} GPUs on one node, the nodes have {found}; "
        "lower resources.cpus or resources.gpus"
    )
