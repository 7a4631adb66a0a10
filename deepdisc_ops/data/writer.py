"""Writing records: every process has shards of its own, so that any number write at once without locks.

Glossary: C bands, H x W pixels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.data.footprints import footprint
from deepdisc_ops.data.packed import PixelFile
from deepdisc_ops.data.pixels import fingerprint, read_pixels, to_planes
from deepdisc_ops.data.records import Packed, Record, Reference
from deepdisc_ops.data.shards import PIXELS, Journal, check_record, new_name, seal_abandoned, to_row
from deepdisc_ops.data.store import SHARDS, Dataset, open_dataset
from deepdisc_ops.errors import CatalogError, ConfigError
from deepdisc_ops.sky.images import SkyImage

RECORDS_PER_SHARD = 256
BYTES_PER_PIXEL_FILE = 2**30
OPEN_SHAPES = 4
"""Shards that a writer of packed pixels keeps open at once, one for each size of image."""


@dataclass
class _OpenShard:
    """What a writer fills: a journal and, for packed pixels, the file of their array."""

    journal: Journal
    pixels: PixelFile | None

    @property
    def full(self) -> bool:
        return self.journal.count >= (RECORDS_PER_SHARD if self.pixels is None else self.pixels.slots)

    def seal(self) -> None:
        if self.pixels is not None:
            self.pixels.close(self.journal.count)
        self.journal.seal()


class DatasetWriter:
    """Adds records to a data set; a process has one at a time, any number of processes write at once.

    A record is safe from the end of the process once `add` returns, and from the end of the machine once its shard is sealed,
    which happens when the shard is full and when the writer is closed. With ``packed`` the pixels go into the data set.
    """

    def __init__(self, dataset: Dataset | Path, *, packed: bool = False) -> None:
        opened = open_dataset(dataset if isinstance(dataset, Path) else dataset.path)
        self._path = opened.path
        self.info = opened.info
        self._packed = packed
        self._process = os.getpid()
        self._folder = self._path / SHARDS
        self._open: dict[tuple[int, ...], _OpenShard] = {}
        self._fingerprints: dict[tuple[Any, ...], str] = {}
        self._folder.mkdir(exist_ok=True)
        if seal_abandoned(self._folder):
            opened = opened.refresh()
        self._keys: set[str] = set(opened.written_keys.tolist())

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, record: Record, image: SkyImage | None = None) -> None:
        """Write a record; a packing writer takes its pixels from ``image``, or from where the record says they are.

        `CatalogError` if the key is there, bands differ from the data set's, or a value could not be given back.
        """
        self._check(record)
        position = footprint(record, self.info.pixel_scale)
        if self._packed:
            pixels = self._planes(record, image or read_pixels(record, with_variance=True))
            place, shard = self._room(pixels.shape)
            if shard.pixels is not None:
                record = replace(record, pixels=shard.pixels.write(shard.journal.count, pixels))
        else:
            record = replace(record, pixels=self._fingerprinted(record))
            place, shard = self._room((0, 0, 0))
        shard.journal.append(to_row(record, self._path, *position))
        self._keys.add(record.key)
        if shard.full:
            self._open.pop(place).seal()

    def _check(self, record: Record) -> None:
        if os.getpid() != self._process:
            raise ConfigError("a DatasetWriter was handed to another process; open one in each process")
        check_record(record)
        if record.key in self._keys:
            raise CatalogError(f"{self._path} holds a record {record.key!r} already; give the new one another key or leave it out")
        if tuple(record.bands) != self.info.bands:
            raise CatalogError(
                f"record {record.key!r} has the bands {', '.join(record.bands)}, the data set {', '.join(self.info.bands)}; "
                "put the planes in that order, or use another data set"
            )
        if isinstance(record.pixels, Packed) and not self._packed:
            raise CatalogError(
                f"record {record.key!r} has its pixels packed in {record.pixels.path}; "
                "open the writer with packed=True to copy them"
            )

    def _planes(self, record: Record, image: SkyImage) -> NDArray[np.float32]:
        expected = (len(record.bands), record.height, record.width)
        if image.data.shape != expected or tuple(image.bands) != tuple(record.bands):
            raise CatalogError(
                f"record {record.key!r} is {' x '.join(map(str, expected))} in {', '.join(record.bands)}, "
                f"its image {' x '.join(map(str, image.data.shape))} in {', '.join(image.bands)}; they must agree"
            )
        if image.variance is not None and image.variance.shape != expected:
            raise CatalogError(f"record {record.key!r}: variance {image.variance.shape} for pixels {expected}; they must agree")
        pixels = to_planes(image)
        return pixels if image.variance is None else np.concatenate([pixels, image.variance.astype(np.float32)])

    def _fingerprinted(self, record: Record) -> Reference:
        reference = record.pixels
        assert isinstance(reference, Reference)  # `_check` has seen to it
        if not reference.paths:
            raise CatalogError(f"record {record.key!r} names no image file; name some, or open the writer with packed=True")
        if reference.fingerprints and len(reference.fingerprints) != len(reference.paths):
            raise CatalogError(
                f"record {record.key!r} has {len(reference.fingerprints)} fingerprints for {len(reference.paths)} files; "
                "leave them out"
            )
        return replace(reference, fingerprints=reference.fingerprints or tuple(map(self._fingerprint, reference.paths)))

    def _fingerprint(self, path: Path) -> str:
        try:
            state = path.stat()
        except OSError as error:
            raise CatalogError(f"{path} cannot be read: {error.strerror}; name a file that exists") from None
        key = (path, state.st_size, state.st_mtime_ns, state.st_ino)
        if key not in self._fingerprints:
            self._fingerprints[key] = fingerprint(path)
        return self._fingerprints[key]

    def _room(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], _OpenShard]:
        """An open shard for planes of this shape (zeros by reference), and its place among the open ones."""
        planes, height, width = shape
        for place, shard in self._open.items():
            if shard.pixels is None or shard.pixels.takes(planes, height, width):
                self._open[place] = self._open.pop(place)  # the least used comes first
                return place, shard
        if len(self._open) >= OPEN_SHAPES:
            self._open.pop(next(iter(self._open))).seal()
        name = new_name()
        journal, pixels = Journal(self._folder, name, self._path), None
        if self._packed:
            slots = max(1, min(RECORDS_PER_SHARD, BYTES_PER_PIXEL_FILE // (4 * planes * height * width)))
            whole = (slots, planes, height, width)
            pixels = PixelFile(self._folder / f"{name}{PIXELS}", whole, self.info.bands, self.info.pixel_scale)
        shard = self._open[shape] = _OpenShard(journal, pixels)
        return shape, shard

    def close(self) -> None:
        """Seal the shards; what was added stays if this is never called."""
        while self._open:
            self._open.pop(next(iter(self._open))).seal()
