"""The frozen skies and what a catalogue knows of their redshifts: ``python -m benchmarks.reference_sky [--quick] [--sky NAME]``.

Every sky is drawn at 5 and at 1 year of depth, scene by scene, measured and dropped. Gradient boosting learns the redshifts of
the gold galaxies (i < 25.3) of the train split and is judged on those of the test split, from two kinds of tables:

- ``catalogue``: true magnitudes with the noise of the depth, that of a Gaussian as large as the galaxy seen through the PSF;
- ``measured``: fluxes through several apertures at the true positions, with all that images add: neighbours, PSF, Poisson noise.

Both are dereddened, and both go without what the truth alone knows. The tables stay in the work folder and are used again.
Figures of the sky itself go to docs/: redshifts, colours and counts against the input and against cosmoDC2.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from astropy.table import Table
from numpy.typing import NDArray

from benchmarks import record, reference_figures
from benchmarks.reference_figures import Drawn
from deepdisc_ops.data import surveys
from deepdisc_ops.data.population import attenuation
from deepdisc_ops.data.reference import ReferenceSky, Split, check_reference, load_reference, reference_names, reference_scene
from deepdisc_ops.data.scenes import Scene, write_scene
from deepdisc_ops.photoz.baseline import Baseline, aperture_features, magnitude_features
from deepdisc_ops.photoz.figures import redshift_scatter, write_figure
from deepdisc_ops.photoz.metrics import CONVENTIONS, PointMetrics, pit, pit_ks, point_metrics
from deepdisc_ops.sky.images import SkyImage
from deepdisc_ops.sky.photometry import forced_photometry, magnitudes

Floats = NDArray[np.float64]

GOLD_LIMIT = 25.3
YEARS = (5.0, 1.0)
KINDS = ("catalogue", "measured")
SPLITS: tuple[Split, ...] = ("train", "calibration", "test")
APERTURES = np.array([0.35, 0.6, 1.0, 1.6, 2.5])
"""Radii in units of each band's PSF FWHM."""
GRID = np.linspace(0.0, 3.5, 351)
QUICK_SHARE = 0.1


@dataclass(frozen=True)
class Task:
    """One scene to draw and measure; ``keep`` is the folder that takes its FITS file, or None."""

    sky: ReferenceSky
    split: Split
    index: int
    years: float
    keep: Path | None


def measure_scene(task: Task) -> tuple[pa.Table, pa.Table]:
    """All sources of a scene (class, redshift, dereddened magnitudes) and what two kinds of catalogue say of its gold galaxies."""
    scene = reference_scene(task.sky, task.split, task.index, years=task.years)
    if task.keep is not None:
        task.keep.mkdir(parents=True, exist_ok=True)
        write_scene(scene, task.keep / f"{task.sky.name}_{task.years:g}y_{task.split}_{task.index:05d}.fits")
    survey, catalog = scene.survey, scene.catalog
    coefficients = -2.5 * np.log10(attenuation(survey, 1.0))
    ebv = np.asarray(catalog["ebv"], np.float64)
    magnitude = np.stack([np.asarray(catalog[f"mag_{band}"], np.float64) for band in survey.bands], axis=1)
    gold = gold_rows(scene)
    clear = magnitude - ebv[:, None] * coefficients
    sources = pa.table(
        {"class": np.asarray(catalog["class"], np.int8), "redshift": np.asarray(catalog["redshift"], np.float32)}
        | {f"mag_{band}": clear[:, i].astype(np.float32) for i, band in enumerate(survey.bands)}
    )
    flux, sigma = catalogue_fluxes(scene, magnitude[gold], half_light_radius(catalog)[gold])
    dust = 10 ** (0.4 * ebv[gold, None] * coefficients)
    image = SkyImage(scene.image, survey.bands, scene.wcs, survey.pixel_scale, np.zeros(scene.image.shape[1:], bool))
    radii = scene.conditions.psf_fwhm[:, None] * APERTURES
    raw = forced_photometry(image, catalog["x"][gold], catalog["y"][gold], radii, variance=scene.noise**2)
    measured = raw.dereddened(ebv[gold], coefficients)
    table = pa.table(
        {
            "scene": np.full(len(gold), task.index, np.int32),
            "redshift": np.asarray(catalog["redshift"], np.float64)[gold],
            "mag": magnitude[gold, survey.gold_index],
            "catalogue_flux": rows(flux * dust),
            "catalogue_error": rows(sigma * dust),
            "measured_flux": rows(measured.flux),
            "measured_error": rows(measured.error),
        }
    )
    return sources, table


