"""Simulated data sets: many scenes, each with a seed and a place on the sky of its own, made by any number of processes.

The settings are kept in dataset.yaml; scenes that are there are kept, so that an interrupted run goes on where it stopped and
gives what one without a break would have given.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepdisc_ops.config import SkySettings
from deepdisc_ops.data import surveys
from deepdisc_ops.data.records import SPLITS, DatasetInfo, Record
from deepdisc_ops.data.scenes import DEFAULT_CENTRE, Scene, scene_record, simulate_scene, write_scene
from deepdisc_ops.data.store import Dataset, create_dataset, open_dataset
from deepdisc_ops.data.surveys import Survey
from deepdisc_ops.data.writer import DatasetWriter
from deepdisc_ops.errors import CatalogError, ConfigError
from deepdisc_ops.sky.images import SkyImage, open_mosaic

__all__ = [
    "DEFAULT_CENTRE",
    "Scene",
    "SceneTask",
    "make_scene",
    "scene_centre",
    "scene_record",
    "scene_seed",
    "simulate_dataset",
    "simulate_scene",
    "write_scene",
]

log = logging.getLogger(__name__)

IMAGES = "images"


@dataclass(frozen=True)
class SceneTask:
    """One scene of a dataset, to be made by any process; packed: its pixels are handed back, not left in the file."""

    settings: SkySettings
    path: Path
    split: str
    size: int
    seed: int
    centre: tuple[float, float]
    packed: bool


def scene_seed(dataset_seed: int, split: str, index: int) -> int:
    """Seed of one scene; splits and scenes never share one, and none depends on how many there are."""
    state = np.random.SeedSequence(dataset_seed, spawn_key=(SPLITS.index(split), index)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def scene_centre(seed: int) -> tuple[float, float]:
    """Where on the sky the scene of a seed lies: ra, dec in degrees."""
    rng = np.random.default_rng([seed, 1])
    return round(float(rng.uniform(0, 360)), 4), round(float(rng.uniform(-60, 10)), 4)


def simulate_dataset(
    settings: SkySettings | Mapping[str, SkySettings],
    out: Path,
    *,
    counts: Mapping[str, int],
    size: int = 256,
    seed: int = 0,
    processes: int = 1,
    packed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Simulate a training set of ``counts`` scenes per split, of ``size`` pixels a side, into the folder ``out``.

    The scenes lie as FITS in OUT/images, or with ``packed`` their pixels and truth are in the data set alone. Settings may be
    given split by split, all for one survey. Counts may grow later; other settings in the same folder are a `ConfigError`.
    processes 0 takes all processors; progress is called with (scenes done, scenes in all).
    """
    unknown = [split for split in counts if split not in SPLITS]
    if unknown:
        raise ConfigError(f"unknown split {', '.join(map(repr, unknown))}, expected some of {', '.join(SPLITS)}")
    by_split = dict(settings) if isinstance(settings, Mapping) else dict.fromkeys(SPLITS, settings)
    survey = _one_survey(by_split, counts)
    info = DatasetInfo(survey.name, survey.bands, survey.pixel_scale, survey.gold_band, int(seed))
    sky = {split: by_split[split].model_dump(mode="json") for split in SPLITS if split in by_split}
    made_by = {"size": int(size), "packed": packed, "sky": sky if isinstance(settings, Mapping) else sky[SPLITS[0]]}
    dataset = create_dataset(out, info, made_by)
    tasks = [
        _task(by_split[split], dataset.path, split, index, size=size, seed=seed, packed=packed)
        for split in SPLITS
        for index in range(counts.get(split, 0))
    ]
    (out / IMAGES).mkdir(exist_ok=True)
    with DatasetWriter(dataset, packed=packed) as writer:
        missing = [task for task in tasks if task.path.stem not in writer or not (packed or task.path.is_file())]
        done = len(tasks) - len(missing)
        if progress is not None and done:
            progress(done, len(tasks))
        for record, image in _run(missing, processes or os.cpu_count() or 1):
            if record.key not in writer:
                writer.add(record, image)
            done += 1
            if progress is not None:
                progress(done, len(tasks))
    return open_dataset(out)


def _one_survey(by_split: Mapping[str, SkySettings], counts: Mapping[str, int]) -> Survey:
    """The survey of all splits; `ConfigError` for a split without settings, or for several surveys."""
    without = [split for split in counts if split not in by_split]
    if without:
        raise ConfigError(f"no settings for split {', '.join(without)}, found some for {', '.join(by_split) or 'none'}; add them")
    names = sorted({settings.survey for settings in by_split.values()})
    if len(names) > 1:
        raise ConfigError(f"the splits are of the surveys {', '.join(names)}, expected one; make a data set of each")
    return surveys.survey(names[0])


def _task(settings: SkySettings, out: Path, split: str, index: int, *, size: int, seed: int, packed: bool) -> SceneTask:
    own_seed = scene_seed(seed, split, index)
    path = out / IMAGES / f"{split}_{index:05d}.fits"
    return SceneTask(settings, path, split, size, own_seed, scene_centre(own_seed), packed)


def _run(tasks: Sequence[SceneTask], processes: int) -> Iterator[tuple[Record, SkyImage | None]]:
    """Make the scenes, in this process or in others; a failure ends the run, what is written stays."""
    if processes == 1 or len(tasks) < 2:
        yield from map(make_scene, tasks)
        return
    with ProcessPoolExecutor(min(processes, len(tasks)), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(make_scene, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def make_scene(task: SceneTask) -> tuple[Record, SkyImage | None]:
    """The record of a scene's file, which is made unless it is there and whole; for a packed one its pixels, and no file."""
    record = None if task.packed else _record_there(task)
    if record is None:
        write_scene(simulate_scene(task.settings, size=task.size, seed=task.seed, centre=task.centre), task.path)
        record = scene_record(task.path, split=task.split)
    if not task.packed:
        return record, None
    with open_mosaic(task.path, record.bands) as mosaic:
        image = mosaic.read()
    task.path.unlink()
    return record, image


def _record_there(task: SceneTask) -> Record | None:
    if not task.path.is_file():
        return None
    try:
        return scene_record(task.path, split=task.split)
    except CatalogError as error:
        log.warning("%s; it is made again", error)
        return None
