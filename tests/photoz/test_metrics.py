from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr
from scipy.stats import gaussian_kde, kstest, norm

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.photoz import metrics
from deepdisc_ops.photoz.metrics.densities import _drawn_distances
from deepdisc_ops.photoz.metrics.points import _of_sorted

# Worked by hand: (z_phot - z_true) / (1 + z_true) is -0.02, 0, 0.01, 0.04 and 0.5.
Z_TRUE = np.array([0.0, 1.0, 1.0, 0.5, 1.0])
Z_PHOT = np.array([-0.02, 1.0, 1.02, 0.56, 2.0])
QUARTILES = (0.0, 0.04)


def test_residuals_of_the_toy_catalogue() -> None:
    expected = [-0.02, 0, 0.01, 0.04, 0.5]
    np.testing.assert_allclose(metrics.residual(Z_PHOT, Z_TRUE, "lsst"), expected, atol=1e-15)
    np.testing.assert_allclose(metrics.residual(Z_PHOT, Z_TRUE, "jades"), np.negative(expected), atol=1e-15)


@pytest.mark.parametrize(
    ("convention", "bias", "limit", "outliers"), [("lsst", 0.01, 3 * 0.04 / 1.349, 0.2), ("jades", -0.01, 0.15, 0.2)]
)
def test_point_metrics_of_the_toy_catalogue(
    convention: metrics.Convention, bias: float, limit: float, outliers: float, rng: np.random.Generator
) -> None:
    found = metrics.point_metrics(Z_PHOT, Z_TRUE, convention, rng)
    assert found.n == 5
    assert found.bias == pytest.approx(bias)
    assert found.sigma_iqr == pytest.approx((QUARTILES[1] - QUARTILES[0]) / 1.349)
    assert found.outlier_limit == pytest.approx(limit)
    assert found.outlier_fraction == pytest.approx(outliers)


def test_the_conventions_differ_between_their_limits() -> None:
    # nine exact redshifts and one off by 0.1: an outlier beyond 0.06, none beyond 0.15
    e = np.r_[np.zeros(9), 0.1]
    assert metrics.outlier_fraction(e, "lsst") == pytest.approx(0.1)
    assert metrics.outlier_fraction(e, "jades") == 0


def test_a_wide_distribution_raises_the_lsst_limit() -> None:
    e = np.linspace(-1, 1, 101)
    assert metrics.outlier_limit(e, "lsst") == pytest.approx(3 / 1.349)
    assert metrics.outlier_fraction(e, "lsst") == 0
    assert metrics.outlier_fraction(e, "jades") == pytest.approx((np.abs(e) > 0.15).mean())


def test_sigma_iqr_is_the_width_of_a_normal_distribution() -> None:
    e = norm.ppf((np.arange(100_000) + 0.5) / 100_000, scale=0.03)
    assert metrics.sigma_iqr(e) == pytest.approx(0.03, rel=1e-3)


def test_outliers_do_not_move_bias_and_scatter_much() -> None:
    e = np.r_[np.linspace(-0.05, 0.05, 99), 100.0]
    assert abs(metrics.bias(e)) < 0.001
    assert metrics.sigma_iqr(e) < 0.04


@given(st.lists(st.floats(-0.5, 3), min_size=1, max_size=30), st.integers(0, 2**32 - 1))
def test_statistics_do_not_depend_on_order_and_only_the_bias_on_the_sign(values: list[float], seed: int) -> None:
    e = np.array(values)
    shuffled = -np.random.default_rng(seed).permutation(e)
    assert metrics.bias(shuffled) == pytest.approx(-metrics.bias(e))
    assert metrics.sigma_iqr(shuffled) == pytest.approx(metrics.sigma_iqr(e), abs=1e-12)
    assert metrics.outlier_fraction(shuffled, "jades") == metrics.outlier_fraction(e, "jades")


