"""What tells whether redshifts and their densities are right.

The two papers differ in the sign of the residual and in what an outlier is; both conventions have a name:

============  ==============================  ==============================
..            ``lsst``                        ``jades``
============  ==============================  ==============================
residual e    (z_phot - z_true)/(1 + z_true)  (z_true - z_phot)/(1 + z_true)
bias          median e                        median e
scatter       (e75 - e25) / 1.349             the same
outlier       abs(e) > max(3 scatter, 0.06)   abs(e) > 0.15
============  ==============================  ==============================

The LSST paper does not define its bias; the median is RAIL's. Glossary: N objects, G grid points,
B bootstrap samples. Statistics work along the last axis, so that they apply to (B, N) samples at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepdisc_ops.errors import CatalogError

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Convention = Literal["lsst", "jades"]
CONVENTIONS: tuple[Convention, ...] = ("lsst", "jades")

IQR_OF_UNIT_NORMAL = 1.349
LSST_OUTLIER_SIGMAS, LSST_OUTLIER_FLOOR = 3.0, 0.06
JADES_OUTLIER = 0.15
BOOTSTRAP_VALUES = 4_000_000  # residuals held at once


@dataclass(frozen=True)
class PointMetrics:
    """Statistics of N point estimates in one convention, with bootstrap standard errors.

    ``outlier_limit`` is the abs(e) beyond which an object was counted as an outlier.
    """

    convention: Convention
    n: int
    bias: float
    bias_error: float
    sigma_iqr: float
    sigma_iqr_error: float
    outlier_fraction: float
    outlier_fraction_error: float
    outlier_limit: float


@dataclass(frozen=True)
class Share:
    """A fraction of n objects and its standard error, the binomial one (which a bootstrap of ones and zeros estimates)."""

    value: float
    error: float
    n: int


def residual(z_phot: ArrayLike, z_true: ArrayLike, convention: Convention) -> Floats:
    """Scaled redshift errors e (N,) of the convention, from redshifts (N,)."""
    phot, true = _redshifts(z_phot, "photometric"), _redshifts(z_true, "true")
    if phot.shape != true.shape:
        raise CatalogError(f"there are {phot.size} photometric for {true.size} true redshifts; expected one for each")
    scaled = (phot - true) / (1 + true)
    return scaled if convention == "lsst" else -scaled


def bias(residuals: Floats) -> Floats:
    """Median residual: (..., N) -> (...)."""
    return np.asarray(np.median(residuals, axis=-1))


def sigma_iqr(residuals: Floats) -> Floats:
    """Interquartile range over that of the unit normal distribution: (..., N) -> (...)."""
    low, high = np.quantile(residuals, (0.25, 0.75), axis=-1)
    return np.asarray((high - low) / IQR_OF_UNIT_NORMAL)


def outlier_limit(residuals: Floats, convention: Convention) -> Floats:
    """abs(e) beyond which an object is an outlier: (..., N) -> (...)."""
    if convention == "lsst":
        return np.maximum(LSST_OUTLIER_SIGMAS * sigma_iqr(residuals), LSST_OUTLIER_FLOOR)
    return np.full(residuals.shape[:-1], JADES_OUTLIER)


def outlier_fraction(residuals: Floats, convention: Convention) -> Floats:
    """Fraction of outliers: (..., N) -> (...). In ``lsst`` the limit follows each sample's own scatter."""
    return np.asarray((np.abs(residuals) > outlier_limit(residuals, convention)[..., None]).mean(axis=-1))


def point_metrics(
    z_phot: ArrayLike, z_true: ArrayLike, convention: Convention, rng: np.random.Generator, samples: int = 200
) -> PointMetrics:
    """Bias, scatter and outlier fraction of redshifts (N,), with errors from ``samples`` bootstrap samples."""
    e = residual(z_phot, z_true, convention)

    def statistics(values: Floats) -> Floats:
        return np.stack([bias(values), sigma_iqr(values), outlier_fraction(values, convention)], axis=-1)

    values, errors = statistics(e).tolist(), bootstrap_error(statistics, e, rng, samples).tolist()
    return PointMetrics(
        convention, e.size, values[0], errors[0], values[1], errors[1], values[2], errors[2], float(outlier_limit(e, convention))
    )


