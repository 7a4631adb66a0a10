"""Every layout that surveys use, each against astropy's (or numpy's, h5py's) own reading of the same file."""

from __future__ import annotations

import bz2
import gzip
import logging
import lzma
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from deepdisc_ops.errors import ImageError
from deepdisc_ops.sky.fits_planes import band_name
from deepdisc_ops.sky.images import open_mosaic
from deepdisc_ops.sky.tiling import Window

REAL = Path(__file__).parents[3] / "shared" / "data"
needs_real_pixels = pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real survey pixels is not here")
SHAPE = (23, 31)
WINDOW = Window(3, 4, 20, 19)
CUT = np.s_[..., 4:19, 3:20]
MP = {"MP_BAD": 0, "MP_SAT": 1, "MP_INTRP": 2, "MP_CR": 3, "MP_DETECTED": 5, "MP_NO_DATA": 8}


def sky(**cards: Any) -> fits.Header:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.crpix = ["RA---TAN", "DEC--TAN"], [53.1, -27.8], [10.0, 12.0]
    wcs.wcs.cdelt = [-0.03 / 3600, 0.03 / 3600]
    header = wcs.to_header()
    for key, value in cards.items():
        header[key if len(key) <= 8 else f"HIERARCH {key}"] = value
    return header


def noise(seed: int = 0, dtype: str = "f4") -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 10, SHAPE).astype(dtype)


def jwst(folder: Path, band: str = "F200W", kind: type = fits.ImageHDU) -> Path:
    """What a NIRCam mosaic holds: SCI in MJy/sr with NaN off the field, ERR, WHT, CON (3-D), VAR_POISSON, a table."""
    seed = len(band)
    science, error, weight = noise(seed), np.abs(noise(seed + 1)) + 1, np.full(SHAPE, 1000.0, np.float32)
    science[0, 0], error[1, 1], error[2, 2], weight[3, 3], weight[5:8, 4:9] = np.nan, 0, np.nan, 0, 0
    science[5:8, 4:9] = 0
    primary = fits.PrimaryHDU(header=fits.Header({"FILTER": band, "PUPIL": "CLEAR", "TELESCOP": "JWST"}))
    header = sky(BUNIT="MJy/sr", PIXAR_SR=2.1e-14, PHOTMJSR=2.0)
    hdus = [
        kind(science, header, name="SCI"),
        kind(error, sky(BUNIT="MJy/sr"), name="ERR"),
        fits.ImageHDU(np.ones((1, *SHAPE), np.int32), name="CON"),
        kind(weight, name="WHT"),
        kind(error**2, name="VAR_POISSON"),
        fits.BinTableHDU.from_columns([fits.Column("x", "D", array=[1.0])], name="HDRTAB"),
    ]
    path = folder / f"{band}.fits"
    fits.HDUList([primary, *hdus]).writeto(path)
    return path


def hsc(folder: Path, band: str = "HSC-I2", **mask_cards: int) -> Path:
    """What the LSST stack writes: IMAGE, MASK with MP_* cards, VARIANCE, FLUXMAG0 and FILTER in the primary header."""
    flags = np.zeros(SHAPE, np.int32)
    flags[4, 4], flags[5, 5], flags[6, 6], flags[7, 7], flags[8, 8:12] = 1 << 8, 1 << 1, 1 << 5, 1 << 3, (1 << 0) | (1 << 5)
    variance = np.full(SHAPE, 4.0, np.float32)
    variance[9, 9] = np.nan
    primary = fits.PrimaryHDU(header=fits.Header({"FILTER": band, "FLUXMAG0": 10 ** (0.4 * 27)}))
    planes = mask_cards or MP
    hdus = [
        fits.ImageHDU(noise(3), sky(), name="IMAGE"),
        fits.CompImageHDU(flags, sky(**planes), name="MASK", compression_type="RICE_1"),
        fits.ImageHDU(variance, sky(), name="VARIANCE"),
    ]
    path = folder / f"{band}.fits"
    fits.HDUList([primary, *hdus]).writeto(path)
    return path


