from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import cumulative_trapezoid, quad
from scipy.stats import kstest, truncnorm

from deepdisc_ops.photoz.mixture import GaussianMixture, concatenate, summarise

LEVELS = (0.01, 0.16, 0.5, 0.84, 0.99)


def random_mixture(n: int, components: int, seed: int, lowest_mean: float = -0.3) -> GaussianMixture:
    rng = np.random.default_rng(seed)
    shape = (n, components)
    sigmas = np.exp(rng.uniform(np.log(0.01), np.log(0.6), shape))
    return GaussianMixture.from_arrays(rng.dirichlet(np.ones(components), n), rng.uniform(lowest_mean, 3, shape), sigmas)


def torch_mixture(mixture: GaussianMixture) -> torch.distributions.MixtureSameFamily:
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=mixture.logits), torch.distributions.Normal(mixture.means, mixture.sigmas)
    )


def mixtures(max_components: int = 6) -> st.SearchStrategy[GaussianMixture]:
    component = st.tuples(st.floats(0.01, 1), st.floats(-1, 4), st.floats(0.004, 2))
    return st.lists(component, min_size=1, max_size=max_components).map(
        lambda parts: GaussianMixture.from_arrays(*(np.array(column)[None] for column in zip(*parts, strict=True)))
    )


def test_the_density_integrates_to_one() -> None:
    mixture = random_mixture(4, 5, seed=1)
    breaks = sorted(mixture.means.flatten().tolist())
    for i in range(len(mixture)):
        one = mixture.select(slice(i, i + 1))
        whole, _ = quad(
            lambda z, m=one: m.log_prob(torch.tensor([z], dtype=torch.float64)).exp().item(), -8, 12, points=breaks, limit=400
        )
        cut, _ = quad(
            lambda z, m=one: m.truncated_density(np.array([z]))[0, 0], 0, 12, points=[b for b in breaks if b > 0], limit=400
        )
        assert whole == pytest.approx(1, abs=1e-7)
        assert cut == pytest.approx(1, abs=1e-7)


def test_torch_distributions_agree() -> None:
    mixture = random_mixture(50, 5, seed=2)
    grid = torch.linspace(-1, 5, 301, dtype=torch.float64)
    second_opinion = torch_mixture(mixture)
    torch.testing.assert_close(mixture.log_prob(grid[None]), second_opinion.log_prob(grid[:, None]).T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixture.cdf(grid[None]), second_opinion.cdf(grid[:, None]).T, rtol=0, atol=1e-12)
    below = second_opinion.cdf(torch.zeros(50, dtype=torch.float64))
    cut = (mixture.cdf(grid[None]) - below[:, None]).clamp_min(0) / (1 - below[:, None])
    torch.testing.assert_close(mixture.truncated_cdf(grid[None]), cut, rtol=0, atol=1e-12)


def test_log_prob_of_one_redshift_each_equals_the_diagonal_of_the_grid() -> None:
    mixture = random_mixture(7, 3, seed=3)
    z = torch.linspace(0, 2, 7, dtype=torch.float64)
    torch.testing.assert_close(mixture.log_prob(z), mixture.log_prob(z[None]).diagonal())
    torch.testing.assert_close(mixture.truncated_cdf(z), mixture.truncated_cdf(z[None]).diagonal())


@settings(max_examples=30)
@given(mixtures())
def test_the_truncated_cdf_is_monotone_and_the_integral_of_the_density(mixture: GaussianMixture) -> None:
    grid = np.concatenate([[0], np.geomspace(1e-6, 1e-3, 400)[:-1], np.linspace(1e-3, 16, 8000)])
    cdf = mixture.truncated_cdf(torch.as_tensor(grid)[None])[0].numpy()
    density = mixture.truncated_density(grid)[0]
    assert np.all(np.diff(cdf) >= -1e-13)
    assert cdf[0] == 0
    assert cdf[-1] == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(cdf, cumulative_trapezoid(density, grid, initial=0), atol=0.01)


