"""What the redshift head is shown: the same as at prediction, of the truth's boxes; and what that tells of redshift."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from deepdisc_ops.cli import app
from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.loader import label
from deepdisc_ops.data.pixels import read_pixels
from deepdisc_ops.data.simulate import simulate_dataset
from deepdisc_ops.data.store import open_dataset
from deepdisc_ops.errors import CatalogError, ConfigError
from deepdisc_ops.inference.engine import Member
from deepdisc_ops.inference.features import Features, features_of
from deepdisc_ops.inference.information import embed, mutual_information
from deepdisc_ops.model.weights import load_member, save_member

MODEL = Path(__file__).parents[2] / "models" / "lsst-small"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("some scenes")
    simulate_dataset(SkySettings(), folder, counts={"train": 1, "test": 4}, size=256, seed=5)
    return folder


@pytest.fixture(scope="module")
def seen(scenes: Path) -> Features:
    return features_of(MODEL, scenes)


def test_features_are_what_the_redshift_head_answers_from(tiny_checkpoints: list[Path], scenes: Path) -> None:
    network, info = load_member(tiny_checkpoints[0])
    data = open_dataset(scenes)
    record = data.records("test")[0]
    labels = label(record.objects, data.info, info.config.model, info.config.data)
    gold = np.isfinite(labels.redshift)
    tile = read_pixels(record, info.config.model.bands, with_wcs=False).data
    found = features_of(tiny_checkpoints[0], scenes)
    values = found.values[found.image == record.key]
    assert len(values) == gold.sum() > 5
    with torch.inference_mode():
        ebv = torch.as_tensor(labels.ebv[gold])[:, None]
        answers = network.redshift_head.mixture(torch.cat([torch.from_numpy(values), ebv], dim=1))
    told = Member(network, info.config).redshift(tile, labels.boxes[gold], labels.ebv[gold])
    k = network.redshift_head.components
    torch.testing.assert_close(answers[:, k : 2 * k], told.means, rtol=1e-4, atol=1e-4)


def test_they_are_those_of_the_splits_gold_galaxies(seen: Features, scenes: Path, spaced: Path) -> None:
    objects = [record.objects for record in open_dataset(scenes).records("test")]
    redshift = np.concatenate([one.redshift[(one.classes == 0) & (one.mag < 25.3)] for one in objects])
    np.testing.assert_allclose(seen.redshift, redshift)
    assert seen.values.shape == (len(redshift), 64 * 25)
    assert seen.band == "i"
    assert seen.magnitude.max() < 25.3
    seen.save(spaced / "features.h5")
    loaded = Features.load(spaced / "features.h5")
    np.testing.assert_array_equal(loaded.values, seen.values)
    np.testing.assert_array_equal(loaded.image, seen.image)
    assert (loaded.band, len(loaded)) == ("i", len(seen))
    with h5py.File(spaced / "features.h5", "a") as store:
        store.attrs["format"] = 99
    with pytest.raises(CatalogError, match="another format than 1; write it again"):
        Features.load(spaced / "features.h5")
    (spaced / "features.h5").write_bytes(b"none")
    with pytest.raises(CatalogError, match="holds no features.*members features"):
        Features.load(spaced / "features.h5")


def test_nothing_to_look_at_is_told(scenes: Path) -> None:
    with pytest.raises(CatalogError, match="no record in split 'validation'"):
        features_of(MODEL, scenes, "validation")
    with pytest.raises(ConfigError, match=r"has no member 1; expected 0 to 0"):
        features_of(MODEL, scenes, member=1)


def test_the_bound_is_below_the_known_information_and_near_it() -> None:
    """z = x + noise of half its width: I = ln(1 + 4) / 2 = 0.805 nats; of what is independent: none."""
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2000, 3)), rng.normal(size=2000)
    told = mutual_information(x, x[:, 0] + noise / 2, flows=2, epochs=20)
    assert 0.6 < told.bound < 0.5 * np.log(5) + 2 / np.sqrt(0.2 * 2000)  # the held-out galaxies scatter
    assert told.entropy == pytest.approx(0.5 * np.log(2 * np.pi * np.e * 1.25), abs=0.06)
    assert told.scatter == pytest.approx(np.std(told.flows, ddof=1))
    assert -0.2 < mutual_information(x, noise, flows=1, epochs=10).bound < 0.05
    again = mutual_information(x, x[:, 0] + noise / 2, flows=1, epochs=20)
    assert again.flows[0] == pytest.approx(told.flows[0], abs=1e-6)


def test_unusable_features_and_redshifts_are_named() -> None:
    x, z = np.random.default_rng(0).normal(size=(150, 3)), np.linspace(0.1, 1, 150)
    with pytest.raises(CatalogError, match=r"shape \(50, 3\); expected \(N, D\) of 100 galaxies"):
        embed(x[:50])
    with pytest.raises(CatalogError, match="features of 1 of 150 galaxies are not finite"):
        embed(np.where(np.arange(450).reshape(150, 3) == 4, np.nan, x))
    with pytest.raises(ConfigError, match="149 dimensions were asked for; expected 1 to 148"):
        embed(x, 149)
    with pytest.raises(CatalogError, match=r"\(150, 3\) features and \(149,\) redshifts"):
        mutual_information(x, z[1:])
    with pytest.raises(CatalogError, match="not finite"):
        mutual_information(x, np.where(z > 0.9, np.nan, z))
    with pytest.raises(CatalogError, match="150 of the 150 redshifts are 1; expected"):
        mutual_information(x, np.ones(150))
    with pytest.raises(ConfigError, match="0 flows of 5 epochs"):
        mutual_information(x, z, flows=0, epochs=5)


def test_the_command_writes_features_map_and_bound(seen: Features, scenes: Path, spaced: Path) -> None:
    """Of a trained network, whose features tell of redshift."""
    out = spaced / "seen"
    words = ["members", "features", str(MODEL), "--data", str(scenes), "--out", str(out), "--dimensions", "3", "--json"]
    result = CliRunner().invoke(app, [*words, "--flows", "1", "--epochs", "20"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["galaxies"] == len(seen)
    assert json.loads((out / "information.json").read_text()) == told["information"]
    assert told["information"]["objects"] == len(seen)
    assert told["information"]["bound"] > 0
    assert (out / "features.png").stat().st_size > 10_000
    np.testing.assert_array_equal(Features.load(out / "features.h5").redshift, seen.redshift)


def test_a_map_keeps_apart_what_lies_apart() -> None:
    rng = np.random.default_rng(2)
    kind = np.arange(120) % 2
    plane = embed(rng.normal(size=(120, 30)) + 6 * kind[:, None], 2)
    centres = np.array([plane[kind == one].mean(axis=0) for one in (0, 1)])
    nearest = np.linalg.norm(plane[:, None] - centres, axis=2).argmin(axis=1)
    np.testing.assert_array_equal(nearest, kind)


def test_stars_that_a_model_learned_at_zero_are_no_galaxies(tiny_checkpoints: list[Path], scenes: Path, spaced: Path) -> None:
    network, info = load_member(tiny_checkpoints[0])
    head = info.config.model.redshift_head.model_copy(update={"stars": "z_all"})
    config = info.config.model_copy(update={"model": info.config.model.model_copy(update={"redshift_head": head})})
    save_member(spaced / "member", network, config, {}, 0)
    np.testing.assert_array_equal(
        features_of(spaced / "member", scenes).redshift, features_of(tiny_checkpoints[0], scenes).redshift
    )
