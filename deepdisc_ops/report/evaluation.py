"""From files to an evaluation, its figures and its page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from astropy.table import Table
from matplotlib.figure import Figure

from deepdisc_ops.errors import ConfigError, ImageError
from deepdisc_ops.photoz import figures, metrics
from deepdisc_ops.photoz.evaluation import Evaluation, catalog_mixture, evaluate
from deepdisc_ops.report.comparison import Comparison, compare, write_comparison
from deepdisc_ops.report.objects import object_columns
from deepdisc_ops.report.page import PAGE_OBJECTS, write_page
from deepdisc_ops.report.picture import draw_picture, thumbnail_sheets
from deepdisc_ops.sky.catalog import read_catalog
from deepdisc_ops.sky.images import Mosaic, open_mosaic

EXAMPLES = 3
DRAWN = 20_000
"""Objects whose densities are looked at for the figures of all; more change no line."""
PLACED = {"x", "y", "x0", "y0", "x1", "y1"}
"""Columns of a catalogue that knows its objects' pixels; one of another program may not."""
NAMES = {"mag": "AB mag", "ebv": "E(B-V)", "psf_fwhm": "PSF FWHM (arcsec)", "redshift": "true redshift"}


def evaluate_files(
    catalog_path: Path,
    truth_path: Path,
    out: Path,
    *,
    gold_band: str = "i",
    gold_limit: float = 25.3,
    seed: int = 0,
    formats: tuple[str, ...] = ("png",),
    page_objects: int = PAGE_OBJECTS,
) -> Evaluation:
    """Evaluate a catalogue file against a simulated mosaic or a truth catalogue.

    Writes metrics.json, figures and index.html to ``out``.
    The RGB picture and the thumbnails need the mosaic's pixels and are left out for a bare truth catalogue. Figures are
    written in all ``formats`` (png, svg, pdf); the page has at most ``page_objects`` objects, worst outliers first.
    """
    unknown = set(formats) - {"png", "svg", "pdf"}
    if unknown or not formats:
        raise ConfigError(f"figures are asked as {sorted(formats)}; expected any of png, svg and pdf")
    catalog = read_catalog(catalog_path)
    truth = read_truth(truth_path)
    rng = np.random.default_rng(seed)
    result = evaluate(catalog, truth, gold_band=gold_band, gold_limit=gold_limit, rng=rng)
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(result.as_dict(), indent=2) + "\n")
    drawn = dict(all_figures(result, catalog, truth, rng))
    for name, figure in drawn.items():
        for kind in formats:
            figures.write_figure(figure, out / f"{name}.{kind}")
    objects = object_columns(result, catalog, truth, page_objects)
    with _pixels(truth_path) as mosaic:
        sheets = None
        if mosaic is not None and set(catalog.colnames) >= PLACED:
            draw_picture(mosaic, catalog, out / "picture.png", result.real)
        if mosaic is not None and np.isfinite(objects.x).any():
            sheets = thumbnail_sheets(mosaic, objects.x, objects.y)
    pictures = {name: out / f"{name}.png" for name in (*drawn, "picture") if (out / f"{name}.png").is_file()}
    title = f"{catalog_path.name} against {truth_path.name}"
    write_page(
        out / "index.html", title=title, result=result, summary=list(rows(result)), figures=pictures, objects=objects, sheets=sheets
    )
    return result


def compare_files(
    catalog_paths: Sequence[Path],
    truth_path: Path,
    out: Path,
    *,
    gold_band: str = "i",
    gold_limit: float = 25.3,
    seed: int = 0,
    formats: tuple[str, ...] = ("png",),
) -> Comparison:
    """Hold catalogue files of one field against the first of them, all against one truth; writes comparison.json and a figure."""
    truth = read_truth(truth_path)
    catalogs = [read_catalog(path) for path in catalog_paths]
    rng = np.random.default_rng(seed)
    results = [evaluate(catalog, truth, gold_band=gold_band, gold_limit=gold_limit, rng=rng) for catalog in catalogs]
    stems = [path.stem for path in catalog_paths]
    names = [path.stem if stems.count(path.stem) == 1 else str(path) for path in catalog_paths]
    comparison = compare(names, results, catalogs, truth, rng)
    write_comparison(comparison, out, formats)
    return comparison


def read_truth(path: Path) -> Table:
    """The truth table of a simulated mosaic, or a truth catalogue."""
    return read_catalog(path, hdu="TRUTH" if path.suffix == ".fits" else None)


def tracked(result: Evaluation) -> dict[str, float]:
    """The figures of an evaluation by flat names, for a tracking store; what has no value is left out."""
    found = {"completeness": result.completeness.value, "purity": result.purity.value}
    for convention in (result.lsst, result.jades):
        for name in ("bias", "sigma_iqr", "outlier_fraction"):
            found[f"{convention.convention}_{name}"] = getattr(convention, name)
    found |= {name: getattr(result.densities, name).value for name in ("cde_loss", "nll", "ks", "cvm", "ad")}
    if result.blended is not None:
        found["completeness_blended"] = result.blended.value
    for name, point in result.points.items():
        found[f"{name}_sigma_iqr"] = point.sigma_iqr
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


