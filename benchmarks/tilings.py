"""One sky cut into windows in two ways: ``python -m benchmarks.tilings [--skies N] [--quick]``.

Simulated LSST skies of 2048 pixels, seen by a committed ensemble in windows of 512 pixels that share 64, in windows of 384 that
share 96, and in windows of 448 that share half, where every object lies at least 112 pixels deep (the reference):

- objects of the two that are matched one-to-one within 0.5", and abs(dz)/sigma of the medians of their redshifts;
- objects by their distance from the nearest border between the cores of windows, against an even density in a chi-square of
  Poisson errors; what there are within 16 pixels of one, over those expected from all; and the same places of the same sky in the
  reference, which galaxies' own clustering cannot disturb: only objects that one of the two lacks count, with the error of their
  number.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from scipy import stats

from benchmarks import record
from benchmarks.mosaic import MODEL
from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.scenes import Scene, simulate_scene
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.inference.journal import Journal
from deepdisc_ops.inference.mosaic import LocalLooker, Search, Survey
from deepdisc_ops.photoz.mixture import GaussianMixture, summarise
from deepdisc_ops.sky.detections import Detections
from deepdisc_ops.sky.dust import ebv_source
from deepdisc_ops.sky.images import Mosaic
from deepdisc_ops.sky.matching import match_in_plane
from deepdisc_ops.sky.planes import MemoryPixels, Plane

TILINGS = ((512, 64), (384, 96))
REFERENCE = (448, 224)
RADIUS_PX = 2.5
NEAR_PX = 16
STEPS_PX = (0, 8, NEAR_PX, 32, 64, np.inf)
console = Console(width=110, record=True)


@dataclass(frozen=True)
class Looked:
    """Objects of a sky in one tiling, with the medians and standard deviations of their redshifts (N,)."""

    survey: Survey
    objects: Detections
    z: NDArray[np.float64]
    sigma: NDArray[np.float64]

    @property
    def to_seam(self) -> NDArray[np.float64]:
        """Distance (N,) px of the centres from the nearest border between cores."""
        x, y = (self.objects.centres + 0.5).T
        return np.minimum(distance(self.survey, 0, x), distance(self.survey, 1, y))


def in_memory(scene: Scene, bands: tuple[str, ...]) -> Mosaic:
    """The scene as a mosaic of ``bands``."""
    planes = [
        Plane(band, Path("memory"), 0, 0, plane.shape, scene.wcs, 1.0, MemoryPixels(np.asarray(plane, np.float32)))
        for band, plane in zip(scene.survey.bands, scene.image, strict=True)
    ]
    return Mosaic(planes, scene.survey.pixel_scale).select(bands)


def look(
    mosaic: Mosaic, ensemble: Ensemble, tiling: tuple[int, int], journal: Journal | None = None, *, second_pass: bool = True
) -> Looked:
    """Search a mosaic in windows of (side, overlap) pixels."""
    survey = Survey(mosaic.width, mosaic.height, *tiling)
    looker = LocalLooker(mosaic, lambda image, ebv: ensemble.predict(image.data, ebv, image.mask), ebv_source("0.03"))
    objects = Detections.concatenate(list(Search(survey, looker, journal, second_pass=second_pass)))
    summary = summarise(GaussianMixture.from_arrays(objects.weights, objects.means, objects.sigmas))
    return Looked(survey, objects, np.asarray(summary["z_median"], np.float64), np.asarray(summary["z_std"], np.float64))


def distance(survey: Survey, axis: int, positions: NDArray[np.floating]) -> NDArray[np.float64]:
    """Of positions along x (axis 0) or y (1) from the nearest border between cores, pixels."""
    seams = np.array(sorted({tile.core[axis] for tile in survey.tiles()} - {0}))
    return np.asarray(np.abs(positions[:, None] - seams).min(axis=1), np.float64)


def agreement(one: Looked, other: Looked) -> dict[str, float]:
    """Counts of what both tilings found, and the median of abs(dz)/sigma of it, of all and near a seam of the first."""
    i, j = match_in_plane(one.objects.centres, other.objects.centres, RADIUS_PX)
    apart = np.abs(one.z[i] - other.z[j]) / one.sigma[i]
    near = one.to_seam[i] < NEAR_PX
    return {
        "objects": len(one.z),
        "objects_of_the_other": len(other.z),
        "matched": len(i),
        "median_dz_over_sigma": float(np.median(apart)),
        "median_dz_over_sigma_near_seams": float(np.median(apart[near])),
        "p95_dz_over_sigma": float(np.percentile(apart, 95)),
    }


def area_shares(survey: Survey) -> NDArray[np.float64]:
    """Share of the pixels that lie in each step of `STEPS_PX` from a seam."""
    x, y = (distance(survey, axis, np.arange(side) + 0.5) for axis, side in ((0, survey.width), (1, survey.height)))
    counts, _ = np.histogram(np.minimum(x[None], y[:, None]), STEPS_PX)
    return np.asarray(counts / counts.sum())


def near_seams(skies: list[tuple[Looked, Looked]]) -> dict[str, Any]:
    """Density of objects by distance from seams, over all ``skies``: of a tiling, and its reference at the same places."""
    found, expected, more, less, at_reference = np.zeros(len(STEPS_PX) - 1), np.zeros(len(STEPS_PX) - 1), 0, 0, 0
    for tiling, reference in skies:
        found += np.histogram(tiling.to_seam, STEPS_PX)[0]
        expected += len(tiling.z) * area_shares(tiling.survey)
        i, j = match_in_plane(tiling.objects.centres, reference.objects.centres, RADIUS_PX)
        there = Looked(tiling.survey, reference.objects, reference.z, reference.sigma).to_seam < NEAR_PX
        here = tiling.to_seam < NEAR_PX
        more += int(here.sum() - here[i].sum())
        less += int(there.sum() - there[j].sum())
        at_reference += int(there.sum())
    chi_square = float(((found - expected) ** 2 / expected).sum())
    close = slice(0, STEPS_PX.index(NEAR_PX))
    near, even = found[close].sum(), expected[close].sum()
    return {
        "steps_px": [step if np.isfinite(step) else None for step in STEPS_PX],
        "objects": found.tolist(),
        "expected": expected.tolist(),
        "chi_square": chi_square,
        "degrees_of_freedom": len(found) - 1,
        "p_value": float(stats.chi2.sf(chi_square, len(found) - 1)),
        "near_over_even": float(near / even),
        "error": float(math.sqrt(near) / even),
        "near_over_reference": 1 + (more - less) / at_reference,
        "error_of_that": math.sqrt(more + less) / at_reference,
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a sky of 1024 pixels; nothing is kept")
    parser.add_argument("--skies", type=int, default=4)
    arguments = parser.parse_args()
    side, skies = (1024, 1) if arguments.quick else (2048, arguments.skies)
    ensemble = Ensemble.load(MODEL)
    looked: list[list[Looked]] = []
    for seed in range(skies):
        mosaic = in_memory(simulate_scene(SkySettings(), size=side, seed=77 + seed), ensemble.bands)
        looked.append([look(mosaic, ensemble, tiling) for tiling in (*TILINGS, REFERENCE)])
        console.print(f"sky {seed}: {[len(one.z) for one in looked[-1]]} objects")
    agreements = [agreement(*tilings[:2]) for tilings in looked]
    matched = sum(one["matched"] for one in agreements)
    most = sum(max(one["objects"], one["objects_of_the_other"]) for one in agreements)
    names = [f"{window}_{overlap}" for window, overlap in TILINGS]
    seams = {name: near_seams([(tilings[k], tilings[-1]) for tilings in looked]) for k, name in enumerate(names)}
    ratios = {"matched_over_objects": matched / most} | {
        f"near_seams_over_even_{name}": seams[name]["near_over_even"] for name in names
    }
    ratios |= {f"near_seams_over_reference_{name}": seams[name]["near_over_reference"] for name in names}
    figures = {
        "median_dz_over_sigma": float(np.mean([one["median_dz_over_sigma"] for one in agreements])),
        "skies": agreements,
        "seams": seams,
    }
    console.print(figures, ratios)
    if not arguments.quick:
        console.print(str(record.write("tilings", ratios=ratios, figures=figures, log=console.export_text().splitlines())))


if __name__ == "__main__":
    main()
