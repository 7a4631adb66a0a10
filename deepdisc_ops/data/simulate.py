"""Simulated skies with known truth: single scenes, mosaics and whole training sets.

A scene is drawn from one seed: sources, seeing, dust and noise all follow from it, so that the same seed gives the same pixels.
Inside, flux is in nanojansky per pixel; files are in the survey's own unit.

Glossary: C bands, H x W pixels, N sources.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from astropy.io import fits
from astropy.table import Table
from astropy.utils.exceptions import AstropyUserWarning
from astropy.wcs import WCS
from numpy.typing import NDArray

from deepdisc_ops import __version__
from deepdisc_ops.data import surveys
from deepdisc_ops.data.population import Population, attenuation, draw_population
from deepdisc_ops.data.records import SPLITS, Dataset, Objects, Record, open_dataset, write_records
from deepdisc_ops.data.render import render
from deepdisc_ops.data.surveys import Conditions, Survey
from deepdisc_ops.data.truth import outline
from deepdisc_ops.errors import CatalogError, ConfigError

log = logging.getLogger(__name__)

DEFAULT_CENTRE = (55.0, -32.0)
"""ra, dec in degrees: inside the DC2 field."""

TRUTH_SNR = 3.0
"""Sources above this point-source S/N in some band are in the truth table."""

RECORD_SNR = 5.0
"""Sources above this are training truth."""

EBV_RANGE = (0.01, 0.08)


@dataclass(frozen=True)
class Scene:
    """A simulated image with its truth.

    image and noiseless (C, H, W) float32 nJy per pixel; noise (C,) nJy per pixel; truth: one row per source above `TRUTH_SNR`
    (id, x, y, ra, dec, x0, y0, x1, y1, class, redshift, mag_<band>, snr, ebv, mask).
    """

    survey: Survey
    seed: int
    years: float
    ebv: float
    conditions: Conditions
    image: NDArray[np.float32]
    noiseless: NDArray[np.float32]
    noise: NDArray[np.float64]
    wcs: WCS
    truth: Table


def simulate_scene(
    survey: Survey,
    *,
    size: int | tuple[int, int],
    seed: int,
    years: float = 5.0,
    ebv: float | None = None,
    density: float = 1.0,
    centre: tuple[float, float] = DEFAULT_CENTRE,
) -> Scene:
    """Simulate a piece of sky of ``size`` pixels, a side or (width, height), around ``centre`` (ra, dec in degrees).

    years of observation set the depth; ebv, the reddening by the Milky Way, is drawn if not given; density multiplies the counts.
    """
    width, height = _width_height(size)
    rng = np.random.default_rng(seed)
    drawn_ebv = float(rng.uniform(*EBV_RANGE))
    ebv = drawn_ebv if ebv is None else float(ebv)
    conditions = surveys.draw_conditions(survey, years, rng)
    noise = surveys.pixel_noise(survey, conditions)
    area = width * height * (survey.pixel_scale / 60) ** 2
    population = draw_population(survey, area, rng, density).dimmed(attenuation(survey, ebv))
    x = rng.uniform(-0.5, width - 0.5, len(population))
    y = rng.uniform(-0.5, height - 0.5, len(population))
    noiseless, boxes, masks = _paint(survey, population, x, y, conditions, noise, (width, height))
    wcs = tangent_wcs(survey, width, height, centre)
    return Scene(
        survey=survey,
        seed=seed,
        years=years,
        ebv=ebv,
        conditions=conditions,
        image=noiseless + _sky(survey, noise, width, height, rng),
        noiseless=noiseless,
        noise=noise,
        wcs=wcs,
        truth=_truth_table(survey, population, x, y, conditions, wcs, ebv, boxes, masks),
    )


def tangent_wcs(survey: Survey, width: int, height: int, centre: tuple[float, float]) -> WCS:
    """TAN projection, north up and east left, with ``centre`` (ra, dec in degrees) in the middle of the image."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = list(centre)
    wcs.wcs.crpix = [width / 2 + 0.5, height / 2 + 0.5]
    wcs.wcs.cdelt = [-survey.pixel_scale / 3600, survey.pixel_scale / 3600]
    wcs.array_shape = (height, width)
    wcs.wcs.set()
    return wcs


