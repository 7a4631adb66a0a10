from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import yaml
from scipy.ndimage import gaussian_filter

from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.scenes import Scene, simulate_scene
from deepdisc_ops.errors import CheckpointError, ImageError
from deepdisc_ops.sky.domain import Domain, measure_image
from deepdisc_ops.sky.images import SkyImage

SIDE = 400
BANDS = ("u", "g", "r", "i", "z", "y")


def as_image(data: np.ndarray, bands: tuple[str, ...] = BANDS, scale: float = 0.2) -> SkyImage:
    return SkyImage(np.ascontiguousarray(data, np.float32), bands, None, scale, np.zeros(data.shape[1:], bool))


def draw(seed: int, years: float = 5.0, side: int = SIDE) -> Scene:
    return simulate_scene(SkySettings(years=years), size=side, seed=seed)


@pytest.fixture(scope="module")
def domain() -> Domain:
    return Domain.of((measure_image(as_image(draw(seed).image)) for seed in range(20)), BANDS, 0.2)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw(seed) for seed in range(100, 104)]


def test_images_like_those_of_training_pass(domain: Domain):
    told = [domain.compare(as_image(draw(seed).image)) for seed in range(200, 224)]
    quarters = [domain.compare(as_image(draw(seed).image[:, :200, 200:])) for seed in range(300, 312)]
    assert [words for words in told + quarters if words] == []


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_a_wrong_zero_point_is_told_by_noise_and_brightness(domain: Domain, scenes: list[Scene], factor: float):
    told = [domain.compare(as_image(scene.image * factor)) for scene in scenes]
    assert all(words[0].startswith("noise is u ") and "in training" in words[0] for words in told)
    assert sum(any("brightness" in word for word in words) for words in told) >= 2


@pytest.mark.parametrize("years", [1.0, 25.0])
def test_a_fifth_and_five_times_the_exposure_are_told_by_noise(domain: Domain, years: float):
    told = [domain.compare(as_image(draw(seed, years).image)) for seed in range(100, 104)]
    assert all(words[0].startswith("noise is u ") for words in told)
    assert not any(word.startswith(("sky", "width", "brightness")) for words in told for word in words)


def test_a_psf_twice_as_wide_is_told(domain: Domain, rng: np.random.Generator):
    for scene in (draw(seed, side=512) for seed in range(100, 103)):
        sigma = scene.conditions.psf_fwhm / 0.2 / 2.355 * np.sqrt(3)
        data = np.stack([gaussian_filter(plane, width) for plane, width in zip(scene.noiseless, sigma, strict=True)])
        data = data + scene.noise[:, None, None] * rng.standard_normal(data.shape)
        assert [word.split(" is ")[0] for word in domain.compare(as_image(data))] == ["width of the PSF"]


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(range(6), 2)))
def test_two_bands_in_each_others_place_are_told(domain: Domain, scenes: list[Scene], one: int, other: int):
    order = list(range(6))
    order[one], order[other] = other, one
    assert all(domain.compare(as_image(scene.image[order])) for scene in scenes)


def test_a_wrong_pixel_scale_is_told_with_both(domain: Domain, scenes: list[Scene]):
    for scale in (0.1, 0.168, 0.4):
        told = domain.compare(as_image(scenes[0].image, scale=scale))
        assert told[0] == f"pixel scale is {scale} arcsec, in training 0.2"


def test_a_sky_that_was_not_taken_off_is_told(domain: Domain, scenes: list[Scene]):
    told = domain.compare(as_image(scenes[0].image + 3 * scenes[0].noise[:, None, None]))
    assert any(word.startswith("sky level is u ") for word in told)


def test_bands_are_found_by_name(domain: Domain, scenes: list[Scene]):
    turned = as_image(scenes[0].image[::-1], BANDS[::-1])
    assert domain.compare(turned) == []
    assert domain.compare(replace(turned, bands=BANDS)) != []
    with pytest.raises(ImageError, match="lacks u, g"):
        domain.compare(as_image(scenes[0].image[2:], BANDS[2:]))


def test_invalid_pixels_tell_nothing(domain: Domain, scenes: list[Scene]):
    invalid = np.zeros(scenes[0].image.shape, bool)
    invalid[2, :, :100] = True
    invalid[4] = True
    data = np.where(invalid, np.float32(0), scenes[0].image)
    image = replace(as_image(data), invalid=invalid, mask=invalid.any(axis=0))
    assert domain.compare(image) == []
    assert np.isnan(measure_image(image).noise).tolist() == [False, False, False, False, True, False]


@pytest.mark.parametrize("shape", [(6, 1, 1), (6, 3, 200), (6, 64, 64)])
def test_small_empty_and_flat_images_are_no_error(domain: Domain, shape: tuple[int, ...], rng: np.random.Generator):
    noise = np.array([6.3, 2.0, 1.95, 3.8, 7.4, 22.0])[:, None, None] * rng.standard_normal(shape)
    assert domain.compare(as_image(noise)) == []
    nowhere = replace(as_image(noise * 0), mask=np.ones(shape[1:], bool))
    assert domain.compare(nowhere) == []
    domain.compare(as_image(noise * 0))


def test_a_domain_survives_yaml(domain: Domain, scenes: list[Scene]):
    again = Domain.from_dict(yaml.safe_load(yaml.safe_dump(domain.as_dict())), "test")
    assert again.bands == domain.bands
    np.testing.assert_allclose(again.high.noise, domain.high.noise, rtol=1e-3)
    assert len(again.compare(as_image(scenes[0].image * 3))) == len(domain.compare(as_image(scenes[0].image * 3)))
    tree = domain.as_dict()
    del tree["noise"]
    with pytest.raises(CheckpointError, match="member.yaml: the domain cannot be read"):
        Domain.from_dict(tree, "member.yaml")


def test_augmentation_widens_the_domain(domain: Domain, scenes: list[Scene], rng: np.random.Generator):
    noisy = scenes[0].image + 2 * scenes[0].noise[:, None, None] * rng.standard_normal(scenes[0].image.shape)
    assert domain.compare(as_image(noisy)) != []
    assert domain.augmented(noise_factor=3.0).compare(as_image(noisy)) == []
    assert domain.augmented(blur_px=2.0).high.psf_fwhm[3] == pytest.approx(np.hypot(domain.high.psf_fwhm[3], 0.942), rel=1e-3)


def test_one_band_and_one_image_are_a_domain_too(scenes: list[Scene]):
    single = Domain.of([measure_image(as_image(scenes[0].image[3:4], ("i",)))], ("i",), 0.2)
    assert single.compare(as_image(scenes[1].image[3:4], ("i",))) == []
    assert single.compare(as_image(scenes[1].image[3:4] * 3, ("i",))) != []
