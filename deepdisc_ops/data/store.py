"""A data set on disk: a folder with dataset.yaml, shards/ and, once they are made, splits.parquet.

Any number of processes write at once, each into shards of its own, and readers see what was finished when they opened.
Opening lists the shards and opens none; keys and positions are read on first use, objects and pixels record by record.
Records are ordered by key. Where two writers wrote one key, the record of the shard made first holds.

    with DatasetWriter(create_dataset(path, info), packed=True) as writer:
        writer.add(record, image)
    dataset = open_dataset(path)
    for record in dataset.records("train"):
        pixels = read_pixels(record)
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import yaml
from numpy.typing import NDArray

from deepdisc_ops.config import flatten
from deepdisc_ops.data.pixels import check_fingerprints, packed_fault
from deepdisc_ops.data.records import COLUMNS, SPLITS, DatasetInfo, Record
from deepdisc_ops.data.shards import (
    SEALED,
    Name,
    Shard,
    list_shards,
    open_sealed,
    read_journal,
    row_checksum,
)
from deepdisc_ops.data.splits import SplitTable, read_splits
from deepdisc_ops.errors import CatalogError, ConfigError, did_you_mean

log = logging.getLogger(__name__)

DESCRIPTION, SHARDS = "dataset.yaml", "shards"


def create_dataset(path: Path, info: DatasetInfo, settings: Mapping[str, Any] | None = None) -> Dataset:
    """Make an empty data set, or open the one that is there; `ConfigError` if that has another ``info`` or ``settings``.

    settings: whatever else tells how the data set is made, in types that YAML knows.
    """
    target = path / DESCRIPTION
    tree = asdict(info) | {"bands": list(info.bands)} | dict(settings or {})
    if not target.is_file():
        (path / SHARDS).mkdir(parents=True, exist_ok=True)
        unfinished = path / f".{DESCRIPTION}.{os.getpid()}.part"
        unfinished.write_text(yaml.safe_dump(tree, sort_keys=False))
        unfinished.replace(target)
    dataset = open_dataset(path)
    known = flatten(asdict(dataset.info) | {"bands": list(dataset.info.bands)} | dataset.settings)
    asked = flatten(tree)
    differing = [f"{name} {known.get(name)} there, {value} asked" for name, value in asked.items() if known.get(name) != value]
    if differing:
        raise ConfigError(f"{path} holds a data set made otherwise ({'; '.join(differing)}); use another folder")
    return dataset


def open_dataset(path: Path) -> Dataset:
    """Open a data set's folder, in a time that does not depend on the number of its records."""
    source = path / DESCRIPTION
    try:
        tree = yaml.safe_load(source.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise CatalogError(f"{path} is no data set: {source.name} is missing; make one with `deepdisc-ops simulate`") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CatalogError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    names = [field.name for field in fields(DatasetInfo)]
    missing = [name for name in names if not isinstance(tree, dict) or name not in tree]
    if missing:
        raise CatalogError(f"{source} lacks {', '.join(missing)}")
    info = DatasetInfo(**{name: tree.pop(name) for name in names})
    return Dataset(replace(info, bands=tuple(info.bands)), Path(os.path.normpath(path.absolute())), tree)


class Dataset:
    """A data set as it was when it was opened; ``settings`` is what its maker wrote beside ``info``."""

    def __init__(self, info: DatasetInfo, path: Path, settings: Mapping[str, Any] | None = None) -> None:
        self.info = info
        self.path = path
        self.settings = dict(settings or {})
        self._shards = Shards.listed(path)

    def __repr__(self) -> str:
        splits = ", ".join(f"{count} {split}" for split, count in self.split_sizes.items())
        return f"<Dataset {self.path}: {splits or 'no'} images, bands {' '.join(self.info.bands)}>"

    def refresh(self) -> Dataset:
        """The same data set as it is now."""
        return Dataset(self.info, self.path, self.settings)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def written_keys(self) -> NDArray[np.str_]:
        """Keys of all rows, those included that a second writer wrote again."""
        return Records(self._shards, np.arange(self._shards.starts[-1])).texts("key")

    @cached_property
    def _index(self) -> Records:
        return self._shards.everything()

    @cached_property
    def split_table(self) -> SplitTable | None:
        """The stored splits, if `make_splits` has made them."""
        return read_splits(self.path)

    @cached_property
    def _assigned(self) -> tuple[NDArray[np.str_], NDArray[np.float64]]:
        """Split and rank in [0, 1) of every record in order of key, from the stored table or the records themselves."""
        keys = self._index.keys
        if self.split_table is None:
            return self._index.texts("split"), key_ranks(keys, self.info.seed)
        split, rank, unknown = self.split_table.look_up(keys)
        if unknown:
            log.warning("%s: %d records came after the splits were made and are in none; make the splits again", self.path, unknown)
        return split, rank

    @property
    def assigned_splits(self) -> NDArray[np.str_]:
        """(records,) split of every record in order of key, "" for those in none."""
        return self._assigned[0]

    @property
    def split_sizes(self) -> dict[str, int]:
        """Number of records of every split that has some; "" stands for those in none."""
        names, counts = np.unique(self._assigned[0], return_counts=True)
        return dict(zip(names.tolist(), counts.tolist(), strict=True))

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that have records, in the order of `SPLITS`."""
        return tuple(split for split in SPLITS if split in self.split_sizes)

    def records(self, split: str | None = None, *, fraction: float = 1.0, partition: int | None = None) -> Records:
        """The records of a split (None: all) in order of key.

        fraction takes a share of them, rounded up, smaller shares inside larger ones; partition takes train and validation
        from that random partition of the stored splits.
        """
        if split is not None and split not in SPLITS:
            raise CatalogError(f"unknown split {split!r}, {did_you_mean(split, SPLITS)}")
        if not 0 < fraction <= 1:
            raise CatalogError(f"fraction is {fraction}, expected more than 0 and at most 1")
        assigned, rank = self._assigned if split is not None or fraction < 1 or partition is not None else (None, None)
        if partition is not None:
            if self.split_table is None:
                raise CatalogError(f"{self.path} has no partitions; make them with `deepdisc-ops data split`")
            assigned = self.split_table.partition(partition, self._index.keys)
        chosen = np.arange(len(self)) if split is None or assigned is None else np.flatnonzero(assigned == split)
        if not len(chosen):
            there = ", ".join(self.splits) or "none"
            raise CatalogError(
                f"{self.path}: no record in split {split!r} (splits that have some: {there}); "
                "an interrupted `simulate` goes on when run again, and `deepdisc-ops data split` makes splits"
                if split is not None
                else f"{self.path}: no record; an interrupted `simulate` goes on when run again"
            )
        if fraction < 1 and rank is not None:
            first = np.argsort(rank[chosen], kind="stable")[: math.ceil(fraction * len(chosen) - 1e-9)]
            chosen = chosen[np.sort(first)]
        return self._index[chosen]


def key_ranks(keys: Sequence[str] | NDArray[np.str_], seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) for every key, as good as random, the same however many other keys there are."""
    salt = seed.to_bytes(16, "little", signed=True)
    digests = b"".join(hashlib.blake2b(str(key).encode(), digest_size=8, key=salt).digest() for key in keys)
    return np.frombuffer(digests, "<u8") / 2.0**64


class Shards:
    """The shards of a data set at one time: a listing that travels between processes, files opened when they are needed."""

    def __init__(self, path: Path, names: Sequence[Name], journals: Mapping[str, Shard] | None = None) -> None:
        self.path = path
        self.names = tuple(names)
        self._open: dict[int, Shard] = {}
        for number, name in enumerate(self.names):
            if journals and name.name in journals:
                self._open[number] = journals[name.name]

    @classmethod
    def listed(cls, path: Path) -> Shards:
        """What is there now; only journals, of which each writer has one or few, are opened to count their records."""
        folder = path / SHARDS
        for _ in range(100):  # a journal may be sealed between listing and reading
            try:
                names = list_shards(folder)
                journals = {name.name: read_journal(folder, name.name) for name in names if name.count is None}
            except FileNotFoundError:
                if not folder.is_dir():
                    return cls(path, ())
                continue
            return cls(
                path, [replace(name, count=len(journals[name.name])) if name.count is None else name for name in names], journals
            )
        raise CatalogError(f"{folder} changes faster than it can be read; try again when fewer writers are at work")

    def __reduce__(self) -> tuple[type[Shards], tuple[Path, tuple[Name, ...]]]:
        return Shards, (self.path, self.names)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """(shards + 1,) number of the first row of each shard among all rows."""
        return np.concatenate([[0], np.cumsum([name.count or 0 for name in self.names], dtype=np.int64)]).astype(np.int64)

    def shard(self, number: int) -> Shard:
        """An opened shard; a journal that has been sealed since is found under its new name."""
        if number not in self._open:
            self._open[number] = self._read(self.names[number])
        return self._open[number]

    def _read(self, name: Name) -> Shard:
        folder = self.path / SHARDS
        for _ in range(2):
            try:
                return open_sealed(folder, name)
            except FileNotFoundError:
                pass
            try:
                journal = read_journal(folder, name.name, name.count)
                if len(journal) == name.count:
                    return journal
                break
            except FileNotFoundError:
                pass
            for path in folder.glob(f"{name.name}-*{SEALED}"):  # it has grown before it was sealed
                return open_sealed(folder, Name(name.name, int(path.stem.rpartition("-")[2])))
        raise CatalogError(f"{folder / name.file} is gone or cut short; restore it from a copy, or refresh the data set")

    def everything(self) -> Records:
        """All records in order of key; of those with one key, the first."""
        rows = Records(self, np.arange(self.starts[-1]))
        keys = rows.texts("key")
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        first = np.concatenate([[True], keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, bool)
        return Records(self, order[first])

    def duplicates(self) -> list[str]:
        """Keys that stand more than once."""
        keys, times = np.unique(Records(self, np.arange(self.starts[-1])).texts("key"), return_counts=True)
        return [str(key) for key in keys[times > 1]]


class Records(Sequence[Record]):
    """Records of a data set, read when they are asked for; slices and index arrays give `Records` again."""

    def __init__(self, shards: Shards, rows: NDArray[np.integer[Any]]) -> None:
        self._shards = shards
        self._rows = np.asarray(rows, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, item: int) -> Record: ...
    @overload
    def __getitem__(self, item: slice | NDArray[np.generic]) -> Records: ...
    def __getitem__(self, item: int | slice | NDArray[np.generic]) -> Record | Records:
        if isinstance(item, slice | np.ndarray):
            return Records(self._shards, self._rows[item])
        row = int(self._rows[item])
        number = self._number(row)
        return self._shards.shard(number).record(row - int(self._shards.starts[number]), self._shards.path)

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def _number(self, row: int) -> int:
        return int(np.searchsorted(self._shards.starts, row, side="right")) - 1

    def _by_shard(self) -> Iterator[tuple[Shard, NDArray[np.int64], NDArray[np.intp]]]:
        """Each shard that holds some of the records, with their rows in it and their places here."""
        numbers = np.searchsorted(self._shards.starts, self._rows, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        cuts = np.flatnonzero(np.diff(numbers[order])) + 1
        for places in np.split(order, cuts) if len(order) else []:
            number = int(numbers[places[0]])
            yield self._shards.shard(number), self._rows[places] - self._shards.starts[number], places

    @cached_property
    def keys(self) -> NDArray[np.str_]:
        """(records,) keys."""
        return self.texts("key")

    def texts(self, name: str) -> NDArray[np.str_]:
        """(records,) a text of every record: key, split, origin."""
        found = np.full(len(self), "", object)
        for shard, rows, places in self._by_shard():
            found[places] = shard.batch.column(name).take(rows).to_numpy(zero_copy_only=False)
        return found.astype(np.str_)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """(records, 2) width and height in pixels."""
        found = np.zeros((len(self), 2), np.int64)
        for shard, rows, places in self._by_shard():
            found[places] = np.stack([shard.batch.column(name).to_numpy()[rows] for name in ("width", "height")], axis=1)
        return found

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """(records,) number of objects."""
        found = np.zeros(len(self), np.int64)
        for shard, rows, places in self._by_shard():
            found[places] = np.diff(shard.offsets)[rows]
        return found

    @property
    def centres(self) -> NDArray[np.float64]:
        """(records, 2) ra, dec of the image's centre in degrees, ICRS; NaN where neither WCS nor objects tell."""
        return self._per_record("centre", 2)

    @property
    def corners(self) -> NDArray[np.float64]:
        """(records, 4, 2) ra, dec of the image's corners in degrees, ICRS, in turn; NaN as for the centres."""
        return self._per_record("corners", 8).reshape(-1, 4, 2)

    def _per_record(self, name: str, length: int) -> NDArray[np.float64]:
        found = np.zeros((len(self), length))
        for shard, rows, places in self._by_shard():
            found[places] = shard.values(name)[rows]
        return found

    def column(self, name: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """A column of `Objects` for all objects in order of their records, and the number of each object's record here."""
        if name not in COLUMNS:
            raise CatalogError(f"objects have no column {name!r}, {did_you_mean(name, COLUMNS)}")
        ends = np.cumsum(self.counts)
        total = int(ends[-1]) if len(self) else 0
        values = np.zeros((total, 4) if name == "boxes" else total, COLUMNS[name])
        for shard, rows, places in self._by_shard():
            lengths = self.counts[places]
            values[_ranges((ends - self.counts)[places], lengths)] = shard.values(name)[_ranges(shard.offsets[rows], lengths)]
        return values, np.repeat(np.arange(len(self)), self.counts)


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers start, start + 1, ... of several ranges, one after the other."""
    before = np.cumsum(lengths) - lengths
    ranges: NDArray[np.int64] = np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)
    return ranges


def verify(dataset: Dataset) -> list[str]:
    """Faults of a data set: damaged shards, rows and pixels, keys that stand twice, files changed since they were indexed."""
    faults: list[str] = []
    shards = dataset._shards
    for number in range(len(shards.names)):
        try:
            faults += _shard_faults(shards.shard(number), shards.path)
        except CatalogError as error:
            faults.append(str(error))
    if not faults:
        faults += [f"record {key!r} stands more than once; the shard made first holds" for key in shards.duplicates()]
    return faults


def _shard_faults(shard: Shard, path: Path) -> Iterator[str]:
    for i in range(len(shard)):
        row = shard.row(i)
        if row["checksum"] != row_checksum(row):
            yield f"row {i} of {path / SHARDS / shard.name} is damaged; restore the shard from a copy"
            continue
        record = shard.record(i, path)
        try:
            fault = packed_fault(record)
            check_fingerprints(record)
        except CatalogError as error:
            fault = str(error)
        if fault is not None:
            yield fault
