r"""Mixtures of many components brought back to few, with a bound on what that changes.

Two components are merged into the one with their weight, mean and variance, so that the mean and the variance of the whole
mixture stay what they were. The pair is the one whose merging costs least (Runnalls 2007, IEEE Trans. Aerosp. Electron. Syst.
43, 989, Eq. 21):

.. math:: B_{ij} = \frac12 \left[(w_i + w_j) \log \sigma_{ij}^2 - w_i \log \sigma_i^2 - w_j \log \sigma_j^2\right]

The costs of all merges add up to :math:`\sum_i w_i KL(N_i \| g_{c(i)})`, c(i) being the component that i ended in; by the
convexity of the divergence that is at least KL(before || after). Cut at z = 0 and renormalised, the divergence is at most the
bound divided by the mass above zero.

Glossary: N objects, L components before, K after. A component of weight 0 does not exist; its mean is 0, its sigma 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

CHUNK_BYTES = 4e6  # of the costs of all pairs; several times faster than larger ones, which leave the cache


class Reduction(NamedTuple):
    """Mixtures of fewer components: weights (largest first), means, sigmas (N, K), and ``bound`` (N,) in nats.

    ``bound`` is at least the Kullback-Leibler divergence of the reduced mixture from the one before.
    """

    weights: Floats
    means: Floats
    sigmas: Floats
    bound: Floats


def reduce_components(
    weights: ArrayLike, means: ArrayLike, sigmas: ArrayLike, components: int, max_divergence: float = math.inf
) -> Reduction:
    """Merge the components (N, L) of every mixture until ``components`` are left.

    Where ``max_divergence`` (nats) is given, merging stops before the bound would exceed it, so that some mixtures keep more
    than ``components``; the result then has L columns, unused ones of weight 0. The order of the components does not matter.
    """
    if components < 1 or not max_divergence >= 0:
        raise ValueError(f"components is {components}, max_divergence {max_divergence}; expected at least 1, and no negative bound")
    w, m, s = (np.array(values, np.float64, ndmin=2) for values in (weights, means, sigmas))
    m[w <= 0], s[w <= 0] = 0, 1
    n, before = w.shape
    width = max(components, before if math.isfinite(max_divergence) else 0)
    result = Reduction(np.zeros((n, width)), np.zeros((n, width)), np.ones((n, width)), np.zeros(n))
    size = max(1, int(CHUNK_BYTES / 8 / before**2))
    for start in range(0, n, size):
        part = slice(start, start + size)
        _merge(Reduction(*(values[part] for values in result)), w[part], m[part], s[part] ** 2, components, max_divergence)
    return result


def max_cdf_error(bound: ArrayLike) -> Floats:
    """The most by which any probability, and so the CDF anywhere, can change at a divergence of ``bound`` nats.

    The smaller of the inequalities of Pinsker and of Bretagnolle & Huber (1979) for the total variation.
    """
    divergence = np.asarray(bound, np.float64)
    return np.asarray(np.minimum(np.sqrt(divergence / 2), np.sqrt(-np.expm1(-divergence))))


def _merge(out: Reduction, w: Floats, m: Floats, v: Floats, components: int, max_divergence: float) -> None:
    """Reduce a chunk of weights, means and variances (N, L) into ``out``, all its objects in step, one pair a step."""
    n, length = w.shape
    row, spent = np.arange(n), np.zeros(n)
    cost = _merging(*(a[:, :, None] for a in (w, m, v)), *(a[:, None, :] for a in (w, m, v)))[3]
    cost[:, range(length), range(length)] = np.inf
    while length > components and len(row):
        pair = np.stack(np.divmod(cost.reshape(len(row), -1).argmin(1), length))
        first, second = pair.min(0), pair.max(0)
        each = np.arange(len(row))
        dear = spent + cost[each, first, second] > max_divergence
        if dear.any():
            _store(out, row[dear], w[dear], m[dear], v[dear], spent[dear])
            row, spent, w, m, v, cost, first, second = (a[~dear] for a in (row, spent, w, m, v, cost, first, second))
            each = np.arange(len(row))
        both = [a[each, k] for k in (first, second) for a in (w, m, v)]
        w[each, first], m[each, first], v[each, first], step = _merging(*both)
        spent += step
        length -= 1
        for a in (w, m, v):
            a[each, second] = a[:, length]  # the last component takes the free place
        cost[each, second], cost[each, :, second] = cost[:, length], cost[:, :, length]
        cost[each, second, second] = np.inf
        w, m, v, cost = w[:, :length], m[:, :length], v[:, :length], cost[:, :length, :length]
        weight, mean, variance = (a[each, first][:, None] for a in (w, m, v))
        anew = _merging(weight, mean, variance, w, m, v)[3]
        anew[each, first] = np.inf
        cost[each, first], cost[each, :, first] = anew, anew
    _store(out, row, w, m, v, spent)


def _merging(w1: Floats, m1: Floats, v1: Floats, w2: Floats, m2: Floats, v2: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Weight, mean and variance of two components merged, and what that costs."""
    weight = w1 + w2
    share = w2 / np.maximum(weight, np.finfo(np.float64).tiny)
    gap = m2 - m1
    variance = v1 + share * (v2 - v1) + share * (1 - share) * gap**2
    log_variance = np.log(variance)
    cost = 0.5 * (w1 * (log_variance - np.log(v1)) + w2 * (log_variance - np.log(v2)))
    return weight, m1 + share * gap, variance, np.maximum(cost, 0)


def _store(out: Reduction, row: NDArray[np.int64], w: Floats, m: Floats, v: Floats, spent: Floats) -> None:
    """Put finished mixtures into their rows of ``out``, the heaviest component first."""
    order = np.lexsort((m, -w), axis=1)
    columns = slice(w.shape[1])
    for target, values in ((out.weights, w), (out.means, m), (out.sigmas, np.sqrt(v))):
        target[row, columns] = np.take_along_axis(values, order, 1)
    out.bound[row] = spent
