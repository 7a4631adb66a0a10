"""What every test shares: seeded randomness and a folder whose name has a space."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

os.environ["MPLBACKEND"] = "Agg"

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260101)


@pytest.fixture
def spaced(tmp_path: Path) -> Path:
    folder = tmp_path / "a folder"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def mini_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six simulated LSST scenes of 128 px: four to train, two to validate."""
    from deepdisc_ops.config import SkySettings
    from deepdisc_ops.data.simulate import simulate_dataset

    folder = tmp_path_factory.mktemp("mini dataset")
    simulate_dataset(SkySettings(), folder, counts={"train": 4, "validation": 2}, size=128, seed=11)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two untrained members of the smallest kind: seeded, so that their answers are too."""
    import torch

    from deepdisc_ops.config import TrainingConfig, validate
    from deepdisc_ops.model.build import DeepDisc
    from deepdisc_ops.model.weights import save_member

    tree = {
        "model": {
            "pixel_scale": 0.2,
            "input": {"noise_njy": [8.0, 4.0, 4.0, 7.0, 13.0, 38.0]},
            "backbone": {"name": "tiny", "fpn_channels": 16},
            "box_head": {"hidden": [32]},
            "redshift_head": {"hidden": [32, 16]},
        },
        "inference": {"tile": 128, "overlap": 32, "proposals_per_megapixel": 4000},
    }
    config = validate(TrainingConfig, tree, "test")
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("members") / f"member {seed}"
        save_member(folder, DeepDisc(config.model, config.inference), config, {"val_nll": 0.1 * seed}, step=1)
        folders.append(folder)
    return folders


@pytest.fixture(scope="session")
def tiny_ensemble(tiny_checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble folder of the two."""
    from deepdisc_ops.inference.ensemble import write_ensemble

    folder = tmp_path_factory.mktemp("tiny ensemble")
    write_ensemble(folder, tiny_checkpoints)
    return folder
