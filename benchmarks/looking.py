"""An ensemble looks at the test scenes of a frozen sky, and its detections are matched with their gold galaxies.

The network sees images and E(B-V) alone. Gold galaxies are found if a detection lies within the radius, one-to-one with all true
sources. Glossary: G gold galaxies of a scene, K components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.gold import YEARS
from benchmarks.reference_sky import gold_rows
from deepdisc_ops.data.reference import ReferenceSky, reference_scene
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.photoz.calibration import Calibration
from deepdisc_ops.photoz.mixture import GaussianMixture
from deepdisc_ops.sky.dust import EbvPlane
from deepdisc_ops.sky.matching import match_on_sky

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

RADIUS_ARCSEC, WIDE_ARCSEC = 0.5, 1.0


@dataclass(frozen=True)
class Look:
    """A test scene, the folder of the ensemble that looks at it, and the number of one member of it, or None for all together."""

    sky: ReferenceSky
    index: int
    model: Path
    member: int | None = None


@dataclass(frozen=True)
class Seen:
    """What the network says of the G gold galaxies of a scene, in the catalogue's order, without its calibration.

    found, within_wide (G,) bool: whether a detection is within either radius; weights, means and sigmas (G, K), zero where a
    galaxy was not found; detections: how many there were, and how many of them match no true source, within either radius.
    """

    found: Bools
    within_wide: Bools
    weights: Floats
    means: Floats
    sigmas: Floats
    detections: int
    false: int
    false_wide: int

    @classmethod
    def together(cls, scenes: Sequence[Seen]) -> Seen:
        """All scenes as one."""
        columns = (np.concatenate([getattr(one, name) for one in scenes]) for name in ("found", "within_wide"))
        mixtures = (np.concatenate([getattr(one, name) for one in scenes]) for name in ("weights", "means", "sigmas"))
        counts = (sum(getattr(one, name) for one in scenes) for name in ("detections", "false", "false_wide"))
        return cls(*columns, *mixtures, *counts)

    def save(self, file: Path) -> None:
        """Into a .npz file, whole or not at all."""
        unfinished = file.with_name(f".{file.name}")
        with unfinished.open("wb") as stream:
            np.savez_compressed(stream, **{field.name: getattr(self, field.name) for field in fields(self)})
        unfinished.replace(file)

    @classmethod
    def load(cls, file: Path) -> Seen:
        """What `save` wrote."""
        with np.load(file) as columns:
            found = {name: columns[name] for name in columns.files}
        return cls(**{name: int(value) if value.ndim == 0 else value for name, value in found.items()})

    def mixture(self, where: Bools, calibration: Calibration | None = None) -> GaussianMixture:
        """The densities of the galaxies at ``where``, all of them found, recalibrated if that is given."""
        parts = self.weights[where], self.means[where], self.sigmas[where]
        if calibration is not None:
            parts = calibration.apply(*parts, np.full(int(where.sum()), np.nan))
        return GaussianMixture.from_arrays(*parts)


@cache
def ensemble(folder: Path, member: int | None = None) -> Ensemble:
    """The network, loaded once a process, and without its calibration."""
    whole = Ensemble.load(folder)
    seats = whole.seats if member is None else whole.seats[member : member + 1]
    return Ensemble(seats, whole.settings)


def look(task: Look) -> Seen:
    """Detect in a scene and match with its truth."""
    scene = reference_scene(task.sky, "test", task.index, years=YEARS)
    network = ensemble(task.model, task.member)
    order = [scene.survey.bands.index(band) for band in network.bands]
    ebv = float(np.median(np.asarray(scene.catalog["ebv"])))
    found = network.predict(scene.image[order], EbvPlane.constant(ebv))
    gold, catalog = gold_rows(scene), scene.catalog
    degrees = scene.survey.pixel_scale / 3600
    x, y = (degrees * np.asarray(catalog[axis], np.float64) for axis in ("x", "y"))
    x_found, y_found = degrees * found.centres.T

    def partners(radius: float) -> tuple[NDArray[np.int64], int]:
        """The detection (N,) of each true source, -1 for none, and the number of detections without one."""
        matches = match_on_sky(x, y, x_found, y_found, radius)
        partner = np.full(len(catalog), -1)
        partner[matches.index1] = matches.index2
        return partner, len(found) - len(matches.index2)

    (near, false), (wide, false_wide) = partners(RADIUS_ARCSEC), partners(WIDE_ARCSEC)
    mine = near[gold]
    there = mine >= 0
    weights, means, sigmas = (np.zeros((len(gold), network.components)) for _ in range(3))
    for table, answers in ((weights, found.weights), (means, found.means), (sigmas, found.sigmas)):
        table[there] = answers[mine[there]]
    return Seen(there, wide[gold] >= 0, weights, means, sigmas, len(found), false, false_wide)
