from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deepdisc_ops.data import artifacts, surveys
from deepdisc_ops.data.artifacts import FLAG_BITS
from deepdisc_ops.data.render import Optics

HSC = surveys.survey("hsc")
NO_STARS = artifacts.Stars(np.zeros(0), np.zeros(0), np.zeros((0, 5)))


def optics() -> Optics:
    conditions = surveys.typical_conditions(HSC, 5.0)
    return Optics(conditions.psf_fwhm, surveys.pixel_noise(HSC, conditions), HSC.pixel_scale)


def blemished(
    *kinds: str, seed: int = 0, stars: artifacts.Stars = NO_STARS, shape: tuple[int, int] = (120, 90)
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """An empty image with blemishes, and their flags."""
    image = np.zeros((5, *shape), np.float32)
    return image, artifacts.add_artifacts(image, kinds, HSC, optics(), stars, np.random.SeedSequence(seed))


def has(flags: NDArray[np.uint8], name: str) -> NDArray[np.bool_]:
    return (flags >> FLAG_BITS[name] & 1).astype(bool)


@settings(max_examples=30)
@given(st.floats(10, 1800), st.integers(0, 2**32 - 1))
def test_bleeding_keeps_the_charge_and_stays_in_its_column(peak: float, seed: int) -> None:
    plane = np.random.default_rng(seed).uniform(0, 5, (400, 7)).astype(np.float32)
    plane[200:203, 3] = peak
    before, flags = plane.copy(), np.zeros(plane.shape, np.uint8)
    artifacts.bleed(plane, flags, 20.0)
    assert plane.max() <= 20
    np.testing.assert_array_equal(has(flags, "SAT"), before > 20)
    np.testing.assert_array_equal(np.delete(plane, 3, axis=1), np.delete(before, 3, axis=1))
    assert plane[:, 3].sum() == pytest.approx(before[:, 3].sum(), rel=1e-5)
    np.testing.assert_array_equal(has(flags, "BLEED"), plane > before)
    rows = np.flatnonzero(has(flags, "BLEED")[:, 3])
    assert len(rows) == 0 or (plane[rows.min() + 1 : rows.max(), 3] == 20).all()


def test_charge_that_leaves_the_image_is_lost() -> None:
    plane, flags = np.zeros((5, 1), np.float32), np.zeros((5, 1), np.uint8)
    plane[0] = 1000
    artifacts.bleed(plane, flags, 10.0)
    assert (plane == 10).all()
    assert has(flags, "BLEED").sum() == 4


def test_saturation_begins_at_the_surveys_magnitude() -> None:
    from deepdisc_ops.data.render import central_share

    image = np.zeros((5, 21, 21), np.float32)
    for magnitude, saturated in ((0.01, False), (-0.01, True)):
        light = surveys.to_njy(np.array(HSC.saturation) + magnitude) * central_share(optics())
        image[:, 10, 10] = light
        flags = artifacts.add_artifacts(image, ["saturation"], HSC, optics(), NO_STARS, np.random.SeedSequence(0))
        assert (has(flags, "SAT").sum(axis=(1, 2)) == saturated).all()


def test_spikes_are_arms_of_bright_stars() -> None:
    flux = np.full((2, 5), 1.0) * surveys.to_njy(np.array([[16.0], [23.0]]))
    stars = artifacts.Stars(np.array([150.0, 30.0]), np.array([140.0, 40.0]), flux)
    image, flags = blemished("spikes", stars=stars, shape=(300, 320))
    rows, columns = np.nonzero(has(flags, "SPIKE")[2])
    distance = np.hypot(rows - 140, columns - 150)
    angle = np.arctan2(rows - 140, columns - 150)[distance > 20]
    assert distance.max() > 40
    spread = np.abs(np.exp(1j * artifacts.ARMS["hsc"] * angle).mean())
    assert spread > 0.9  # they lie at equal angles
    assert image[2].sum() / flux[0, 2] == pytest.approx(artifacts.SPIKE_SHARE, rel=0.5)
    assert image[:, 38:43, 28:33].sum() < 0.01 * image.sum()


@pytest.mark.parametrize("seed", range(4))
def test_a_trail_crosses_one_band_in_a_line(seed: int) -> None:
    image, flags = blemished("trail", seed=seed)
    (band,) = np.flatnonzero(image.any(axis=(1, 2)))
    rows, columns = np.nonzero(has(flags, "TRAIL")[band])
    assert (image[band][has(flags, "TRAIL")[band]] > artifacts.VISIBLE * optics().noise[band]).all()
    assert not has(np.delete(flags, band, axis=0), "TRAIL").any()
    _, widths, _ = np.linalg.svd(np.stack([rows, columns]) - [[rows.mean()], [columns.mean()]], full_matrices=False)
    assert widths[1] / np.sqrt(len(rows)) < 12  # a narrow line, however long


def test_a_missing_band_is_not_a_number_and_never_zero() -> None:
    shares = []
    for seed in range(30):
        image, flags = blemished("missing_band", seed=seed)
        (band,) = np.flatnonzero(np.isnan(image).any(axis=(1, 2)))
        assert band != HSC.gold_index
        np.testing.assert_array_equal(np.isnan(image), has(flags, "NO_DATA"))
        shares.append(np.isnan(image[band]).mean())
    assert 3 <= shares.count(1.0) <= 20  # now and then the whole field
    assert min(shares) > 0


def test_an_image_of_one_band_may_lose_that() -> None:
    image, flags = np.ones((1, 20, 20), np.float32), np.zeros((1, 20, 20), np.uint8)
    artifacts._drop_band(image, flags, 0, np.random.default_rng(0))
    assert np.isnan(image).any()


def test_one_blemish_does_not_change_another() -> None:
    alone = blemished("trail", seed=3)[1]
    together = blemished("missing_band", "trail", "spikes", seed=3)[1]
    np.testing.assert_array_equal(has(together, "TRAIL"), has(alone, "TRAIL"))
    assert not blemished()[1].any()