@settings(max_examples=40)
@given(mixtures())
def test_quantiles_invert_the_cdf(mixture: GaussianMixture) -> None:
    quantiles = mixture.quantiles(LEVELS)
    assert torch.all(quantiles >= 0)
    assert torch.all(quantiles.diff(dim=1) >= 0)
    torch.testing.assert_close(mixture.truncated_cdf(quantiles)[0].tolist(), list(LEVELS), rtol=0, atol=1e-8)


@settings(max_examples=40)
@given(mixtures())
def test_no_redshift_is_denser_than_the_mode(mixture: GaussianMixture) -> None:
    mode = mixture.mode()
    fine = torch.cat([torch.linspace(0, 6, 6001, dtype=torch.float64), mixture.means[0].clamp_min(0)])
    assert mode.item() >= 0
    assert mixture.log_prob(mode).item() >= mixture.log_prob(fine[None]).max().item() - 1e-9


def test_the_mode_is_exact() -> None:
    mixture = random_mixture(200, 5, seed=4, lowest_mean=0.5)
    mode = mixture.mode()
    inside = mode > 0
    z = mode.clone().requires_grad_()
    (slope,) = torch.autograd.grad(mixture.log_prob(z).sum(), z)
    (curvature,) = torch.autograd.grad(mixture._score_and_slope(z)[0].sum(), z)
    assert inside.float().mean() > 0.9
    assert (slope / curvature)[inside].abs().max() < 1e-8  # the distance that Newton's method would still go


def test_mean_and_std_agree_with_scipy() -> None:
    for mean, sigma in ((1.0, 0.2), (0.1, 0.3), (-0.5, 0.2), (-3.0, 0.3)):
        expected = truncnorm(-mean / sigma, np.inf, loc=mean, scale=sigma)
        found = GaussianMixture.from_arrays([[1.0]], [[mean]], [[sigma]]).mean_and_std()
        assert found[0].item() == pytest.approx(expected.mean(), rel=1e-7)
        assert found[1].item() == pytest.approx(expected.std(), rel=1e-5)


def test_mean_and_std_of_mixtures_are_the_integrals() -> None:
    mixture = random_mixture(5, 4, seed=5)
    grid = np.linspace(0, 9, 90001)
    density = mixture.truncated_density(grid)
    mean = np.trapezoid(density * grid, grid)
    std = np.sqrt(np.trapezoid(density * (grid - mean[:, None]) ** 2, grid))
    np.testing.assert_allclose(mixture.mean_and_std()[0].numpy(), mean, atol=1e-6)
    np.testing.assert_allclose(mixture.mean_and_std()[1].numpy(), std, atol=1e-6)


def test_the_second_peak_and_its_weight() -> None:
    peaks = GaussianMixture.from_arrays([[0.7, 0.3, 0.0]], [[2.0, 0.5, 9.0]], [[0.1, 0.1, 0.1]]).peaks()
    assert peaks.mode.item() == pytest.approx(2.0, abs=1e-9)
    assert peaks.second.item() == pytest.approx(0.5, abs=1e-9)
    assert peaks.second_weight.item() == pytest.approx(0.3, abs=1e-6)


def test_a_density_that_falls_from_zero_peaks_there() -> None:
    peaks = GaussianMixture.from_arrays([[0.6, 0.4]], [[-0.1, 1.5]], [[0.1, 0.3]]).peaks()
    assert peaks.mode.item() == pytest.approx(1.5, abs=1e-6) or peaks.mode.item() == 0
    assert {round(peaks.mode.item(), 6), round(peaks.second.item(), 6)} == {0.0, 1.5}


def test_one_component_has_one_peak() -> None:
    peaks = GaussianMixture.from_arrays([[1.0]], [[0.7]], [[0.2]]).peaks()
    assert math.isnan(peaks.second.item())
    assert peaks.second_weight.item() == 0


