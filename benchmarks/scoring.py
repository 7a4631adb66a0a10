"""Redshifts and densities of any code in one form, judged by the same functions.

`Judged` is what one code says of the gold galaxies of a test split, with the scores of its densities at the true redshifts; it is
kept as a .npz file, whose digest the frozen result remembers. Glossary: N galaxies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from deepdisc_ops.photoz import metrics
from deepdisc_ops.photoz.baseline import Densities
from deepdisc_ops.photoz.mixture import GaussianMixture

Floats = NDArray[np.float64]

LEAST_LOG_DENSITY = -20.0
"""What the logarithm of a density counts as where a code leaves none at the true redshift."""
EDGES: Mapping[str, Sequence[float]] = {
    "magnitude": (17.0, 20.0, 22.0, 23.5, 24.5, 25.3),
    "redshift": (0.0, 0.3, 0.6, 0.9, 1.2, 1.5, 2.0, 3.0),
    "blendedness": (0.0, 0.02, 0.05, 0.1, 0.2, 1.0),
}
BLENDED = 0.2
"""Blendedness above which a galaxy counts as significantly blended (LSST paper)."""


@dataclass(frozen=True)
class Judged:
    """Of N galaxies, each (N,): redshift; and of the density PIT, negative log likelihood and CDE loss. NaN where there is none."""

    redshift: Floats
    pit: Floats
    nll: Floats
    cde: Floats

    @classmethod
    def of_grid(cls, redshift: Floats, densities: Densities, truth: Floats) -> Judged:
        """A code whose densities are tabulated."""
        nll = -np.maximum(densities.log_density(truth), LEAST_LOG_DENSITY)
        return cls(redshift, metrics.pit(truth, densities.grid, densities.cdf()), nll, densities.cde_losses(truth))

    @classmethod
    def of_mixture(cls, redshift: Floats, mixture: GaussianMixture, truth: Floats) -> Judged:
        """A network."""
        z = torch.from_numpy(truth)
        loss = metrics.cde_loss(mixture.weights.numpy(), mixture.means.numpy(), mixture.sigmas.numpy(), truth)
        return cls(redshift, mixture.truncated_cdf(z).numpy(), -mixture.log_prob(z).clamp_min(LEAST_LOG_DENSITY).numpy(), loss)

    def select(self, index: NDArray[np.generic]) -> Judged:
        """The galaxies at ``index``."""
        return Judged(*(getattr(self, field.name)[index] for field in fields(self)))

    def spread(self, where: NDArray[np.bool_]) -> Judged:
        """As many galaxies as ``where`` (T,) has entries, these in its true places and NaN in the others."""
        columns = []
        for field in fields(self):
            column = np.full(where.size, np.nan)
            column[where] = getattr(self, field.name)
            columns.append(column)
        return Judged(*columns)


def keep(judged: Judged, truth: Floats, file: Path) -> str:
    """Write to a .npz file, whole or not at all; gives the SHA-256 of the numbers."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}")
    with unfinished.open("wb") as stream:
        np.savez_compressed(stream, truth=truth, **{field.name: getattr(judged, field.name) for field in fields(judged)})
    unfinished.replace(file)
    return digest(judged)


def read(file: Path, truth: Floats) -> Judged:
    """What `keep` wrote; ValueError where it is of other galaxies."""
    with np.load(file) as columns:
        if not np.array_equal(columns["truth"], truth):
            raise ValueError(f"{file} is about other galaxies than these {truth.size}; run benchmarks.baselines on the same scenes")
        return Judged(*(columns[field.name] for field in fields(Judged)))


def digest(judged: Judged) -> str:
    """SHA-256 of the numbers, rounded to nine digits."""
    columns = [np.char.mod("%.9g", getattr(judged, field.name)) for field in fields(judged)]
    return hashlib.sha256("\n".join(",".join(column.tolist()) for column in columns).encode()).hexdigest()


def scores(judged: Judged, truth: ArrayLike) -> dict[str, Any]:
    """Bias, sigma_IQR, outliers in both conventions, CDE loss, NLL, KS, CvM and AD, each with its bootstrap error."""
    z = np.asarray(truth, np.float64)
    lsst, jades = (metrics.point_metrics(judged.redshift, z, name, np.random.default_rng(0)) for name in metrics.CONVENTIONS)
    whole = metrics.density_metrics_of(judged.pit, judged.nll, judged.cde, np.random.default_rng(0))
    figures: dict[str, Any] = {"n": lsst.n}
    for name in ("bias", "sigma_iqr", "outlier_fraction"):
        figures |= {name: getattr(lsst, name), f"{name}_error": getattr(lsst, f"{name}_error")}
    figures |= {"outlier_limit": lsst.outlier_limit, "beyond_0.15": jades.outlier_fraction}
    figures["beyond_0.15_error"] = jades.outlier_fraction_error
    for name in ("cde_loss", "nll", "ks", "cvm", "ad"):
        estimate = getattr(whole, name)
        figures |= {name: estimate.value, f"{name}_error": estimate.error}
    return {name: value if isinstance(value, int) else rounded(value) for name, value in figures.items()}


