from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from deepdisc_ops.config import AugmentSettings
from deepdisc_ops.data.cutouts import CutoutDataset, open_cutouts, write_cutouts
from deepdisc_ops.data.pixels import read_pixels
from deepdisc_ops.data.records import GALAXY, Objects, Record
from deepdisc_ops.data.store import Dataset, open_dataset
from deepdisc_ops.errors import CatalogError, ImageError

BANDS = ("g", "r", "i", "z", "y")


@pytest.fixture
def galaxiesml(spaced: Path) -> Path:
    """Five galaxies in GalaxiesML's own form: counts of zero point 27, no attributes, redshifts missing in two ways."""
    path = spaced / "5x127x127_training.hdf5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        images = rng.normal(size=(5, 5, 127, 127)).astype(np.float32)
        images[2, 1, 5, 7] = np.nan
        images[3, 0, 0, 0] = np.inf
        file["image"] = images
        file["specz_redshift"] = np.array([0.1, np.nan, 0.7, -99.0, 1.9])
        file["object_id"] = np.arange(5)
    return path


@pytest.fixture(scope="module")
def dataset(mini_dataset: Path) -> Dataset:
    return open_dataset(mini_dataset)


def write(dataset: Dataset, path: Path, **options: object) -> int:
    given = {"bands": BANDS, "gold_band": dataset.info.gold_band, "pixel_scale": dataset.info.pixel_scale, "side": 31}
    return write_cutouts(dataset.records(), path, **(given | options))  # type: ignore[arg-type]


def test_galaxiesml_is_read_in_nanojansky_and_lazily(galaxiesml: Path) -> None:
    cutouts = open_cutouts(galaxiesml)
    assert (len(cutouts), cutouts.bands, cutouts.side) == (5, BANDS, 127)
    np.testing.assert_allclose(cutouts.redshift, [0.1, np.nan, 0.7, np.nan, 1.9])
    assert cutouts._file is None
    with h5py.File(galaxiesml) as file:
        counts = file["image"][0]
    np.testing.assert_allclose(cutouts[0], counts * 10 ** (0.4 * (31.4 - 27)), rtol=1e-6)
    assert np.isnan(cutouts[2][1, 5, 7])
    assert np.isnan(cutouts[3][0, 0, 0])
    np.testing.assert_array_equal(cutouts.column("object_id"), range(5))
    with pytest.raises(CatalogError, match="no column 'ra' of 5 rows; found image, object_id, specz_redshift"):
        cutouts.column("ra")
    copy = pickle.loads(pickle.dumps(cutouts))  # noqa: S301
    np.testing.assert_array_equal(copy[4], cutouts[4])
    copy.close()
    cutouts.close()


def test_a_missing_column_bands_and_damage_are_named(galaxiesml: Path, spaced: Path) -> None:
    with pytest.raises(ImageError, match="cutouts of 5 bands, 2 named"):
        open_cutouts(galaxiesml, bands=("g", "r"))
    with h5py.File(galaxiesml, "r+") as file:
        del file["specz_redshift"]
    with pytest.raises(CatalogError, match="lacks specz_redshift; found image, object_id"):
        open_cutouts(galaxiesml)
    with h5py.File(galaxiesml, "r+") as file:
        file["specz_redshift"] = np.zeros(4)
    with pytest.raises(CatalogError, match=r"specz_redshift has the shape \(4,\) for 5 images"):
        open_cutouts(galaxiesml)
    (spaced / "noise.hdf5").write_bytes(b"no HDF5")
    with pytest.raises(CatalogError, match="cannot be read as HDF5"):
        open_cutouts(spaced / "noise.hdf5")
    with pytest.raises(CatalogError, match="does not exist"):
        open_cutouts(spaced / "absent.hdf5")


