"""A copy of a data set that holds its own pixels: one folder to move, and windows read without opening a survey's files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from deepdisc_ops.data.splits import FILE as SPLITS_FILE
from deepdisc_ops.data.store import Dataset, create_dataset, open_dataset
from deepdisc_ops.data.writer import DatasetWriter
from deepdisc_ops.errors import ConfigError


def pack_dataset(dataset: Dataset, out: Path, *, progress: Callable[[int, int], None] | None = None) -> Dataset:
    """Copy a data set with the pixels of all its records into the folder ``out``, its stored splits too.

    Records that are there are kept, so that an interrupted copy goes on, and several processes may share the work by packing
    different data sets into one. progress is called with (records done, records in all).
    """
    if out.absolute() == dataset.path:
        raise ConfigError(f"{out} is the data set itself; name another folder for the packed one")
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
