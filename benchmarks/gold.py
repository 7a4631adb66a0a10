"""The gold galaxies of a frozen sky as a catalogue code sees them: measured fluxes, and how blended each is.

Fluxes are those of `benchmarks.reference_sky`, table ``measured``: sums over circles of 0.35 to 2.5 FWHM of each band's PSF at the
true positions in the images, dereddened. Circles that follow the PSF hold the same share of a point's light in every band.

Glossary: N galaxies, C bands, A apertures.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.reference_sky import APERTURES, QUICK_SHARE, Task, array, counted, gold_rows, keep_table, table_stem, tables
from deepdisc_ops.data import surveys
from deepdisc_ops.data.reference import ReferenceSky, Split, reference_scene
from deepdisc_ops.data.scenes import Scene

Floats = NDArray[np.float64]

YEARS = 5.0
BORDER_PX = 5.5
"""Half of the smallest box that the network learns."""


@dataclass(frozen=True)
class Gold:
    """N gold galaxies: flux and error (N, C, A) nJy, dereddened; redshift and magnitude (N,), the latter as seen."""

    bands: tuple[str, ...]
    flux: Floats
    error: Floats
    redshift: Floats
    magnitude: Floats

    def __len__(self) -> int:
        return len(self.redshift)

    def select(self, index: NDArray[np.generic] | slice) -> Gold:
        """Those at ``index``."""
        return Gold(self.bands, *(getattr(self, name)[index] for name in ("flux", "error", "redshift", "magnitude")))


@dataclass(frozen=True)
class Traits:
    """What is true of the gold galaxies of the test split, each (N,): blendedness, and whether they are clear of the border."""

    blendedness: Floats
    whole: NDArray[np.bool_]


def scene_count(sky: ReferenceSky, split: Split, *, quick: bool) -> int:
    """Scenes of a split that are used."""
    scenes = sky.splits[split].scenes
    return max(2, int(scenes * QUICK_SHARE)) if quick else scenes


def read_gold(sky: ReferenceSky, split: Split, work: Path, *, quick: bool, pool: Executor) -> Gold:
    """The gold galaxies of a split, measured unless the work folder has them."""
    _, file = tables(sky, YEARS, split, scene_count(sky, split, quick=quick), work, keep=False, pool=pool)
    table, bands = pq.read_table(file), surveys.survey(sky.settings.survey).bands
    shape = (len(bands), len(APERTURES))
    flux, error = (array(table, f"measured_{name}", *shape) for name in ("flux", "error"))
    return Gold(bands, flux, error, *(np.asarray(table[name], np.float64) for name in ("redshift", "mag")))


def read_traits(sky: ReferenceSky, work: Path, *, quick: bool, pool: Executor) -> Traits:
    """The traits of the gold galaxies of the test split, in their order, drawn anew unless the work folder has them."""
    scenes = scene_count(sky, "test", quick=quick)
    file = work / f"{table_stem(sky, YEARS, 'test', scenes)}_traits.parquet"
    if not file.is_file():
        tasks = [Task(sky, "test", index, YEARS, None) for index in range(scenes)]
        keep_table(pa.concat_tables(list(counted(pool.map(scene_traits, tasks), scenes, f"{sky.name}, traits"))), file)
    table = pq.read_table(file)
    return Traits(np.asarray(table["blendedness"], np.float64), np.asarray(table["whole"]).astype(bool))


def scene_traits(task: Task) -> pa.Table:
    """Blendedness and wholeness of a scene's gold galaxies; NaN for one too faint to be in the truth."""
    scene = reference_scene(task.sky, task.split, task.index, years=task.years)
    gold = gold_rows(scene)
    blendedness = np.full(len(scene.catalog), np.nan)
    blendedness[np.asarray(scene.truth["id"])] = np.asarray(scene.truth["blendedness"], np.float64)
    return pa.table({"blendedness": blendedness[gold], "whole": clear_of_border(scene)[gold]})


def clear_of_border(scene: Scene) -> NDArray[np.bool_]:
    """Whether each source of the catalogue is as far from the border as half of a box."""
    height, width = scene.image.shape[1:]
    x, y = (np.asarray(scene.catalog[axis], np.float64) for axis in ("x", "y"))
    return (x >= BORDER_PX) & (x <= width - 1 - BORDER_PX) & (y >= BORDER_PX) & (y <= height - 1 - BORDER_PX)
