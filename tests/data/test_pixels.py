from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdisc_ops.data import pixels
from deepdisc_ops.data.pack import pack_dataset
from deepdisc_ops.data.pixels import close_files, fingerprint, read_pixels
from deepdisc_ops.data.records import DatasetInfo, Objects, Packed, Record, Reference
from deepdisc_ops.data.store import create_dataset, open_dataset, verify
from deepdisc_ops.data.writer import DatasetWriter
from deepdisc_ops.errors import CatalogError, ImageError
from deepdisc_ops.sky.coordinates import icrs_positions
from deepdisc_ops.sky.images import SkyImage, open_mosaic
from deepdisc_ops.sky.tiling import Window

BANDS = ("g", "r", "i")
INFO = DatasetInfo("lsst", BANDS, 0.2, "i", 0)
WIDTH, HEIGHT = 61, 47


@pytest.fixture(autouse=True)
def _forget_files() -> Iterator[None]:
    yield
    close_files()


def tangent(width: int, height: int) -> WCS:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [359.9999, -45.0]
    wcs.wcs.crpix = [width / 3, height / 3]
    wcs.wcs.cd = np.array([[-0.8, 0.6], [0.6, 0.8]]) * 0.2 / 3600
    return wcs


def write_image(path: Path, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    hdus = fits.HDUList([fits.PrimaryHDU()])
    for band in BANDS:
        data = rng.normal(size=(HEIGHT, WIDTH)).astype(np.float32)
        data[rng.random(data.shape) < 0.05] = np.nan
        header = tangent(WIDTH, HEIGHT).to_header()
        header["FILTER"], header["MAGZERO"] = band, 27.0
        hdus.append(fits.ImageHDU(data, header, name=band.upper()))
    hdus.writeto(path)
    return path


def tiles(image: Path) -> list[Record]:
    """Two overlapping windows of an image, and all of it."""
    windows = [Window(0, 0, 40, 30), Window(20, 11, 61, 47), None]
    records = []
    for i, window in enumerate(windows):
        own = window or Window(0, 0, WIDTH, HEIGHT)
        wcs = tangent(WIDTH, HEIGHT)[own.y0 : own.y1, own.x0 : own.x1]
        cards = wcs.to_header().tostring()
        records.append(Record(f"{i}", Reference((image,), window), BANDS, own.width, own.height, Objects.empty(), wcs=cards))
    return records


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """An image, a data set that refers to windows of it, and its packed copy."""
    folder = tmp_path_factory.mktemp("a folder")
    image = write_image(folder / "an image.fits")
    with DatasetWriter(create_dataset(folder / "by reference", INFO)) as writer:
        for record in tiles(image):
            writer.add(record)
    pack_dataset(open_dataset(folder / "by reference"), folder / "packed")
    return image, folder / "by reference", folder / "packed"


@settings(max_examples=40)
@given(number=st.integers(0, 2), corners=st.tuples(*[st.floats(0, 1)] * 4), bands=st.permutations(BANDS), count=st.integers(1, 3))
def test_windows_are_the_same_by_reference_packed_and_cut_from_the_whole(
    both: tuple[Path, Path, Path], number: int, corners: tuple[float, ...], bands: list[str], count: int
) -> None:
    image, referring, packed = both
    bands = bands[:count]
    record = open_dataset(referring).records()[number]
    x0, x1 = sorted((int(corners[0] * (record.width - 1)), int(corners[1] * (record.width - 1))))
    y0, y1 = sorted((int(corners[2] * (record.height - 1)), int(corners[3] * (record.height - 1))))
    window = Window(x0, y0, x1 + 1, y1 + 1)
    corner = record.pixels.window or Window(0, 0, WIDTH, HEIGHT)
    with open_mosaic([image], bands) as mosaic:
        whole = mosaic.read()
    rows, columns = slice(y0 + corner.y0, y1 + 1 + corner.y0), slice(x0 + corner.x0, x1 + 1 + corner.x0)
    expected = whole.wcs.wcs_pix2world(columns.start, rows.start, 0)
    invalid = whole.mask if whole.invalid is None else whole.invalid
    for dataset in (referring, packed):
        read = read_pixels(open_dataset(dataset).records()[number], bands, window)
        assert read.bands == tuple(bands)
        np.testing.assert_array_equal(read.data, whole.data[:, rows, columns])
        np.testing.assert_array_equal(read.mask, whole.mask[rows, columns])
        found = read.mask if read.invalid is None else read.invalid
        np.testing.assert_array_equal(
            np.broadcast_to(found, read.data.shape), np.broadcast_to(invalid, whole.data.shape)[:, rows, columns]
        )
        np.testing.assert_allclose(read.wcs.wcs_pix2world(0, 0, 0), expected, atol=1e-9)
        assert read.pixel_scale == pytest.approx(0.2, rel=1e-6)


def test_a_packed_copy_stands_alone_and_an_interrupted_one_goes_on(both: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, referring, packed = both
    shutil.copytree(packed, tmp_path / "alone")
    records = open_dataset(tmp_path / "alone").records()
    assert all(isinstance(record.pixels, Packed) and tmp_path in record.pixels.path.parents for record in records)
    with DatasetWriter(create_dataset(tmp_path / "half", INFO), packed=True) as writer:
        writer.add(records[1])
    seen: list[tuple[int, int]] = []
    whole = pack_dataset(open_dataset(referring), tmp_path / "half", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3, 3)
    assert whole.records().keys.tolist() == ["0", "1", "2"]
    assert verify(whole) == []


def test_a_variance_is_packed_with_its_image(tmp_path: Path, rng: np.random.Generator) -> None:
    data, variance = rng.normal(size=(2, 3, 7, 9)).astype(np.float32)
    mask = rng.random((7, 9)) < 0.2
    data[:, mask], variance[:, mask] = 0, np.inf
    image = SkyImage(data, BANDS, None, 0.2, mask, variance=variance)
    record = Record("a", Reference(()), BANDS, 9, 7, Objects.empty())
    with DatasetWriter(create_dataset(tmp_path / "set", INFO), packed=True) as writer:
        writer.add(record, image)
        writer.add(replace(record, key="b"), replace(image, variance=None))
    pack_dataset(open_dataset(tmp_path / "set"), tmp_path / "copy")
    for folder in ("set", "copy"):
        with_one, without = open_dataset(tmp_path / folder).records()
        window = Window(2, 1, 8, 7)
        read = read_pixels(with_one, ("i", "g"), window, with_variance=True)
        np.testing.assert_array_equal(read.variance, variance[[2, 0], 1:7, 2:8])
        np.testing.assert_array_equal(read.data, data[[2, 0], 1:7, 2:8])
        np.testing.assert_array_equal(read.mask, mask[1:7, 2:8])
        assert read.invalid is None
        assert read_pixels(with_one).variance is None
        assert read_pixels(without, with_variance=True).variance is None
        assert verify(open_dataset(tmp_path / folder)) == []


def test_the_centre_of_a_record_is_where_its_wcs_puts_it(both: tuple[Path, Path, Path]) -> None:
    records = open_dataset(both[1]).records()
    expected = np.stack(icrs_positions(tangent(WIDTH, HEIGHT), [19.5, 40.0, 30.0], [14.5, 28.5, 23.0]), axis=1)
    np.testing.assert_allclose(records.centres, expected, atol=1e-9)
    np.testing.assert_allclose(records.corners[2, 0], icrs_positions(tangent(WIDTH, HEIGHT), -0.5, -0.5), atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bands": ("g", "y")}, "y.*g, r, i"),
        ({"window": Window(0, 0, 41, 30)}, r"window \(0, 0, 41, 30\) is not inside record '0' of 40 x 30"),
        ({"window": Window(3, 0, 3, 30)}, "expected 0 <= x0 < x1"),
        ({"window": Window(-1, 0, 3, 30)}, "is not inside"),
    ],
)
@pytest.mark.parametrize("kind", [1, 2])
def test_what_is_not_there_is_named(both: tuple[Path, Path, Path], kind: int, options: dict, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        read_pixels(open_dataset(both[kind]).records()[0], **options)


def test_a_file_changed_since_it_was_indexed_is_refused(tmp_path: Path) -> None:
    image = write_image(tmp_path / "image.fits")
    with DatasetWriter(create_dataset(tmp_path / "set", INFO)) as writer:
        for record in tiles(image):
            writer.add(record)
    dataset = open_dataset(tmp_path / "set")
    read_pixels(dataset.records()[0])
    close_files()
    os.utime(image, (1, 1))  # an older date is no change
    read_pixels(dataset.records()[0])
    close_files()
    image.unlink()
    write_image(image, seed=1)
    with pytest.raises(
        CatalogError, match=r"image.fits was changed since record '0' .*restore the file, or make the data set again"
    ):
        read_pixels(dataset.records()[0])
    assert any("was changed since" in fault for fault in verify(dataset))
    image.unlink()
    with pytest.raises(CatalogError, match="image.fits cannot be read: No such file"):
        read_pixels(dataset.records()[0])


def test_fingerprints_are_checked_once_and_few_images_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "OPEN_MOSAICS", 2)
    with DatasetWriter(create_dataset(tmp_path / "set", INFO)) as writer:
        for i in range(4):
            image = write_image(tmp_path / f"{i}.fits", i)
            writer.add(Record(f"{i}", Reference((image,)), BANDS, WIDTH, HEIGHT, Objects.empty()))
    looked: list[Path] = []
    monkeypatch.setattr(pixels, "fingerprint", lambda path: looked.append(path) or fingerprint(path))
    records = open_dataset(tmp_path / "set").records()
    first = [read_pixels(record).data for record in records]
    for record, data in zip(records, first, strict=True):
        np.testing.assert_array_equal(read_pixels(record).data, data)
        assert len(pixels._mosaics) <= 2
    assert sorted(looked) == [tmp_path / f"{i}.fits" for i in range(4)]


def test_fingerprints_tell_contents_apart_not_files(tmp_path: Path, rng: np.random.Generator) -> None:
    large = rng.bytes(300_000)
    path = tmp_path / "large file"
    path.write_bytes(large)
    shutil.copy(path, tmp_path / "copy")
    assert fingerprint(path) == fingerprint(tmp_path / "copy")
    for changed in (large + b"x", b"x" + large[1:], large[:-1] + b"x", large[:150_000] + rng.bytes(30_000) + large[180_000:]):
        (tmp_path / "copy").write_bytes(changed)
        assert fingerprint(path) != fingerprint(tmp_path / "copy")
    path.write_bytes(b"")
    assert fingerprint(path) == "0-00000000"


def test_a_record_that_does_not_fit_its_file_is_refused(tmp_path: Path) -> None:
    image = write_image(tmp_path / "image.fits")
    for reference in (Reference((image,)), Reference((image,), Window(30, 0, 80, 40))):
        with pytest.raises(CatalogError, match="record 'a' is 50 x 40 pixels, .* which has 61 x 47"):
            read_pixels(Record("a", reference, BANDS, 50, 40, Objects.empty()))
