from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import norm

from deepdisc_ops.photoz.reduction import max_cdf_error, reduce_components

Floats = NDArray[np.float64]
Mixture = tuple[Floats, Floats, Floats]


def random_mixtures(n: int, length: int, seed: int) -> Mixture:
    rng = np.random.default_rng(seed)
    shape = (n, length)
    return rng.dirichlet(np.ones(length), n), rng.uniform(-0.2, 3, shape), np.exp(rng.uniform(np.log(0.01), np.log(0.5), shape))


def mixtures() -> st.SearchStrategy[Mixture]:
    component = st.tuples(st.floats(0.001, 1), st.floats(-1, 4), st.floats(0.004, 2))
    return st.lists(component, min_size=1, max_size=12).map(
        lambda parts: tuple(np.array(column)[None] for column in zip(*parts, strict=True))  # type: ignore[return-value]
    )


def moments(weights: Floats, means: Floats, sigmas: Floats) -> tuple[Floats, Floats, Floats]:
    total = weights.sum(1)
    mean = (weights * means).sum(1) / total
    return total, mean, (weights * (sigmas**2 + (means - mean[:, None]) ** 2)).sum(1) / total


def density(z: Floats, weights: Floats, means: Floats, sigmas: Floats) -> Floats:
    return np.asarray((weights * norm.pdf(z[:, None], means, sigmas)).sum(1))


def divergence(before: Mixture, after: Mixture, row: int) -> float:
    """KL(before || after) by brute force on a fine grid."""
    z = np.linspace(-3, 6, 20_001)
    p, q = (density(z, *(column[row] for column in mixture)) for mixture in (before, after))
    return float(np.trapezoid(np.where(p > 1e-300, p * np.log(np.maximum(p, 1e-300) / np.maximum(q, 1e-300)), 0), z))


def one_by_one(weights: Floats, means: Floats, sigmas: Floats, components: int) -> list[tuple[float, float, float]]:
    """Runnalls' method as his paper writes it down, for one mixture."""
    parts = list(zip(weights, means, sigmas**2, strict=True))

    def merged(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, float, float]:
        w = a[0] + b[0]
        mean = (a[0] * a[1] + b[0] * b[1]) / w
        return w, mean, sum(c[0] * (c[2] + (c[1] - mean) ** 2) for c in (a, b)) / w

    while len(parts) > components:
        pairs = [(i, j) for i in range(len(parts)) for j in range(i)]
        costs = []
        for i, j in pairs:
            w, _, v = merged(parts[i], parts[j])
            costs.append(w * math.log(v) - parts[i][0] * math.log(parts[i][2]) - parts[j][0] * math.log(parts[j][2]))
        i, j = pairs[int(np.argmin(costs))]
        parts = [merged(parts[i], parts[j]), *(part for k, part in enumerate(parts) if k not in (i, j))]
    return sorted(parts, reverse=True)


@settings(max_examples=60)
@given(mixtures(), st.integers(1, 6))
def test_weight_mean_and_variance_of_the_whole_stay(mixture: Mixture, components: int) -> None:
    reduced = reduce_components(*mixture, components)
    assert reduced.weights.shape == (1, components)
    np.testing.assert_allclose(moments(*reduced[:3]), moments(*mixture), rtol=1e-10, atol=1e-12)


def test_the_bound_is_above_the_divergence_and_not_by_much() -> None:
    before = random_mixtures(20, 10, seed=1)
    slack = []
    for components in (1, 3, 5, 9):
        reduced = reduce_components(*before, components)
        true = np.array([divergence(before, reduced[:3], row) for row in range(20)])
        assert (true >= -1e-9).all()
        assert (reduced.bound >= true - 1e-7).all()
        slack.append(float(np.median(reduced.bound / true)))
    assert max(slack[:3]) < 6


def test_no_probability_changes_by_more_than_the_bound_allows() -> None:
    before = random_mixtures(40, 15, seed=2)
    z = np.linspace(-3, 6, 2001)
    for components in (2, 5):
        reduced = reduce_components(*before, components)
        cdfs = [(w * ndtr((z[:, None, None] - m) / s)).sum(2) for w, m, s in (before, reduced[:3])]
        assert (np.abs(cdfs[0] - cdfs[1]).max(0) <= max_cdf_error(reduced.bound)).all()
    assert max_cdf_error([0.0, 1e9]).tolist() == [0, 1]


