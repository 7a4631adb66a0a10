"""A backbone that learns redshifts from cutouts, and the detector that starts from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_runs import config, untimed

from deepdisc_ops.config import PretrainSettings, validate
from deepdisc_ops.data.cutouts import open_cutouts
from deepdisc_ops.errors import ConfigError
from deepdisc_ops.model.weights import load_member
from deepdisc_ops.training import loop
from deepdisc_ops.training.checkpoint import read_history
from deepdisc_ops.training.pretrain import complete, divide, items, planned_steps, pretrain

BACKBONE = {"name": "tiny", "fpn_channels": 16}


@pytest.fixture(scope="module")
def galaxies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 blobs in GalaxiesML's form, 33 px, grizy; a redder one is farther away."""
    rng = np.random.default_rng(3)
    z = rng.uniform(0, 1, 64).astype(np.float32)
    y, x = np.mgrid[-16:17, -16:17]
    blob = np.exp(-(x**2 + y**2) / 18)
    colours = np.stack([(1 - z), np.ones(64), np.ones(64), np.ones(64), z], axis=1)
    images = 20 * colours[:, :, None, None] * blob + rng.normal(0, 0.3, (64, 5, 33, 33))
    path = tmp_path_factory.mktemp("some cutouts") / "galaxies.h5"
    with h5py.File(path, "w") as file:
        file["image"] = images.astype(np.float32)
        file["specz_redshift"] = np.append(z[:-1], -99).astype(np.float32)  # the last has none
    return path


def settings(path: Path, **others: object) -> PretrainSettings:
    tree = {
        "cutouts": str(path),
        "model": {"bands": ["g", "r", "i", "z", "y"], "backbone": BACKBONE},
        "steps": 6,
        "batch_size": 8,
        "held_out": 0.25,
        "hidden": 16,
        "warmup_steps": 0,
        "validate_every": 3,
        "threads": 1,
        **others,
    }
    return validate(PretrainSettings, tree, "test")


def test_redshifts_are_learned_from_colours(galaxies: Path, spaced: Path) -> None:
    pretrain(settings(galaxies, optimizer="adamw", lr=3e-3, steps=60, batch_size=16, validate_every=30), spaced)
    variance = float(np.nanvar(open_cutouts(galaxies).redshift))
    assert read_history(spaced / "last")[-1]["val_loss"] < 0.35 * variance
    assert (spaced / "loss.png").stat().st_size > 1000


def test_a_detector_starts_from_the_backbone(galaxies: Path, mini_dataset: Path, spaced: Path) -> None:
    weights = pretrain(settings(galaxies), spaced / "pretrained")
    expected = load_file(weights)
    assert all(key.startswith("backbone.bottom_up.") for key in expected)
    model = {"bands": ["g", "r", "i", "z", "y"], "backbone": BACKBONE, "backbone_weights": str(weights)}
    best = loop.train(config(mini_dataset, model=model, steps=1, lr=1e-9, weight_decay=0), spaced / "run")
    found = load_member(best)[0].state_dict()
    for key in (key for key in expected if key.endswith("weight")):
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-6)


def test_an_interrupted_pretraining_continued_equals_one_that_was_not(galaxies: Path, spaced: Path) -> None:
    class Stop(Exception):
        pass

    def stop(step: int, metrics: Mapping[str, float]) -> None:
        if step == 3:
            raise Stop

    whole = load_file(pretrain(settings(galaxies), spaced / "whole"))
    with pytest.raises(Stop):
        pretrain(settings(galaxies), spaced / "parts", report=stop)
    parts = load_file(pretrain(settings(galaxies), spaced / "parts"))
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-6)
    assert untimed(read_history(spaced / "whole" / "last")) == untimed(read_history(spaced / "parts" / "last"))


def test_an_epoch_shows_each_training_cutout_once_and_no_other(galaxies: Path) -> None:
    asked = settings(galaxies, epochs=2)
    assert planned_steps(asked) == 12  # 63 have a redshift, 16 are held out
    training, held_out = divide(63, 0.25, seed=0)
    assert sorted([*training, *held_out]) == list(range(63))
    batches = list(items(training, 63, complete(asked, open_cutouts(galaxies)), 0))
    shown = np.concatenate(batches)
    for epoch in (0, 1):
        assert sorted(k - 63 * epoch for k in shown[47 * epoch : 47 * (epoch + 1)]) == training.tolist()
    assert list(items(training, 63, complete(asked, open_cutouts(galaxies)), 5)) == batches[5:]


def test_bands_that_the_cutouts_lack_are_named(galaxies: Path, spaced: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.bands has u, .* holds g, r, i, z, y"):
        pretrain(settings(galaxies, model={"bands": ["u", "g"], "backbone": BACKBONE}), spaced)