def _width_height(size: int | tuple[int, int]) -> tuple[int, int]:
    width, height = (size, size) if isinstance(size, int) else size
    if min(width, height) < 1:
        raise ConfigError(f"size is {width} x {height} pixels, expected at least 1 x 1")
    return width, height


def _paint(
    survey: Survey,
    population: Population,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    conditions: Conditions,
    noise: NDArray[np.float64],
    shape: tuple[int, int],
) -> tuple[NDArray[np.float32], NDArray[np.float32], list[dict[str, Any] | None]]:
    """The noiseless image (C, H, W), and a box (N, 4) and mask for each source that has `TRUTH_SNR` (None for the others)."""
    width, height = shape
    image = np.zeros((len(survey.bands), height, width), np.float32)
    boxes = np.zeros((len(population), 4), np.float32)
    masks: list[dict[str, Any] | None] = [None] * len(population)
    bright = point_source_snr(population, conditions) > TRUTH_SNR
    for stamps in render(population, x, y, conditions.psf_fwhm, noise, survey.pixel_scale):
        for (x0, y0), flux in zip(stamps.origins, stamps.flux, strict=True):
            _add(image, flux, int(x0), int(y0))
        found = outline(stamps.select(bright[stamps.sources]), noise, width, height)
        boxes[found.sources] = found.boxes
        for source, mask in zip(found.sources, found.masks, strict=True):
            masks[source] = mask
    return image, boxes, masks


def _add(image: NDArray[np.float32], stamp: NDArray[np.float32], x0: int, y0: int) -> None:
    """Add a stamp (C, S, S) to an image (C, H, W) at x0, y0; what lies outside is dropped."""
    height, width = image.shape[1:]
    side = stamp.shape[-1]
    left, low = max(x0, 0), max(y0, 0)
    right, high = min(x0 + side, width), min(y0 + side, height)
    if left < right and low < high:
        image[:, low:high, left:right] += stamp[:, low - y0 : high - y0, left - x0 : right - x0]


def point_source_snr(population: Population, conditions: Conditions) -> NDArray[np.float64]:
    """(N,) largest S/N over the bands that a point of the source's flux would have."""
    return np.asarray((5 * population.flux / surveys.to_njy(conditions.depth)).max(axis=1, initial=0.0))