def bootstrap_error(statistic: Callable[[Floats], Floats], values: Floats, rng: np.random.Generator, samples: int = 200) -> Floats:
    """Standard error of ``statistic`` of values (N,): its standard deviation over samples drawn with replacement.

    ``statistic`` maps (B, N) to (B, ...), the result is (...). One object has error 0: nothing can vary.
    """
    if not values.size:
        raise CatalogError("no objects to resample; expected at least one")
    batch = max(1, BOOTSTRAP_VALUES // values.size)
    sizes = [min(batch, samples - start) for start in range(0, samples, batch)]
    drawn = [statistic(values[rng.integers(values.size, size=(size, values.size))]) for size in sizes]
    return np.asarray(np.std(np.concatenate(drawn), axis=0))


def pit(z_true: ArrayLike, grid: ArrayLike, cdf: ArrayLike) -> Floats:
    """Probability integral transform, CDF(z_true) (N,), of tabulated CDFs (N, G) on redshifts (G,), linear in between.

    Below the grid it is the first value of the CDF, above it the last. Mixtures have it exactly: `truncated_cdf`.
    """
    z, nodes, table = _redshifts(z_true, "true"), np.asarray(grid, np.float64), np.asarray(cdf, np.float64)
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
    ordered = np.sort(np.asarray(values, np.float64))
    if not ordered.size:
        raise CatalogError("no PIT values; expected at least one")
    if not np.isfinite(ordered).all():
        raise CatalogError(f"{int((~np.isfinite(ordered)).sum())} of {ordered.size} PIT values are not finite")
    steps = np.arange(ordered.size + 1) / ordered.size
    return float(max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()))


def completeness(sample: ArrayLike, matched_truth: Indices) -> Share:
    """Matched fraction of the true objects that ``sample`` (N,) bool picks; ``matched_truth``: indices (M,) into N."""
    wanted = np.asarray(sample, bool)
    found = np.zeros(wanted.size, bool)
    found[matched_truth] = True
    return _share(int((found & wanted).sum()), int(wanted.sum()), "true objects in the sample")


def purity(n_catalog: int, matched_catalog: Indices) -> Share:
    """Fraction of ``n_catalog`` objects that are real: ``matched_catalog`` (M,) are the indices of those matched."""
    return _share(np.unique(matched_catalog).size, n_catalog, "objects in the catalogue")


def most_common_redshift(z_true: ArrayLike) -> float:
    """Mode of the redshift distribution of (N,) objects: the peak of a Gaussian kernel density of Scott's width."""
    z = _redshifts(z_true, "true")
    width = float(z.std()) * z.size ** (-1 / 5)
    if width == 0:
        return float(z[0])
    edges = np.arange(z.min() - 4 * width, z.max() + 4 * width, width / 10)
    counts, _ = np.histogram(z, edges)
    kernel = np.exp(-0.5 * (np.arange(-40, 41) / 10) ** 2)
    peak = int(np.convolve(counts, kernel, mode="same").argmax())
    return float((edges[peak] + edges[peak + 1]) / 2)


def _share(part: int, n: int, what: str) -> Share:
    if n == 0:
        raise CatalogError(f"there are no {what}; expected at least one to take a fraction of")
    value = part / n
    return Share(value, math.sqrt(value * (1 - value) / n), n)


def _redshifts(values: ArrayLike, kind: str) -> Floats:
    z = np.asarray(values, np.float64)
    if z.ndim != 1 or not z.size:
        raise CatalogError(f"{kind} redshifts have shape {z.shape}; expected a column of at least one")
    bad = int((~np.isfinite(z)).sum())
    if bad:
        raise CatalogError(f"{bad} of {z.size} {kind} redshifts are not finite; leave those objects out")
    if z.min() <= -1:
        raise CatalogError(f"a {kind} redshift is {z.min()}, which has no meaning at or below -1; leave such objects out")
    return z