def gold_rows(scene: Scene) -> NDArray[np.intp]:
    """Rows of a scene's catalogue that are galaxies above the gold limit."""
    magnitude = np.asarray(scene.catalog[f"mag_{scene.survey.bands[scene.survey.gold_index]}"], np.float64)
    return np.flatnonzero((magnitude < GOLD_LIMIT) & (np.asarray(scene.catalog["class"]) == 0))


def half_light_radius(catalog: Table) -> Floats:
    """(N,) arcsec, bulge and disc weighted by their light."""
    bulge = np.asarray(catalog["bulge_share"], np.float64)
    return bulge * np.asarray(catalog["bulge_radius"]) + (1 - bulge) * np.asarray(catalog["disc_radius"])


def catalogue_fluxes(scene: Scene, magnitude: Floats, radius: Floats) -> tuple[Floats, Floats]:
    """Noisy fluxes and their errors (N, C), nJy, of galaxies with half-light radii (N,) arcsec, not dereddened.

    The best weighting of a Gaussian source has the point source's noise times the size after over that before the PSF is undone:
    sqrt(1 + (radius / HWHM)^2). The same scene has the same deviates at every depth.
    """
    half = scene.conditions.psf_fwhm / 2
    sigma = surveys.to_njy(scene.conditions.depth) / 5 * np.sqrt(1 + (radius[:, None] / half) ** 2)
    deviates = np.random.default_rng([scene.seed, 1]).standard_normal(magnitude.shape)
    return surveys.to_njy(magnitude) + sigma * deviates, sigma


def rows(values: Floats) -> pa.FixedSizeListArray:
    """A column that holds values (N, ...) flattened to one list a row."""
    flat = np.ascontiguousarray(values, np.float32).reshape(len(values), int(np.prod(values.shape[1:])))
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])


def array(table: pa.Table, name: str, *shape: int) -> Floats:
    """Values (N, *shape) of a list column."""
    flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.float64).reshape(table.num_rows, *shape)


def tables(
    sky: ReferenceSky, years: float, split: Split, scenes: int, work: Path, *, keep: bool, pool: Executor
) -> tuple[Path, Path]:
    """Files with the sources and the gold galaxies of a split, made unless they are there."""
    stem = table_stem(sky, years, split, scenes)
    files = work / f"{stem}_sources.parquet", work / f"{stem}_gold.parquet"
    if all(file.is_file() for file in files):
        return files
    tasks = [Task(sky, split, index, years, work / "scenes" if keep else None) for index in range(scenes)]
    parts = list(counted(pool.map(measure_scene, tasks), scenes, f"{sky.name}, {years:g} years, {split}"))
    for file, column in zip(files, (0, 1), strict=True):
        keep_table(pa.concat_tables([part[column] for part in parts]), file)
    return files


def table_stem(sky: ReferenceSky, years: float, split: Split, scenes: int) -> str:
    """What the files of a split are called; another frozen sky has other files."""
    frozen = hashlib.sha256(sky.model_dump_json().encode()).hexdigest()[:12]
    return f"{sky.name}_{frozen}_{years:g}y_{split}_{scenes}"


def keep_table(table: pa.Table, file: Path) -> None:
    """Write a table, whole or not at all."""
    unfinished = file.with_suffix(".part")
    pq.write_table(table, unfinished)
    unfinished.replace(file)