def rows(result: Evaluation) -> Iterator[tuple[str, str]]:
    """Name and value of every figure, for a table."""
    lsst, jades, densities = result.lsst, result.jades, result.densities
    unknown = (
        f", {result.n_matched - result.n_judged} of these without a true redshift" if result.n_judged < result.n_matched else ""
    )
    copies = f", {result.n_duplicates} listed twice" if result.n_duplicates else ""
    yield "objects", f"{result.n_catalog} in the catalogue, {result.n_truth} in the truth{copies}"
    yield f"gold galaxies ({result.gold_band} < {result.gold_limit:g})", f"{result.n_gold}, {result.n_matched} matched{unknown}"
    completeness, purity = result.completeness, result.purity
    yield "completeness of gold", f"{_share(completeness)} (by chance {result.completeness_chance:.3f})"
    yield "purity", f"{_share(purity)} (by chance {result.purity_chance:.3f})"
    if not result.classes:
        yield "galaxies and stars", "not told apart by this catalogue"
    for one in result.classes:
        yield f"{one.name}: completeness, purity", f"{_share(one.completeness)}, {_share(one.purity)}"
    yield "blends whose galaxies were all found", _share(result.blends)
    yield "completeness at blendedness > 0.2", _share(result.blended)
    yield "bias (LSST convention)", f"{lsst.bias:+.4f} ± {lsst.bias_error:.4f}"
    yield "sigma_IQR", f"{lsst.sigma_iqr:.4f} ± {lsst.sigma_iqr_error:.4f}"
    yield "sigma_IQR of always answering the n(z)'s mode", f"{result.sigma_iqr_constant:.4f} ({result.gain_over_constant:.1f} x)"
    yield "outlier fraction (LSST)", f"{lsst.outlier_fraction:.4f} ± {lsst.outlier_fraction_error:.4f}"
    yield "outlier fraction (JADES)", f"{jades.outlier_fraction:.4f} ± {jades.outlier_fraction_error:.4f}"
    for name, point in result.points.items():
        if name != "mode":
            yield f"{name}: bias, sigma_IQR, outliers", f"{point.bias:+.4f}, {point.sigma_iqr:.4f}, {point.outlier_fraction:.4f}"
    if result.recovery is not None:
        yield "outliers that the second peak saves", _share(result.recovery.all)
    for level, covered in result.coverage.items():
        yield f"inside their interval of {100 * float(level):g} %", _share(covered)
    yield "CDE loss", _estimate(densities.cde_loss, 3)
    yield "PIT KS", _estimate(densities.ks, 4)
    yield "PIT CvM", _estimate(densities.cvm, 3)
    yield "PIT AD", _estimate(densities.ad, 2)
    yield "mean NLL", _estimate(densities.nll, 3)


def all_figures(result: Evaluation, catalog: Table, truth: Table, rng: np.random.Generator) -> Iterator[tuple[str, Figure]]:
    """Every figure that catalogue and truth allow, by the name of its file."""
    z_true = np.asarray(truth["redshift"], float)[result.gold_truth]
    z_mode = np.asarray(catalog["z_mode"], float)[result.gold_catalog]
    yield "redshifts", figures.redshift_scatter(z_true, z_mode, result.lsst)
    for name, bins in result.binned.items():
        yield f"binned_{name}", figures.binned_statistics({"mode": bins}, _column_name(name))
    yield "pit", figures.pit_figure(result.pit)
    some = np.arange(len(z_true)) if len(z_true) <= DRAWN else np.sort(rng.choice(len(z_true), DRAWN, replace=False))
    mixture = catalog_mixture(catalog, result.gold_catalog[some])
    parts = (mixture.weights.numpy(), mixture.means.numpy(), mixture.sigmas.numpy())
    levels = metrics.highest_density_levels(*parts, z_true[some])
    yield "coverage", figures.coverage_figure({"equal-tailed": metrics.central_levels(result.pit), "highest density": levels})
    if {"z_lo68", "z_hi68"} <= set(catalog.colnames):
        low, high = (np.asarray(catalog[name], float)[result.gold_catalog] for name in ("z_lo68", "z_hi68"))
        wide = high > low
        if wide.any():
            residuals = metrics.normalised_residual(z_mode[wide], z_true[wide], (high - low)[wide] / 2)
            yield "residuals", figures.normalised_residuals(residuals)
    grid = np.linspace(0, 1.05 * max(float(z_true.max()), float(z_mode.max()), 0.1), 301)
    yield "distribution", figures.redshift_distribution(z_true, z_mode, grid, mixture.truncated_density(grid).mean(0))
    if result.recovery is not None:
        yield "recovery", figures.recovery_figure(result.recovery)
    chosen = _examples(z_true[some], rng)
    examples = catalog_mixture(catalog, result.gold_catalog[some][chosen])
    titles = [f"object {catalog['id'][i]}" if "id" in catalog.colnames else "" for i in result.gold_catalog[some][chosen]]
    yield "densities", figures.example_densities(examples, z_true[some][chosen], z_mode[some][chosen], titles)
    galaxy = np.asarray(truth["class"]) == 0
    magnitude = np.asarray(truth[f"mag_{result.gold_band}"], float)
    by_magnitude = figures.completeness_by_magnitude(
        magnitude[galaxy], result.found[galaxy], band=result.gold_band, limit=result.gold_limit
    )
    yield "completeness", by_magnitude


def _pixels(path: Path) -> Mosaic | nullcontext[None]:
    """The mosaic at ``path``, or nothing if it is a truth catalogue without pixels."""
    try:
        return open_mosaic(path)
    except ImageError:
        return nullcontext()


def _column_name(name: str) -> str:
    return f"{name[4:]} (AB mag)" if name.startswith("mag_") else NAMES.get(name, name)


def _examples(z_true: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Objects drawn at random from each third of the redshifts."""
    thirds = np.array_split(np.argsort(z_true), EXAMPLES)
    return np.array([rng.choice(third) for third in thirds if len(third)])


def _share(share: metrics.Share | None) -> str:
    return "none" if share is None else f"{share.value:.3f} ± {share.error:.3f}"


def _estimate(estimate: metrics.Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} ± {estimate.error:.{digits}f}"