@pytest.mark.parametrize(("n", "components"), [(120, 3), (25, 20), (5, 50)])
def test_peaks_are_those_of_a_fine_grid(n: int, components: int) -> None:
    mixture = random_mixture(n, components, seed=6)
    grid = np.linspace(0, 6, 20001)
    peaks = mixture.peaks()
    second_found = 0
    for i, density in enumerate(mixture.truncated_density(grid)):
        padded = np.pad(density, 1)
        maxima = np.flatnonzero((padded[1:-1] > padded[:-2]) & (padded[1:-1] >= padded[2:]) & (density > 1e-9))
        minima = np.r_[0, [a + density[a:b].argmin() for a, b in pairwise(maxima)], len(grid) - 1].astype(int)
        ranked = np.argsort(-density[maxima])
        assert peaks.mode[i].item() == pytest.approx(grid[maxima[ranked[0]]], abs=5e-4)
        if len(ranked) == 1:
            second_found += math.isnan(peaks.second[i].item())
            continue
        around = slice(minima[ranked[1]], minima[ranked[1] + 1] + 1)
        weight = np.trapezoid(density[around], grid[around])
        expected = (pytest.approx(grid[maxima[ranked[1]]], abs=5e-4), pytest.approx(weight, abs=3e-3))
        second_found += (peaks.second[i].item(), peaks.second_weight[i].item()) == expected
    assert second_found >= 0.98 * n  # shallow bumps may be overlooked


def test_component_order_is_irrelevant() -> None:
    mixture = random_mixture(40, 6, seed=7)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = GaussianMixture(*(t[:, order] for t in (mixture.logits, mixture.means, mixture.log_sigmas)))
    expected = summarise(mixture)
    for name, column in summarise(shuffled).items():
        np.testing.assert_allclose(column, expected[name], atol=1e-7, err_msg=name)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 5.0, 0.0)])
def test_an_ensemble_of_equals_is_the_member(weights: tuple[float, ...]) -> None:
    member = random_mixture(30, 4, seed=8)
    expected = summarise(member)
    for name, column in summarise(concatenate([member] * 3, weights)).items():
        np.testing.assert_allclose(column, expected[name], atol=1e-7, err_msg=name)


def test_a_member_that_did_not_find_the_object_takes_no_part() -> None:
    found, other = random_mixture(10, 3, seed=9), random_mixture(10, 3, seed=10)
    missing = GaussianMixture(torch.full_like(other.logits, -math.inf), other.means, other.log_sigmas)
    together = concatenate([found, missing], (1.0, 2.0))
    assert torch.all(together.weights[:, 3:] == 0)
    expected = summarise(found)
    for name, column in summarise(together).items():
        np.testing.assert_allclose(column, expected[name], atol=1e-7, err_msg=name)


def test_components_of_no_weight_may_hold_anything() -> None:
    expected = summarise(GaussianMixture.from_arrays([[0.4, 0.6]], [[0.5, 2.0]], [[0.1, 0.2]]))
    padded = summarise(GaussianMixture.from_arrays([[0.4, 0.6, 0.0]], [[0.5, 2.0, np.nan]], [[0.1, 0.2, 0.0]]))
    for name, column in padded.items():
        np.testing.assert_allclose(column, expected[name], atol=1e-9, err_msg=name)


def test_mixtures_below_zero_are_summarised_near_zero() -> None:
    summary = summarise(GaussianMixture.from_arrays(np.ones((4, 1)), [[-0.1], [-1], [-5], [-50]], [[0.01], [0.5], [0.1], [0.003]]))
    for name, column in summary.items():
        if name != "z_second_peak":
            assert np.isfinite(column).all(), name
    assert np.all(summary["z_mode"] == 0)
    assert np.all((summary["z_median"] > 0) & (summary["z_median"] < 0.5))
    assert np.all(summary["z_lo68"] < summary["z_hi68"])
    assert summary["mass_below_zero"][2:] == pytest.approx(1)