@pytest.mark.parametrize("kind", [fits.ImageHDU, fits.CompImageHDU])
def test_jwst_mosaics(spaced: Path, kind: type) -> None:
    paths = [jwst(spaced, band, kind) for band in ("F090W", "F444WX")]
    with open_mosaic(paths, ("F444WX", "F090W")) as mosaic:
        image, part = mosaic.read(), mosaic.read(WINDOW)
    with fits.open(paths[0]) as file:
        science, error, weight = (file[name].data.astype(np.float64) for name in ("SCI", "ERR", "WHT"))
    factor = 1e6 * 1e9 * 2.1e-14
    invalid = ~np.isfinite(science) | ~(error > 0) | (weight == 0)
    assert image.invalid is not None
    assert image.variance is not None
    np.testing.assert_array_equal(image.invalid[1], invalid)
    assert invalid.sum() == 4 + 15
    np.testing.assert_allclose(image.data[1][~invalid], science[~invalid] * factor, rtol=1e-6)
    np.testing.assert_allclose(image.variance[1][~invalid], (error[~invalid] * factor) ** 2, rtol=1e-6)
    assert (image.data[image.invalid] == 0).all()
    assert np.isinf(image.variance[image.invalid]).all()
    for name in ("data", "invalid", "variance"):
        np.testing.assert_array_equal(getattr(part, name), getattr(image, name)[CUT])


def test_hsc_coadds(spaced: Path) -> None:
    path = hsc(spaced)
    with open_mosaic(path) as mosaic:
        assert mosaic.bands == ("i",)
        image = mosaic.read()
    factor = 10 ** (0.4 * (31.4 - 27))
    np.testing.assert_allclose(image.data[0][~image.mask], fits.getdata(path, "IMAGE")[~image.mask] * factor, rtol=1e-6)
    np.testing.assert_allclose(image.variance[0][~image.mask], 4 * factor**2, rtol=1e-6)
    # no data, saturated, bad and without variance; detected (6, 6) and cosmic ray (7, 7) are the sky's
    assert np.argwhere(image.mask).tolist() == [[4, 4], [5, 5], [8, 8], [8, 9], [8, 10], [8, 11], [9, 9]]


def test_the_header_numbers_the_mask_planes(spaced: Path) -> None:
    with open_mosaic(hsc(spaced, MP_DETECTED=8, MP_NO_DATA=5)) as mosaic:
        mask = mosaic.read().mask
    assert mask[6, 6]
    assert not mask[4, 4]


@pytest.mark.parametrize(("bits", "wanted"), [(("CR",), [7, 7]), (("no_data",), [4, 4]), (1 << 5, [6, 6]), ((), [9, 9])])
def test_the_caller_chooses_bad_bits(spaced: Path, bits: Any, wanted: list[int]) -> None:
    with open_mosaic(hsc(spaced), bad_bits=bits) as mosaic:
        assert wanted in np.argwhere(mosaic.read().mask).tolist()
    with pytest.raises(ImageError, match="mask names no plane NODATA; it has BAD, SAT"):
        open_mosaic(spaced / "HSC-I2.fits", bad_bits=("NODATA",))


