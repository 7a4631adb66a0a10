from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from hypothesis import given
from hypothesis import strategies as st

from deepdisc_ops.errors import ImageError
from deepdisc_ops.sky.images import Mosaic, open_mosaic
from deepdisc_ops.sky.tiling import Window

BANDS = ("g", "r", "i")
SHAPE = (31, 45)


def header(shift_pixels: float = 0.0, rotation_deg: float = 20.0, **cards: object) -> fits.Header:
    angle, scale = np.radians(rotation_deg), 0.2 / 3600
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [150.0, 2.0]
    wcs.wcs.crpix = [20.0 + shift_pixels, 15.0]
    wcs.wcs.cd = scale * np.array([[-np.cos(angle), np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    made = wcs.to_header()
    made.update(cards)
    return made


def pixels(band: str, dtype: str = ">f4") -> np.ndarray:
    rng = np.random.default_rng(BANDS.index(band))
    return rng.normal(0, 10, SHAPE).astype(dtype)


def write(path: Path, bands: Sequence[str] = BANDS, **cards: object) -> Path:
    hdus = [fits.ImageHDU(pixels(band), header(MAGZERO=27.0, **cards), name=band) for band in bands]
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(path)
    return path


def test_multi_extension_file_is_read_in_nanojansky(spaced: Path) -> None:
    with open_mosaic(write(spaced / "m.fits")) as mosaic:
        image = mosaic.read()
    assert image.bands == BANDS
    assert image.pixel_scale == pytest.approx(0.2, rel=1e-6)
    expected = pixels("r").astype(np.float64) * 10 ** (0.4 * (31.4 - 27.0))
    np.testing.assert_allclose(image.data[1], expected, rtol=1e-6)
    assert not image.mask.any()


def test_bands_in_another_order_are_sorted_by_name(spaced: Path) -> None:
    path = write(spaced / "m.fits", ("i", "g", "r"))
    with open_mosaic(path, BANDS) as mosaic:
        np.testing.assert_allclose(mosaic.read().data[0], pixels("g") * np.float32(10 ** (0.4 * 4.4)), rtol=1e-6)


@pytest.fixture(scope="module")
def mosaic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosaic]:
    with open_mosaic(write(tmp_path_factory.mktemp("whole") / "m.fits")) as opened:
        yield opened


@given(columns=st.tuples(st.integers(0, 44), st.integers(0, 44)), rows=st.tuples(st.integers(0, 30), st.integers(0, 30)))
def test_a_window_is_a_slice_of_the_whole(mosaic: Mosaic, columns: tuple[int, int], rows: tuple[int, int]) -> None:
    window = Window(min(columns), min(rows), max(columns) + 1, max(rows) + 1)
    whole, part = mosaic.read(), mosaic.read(window)
    np.testing.assert_array_equal(part.data, whole.data[:, window.y0 : window.y1, window.x0 : window.x1])
    assert part.wcs is not None
    assert whole.wcs is not None
    here = part.wcs.pixel_to_world_values(0.3, 0.7)
    there = whole.wcs.pixel_to_world_values(window.x0 + 0.3, window.y0 + 0.7)
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-10)


def test_one_file_a_band(spaced: Path) -> None:
    paths = []
    for band in BANDS:
        paths.append(spaced / f"{band}.fits")
        fits.PrimaryHDU(pixels(band), header(MAGZERO=27.0, FILTER=band.upper())).writeto(paths[-1])
    with open_mosaic(paths) as mosaic:
        assert mosaic.bands == BANDS


def test_cube_with_named_planes_and_given_zero_point(spaced: Path) -> None:
    fits.PrimaryHDU(np.stack([pixels(band) for band in BANDS]), header()).writeto(spaced / "cube.fits")
    with open_mosaic(spaced / "cube.fits", plane_bands=BANDS, zero_point=31.4) as mosaic:
        np.testing.assert_array_equal(mosaic.read(Window(3, 4, 10, 9)).data[2], pixels("i", "f4")[4:9, 3:10])
    with pytest.raises(ImageError, match="give --zero-point"):
        open_mosaic(spaced / "cube.fits", plane_bands=BANDS)
    with pytest.raises(ImageError, match="3 image planes for 2 bands g, r"):
        open_mosaic(spaced / "cube.fits", plane_bands=("g", "r"), zero_point=31.4)


def test_npz_without_wcs_needs_pixels_only_and_a_scale(spaced: Path) -> None:
    np.savez(spaced / "a.npz", images=np.stack([pixels(band, "f4") for band in BANDS]), filters=np.array(BANDS))
    with pytest.raises(ImageError, match="no celestial WCS"):
        open_mosaic(spaced / "a.npz", zero_point=27.0, pixel_scale=0.2)
    with pytest.raises(ImageError, match="give --pixel-scale"):
        open_mosaic(spaced / "a.npz", zero_point=27.0, require_wcs=False)
    mosaic = open_mosaic(spaced / "a.npz", zero_point=31.4, pixel_scale=0.2, require_wcs=False)
    np.testing.assert_array_equal(mosaic.select(("i",)).read().data[0], pixels("i", "f4"))


def test_nan_and_infinite_pixels_are_masked_and_zero(spaced: Path) -> None:
    hdus = [fits.ImageHDU(pixels(band), header(MAGZERO=31.4), name=band) for band in BANDS]
    hdus[1].data[3, 4], hdus[2].data[5, 6] = np.nan, np.inf
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(spaced / "m.fits")
    with open_mosaic(spaced / "m.fits") as mosaic:
        image = mosaic.read()
    assert np.argwhere(image.mask).tolist() == [[3, 4], [5, 6]]
    assert image.data[1, 3, 4] == 0
    assert np.isfinite(image.data).all()


def test_a_unit_of_flux_takes_the_place_of_a_zero_point(spaced: Path) -> None:
    hdu = fits.ImageHDU(pixels("g"), header(BUNIT="uJy"), name="g")
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(spaced / "m.fits")
    with open_mosaic(spaced / "m.fits") as mosaic:
        np.testing.assert_allclose(mosaic.read().data[0], pixels("g") * 1000, rtol=1e-5)


@pytest.mark.parametrize("kind", ["unsigned", "scaled", "shifted", "blank"])
def test_integers_are_read_as_astropy_reads_them(spaced: Path, kind: str) -> None:
    values = np.arange(31 * 45).reshape(SHAPE)
    hdu = fits.ImageHDU(values.astype(np.uint16 if kind == "unsigned" else np.int16), header(MAGZERO=31.4), name="g")
    if kind == "scaled":
        hdu.scale("int16", bscale=0.25, bzero=100)
    if kind == "shifted":
        hdu.scale("int16", bscale=1, bzero=0.5)
    if kind == "blank":
        hdu.header["BLANK"] = 7
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(spaced / "m.fits")
    with open_mosaic(spaced / "m.fits") as mosaic:
        whole, part = mosaic.read(), mosaic.read(Window(3, 4, 20, 9))
    expected = np.nan_to_num(fits.getdata(spaced / "m.fits", "g").astype(np.float32))
    np.testing.assert_array_equal(whole.data[0], expected)
    np.testing.assert_array_equal(part.data[0], expected[4:9, 3:20])
    assert whole.mask.sum() == (kind == "blank")


@pytest.mark.parametrize("suffix", ["fits.gz", "fits.fz"])
def test_compressed_files(spaced: Path, suffix: str) -> None:
    kind = fits.CompImageHDU if suffix == "fits.fz" else fits.ImageHDU
    options = {"quantize_level": 0, "compression_type": "GZIP_2"} if suffix == "fits.fz" else {}
    hdus = [kind(pixels(band, "f4"), header(MAGZERO=31.4), name=band, **options) for band in BANDS]
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(spaced / f"m.{suffix}")
    with open_mosaic(spaced / f"m.{suffix}", BANDS) as mosaic:
        np.testing.assert_array_equal(mosaic.read(Window(3, 4, 20, 9)).data[1], pixels("r", "f4")[4:9, 3:20])


def test_planes_that_are_not_asked_for_are_left_alone(spaced: Path) -> None:
    path = write(spaced / "m.fits")
    with fits.open(path, mode="append") as file:
        file.append(fits.ImageHDU(np.zeros((25, 25), np.float32), name="PSF"))
    with open_mosaic(path, BANDS) as mosaic:
        assert mosaic.bands == BANDS


def test_the_filter_names_the_band_where_the_extension_does_not(spaced: Path) -> None:
    paths = []
    for band in BANDS:
        paths.append(spaced / f"{band}.fits")
        primary = fits.PrimaryHDU(header=fits.Header({"FILTER": band.upper()}))
        fits.HDUList([primary, fits.ImageHDU(pixels(band), header(MAGZERO=27.0), name="SCI")]).writeto(paths[-1])
    with open_mosaic(paths, ("G", "R", "I")) as mosaic:
        assert mosaic.bands == ("G", "R", "I")


def test_a_zero_point_that_is_no_number_is_named(spaced: Path) -> None:
    hdu = fits.ImageHDU(pixels("g"), header(MAGZERO="unknown"), name="g")
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(spaced / "m.fits")
    with pytest.raises(ImageError, match="MAGZERO is 'unknown', not a magnitude"):
        open_mosaic(spaced / "m.fits")


def test_missing_band_is_named(spaced: Path) -> None:
    with pytest.raises(ImageError, match="band i missing: found g, r, expected g, r, i"):
        open_mosaic(write(spaced / "m.fits", ("g", "r")), BANDS)


def test_a_band_of_another_name_is_suggested_for_a_missing_one(spaced: Path) -> None:
    hdus = [fits.ImageHDU(pixels("g"), header(MAGZERO=27.0), name=name) for name in ("g", "r", "HSC-I")]
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(spaced / "m.fits")
    with pytest.raises(ImageError, match="expected g, r, i; did you mean hsc-i for i. name planes by --plane-bands; add") as told:
        open_mosaic(spaced / "m.fits", BANDS)
    assert "for g" not in str(told.value)


def test_bands_must_share_one_wcs(spaced: Path) -> None:
    hdus = [fits.ImageHDU(pixels(b), header(0.5 * (b == "r"), MAGZERO=27.0), name=b) for b in BANDS]
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(spaced / "m.fits")
    with pytest.raises(ImageError, match=r"WCS of band r is 0\.5 px off that of band g"):
        open_mosaic(spaced / "m.fits")


def test_missing_wcs_is_named(spaced: Path) -> None:
    hdu = fits.ImageHDU(pixels("g"), fits.Header({"MAGZERO": 27.0}), name="g")
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(spaced / "m.fits")
    with pytest.raises(ImageError, match="no celestial WCS for band g"):
        open_mosaic(spaced / "m.fits")


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_file_is_named(spaced: Path, keep: float) -> None:
    path = write(spaced / "m.fits")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ImageError, match=r"m\.fits (is truncated|is not readable FITS)"):
        open_mosaic(path)


def test_other_files_are_refused(spaced: Path) -> None:
    (spaced / "text.fits").write_text("no image at all")
    with pytest.raises(ImageError, match=r"text\.fits is no FITS file; images may be FITS, HDF5"):
        open_mosaic(spaced / "text.fits")
    with pytest.raises(ImageError, match="does not exist"):
        open_mosaic(spaced / "absent.fits")
    fits.HDUList([fits.PrimaryHDU()]).writeto(spaced / "empty.fits")
    with pytest.raises(ImageError, match=r"empty\.fits holds no image"):
        open_mosaic(spaced / "empty.fits")
