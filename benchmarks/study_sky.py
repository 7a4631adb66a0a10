"""The data sets of the studies, and an ensemble's answers about their gold galaxies.

Glossary: G gold galaxies of a split, S stars above the gold limit, K components.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from benchmarks.gold import BORDER_PX
from benchmarks.looking import RADIUS_ARCSEC
from benchmarks.reference_sky import GOLD_LIMIT
from benchmarks.study_list import BLUR_PIXELS, Sky
from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.pixels import read_pixels
from deepdisc_ops.data.records import Record
from deepdisc_ops.data.reference import check_reference, load_reference
from deepdisc_ops.data.simulate import simulate_dataset
from deepdisc_ops.data.store import Dataset, create_dataset, open_dataset
from deepdisc_ops.data.writer import DatasetWriter
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.photoz.calibration import Calibration
from deepdisc_ops.photoz.mixture import GaussianMixture
from deepdisc_ops.sky.dust import EbvPlane
from deepdisc_ops.sky.matching import match_on_sky

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Progress = Callable[[int, int], None]

MINI = {"train": 4, "validation": 2, "calibration": 12, "test": 6}
MINI_SIZE = 256


@dataclass(frozen=True)
class Answers:
    """Of G + S sources of a split, in the order of their truth: redshift (0 of stars) and magnitude, each (G + S,).

    star and found (G + S,) bool; weights, means, sigmas (G + S, K), zero where a source was not found.
    """

    redshift: Floats
    magnitude: Floats
    star: Bools
    found: Bools
    weights: Floats
    means: Floats
    sigmas: Floats

    def mixture(self, where: Bools, calibration: Calibration | None = None) -> GaussianMixture:
        """The densities of the sources at ``where``, all of them found, recalibrated if that is given."""
        parts = self.weights[where], self.means[where], self.sigmas[where]
        if calibration is not None:
            parts = calibration.apply(*parts, np.full(int(where.sum()), np.nan))
        return GaussianMixture.from_arrays(*parts)

    def select(self, index: NDArray[np.int64]) -> Answers:
        """The sources at ``index``."""
        return Answers(*(getattr(self, field.name)[index] for field in fields(self)))

    def save(self, file: Path) -> None:
        """Into a .npz file, whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{file.name}")
        with unfinished.open("wb") as stream:
            np.savez_compressed(stream, **{field.name: getattr(self, field.name) for field in fields(self)})
        unfinished.replace(file)

    @classmethod
    def load(cls, file: Path) -> Answers:
        """What `save` wrote."""
        with np.load(file) as columns:
            return cls(*(columns[field.name] for field in fields(cls)))


def data_set(sky: Sky, given: Path | None, work: Path, *, quick: bool, processes: int, progress: Progress) -> Dataset:
    """The data set of a variant, made unless it is there; ``given`` is lsst_reference where the user has it."""
    if given is not None and sky == "as_is" and not quick:
        return open_dataset(given)
    folder = work / f"{'mini' if quick else 'sky'}_{sky}"
    if sky == "blurred":
        return blurred(data_set("as_is", given, work, quick=quick, processes=processes, progress=progress), folder, progress)
    if quick:
        settings = SkySettings(years=1.0) if sky == "one_year" else SkySettings()
        return simulate_dataset(settings, folder, counts=MINI, size=MINI_SIZE, seed=11, packed=True, progress=progress)
    check_reference("lsst_reference")
    frozen = load_reference("lsst_reference")
    changes = {"years": 1.0} if sky == "one_year" else {}
    return simulate_dataset(
        {split: frozen.sky_settings(split).model_copy(update=changes) for split in frozen.splits},
        folder,
        counts={split: part.scenes for split, part in frozen.splits.items()},
        size=frozen.size,
        seed=frozen.seed,
        processes=processes,
        packed=True,
        progress=progress,
    )


def blurred(dataset: Dataset, out: Path, progress: Progress) -> Dataset:
    """A copy whose images are convolved with a Gaussian; the truth stays."""
    records = dataset.records()
    made_by = {"blurred": dataset.settings, "sigma_pixels": BLUR_PIXELS}
    with DatasetWriter(create_dataset(out, dataset.info, made_by), packed=True) as writer:
        keys = records.keys.tolist()
        for done, key in enumerate(keys, start=1):
            if key not in writer:
                record = records[done - 1]
                image = read_pixels(record)
                writer.add(record, replace(image, data=gaussian_filter(image.data, (0, BLUR_PIXELS, BLUR_PIXELS))))
            progress(done, len(keys))
    return open_dataset(out)


def ask(ensemble: Ensemble, dataset: Dataset, split: str, progress: Progress) -> Answers:
    """What an ensemble says of the galaxies and stars above the gold limit in a split, clear of the border."""
    records = dataset.records(split)
    parts = []
    for number in range(len(records)):
        parts.append(_ask(ensemble, records[number], dataset.info.pixel_scale))
        progress(number + 1, len(records))
    return Answers(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Answers)))


def _ask(ensemble: Ensemble, record: Record, pixel_scale: float) -> Answers:
    image, truth = read_pixels(record, ensemble.bands, with_wcs=False), record.objects
    found = ensemble.predict(image.data, EbvPlane.constant(float(np.median(truth.ebv))), image.mask)
    degrees = pixel_scale / 3600
    matches = match_on_sky(degrees * truth.x, degrees * truth.y, *(degrees * found.centres.T), RADIUS_ARCSEC)
    partner = np.full(len(truth), -1)
    partner[matches.index1] = matches.index2
    sides = ((truth.x, record.width), (truth.y, record.height))
    whole = np.logical_and.reduce([(axis >= BORDER_PX) & (axis <= side - 1 - BORDER_PX) for axis, side in sides])
    chosen = whole & (truth.mag < GOLD_LIMIT) & np.isfinite(truth.redshift)
    mine = partner[chosen]
    there = mine >= 0
    mixture: Sequence[Floats] = [np.zeros((len(mine), ensemble.components)) for _ in range(3)]
    for table, answers in zip(mixture, (found.weights, found.means, found.sigmas), strict=True):
        table[there] = answers[mine[there]]
    star = truth.classes[chosen] != 0
    redshift = np.where(star, 0.0, truth.redshift[chosen].astype(np.float64))
    return Answers(redshift, truth.mag[chosen].astype(np.float64), star, there, *mixture)