@pytest.mark.parametrize("style", ["{}_MASK {}_VAR", "MASK_{} VARIANCE_{}"])
def test_companions_named_by_band(spaced: Path, style: str) -> None:
    mask_name, variance_name = style.split()
    names = {"MP_NO_DATA": 0, "MP_SAT": 1, "MP_BLEED": 2, "MP_SPIKE": 3, "MP_TRAIL": 4}
    hdus: list[Any] = [fits.PrimaryHDU()]
    for k, band in enumerate("UG"):
        flags = np.zeros(SHAPE, np.uint8)
        flags[0, :5] = 1 << np.arange(5)
        flags[k + 1, 0] = 1
        hdus.append(fits.ImageHDU(noise(k), sky(FILTER=band.lower(), MAGZERO=31.4), name=band))
        hdus.append(fits.ImageHDU(flags, sky(**names), name=mask_name.format(band)))
        hdus.append(fits.ImageHDU(np.full(SHAPE, 2.0 + k, np.float32), name=variance_name.format(band)))
    fits.HDUList(hdus).writeto(spaced / "m.fits")
    with open_mosaic(spaced / "m.fits") as mosaic:
        assert mosaic.bands == ("u", "g")
        image = mosaic.read()
    assert image.invalid is not None
    assert image.invalid[0, 0, :5].tolist() == [True, True, True, False, True]
    assert np.argwhere(image.invalid[1])[-1].tolist() == [2, 0]
    assert image.mask.sum() == 6
    assert np.nanmin(image.variance[1]) == 3
    np.testing.assert_array_equal(image.data[1][~image.invalid[1]], noise(1)[~image.invalid[1]])


def test_companions_of_the_only_image_need_no_band(spaced: Path) -> None:
    """In cgs, whose variances (1e-64) are below single precision."""
    image = fits.ImageHDU(np.full(SHAPE, 3e-32), sky(BUNIT="erg/s/cm2/Hz"), name="G")
    weight = np.ones(SHAPE, np.float32)
    weight[2, 3] = 0
    companions = [fits.ImageHDU(np.full(SHAPE, 4e-64), name="VARIANCE"), fits.ImageHDU(weight, name="WHT")]
    fits.HDUList([fits.PrimaryHDU(), image, *companions]).writeto(spaced / "m.fits")
    with open_mosaic(spaced / "m.fits") as mosaic:
        found = mosaic.read()
    assert np.argwhere(found.mask).tolist() == [[2, 3]]
    assert found.variance is not None
    np.testing.assert_allclose(found.data[0][~found.mask], 3, rtol=1e-5)
    np.testing.assert_allclose(found.variance[0][~found.mask], 4, rtol=1e-5)


def test_one_mask_for_all_bands(spaced: Path) -> None:
    flags = np.zeros(SHAPE, np.uint8)
    flags[2, 3] = 1
    bands = [fits.ImageHDU(noise(k), sky(MAGZERO=31.4), name=band) for k, band in enumerate("GR")]
    fits.HDUList([fits.PrimaryHDU(), *bands, fits.ImageHDU(flags, name="MASK")]).writeto(spaced / "m.fits")
    with open_mosaic(spaced / "m.fits") as mosaic:
        image = mosaic.read()
    assert np.argwhere(image.invalid).tolist() == [[0, 2, 3], [1, 2, 3]]
    assert image.variance is None