def test_a_data_set_becomes_a_file_of_that_form(dataset: Dataset, spaced: Path) -> None:
    path = spaced / "cutouts.hdf5"
    n = write(dataset, path)
    with h5py.File(path) as file:
        assert file["image"].shape == (n, 5, 31, 31)
        assert file["specz_redshift"].shape == (n,)
        keys, x_id = [key.decode() for key in file["key"][:]], file["object_id"][:]
    cutouts = open_cutouts(path)
    assert cutouts.bands == BANDS
    assert np.isfinite(cutouts.redshift).all()
    records = {record.key: record for record in dataset.records()}
    for i in (0, n // 2, n - 1):
        record = records[keys[i]]
        (at,) = np.flatnonzero(record.objects.ids == x_id[i])
        column, row = round(record.objects.x[at]), round(record.objects.y[at])
        image = read_pixels(record, BANDS).data
        np.testing.assert_array_equal(cutouts[i][:, 15, 15], image[:, row, column])
        np.testing.assert_array_equal(cutouts[i], image[:, row - 15 : row + 16, column - 15 : column + 16])
        assert cutouts.redshift[i] == record.objects.redshift[at]
        assert cutouts.column("i_mag")[i] == record.objects.mag[at]
    cutouts.close()


def test_objects_at_the_edge_are_left_out_or_padded(dataset: Dataset, spaced: Path) -> None:
    inside, padded = write(dataset, spaced / "inside.hdf5"), write(dataset, spaced / "padded.hdf5", edge="pad")
    labelled = sum(int(((r.objects.classes == GALAXY) & np.isfinite(r.objects.redshift)).sum()) for r in dataset.records())
    assert inside < padded == labelled
    cutouts = open_cutouts(spaced / "padded.hdf5")
    whole = np.array([np.isfinite(cutouts[i]).all() for i in range(padded)])
    assert whole.sum() == inside
    assert all(np.isfinite(cutouts[i][:, 15, 15]).all() for i in range(padded))
    cutouts.close()


def test_a_magnitude_limit_and_an_empty_selection(dataset: Dataset, spaced: Path) -> None:
    n = write(dataset, spaced / "bright.hdf5", faintest=24.0)
    cutouts = open_cutouts(spaced / "bright.hdf5")
    assert len(cutouts) == n
    assert cutouts.column("i_mag").max() < 24
    cutouts.close()
    with pytest.raises(CatalogError, match="no galaxy with a redshift and i < -5 in 6 images"):
        write(dataset, spaced / "none.hdf5", faintest=-5.0)
    with pytest.raises(CatalogError, match="use a smaller side, or edge 'pad'"):
        write(dataset, spaced / "none.hdf5", side=301)
    assert sorted(path.name for path in spaced.iterdir()) == ["bright.hdf5"]


def test_an_image_without_objects_gives_no_cutout(dataset: Dataset, spaced: Path) -> None:
    def emptied(record: Record) -> Record:
        return replace(record, objects=Objects.empty())

    first = dataset.records()[0]
    options = {"bands": BANDS, "gold_band": "i", "pixel_scale": 0.2, "side": 31}
    both = write_cutouts([emptied(first), first], spaced / "a.hdf5", **options)  # type: ignore[arg-type]
    assert both == write_cutouts([first], spaced / "b.hdf5", **options)  # type: ignore[arg-type]


def test_pretraining_items_are_turned_and_the_same_in_any_process(galaxiesml: Path) -> None:
    items = CutoutDataset(open_cutouts(galaxiesml), AugmentSettings(), seed=1)
    assert len(items) == 3
    alone = [items[k] for k in range(9)]
    with_workers = DataLoader(items, batch_size=1, sampler=range(9), num_workers=2, generator=torch.Generator())
    for (pixels, redshift), (other, z) in zip(alone, with_workers, strict=True):
        torch.testing.assert_close(pixels, other[0], rtol=0, atol=0)
        assert torch.isfinite(pixels).all()
        assert redshift == z[0]
        assert pixels.shape == (5, 127, 127)
    assert [float(z) for _, z in alone[:3]] == pytest.approx([0.1, 0.7, 1.9])
    assert not torch.equal(alone[0][0], alone[3][0]) or not torch.equal(alone[3][0], alone[6][0])
    torch.testing.assert_close(alone[0][0].sum(), alone[3][0].sum(), rtol=1e-4, atol=1)
    upright = CutoutDataset(open_cutouts(galaxiesml), AugmentSettings(symmetries="none"), seed=1)
    torch.testing.assert_close(upright[0][0], upright[3][0], rtol=0, atol=0)


def test_cutouts_without_redshifts_do_not_train(galaxiesml: Path) -> None:
    with h5py.File(galaxiesml, "r+") as file:
        file["specz_redshift"][:] = np.nan
    with pytest.raises(CatalogError, match="no cutout of .* has a redshift"):
        CutoutDataset(open_cutouts(galaxiesml), AugmentSettings(), seed=0)
