from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepdisc_ops.errors import CatalogError, ImageError
from deepdisc_ops.sky.images import SkyImage
from deepdisc_ops.sky.photometry import circle_overlap, correlated_variance, forced_photometry, magnitudes

SCALE = 0.2
SIGMA_PX = 1.6


def make_image(data: np.ndarray, invalid: np.ndarray | None = None) -> SkyImage:
    mask = np.zeros(data.shape[1:], bool) if invalid is None else invalid.any(axis=0)
    bands = tuple("ugrizy"[: len(data)])
    return SkyImage(data.astype(np.float32), bands, None, SCALE, mask, invalid=invalid)


def gaussian_source(size: int, x: float, y: float, flux: float, sigma: float = SIGMA_PX) -> np.ndarray:
    """A Gaussian integrated over the pixels."""
    edges = np.arange(size + 1) - 0.5
    along = [np.diff([0.5 * math.erf((edge - centre) / sigma / math.sqrt(2)) for edge in edges]) for centre in (x, y)]
    return flux * along[1][:, None] * along[0]


def enclosed(radius_px: float, sigma: float = SIGMA_PX) -> float:
    """Share of a Gaussian's light inside a circle; pixels smear it twice, when they gather light and when they are cut."""
    return 1 - math.exp(-(radius_px**2) / 2 / (sigma**2 + 2 / 12))


@given(
    x=st.floats(-0.5, 0.5),
    y=st.floats(-0.5, 0.5),
    radius=st.floats(0.05, 9.0),
)
def test_the_overlaps_of_a_circle_add_up_to_its_area_and_never_leave_0_to_1(x, y, radius):
    edges = np.arange(-10.5, 11.0)
    weight = circle_overlap((edges - x)[None], (edges - y)[None], np.array([radius]))[0]
    assert weight.sum() == pytest.approx(np.pi * radius**2, rel=1e-9)
    assert weight.min() >= -1e-9
    assert weight.max() <= 1 + 1e-9


def test_sums_agree_with_sep(rng):
    sep = pytest.importorskip("sep")
    data = rng.normal(size=(2, 61, 47)).astype(np.float32)
    x, y = rng.uniform(8, 38, 30), rng.uniform(8, 52, 30)
    radii = np.array([0.3, 0.77, 1.4])
    ours = forced_photometry(make_image(data), x, y, radii, variance=[1.0, 4.0])
    for band in range(2):
        for a, radius in enumerate(radii / SCALE):
            theirs, _, _ = sep.sum_circle(data[band], x, y, radius, subpix=0)
            np.testing.assert_allclose(ours.flux[:, band, a], theirs, atol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 0.31, -0.5])
def test_a_gaussian_of_known_flux_is_measured(offset):
    x, y, radii = 30.0 + offset, 24.0 - offset, np.array([0.4, 0.8, 1.6])
    data = np.stack([gaussian_source(61, x, y, flux) for flux in (100.0, 250.0)])
    found = forced_photometry(make_image(data), [x], [y], radii, variance=[1.0, 1.0])
    for band, flux in enumerate((100.0, 250.0)):
        expected = [flux * enclosed(radius / SCALE) for radius in radii]
        np.testing.assert_allclose(found.flux[0, band], expected, rtol=0.015)
    assert found.coverage == pytest.approx(1.0)
    assert found.radii.shape == (2, 3)


def test_errors_are_the_scatter_of_many_measurements(rng):
    sigma = np.array([2.0, 5.0])
    data = sigma[:, None, None] * rng.standard_normal((2, 500, 500))
    x, y = (np.arange(12.3, 488, 12), np.arange(11.8, 488, 12))
    x, y = (grid.ravel() for grid in np.meshgrid(x, y))
    found = forced_photometry(make_image(data), x, y, [0.3, 0.6], variance=sigma**2)
    pull = (found.flux / found.error).std(axis=0)
    np.testing.assert_allclose(pull, 1.0, atol=0.06)


def test_errors_follow_correlated_noise(rng):
    correlation = 0.2
    share = (1 - math.sqrt(1 - 4 * correlation**2)) / (2 * correlation)
    noise = rng.standard_normal((1, 600, 600))
    for axis in (1, 2):
        noise = (noise + share * np.roll(noise, 1, axis=axis)) / math.sqrt(1 + share**2)
    x, y = (grid.ravel() for grid in np.meshgrid(np.arange(12.0, 588, 14), np.arange(12.0, 588, 14)))
    found = forced_photometry(make_image(noise), x, y, [0.4, 1.0], variance=[1.0], noise_correlation=correlation)
    np.testing.assert_allclose((found.flux / found.error).std(axis=0), 1.0, atol=0.07)
    assert correlated_variance(1e6, correlation) == pytest.approx((1 + 2 * correlation) ** 2, rel=1e-3)
    assert correlated_variance(0.1, correlation) == 1.0


def test_radii_may_follow_the_band():
    data = np.stack([gaussian_source(41, 20, 20, 100.0, sigma) for sigma in (1.0, 2.0)])
    radii = SCALE * np.array([[2.0], [4.0]])
    found = forced_photometry(make_image(data), [20.0], [20.0], radii, variance=[1.0, 1.0])
    np.testing.assert_allclose(found.flux[0, :, 0], [100 * enclosed(2.0, 1.0), 100 * enclosed(4.0, 2.0)], rtol=0.02)