def test_a_mask_whose_bits_have_no_names_is_left_alone_and_said(spaced: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags = np.full(SHAPE, 32, np.int32)
    flags[2, 3] |= 4
    image = fits.ImageHDU(noise(), sky(MAGZERO=31.4, FILTER="g"), name="IMAGE")
    fits.HDUList([fits.PrimaryHDU(), image, fits.ImageHDU(flags, name="MASK")]).writeto(spaced / "m.fits")
    with open_mosaic(spaced / "m.fits") as mosaic:
        assert not mosaic.read().mask.any()
    assert "give its bad bits as a number" in caplog.text
    with open_mosaic(spaced / "m.fits", bad_bits=4) as mosaic:
        assert np.argwhere(mosaic.read().mask).tolist() == [[2, 3]]
    with pytest.raises(ImageError, match="give the bits as a number"):
        open_mosaic(spaced / "m.fits", bad_bits=("SAT",))


def test_cubes_with_companions(spaced: Path) -> None:
    data, variance = np.stack([noise(0), noise(1)]), np.stack([noise(2) ** 2 + 1, noise(3) ** 2 + 1])
    flags = np.zeros((2, *SHAPE), np.uint8)
    flags[1, 5, 6] = 1
    hdus = [fits.ImageHDU(data, sky(BUNIT="nJy"), name="IMAGE"), fits.ImageHDU(variance, name="VARIANCE")]
    fits.HDUList([fits.PrimaryHDU(), *hdus, fits.ImageHDU(flags, name="MASK")]).writeto(spaced / "cube.fits")
    with open_mosaic(spaced / "cube.fits", "rg", plane_bands="gr") as mosaic:
        image = mosaic.read(WINDOW)
    valid = ~flags[::-1].astype(bool)[CUT]
    np.testing.assert_array_equal(image.invalid, ~valid)
    np.testing.assert_array_equal(image.data[valid], data[::-1][CUT][valid])
    np.testing.assert_array_equal(image.variance[valid], variance[::-1][CUT][valid])


@pytest.mark.parametrize("name", ["MASK", "VARIANCE", "WHT"])
def test_a_companion_of_another_shape_is_named(spaced: Path, name: str) -> None:
    image = fits.ImageHDU(noise(), sky(MAGZERO=31.4, FILTER="g"), name="IMAGE")
    fits.HDUList([fits.PrimaryHDU(), image, fits.ImageHDU(np.ones((5, 7), np.uint8), name=name)]).writeto(spaced / "m.fits")
    with pytest.raises(ImageError, match=rf"{name} has shape \(5, 7\), the image \(23, 31\); make them of one size"):
        open_mosaic(spaced / "m.fits")


def test_a_band_dropped_over_part_of_the_field(spaced: Path) -> None:
    hdus = [fits.ImageHDU(noise(k) + 100, sky(BUNIT="nJy"), name=band) for k, band in enumerate("gr")]
    hdus[1].data[:, :10] = 0
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(spaced / "m.fits")
    with open_mosaic(spaced / "m.fits", blank=0) as mosaic:
        image, nothing = mosaic.read(), mosaic.read(Window(0, 0, 10, 23))
    assert image.invalid is not None
    assert not image.invalid[0].any()
    assert image.invalid[1, :, :10].all()
    assert not image.invalid[1, :, 10:].any()
    assert nothing.mask.all()
    assert (nothing.data[0] != 0).all()


def test_zeros_without_coverage_are_remarked_once(spaced: Path, caplog: pytest.LogCaptureFixture) -> None:
    fits.PrimaryHDU(np.zeros(SHAPE, np.float32), sky(BUNIT="nJy", FILTER="g")).writeto(spaced / "m.fits")
    with open_mosaic(spaced / "m.fits") as mosaic:
        for _ in range(3):
            assert not mosaic.read().mask.any()
    assert caplog.text.count("open it with blank=0") == 1


@pytest.mark.parametrize("suffix", ["fits.gz", "fits.bz2", "fits.xz", "fits.fz.gz", "fits"])
def test_files_compressed_as_a_whole(spaced: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    path = jwst(spaced, kind=fits.CompImageHDU if "fz" in suffix else fits.ImageHDU)
    with open_mosaic(path) as mosaic:
        expected = mosaic.read(WINDOW)
    compress = {"gz": gzip, "bz2": bz2, "xz": lzma}.get(suffix.rpartition(".")[2], gzip).compress
    whole = spaced / f"whole.{suffix}"
    whole.write_bytes(compress(path.read_bytes()))
    with caplog.at_level(logging.WARNING), open_mosaic(whole) as mosaic:
        image = mosaic.read(WINDOW)
    np.testing.assert_array_equal(image.data, expected.data)
    np.testing.assert_array_equal(image.variance, expected.variance)
    assert "compressed as a whole" in caplog.text
    assert "fpack" in caplog.text
    whole.write_bytes(compress(path.read_bytes())[:-200])
    with pytest.raises(ImageError, match="is cut or damaged"):
        open_mosaic(whole)


@pytest.mark.parametrize(
    ("dtype", "compressed"),
    [(dtype, compressed) for dtype in ("u1", "i2", "u2", "i4", "u4", "f4", "f8") for compressed in (False, True)] + [("i8", False)],
)
def test_every_type_of_pixel(spaced: Path, dtype: str, compressed: bool) -> None:
    values = (np.arange(23 * 31).reshape(SHAPE) % 200).astype(dtype)
    kind = fits.CompImageHDU if compressed else fits.ImageHDU
    fits.HDUList([fits.PrimaryHDU(), kind(values, sky(MAGZERO=31.4), name="g")]).writeto(spaced / "m.fits")
    expected = fits.getdata(spaced / "m.fits", 1).astype(np.float32)
    with open_mosaic(spaced / "m.fits") as mosaic:
        np.testing.assert_array_equal(mosaic.read(WINDOW).data[0], expected[CUT])
    assert expected.max() == pytest.approx(199, abs=0.1)


@pytest.mark.parametrize("where", ["header of the last extension", "pixels"])
def test_files_cut_short(spaced: Path, where: str) -> None:
    path = hsc(spaced)
    with fits.open(path) as file:
        start, data = (file["VARIANCE"].fileinfo()[key] for key in ("hdrLoc", "datLoc"))
    path.write_bytes(path.read_bytes()[: start + 1000 if "header" in where else data + 100])
    with pytest.raises(ImageError, match="truncated"):
        open_mosaic(path)


def test_the_wcs_may_be_beyond_reading(spaced: Path) -> None:
    fits.PrimaryHDU(noise(), sky(MAGZERO=31.4, FILTER="g", PC1_1=0.0, PC2_2=0.0)).writeto(spaced / "m.fits")
    with pytest.raises(ImageError, match="its WCS cannot be read"):
        open_mosaic(spaced / "m.fits")


@pytest.mark.parametrize(
    ("name", "band"),
    [
        ("HSC-G", "g"),
        ("HSC-R2", "r"),
        ("g DECam SDSS c0001 4720.0 1520.0", "g"),
        ("lsst_u", "u"),
        ("r_sim_1.4", "r"),
        ("i_39", "i"),
        ("Y", "y"),
        ("F090W", "f090w"),
        ("NB0387", "nb0387"),
        ("unknown", "unknown"),
        ("", ""),
    ],
)
def test_filter_names_of_surveys(name: str, band: str) -> None:
    assert band_name(name) == band


@pytest.mark.parametrize("layout", ["cube", "datasets", "group"])
def test_hdf5(spaced: Path, layout: str) -> None:
    data = np.stack([noise(0), noise(1)])
    flags = np.zeros((2, *SHAPE), np.int32)
    flags[0, 1, 2], flags[1, 3, 4], flags[1, 5, 6] = 1, 2, 4
    variance = np.full((2, *SHAPE), 9.0)
    wcs = sky().tostring(sep="\n")
    with h5py.File(spaced / "a.h5", "w") as file:
        if layout == "cube":
            file.create_dataset("images", data=data, chunks=(1, 8, 8), compression="gzip")
            file["images"].attrs.update(bands=["g", "r"], zero_point=[31.4, 28.9], wcs=wcs)
            file["variance"], file["mask"] = variance, flags
            file["mask"].attrs.update(MP_NO_DATA=0, MP_SAT=1, MP_DETECTED=2)
        else:
            top = file.create_group("images") if layout == "group" else file
            for k, band in enumerate("gr"):
                top[band] = data[k].astype(">f4")
                top[band].attrs["zero_point"] = (31.4, 28.9)[k]
            file.attrs["wcs"] = wcs
            file.create_group("mask").attrs.update(MP_NO_DATA=0, MP_SAT=1, MP_DETECTED=2)
            for name, array in (("variance", variance), ("mask", flags)):
                for k, band in enumerate("gr"):
                    file[f"{name}/{band}"] = array[k]
    with open_mosaic(spaced / "a.h5", "rg") as mosaic:
        image = mosaic.read()
    assert np.argwhere(image.invalid).tolist() == [[0, 3, 4], [1, 1, 2]]
    valid = ~image.invalid
    np.testing.assert_allclose(image.data[0][valid[0]], data[1][valid[0]] * 10, rtol=1e-6)
    np.testing.assert_array_equal(image.data[1][valid[1]], data[0][valid[1]])
    assert image.variance[0][valid[0]] == pytest.approx(900)
    assert image.pixel_scale == pytest.approx(0.03)


def test_hdf5_faults_are_named(spaced: Path) -> None:
    path = spaced / "a.h5"

    def made(**parts: Any) -> Path:
        with h5py.File(path, "w") as file:
            for name, value in parts.items():
                if isinstance(value, np.ndarray):
                    file[name] = value
                else:
                    file.attrs[name] = value
        return path

    cube, options = np.zeros((2, *SHAPE)), {"pixel_scale": 0.2, "require_wcs": False}
    with pytest.raises(ImageError, match="expected a dataset 'images'"):
        open_mosaic(made())
    with pytest.raises(ImageError, match="2 of 2 image planes .* name no band"):
        open_mosaic(made(images=cube), **options)
    with pytest.raises(ImageError, match="2 image planes for 3 bands"):
        open_mosaic(made(images=cube, bands=["g", "r", "i"]), **options)
    with pytest.raises(ImageError, match="its unit 'none' is no flux"):
        open_mosaic(made(images=cube, bands=["g", "r"]), **options)
    with pytest.raises(ImageError, match="its unit 'furlong' is no flux"):
        open_mosaic(made(images=cube, bands=["g", "r"], unit="furlong"), **options)
    with pytest.raises(ImageError, match="zero_point has 3 values for 2 bands"):
        open_mosaic(made(images=cube, bands=["g", "r"], zero_point=[27.0] * 3), **options)
    with pytest.raises(ImageError, match=r"/variance has shape \(5, 5\), images \(2, 23, 31\)"):
        open_mosaic(made(images=cube, bands=["g", "r"], unit="nJy", variance=np.ones((5, 5))), **options)
    with pytest.raises(ImageError, match="is no celestial FITS header"):
        open_mosaic(
            made(images=cube, bands=["g", "r"], unit="nJy", wcs=fits.Header({"CTYPE1": "LINEAR", "CTYPE2": "LINEAR"}).tostring()),
            **options,
        )
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ImageError, match="cannot be read as .h5"):
        open_mosaic(path)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "f8", "i2"])
