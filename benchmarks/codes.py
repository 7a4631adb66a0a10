"""Catalogue codes on measured fluxes, each as a function that learns and gives back one that answers.

- ``gradient_boosting``: `photoz.baseline`, on all apertures (asinh magnitudes, colours, sizes);
- ``flexzboost``: FlexZBoost's own library on the same features, its two thresholds chosen on the calibration split;
- ``flexzboost_rail``: RAIL's stage, on magnitudes in one aperture and their colours, as in the LSST paper;
- ``bpz``: RAIL's stage of BPZ with the COSMOS templates that pz-rail-base ships, the late ones dusty too, and BPZ's HDF-N prior.

FlexZBoost has the settings of the LSST paper (35 cosine functions, trees 8 deep, bumps below 0.02 to 0.35 cut, densities sharpened
by 0.7 to 2.1), BPZ fits fluxes in one aperture, scaled to the brightness in the largest. Which aperture is chosen by the scatter
on the calibration split. In magnitudes, what lies below 1 sigma is replaced by its 1-sigma limit.

Glossary: N galaxies, C bands, G grid points.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gold import Gold
from benchmarks.reference_sky import GRID
from deepdisc_ops.data.spectra import calzetti
from deepdisc_ops.data.surveys import example_data
from deepdisc_ops.photoz.baseline import Baseline, Densities, aperture_features
from deepdisc_ops.photoz.metrics import residual, sigma_iqr
from deepdisc_ops.sky.photometry import magnitudes

Floats = NDArray[np.float64]

HIGHEST = 3.0
"""Redshift at which the grids of FlexZBoost and BPZ end; no galaxy of the frozen skies is beyond."""
BASES, DEPTH = 35, 8
BUMPS, SHARPENINGS = np.linspace(0.02, 0.35, 20), np.linspace(0.7, 2.1, 15)
ZERO_POINTS_FROM = 23.5
LARGEST_SCALE = 10.0
"""By which light in an aperture is scaled up at most, where a neighbour lies in the largest."""
TUNED_ON = 4000
"""Galaxies of the calibration split that choose apertures and thresholds, at most; BPZ takes milliseconds for each."""
DUST = (0.1, 0.2, 0.3)
"""E(B-V) of the late templates besides none."""
EARLY, SPIRAL = 8, 11
"""Of the 31 COSMOS templates: ellipticals and S0, spirals; the rest are starbursts. The spirals from Sc on are dusty too."""
DUSTY_FROM = 12
FILTER_STEP = 5
"""Every fifth Angstrom of a filter's curve where it is open; BPZ takes a second for a template and a filter otherwise."""
ZERO_POINT_ERROR = 0.03
"""mag, what template fits allow for in each band."""


@dataclass(frozen=True)
class Answer:
    """Redshifts (N,) and densities (N, G) of galaxies."""

    redshift: Floats
    densities: Densities


Predict = Callable[[Gold], Answer]
Learn = Callable[[Gold, Gold, Path], Predict]


def features(gold: Gold) -> Floats:
    """What boosting learns from."""
    return aperture_features(gold.flux, gold.error)


def gradient_boosting(train: Gold, calibration: Gold, _work: Path) -> Predict:
    """The project's own baseline; its redshifts are medians."""
    boosted = Baseline().fit(features(train), train.redshift).calibrate(features(calibration), calibration.redshift)

    def predict(gold: Gold) -> Answer:
        table = features(gold)
        return Answer(boosted.predict(table), boosted.densities(table, GRID))

    return predict


def flexzboost(train: Gold, calibration: Gold, _work: Path) -> Predict:
    """FlexZBoost on all apertures, tuned as RAIL's stage does, but on the calibration split."""
    from flexcode import FlexCodeModel
    from flexcode.regression_models import XGBoost

    settings = {"max_depth": DEPTH, "objective": "reg:squarederror", "n_jobs": 1}
    with one_job():
        model = FlexCodeModel(XGBoost, BASES, "cosine", 0.0, HIGHEST, settings)
        model.fit(features(train), train.redshift)
        tuning = calibration.select(slice(TUNED_ON))
        table, z = features(tuning), tuning.redshift
        model.tune(table, z)
        for name, choices in (("bump_threshold", BUMPS), ("sharpen_alpha", SHARPENINGS)):
            loss = []
            for choice in choices:
                setattr(model, name, float(choice))
                loss.append(on_grid(*model.predict(table, 301)).cde_loss(z))
            setattr(model, name, float(choices[int(np.argmin(loss))]))

    def densities(gold: Gold) -> Densities:
        with one_job():
            return on_grid(*model.predict(features(gold), 301))

    return estimated(densities, calibration)