def test_statistics_of_a_batch_are_those_of_its_rows(rng: np.random.Generator) -> None:
    batch = rng.normal(0, 0.1, (7, 40))
    for statistic in (metrics.bias, metrics.sigma_iqr, lambda e: metrics.outlier_fraction(e, "lsst")):
        np.testing.assert_allclose(statistic(batch), [statistic(row) for row in batch])


def test_the_bootstrap_error_of_a_mean_is_the_known_one(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    values = rng.normal(0, 2, 400)
    monkeypatch.setattr("deepdisc_ops.photoz.metrics.resampling.BOOTSTRAP_VALUES", 50 * 400)  # in batches
    error = metrics.bootstrap_error(lambda sample: sample.mean(-1), values, rng, samples=2000)
    assert error == pytest.approx(values.std() / 20, rel=0.06)


def test_the_same_seed_gives_the_same_errors() -> None:
    first, second = (metrics.point_metrics(Z_PHOT, Z_TRUE, "lsst", np.random.default_rng(3)) for _ in range(2))
    assert first == second


def test_one_object_has_no_scatter(rng: np.random.Generator) -> None:
    found = metrics.point_metrics([0.5], [0.4], "jades", rng)
    assert (found.sigma_iqr, found.sigma_iqr_error, found.outlier_fraction, found.outlier_fraction_error) == (0, 0, 0, 0)
    assert found.bias_error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 50, 1000])
def test_the_ks_distance_agrees_with_scipy(n: int, rng: np.random.Generator) -> None:
    values = rng.beta(2, 1.5, n)
    assert metrics.pit_ks(values) == pytest.approx(kstest(values, "uniform").statistic, abs=1e-14)


def test_calibrated_densities_have_a_uniform_pit(rng: np.random.Generator) -> None:
    grid = np.linspace(-1, 4, 2001)
    centre = rng.uniform(0.5, 2, 2000)
    z_true = rng.normal(centre, 0.1)
    values = metrics.pit(z_true, grid, norm.cdf(grid[None], centre[:, None], 0.1))
    np.testing.assert_allclose(values, norm.cdf(z_true, centre, 0.1), atol=1e-4)
    assert kstest(values, "uniform").pvalue > 0.01


def test_the_pit_outside_the_grid_is_the_end_of_the_cdf() -> None:
    cdf = np.array([[0.1, 0.5, 0.9]] * 4)
    np.testing.assert_allclose(metrics.pit([-0.5, 0.25, 1.0, 7.0], [0.0, 0.5, 1.0], cdf), [0.1, 0.3, 0.9, 0.9])


def test_completeness_and_purity_count_each_object_once() -> None:
    sample = np.array([True, True, True, True, False])
    found = metrics.completeness(sample, np.array([0, 2, 4]))
    assert (found.value, found.n) == (0.5, 4)
    assert found.error == pytest.approx(0.25)
    assert metrics.purity(10, np.array([1, 2, 2])).value == pytest.approx(0.2)
    assert metrics.purity(3, np.zeros(0, np.int64)).value == 0


def test_the_most_common_redshift_is_the_peak_of_the_kernel_density(rng: np.random.Generator) -> None:
    z = np.r_[rng.normal(0.7, 0.1, 3000), rng.normal(1.8, 0.3, 2000)]
    grid = np.linspace(0, 3, 3001)
    expected = grid[gaussian_kde(z).evaluate(grid).argmax()]
    assert metrics.most_common_redshift(z) == pytest.approx(expected, abs=0.02)
    assert metrics.most_common_redshift([0.4, 0.4]) == 0.4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.residual([], [], "lsst"), "at least one"),
        (lambda: metrics.residual([0.1], [0.1, 0.2], "lsst"), "1 photometric for 2 true"),
        (lambda: metrics.residual([0.1, np.nan], [0.1, 0.2], "lsst"), "1 of 2 photometric redshifts are not finite"),
        (lambda: metrics.residual([0.1], [-1.0], "jades"), "at or below -1"),
        (lambda: metrics.bootstrap_error(metrics.bias, np.zeros(0), np.random.default_rng(0)), "no objects to resample"),
        (lambda: metrics.pit_ks([]), "no PIT values"),
        (lambda: metrics.pit_ks([0.5, np.nan]), "1 of 2 PIT values"),
        (lambda: metrics.pit([0.5], [0.0, 1.0], np.zeros((2, 2))), r"shape \(2, 2\); expected \(1, 2\)"),
        (lambda: metrics.completeness(np.zeros(3, bool), np.array([0])), "no true objects in the sample"),
        (lambda: metrics.purity(0, np.zeros(0, np.int64)), "no objects in the catalogue"),
    ],
)
def test_bad_input_is_named(call: object, message: str) -> None:
    with pytest.raises(CatalogError, match=message):
        call()  # type: ignore[operator]


