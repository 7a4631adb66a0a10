"""Copies of data sets: with all pixels inside, or of several in one folder.

Both keep what is there, so that an interrupted copy goes on when it is asked for again.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from deepdisc_ops.data.splits import FILE as SPLITS_FILE
from deepdisc_ops.data.store import Dataset, create_dataset, open_dataset
from deepdisc_ops.data.writer import DatasetWriter
from deepdisc_ops.errors import ConfigError

SCALE_AGREEMENT = 0.01
"""Relative difference of pixel scales that may stand in one data set: mosaics on tangent planes of their own differ by less."""

Progress = Callable[[int, int], None]


def pack_dataset(dataset: Dataset, out: Path, *, progress: Progress | None = None) -> Dataset:
    """Copy a data set with the pixels of all its records into the folder ``out``, its stored splits too.

    progress is called with (records done, records in all).
    """
    _check_place(out, [dataset])
    records = dataset.records()
    with DatasetWriter(create_dataset(out, dataset.info, dataset.settings), packed=True) as writer:
        keys = records.keys.tolist()
        for done, key in enumerate(keys, start=1):
            if key not in writer:
                writer.add(records[done - 1])
            if progress is not None:
                progress(done, len(keys))
    if (dataset.path / SPLITS_FILE).is_file():
        shutil.copyfile(dataset.path / SPLITS_FILE, out / SPLITS_FILE)
    return open_dataset(out)


def merge_datasets(datasets: Sequence[Dataset], out: Path, *, packed: bool = False, progress: Progress | None = None) -> Dataset:
    """Make one data set of several in the folder ``out``: tracts of a survey, real images and simulated ones.

    Keys get the name of their folder in front; a record keeps its origin and the split it has there. Bands, gold band and, to
    1 %, pixel scale must be the same. progress is called with (records done, records in all).
    """
    _check_place(out, datasets)
    first, *others = datasets
    names = [dataset.path.name for dataset in datasets]
    if len(set(names)) < len(names):
        raise ConfigError(f"two of the folders have one name ({', '.join(names)}), which tells their records apart; rename one")
    for other in others:
        _check_alike(first, other)
    total, done = sum(map(len, datasets)), 0
    info = replace(first.info, survey="+".join(dict.fromkeys(dataset.info.survey for dataset in datasets)))
    with DatasetWriter(create_dataset(out, info, {"merged": names}), packed=packed) as writer:
        for name, dataset in zip(names, datasets, strict=True):
            for record, split in zip(dataset.records(), dataset.assigned_splits.tolist(), strict=True):
                key = f"{name}/{record.key}"
                if key not in writer:
                    writer.add(replace(record, key=key, split=split))
                done += 1
                if progress is not None:
                    progress(done, total)
    return open_dataset(out)


def _check_place(out: Path, datasets: Sequence[Dataset]) -> None:
    if out.absolute() in [dataset.path for dataset in datasets]:
        raise ConfigError(f"{out} is the data set itself; name another folder for the copy")


def _check_alike(first: Dataset, other: Dataset) -> None:
    one, two = first.info, other.info
    faults = [
        f"{name} {getattr(one, name)} and {getattr(two, name)}"
        for name in ("bands", "gold_band")
        if getattr(one, name) != getattr(two, name)
    ]
    if not math.isclose(one.pixel_scale, two.pixel_scale, rel_tol=SCALE_AGREEMENT):
        faults.append(f"pixel scale {one.pixel_scale:.4g} and {two.pixel_scale:.4g} arcsec")
    if faults:
        raise ConfigError(f"{first.path} and {other.path} differ in {', '.join(faults)}; one data set has one of each")
