r"""Whole densities: PIT and its distance from uniform, CDE loss, likelihood, coverage.

Distances of PIT values u from the uniform distribution, F_n their empirical distribution function:

.. math::
    KS = \max |F_n(u) - u| \qquad
    CvM = N \int (F_n - u)^2 du \qquad
    AD = N \int \frac{(F_n - u)^2}{u (1 - u)} du

These, the statistics of the LSST paper's table, are the form ``table``. Its equations differ (form ``equations``): CvM has no N,
AD has F_n (1 - F_n) as denominator, which is taken between the smallest and the largest PIT, since it is 0 beyond. KS is one.

Glossary: N objects, K components, G grid points. Mixtures are given as weights, means and sigmas, (N, K); all that is said of
them is of the mixture cut at z = 0 and renormalised, but for the likelihood, which is of the whole line, as in training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf, log_ndtr, ndtr, ndtri

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.photoz.metrics.points import redshifts
from deepdisc_ops.photoz.metrics.resampling import Estimate, mean_with_error, resample_counts

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Form = Literal["table", "equations"]
CVM_AD_FORMS: tuple[Form, ...] = ("table", "equations")

CHUNK = 16384  # objects looked at together; the cache holds their temporaries
LEAST_PIT = 1e-15
"""AD takes logarithms of u and 1 - u; a true redshift beyond all of a density counts as one that far in its tail."""


@dataclass(frozen=True)
class DensityMetrics:
    """Figures of N densities with standard errors: of means the exact one, of distances by bootstrap.

    cvm and ad are of the form ``table``; pit_beyond is the share of objects whose true redshift lies outside of the central
    99.98 % of its density (RAIL's PIT outliers).
    """

    n: int
    cde_loss: Estimate
    nll: Estimate
    ks: Estimate
    cvm: Estimate
    ad: Estimate
    pit_beyond: float


def density_metrics(
    weights: ArrayLike, means: ArrayLike, sigmas: ArrayLike, z_true: ArrayLike, rng: np.random.Generator, samples: int = 200
) -> DensityMetrics:
    """All figures of mixtures (N, K) at the true redshifts (N,)."""
    z = redshifts(z_true, "true")
    mixture = _mixture(weights, means, sigmas, z.size)
    scores = [_scores(*(part[start : start + CHUNK] for part in (*mixture, z))) for start in range(0, z.size, CHUNK)]
    u, log_density, loss = np.concatenate(scores, axis=1)
    return density_metrics_of(u, -log_density, loss, rng, samples)


def density_metrics_of(
    pits: ArrayLike, nll: ArrayLike, cde: ArrayLike, rng: np.random.Generator, samples: int = 200
) -> DensityMetrics:
    """The figures of any densities, from PIT, negative log likelihood and CDE loss of each object (N,)."""
    u = _ordered(pits)
    logs = np.log(u.clip(LEAST_PIT)), np.log1p(-u.clip(max=1 - LEAST_PIT))
    drawn = [_drawn_distances(u, *logs, counts) for counts in resample_counts(u.size, rng, samples)]
    found = _ks(u), _cvm(u), _ad(*logs)
    ks, cvm, ad = (Estimate(*pair) for pair in zip(found, np.std(drawn, axis=0).tolist(), strict=True))
    beyond = float(np.mean((u < 1e-4) | (u > 1 - 1e-4)))
    return DensityMetrics(u.size, mean_with_error(cde), mean_with_error(nll), ks, cvm, ad, beyond)


def pit(z_true: ArrayLike, grid: ArrayLike, cdf: ArrayLike) -> Floats:
    """Probability integral transform, CDF(z_true) (N,), of tabulated CDFs (N, G) on redshifts (G,), linear in between.

    Below the grid it is the first value of the CDF, above it the last. Mixtures have it exactly: `truncated_cdf`.
    """
    z, nodes, table = redshifts(z_true, "true"), np.asarray(grid, np.float64), np.asarray(cdf, np.float64)
    if table.shape != (z.size, nodes.size) or nodes.size < 2:
        raise CatalogError(
            f"the CDFs have shape {table.shape}; expected {(z.size, nodes.size)}, at least 2 points for each redshift"
        )
    right = np.searchsorted(nodes, z).clip(1, nodes.size - 1)
    step = ((z - nodes[right - 1]) / (nodes[right] - nodes[right - 1])).clip(0, 1)
    row = np.arange(z.size)
    return np.asarray((1 - step) * table[row, right - 1] + step * table[row, right])


def pit_ks(values: ArrayLike) -> float:
    """Kolmogorov-Smirnov distance of PIT values (N,) from the uniform distribution."""
    return _ks(_ordered(values))


def pit_cvm(values: ArrayLike, form: Form = "table") -> float:
    """Cramer-von Mises distance of PIT values (N,) from the uniform distribution."""
    u = _ordered(values)
    return _cvm(u) / (1 if form == "table" else u.size)


def pit_ad(values: ArrayLike, form: Form = "table") -> float:
    """Anderson-Darling distance of PIT values (N,) from the uniform distribution."""
    u = _ordered(values)
    if form == "table":
        return _ad(np.log(u.clip(LEAST_PIT)), np.log1p(-u.clip(max=1 - LEAST_PIT)))
    level = np.arange(1, u.size) / u.size
    cubes = ((u[1:] - level) ** 3 - (u[:-1] - level) ** 3) / 3
    return float(u.size * np.sum(cubes / (level * (1 - level))))


def cde_loss(weights: ArrayLike, means: ArrayLike, sigmas: ArrayLike, z_true: ArrayLike) -> Floats:
    """Conditional density estimation loss of each object (N,): int f^2 dz - 2 f(z_true), exactly; CDE loss is its mean.

    Up to a constant of the truth (Izbicki & Lee 2017, arXiv:1704.08095).
    """
    z = redshifts(z_true, "true")
    w, m, s = _mixture(weights, means, sigmas, z.size)
    parts = [_scores(*(part[start : start + CHUNK] for part in (w, m, s, z)))[2] for start in range(0, z.size, CHUNK)]
    return np.concatenate(parts)


def expected_density(weights: ArrayLike, means: ArrayLike, sigmas: ArrayLike) -> Floats:
    """Integral of f^2 (N,) over redshift, of mixtures (N, K) cut at z = 0: the density expected where objects are drawn from it."""
    w, m, s = _mixture(weights, means, sigmas, len(np.asarray(weights)))
    parts = [_squared(*(part[start : start + CHUNK] for part in (w, m, s))) for start in range(0, len(w), CHUNK)]
    return np.concatenate(parts) if parts else np.zeros(0)


def central_levels(pits: ArrayLike) -> Floats:
    """Level (N,) of the equal-tailed interval of each density whose end is the true redshift, from its PIT."""
    return np.abs(2 * np.asarray(pits, np.float64) - 1)


def highest_density_levels(weights: ArrayLike, means: ArrayLike, sigmas: ArrayLike, z_true: ArrayLike, points: int = 64) -> Floats:
    """Level (N,) of the highest-density region of each mixture at whose border the true redshift lies.

    Counted over ``points`` redshifts of equal probability from each component, so that it is known to about 1 / points.
    """
    z = redshifts(z_true, "true")
    w, m, s = _mixture(weights, means, sigmas, z.size)
    size = max(1, CHUNK * 64 // (points * w.shape[1]))
    chunks = (slice(start, start + size) for start in range(0, z.size, size))
    parts = [_denser(w[part], m[part], s[part], z[part], points) for part in chunks]
    return np.concatenate(parts)


def coverage(levels: ArrayLike, credibility: ArrayLike) -> Floats:
    """Fraction of objects whose true redshift lies in the regions of each credibility level (G,): the diagonal if all is right."""
    ordered = _ordered(levels)
    return np.asarray(np.searchsorted(ordered, np.asarray(credibility, np.float64), side="right") / ordered.size)


def _drawn_distances(u: Floats, log_u: Floats, log_rest: Floats, counts: Indices) -> tuple[float, float, float]:
    """KS, CvM and AD of a sample in which each of ascending PIT values (N,) is there as often as counts (N,) say.

    The ranks k of one value run from n + 1 to m, so that the 2 k - 1 that CvM and AD weigh it by add up to m^2 - n^2.
    """
    size = u.size
    upto = np.cumsum(counts).astype(np.float64)
    before = upto - counts
    ranks = upto**2 - before**2
    ks = max((upto / size - u).max(), (u - before / size).max())
    middle = (size - 1 / (4 * size)) / 3  # sum of ((k - 1/2) / N)^2
    cvm = 1 / (12 * size) + counts @ u**2 - ranks @ u / size + middle
    ad = -size - (ranks @ log_u + (2 * size * counts - ranks) @ log_rest) / size
    return float(ks), float(cvm), float(ad)


def _ks(u: Floats) -> float:
    steps = np.arange(u.size + 1) / u.size
    return float(max((steps[1:] - u).max(), (u - steps[:-1]).max()))


def _cvm(u: Floats) -> float:
    middle = (np.arange(u.size) + 0.5) / u.size
    return float(1 / (12 * u.size) + ((u - middle) ** 2).sum())


def _ad(log_u: Floats, log_rest: Floats) -> float:
    odd = 2 * np.arange(log_u.size) + 1.0
    return float(-log_u.size - (odd @ log_u + odd[::-1] @ log_rest) / log_u.size)


def _scores(w: Floats, m: Floats, s: Floats, z: Floats) -> Floats:
    """(3, N): PIT, log density on the whole line, and CDE loss."""
    pull = (z[:, None] - m) / s
    density = np.exp(-0.5 * pull**2) / (s * math.sqrt(2 * math.pi))
    with np.errstate(divide="ignore"):
        log_parts = np.log(w) - 0.5 * pull**2 - np.log(s) - 0.5 * math.log(2 * math.pi)
        log_kept = np.log(w) + log_ndtr(m / s)
        log_above = np.log(w) + log_ndtr(-pull)
    kept = _logsumexp(log_kept)
    u = -np.expm1(np.minimum(_logsumexp(log_above) - kept, 0))
    at_truth = np.where(z < 0, 0.0, (w * density).sum(1) / np.exp(kept))
    return np.stack([np.where(z < 0, 0.0, u), _logsumexp(log_parts), _squared(w, m, s) - 2 * at_truth])


def _squared(w: Floats, m: Floats, s: Floats) -> Floats:
    """Integral of f^2 above zero, over the square of the mass there.

    The product of two Gaussians is a Gaussian of variance v1 v2 / (v1 + v2), its height that of N(m1 - m2 | 0, v1 + v2).
    """
    total, v = np.zeros(len(w)), s**2
    for i in range(w.shape[1]):
        for j in range(i + 1):
            both = v[:, i] + v[:, j]
            height = np.exp(-0.5 * (m[:, i] - m[:, j]) ** 2 / both) / np.sqrt(2 * math.pi * both)
            place = (m[:, i] * v[:, j] + m[:, j] * v[:, i]) / (s[:, i] * s[:, j] * np.sqrt(both))
            above = 0.5 * (1 + erf(place / math.sqrt(2)))
            total += (1 if i == j else 2) * w[:, i] * w[:, j] * height * above
    return np.asarray(total / (w * ndtr(m / s)).sum(1) ** 2)


def _denser(w: Floats, m: Floats, s: Floats, z: Floats, points: int) -> Floats:
    """Probability of redshifts where the density is above that at z (N,)."""
    below = ndtr(-m / s)
    level = below[:, :, None] + (1 - below[:, :, None]) * (np.arange(points) + 0.5) / points
    place = m[:, :, None] + s[:, :, None] * ndtri(level.clip(1e-300, 1 - 1e-16))
    share = w * (1 - below)
    share /= share.sum(1, keepdims=True)

    def density(at: Floats) -> Floats:
        total = np.zeros(at.shape)
        for k in range(w.shape[1]):
            mean, sigma, weight = (part[:, k].reshape(-1, *[1] * (at.ndim - 1)) for part in (m, s, w))
            total += weight / sigma * np.exp(-0.5 * ((at - mean) / sigma) ** 2)
        return total

    higher = (density(place) > density(z)[:, None, None]).mean(2)
    return np.asarray((share * higher).sum(1))


def _logsumexp(values: Floats) -> Floats:
    """Along the last axis; rows of minus infinity stay it."""
    top = values.max(1)
    safe = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return np.asarray(safe + np.log(np.exp(values - safe[:, None]).sum(1)))


def _mixture(weights: ArrayLike, means: ArrayLike, sigmas: ArrayLike, n: int) -> tuple[Floats, Floats, Floats]:
    """Checked and normalised; components of weight 0 are put where they do no harm."""
    w, m, s = (np.asarray(part, np.float64) for part in (weights, means, sigmas))
    if w.ndim != 2 or len(w) != n or not w.shape == m.shape == s.shape:
        raise CatalogError(f"mixtures have the shapes {w.shape}, {m.shape}, {s.shape}; expected three of ({n}, K)")
    exists = w > 0
    bad = int((~(np.isfinite(w).all(1) & exists.any(1) & (~exists | (np.isfinite(m) & (s > 0) & np.isfinite(s))).all(1))).sum())
    if bad:
        raise CatalogError(f"{bad} of {n} densities have no component, or one of no finite place or width; leave those objects out")
    total = np.where(exists, w, 0).sum(1, keepdims=True)
    return np.where(exists, w, 0) / total, np.where(exists, m, 0.0), np.where(exists, s, 1.0)


def _ordered(values: ArrayLike) -> Floats:
    ordered = np.sort(np.asarray(values, np.float64), axis=None)
    if not ordered.size:
        raise CatalogError("no PIT values; expected at least one")
    if not np.isfinite(ordered).all():
        raise CatalogError(f"{int((~np.isfinite(ordered)).sum())} of {ordered.size} PIT values are not finite")
    return ordered
