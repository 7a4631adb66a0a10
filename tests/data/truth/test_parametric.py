from __future__ import annotations

from typing import Any

import galsim
import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from deepdisc_ops.config import validate
from deepdisc_ops.data.masks import MASK_SNR, area, decode
from deepdisc_ops.data.truth.parametric import ParametricSettings, Profiles, draw, from_parametric_catalog
from deepdisc_ops.errors import CatalogError, ConfigError, ImageError

from .conftest import SCALE, SquareField


def prepare(field: SquareField, **columns: Any) -> None:
    """The catalogue with Sersic profiles: n = 0.5 is a Gaussian, whose isophotes are known."""
    shapes = {"radius": [0.2] * 5, "n": [0.5] * 5, "q": [1.0] * 5, "pa": [0.0] * 5, "mag_a": [24.0] * 5, "mag_b": [24.0] * 5}
    table = Table({name: field.table[name] for name in ("ID", "ra", "dec", "z")} | shapes | columns)
    field.write_table(table)


def settings(field: SquareField, **more: Any) -> ParametricSettings:
    tree = field.settings()
    tree.pop("segmentation")
    tree["catalog"]["columns"]["magnitudes"] = {"a": "mag_a", "b": "mag_b"}
    tree |= {
        "shapes": {"radius": "radius", "index": "n", "axis_ratio": "q", "angle": "pa"},
        "psf": {"fwhm": [0.3, 0.3]},
        "windows": {"width_arcsec": 10.0, "height_arcsec": 8.0},
    }
    return validate(ParametricSettings, tree | more, "test")


def objects(field: SquareField, **more: Any):
    built = from_parametric_catalog(settings(field, **more), field.folder / "out")
    (record,) = built.dataset.records()
    return record.objects, built


def gaussian_area(flux: float, sigma: float, noise: np.ndarray) -> float:
    """Pixels where a round Gaussian of that flux and sigma (pixels) in all bands exceeds the threshold."""
    peak = flux / (2 * np.pi * sigma**2)
    return 2 * np.pi * sigma**2 * np.log(peak * np.sqrt((1 / noise**2).sum()) / MASK_SNR)


def test_the_mask_of_a_gaussian_is_the_circle_it_should_be(field: SquareField) -> None:
    prepare(field)
    found, _ = objects(field)
    assert found.ids.tolist() == [11, 12, 13, 14, 15]
    sigma = np.hypot(0.2 / 1.17741, 0.3 / 2.35482) / SCALE
    flux = 10 ** (-0.4 * (24 - 31.4))
    noise = [
        np.nanstd(np.where(fits.getdata(field.folder / f"{band}.fits") > 8, np.nan, fits.getdata(field.folder / f"{band}.fits")))
        for band in "ab"
    ]
    expected = gaussian_area(flux, np.hypot(sigma, 1 / np.sqrt(12)), np.array(noise))
    assert found.masks is not None
    for mask, box in zip(found.masks[1:3], found.boxes[1:3], strict=True):
        assert area(mask) == pytest.approx(expected, rel=0.1)
        assert (box[2:] - box[:2]) == pytest.approx(2 * np.sqrt(expected / np.pi), abs=1.5)
    np.testing.assert_allclose(
        (found.boxes[1:3, :2] + found.boxes[1:3, 2:]) / 2 - 0.5, np.stack([found.x, found.y], 1)[1:3], atol=1
    )


def test_position_angles_run_from_north_to_east_of_a_rotated_image(field: SquareField) -> None:
    prepare(field, q=[0.3] * 5, radius=[0.8] * 5, pa=[30.0] * 5, mag_b=[22.0] * 5)
    found, built = objects(field)
    (record,) = built.dataset.records()
    assert found.masks is not None
    rows, columns = np.nonzero(decode(found.masks[1]))
    _, axes = np.linalg.eigh(np.cov(columns, rows))
    step = axes[:, 1] * 5
    start = field.wcs.pixel_to_world(record.objects.x[1], record.objects.y[1])
    end = field.wcs.pixel_to_world(record.objects.x[1] + step[0], record.objects.y[1] + step[1])
    assert start.position_angle(end).deg % 180 == pytest.approx(30, abs=3)
    np.testing.assert_allclose([columns.mean(), rows.mean()], [found.x[1], found.y[1]], atol=0.3)