def counted(results: Iterable[Any], total: int, what: str) -> Iterator[Any]:
    """Pass results on and print how far they are, every tenth."""
    start = time.monotonic()
    for done, result in enumerate(results, start=1):
        if done % max(total // 10, 1) == 0:
            print(f"{what}: {done}/{total} scenes, {time.monotonic() - start:.0f} s", flush=True)
        yield result


@dataclass(frozen=True)
class Trial:
    """A table to learn from and be judged on: files of gold galaxies by split."""

    sky: str
    years: float
    kind: str
    files: dict[Split, Path]
    bands: int

    @property
    def name(self) -> str:
        """What it is called in the results."""
        return f"{self.sky}/{self.years:g}y/{self.kind}"


def judge(trial: Trial) -> dict[str, Any]:
    """Figures of gradient boosting on one kind of table, with the estimates it gave."""
    read = {split: pq.read_table(file) for split, file in trial.files.items()}
    features = {split: table_features(table, trial.kind, trial.bands) for split, table in read.items()}
    redshift = {split: np.asarray(table["redshift"], np.float64) for split, table in read.items()}
    baseline = Baseline().fit(features["train"], redshift["train"])
    baseline.calibrate(features["calibration"], redshift["calibration"])
    truth, estimate = redshift["test"], baseline.predict(features["test"])
    densities = baseline.densities(features["test"], GRID)
    scores = {name: point_metrics(estimate, truth, name, np.random.default_rng(0)) for name in CONVENTIONS}
    return {
        "trial": trial,
        "truth": truth,
        "estimate": estimate,
        "metrics": scores["lsst"],
        "figures": {name: rounded(score) for name, score in scores.items()}
        | {
            "trained_on": len(redshift["train"]),
            "mean_nll": float(f"{-densities.log_density(truth).mean():.4g}"),
            "cde_loss": float(f"{densities.cde_loss(truth):.4g}"),
            "pit_ks": float(f"{pit_ks(pit(truth, GRID, densities.cdf())):.4g}"),
        },
    }


def judge_cosmodc2() -> dict[str, Any]:
    """Figures of the same boosting on cosmoDC2's own files, with the noise they come with, for comparison."""
    train, test = reference_figures.cosmodc2("training"), reference_figures.cosmodc2("validation")
    estimate = Baseline().fit(magnitude_features(train.magnitude), train.redshift).predict(magnitude_features(test.magnitude))
    scores = {name: rounded(point_metrics(estimate, test.redshift, name, np.random.default_rng(0))) for name in CONVENTIONS}
    return scores | {"trained_on": len(train.redshift)}


def table_features(table: pa.Table, kind: str, bands: int) -> Floats:
    """What the baseline learns from: magnitudes (1-sigma limits for non-detections) or asinh fluxes of all apertures."""
    if kind == "catalogue":
        return magnitude_features(magnitudes(array(table, "catalogue_flux", bands), array(table, "catalogue_error", bands))[0])
    shape = (bands, len(APERTURES))
    return aperture_features(array(table, "measured_flux", *shape), array(table, "measured_error", *shape))


def rounded(score: PointMetrics) -> dict[str, Any]:
    """A metric's figures to four digits."""
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in asdict(score).items()}


