"""Several catalogues of one field against one truth, on the gold galaxies that all of them found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy.table import Table

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.photoz import figures, metrics
from deepdisc_ops.photoz.evaluation import Evaluation, catalog_mixture
from deepdisc_ops.photoz.mixture import GaussianMixture

DRAWN = {
    "bias": "bias",
    "sigma_iqr": "$\\sigma_{IQR}$",
    "outlier_fraction": "outlier fraction",
    "cde_loss": "CDE loss",
    "ks": "PIT KS",
}


@dataclass(frozen=True)
class Compared:
    """A catalogue's share in a comparison: how complete and pure it is, and its redshifts on the galaxies common to all."""

    name: str
    completeness: metrics.Share
    purity: metrics.Share
    lsst: metrics.PointMetrics
    jades: metrics.PointMetrics
    densities: metrics.DensityMetrics

    def values(self) -> dict[str, tuple[float, float]]:
        """Every figure with its error."""
        found = {name: (getattr(self, name).value, getattr(self, name).error) for name in ("completeness", "purity")}
        for name in ("bias", "sigma_iqr", "outlier_fraction"):
            found[name] = (getattr(self.lsst, name), getattr(self.lsst, f"{name}_error"))
        found["outlier_fraction_jades"] = (self.jades.outlier_fraction, self.jades.outlier_fraction_error)
        return found | {name: tuple(getattr(self.densities, name)) for name in ("cde_loss", "nll", "ks", "cvm", "ad")}


@dataclass(frozen=True)
class Comparison:
    """Catalogues side by side, the first of them the one that the others are held against.

    common: how many gold galaxies all found; scatter: mean and standard deviation over the others, of which each may be a member
    of the first; none of fewer than two.
    """

    common: int
    catalogs: tuple[Compared, ...]
    scatter: Mapping[str, metrics.Estimate] | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        catalogs = {
            one.name: {name: {"value": value, "error": error} for name, (value, error) in one.values().items()}
            for one in self.catalogs
        }
        scatter = None if self.scatter is None else {name: one._asdict() for name, one in self.scatter.items()}
        return {"common": self.common, "catalogs": catalogs, "scatter": scatter}


def compare(
    names: Sequence[str], results: Sequence[Evaluation], catalogs: Sequence[Table], truth: Table, rng: np.random.Generator
) -> Comparison:
    """Hold evaluations of catalogues, all against ``truth``, beside each other; raises CatalogError where they share no galaxy."""
    shared = results[0].gold_truth
    for result in results[1:]:
        shared = np.intersect1d(shared, result.gold_truth)
    if not shared.size:
        raise CatalogError(f"no gold galaxy is in all of {', '.join(names)}; are they catalogues of the same field?")
    z_true = np.asarray(truth["redshift"], np.float64)[np.sort(shared)]
    found = tuple(
        _compared(name, result, catalog, np.sort(shared), z_true, rng)
        for name, result, catalog in zip(names, results, catalogs, strict=True)
    )
    others = [one.lsst for one in found[1:]]
    return Comparison(int(shared.size), found, metrics.ensemble_metrics(others) if len(others) > 1 else None)


def write_comparison(comparison: Comparison, out: Path, formats: Sequence[str] = ("png",)) -> None:
    """comparison.json and a figure, into the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "comparison.json").write_text(json.dumps(comparison.as_dict(), indent=2) + "\n")
    figure = figures.compared_values({one.name: one.values() for one in comparison.catalogs}, DRAWN)
    for kind in formats:
        figures.write_figure(figure, out / f"comparison.{kind}")


def comparison_rows(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    """A row for each figure: its name, then each catalogue's value, then the mean and scatter over those held against the first."""
    columns = [one.values() for one in comparison.catalogs]
    for name in columns[0]:
        row = [f"{column[name][0]:.4g} ± {column[name][1]:.2g}" for column in columns]
        if comparison.scatter is not None:
            over = comparison.scatter.get(name)
            row.append("" if over is None else f"{over.value:.4g} ± {over.error:.2g}")
        yield name.replace("_", " "), *row


def _compared(
    name: str, result: Evaluation, catalog: Table, shared: np.ndarray, z_true: np.ndarray, rng: np.random.Generator
) -> Compared:
    order = np.argsort(result.gold_truth)
    rows = result.gold_catalog[order[np.searchsorted(result.gold_truth[order], shared)]]
    z_mode = np.asarray(catalog["z_mode"], np.float64)[rows]
    lsst, jades = (metrics.point_metrics(z_mode, z_true, convention, rng) for convention in metrics.CONVENTIONS)
    return Compared(name, result.completeness, result.purity, lsst, jades, _densities(catalog_mixture(catalog, rows), z_true, rng))


def _densities(mixture: GaussianMixture, z_true: np.ndarray, rng: np.random.Generator) -> metrics.DensityMetrics:
    parts = (mixture.weights.numpy(), mixture.means.numpy(), mixture.sigmas.numpy())
    return metrics.density_metrics(*parts, z_true, rng)