def test_npy(spaced: Path, dtype: str) -> None:
    data = np.stack([noise(0), noise(1)]).astype(dtype)
    data[0, 5, 5] = 0
    np.save(spaced / "a.npy", data)
    options: dict[str, Any] = {"zero_point": 28.9, "pixel_scale": 0.2, "require_wcs": False, "plane_bands": "gr"}
    with open_mosaic(spaced / "a.npy", blank=0 if dtype != "i2" else None, **options) as mosaic:
        image = mosaic.read(WINDOW)
    np.testing.assert_allclose(image.data, data.astype(np.float32)[CUT] * 10, rtol=1e-6)
    assert image.mask.sum() == (dtype != "i2")
    np.save(spaced / "one.npy", data[0])
    with open_mosaic(spaced / "one.npy", **options | {"plane_bands": "g"}) as mosaic:
        np.testing.assert_array_equal(mosaic.read(WINDOW).data[0], image.data[0])


def test_npy_faults_are_named(spaced: Path) -> None:
    options: dict[str, Any] = {"zero_point": 28.9, "pixel_scale": 0.2, "require_wcs": False, "plane_bands": "gr"}
    for array, message in (
        (np.asfortranarray(np.zeros((2, *SHAPE))), "ascontiguousarray"),
        (np.zeros((2, *SHAPE), complex), "expected numbers"),
        (np.zeros(5), "images of shape"),
    ):
        np.save(spaced / "a.npy", array)
        with pytest.raises(ImageError, match=message):
            open_mosaic(spaced / "a.npy", **options)
    np.save(spaced / "a.npy", np.zeros((2, *SHAPE)))
    (spaced / "a.npy").write_bytes((spaced / "a.npy").read_bytes()[:-8])
    with pytest.raises(ImageError, match="cannot be read as .npy"):
        open_mosaic(spaced / "a.npy", **options)
    with pytest.raises(ImageError, match="does not exist"):
        open_mosaic(spaced / "b.npy", **options)


