"""What `evaluate` leaves behind: metrics.json and the figures of a catalogue held against its truth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from astropy.table import Table
from numpy.typing import NDArray

from deepdisc_ops.errors import ImageError
from deepdisc_ops.photoz import figures
from deepdisc_ops.photoz.evaluation import Evaluation, catalog_mixture, evaluate
from deepdisc_ops.sky.catalog import read_catalog
from deepdisc_ops.sky.images import Mosaic, open_mosaic
from deepdisc_ops.sky.tiling import Window

PICTURE_SIDE = 400
EXAMPLES = 3


def evaluate_files(
    catalog_path: Path, truth_path: Path, out: Path, *, gold_band: str = "i", gold_limit: float = 25.3, seed: int = 0
) -> Evaluation:
    """Evaluate a catalogue file against a simulated mosaic or a truth catalogue; writes metrics.json and figures to ``out``.

    The RGB picture needs the mosaic's pixels and is left out for a bare truth catalogue.
    """
    catalog = read_catalog(catalog_path)
    truth = read_catalog(truth_path, hdu="TRUTH" if truth_path.suffix == ".fits" else None)
    rng = np.random.default_rng(seed)
    result = evaluate(catalog, truth, gold_band=gold_band, gold_limit=gold_limit, rng=rng)
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(result.as_dict(), indent=2) + "\n")
    _draw(result, catalog, truth, out, rng)
    try:
        mosaic = open_mosaic(truth_path)
    except ImageError:  # a truth catalogue without pixels
        return result
    with mosaic:
        draw_picture(mosaic, catalog, out / "picture.png", result.real)
    return result


def rows(result: Evaluation) -> Iterator[tuple[str, str]]:
    """Name and value of every figure, for a table."""
    lsst, jades = result.lsst, result.jades
    yield "objects", f"{result.n_catalog} in the catalogue, {result.n_truth} true above 3 sigma"
    yield f"gold galaxies ({result.gold_band} < {result.gold_limit:g})", f"{result.n_gold}, {result.n_matched} matched"
    completeness, purity = result.completeness, result.purity
    yield (
        "completeness of gold",
        f"{completeness.value:.3f} ± {completeness.error:.3f} (by chance {result.completeness_chance:.3f})",
    )
    yield "purity", f"{purity.value:.3f} ± {purity.error:.3f} (by chance {result.purity_chance:.3f})"
    yield "bias (LSST convention)", f"{lsst.bias:+.4f} ± {lsst.bias_error:.4f}"
    yield "sigma_IQR", f"{lsst.sigma_iqr:.4f} ± {lsst.sigma_iqr_error:.4f}"
    yield "sigma_IQR of always answering the n(z)'s mode", f"{result.sigma_iqr_constant:.4f} ({result.gain_over_constant:.1f} x)"
    yield "outlier fraction (LSST)", f"{lsst.outlier_fraction:.4f} ± {lsst.outlier_fraction_error:.4f}"
    yield "outlier fraction (JADES)", f"{jades.outlier_fraction:.4f} ± {jades.outlier_fraction_error:.4f}"
    yield "PIT KS", f"{result.pit_ks:.4f}"
    yield "mean NLL", f"{result.mean_nll:.3f}"


def _draw(result: Evaluation, catalog: Table, truth: Table, out: Path, rng: np.random.Generator) -> None:
    z_true = np.asarray(truth["redshift"], float)[result.gold_truth]
    z_mode = np.asarray(catalog["z_mode"], float)[result.gold_catalog]
    figures.write_figure(figures.redshift_scatter(z_true, z_mode, result.lsst), out / "redshifts.png")
    figures.write_figure(figures.pit_figure(result.pit), out / "pit.png")
    chosen = _examples(z_true, rng)
    mixture = catalog_mixture(catalog, result.gold_catalog[chosen])
    titles = [f"object {catalog['id'][i]}" for i in result.gold_catalog[chosen]]
    figures.write_figure(figures.example_densities(mixture, z_true[chosen], z_mode[chosen], titles), out / "densities.png")
    galaxy = np.asarray(truth["class"]) == 0
    magnitude = np.asarray(truth[f"mag_{result.gold_band}"], float)
    by_magnitude = figures.completeness_by_magnitude(
        magnitude[galaxy], result.found[galaxy], band=result.gold_band, limit=result.gold_limit
    )
    figures.write_figure(by_magnitude, out / "completeness.png")


def _examples(z_true: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Objects drawn at random from each third of the redshifts."""
    thirds = np.array_split(np.argsort(z_true), EXAMPLES)
    return np.array([rng.choice(third) for third in thirds if len(third)])


def draw_picture(mosaic: Mosaic, catalog: Table, path: Path, real: NDArray[np.bool_] | None = None) -> None:
    """Lupton RGB of the middle of a mosaic with the objects' boxes, coloured by ``real`` (N,) where truth is known."""
    x0, y0 = max(0, (mosaic.width - PICTURE_SIDE) // 2), max(0, (mosaic.height - PICTURE_SIDE) // 2)
    window = Window(x0, y0, min(x0 + PICTURE_SIDE, mosaic.width), min(y0 + PICTURE_SIDE, mosaic.height))
    image = mosaic.read(window)
    planes = rgb_planes(len(image.bands))
    blue, green, red = image.data[planes]
    x, y = np.asarray(catalog["x"]), np.asarray(catalog["y"])
    inside = np.flatnonzero((x >= window.x0) & (x < window.x1) & (y >= window.y0) & (y < window.y1))
    boxes = np.stack([catalog[name][inside] for name in ("x0", "y0", "x1", "y1")], axis=1) - [x0, y0, x0, y0]
    title = f"{len(inside)} objects, {' '.join(image.bands[i] for i in reversed(planes))} as red, green, blue"
    labels = [f"{z:.2f}" for z in catalog["z_mode"][inside]]
    matched = None if real is None else real[inside]
    figures.write_figure(figures.rgb_with_boxes(red, green, blue, boxes, matched, labels, title=title), path)


def rgb_planes(bands: int) -> list[int]:
    """Planes for blue, green and red: spread over the bands, without the noisy ends where there are six."""
    return [1, 2, 3] if bands >= 5 else [0, bands // 2, bands - 1]
