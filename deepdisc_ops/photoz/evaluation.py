"""A catalogue against the truth: what was found, what was invented, and how good the redshifts are.

Glossary: N catalogue objects, T truth sources, M gold galaxies that were found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from astropy.table import Table
from numpy.typing import NDArray

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.photoz import metrics
from deepdisc_ops.photoz.mixture import GaussianMixture
from deepdisc_ops.sky.matching import centre_separation_arcsec, chance_matches, match_on_sky

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

GALAXY = 0
CATALOG_COLUMNS = ("ra", "dec", "z_mode", "mix_weights", "mix_means", "mix_sigmas")
TRUTH_COLUMNS = ("ra", "dec", "class", "redshift")


@dataclass(frozen=True)
class Evaluation:
    """Figures of a catalogue, and the matching they come from.

    Completeness: gold galaxies of the truth matched one-to-one to any catalogue object. Purity: catalogue objects matched
    one-to-one to any truth source. Each has its rate of chance matches: what it would be if catalogue and truth had nothing
    to do with each other. The redshift figures are of the M matched gold galaxies: ``lsst`` and ``jades`` of the mode,
    PIT of the mixture cut at z = 0, mean negative log likelihood of the mixture as it is (as in training).
    ``sigma_iqr_constant`` is the scatter of always answering ``z_constant``, the mode of the matched galaxies' n(z).
    Indices: ``gold_truth`` and ``gold_catalog`` (M,) pairs; ``real`` (N,) bool, catalogue objects matched to any truth
    source; ``is_gold`` and ``found`` (T,) bool, gold galaxies and sources matched to any catalogue object.
    """

    n_catalog: int
    n_truth: int
    n_gold: int
    n_matched: int
    gold_band: str
    gold_limit: float
    radius_arcsec: float
    completeness: metrics.Share
    completeness_chance: float
    purity: metrics.Share
    purity_chance: float
    lsst: metrics.PointMetrics
    jades: metrics.PointMetrics
    pit_ks: float
    mean_nll: float
    z_constant: float
    sigma_iqr_constant: float
    pit: Floats
    gold_truth: Indices
    gold_catalog: Indices
    is_gold: NDArray[np.bool_]
    real: NDArray[np.bool_]
    found: NDArray[np.bool_]

    @property
    def gain_over_constant(self) -> float:
        """How many times smaller the scatter is than that of the constant answer."""
        return self.sigma_iqr_constant / self.lsst.sigma_iqr if self.lsst.sigma_iqr else math.inf

    def as_dict(self) -> dict[str, Any]:
        """The figures without the arrays, for JSON; what has no value is None."""
        values = {name: value for name, value in asdict(self).items() if not isinstance(value, np.ndarray)}
        values["gain_over_constant"] = self.gain_over_constant
        return {name: _finite_or_none(value) for name, value in values.items()}


def evaluate(
    catalog: Table,
    truth: Table,
    *,
    gold_band: str = "i",
    gold_limit: float = 25.3,
    radius_arcsec: float = 1.0,
    rng: np.random.Generator,
) -> Evaluation:
    """Compare a catalogue with the truth table of the same field, which lists every source above 3 sigma.

    Gold galaxies are those of the truth with mag_<gold_band> < ``gold_limit``. ``rng`` draws the bootstrap samples.
    Raises CatalogError for missing columns, unusable values, fields that do not overlap, and a truth without gold galaxies.
    """
    mag_column = f"mag_{gold_band}"
    _require_columns(catalog, CATALOG_COLUMNS, "the catalogue")
    _require_columns(truth, (*TRUTH_COLUMNS, mag_column), "the truth")
    sky = [_column(table, name) for table in (truth, catalog) for name in ("ra", "dec")]
    is_gold = (_column(truth, "class") == GALAXY) & (_column(truth, mag_column) < gold_limit)
    if not is_gold.any():
        raise CatalogError(
            f"none of the {len(truth)} truth sources is a galaxy with {mag_column} < {gold_limit}; give a fainter limit"
        )

    gold = np.flatnonzero(is_gold)
    gold_ra, gold_dec = sky[0][gold], sky[1][gold]
    found = match_on_sky(gold_ra, gold_dec, sky[2], sky[3], radius_arcsec)
    if not len(found):
        raise CatalogError(_why_no_match(sky, radius_arcsec))
    to_any = match_on_sky(sky[2], sky[3], sky[0], sky[1], radius_arcsec)
    gold_truth, gold_catalog = gold[found.index1], found.index2
    z_true = _redshifts(truth, "redshift", gold_truth, "true redshifts")
    z_mode = _redshifts(catalog, "z_mode", gold_catalog, "z_mode values")
    lsst, jades = (metrics.point_metrics(z_mode, z_true, convention, rng) for convention in metrics.CONVENTIONS)
    pit, nll = _density_scores(catalog, gold_catalog, z_true)
    z_constant = metrics.most_common_redshift(z_true)
    constant = metrics.residual(np.full_like(z_true, z_constant), z_true, "lsst")
    real = np.zeros(len(catalog), bool)
    real[to_any.index1] = True
    has_match = np.zeros(len(truth), bool)
    has_match[to_any.index2] = True
    return Evaluation(
        n_catalog=len(catalog),
        n_truth=len(truth),
        n_gold=len(gold),
        n_matched=len(found),
        gold_band=gold_band,
        gold_limit=gold_limit,
        radius_arcsec=radius_arcsec,
        completeness=metrics.completeness(is_gold, gold_truth),
        completeness_chance=chance_matches(gold_ra, gold_dec, sky[2], sky[3], radius_arcsec),
        purity=metrics.purity(len(catalog), to_any.index1),
        purity_chance=chance_matches(sky[2], sky[3], sky[0], sky[1], radius_arcsec),
        lsst=lsst,
        jades=jades,
        pit_ks=metrics.pit_ks(pit),
        mean_nll=float(nll.mean()),
        z_constant=z_constant,
        sigma_iqr_constant=float(metrics.sigma_iqr(constant)),
        pit=pit,
        gold_truth=gold_truth,
        gold_catalog=gold_catalog,
        is_gold=is_gold,
        real=real,
        found=has_match,
    )


def catalog_mixture(catalog: Table, index: Indices | None = None) -> GaussianMixture:
    """The redshift mixtures of a catalogue's rows, or of those at ``index``."""
    rows = slice(None) if index is None else index
    weights, means, sigmas = (_column(catalog, name)[rows] for name in ("mix_weights", "mix_means", "mix_sigmas"))
    return GaussianMixture.from_arrays(weights, means, sigmas)


