"""The recalibration of an ensemble's mixtures, learned on a split of a data set and kept in the ensemble folder.

The split should have taken no part in training nor in the choice of members: the calibration split.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from deepdisc_ops.data.loader import label
from deepdisc_ops.data.pixels import read_pixels
from deepdisc_ops.data.records import GALAXY, DatasetInfo, Record
from deepdisc_ops.data.store import open_dataset
from deepdisc_ops.errors import CatalogError, CheckpointError
from deepdisc_ops.inference.ensemble import DESCRIPTION, Ensemble, read_description
from deepdisc_ops.inference.tuning import MATCH_RADIUS_ARCSEC, Progress
from deepdisc_ops.model.weights import written_aside
from deepdisc_ops.photoz.calibration import LEAST_OBJECTS, Calibration, calibrate
from deepdisc_ops.photoz.metrics import pit_ks
from deepdisc_ops.photoz.mixture import GaussianMixture
from deepdisc_ops.sky.dust import EbvPlane
from deepdisc_ops.sky.matching import match_on_sky

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Learned:
    """A calibration, and the PIT's KS statistic (before, after) of each half of the images under that of the other half."""

    calibration: Calibration
    ks: tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Sample:
    """Gold galaxies that were found: redshift (N,), mixture (N, K), and the number (N,) of the image each is in."""

    redshift: Floats
    weights: Floats
    means: Floats
    sigmas: Floats
    image: NDArray[np.int64]

    def select(self, index: NDArray[np.bool_]) -> Sample:
        """Those at ``index``."""
        return Sample(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def ks(self, calibration: Calibration | None = None) -> float:
        """KS statistic of the PIT against uniform."""
        mixture = self.weights, self.means, self.sigmas
        if calibration is not None:
            mixture = calibration.apply(*mixture, np.full(len(self.redshift), np.nan))
        return float(pit_ks(GaussianMixture.from_arrays(*mixture).truncated_cdf(torch.from_numpy(self.redshift)).numpy()))


def learn_calibration(
    folder: Path, dataset: Path, split: str = "calibration", *, device: str = "cpu", progress: Progress | None = None
) -> Learned:
    """Learn shift, width and temperature of an ensemble folder's mixtures from the gold galaxies of a split that it finds.

    Raises `CatalogError` where there are fewer than `calibration.LEAST_OBJECTS` in either half.
    """
    ensemble, data = Ensemble.load(folder, device), open_dataset(dataset)
    ensemble.calibration = None
    records = data.records(split)
    parts = []
    for number, record in enumerate(records):
        parts.append(_seen(ensemble, record, data.info, number))
        if progress:
            progress(number + 1, len(records))
    sample = (
        Sample(*(np.concatenate([getattr(part, name) for part in parts]) for name in Sample.__dataclass_fields__))
        if parts
        else None
    )
    odd = np.zeros(0, bool) if sample is None else sample.image % 2 == 1
    if sample is None or min(odd.sum(), (~odd).sum()) < LEAST_OBJECTS:
        raise CatalogError(
            f"{dataset} has {len(records)} images in split {split!r}, in which {len(odd)} gold galaxies were found; expected "
            f"{LEAST_OBJECTS} at least in either half of the images"
        )
    halves = [sample.select(odd == parity) for parity in (False, True)]
    learned = [_fit(half) for half in halves]
    ks = tuple((half.ks(), half.ks(learned[1 - i])) for i, half in enumerate(halves))
    return Learned(_fit(sample), (ks[0], ks[1]))


def store_calibration(folder: Path, calibration: Calibration | None) -> None:
    """Write a calibration into an ensemble folder, or take it out; the ensemble is another version of itself then."""
    description = read_description(folder)
    description.pop("calibration", None)
    if calibration is not None:
        description["calibration"] = calibration.as_dict()
    path = folder / DESCRIPTION
    try:
        with written_aside(path) as written:
            written.write_text(yaml.safe_dump(description, sort_keys=False))
    except OSError as error:
        raise CheckpointError(f"{path} could not be written ({error}); the ensemble is what it was") from None


def _fit(sample: Sample) -> Calibration:
    nowhere = np.zeros(len(sample.redshift))
    return calibrate(sample.weights, sample.means, sample.sigmas, nowhere, sample.redshift, band="any", knots=1)


def _seen(ensemble: Ensemble, record: Record, info: DatasetInfo, number: int) -> Sample:
    """The gold galaxies of one image that the ensemble finds."""
    config = ensemble.seats[0].info.config
    image, labels = read_pixels(record, ensemble.bands, with_wcs=False), label(record.objects, info, config.model, config.data)
    ebv = EbvPlane.constant(float(np.median(labels.ebv)) if len(labels.ebv) else config.data.default_ebv)
    found = ensemble.predict(image.data, ebv, image.mask)
    degrees = image.pixel_scale / 3600
    x, y = degrees * found.centres.T
    matches = match_on_sky(degrees * record.objects.x, degrees * record.objects.y, x, y, MATCH_RADIUS_ARCSEC)
    gold = np.isfinite(labels.redshift[matches.index1]) & (record.objects.classes[matches.index1] == GALAXY)
    which = matches.index2[gold]
    weights, means, sigmas = (np.asarray(part[which], np.float64) for part in (found.weights, found.means, found.sigmas))
    redshift = np.asarray(labels.redshift[matches.index1[gold]], np.float64)
    return Sample(redshift, weights, means, sigmas, np.full(len(which), number))