def draw_sky(name: str, work: Path, *, quick: bool, keep: bool, pool: Executor) -> tuple[Drawn, list[Trial]]:
    """One sky at all depths: its sources, and what is to be judged."""
    check_reference(name)
    sky = load_reference(name)
    bands = surveys.survey(sky.settings.survey).bands
    trials: list[Trial] = []
    sources: dict[Split, Path] = {}
    scenes: dict[Split, int] = {}
    for split in SPLITS:
        count = sky.splits[split].scenes
        scenes[split] = max(2, int(count * QUICK_SHARE)) if quick else count
    for years in YEARS:
        files: dict[Split, Path] = {}
        for split, count in scenes.items():
            sources[split], files[split] = tables(sky, years, split, count, work, keep=keep, pool=pool)
        trials += [Trial(name, years, kind, files, len(bands)) for kind in KINDS]
    area = scenes["train"] * (sky.size * surveys.survey(sky.settings.survey).pixel_scale / 60) ** 2
    return Drawn(name, bands, area, pq.read_table(sources["train"])), trials


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Scatter at 1 year over that at 5 years, and at 5 years that of measured fluxes over the catalogue's."""
    found = {}
    for sky in dict.fromkeys(name.split("/")[0] for name in figures):
        score = {(kind, years): figures[f"{sky}/{years:g}y/{kind}"]["lsst"]["sigma_iqr"] for kind in KINDS for years in YEARS}
        for kind in KINDS:
            found[f"{sky}/{kind}_sigma_iqr_1y_over_5y"] = round(score[kind, 1.0] / score[kind, 5.0], 3)
        found[f"{sky}/sigma_iqr_measured_over_catalogue"] = round(score["measured", 5.0] / score["catalogue", 5.0], 3)
    return found


def report(outcomes: list[dict[str, Any]]) -> list[str]:
    """A table of what was found, a line each."""
    lines = [f"{'sky':<20}{'years':>6} {'table':<10}{'N':>7}{'bias':>9}{'sigma_IQR':>18}{'outliers':>18}{'NLL':>8}{'CDE':>8}"]
    for outcome in outcomes:
        trial, score, extra = outcome["trial"], outcome["metrics"], outcome["figures"]
        lines.append(
            f"{trial.sky:<20}{trial.years:>6g} {trial.kind:<10}{score.n:>7}{score.bias:>+9.4f}"
            f"{score.sigma_iqr:>9.4f} ± {score.sigma_iqr_error:.4f}"
            f"{score.outlier_fraction:>9.4f} ± {score.outlier_fraction_error:.4f}"
            f"{extra['mean_nll']:>8.3f}{extra['cde_loss']:>8.3f}"
        )
    return lines


def main() -> None:
    """Draw, measure, judge and write the results and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the scenes; results and figures go to the work folder")
    parser.add_argument("--sky", action="append", choices=reference_names(), help="by default all")
    parser.add_argument("--work", type=Path, default=Path("build/reference-sky"), help="folder of the tables")
    parser.add_argument("--keep", action="store_true", help="keep the scenes too, as FITS in the work folder")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    skies, trials = [], []
    os.environ["OMP_NUM_THREADS"] = "1"  # in the processes to come: with more, their threads wait for each other
    with ProcessPoolExecutor(arguments.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for name in arguments.sky or reference_names():
            drawn, judged = draw_sky(name, work, quick=arguments.quick, keep=arguments.keep, pool=pool)
            skies.append(drawn)
            trials += judged
        real = pool.submit(judge_cosmodc2)
        outcomes = list(pool.map(judge, trials))
    lines = [*report(outcomes), f"{time.monotonic() - start:.0f} s"]
    print("\n".join(lines))
    pictures = work if arguments.quick else Path(__file__).parent.parent / "docs"
    for title, figure in reference_figures.figures(skies).items():
        write_figure(figure, pictures / f"reference-{title}.png")
    for outcome in outcomes[: len(KINDS)]:
        figure = redshift_scatter(outcome["truth"], outcome["estimate"], outcome["metrics"])
        figure.axes[0].set_ylabel("photometric redshift (median)")
        write_figure(figure, pictures / f"reference-{outcome['trial'].kind}.png")
    figures = {trial.name: outcome["figures"] for trial, outcome in zip(trials, outcomes, strict=True)}
    results = work if arguments.quick else record.RESULTS
    kept = figures | {"cosmodc2/as_shipped/catalogue": real.result()}
    print(record.write("reference_sky", ratios=ratios(figures), figures=kept, log=lines, folder=results))


if __name__ == "__main__":
    main()
