"""A catalogue against the truth: what was found, what was invented, and how good the redshifts are.

Glossary: N catalogue objects, T truth sources, M gold galaxies that were found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from astropy.table import Table
from numpy.typing import NDArray

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.photoz import metrics
from deepdisc_ops.photoz.mixture import GaussianMixture
from deepdisc_ops.sky.matching import centre_separation_arcsec, chance_matches, match_on_sky, same_place

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Bools = NDArray[np.bool_]

GALAXY = 0
CATALOG_COLUMNS = ("ra", "dec", "z_mode", "mix_weights", "mix_means", "mix_sigmas")
TRUTH_COLUMNS = ("ra", "dec", "class", "redshift")
ESTIMATES = {"mode": "z_mode", "best": "z_best", "median": "z_median", "mean": "z_mean"}
"""Point estimates and their columns; a catalogue need not have more than the mode."""
BINS, LEAST_IN_BIN, BINNED_SAMPLES = 8, 20, 100
BLENDEDNESS_EDGES = (0.0, 0.02, 0.05, 0.1, 0.2, 1.0)
"""Most galaxies are hardly blended; of equal counts, no bin would hold the others alone."""
BLEND_ARCSEC = 2.0
"""Galaxies above the gold limit that are nearer than this to each other are a blend."""
CREDIBILITIES = (0.68, 0.95)
BLENDED = 0.2
"""Blendedness above which a galaxy counts as significantly blended (LSST paper)."""
SAME_ARCSEC = 0.001
"""Sources of a truth nearer than this are one source listed twice."""


@dataclass(frozen=True)
class Evaluation:
    """Figures of a catalogue, and the matching they come from.

    Completeness: gold galaxies of the truth matched one-to-one to any catalogue object. Purity: catalogue objects matched
    one-to-one to any truth source. Each has its rate of chance matches: what it would be if catalogue and truth had nothing
    to do with each other. The redshift figures are of those of the ``n_matched`` gold galaxies whose redshift the truth knows,
    M = ``n_judged``: ``lsst`` and ``jades`` of the mode, PIT of the mixture cut at z = 0, mean negative log likelihood of the
    mixture as it is (as in training).
    ``points``: every estimate the catalogue has (mode, best, median, mean) in the LSST convention; ``densities``: the whole
    PDFs; ``coverage``: galaxies inside their equal-tailed intervals of `CREDIBILITIES`; ``recovery``: outliers that the second
    peak saves; ``binned``: the mode against each column of the truth that is there. ``classes``: stars and galaxies among matched
    objects; ``blends``: groups of gold galaxies within `BLEND_ARCSEC` all found one by one; ``blended``: completeness of those
    whose blendedness is above `BLENDED`; None where there are none or truth does not say. ``n_duplicates`` sources of the truth,
    equal to another, were left out. ``sigma_iqr_constant`` is the scatter of always answering ``z_constant``, the mode of the
    judged galaxies' n(z).
    Indices: ``gold_truth`` and ``gold_catalog`` (M,) pairs; ``real`` (N,) bool, catalogue objects matched to any truth
    source; ``is_gold`` and ``found`` (T,) bool, gold galaxies and sources matched to any catalogue object.
    """

    n_catalog: int
    n_truth: int
    n_gold: int
    n_matched: int
    n_judged: int
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
    n_duplicates: int
    points: Mapping[str, metrics.PointMetrics]
    densities: metrics.DensityMetrics
    coverage: Mapping[str, metrics.Share]
    recovery: metrics.Recovery | None
    binned: Mapping[str, Sequence[metrics.Bin]]
    classes: Sequence[metrics.ClassShares]
    blends: metrics.Share | None
    blended: metrics.Share | None
    pit: Floats
    gold_truth: Indices
    gold_catalog: Indices
    is_gold: Bools
    real: Bools
    found: Bools

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

    Gold galaxies are those of the truth with mag_<gold_band> < ``gold_limit``. Those without a redshift (NaN, masked), as most are
    in a real field, count in completeness and purity alone. ``rng`` draws the bootstrap samples.
    Raises CatalogError for missing columns, unusable values, fields that do not overlap, and a truth without gold galaxies.
    """
    mag_column = f"mag_{gold_band}"
    _require_columns(catalog, CATALOG_COLUMNS, "the catalogue")
    _require_columns(truth, (*TRUTH_COLUMNS, mag_column), "the truth")
    pairs = _matched(catalog, truth, mag_column, gold_limit, radius_arcsec)
    known = np.isfinite(numbers(truth, "redshift")[pairs.gold])
    if not known.any():
        raise CatalogError(f"none of the {len(known)} matched gold galaxies has a redshift in the truth; no estimate can be judged")
    gold_truth, gold_catalog = pairs.gold[known], pairs.gold_catalog[known]
    z_true = numbers(truth, "redshift")[gold_truth]
    z_mode = _redshifts(catalog, "z_mode", gold_catalog, "z_mode values")
    lsst, jades = (metrics.point_metrics(z_mode, z_true, convention, rng) for convention in metrics.CONVENTIONS)
    pit, nll, cde = _density_scores(catalog, gold_catalog, z_true)
    z_constant = metrics.most_common_redshift(z_true)
    constant = metrics.residual(np.full_like(z_true, z_constant), z_true, "lsst")
    return Evaluation(
        n_catalog=len(catalog),
        n_truth=pairs.n_once,
        n_gold=int(pairs.is_gold.sum()),
        n_matched=len(pairs.gold),
        n_judged=len(gold_truth),
        gold_band=gold_band,
        gold_limit=gold_limit,
        radius_arcsec=radius_arcsec,
        completeness=metrics.completeness(pairs.is_gold, pairs.gold),
        completeness_chance=pairs.completeness_chance,
        purity=metrics.purity(len(catalog), pairs.any_catalog),
        purity_chance=pairs.purity_chance,
        lsst=lsst,
        jades=jades,
        pit_ks=metrics.pit_ks(pit),
        mean_nll=float(nll.mean()),
        z_constant=z_constant,
        sigma_iqr_constant=float(metrics.sigma_iqr(constant)),
        n_duplicates=len(truth) - pairs.n_once,
        points={"mode": lsst} | _other_points(catalog, gold_catalog, z_true, rng),
        densities=metrics.density_metrics_of(pit, nll, cde, rng),
        coverage={f"{level:g}": _covered(pit, level) for level in CREDIBILITIES},
        recovery=_recovery(catalog, gold_catalog, z_mode, z_true),
        binned=_binned(truth, gold_truth, mag_column, z_mode, z_true, rng),
        classes=_classes(catalog, truth, pairs.any_catalog, pairs.any_truth),
        blends=_blends(truth, pairs.is_gold, pairs.gold),
        blended=_blended(truth, pairs.is_gold, pairs.gold),
        pit=pit,
        gold_truth=gold_truth,
        gold_catalog=gold_catalog,
        is_gold=pairs.is_gold,
        real=_marked(pairs.any_catalog, len(catalog)),
        found=_marked(pairs.any_truth, len(truth)),
    )


