"""A training function that learns at once: val_nll falls towards a floor set by the learning rate, one report per 10 steps.

Ray's workers import it by name, as they do the real one.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import yaml

from deepdisc_ops.config import TrainingConfig
from deepdisc_ops.training.checkpoint import TrainingState, load_state, save_state
from deepdisc_ops.training.distributed import World, spawn

Report = Callable[[int, Mapping[str, float]], None]


def train(config: TrainingConfig, out: Path, *, report: Report) -> Path:
    state = load_state(out / "last", config)
    for step in range(state.step + 10, config.train.steps + 1, 10):
        time.sleep(config.train.weight_decay)
        metrics = {"train_loss": 1.0, "val_nll": config.train.lr + 1 / step, "val_completeness": 0.9, "lr": config.train.lr}
        checkpoint(config, out, step, metrics, state)
        report(step, metrics)
    return out / "best"


def train_or_fail(config: TrainingConfig, out: Path, *, report: Report) -> Path:
    """Learning rates above 1 raise, those above 2 kill the process, after the first report."""

    def failing(step: int, metrics: Mapping[str, float]) -> None:
        report(step, metrics)
        if config.train.lr > 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if config.train.lr > 1:
            raise ValueError(f"lr {config.train.lr} is\ntoo high")

    return train(config, out, report=failing)


def checkpoint(config: TrainingConfig, out: Path, step: int, metrics: Mapping[str, float], state: TrainingState) -> None:
    """What the real loop writes before a report, without weights."""
    (out / "best").mkdir(parents=True, exist_ok=True)
    description = {"config": config.model_dump(mode="json"), "metrics": dict(metrics), "step": step}
    (out / "best" / "member.yaml").write_text(yaml.safe_dump(description))
    (out / "loss.png").write_bytes(b"a figure")
    state.step = step
    state.history.append({"step": float(step), **metrics})
    save_state(out / "last", state, config)


def train_on_two_ranks(config: TrainingConfig, out: Path, *, report: Report) -> Path:
    """The same, in the first of two processes that the trial starts, as the real loop starts its ranks."""
    spawn(train_rank, (config, out), 2, report)
    return out / "best"


def train_rank(world: World, report: Report | None, config: TrainingConfig, out: Path) -> None:
    """The first rank trains and reports; the second waits for it, as for a gradient."""
    with world.joined(torch.device("cpu")):
        if report is not None:
            train(config, out, report=report)
        world.barrier()
