"""What is measured on windows beyond redshifts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.simulate import simulate_scene
from deepdisc_ops.inference.examine import DomainCheck, Photometer, ScaleCheck, mosaic_noise
from deepdisc_ops.inference.recipe import examiners
from deepdisc_ops.sky.detections import Array, Detections, Flag
from deepdisc_ops.sky.domain import Domain, measure_image
from deepdisc_ops.sky.images import Mosaic, SkyImage
from deepdisc_ops.sky.photometry import measure
from deepdisc_ops.sky.planes import MemoryPixels, Plane
from deepdisc_ops.sky.tiling import Window

BANDS = ("u", "g", "r", "i", "z", "y")


def mosaic_of(pixels: Array, scale: float = 0.2) -> Mosaic:
    planes = [
        Plane(band, Path("memory"), 0, 0, plane.shape, None, 1.0, MemoryPixels(np.ascontiguousarray(plane, np.float32)))
        for band, plane in zip(BANDS, pixels, strict=False)
    ]
    return Mosaic(planes, scale)


@pytest.fixture(scope="module")
def image() -> SkyImage:
    scene = simulate_scene(SkySettings(), size=256, seed=5)
    return mosaic_of(np.asarray(scene.image)).read()


def boxes(n: int) -> Detections:
    rng = np.random.default_rng(n)
    corner = rng.uniform(20, 220, (n, 2))
    box = np.concatenate([corner, corner + rng.uniform(5, 15, (n, 2))], axis=1).astype(np.float32)
    ones, index = np.ones((n, 1), np.float32), np.zeros(n, np.int32)
    return Detections(box, ones[:, 0], index, ones, ones, ones, ones[:, 0], index, index)


@pytest.mark.parametrize("n", [0, 1, 12])
def test_photometry_becomes_columns(image: SkyImage, n: int) -> None:
    seen, told = Photometer(diameter=1.5)(image, boxes(n))
    assert not told
    for name, column in measure(image, boxes(n), diameter=1.5).items():
        np.testing.assert_array_equal(seen.extra[name], column)
        assert column.shape == (n, 6)


def test_errors_do_not_depend_on_the_window_where_the_noise_is_the_mosaics(rng: np.random.Generator) -> None:
    """A window's own noise would differ: it is lower in that corner."""
    pixels = rng.normal(0, 5, (2, 600, 600))
    pixels[:, :90, :90] *= 0.5
    mosaic = mosaic_of(pixels)
    noise = mosaic_noise(mosaic, side=200)
    assert noise is not None
    np.testing.assert_allclose(noise.sigma, 5, rtol=0.03)
    np.testing.assert_allclose(noise.correlation, 0, atol=0.03)
    images = [mosaic.read(window) for window in (Window(0, 0, 300, 300), Window(0, 0, 600, 600))]
    errors = [Photometer(noise=noise)(image, boxes(5))[0].extra["flux_err"] for image in images]
    np.testing.assert_allclose(errors[0], errors[1], rtol=1e-6)


def test_a_mosaic_with_holes_still_tells_its_noise(rng: np.random.Generator) -> None:
    pixels = rng.normal(0, 3, (2, 500, 500))
    pixels[:, :150] = np.nan
    pixels[1] = np.nan
    noise = mosaic_noise(mosaic_of(pixels), side=100)
    assert noise is not None
    assert noise.sigma[0] == pytest.approx(3, rel=0.05)
    assert np.isnan(noise.sigma[1])


def test_what_is_like_training_is_not_flagged_and_what_is_not_is(image: SkyImage) -> None:
    domain = Domain.of([measure_image(image)], image.bands, image.pixel_scale)
    check = DomainCheck(domain)
    seen, told = check(image, boxes(4))
    assert not told
    assert not (seen.flags & Flag.OUT_OF_DOMAIN).any()
    bright = mosaic_of(10 * image.data).read()
    seen, told = check(bright, boxes(4))
    assert any(sentence.startswith("noise is ") for sentence in told)
    assert ((seen.flags & Flag.OUT_OF_DOMAIN) > 0).all()


def test_another_pixel_scale_is_told_with_both(image: SkyImage) -> None:
    coarse = mosaic_of(image.data, 0.22).read()
    seen, told = ScaleCheck(0.2)(coarse, boxes(3))
    assert told == ["pixel scale is 0.22 arcsec, in training 0.2"]
    assert ((seen.flags & Flag.OUT_OF_DOMAIN) > 0).all()
    assert ScaleCheck(0.215)(coarse, boxes(3))[1] == []


def test_members_of_one_training_set_are_compared_once(image: SkyImage) -> None:
    domain = Domain.of([measure_image(image)], image.bands, image.pixel_scale)
    mosaic = mosaic_of(image.data)
    kinds = [type(one) for one in examiners(mosaic, [domain, None, domain], 0.2)]
    assert kinds == [Photometer, DomainCheck]
    assert [type(one) for one in examiners(mosaic, [None], 0.2, photometry=False)] == [ScaleCheck]
    assert examiners(mosaic, photometry=False) == []
