"""What every test shares: seeded randomness, folders with spaces, small data sets and networks, two network namespaces."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
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


@pytest.fixture
def two_nodes() -> Iterator[dict[str, str]]:
    """Two network namespaces that reach each other and nothing else: their addresses by their names."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")

    def ip(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)

    nodes = {f"dd{os.getpid()}a": "10.213.77.1", f"dd{os.getpid()}b": "10.213.77.2"}
    (one, other), routes = nodes, list(nodes.values())[::-1]
    try:
        ip("netns", "add", one)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace may be made: {error.stderr.strip()}")
    try:
        ip("netns", "add", other)
        ip("link", "add", "veth0", "netns", one, "type", "veth", "peer", "name", "veth0", "netns", other)
        for (node, address), route in zip(nodes.items(), routes, strict=True):
            ip("-n", node, "addr", "add", f"{address}/24", "dev", "veth0")
            ip("-n", node, "link", "set", "lo", "up")
            ip("-n", node, "link", "set", "veth0", "up")
            ip("-n", node, "route", "add", "default", "via", route)
        yield nodes
    finally:
        for node in nodes:
            subprocess.run(["ip", "netns", "del", node], capture_output=True, check=False)
