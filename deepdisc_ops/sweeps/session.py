"""A Ray instance that lives as long as one sweep, and signals that end the sweep in order."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from deepdisc_ops.errors import ConfigError
from deepdisc_ops.ray_session import own_ray, signals_restored
from deepdisc_ops.sweeps.space import Resources

ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}
"""No tables on the terminal, no change of folder in workers, no event files, our own signal handlers."""


@contextmanager
def ray_session(resources: Resources) -> Iterator[None]:
    """Ray on this machine alone, see `own_ray`; raises `ConfigError` if one trial asks for more than the machine has."""
    import ray

    with own_ray(ENVIRONMENT):
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        check_room(resources, ray.cluster_resources())
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


def check_room(resources: Resources, available: dict[str, float]) -> None:
    """Raise ConfigError if one trial asks for more than Ray has in all; it would wait for ever."""
    for key, wanted, found in (
        ("cpus", resources.cpus, available.get("CPU", 0.0)),
        ("gpus", resources.gpus, available.get("GPU", 0.0)),
    ):
        if wanted > found:
            raise ConfigError(f"resources.{key}: a trial asks for {wanted:g}, this machine has {found:g}; lower it")
