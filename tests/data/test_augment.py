from __future__ import annotations

import numpy as np
import pytest

from deepdisc_ops.config import AugmentSettings, DataSettings, validate
from deepdisc_ops.data.augment import add_noise, blur, blur_margin, degrade, draw_symmetry, drop_bands
from deepdisc_ops.errors import ConfigError


def test_nothing_is_drawn_and_nothing_changed_by_default(rng: np.random.Generator) -> None:
    pixels = rng.normal(size=(3, 20, 20)).astype(np.float32)
    before = rng.bit_generator.state
    assert degrade(pixels, AugmentSettings(), (), rng) is pixels
    assert rng.bit_generator.state == before
    assert blur_margin(AugmentSettings()) == 0


def test_a_blurred_star_keeps_its_flux_and_grows_by_the_kernel() -> None:
    y, x = np.mgrid[:65, :65] - 32.0
    star = (100 * np.exp(-(x**2 + y**2) / (2 * 2.0**2)))[None].astype(np.float32)
    wide = blur(star, 3.0)
    assert wide.sum() == pytest.approx(star.sum(), rel=1e-3)
    assert np.sqrt((wide[0] * x**2).sum() / wide.sum()) == pytest.approx(np.hypot(2.0, 3.0), rel=0.01)


def test_invalid_pixels_neither_blur_into_others_nor_become_valid() -> None:
    flat = np.full((1, 30, 30), 7.0, np.float32)
    flat[0, 10:14, 8:20] = np.nan
    blurred = blur(flat, 2.5)
    np.testing.assert_array_equal(np.isnan(blurred), np.isnan(flat))
    np.testing.assert_allclose(blurred[np.isfinite(blurred)], 7.0, rtol=1e-5)


def test_a_blurred_crop_is_the_crop_of_the_blurred_image(rng: np.random.Generator) -> None:
    image = rng.normal(size=(2, 80, 80)).astype(np.float32)
    margin = blur_margin(AugmentSettings(blur_px=(0.5, 1.5)))
    part = blur(image[:, 30 - margin : 50 + margin, 30 - margin : 50 + margin], 1.5)[:, margin:-margin, margin:-margin]
    np.testing.assert_allclose(part, blur(image, 1.5)[:, 30:50, 30:50], atol=1e-5)


def test_noise_becomes_that_of_fewer_years(rng: np.random.Generator) -> None:
    deep = np.array([2.0, 9.0], np.float32)
    image = deep[:, None, None] * rng.standard_normal((2, 300, 300), np.float32)
    image[0, :5] = np.nan
    shallow = add_noise(image, np.sqrt(10 / 1), tuple(map(float, deep)), rng)
    np.testing.assert_allclose(np.nanstd(shallow, axis=(1, 2)), np.sqrt(10) * deep, rtol=0.02)
    np.testing.assert_array_equal(np.isnan(shallow), np.isnan(image))


def test_dropped_bands_are_as_many_as_asked_and_never_all(rng: np.random.Generator) -> None:
    image = np.ones((4, 2, 2), np.float32)
    left = np.array([np.isfinite(drop_bands(image, 0.3, rng)).all(axis=(1, 2)) for _ in range(2000)])
    assert left.mean() == pytest.approx(0.7, abs=0.03)
    uncovered = image.copy()
    uncovered[:3] = np.nan
    for _ in range(50):
        assert np.isfinite(drop_bands(uncovered, 0.9, rng))[3].all()
    assert np.isnan(drop_bands(np.full_like(image, np.nan), 0.9, rng)).all()


@pytest.mark.parametrize(("name", "expected"), [("none", 1), ("flips", 4), ("all", 8)])
def test_symmetries_are_drawn_among_those_allowed(name: str, expected: int, rng: np.random.Generator) -> None:
    settings = validate(AugmentSettings, {"symmetries": name}, "test")
    assert {draw_symmetry(settings, rng) for _ in range(200)} == set(range(expected))


def test_settings_that_cannot_be_met_are_refused() -> None:
    for tree, message in (
        ({"blur_px": [2, 1]}, "from the larger to the smaller"),
        ({"noise_factor": [0.5, 2]}, "noise can be added but not taken away"),
        ({"band_dropout": 1.0}, "augment.band_dropout"),
        ({"blur": 1}, "unknown key 'augment.blur', did you mean 'augment.blur_px'"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(DataSettings, {"augment": tree}, "test")