def test_npz_with_companions(spaced: Path) -> None:
    data, mask = np.stack([noise(0), noise(1)]), np.zeros(SHAPE, bool)
    mask[2, 3] = True
    np.savez(
        spaced / "a.npz",
        images=data,
        bands=["g", "r"],
        mask=mask,
        variance=np.full_like(data, 4.0),
        unit="uJy",
        wcs=sky().tostring(),
    )
    with open_mosaic(spaced / "a.npz") as mosaic:
        image = mosaic.read()
    assert np.argwhere(image.invalid).tolist() == [[0, 2, 3], [1, 2, 3]]
    np.testing.assert_allclose(image.data[:, ~mask], data[:, ~mask] * 1000, rtol=1e-6)
    assert image.variance[0, 0, 0] == pytest.approx(4e6)


@needs_real_pixels
def test_real_hsc_cube() -> None:
    path = REAL / "hsc_cosmos_grizy.fits"
    with open_mosaic(path, "yg", plane_bands="grizy", zero_point=27.0) as mosaic:
        image = mosaic.read(Window(7, 5, 40, 50))
    expected = fits.getdata(path)[[4, 0], 5:50, 7:40] * 10 ** (0.4 * 4.4)
    np.testing.assert_allclose(image.data, expected, rtol=1e-6)
    assert image.pixel_scale == pytest.approx(0.168, rel=1e-4)


