"""Point metrics against a column of the catalogue or the truth, and of an ensemble's members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.photoz.metrics.points import Convention, PointMetrics, point_metrics
from deepdisc_ops.photoz.metrics.resampling import Estimate

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Bin:
    """The metrics of objects with low <= value < high (of the last bin also its end); ``middle`` is their median value."""

    low: float
    high: float
    middle: float
    metrics: PointMetrics


def equal_counts(values: ArrayLike, bins: int) -> Floats:
    """At most ``bins`` + 1 ascending edges that put as many of the finite values (N,) into each bin; ties may leave fewer bins."""
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    if not finite.size or bins < 1:
        raise CatalogError(f"{finite.size} finite values for {bins} bins; expected at least one of each")
    edges = np.unique(np.quantile(finite, np.linspace(0, 1, bins + 1)))
    return edges if edges.size > 1 else np.array([edges[0], np.nextafter(edges[0], np.inf)])


def binned_metrics(
    z_phot: ArrayLike,
    z_true: ArrayLike,
    column: ArrayLike,
    edges: Sequence[float] | Floats,
    convention: Convention,
    rng: np.random.Generator,
    *,
    samples: int = 200,
    least: int = 1,
) -> list[Bin]:
    """Metrics of redshifts (N,) in bins of a column (N,), with bootstrap errors; bins of fewer than ``least`` are left out.

    Objects where the column is NaN, and those beyond the edges, are in no bin. The LSST outlier limit is each bin's own.
    """
    phot, true, value = (np.asarray(values, np.float64) for values in (z_phot, z_true, column))
    if not phot.shape == true.shape == value.shape:
        raise CatalogError(f"there are {phot.size} redshifts, {true.size} true ones and a column of {value.size}; expected as many")
    borders = np.asarray(edges, np.float64)
    if borders.size < 2 or not (np.diff(borders) > 0).all():
        raise CatalogError(f"bin edges are {borders.tolist()}; expected at least two that ascend")
    found = []
    for low, high in pairwise(borders.tolist()):
        here = (value >= low) & ((value < high) | ((value == high) & (high == borders[-1])))
        if int(here.sum()) >= max(least, 1):
            found.append(
                Bin(low, high, float(np.median(value[here])), point_metrics(phot[here], true[here], convention, rng, samples))
            )
    return found


def ensemble_metrics(members: Sequence[PointMetrics]) -> dict[str, Estimate]:
    """Mean over members, and the standard deviation over them (JADES paper, section 4.2), of bias, scatter and outliers.

    Members must be measured in one convention on the same objects. The deviation of one member is 0.
    """
    if len({(member.convention, member.n) for member in members}) != 1:
        raise CatalogError("members of an ensemble must be measured in one convention on the same objects")
    names = ("bias", "sigma_iqr", "outlier_fraction")
    table = np.array([[getattr(member, name) for name in names] for member in members])
    deviation = table.std(axis=0, ddof=1) if len(members) > 1 else np.zeros(len(names))
    return {name: Estimate(float(table[:, i].mean()), float(deviation[i])) for i, name in enumerate(names)}