def differences(judged: Judged, base: Judged, truth: ArrayLike) -> dict[str, float]:
    """Scatter, outliers and NLL less those of ``base`` on the same galaxies, with errors from samples drawn for both at once."""
    one, other = residuals(judged, truth), residuals(base, truth)

    def of(drawn: Floats) -> Floats:
        rows = drawn.astype(np.int64)
        parts = [statistic(one[rows]) - statistic(other[rows]) for statistic in (metrics.sigma_iqr, _outliers)]
        return np.stack([*parts, (judged.nll[rows] - base.nll[rows]).mean(-1)], -1)

    return _with_errors(of, one.size, ("sigma_iqr", "outlier_fraction", "nll"))


def over(judged: Judged, base: Judged, truth: ArrayLike) -> dict[str, float]:
    """Scatter, outliers, and those beyond the limit of ``base``, over those of ``base``; errors as in `differences`."""
    one, other = residuals(judged, truth), residuals(base, truth)

    def of(drawn: Floats) -> Floats:
        rows = drawn.astype(np.int64)
        limit = metrics.outlier_limit(other[rows], "lsst")[..., None]
        beyond, beyond_base = ((np.abs(each[rows]) > limit).mean(-1) for each in (one, other))
        parts = [statistic(one[rows]) / statistic(other[rows]) for statistic in (metrics.sigma_iqr, _outliers)]
        return np.stack([*parts, beyond / beyond_base], -1)

    with np.errstate(divide="ignore", invalid="ignore"):
        return _with_errors(of, one.size, ("sigma_iqr", "outlier_fraction", "beyond_its_limit"))


def residuals(judged: Judged, truth: ArrayLike) -> Floats:
    """Of the LSST paper's convention, (N,)."""
    return metrics.residual(judged.redshift, np.asarray(truth, np.float64), "lsst")


def _with_errors(statistic: Callable[[Floats], Floats], size: int, names: Sequence[str]) -> dict[str, float]:
    """Named values of a statistic of the numbers of galaxies, and their bootstrap errors."""
    everything = np.arange(size, dtype=np.float64)
    values, errors = statistic(everything[None])[0], metrics.bootstrap_error(statistic, everything, np.random.default_rng(0))
    return {
        key: rounded(number)
        for name, value, error in zip(names, values, errors, strict=True)
        for key, number in ((name, value), (f"{name}_error", error))
    }


def _outliers(residuals: Floats) -> Floats:
    return metrics.outlier_fraction(residuals, "lsst")


def rounded(value: float) -> float:
    """To four digits."""
    return float(f"{value:.4g}")


def bins(column: Floats, edges: Sequence[float]) -> Iterator[tuple[float, float, NDArray[np.bool_]]]:
    """The edges of each bin, and which of the column (N,) are in it; the last edge belongs to the last bin."""
    for low, high in pairwise(edges):
        yield low, high, (column >= low) & ((column < high) | ((high == edges[-1]) & (column == high)))


def binned(codes: Mapping[str, Judged], truth: Floats, column: Floats, edges: Sequence[float]) -> list[dict[str, Any]]:
    """Scatter and outliers of each code, with errors, in bins of a column of the truth (N,); all codes on the same galaxies."""
    rows = []
    for low, high, inside in bins(column, edges):
        if inside.sum() < 2:
            continue
        row: dict[str, Any] = {"low": low, "high": high, "n": int(inside.sum())}
        for name, judged in codes.items():
            found = metrics.point_metrics(judged.redshift[inside], truth[inside], "lsst", np.random.default_rng(0))
            row[name] = {
                key: rounded(getattr(found, key))
                for part in ("bias", "sigma_iqr", "outlier_fraction")
                for key in (part, f"{part}_error")
            }
        rows.append(row)
    return rows


def lines(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Scores by name of the code, a line each."""
    head = (
        f"{'':<22}{'N':>6}{'bias':>9}{'sigma_IQR':>17}{'outliers':>17}{'>0.15':>8}{'CDE':>8}{'NLL':>8}{'KS':>8}{'CvM':>8}{'AD':>9}"
    )
    return [
        head,
        *(
            f"{name:<22}{one['n']:>6}{one['bias']:>+9.4f}{one['sigma_iqr']:>9.4f} ±{one['sigma_iqr_error']:.4f}"
            f"{one['outlier_fraction']:>9.4f} ±{one['outlier_fraction_error']:.4f}{one['beyond_0.15']:>8.4f}{one['cde_loss']:>8.3f}"
            f"{one['nll']:>8.3f}{one.get('ks', np.nan):>8.4f}{one.get('cvm', np.nan):>8.2f}{one.get('ad', np.nan):>9.1f}"
            for name, one in table.items()
        ),
    ]


def binned_lines(rows: Sequence[Mapping[str, Any]], codes: Sequence[str], column: str) -> list[str]:
    """Scatter and outliers of each code in bins, a line each."""
    head = f"{column:<16}{'n':>6}" + "".join(f"{name:>24}" for name in codes)
    return [head] + [
        f"{row['low']:g} to {row['high']:g}".ljust(16)
        + f"{row['n']:>6}"
        + "".join(f"{row[name]['sigma_iqr']:>15.4f} {row[name]['outlier_fraction']:>8.3f}" for name in codes)
        for row in rows
    ]