def test_the_median_is_exact_far_below_zero() -> None:
    # z falls off as exp(-|mu| z / sigma^2) there
    mixture = GaussianMixture.from_arrays([[1.0]], [[-20.0]], [[0.1]])
    assert mixture.quantiles((0.5,)).item() == pytest.approx(math.log(2) * 0.1**2 / 20, rel=1e-4)


def test_the_least_risk_is_that_of_a_fine_grid() -> None:
    mixture = random_mixture(20, 4, seed=12)
    grid = np.linspace(0, 20, 8_001)
    density = mixture.truncated_density(grid)
    for row, best in enumerate(mixture.least_risk().tolist()):
        candidates = grid[np.abs(grid - best) < 1]
        gain = 1 / (1 + ((candidates[:, None] - grid) / (0.15 * (1 + grid))) ** 2) @ density[row]
        everywhere = 1 / (1 + ((grid[::40, None] - grid) / (0.15 * (1 + grid))) ** 2) @ density[row]
        assert best == pytest.approx(candidates[gain.argmax()], abs=0.004 * (1 + best))
        assert gain.max() >= everywhere.max() * (1 - 1e-6)


def test_the_least_risk_stays_with_the_heavier_of_two_peaks() -> None:
    mixture = GaussianMixture.from_arrays([[0.3, 0.7]], [[0.4, 2.0]], [[0.01, 0.1]])
    assert mixture.mode().item() == pytest.approx(0.4, abs=1e-3)
    assert mixture.least_risk().item() == pytest.approx(2.0, abs=0.02)


@pytest.mark.parametrize("n", [0, 1])
def test_zero_and_one_object(n: int) -> None:
    summary = summarise(random_mixture(n, 5, seed=11))
    assert all(column.shape == (n,) and column.dtype == np.float64 for column in summary.values())
    assert random_mixture(n, 5, seed=11).sample(np.random.default_rng(0), 3).shape == (n, 3)


def test_chunks_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = random_mixture(50, 5, seed=12)
    whole = summarise(mixture)
    monkeypatch.setattr("deepdisc_ops.photoz.mixture.CHUNK_BYTES", 8 * 66 * 5 * 7)
    for name, column in summarise(mixture).items():
        np.testing.assert_allclose(column, whole[name], atol=1e-8, err_msg=name)


def test_single_precision_with_gradients_can_be_summarised() -> None:
    mixture = random_mixture(5, 3, seed=13)
    single = GaussianMixture(*(t.float().requires_grad_() for t in (mixture.logits, mixture.means, mixture.log_sigmas)))
    np.testing.assert_allclose(summarise(single)["z_median"], summarise(mixture)["z_median"], atol=1e-4)


def test_samples_follow_the_truncated_cdf() -> None:
    mixture = random_mixture(3, 4, seed=14)
    draws = mixture.sample(np.random.default_rng(15), 4000)
    assert draws.min() >= 0
    pit = mixture.truncated_cdf(torch.as_tensor(draws))
    for row in pit:
        assert kstest(row.numpy(), "uniform").pvalue > 1e-3