@dataclass(frozen=True)
class _Pairs:
    """Which rows of truth and catalogue are one source.

    ``is_gold`` (T,); ``gold`` and ``gold_catalog``: pairs of gold galaxies and objects; ``any_truth`` and ``any_catalog``: of all
    sources; ``n_once``: sources of the truth that are no copies of others. The chances are those of `chance_matches`.
    """

    is_gold: Bools
    gold: Indices
    gold_catalog: Indices
    any_truth: Indices
    any_catalog: Indices
    n_once: int
    completeness_chance: float
    purity_chance: float


def _matched(catalog: Table, truth: Table, mag_column: str, gold_limit: float, radius_arcsec: float) -> _Pairs:
    once = _listed_once(truth, mag_column)
    ra, dec = numbers(truth, "ra"), numbers(truth, "dec")
    all_sky, sky = (ra[once], dec[once]), (numbers(catalog, "ra"), numbers(catalog, "dec"))
    is_gold = _marked(once, len(truth)) & (numbers(truth, "class") == GALAXY) & (numbers(truth, mag_column) < gold_limit)
    if not is_gold.any():
        raise CatalogError(
            f"none of the {len(truth)} truth sources is a galaxy with {mag_column} < {gold_limit}; give a fainter limit"
        )
    gold = np.flatnonzero(is_gold)
    gold_sky = ra[gold], dec[gold]
    found = match_on_sky(*gold_sky, *sky, radius_arcsec)
    if not len(found):
        raise CatalogError(_why_no_match([*all_sky, *sky], radius_arcsec))
    to_any = match_on_sky(*sky, *all_sky, radius_arcsec)
    return _Pairs(
        is_gold=is_gold,
        gold=gold[found.index1],
        gold_catalog=found.index2,
        any_truth=once[to_any.index2],
        any_catalog=to_any.index1,
        n_once=len(once),
        completeness_chance=chance_matches(*gold_sky, *sky, radius_arcsec),
        purity_chance=chance_matches(*sky, *all_sky, radius_arcsec),
    )