@pytest.mark.parametrize("index", [1.0, 4.0])
def test_a_picture_holds_the_light_and_is_drawn_until_it_falls_below_the_threshold(index: float) -> None:
    profiles = Profiles(np.array([0.3]), np.array([index]), np.array([0.6]), np.array([0.4]))
    stamps = draw(
        profiles, 0, np.array([500.0, 3000.0]), (20.3, 11.8), [galsim.Gaussian(fwhm=0.3)] * 2, np.array([0.1, 0.1]), SCALE
    )
    light = stamps.flux[0].sum(axis=(1, 2))
    assert 0.85 * 500 < light[0] < 500 * (1 + 1e-5)
    assert light[1] / light[0] == pytest.approx(6, rel=1e-3)
    border = np.concatenate(
        [stamps.flux[0, :, 0], stamps.flux[0, :, -1], stamps.flux[0, :, :, 0], stamps.flux[0, :, :, -1]], axis=1
    )
    assert np.hypot(*(border / 0.1)).max() <= MASK_SNR
    rows, columns = np.indices(stamps.flux.shape[2:])
    centre = [
        (stamps.flux[0, 1] * axis).sum() / light[1] + start
        for axis, start in ((columns, stamps.origins[0, 0]), (rows, stamps.origins[0, 1]))
    ]
    np.testing.assert_allclose(centre, [20.3, 11.8], atol=0.1)


def test_psf_images_are_drawn_as_their_form_is(field: SquareField) -> None:
    prepare(field)
    pixels = galsim.Gaussian(fwhm=0.3).drawImage(nx=101, ny=101, scale=0.02, method="no_pixel").array
    fits.writeto(field.folder / "psf.fits", pixels)
    with pytest.raises(ImageError, match="psf.fits tells no scale .PIXELSCL.; give psf.pixel_scale"):
        objects(field, psf={"images": [str(field.folder / "psf.fits")] * 2})
    form, _ = objects(field)
    built = from_parametric_catalog(
        settings(field, psf={"images": [str(field.folder / "psf.fits")] * 2, "pixel_scale": 0.02}), field.folder / "images"
    )
    (record,) = built.dataset.records()
    assert form.masks is not None
    assert record.objects.masks is not None
    for one, other in zip(form.masks, record.objects.masks, strict=True):
        assert (decode(one) ^ decode(other)).sum() <= 0.05 * area(one) + 1


def test_faint_sources_are_left_out_by_limit_and_by_threshold(field: SquareField) -> None:
    prepare(field, mag_a=[24.0, 24, 31, 24, 24], mag_b=[24.0, 26, 31, 29.9, 24])
    found, built = objects(field, faintest=25.5)
    assert found.ids.tolist() == [11, 15]
    assert built.counts["sources too faint"] == 3
    built = from_parametric_catalog(settings(field), field.folder / "threshold")
    assert 13 not in built.dataset.records()[0].objects.ids
    built = from_parametric_catalog(settings(field, keep_faint=True), field.folder / "all")
    assert built.dataset.records()[0].objects.ids.tolist() == [11, 12, 13, 14, 15]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"q": [1.0, 1.2, 1, 1, 1]}, "q is 1.2 for id 12; expected a value above 0 and at most 1"),
        ({"radius": [0.2, 0.2, 0, 0.2, 0.2]}, "radius is 0 for id 13; expected a value above 0 arcsec"),
        ({"n": [0.5, np.nan, 1, 1, 1]}, "n is nan for id 12"),
    ],
)
def test_profiles_that_cannot_be_are_named(field: SquareField, columns: dict[str, Any], message: str) -> None:
    prepare(field, **columns)
    with pytest.raises(CatalogError, match=message):
        objects(field)
    assert not (field.folder / "out").exists()


def test_faults_of_the_settings_are_named(field: SquareField) -> None:
    prepare(field)
    with pytest.raises(ConfigError, match="psf has 1 values for 2 bands a, b"):
        settings(field, psf={"fwhm": [0.3]})
    with pytest.raises(ConfigError, match="needs images or fwhm, and not both"):
        settings(field, psf={})
    catalog = field.settings()["catalog"]
    with pytest.raises(ConfigError, match="magnitudes lack a; a source is drawn in every band"):
        settings(field, catalog=catalog)
    with pytest.raises(CatalogError, match="lacks the column 'nn'"):
        objects(field, shapes={"radius": "radius", "index": "nn", "axis_ratio": "q", "angle": "pa"})