def test_invalid_pixels_do_not_count_and_their_share_is_made_up_for():
    data = np.full((2, 21, 21), 3.0)
    invalid = np.zeros(data.shape, bool)
    invalid[0, 10, 12] = True
    data[0, 10, 12] = 1e9
    found = forced_photometry(make_image(data, invalid), [10.0], [10.0], [0.6], variance=[1.0, 1.0])
    assert found.coverage[0, :, 0] == pytest.approx([1 - 1 / (np.pi * 9), 1.0])
    assert found.flux[0, :, 0] == pytest.approx(3 * np.pi * 9)
    assert found.error[0, 0, 0] > found.error[0, 1, 0]


def test_an_images_own_variance_may_be_infinite_where_it_is_invalid():
    invalid = np.zeros((1, 21, 21), bool)
    invalid[0, 10, 12] = True
    variance = np.where(invalid, np.inf, 4.0).astype(np.float32)
    image = make_image(np.ones((1, 21, 21)), invalid)
    own = SkyImage(image.data, image.bands, None, SCALE, image.mask, invalid=invalid, variance=variance)
    found = forced_photometry(own, [10.0], [10.0], [0.6])
    assert found.error == pytest.approx(forced_photometry(image, [10.0], [10.0], [0.6], variance=[4.0]).error)
    assert np.isfinite(found.flux).all()


def test_the_mask_of_all_bands_holds_where_there_is_no_mask_of_each():
    image = make_image(np.ones((2, 21, 21)))
    image.mask[:, 10:] = True
    found = forced_photometry(image, [10.0], [10.0], [0.6], variance=[1.0, 1.0])
    assert np.isnan(found.flux).all()
    assert found.coverage.max() < 0.5


def test_an_aperture_over_the_edge_is_covered_in_part_and_beyond_it_not_at_all():
    image = make_image(np.full((1, 21, 31), 2.0))
    found = forced_photometry(image, [-0.5, 0.9, 30.5, 60.0], [10.0, 10.0, 20.5, -40.0], [0.4], variance=[1.0], min_coverage=0.4)
    assert found.coverage[:, 0, 0] == pytest.approx([0.5, found.coverage[1, 0, 0], 0.25, 0.0])
    assert 0.75 < found.coverage[1, 0, 0] < 1
    assert found.flux[:2, 0, 0] == pytest.approx(2 * np.pi * 4)
    assert np.isnan(found.flux[2:]).all()
    assert np.isnan(found.error[2:]).all()


def test_the_images_own_variance_is_used():
    image = make_image(np.ones((1, 11, 11)))
    with pytest.raises(ImageError, match="no variance"):
        forced_photometry(image, [5.0], [5.0], [0.4])
    own = SkyImage(image.data, image.bands, None, SCALE, image.mask, variance=np.full((1, 11, 11), 9.0, np.float32))
    assert forced_photometry(own, [5.0], [5.0], [0.4]).error == pytest.approx(
        forced_photometry(image, [5.0], [5.0], [0.4], variance=[9.0]).error
    )


def test_no_objects_and_one_band():
    found = forced_photometry(make_image(np.ones((1, 9, 11))), [], [], [0.4, 0.8], variance=[1.0])
    assert len(found) == 0
    assert found.flux.shape == (0, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": [np.nan]}, "1 of 1 positions are not finite"),
        ({"radii": [0.0]}, "positive radii"),
        ({"variance": [1.0, 2.0]}, r"shape (2,); expected (1,)"),
    ],
)
def test_faults_are_told(arguments, message):
    call = {"x": [4.0], "y": [4.0], "radii": [0.4], "variance": [1.0]} | arguments
    with pytest.raises((CatalogError, ImageError)) as error:
        forced_photometry(make_image(np.ones((1, 9, 9))), **call)
    assert message in str(error.value)


def test_dereddening_brightens_each_band_and_keeps_the_signal_to_noise():
    data = np.stack([gaussian_source(41, 20, 20, 100.0)] * 2)
    dimming = 10 ** (-0.4 * 0.1 * np.array([4.0, 2.0]))
    seen = forced_photometry(make_image(data * dimming[:, None, None]), [20.0], [20.0], [0.8], variance=[1.0, 1.0])
    clear = seen.dereddened([0.1], [4.0, 2.0])
    assert clear.flux[0, 0, 0] == pytest.approx(clear.flux[0, 1, 0], rel=1e-5)
    np.testing.assert_allclose(clear.flux / clear.error, seen.flux / seen.error)
    np.testing.assert_allclose(seen.dereddened(0.0, [4.0, 2.0]).flux, seen.flux)


def test_magnitudes_of_non_detections_are_the_one_sigma_limit():
    magnitude, error, detected = magnitudes([3631e9, 100.0, 0.5, -7.0, np.nan], [1.0, 10.0, 1.0, 1.0, 1.0])
    assert magnitude[:4] == pytest.approx([0.0, 26.4, 31.4, 31.4], abs=1e-3)
    assert error[1:4] == pytest.approx([0.1086, 0.7526, 0.7526], abs=1e-4)
    assert detected.tolist() == [True, True, False, False, False]
    assert np.isnan(magnitude[4])
    assert np.isnan(error[4])
    with pytest.raises(CatalogError, match="zero or negative"):
        magnitudes([1.0], [0.0])
