"""Small training runs, and work for ranks that have to be imported by name."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deepdisc_ops.config import TrainingConfig, validate
from deepdisc_ops.data.loader import CropDataset
from deepdisc_ops.data.store import open_dataset
from deepdisc_ops.errors import ConfigError
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.training import loop
from deepdisc_ops.training.distributed import Report, World
from deepdisc_ops.training.meter import TIMINGS, Meter
from deepdisc_ops.training.signals import StopRequest
from deepdisc_ops.training.step import Optimisation, Part


def config(
    dataset: Path,
    *,
    data: Mapping[str, object] | None = None,
    inputs: Mapping[str, object] | None = None,
    model: Mapping[str, Any] | None = None,
    inference: Mapping[str, object] | None = None,
    norm: str = "BN",
    **train: object,
) -> TrainingConfig:
    """Four steps of the smallest network on crops of 64 px."""
    tree = {
        "data": {"path": str(dataset), "crop": 64, **(data or {})},
        "model": {
            "input": inputs or {},
            "backbone": {"name": "tiny", "fpn_channels": 16, "norm": norm},
            "box_head": {"hidden": [32]},
            "redshift_head": {"hidden": [16]},
            **(model or {}),
        },
        "train": {"steps": 4, "batch_size": 2, "validate_every": 2, "warmup_steps": 1, "threads": 1, **train},
        "inference": inference or {},
    }
    return validate(TrainingConfig, tree, "test")


def first_part(settings: TrainingConfig, device: str = "cpu") -> tuple[Optimisation, Part]:
    """A learner of ``settings`` and the first batch of its run."""
    dataset = open_dataset(settings.data.path)
    records = dataset.records("train")
    whole = loop.complete(settings, dataset, records)
    torch.manual_seed(whole.seed)
    network = DeepDisc(whole.model, whole.inference)
    loop.start_at_redshifts(network, whole, records, dataset)
    where = torch.device(device)
    learner = Optimisation(network, whole.train, World(), where, whole.seed)
    crops = CropDataset(records, dataset.info, whole.data, whole.model, whole.seed)
    (part,) = next(loop.steps_on_device(crops, whole, 0, World(), where, Meter(), StopRequest()))
    return learner, part


def untimed(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The curves without what depends on the machine."""
    return [{name: value for name, value in entry.items() if name not in TIMINGS} for entry in history]


def fails(world: World, report: Report | None) -> None:
    """The second rank raises while the first waits for it."""
    with world.joined(torch.device("cpu")):
        assert world.gather(world.rank) == list(range(world.ranks))
        assert world.sum([world.rank, 1.0]) == [sum(range(world.ranks)), world.ranks]
        if world.rank == 1:
            raise ConfigError("the second rank found a fault")
        world.barrier()


def is_puzzled(world: World, report: Report | None) -> None:
    """The second rank comes upon a bug while the first waits for it."""
    with world.joined(torch.device("cpu")):
        if world.rank == 1:
            raise KeyError("no such band")
        world.barrier()


def dies(world: World, report: Report | None) -> None:
    """The second rank is killed while the first waits for it."""
    with world.joined(torch.device("cpu")):
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        world.barrier()