def flexzboost_rail(train: Gold, calibration: Gold, _work: Path) -> Predict:
    """RAIL's stage, which tunes on a quarter of what it learns from and learns again from all."""
    from rail.estimation.algos.flexzboost import FlexZBoostEstimator, FlexZBoostInformer

    def learn(aperture: int) -> Callable[[Gold], Densities]:
        columns = rail_columns(train)
        settings = {"max_depth": DEPTH, "objective": "reg:squarederror", "n_jobs": 1}
        with one_job():
            informer = FlexZBoostInformer.make_stage(
                **columns, name=f"inform_{aperture}", output_mode="return", regression_params=settings
            )
            model = informer.inform(rail_table(train, aperture)).data

        def densities(gold: Gold) -> Densities:
            with one_job():
                stage = FlexZBoostEstimator.make_stage(
                    **columns, name=f"estimate_{aperture}", output_mode="return", model=model, chunk_size=max(len(gold), 1)
                )
                found = stage.estimate(rail_table(gold, aperture)).data
            return Densities.normalised(GRID, found.pdf(GRID))

        return densities

    return best_aperture(learn, calibration)


def bpz(train: Gold, calibration: Gold, work: Path) -> Predict:
    """RAIL's stage of BPZ; what is learned are zero points and which aperture serves best."""
    from rail.estimation.algos.bpz_lite import BPZliteEstimator, BPZliteInformer

    folder, counts = templates(work / "bpz")
    bands = [f"DC2LSST_{band}" for band in train.bands]
    shared = {"bpz_ref_data_path": str(folder), "spectra_file": "templates.list"}

    def learn(aperture: int) -> Callable[[Gold], Densities]:
        columns = rail_columns(train) | shared | {"output_mode": "return"}
        informer = BPZliteInformer.make_stage(**columns, name=f"bpz_inform_{aperture}", nt_array=counts, override_file_offsets=True)
        columns |= {"model": informer.inform(rail_table(train.select(slice(10)), aperture)).data, "filter_list": bands}
        columns |= {"madau_flag": "yes", "zp_errors": [ZERO_POINT_ERROR] * len(bands), "override_file_offsets": True}
        light = BPZliteEstimator.make_stage(**columns, name=f"bpz_light_{aperture}")._load_templates()
        offsets = zero_points(light, calibration, aperture)

        def densities(gold: Gold) -> Densities:
            stage = BPZliteEstimator.make_stage(**columns, name=f"bpz_{aperture}", chunk_size=max(len(gold), 1), zp_offsets=offsets)
            found = stage.estimate(rail_table(gold, aperture)).data
            return Densities.normalised(GRID, found.pdf(GRID))

        return densities

    return best_aperture(learn, calibration.select(slice(TUNED_ON // 4)))


def zero_points(light: Floats, gold: Gold, aperture: int, rounds: int = 3) -> list[float]:
    """Offsets (C,) mag that take bright galaxies of known redshift to their best templates, light (Z, T, C), relative to i.

    Circles that follow each band's PSF lose more of a galaxy where the PSF is sharp, so that measured colours are up to 0.05 mag
    too blue. The medians are taken over galaxies with i < `ZERO_POINTS_FROM`, as photometric surveys do it with spectra.
    """
    bright = gold.select(gold.magnitude < ZERO_POINTS_FROM)
    flux, error = in_aperture(bright, aperture)
    weight = 1 / (error**2 + (ZERO_POINT_ERROR * flux) ** 2)
    model = light[np.rint(bright.redshift / HIGHEST * (len(light) - 1)).astype(np.int64)]
    offsets = np.zeros(flux.shape[1])
    for _ in range(rounds):
        clear = flux * 10 ** (0.4 * offsets)
        fitted = np.einsum("nc,ntc->nt", weight * clear, model), np.einsum("nc,ntc->nt", weight, model**2)
        scaled = model * (fitted[0] / np.maximum(fitted[1], np.finfo(np.float64).tiny))[..., None]
        best = np.einsum("nc,ntc->nt", weight, (clear[:, None] - scaled) ** 2).argmin(axis=1)
        chosen = scaled[np.arange(len(clear)), best]
        with np.errstate(divide="ignore", invalid="ignore"):
            step = -2.5 * np.log10(np.nanmedian(np.where(chosen > 0, clear / chosen, np.nan), axis=0))
        offsets += step - step[gold.bands.index("i")]
    return [float(offset) for offset in offsets]


CODES: Mapping[str, Learn] = {
    "gradient_boosting": gradient_boosting,
    "flexzboost": flexzboost,
    "flexzboost_rail": flexzboost_rail,
    "bpz": bpz,
}


def best_aperture(
    learn: Callable[[int], Callable[[Gold], Densities]], calibration: Gold, apertures: tuple[int, ...] = (1, 2, 3)
) -> Predict:
    """Learn in each of some apertures and keep the one, and the kind of redshift, of the least scatter on the calibration split."""
    sample = calibration.select(slice(TUNED_ON))
    found = {aperture: learn(aperture) for aperture in apertures}
    scatter = {aperture: least_scatter(densities(sample), sample.redshift)[0] for aperture, densities in found.items()}
    return estimated(found[min(scatter, key=lambda aperture: scatter[aperture])], sample)


def estimated(densities: Callable[[Gold], Densities], calibration: Gold) -> Predict:
    """Redshifts from densities: modes or medians, whichever scatter less on the calibration split."""
    sample = calibration.select(slice(TUNED_ON))
    _, kind = least_scatter(densities(sample), sample.redshift)

    def predict(gold: Gold) -> Answer:
        found = densities(gold)
        return Answer(getattr(found, kind)(), found)

    return predict


def least_scatter(densities: Densities, truth: Floats) -> tuple[float, str]:
    """The least sigma_IQR of modes and medians, and whose it is."""
    scatter = {kind: float(sigma_iqr(residual(getattr(densities, kind)(), truth, "lsst"))) for kind in ("mode", "median")}
    kind = min(scatter, key=lambda name: scatter[name])
    return scatter[kind], kind


def on_grid(values: Floats, nodes: Floats) -> Densities:
    """Densities (N, M) on their own redshifts (M,) brought to `GRID` and normalised."""
    at = np.ravel(nodes)
    place = np.interp(GRID, at, np.arange(at.size))
    left = np.minimum(place.astype(np.int64), at.size - 2)
    step = place - left
    table = (1 - step) * values[:, left] + step * values[:, left + 1]
    return Densities.normalised(GRID, np.where((at[0] > GRID) | (at[-1] + 1e-9 < GRID), 0.0, table))


def in_aperture(gold: Gold, aperture: int) -> tuple[Floats, Floats]:
    """Fluxes and errors (N, C) with the colours of one aperture and the brightness in i of the largest, which priors go by."""
    i = gold.bands.index("i")
    inside, whole = gold.flux[:, i, aperture], gold.flux[:, i, -1]
    scale = np.where(inside > 0, (whole / np.where(inside > 0, inside, 1)).clip(1, LARGEST_SCALE), 1)[:, None]
    return gold.flux[..., aperture] * scale, gold.error[..., aperture] * scale


def rail_columns(gold: Gold) -> dict[str, Any]:
    """What RAIL's stages are told of the table."""
    return {
        "bands": [f"mag_{band}" for band in gold.bands],
        "err_bands": [f"mag_err_{band}" for band in gold.bands],
        "ref_band": "mag_i",
        "redshift_col": "redshift",
        "hdf5_groupname": "",
        "zmin": 0.0,
        "zmax": HIGHEST,
        "nzbins": 301,
        "mag_limits": {f"mag_{band}": 30.0 for band in gold.bands},
    }


def rail_table(gold: Gold, aperture: int) -> dict[str, Floats]:
    """Magnitudes, errors and redshifts as RAIL takes them; non-detections at their limit.

    Not as BPZ's own 99, whose limit RAIL's stage cuts at 20 mag, so that the band would count as not observed.
    """
    magnitude, error, _ = magnitudes(*in_aperture(gold, aperture))
    table = {"redshift": gold.redshift.copy()}
    for column, band in enumerate(gold.bands):
        table |= {f"mag_{band}": magnitude[:, column].copy(), f"mag_err_{band}": error[:, column].copy()}
    return table


def templates(folder: Path) -> tuple[Path, list[int]]:
    """BPZ's folder of filters, spectra and what it computes of them, and how many templates are early, spiral, starburst."""
    sequence = Path(str(example_data("estimation_data", "data", "SED", "COSMOS_seds.list")))
    given = sequence.parents[1]
    for name in ("SED", "FILTER", "AB"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for curve in (given / "FILTER").glob("DC2LSST_*.res"):
        wavelength, passed = np.loadtxt(curve, unpack=True)
        open_at = np.flatnonzero(passed > 1e-4 * passed.max())[[0, -1]]
        kept = slice(max(open_at[0] - FILTER_STEP, 0), open_at[1] + FILTER_STEP, FILTER_STEP)
        np.savetxt(folder / "FILTER" / curve.name, np.stack([wavelength[kept], passed[kept]], 1), fmt="%.6g")
    names = sequence.read_text().split()
    groups: list[list[str]] = [[], [], []]
    for number, name in enumerate(names):
        group = groups[(number >= EARLY) + (number >= EARLY + SPIRAL)]
        shutil.copy(given / "SED" / name, folder / "SED")
        group.append(name)
        if number >= DUSTY_FROM:
            wavelength, light = np.loadtxt(given / "SED" / name, usecols=(0, 1), unpack=True)
            for ebv in DUST:
                dusty = f"{name.removesuffix('.sed')}_dust{100 * ebv:.0f}.sed"
                np.savetxt(folder / "SED" / dusty, np.stack([wavelength, light * 10 ** (-0.4 * ebv * calzetti(wavelength))], 1))
                group.append(dusty)
    (folder / "SED" / "templates.list").write_text("\n".join(name for group in groups for name in group) + "\n")
    return folder, [len(group) for group in groups]


@contextmanager
def one_job() -> Iterator[None]:
    """What flexcode asks joblib for, all cores, is one here."""
    import joblib

    with joblib.parallel_config(backend="sequential"):
        yield
