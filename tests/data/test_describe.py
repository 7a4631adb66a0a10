from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from deepdisc_ops.cli import app
from deepdisc_ops.data.describe import describe, draw, suggest_anchors, summary, write_description
from deepdisc_ops.data.records import COLUMNS, DatasetInfo, Objects, Record, Reference
from deepdisc_ops.data.store import Dataset, create_dataset
from deepdisc_ops.data.writer import DatasetWriter
from deepdisc_ops.errors import CatalogError, ConfigError
from deepdisc_ops.sky.images import SkyImage

BANDS = ("g", "r")
INFO = DatasetInfo("lsst", BANDS, 0.2, "r", 0)
SIDE = 50


def make_objects(count: int, rng: np.random.Generator) -> Objects:
    columns = {name: rng.uniform(1, 2, count).astype(dtype) for name, dtype in COLUMNS.items()}
    columns["ids"] = np.arange(count)
    columns["boxes"] = np.tile(np.array([3, 4, 7, 13], np.float32), (count, 1))
    columns["classes"] = (np.arange(count) % 4 == 3).astype(np.int32)
    columns["redshift"][::2] = np.nan
    columns["mag"] = rng.uniform(18, 25, count).astype(np.float32)
    return Objects(**columns)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Ten images with 0 to 9 objects; noise of 3 and 5 nJy about 1 and 2; r lacks a fifth of its pixels, and one image all."""
    rng = np.random.default_rng(0)
    opened = create_dataset(tmp_path_factory.mktemp("a folder") / "set", INFO)
    with DatasetWriter(opened, packed=True) as writer:
        for i in range(10):
            data = rng.normal([[[1.0]], [[2.0]]], [[[3.0]], [[5.0]]], (2, SIDE, SIDE)).astype(np.float32)
            invalid = np.zeros(data.shape, bool)
            invalid[1, :10] = True
            invalid[1] |= i == 4
            data[invalid] = 0
            image = SkyImage(data, BANDS, None, 0.2, invalid.any(axis=0), invalid=invalid)
            split = "train" if i < 8 else "test"
            writer.add(Record(f"{i}", Reference(()), BANDS, SIDE, SIDE, make_objects(i, rng), split=split), image)
    return opened.refresh()


def test_figures_are_those_of_the_records(dataset: Dataset) -> None:
    found = describe(dataset)
    assert (found.records, found.objects, found.sampled) == (10, 45, 10)
    assert found.splits == {"train": 8, "test": 2}
    assert found.sizes == ((SIDE, SIDE, 10),)
    assert found.counts.tolist() == list(range(10))
    np.testing.assert_allclose(found.sides, 6.0)
    assert found.anchors == (pytest.approx(6.0),)
    galaxies = sum(i % 4 != 3 for count in range(10) for i in range(count))
    labelled = sum(i % 4 == 1 for count in range(10) for i in range(count))
    assert dict(summary(found))["galaxies with redshift"] == f"{labelled / galaxies:.1%} ({labelled} of {galaxies})"
    assert dict(summary(found))["images without an object"] == "10.0% (1 of 10)"
    assert describe(dataset, split="test").counts.tolist() == [8, 9]
    with pytest.raises(CatalogError, match="no record in split 'validation'"):
        describe(dataset, split="validation")


def test_pixel_statistics_leave_out_what_is_invalid(dataset: Dataset) -> None:
    g, r = describe(dataset).pixels
    assert (g.mean, r.mean) == (pytest.approx(1, abs=0.1), pytest.approx(2, abs=0.15))
    assert (g.std, r.std) == (pytest.approx(3, rel=0.03), pytest.approx(5, rel=0.03))
    assert (g.noise, r.noise) == (pytest.approx(3, rel=0.03), pytest.approx(5, rel=0.03))
    assert (g.invalid, r.invalid) == (0, pytest.approx(0.2 * 0.9 + 0.1))
    assert (g.empty, r.empty) == (0, pytest.approx(0.1))
    assert list(g.percentiles) == sorted(g.percentiles)
    assert describe(dataset, sample=3, seed=1).pixels == describe(dataset, sample=3, seed=1).pixels
    assert describe(dataset, sample=0).pixels == ()


@given(st.lists(st.floats(1, 500), max_size=60), st.integers(1, 5))
def test_anchors_rise_within_the_range_of_the_boxes(sides: list[float], levels: int) -> None:
    anchors = suggest_anchors(np.array(sides), levels)
    assert len(anchors) == min(levels, len(set(np.log(sides))))
    assert list(anchors) == sorted(anchors)
    if sides:
        assert min(sides) * 0.999 <= anchors[0]
        assert anchors[-1] <= max(sides) * 1.001


def test_anchors_find_the_sizes_that_there_are(rng: np.random.Generator) -> None:
    sides = np.concatenate([size * rng.lognormal(0, 0.05, 300) for size in (5, 20, 70)])
    np.testing.assert_allclose(suggest_anchors(sides, 3), (5, 20, 70), rtol=0.02)


@pytest.mark.parametrize("kind", ["full", "no objects", "no pixels", "no labels", "a band without data"])
def test_every_data_set_can_be_drawn(dataset: Dataset, tmp_path: Path, kind: str) -> None:
    found = describe(dataset, sample=4)
    none = np.zeros(0)
    found = {
        "full": found,
        "no objects": replace(found, redshift=none, mag=none, sides=none, classes=none.astype(np.int32), anchors=()),
        "no pixels": replace(found, pixels=(), sampled=0),
        "no labels": replace(found, redshift=np.full_like(found.redshift, np.nan), mag=np.full_like(found.mag, np.nan)),
        "a band without data": replace(
            found, pixels=(found.pixels[0], replace(found.pixels[1], noise=np.nan, percentiles=(np.nan,) * 7))
        ),
    }[kind]
    draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert summary(found)


def test_numbers_and_figure_are_written(dataset: Dataset, tmp_path: Path) -> None:
    write_description(describe(dataset), tmp_path / "out")
    tree = json.loads((tmp_path / "out" / "description.json").read_text())
    assert tree["records"] == "10"
    assert [band["band"] for band in tree["pixels"]] == ["g", "r"]
    with pytest.raises(ConfigError, match="levels is 0"):
        describe(dataset, levels=0)


def test_the_commands(dataset: Dataset, tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["data", *map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    printed = run("describe", dataset.path, "--out", tmp_path / "out", "--levels", "2")
    assert "suggested anchors" in printed
    assert (tmp_path / "out" / "description.png").exists()
    assert "10 records" in run("pack", dataset.path, tmp_path / "copy")
    assert "10 records, no fault" in run("verify", tmp_path / "copy")
    (pixels,) = tmp_path.glob("copy/shards/*.h5")
    content = bytearray(pixels.read_bytes())
    content[-100] ^= 1
    pixels.write_bytes(content)
    with pytest.raises(CatalogError, match="has 1 fault"):
        CliRunner().invoke(app, ["data", "verify", str(tmp_path / "copy")], catch_exceptions=False)
