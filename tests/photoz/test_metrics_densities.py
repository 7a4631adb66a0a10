"""Figures of whole densities, against qp, RAIL and scipy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy import stats
from scipy.integrate import quad

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.photoz import metrics

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import qp
    from qp.metrics.pit import PIT
    from rail.evaluation.metrics.cdeloss import CDELoss

Mixture = tuple[np.ndarray, np.ndarray, np.ndarray]


def mixtures(n: int, rng: np.random.Generator, components: int = 4) -> Mixture:
    shape = (n, components)
    return rng.dirichlet(np.ones(components), n), rng.uniform(0.8, 2.5, shape), rng.uniform(0.02, 0.12, shape)


def drawn(mixture: Mixture, rng: np.random.Generator) -> np.ndarray:
    w, m, s = mixture
    component = (rng.random((len(w), 1)) > w.cumsum(1)[:, :-1]).sum(1)
    row = np.arange(len(w))
    return np.asarray(rng.normal(m[row, component], s[row, component]))


def density(z: float, w: np.ndarray, m: np.ndarray, s: np.ndarray) -> float:
    """Of one mixture cut at zero."""
    return float((w * stats.norm.pdf(z, m, s)).sum() / (w * stats.norm.sf(0, m, s)).sum())


@pytest.mark.parametrize("n", [2, 7, 300])
def test_distances_from_uniform_agree_with_scipy_and_qp(n: int, rng: np.random.Generator) -> None:
    u = rng.beta(1.5, 1.2, n)
    assert metrics.pit_ks(u) == pytest.approx(stats.kstest(u, "uniform").statistic, abs=1e-12)
    assert metrics.pit_cvm(u) == pytest.approx(stats.cramervonmises(u, "uniform").statistic, rel=1e-10)
    goodness = qp.metrics.goodness_of_fit.goodness_of_fit_metrics
    for name, value in (("ks", metrics.pit_ks(u)), ("cvm", metrics.pit_cvm(u)), ("ad", metrics.pit_ad(u))):
        assert value == pytest.approx(float(goodness[name](stats.uniform, u)), rel=1e-8)


def test_the_equations_of_the_paper_are_their_integrals(rng: np.random.Generator) -> None:
    u = np.sort(rng.beta(1.5, 1.2, 9))

    def empirical(t: float) -> float:
        return float((u <= t).mean())

    cvm = quad(lambda t: (empirical(t) - t) ** 2, 0, 1, points=u, limit=200)[0]
    ad = sum(
        quad(lambda t: (empirical(t) - t) ** 2 / (empirical(t) * (1 - empirical(t))), low, high)[0]
        for low, high in zip(u[:-1] + 1e-12, u[1:] - 1e-12, strict=True)
    )
    assert metrics.pit_cvm(u, "equations") == pytest.approx(cvm, abs=1e-8)
    assert metrics.pit_cvm(u, "table") == pytest.approx(9 * cvm, abs=1e-7)
    assert metrics.pit_ad(u, "equations") == pytest.approx(9 * ad, abs=1e-8)


def test_pit_cde_and_likelihood_agree_with_qp_and_rail(rng: np.random.Generator) -> None:
    mixture = mixtures(60, rng)
    z = drawn(mixture, rng)
    ensemble = qp.Ensemble(qp.mixmod, data={"weights": mixture[0], "means": mixture[1], "stds": mixture[2]})
    found = metrics.density_metrics(*mixture, z, rng, samples=5)
    theirs = PIT(ensemble, z).pit_samps
    assert found.ks.value == pytest.approx(metrics.pit_ks(theirs), abs=1e-8)
    assert found.ad.value == pytest.approx(metrics.pit_ad(theirs), rel=1e-8)
    assert found.nll.value == pytest.approx(-np.log(np.squeeze(ensemble.pdf(z[:, None]))).mean(), abs=1e-8)
    # RAIL integrates on a grid and takes the density of the nearest point
    grid = np.linspace(0, 4, 20_001)
    on_grid = grid[np.abs(grid - z[:, None]).argmin(1)]
    assert metrics.cde_loss(*mixture, on_grid).mean() == pytest.approx(
        CDELoss(ensemble, grid, on_grid).evaluate().statistic, abs=1e-8
    )
    assert metrics.cde_loss(*mixture, z).mean() == pytest.approx(CDELoss(ensemble, grid, z).evaluate().statistic, rel=1e-3)


def test_cde_loss_of_a_cut_mixture_is_its_integral(rng: np.random.Generator) -> None:
    w, m, s = (part[:5] for part in mixtures(5, rng, 3))
    m = m - 1.6  # astride zero
    z = np.array([0.0, 0.1, 0.4, 0.7, 2.0])
    squares = [quad(lambda t, i=i: density(t, w[i], m[i], s[i]) ** 2, 0, 4, limit=400, points=[*m[i].clip(0)])[0] for i in range(5)]
    expected = np.array(squares) - 2 * np.array([density(z[i], w[i], m[i], s[i]) for i in range(5)])
    np.testing.assert_allclose(metrics.cde_loss(w, m, s, z), expected, rtol=1e-8)
    np.testing.assert_allclose(metrics.expected_density(w, m, s), squares, rtol=1e-8)


def test_perfect_densities_are_uniform_and_wrong_widths_have_the_known_shapes(rng: np.random.Generator) -> None:
    n = 4000
    mixture = mixtures(n, rng)
    z = drawn(mixture, rng)
    right = metrics.density_metrics(*mixture, z, rng, samples=20)
    assert right.ks.value < 1.95 / np.sqrt(n)  # one of a thousand uniform samples is farther
    u = (mixture[0] * stats.norm.cdf(z[:, None], mixture[1], mixture[2])).sum(1).reshape(40, -1)
    distance = np.mean([metrics.pit_ks(part) for part in u]) * np.sqrt(u.shape[1])
    assert distance == pytest.approx(np.sqrt(np.pi / 2) * np.log(2), abs=0.12)  # the mean of Kolmogorov's distribution
    assert right.pit_beyond < 0.002
    wide, narrow = (metrics.density_metrics(mixture[0], mixture[1], f * mixture[2], z, rng, samples=20) for f in (2.0, 0.5))
    for wrong in (wide, narrow):
        assert wrong.cde_loss.value > right.cde_loss.value
        assert wrong.nll.value > right.nll.value
        assert wrong.ad.value > 5 * right.ad.value
    assert narrow.pit_beyond > 0.01 > wide.pit_beyond
    u = [(mixture[0] * stats.norm.cdf(z[:, None], mixture[1], f * mixture[2])).sum(1) for f in (2.0, 1.0, 0.5)]
    assert u[0].var() < 0.95 / 12 < u[1].var() < 1.05 / 12 < u[2].var()  # a hill, flat, and a valley


def test_coverage_is_the_level_for_perfect_densities(rng: np.random.Generator) -> None:
    mixture = mixtures(3000, rng)
    z = drawn(mixture, rng)
    levels = np.array([0.1, 0.5, 0.68, 0.95])
    u = (mixture[0] * stats.norm.cdf(z[:, None], mixture[1], mixture[2])).sum(1)
    np.testing.assert_allclose(metrics.coverage(metrics.central_levels(u), levels), levels, atol=0.03)
    highest = metrics.highest_density_levels(*mixture, z)
    np.testing.assert_allclose(metrics.coverage(highest, levels), levels, atol=0.03)
    narrow = metrics.highest_density_levels(mixture[0], mixture[1], mixture[2] / 2, z)
    assert (metrics.coverage(narrow, levels) < levels - 0.02).all()


def test_the_highest_density_level_is_the_mass_that_is_denser(rng: np.random.Generator) -> None:
    mixture = mixtures(30, rng)
    z = drawn(mixture, rng)
    grid = np.linspace(0, 4, 8001)
    tables = (mixture[0][:, None] * stats.norm.pdf(grid[:, None], mixture[1][:, None], mixture[2][:, None])).sum(2)
    at_truth = (mixture[0] * stats.norm.pdf(z[:, None], mixture[1], mixture[2])).sum(1)
    expected = np.where(tables > at_truth[:, None], tables, 0).sum(1) * (grid[1] - grid[0])
    np.testing.assert_allclose(metrics.highest_density_levels(*mixture, z, points=1000), expected, atol=6e-3)  # both are counted


def test_components_that_do_not_exist_and_weights_of_any_sum_change_nothing(rng: np.random.Generator) -> None:
    w, m, s = mixtures(20, rng)
    z = drawn((w, m, s), rng)
    nothing = np.full((20, 1), np.nan)
    padded = (np.hstack([3 * w, np.zeros((20, 1))]), np.hstack([m, nothing]), np.hstack([s, nothing]))
    np.testing.assert_allclose(metrics.cde_loss(*padded, z), metrics.cde_loss(w, m, s, z), rtol=1e-12)


def test_redshifts_beyond_all_densities_are_counted_and_finite(rng: np.random.Generator) -> None:
    found = metrics.density_metrics(*mixtures(40, rng), np.full(40, 50.0), rng, samples=5)
    assert found.pit_beyond == 1
    assert found.ks.value == pytest.approx(1)
    assert np.isfinite([found.ad.value, found.cvm.value, found.nll.value, found.cde_loss.value]).all()


def test_one_object(rng: np.random.Generator) -> None:
    found = metrics.density_metrics(*mixtures(1, rng), [1.0], rng)
    assert found.n == 1
    assert found.cde_loss.error == 0
    assert found.ks.error == pytest.approx(0, abs=1e-12)


def test_the_error_of_the_distance_is_its_scatter_over_samples(rng: np.random.Generator) -> None:
    samples = rng.beta(1.3, 1, (200, 500))
    scatter = np.std([metrics.pit_ks(u) for u in samples])
    nothing = np.zeros(500)
    errors = [metrics.density_metrics_of(u, nothing, nothing, rng).ks.error for u in samples[:10]]
    assert np.mean(errors) == pytest.approx(scatter, rel=0.2)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ((np.ones((2, 1)), np.full((2, 1), np.nan), np.ones((2, 1))), "2 of 2 densities have no component"),
        ((np.zeros((2, 1)), np.ones((2, 1)), np.ones((2, 1))), "2 of 2 densities have no component"),
        ((np.ones((2, 1)), np.ones((2, 1)), np.zeros((2, 1))), "2 of 2 densities"),
        ((np.ones((3, 1)), np.ones((3, 1)), np.ones((3, 1))), r"expected three of \(2, K\)"),
    ],
)
def test_unusable_densities_are_named(mixture: Mixture, message: str) -> None:
    with pytest.raises(CatalogError, match=message):
        metrics.cde_loss(*mixture, [0.5, 0.6])