def _sky(survey: Survey, noise: NDArray[np.float64], width: int, height: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(C, H, W) noise, correlated between neighbours if the survey's is, and what sky subtraction leaves: a tilted plane."""
    sky = rng.standard_normal((len(noise), height, width), dtype=np.float32)
    if survey.noise_correlation:
        sky = _correlated(sky, survey.noise_correlation)
    if survey.background:
        level, tilt_x, tilt_y = (
            survey.background * rng.standard_normal((3, len(noise), 1, 1)) * np.array([1, 0.5, 0.5])[:, None, None, None]
        )
        plane = level + tilt_x * np.linspace(-1, 1, width) + tilt_y * np.linspace(-1, 1, height)[:, None]
        sky += plane.astype(np.float32)
    sky *= noise.astype(np.float32)[:, None, None]
    return sky


def _correlated(white: NDArray[np.float32], correlation: float) -> NDArray[np.float32]:
    """Mix pixels with their neighbours, which then correlate by ``correlation``; the variance stays 1."""
    share = (1 - np.sqrt(1 - 4 * correlation**2)) / (2 * correlation)
    norm = np.sqrt(1 + share**2)
    for axis in (1, 2):
        white = np.float32(1 / norm) * white + np.float32(share / norm) * np.roll(white, 1, axis=axis)
    return white


def _truth_table(
    survey: Survey,
    population: Population,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    conditions: Conditions,
    wcs: WCS,
    ebv: float,
    boxes: NDArray[np.float32],
    masks: list[dict[str, Any] | None],
) -> Table:
    listed = np.array([i for i, mask in enumerate(masks) if mask is not None], dtype=np.intp)
    ra, dec = wcs.wcs_pix2world(x[listed], y[listed], 0) if len(listed) else (np.zeros(0), np.zeros(0))
    magnitudes = surveys.to_magnitude(population.flux[listed])
    table = Table({"id": np.arange(len(listed), dtype=np.int64), "x": x[listed], "y": y[listed], "ra": ra, "dec": dec})
    for column, name in enumerate(("x0", "y0", "x1", "y1")):
        table[name] = boxes[listed, column]
    table["class"] = population.is_star[listed].astype(np.int32)
    table["redshift"] = population.redshift[listed].astype(np.float32)
    for column, band in enumerate(survey.bands):
        table[f"mag_{band}"] = magnitudes[:, column].astype(np.float32)
    table["snr"] = point_source_snr(population, conditions)[listed].astype(np.float32)
    table["ebv"] = np.full(len(listed), ebv, np.float32)
    table["mask"] = np.array([mask["counts"] for mask in masks if mask is not None], dtype=str if len(listed) else "U1")
    return table


def write_scene(scene: Scene, path: Path) -> None:
    """Write a scene as FITS: primary header, an image per band, truth table; the file appears only when it is complete."""
    survey = scene.survey
    primary = fits.PrimaryHDU()
    primary.header.update(SURVEY=survey.name, SEED=scene.seed, YEARS=scene.years, EBV=scene.ebv, PIXSCALE=survey.pixel_scale)
    hdus = fits.HDUList([primary])
    for band, plane, noise, fwhm in zip(survey.bands, scene.image, scene.noise, scene.conditions.psf_fwhm, strict=True):
        header = scene.wcs.to_header()
        header["FILTER"] = band
        header["MAGZERO"] = (survey.zero_point, "AB magnitude of one unit")
        header["SKYSIG"] = (float(noise * survey.units_per_njy), "noise per pixel")
        header["PSFFWHM"] = (float(fwhm), "[arcsec] of the PSF")
        header["BUNIT"] = "adu"
        hdus.append(fits.ImageHDU(plane * np.float32(survey.units_per_njy), header, name=band.upper()))
    hdus.append(fits.BinTableHDU(scene.truth, name="TRUTH"))
    unfinished = path.with_name(f".{path.name}.part")
    hdus.writeto(unfinished, overwrite=True)
    unfinished.replace(path)


def scene_record(path: Path, min_snr: float = RECORD_SNR) -> Record:
    """The training truth of a scene file: its sources above ``min_snr``."""
    try:
        with warnings.catch_warnings(), fits.open(path, memmap=True) as hdus:
            warnings.simplefilter("error", AstropyUserWarning)  # a file cut short
            survey = surveys.survey(hdus[0].header["SURVEY"])
            header = hdus[survey.bands[0].upper()].header
            truth = Table(hdus["TRUTH"].data)
    except (OSError, KeyError, AstropyUserWarning) as error:
        raise CatalogError(f"{path} is no complete scene: {' '.join(str(error).split())}") from None
    width, height = int(header["NAXIS1"]), int(header["NAXIS2"])
    truth = truth[np.asarray(truth["snr"]) > min_snr]
    return Record(path, survey.bands, width, height, _objects(truth, survey, width, height))


def _objects(truth: Table, survey: Survey, width: int, height: int) -> Objects:
    def column(name: str, dtype: Any) -> NDArray[Any]:
        return np.array(truth[name], dtype=dtype)

    return Objects(
        ids=column("id", np.int64),
        boxes=np.stack([column(name, np.float32) for name in ("x0", "y0", "x1", "y1")], axis=1),
        classes=column("class", np.int32),
        redshift=column("redshift", np.float32),
        mag=column(f"mag_{survey.gold_band}", np.float32),
        x=column("x", np.float64),
        y=column("y", np.float64),
        ra=column("ra", np.float64),
        dec=column("dec", np.float64),
        ebv=column("ebv", np.float32),
        masks=tuple({"size": [height, width], "counts": str(counts)} for counts in truth["mask"]),
    )


@dataclass(frozen=True)
class SceneTask:
    """One scene of a dataset, to be made by any process; a seed and a sky position of its own."""

    survey: Survey
    path: Path
    size: int
    seed: int
    years: float
    density: float
    centre: tuple[float, float]


def scene_seed(dataset_seed: int, split: str, index: int) -> int:
    """Seed of one scene; splits and scenes never share one, and none depends on how many there are."""
    state = np.random.SeedSequence(dataset_seed, spawn_key=(SPLITS.index(split), index)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def simulate_dataset(
    survey: Survey,
    out: Path,
    *,
    counts: Mapping[str, int],
    size: int = 256,
    seed: int = 0,
    years: float = 5.0,
    density: float = 1.0,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Simulate a training set of ``counts`` scenes per split into the folder ``out``.

    Scenes that are already there are kept, so an interrupted run goes on where it stopped, and counts may grow later.
    processes 0 takes all processors; progress is called with (scenes done, scenes in all).
    """
    unknown = [split for split in counts if split not in SPLITS]
    if unknown:
        raise ConfigError(f"unknown split {', '.join(map(repr, unknown))}, expected some of {', '.join(SPLITS)}")
    settings = {
        "survey": survey.name,
        "bands": list(survey.bands),
        "pixel_scale": survey.pixel_scale,
        "zero_point": survey.zero_point,
        "gold_band": survey.gold_band,
        "years": float(years),
        "seed": int(seed),
        "size": int(size),
        "density": float(density),
    }
    (out / "images").mkdir(parents=True, exist_ok=True)
    _claim(out, settings, counts)
    tasks = {
        (split, index): _task(survey, out, split, index, size=size, seed=seed, years=years, density=density)
        for split in SPLITS
        for index in range(counts.get(split, 0))
    }
    records = {}
    for done, (key, record) in enumerate(_run(tasks, processes or os.cpu_count() or 1), start=1):
        records[key] = record
        if progress is not None:
            progress(done, len(tasks))
    for split in SPLITS:
        if split in counts:
            write_records(out / f"{split}.jsonl", [records[split, index] for index in range(counts[split])])
    return open_dataset(out)


def _claim(out: Path, settings: dict[str, Any], counts: Mapping[str, int]) -> None:
    """Write dataset.yaml; a folder that holds a dataset made otherwise is refused."""
    path = out / "dataset.yaml"
    known = yaml.safe_load(path.read_text()) if path.is_file() else {}
    differing = [
        f"{name} {known[name]} there, {value} asked" for name, value in settings.items() if known and known.get(name) != value
    ]
    if differing:
        raise ConfigError(f"{out} holds a dataset made otherwise ({'; '.join(differing)}); use another folder")
    tree = settings | {"counts": {**known.get("counts", {}), **counts}, "package_version": __version__}
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(yaml.safe_dump(tree, sort_keys=False))
    unfinished.replace(path)


def _task(survey: Survey, out: Path, split: str, index: int, *, size: int, seed: int, years: float, density: float) -> SceneTask:
    own_seed = scene_seed(seed, split, index)
    rng = np.random.default_rng([own_seed, 1])
    centre = (round(float(rng.uniform(0, 360)), 4), round(float(rng.uniform(-60, 10)), 4))
    path = out / "images" / f"{split}_{index:05d}.fits"
    return SceneTask(survey, path, size, own_seed, years, density, centre)


def _run(tasks: Mapping[Any, SceneTask], processes: int) -> Iterator[tuple[Any, Record]]:
    """Make the scenes, in this process or in others; a failure ends the run, what is written stays."""
    if processes == 1 or len(tasks) < 2:
        for key, task in tasks.items():
            yield key, make_scene(task)
        return
    with ProcessPoolExecutor(min(processes, len(tasks)), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(make_scene, task): key for key, task in tasks.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def make_scene(task: SceneTask) -> Record:
    """The record of a scene's file, which is made unless it is there and whole."""
    if task.path.is_file():
        try:
            return scene_record(task.path)
        except CatalogError as error:
            log.warning("%s; it is made again", error)
    scene = simulate_scene(task.survey, size=task.size, seed=task.seed, years=task.years, density=task.density, centre=task.centre)
    write_scene(scene, task.path)
    return scene_record(task.path)
