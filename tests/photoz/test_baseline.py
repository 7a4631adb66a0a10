from __future__ import annotations

import numpy as np
import pytest

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.photoz.baseline import Baseline, Densities, aperture_features, magnitude_features
from deepdisc_ops.photoz.metrics import pit, pit_ks, point_metrics

GRID = np.linspace(0, 3.5, 351)


def synthetic_sample(n: int, seed: int, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes (n, 6) whose colours move with redshift, and redshifts; a few magnitudes are missing."""
    rng = np.random.default_rng(seed)
    z = rng.gamma(4, 0.2, n).clip(0.02, 3)
    wavelength = np.array([0.37, 0.48, 0.62, 0.75, 0.87, 0.97])
    step = 1.2 / (1 + np.exp((wavelength - 0.4 * (1 + z[:, None])) / 0.04))
    magnitude = 24 + step + rng.normal(0, 0.4, (n, 1)) + noise * rng.standard_normal((n, 6))
    magnitude[rng.uniform(size=magnitude.shape) < 0.01] = np.nan
    return magnitude_features(magnitude), z


@pytest.fixture(scope="module")
def fitted() -> Baseline:
    return Baseline(iterations=150).fit(*synthetic_sample(3000, 1)).calibrate(*synthetic_sample(2000, 2))


def test_the_baseline_learns_what_colours_tell(fitted, rng):
    features, z = synthetic_sample(2000, 3)
    learned = point_metrics(fitted.predict(features), z, "lsst", rng)
    constant = point_metrics(np.full(len(z), np.median(z)), z, "lsst", rng)
    assert learned.sigma_iqr < 0.2 * constant.sigma_iqr
    assert abs(learned.bias) < 0.005


def test_the_same_seed_gives_the_same_redshifts_and_another_seed_others(fitted):
    features, _ = synthetic_sample(200, 4)
    again = Baseline(iterations=150).fit(*synthetic_sample(3000, 1))
    np.testing.assert_array_equal(again.predict(features), fitted.predict(features))
    other = Baseline(iterations=150, seed=7).fit(*synthetic_sample(3000, 1))
    assert (other.predict(features) != fitted.predict(features)).any()


def test_densities_integrate_to_one_and_are_calibrated(fitted):
    features, z = synthetic_sample(2000, 5)
    densities = fitted.densities(features, GRID)
    np.testing.assert_allclose(np.trapezoid(densities.values, GRID, axis=1), 1, atol=1e-9)
    assert densities.values.min() >= 0
    assert pit_ks(pit(z, GRID, densities.cdf())) < 0.06
    anybody = Densities(GRID, np.broadcast_to(densities.values.mean(axis=0), densities.values.shape))
    assert densities.log_density(z).mean() > anybody.log_density(z).mean() + 1
    assert densities.cde_loss(z) < anybody.cde_loss(z) - 1


def test_log_density_and_loss_of_a_known_density():
    grid = np.linspace(0, 2, 2001)
    sigma = np.array([[0.1], [0.05]])
    densities = Densities(grid, np.exp(-0.5 * ((grid - 1) / sigma) ** 2) / sigma / np.sqrt(2 * np.pi))
    expected = -0.5 * (0.05 / sigma[:, 0]) ** 2 - np.log(sigma[:, 0] * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(densities.log_density([1.05, 0.95]), expected, atol=1e-4)
    at_peak = 1 / (sigma[:, 0] * np.sqrt(2 * np.pi))
    squared = 1 / (2 * sigma[:, 0] * np.sqrt(np.pi))
    assert densities.cde_loss([1.0, 1.0]) == pytest.approx((squared - 2 * at_peak).mean(), rel=1e-6)
    np.testing.assert_allclose(densities.cdf()[:, [0, 1000, 2000]], [[0, 0.5, 1]] * 2, atol=1e-6)
    assert densities.log_density([-0.1, 2.1]).tolist() == [-np.inf, -np.inf]
    assert np.isfinite(densities.log_density([0.0, 2.0])[0])


def test_no_objects(fitted):
    nothing = np.zeros((0, 11))
    assert fitted.predict(nothing).shape == (0,)
    assert fitted.densities(nothing, GRID).values.shape == (0, len(GRID))
    assert aperture_features(np.zeros((0, 6, 3)), np.ones((0, 6, 3))).shape == (0, 18 + 15 + 12)


def test_aperture_features_are_magnitudes_where_flux_is_bright_and_finite_where_there_is_none():
    flux = np.array([[[1e4, 2e4], [1e5, 3e5]], [[-5.0, 0.0], [np.nan, 1e5]]])
    features = aperture_features(flux, np.ones_like(flux))
    magnitudes = -2.5 * np.log10(flux[0])
    np.testing.assert_allclose(features[0, :4], magnitudes.ravel(), atol=1e-6)
    np.testing.assert_allclose(features[0, 4:6], magnitudes[0] - magnitudes[1], atol=1e-6)
    np.testing.assert_allclose(features[0, 6:], magnitudes[:, 0] - magnitudes[:, 1], atol=1e-6)
    assert np.isfinite(features[1, [0, 1]]).all()
    assert np.isnan(features[1, 2])


def test_magnitude_features_are_magnitudes_and_neighbouring_colours():
    np.testing.assert_allclose(magnitude_features([[25.0, 24.0, 23.5]]), [[25.0, 24.0, 23.5, 1.0, 0.5]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Baseline().predict(np.ones((2, 3))), "call fit first"),
        (lambda: Baseline(iterations=2).fit(np.eye(40), np.ones(40)).densities(np.eye(40), GRID), "call calibrate first"),
        (lambda: Baseline().fit(np.ones((2, 3)), [0.5]), r"(2, 3) and redshifts (1,)"),
        (lambda: Baseline().fit(np.ones((0, 3)), []), "N above 0"),
        (lambda: Baseline().fit(np.ones((2, 3)), [0.5, np.nan]), "leave objects without redshift out"),
        (lambda: aperture_features(np.ones((2, 3)), np.ones((2, 3))), "(objects, bands, apertures)"),
    ],
)
def test_faults_are_told(call, message):
    with pytest.raises(CatalogError) as error:
        call()
    assert message in str(error.value)


def test_mode_and_median_of_known_densities(rng):
    grid, centre = np.linspace(0, 3, 301), rng.uniform(0.5, 2.0, 40)
    narrow = Densities.normalised(grid, np.exp(-0.5 * ((grid - centre[:, None]) / 0.1) ** 2))
    np.testing.assert_allclose(np.trapezoid(narrow.values, grid, axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(narrow.mode(), centre, atol=0.0051)
    np.testing.assert_allclose(narrow.median(), centre, atol=1e-3)
    skewed = Densities.normalised(grid, (grid * np.exp(-grid / 0.2))[None])
    assert pit(skewed.median(), grid, skewed.cdf()) == pytest.approx(0.5, abs=1e-12)


def test_a_density_that_is_nowhere_is_flat():
    flat = Densities.normalised(GRID, np.zeros((2, len(GRID))))
    np.testing.assert_allclose(flat.values, 1 / 3.5)
    np.testing.assert_allclose(flat.median(), 1.75)


def test_losses_of_objects_average_to_the_loss(fitted):
    features, z = synthetic_sample(100, 6)
    densities = fitted.densities(features, GRID)
    assert densities.cde_losses(z).shape == (100,)
    assert densities.cde_losses(z).mean() == pytest.approx(densities.cde_loss(z))
