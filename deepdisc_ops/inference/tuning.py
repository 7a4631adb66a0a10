"""Thresholds of a trained member, chosen on a validation set: how sure a detection has to be, how much two may overlap.

Training needs neither, so both can be chosen after it, and the choice is kept in the member. What is maximised is

    F1 = 2 c p / (c + p),

c the completeness of gold galaxies (those with a redshift that the redshift head is trained for, and with the smallest box clear
of the image's border) and p the purity of all
detections (the share that are objects of the truth), under least values of either where they are given. An image goes through
the network once: a non-maximum suppression takes the best boxes first, so a higher score threshold only cuts its answer short.
Glossary: N true and M found objects of an image, I overlaps, S scores that are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.config import TrainingConfig, validate
from deepdisc_ops.data.loader import label
from deepdisc_ops.data.pixels import read_pixels
from deepdisc_ops.data.records import DatasetInfo, Record
from deepdisc_ops.data.store import open_dataset
from deepdisc_ops.errors import CatalogError, CheckpointError, ConfigError
from deepdisc_ops.inference.engine import Member
from deepdisc_ops.model.weights import DESCRIPTION, read_info, write_info, written_aside
from deepdisc_ops.sky.matching import match_on_sky

SCORES = (*(round(0.05 * i, 2) for i in range(1, 19)), 0.92, 0.94, 0.96, 0.98)
OVERLAPS = (0.3, 0.4, 0.5, 0.6, 0.7)
MATCH_RADIUS_ARCSEC = 0.5
"""As in the validation of training."""

Counts = NDArray[np.int64]
"""Gold galaxies, those of them found, objects found, those of them true."""
Progress = Callable[[int, int], None]
"""Called with images done and images in all."""


@dataclass(frozen=True)
class Trial:
    """Two thresholds and what they give: completeness of gold galaxies, purity of all detections, and F1 of both."""

    score_threshold: float
    nms_threshold: float
    completeness: float
    purity: float

    @property
    def f1(self) -> float:
        """Harmonic mean of completeness and purity."""
        total = self.completeness + self.purity
        return 2 * self.completeness * self.purity / total if total else 0.0


@dataclass(frozen=True)
class Tuning:
    """The best trial, that of the thresholds the member had, all others, and the number of gold galaxies they rest on."""

    best: Trial
    before: Trial
    trials: tuple[Trial, ...]
    gold: int


def tune_thresholds(
    member_folder: Path,
    dataset: Path,
    split: str = "validation",
    *,
    min_completeness: float = 0.0,
    min_purity: float = 0.0,
    max_overlap: float = 1.0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Tuning:
    """The thresholds with the highest F1 on a split of a data set among those with at least the given completeness and purity.

    Overlaps above ``max_overlap``, with which an object is more often found twice, are not chosen.
    Raises `ConfigError` where no thresholds reach them, `CatalogError` where the split has no gold galaxy. Nothing is written:
    see `store`.
    """
    member, data = Member.load(member_folder, device), open_dataset(dataset)
    records, now = data.records(split), member.config.inference
    scores = np.unique([*SCORES, now.score_threshold])
    overlaps = np.unique([*OVERLAPS, now.nms_threshold])
    counts = np.zeros((len(overlaps), len(scores), 4), np.int64)
    for done, record in enumerate(records, start=1):
        counts += count(member, record, data.info, overlaps, scores)
        if progress:
            progress(done, len(records))
    gold = int(counts[0, 0, 0])
    if not gold:
        raise CatalogError(f"{dataset} has {len(records)} images in split {split!r} and no gold galaxy there; name another split")
    trials = [_trial(scores[s], overlaps[i], counts[i, s]) for i in range(len(overlaps)) for s in range(len(scores))]
    before = next(t for t in trials if (t.score_threshold, t.nms_threshold) == (now.score_threshold, now.nms_threshold))
    allowed = [trial for trial in trials if trial.nms_threshold <= max_overlap]
    if not allowed:
        raise ConfigError(f"no overlap up to {max_overlap:g} is tried; the least is {overlaps.min():g}")
    return Tuning(choose(allowed, min_completeness, min_purity), before, tuple(trials), gold)


def choose(trials: Sequence[Trial], min_completeness: float = 0.0, min_purity: float = 0.0) -> Trial:
    """The trial of highest F1 that is complete and pure enough; of equal ones the surest, then that with the least overlap."""
    enough = [t for t in trials if t.completeness >= min_completeness and t.purity >= min_purity]
    if not enough:
        nearest = max(trials, key=lambda t: min(t.completeness - min_completeness, t.purity - min_purity))
        raise ConfigError(
            f"no thresholds give completeness {min_completeness:g} and purity {min_purity:g} at once; the nearest, score "
            f"{nearest.score_threshold:g} and overlap {nearest.nms_threshold:g}, give {nearest.completeness:.3f} and "
            f"{nearest.purity:.3f}; ask for less, or train further"
        )
    return max(enough, key=lambda t: (t.f1, t.score_threshold, -t.nms_threshold))


def store(member_folder: Path, chosen: Trial) -> None:
    """Make ``chosen`` the thresholds of a member, and keep what they gave among its metrics; its weights stay as they are."""
    info = read_info(member_folder)
    tree = info.config.model_dump(mode="json")
    tree["inference"] |= {"score_threshold": chosen.score_threshold, "nms_threshold": chosen.nms_threshold}
    config = validate(TrainingConfig, tree, str(member_folder / DESCRIPTION))
    found = {"tuned_completeness": chosen.completeness, "tuned_purity": chosen.purity, "tuned_f1": chosen.f1}
    path = member_folder / DESCRIPTION
    try:
        with written_aside(path) as written:
            write_info(written, replace(info, config=config, metrics=info.metrics | found))
    except OSError as error:
        raise CheckpointError(f"{path} could not be written ({error}); the thresholds are what they were") from None


def count(member: Member, record: Record, info: DatasetInfo, overlaps: NDArray[np.float64], scores: NDArray[np.float64]) -> Counts:
    """`Counts` of one image (I, S, 4) for every overlap and score."""
    config = member.config
    image = read_pixels(record, config.model.bands, with_wcs=False)
    gold = np.isfinite(label(record.objects, info, config.model, config.data).redshift) & _whole(record, config.data.min_box / 2)
    degrees = image.pixel_scale / 3600
    counts = np.zeros((len(overlaps), len(scores), 4), np.int64)
    for i, found in enumerate(member.at_thresholds(image.data, float(scores.min()), [float(o) for o in overlaps])):
        boxes, score = found
        x, y = degrees * ((boxes[:, :2] + boxes[:, 2:]) / 2 - 0.5).T
        for s, least in enumerate(scores):
            sure = score > least
            matches = match_on_sky(degrees * record.objects.x, degrees * record.objects.y, x[sure], y[sure], MATCH_RADIUS_ARCSEC)
            counts[i, s] = gold.sum(), gold[matches.index1].sum(), sure.sum(), len(matches)
    return counts


def _whole(record: Record, margin: float) -> NDArray[np.bool_]:
    """Objects (N,) at least ``margin`` pixels from the image's border, which cuts the boxes of the others."""
    far = [
        (axis >= margin) & (axis <= size - 1 - margin)
        for axis, size in ((record.objects.x, record.width), (record.objects.y, record.height))
    ]
    return np.asarray(far[0] & far[1])


def _trial(score: float, overlap: float, counts: Counts) -> Trial:
    gold, gold_found, found, true = (int(n) for n in counts)
    return Trial(float(score), float(overlap), gold_found / gold, true / found if found else 0.0)