def test_the_method_is_runnalls() -> None:
    before = random_mixtures(20, 9, seed=3)
    reduced = reduce_components(*before, 4)
    for row in range(20):
        expected = np.array(one_by_one(*(column[row] for column in before), 4))
        np.testing.assert_allclose(reduced.weights[row], expected[:, 0], rtol=1e-9)
        np.testing.assert_allclose(reduced.means[row], expected[:, 1], rtol=1e-9)
        np.testing.assert_allclose(reduced.sigmas[row] ** 2, expected[:, 2], rtol=1e-9)


def test_the_order_of_components_and_objects_does_not_matter(rng: np.random.Generator) -> None:
    before = random_mixtures(30, 12, seed=4)
    reduced = reduce_components(*before, 5)
    components, objects = rng.permutation(12), rng.permutation(30)
    again = reduce_components(*(column[objects][:, components] for column in before), 5)
    for first, second in zip(reduced, again, strict=True):
        np.testing.assert_allclose(first[objects], second, rtol=1e-9, atol=1e-12)


def test_copies_of_a_mixture_come_back_as_the_mixture() -> None:
    one = random_mixtures(50, 5, seed=5)
    copies = (np.tile(one[0], 3) / 3, np.tile(one[1], 3), np.tile(one[2], 3))
    reduced = reduce_components(*copies, 5)
    order = np.argsort(-one[0], axis=1)
    for column, original in zip(reduced[:3], one, strict=True):
        np.testing.assert_allclose(column, np.take_along_axis(original, order, 1), rtol=1e-9)
    assert reduced.bound.max() < 1e-12


def test_components_that_do_not_exist_change_nothing() -> None:
    one = random_mixtures(20, 7, seed=6)
    nothing = np.full((20, 3), np.nan)
    padded = (np.hstack([np.zeros((20, 3)), one[0]]), np.hstack([nothing, one[1]]), np.hstack([nothing, one[2]]))
    for components in (4, 7):
        for first, second in zip(reduce_components(*one, components), reduce_components(*padded, components), strict=True):
            np.testing.assert_allclose(first, second, rtol=1e-9, atol=1e-12)


def test_merging_stops_at_the_bound() -> None:
    before = random_mixtures(200, 10, seed=7)
    free, bounded, untouched = (reduce_components(*before, 3, limit) for limit in (math.inf, 0.05, 0.0))
    assert free.weights.shape == (200, 3)
    assert free.bound.max() > 0.05
    assert bounded.bound.max() <= 0.05
    assert bounded.weights.shape == (200, 10)
    used = (bounded.weights > 0).sum(1)
    assert used.min() >= 3
    assert len(np.unique(used)) > 2
    assert (used[free.bound <= 0.05] == 3).all()
    assert ((untouched.weights > 0).sum(1) == 10).all()
    assert np.isfinite(bounded.means).all()
    assert (bounded.sigmas > 0).all()
    np.testing.assert_allclose(moments(*bounded[:3]), moments(*before), rtol=1e-10, atol=1e-12)


def test_few_components_are_left_as_they_are() -> None:
    before = random_mixtures(6, 3, seed=8)
    same = reduce_components(*before, 5)
    order = np.argsort(-before[0], axis=1)
    np.testing.assert_array_equal(same.weights[:, 3:], 0)
    np.testing.assert_array_equal(same.sigmas[:, 3:], 1)
    np.testing.assert_array_equal(same.means[:, :3], np.take_along_axis(before[1], order, 1))
    assert (same.bound == 0).all()


def test_no_objects_are_reduced_to_no_objects() -> None:
    none = np.zeros((0, 10))
    reduced = reduce_components(none, none, none, 4)
    assert reduced.weights.shape == (0, 4)
    assert reduced.bound.shape == (0,)


def test_more_objects_than_a_chunk_are_reduced_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    before = random_mixtures(100, 8, seed=9)
    whole = reduce_components(*before, 3, 0.2)
    monkeypatch.setattr("deepdisc_ops.photoz.reduction.CHUNK_BYTES", 5000)
    for first, second in zip(whole, reduce_components(*before, 3, 0.2), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(("components", "limit"), [(0, math.inf), (3, -0.1), (3, math.nan)])
def test_impossible_wishes_are_refused(components: int, limit: float) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        reduce_components(*random_mixtures(1, 4, seed=0), components, limit)
