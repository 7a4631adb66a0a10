from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from deepdisc_ops.config import AugmentSettings
from deepdisc_ops.data.domain import training_domain
from deepdisc_ops.data.pixels import read_pixels
from deepdisc_ops.data.store import open_dataset
from deepdisc_ops.errors import CheckpointError
from deepdisc_ops.model.weights import load_member, read_info, save_member


def test_a_data_set_lies_inside_its_own_domain(mini_dataset: Path):
    dataset = open_dataset(mini_dataset)
    domain = training_domain(dataset.records("train"), ("g", "r", "i"))
    assert (domain.bands, domain.images, domain.pixel_scale) == (("g", "r", "i"), 4, pytest.approx(0.2, rel=1e-3))
    for record in dataset.records():
        assert domain.compare(read_pixels(record, with_wcs=False)) == []


def test_at_most_so_many_images_are_read(mini_dataset: Path):
    assert training_domain(open_dataset(mini_dataset).records(), ("i",), images=2).images == 2


def test_what_augmentation_shows_is_inside(mini_dataset: Path):
    records = open_dataset(mini_dataset).records("train")
    plain, noisy = (training_domain(records, ("i",), AugmentSettings(noise_factor=(1.0, top))) for top in (1.0, 3.0))
    np.testing.assert_allclose(noisy.high.noise, 3 * plain.high.noise)


def test_a_member_keeps_its_domain(tiny_checkpoints: list[Path], mini_dataset: Path, spaced: Path):
    network, info = load_member(tiny_checkpoints[0])
    assert info.domain is None
    assert "domain" not in yaml.safe_load((tiny_checkpoints[0] / "member.yaml").read_text())
    domain = training_domain(open_dataset(mini_dataset).records("train"), info.config.model.bands)
    save_member(spaced / "member", network, info.config, info.metrics, info.step, domain)
    kept = read_info(spaced / "member").domain
    assert kept is not None
    np.testing.assert_allclose(kept.typical.noise, domain.typical.noise, rtol=1e-3)
    damaged = Path(shutil.copytree(spaced / "member", spaced / "damaged")) / "member.yaml"
    damaged.write_text(damaged.read_text().replace("density:", "city:"))
    with pytest.raises(CheckpointError, match="the domain cannot be read"):
        read_info(damaged.parent)