def _density_scores(catalog: Table, index: Indices, z_true: Floats) -> tuple[Floats, Floats]:
    """PIT and negative log likelihood (M,) of the true redshifts."""
    mixture = catalog_mixture(catalog, index)
    z = mixture.means.new_tensor(z_true)
    return mixture.truncated_cdf(z).numpy(), -mixture.log_prob(z).numpy()


def _column(table: Table, name: str) -> Floats:
    """A column as floats, NaN where it is masked."""
    return np.asarray(np.ma.filled(np.ma.asarray(table[name]).astype(np.float64), np.nan))


def _require_columns(table: Table, names: Sequence[str], what: str) -> None:
    missing = [name for name in names if name not in table.colnames]
    if missing:
        raise CatalogError(f"{what} lacks the columns {missing}; it has {table.colnames}")


def _redshifts(table: Table, name: str, index: Indices, what: str) -> Floats:
    z = _column(table, name)[index]
    bad = int((~np.isfinite(z)).sum())
    if bad:
        raise CatalogError(f"{bad} of the {z.size} {what} of matched gold galaxies are NaN; leave those rows out of the table")
    return z


def _why_no_match(sky: Sequence[Floats], radius_arcsec: float) -> str:
    if not sky[2].size:
        return "the catalogue is empty; nothing can be compared with the truth"
    apart = centre_separation_arcsec(sky[0], sky[1], sky[2], sky[3])
    return (
        f"no gold galaxy lies within {radius_arcsec} arcsec of a catalogue object; the centres of truth and catalogue are "
        f"{apart:.1f} arcsec ({apart / 3600:.3g} deg) apart: are they of the same field and WCS?"
    )


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite_or_none(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
