"""Point estimates: residuals, bias, scatter, outliers, and second peaks.

The two papers differ in the sign of the residual and in what an outlier is; both conventions have a name:

============  ==============================  ==============================
..            ``lsst``                        ``jades``
============  ==============================  ==============================
residual e    (z_phot - z_true)/(1 + z_true)  (z_true - z_phot)/(1 + z_true)
bias          median e                        median e
scatter       (e75 - e25) / 1.349             the same
outlier       abs(e) > max(3 scatter, 0.06)   abs(e) > 0.15
============  ==============================  ==============================

The LSST paper does not define its bias; the median is RAIL's. Glossary: N objects, B bootstrap samples. Statistics
work along the last axis, so that they apply to (B, N) samples at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.photoz.metrics.resampling import resample_counts
from deepdisc_ops.photoz.metrics.shares import Share, share

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Convention = Literal["lsst", "jades"]
CONVENTIONS: tuple[Convention, ...] = ("lsst", "jades")

IQR_OF_UNIT_NORMAL = 1.349
LSST_OUTLIER_SIGMAS, LSST_OUTLIER_FLOOR = 3.0, 0.06
JADES_OUTLIER = 0.15
RECOVERY_EDGES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


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
class Recovery:
    """Outliers whose second peak is no outlier: their share among all outliers, and by the weight of the second peak.

    ``by_weight`` has a share for each bin between ``edges``; None where no outlier has a second peak of such weight.
    """

    all: Share
    edges: tuple[float, ...]
    by_weight: tuple[Share | None, ...]


def residual(z_phot: ArrayLike, z_true: ArrayLike, convention: Convention) -> Floats:
    """Scaled redshift errors e (N,) of the convention, from redshifts (N,)."""
    phot, true = redshifts(z_phot, "photometric"), redshifts(z_true, "true")
    if phot.shape != true.shape:
        raise CatalogError(f"there are {phot.size} photometric for {true.size} true redshifts; expected one for each")
    scaled = (phot - true) / (1 + true)
    return scaled if convention == "lsst" else -scaled


def normalised_residual(z_phot: ArrayLike, z_true: ArrayLike, error: ArrayLike) -> Floats:
    """(z_phot - z_true) / error (N,); of unit width where the errors are right."""
    phot, true, sigma = redshifts(z_phot, "photometric"), redshifts(z_true, "true"), np.asarray(error, np.float64)
    if not phot.shape == true.shape == sigma.shape:
        raise CatalogError(
            f"there are {phot.size} redshifts, {true.size} true ones and {sigma.size} errors; expected as many of each"
        )
    bad = int((~(sigma > 0)).sum())
    if bad:
        raise CatalogError(f"{bad} of {sigma.size} redshift errors are not above zero; leave those objects out")
    return (phot - true) / sigma


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
    e = np.sort(residual(z_phot, z_true, convention))
    drawn = [_of_sorted(e, np.cumsum(counts), convention) for counts in resample_counts(e.size, rng, samples)]
    values, errors = _of_sorted(e, np.arange(1, e.size + 1), convention).tolist(), np.std(drawn, axis=0).tolist()
    return PointMetrics(
        convention, e.size, values[0], errors[0], values[1], errors[1], values[2], errors[2], float(outlier_limit(e, convention))
    )


def secondary_peak_recovery(
    z_phot: ArrayLike,
    second_peak: ArrayLike,
    second_weight: ArrayLike,
    z_true: ArrayLike,
    convention: Convention,
    edges: Sequence[float] = RECOVERY_EDGES,
) -> Recovery | None:
    """How many outliers would be none at their second peak (N,), NaN where there is none; None if there is no outlier.

    The limit is that of the first estimates in both cases.
    """
    e = residual(z_phot, z_true, convention)
    true, second, weight = (np.asarray(values, np.float64) for values in (z_true, second_peak, second_weight))
    limit = outlier_limit(e, convention)
    outlier = np.abs(e) > limit
    if not outlier.any():
        return None
    with np.errstate(invalid="ignore"):
        recovered = outlier & (np.abs((second - true) / (1 + true)) <= limit)
    has_second = outlier & np.isfinite(second)
    bins = []
    for low, high in pairwise(edges):
        here = has_second & (weight >= low) & (weight < high)
        bins.append(share(int((recovered & here).sum()), int(here.sum()), "outliers") if here.any() else None)
    return Recovery(share(int(recovered.sum()), int(outlier.sum()), "outliers"), tuple(edges), tuple(bins))


def most_common_redshift(z_true: ArrayLike) -> float:
    """Mode of the redshift distribution of (N,) objects: the peak of a Gaussian kernel density of Scott's width."""
    z = redshifts(z_true, "true")
    width = float(z.std()) * z.size ** (-1 / 5)
    if width == 0:
        return float(z[0])
    edges = np.arange(z.min() - 4 * width, z.max() + 4 * width, width / 10)
    counts, _ = np.histogram(z, edges)
    kernel = np.exp(-0.5 * (np.arange(-40, 41) / 10) ** 2)
    peak = int(np.convolve(counts, kernel, mode="same").argmax())
    return float((edges[peak] + edges[peak + 1]) / 2)


def redshifts(values: ArrayLike, kind: str) -> Floats:
    """A column of redshifts, all of them usable; raises CatalogError."""
    z = np.asarray(values, np.float64)
    if z.ndim != 1 or not z.size:
        raise CatalogError(f"{kind} redshifts have shape {z.shape}; expected a column of at least one")
    bad = int((~np.isfinite(z)).sum())
    if bad:
        raise CatalogError(f"{bad} of {z.size} {kind} redshifts are not finite; leave those objects out")
    if z.min() <= -1:
        raise CatalogError(f"a {kind} redshift is {z.min()}, which has no meaning at or below -1; leave such objects out")
    return z


def _of_sorted(e: Floats, cumulative: Indices, convention: Convention) -> Floats:
    """Bias, scatter and outlier fraction of ascending residuals (N,) that are drawn so often up to each (N,)."""
    low, middle, high = _quantiles_of_sorted(e, cumulative, (0.25, 0.5, 0.75))
    scatter = (high - low) / IQR_OF_UNIT_NORMAL
    limit = max(LSST_OUTLIER_SIGMAS * scatter, LSST_OUTLIER_FLOOR) if convention == "lsst" else JADES_OUTLIER
    drawn = np.concatenate([[0], cumulative])
    inside = drawn[np.searchsorted(e, limit, side="right")] - drawn[np.searchsorted(e, -limit, side="left")]
    return np.array([middle, scatter, (drawn[-1] - inside) / drawn[-1]])


def _quantiles_of_sorted(values: Floats, cumulative: Indices, levels: Sequence[float]) -> Floats:
    """As numpy's, linear between ascending values (N,), each there as often as the cumulative counts (N,) say."""
    last = int(cumulative[-1]) - 1
    place = np.asarray(levels) * last
    left = np.floor(place).astype(np.int64)
    step = place - left
    at, after = (values[np.searchsorted(cumulative, rank, side="right")] for rank in (left, np.minimum(left + 1, last)))
    return np.asarray((1 - step) * at + step * after)