def test_point_metrics_are_those_of_rail(rng: np.random.Generator) -> None:
    pointestimates = pytest.importorskip("rail.evaluation.metrics.pointestimates")
    z_true = rng.gamma(4, 0.25, 500)
    z_phot = z_true + 0.1 * rng.standard_t(3, 500).clip(-5, 5)
    found = metrics.point_metrics(z_phot, z_true, "lsst", rng)
    assert found.bias == pytest.approx(pointestimates.PointBias(z_phot, z_true).evaluate(), abs=1e-12)
    assert found.sigma_iqr == pytest.approx(pointestimates.PointSigmaIQR(z_phot, z_true).evaluate(), abs=1e-12)
    assert found.outlier_fraction == pytest.approx(pointestimates.PointOutlierRate(z_phot, z_true).evaluate(), abs=1e-12)


def test_fast_and_plain_bootstrap_agree(rng: np.random.Generator) -> None:
    z_true = rng.gamma(4, 0.25, 400)
    z_phot = z_true + 0.1 * rng.standard_t(3, 400).clip(-5, 5)
    found = metrics.point_metrics(z_phot, z_true, "lsst", rng, samples=1500)
    e = metrics.residual(z_phot, z_true, "lsst")
    for value, statistic in ((found.bias_error, metrics.bias), (found.sigma_iqr_error, metrics.sigma_iqr)):
        assert value == pytest.approx(float(metrics.bootstrap_error(statistic, e, rng, samples=1500)), rel=0.1)
    for counts in metrics.resample_counts(400, rng, 3):
        assert len(counts) == counts.sum() == 400


def test_statistics_of_counts_are_those_of_the_drawn_sample(rng: np.random.Generator) -> None:
    values, counts = np.sort(rng.normal(0, 0.05, 301)), next(metrics.resample_counts(301, rng, 1))
    drawn = np.repeat(values, counts)
    found = _of_sorted(values, np.cumsum(counts), "lsst")
    expected = [statistic(drawn) for statistic in (metrics.bias, metrics.sigma_iqr)] + [metrics.outlier_fraction(drawn, "lsst")]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    u = ndtr(20 * values)
    distances = _drawn_distances(u, np.log(u), np.log1p(-u), counts)
    again = np.repeat(u, counts)
    np.testing.assert_allclose(distances, [metrics.pit_ks(again), metrics.pit_cvm(again), metrics.pit_ad(again)], rtol=1e-9)


def test_all_outliers_are_counted(rng: np.random.Generator) -> None:
    found = metrics.point_metrics(np.full(30, 5.0), np.linspace(0.1, 0.2, 30), "lsst", rng)
    assert found.outlier_fraction == 1
    recovery = metrics.secondary_peak_recovery(
        np.full(30, 5.0), np.full(30, 0.15), np.full(30, 0.25), np.linspace(0.1, 0.2, 30), "lsst"
    )
    assert recovery is not None
    assert recovery.all.value == 1
    assert [None if one is None else one.n for one in recovery.by_weight] == [None, None, 30, None, None]