def test_a_mixture_is_recovered_from_what_was_drawn_of_it() -> None:
    """Fitted by the likelihood that training minimises, from another start."""
    weights, means, sigmas = [0.5, 0.3, 0.2], [0.4, 1.0, 2.0], [0.05, 0.1, 0.2]
    truth = GaussianMixture.from_arrays(*(np.array([part]) for part in (weights, means, sigmas)))
    z = torch.from_numpy(truth.sample(np.random.default_rng(3), 4000)[0])
    parts = [torch.tensor([start], dtype=torch.float64, requires_grad=True) for start in ([0.0] * 3, [0.2, 1.2, 1.8], [-1.5] * 3)]
    optimiser = torch.optim.Adam(parts, 0.04)
    for _ in range(300):
        optimiser.zero_grad()
        loss = -GaussianMixture(*(part.expand(len(z), 3) for part in parts)).log_prob(z).mean()
        loss.backward()
        optimiser.step()
    logits, found_means, log_sigmas = (part.detach()[0] for part in parts)
    np.testing.assert_allclose(torch.softmax(logits, 0), weights, atol=4 * np.sqrt(0.25 / 4000))
    np.testing.assert_allclose(found_means, means, atol=4 * 0.2 / np.sqrt(0.2 * 4000))
    np.testing.assert_allclose(log_sigmas.exp(), sigmas, rtol=4 / np.sqrt(2 * 0.2 * 4000))
    made_of = GaussianMixture(*(part.expand(len(z), 3) for part in (truth.logits, truth.means, truth.log_sigmas)))
    assert loss.item() <= -made_of.log_prob(z).mean().item()


def test_the_same_seed_draws_the_same_samples() -> None:
    mixture = random_mixture(3, 4, seed=14)
    np.testing.assert_array_equal(*(mixture.sample(np.random.default_rng(1), 5) for _ in range(2)))


def test_gradients_reach_all_parameters() -> None:
    mixture = random_mixture(6, 5, seed=16)
    parameters = [t.requires_grad_() for t in (mixture.logits, mixture.means, mixture.log_sigmas)]
    z = torch.linspace(0.1, 2, 6, dtype=torch.float64)
    for loss in (-mixture.log_prob(z).mean(), mixture.truncated_cdf(z).sum()):
        for gradient in torch.autograd.grad(loss, parameters):
            assert torch.isfinite(gradient).all()
            assert (gradient != 0).any(dim=0).all()


@pytest.mark.parametrize("components", [1, 5])
def test_gradients_are_those_of_finite_differences(components: int) -> None:
    mixture = random_mixture(6, components, seed=17)
    parameters = tuple(t.requires_grad_() for t in (mixture.logits, mixture.means, mixture.log_sigmas))
    z = torch.linspace(0.1, 2, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *each: GaussianMixture(*each).log_prob(z), parameters)
    assert torch.autograd.gradcheck(lambda *each: GaussianMixture(*each).truncated_cdf(z), parameters)


@pytest.mark.parametrize("components", [1, 5])
def test_the_likelihood_is_finite_far_outside_in_single_precision(components: int) -> None:
    shape = (4, components)
    parameters = [torch.zeros(shape), torch.full(shape, 0.5), torch.full(shape, math.log(0.003))]
    z = torch.tensor([1100.0, 12.0, 0.0, -9.0])
    narrow = GaussianMixture(*(each.requires_grad_() for each in parameters))
    likelihood = narrow.log_prob(z)
    assert torch.isfinite(likelihood).all()
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(likelihood.sum(), parameters))


def test_qp_agrees() -> None:
    qp = pytest.importorskip("qp")
    mixture = random_mixture(40, 5, seed=18)
    weights, means, sigmas = (t.numpy() for t in (mixture.weights, mixture.means, mixture.sigmas))
    theirs = qp.Ensemble(qp.mixmod, data={"weights": weights, "means": means, "stds": sigmas})
    grid = np.linspace(-1, 5, 601)
    ours = torch.from_numpy(grid)[None]
    np.testing.assert_allclose(mixture.log_prob(ours).exp(), theirs.pdf(grid), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(mixture.cdf(ours), theirs.cdf(grid), rtol=0, atol=1e-12)
    truth = np.linspace(0.05, 3, 40)
    np.testing.assert_allclose(mixture.cdf(torch.from_numpy(truth)), theirs.cdf(truth[:, None])[:, 0], rtol=0, atol=1e-12)


def test_levels_outside_the_unit_interval_are_rejected() -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        random_mixture(1, 1, seed=0).quantiles((0.5, 1.0))