def _marked(rows: Indices, size: int) -> Bools:
    """True at ``rows`` of ``size``."""
    marked = np.zeros(size, bool)
    marked[rows] = True
    return marked


def catalog_mixture(catalog: Table, index: Indices | None = None) -> GaussianMixture:
    """The redshift mixtures of a catalogue's rows, or of those at ``index``."""
    rows = slice(None) if index is None else index
    weights, means, sigmas = (numbers(catalog, name)[rows] for name in ("mix_weights", "mix_means", "mix_sigmas"))
    return GaussianMixture.from_arrays(weights, means, sigmas)


def _density_scores(catalog: Table, index: Indices, z_true: Floats) -> tuple[Floats, Floats, Floats]:
    """PIT, negative log likelihood and CDE loss (M,) at the true redshifts."""
    weights, means, sigmas = (numbers(catalog, name)[index] for name in ("mix_weights", "mix_means", "mix_sigmas"))
    cde = metrics.cde_loss(weights, means, sigmas, z_true)
    mixture = catalog_mixture(catalog, index)
    z = mixture.means.new_tensor(z_true)
    return mixture.truncated_cdf(z).numpy(), -mixture.log_prob(z).numpy(), cde


def _covered(pit: Floats, level: float) -> metrics.Share:
    """Galaxies whose redshift lies in their equal-tailed interval of ``level``."""
    return metrics.share(int((metrics.central_levels(pit) <= level).sum()), pit.size, "galaxies with a true redshift")


def _other_points(catalog: Table, index: Indices, z_true: Floats, rng: np.random.Generator) -> dict[str, metrics.PointMetrics]:
    """Metrics of the estimates besides the mode."""
    there = {name: column for name, column in ESTIMATES.items() if name != "mode" and column in catalog.colnames}
    estimates = {name: _redshifts(catalog, column, index, f"{column} values") for name, column in there.items()}
    return {name: metrics.point_metrics(z, z_true, "lsst", rng) for name, z in estimates.items()}


def _recovery(catalog: Table, index: Indices, z_mode: Floats, z_true: Floats) -> metrics.Recovery | None:
    if not {"z_second_peak", "z_second_weight"} <= set(catalog.colnames):
        return None
    second, weight = (numbers(catalog, name)[index] for name in ("z_second_peak", "z_second_weight"))
    return metrics.secondary_peak_recovery(z_mode, second, weight, z_true, "lsst")