def test_second_peaks_save_those_outliers_that_have_a_right_one() -> None:
    z_true = np.full(6, 1.0)
    z_phot = np.array([1.0, 1.0, 1.0, 3.0, 3.0, 3.0])
    second = np.array([np.nan, 1.0, np.nan, 1.1, 2.5, np.nan])
    recovery = metrics.secondary_peak_recovery(z_phot, second, np.array([0, 0.3, 0, 0.45, 0.05, 0]), z_true, "jades")
    assert recovery is not None
    assert (recovery.all.value, recovery.all.n) == (pytest.approx(1 / 3), 3)
    assert recovery.by_weight[0] == metrics.Share(0, 0, 1)
    assert metrics.secondary_peak_recovery(z_true, second, np.zeros(6), z_true, "jades") is None


def test_bins_hold_each_object_once(rng: np.random.Generator) -> None:
    z_true, column = rng.gamma(4, 0.25, 500), np.r_[rng.normal(size=490), np.full(10, np.nan)]
    z_phot = z_true + 0.05 * rng.standard_normal(500)
    edges = metrics.equal_counts(column, 5)
    bins = metrics.binned_metrics(z_phot, z_true, column, edges, "lsst", rng, samples=10)
    assert [one.metrics.n for one in bins] == [98] * 5
    assert all(one.low <= one.middle <= one.high for one in bins)
    inside = (column >= bins[0].low) & (column < bins[0].high)
    assert bins[0].metrics.bias == pytest.approx(np.median(metrics.residual(z_phot, z_true, "lsst")[inside]))
    assert metrics.binned_metrics(z_phot, z_true, column, edges, "lsst", rng, samples=2, least=99) == []
    assert metrics.equal_counts(np.ones(4), 3).size == 2


def test_an_ensemble_is_told_by_its_members(rng: np.random.Generator) -> None:
    z_true = rng.gamma(4, 0.25, 300)
    members = [metrics.point_metrics(z_true + offset, z_true, "lsst", rng, samples=2) for offset in (0.0, 0.02, 0.04)]
    found = metrics.ensemble_metrics(members)
    assert found["bias"].value == pytest.approx(np.mean([one.bias for one in members]))
    assert found["bias"].error == pytest.approx(np.std([one.bias for one in members], ddof=1))
    assert metrics.ensemble_metrics(members[:1])["bias"].error == 0
    with pytest.raises(CatalogError, match="same objects"):
        metrics.ensemble_metrics([members[0], metrics.point_metrics(z_true[1:], z_true[1:], "lsst", rng, samples=2)])


def test_classes_and_blends() -> None:
    galaxy, star = metrics.class_shares([0, 0, 0, 1, 1], [0, 0, 1, 1, 0])
    assert galaxy.completeness is not None
    assert galaxy.purity is not None
    assert (galaxy.completeness.value, galaxy.purity.value) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert star.completeness == metrics.share(1, 2, "")
    assert metrics.class_shares([0], [0])[1] == metrics.ClassShares("star", None, None)
    x = np.array([0.0, 1.0, 10.0, 11.0, 12.0, 50.0])
    blends = metrics.blends_recognised(x, np.zeros(6), 1.5, [True, True, True, True, False, True])
    assert blends == metrics.share(1, 2, "")
    assert metrics.blends_recognised(x, np.zeros(6), 0.5, np.ones(6, bool)) is None
    assert metrics.blends_recognised([], [], 1.0, []) is None


def test_normalised_residuals_have_unit_width_if_errors_are_right(rng: np.random.Generator) -> None:
    sigma = rng.uniform(0.01, 0.1, 5000)
    z = rng.uniform(1, 2, 5000)
    assert metrics.normalised_residual(z + sigma * rng.standard_normal(5000), z, sigma).std() == pytest.approx(1, abs=0.03)
    with pytest.raises(CatalogError, match="1 of 2 redshift errors"):
        metrics.normalised_residual([0.1, 0.2], [0.1, 0.2], [0.0, 0.1])