@needs_real_pixels
def test_real_decam_files_one_a_band() -> None:
    paths = [REAL / f"decam_sim_{band}.fits" for band in "grz"]
    with open_mosaic(paths, plane_bands="grz", zero_point=25.0) as mosaic:
        image = mosaic.read(Window(100, 300, 355, 512))
        there = mosaic.wcs
    for plane, path in zip(image.data, paths, strict=True):
        np.testing.assert_allclose(plane, fits.getdata(path)[300:512, 100:355] * 10 ** (0.4 * 6.4), rtol=1e-6)
    assert image.pixel_scale == pytest.approx(0.263, rel=1e-3)
    np.testing.assert_allclose(image.wcs.all_pix2world(0, 0, 0), there.all_pix2world(100, 300, 0), atol=1e-10)


@needs_real_pixels
def test_real_hsc_arrays(caplog: pytest.LogCaptureFixture) -> None:
    path, options = REAL / "hsc_cosmos_35.npz", {"zero_point": 27.0, "pixel_scale": 0.168, "require_wcs": False}
    with open_mosaic(path, "ri", **options) as mosaic:
        image = mosaic.read()
    with np.load(path) as file:
        np.testing.assert_allclose(image.data, file["images"][1:3] * 10 ** (0.4 * 4.4), rtol=1e-6)
        np.testing.assert_allclose(image.variance, file["variance"][1:3] * 10 ** (0.8 * 4.4), rtol=1e-6)
        detected = file["mask"][1:3] & 32 > 0
    assert not image.mask.any()
    assert "is left alone" in caplog.text
    with open_mosaic(path, "ri", bad_bits=32, **options) as mosaic:
        np.testing.assert_array_equal(mosaic.read().invalid, detected)