def _binned(
    truth: Table, index: Indices, mag_column: str, z_mode: Floats, z_true: Floats, rng: np.random.Generator
) -> dict[str, list[metrics.Bin]]:
    """The mode in bins of equal numbers of galaxies, against what the truth tells of them."""
    binned = {}
    for name in ("redshift", mag_column, "ebv", "blendedness", "psf_fwhm"):
        values = numbers(truth, name)[index] if name in truth.colnames else np.zeros(0)
        if np.isfinite(values).any() and np.nanmin(values) < np.nanmax(values):
            count = min(BINS, max(1, len(values) // LEAST_IN_BIN))
            edges = np.array(BLENDEDNESS_EDGES) if name == "blendedness" else metrics.equal_counts(values, count)
            binned[name] = metrics.binned_metrics(
                z_mode, z_true, values, edges, "lsst", rng, samples=BINNED_SAMPLES, least=LEAST_IN_BIN
            )
    return {name: bins for name, bins in binned.items() if bins}


def _classes(catalog: Table, truth: Table, index: Indices, truth_index: Indices) -> tuple[metrics.ClassShares, ...]:
    """Star and galaxy among matched objects; none where the catalogue has no classes, or is of a model with a single one."""
    if "class" not in catalog.colnames or ("classes" in catalog.meta and "," not in catalog.meta["classes"]):
        return ()
    return metrics.class_shares(numbers(truth, "class")[truth_index], numbers(catalog, "class")[index])


def _blends(truth: Table, is_gold: Bools, matched: Indices) -> metrics.Share | None:
    """Groups of gold galaxies all of whose members are among those ``matched``."""
    ra, dec, hit = numbers(truth, "ra")[is_gold], numbers(truth, "dec")[is_gold], _marked(matched, len(truth))[is_gold]
    east = (ra - ra[0] + 180) % 360 - 180
    return metrics.blends_recognised(east * np.cos(np.radians(dec)) * 3600, dec * 3600, BLEND_ARCSEC, hit)


def _blended(truth: Table, is_gold: Bools, matched: Indices) -> metrics.Share | None:
    if "blendedness" not in truth.colnames:
        return None
    wanted = is_gold & (numbers(truth, "blendedness") > BLENDED)
    return metrics.completeness(wanted, matched) if wanted.any() else None


def _listed_once(truth: Table, mag_column: str) -> Indices:
    """Rows of the truth without the copies of others; raises CatalogError where two of one place contradict each other."""
    ra, dec = numbers(truth, "ra"), numbers(truth, "dec")
    if not (np.isfinite(ra) & np.isfinite(dec)).all():
        return np.arange(len(truth))  # matching says how many are not finite
    first, second = same_place(ra, dec, SAME_ARCSEC)
    for name in ("class", "redshift", mag_column):
        values = numbers(truth, name)
        differ = ~np.isclose(values[first], values[second], rtol=0, atol=1e-6, equal_nan=True)
        if differ.any():
            i, j = int(first[differ][0]), int(second[differ][0])
            raise CatalogError(
                f"{int(differ.sum())} pairs of truth sources lie at one place and differ in {name}, such as rows "
                f"{i} ({values[i]:g}) and {j} ({values[j]:g}); leave the wrong ones out of the table"
            )
    return np.setdiff1d(np.arange(len(truth)), second)


def numbers(table: Table, name: str) -> Floats:
    """A column (N,) or (N, K) as floats, NaN where it is masked."""
    return np.asarray(np.ma.filled(np.ma.asarray(table[name]).astype(np.float64), np.nan))


def _require_columns(table: Table, names: Sequence[str], what: str) -> None:
    missing = [name for name in names if name not in table.colnames]
    if missing:
        there = ", ".join(table.colnames[:10]) + (f" and {len(table.colnames) - 10} more" if len(table.colnames) > 10 else "")
        raise CatalogError(f"{what} lacks {', '.join(missing)}; it has the columns {there}")


def _redshifts(table: Table, name: str, index: Indices, what: str) -> Floats:
    z = numbers(table, name)[index]
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
    if isinstance(value, tuple | list):
        named = value._asdict() if hasattr(value, "_asdict") else None
        return [_finite_or_none(item) for item in value] if named is None else _finite_or_none(named)
    return None if isinstance(value, float) and not math.isfinite(value) else value
