"""The files in which records lie: journals while they are written, sealed shards once they are full.

A journal `NAME.arrows` is an Arrow IPC stream whose every record batch is one record, appended with a single write, so that a
writer killed at any moment leaves whole records and at most one torn tail, which is not read. A sealed shard
`NAME-COUNT.arrow` holds the same records as one batch of an Arrow IPC file, memory-mapped; it replaces its journal by rename.
The name starts with the time, so that the order of the names is that of the making; its second part names the machine's boot,
so that a writer knows which journals were left by dead processes of its own machine.

A row is a record in the form of its columns; its CRC-32 is stored with it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import socket
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from deepdisc_ops.data.packed import shorten
from deepdisc_ops.data.records import COLUMNS, GALAXY, OPTIONAL, SPLITS, STAR, Objects, Packed, Record, Reference
from deepdisc_ops.errors import CatalogError
from deepdisc_ops.sky.tiling import Window

log = logging.getLogger(__name__)

JOURNAL, SEALED, PIXELS = ".arrows", ".arrow", ".h5"
DAMAGED = ".damaged"
ROOT_KEY = b"root"
"""Metadata of a shard: the data set's folder when it was written, from which paths to files outside of it can be told."""

_TEXT = pa.string()
_SCALARS: dict[str, pa.DataType] = {
    "key": _TEXT,
    "split": _TEXT,
    "origin": _TEXT,
    "extra": _TEXT,
    "bands": pa.list_(_TEXT),
    "width": pa.int32(),
    "height": pa.int32(),
    "wcs": _TEXT,
    "centre": pa.list_(pa.float64(), 2),
    "corners": pa.list_(pa.float64(), 8),
    "paths": pa.list_(_TEXT),
    "window": pa.list_(pa.int64()),
    "zero_point": pa.float64(),
    "plane_bands": pa.list_(_TEXT),
    "pixel_scale": pa.float64(),
    "blank": pa.float64(),
    "fingerprints": pa.list_(_TEXT),
    "pixel_row": pa.int32(),
    "pixel_checksum": pa.uint32(),
    "mask_sizes": pa.list_(pa.list_(pa.int32(), 2)),
    "mask_counts": pa.list_(_TEXT),
    "object_extra": pa.list_(_TEXT),
}
"""What a row holds besides the columns of `Objects`; centre is ra, dec and corners four times ra, dec, degrees, ICRS."""


def _values_type(name: str) -> pa.DataType:
    number = pa.from_numpy_dtype(COLUMNS[name])
    return pa.list_(number, 4) if name == "boxes" else number


SCHEMA = pa.schema(
    [pa.field(name, kind) for name, kind in _SCALARS.items()]
    + [pa.field(name, pa.list_(_values_type(name))) for name in COLUMNS]
    + [pa.field("checksum", pa.uint32())]
)

Row = dict[str, Any]


def to_row(record: Record, root: Path, centre: tuple[float, float], corners: NDArray[np.float64]) -> Row:
    """The row of a record of the data set in ``root``; corners (4, 2) ra, dec of its image in degrees. Raises `CatalogError`."""
    objects, pixels = record.objects, record.pixels
    row: Row = {name: getattr(record, name) for name in ("key", "split", "origin", "extra", "wcs")}
    row |= {"width": int(record.width), "height": int(record.height)}
    row |= {"bands": list(record.bands), "centre": list(centre), "corners": corners.ravel().tolist()}
    if isinstance(pixels, Reference):
        row |= {
            "paths": [Path(os.path.relpath(path.absolute(), root)).as_posix() for path in pixels.paths],
            "window": None if pixels.window is None else [int(edge) for edge in pixels.window],
            "zero_point": None if pixels.zero_point is None else float(pixels.zero_point),
            "plane_bands": None if pixels.plane_bands is None else list(pixels.plane_bands),
            "pixel_scale": None if pixels.pixel_scale is None else float(pixels.pixel_scale),
            "blank": None if pixels.blank is None else float(pixels.blank),
            "fingerprints": list(pixels.fingerprints),
        }
    else:
        row |= {"pixel_row": pixels.row, "pixel_checksum": pixels.checksum}
    masks = objects.masks
    row["mask_sizes"] = None if masks is None else [[int(side) for side in mask["size"]] for mask in masks]
    row["mask_counts"] = None if masks is None else [_counts(mask, record.key) for mask in masks]
    row["object_extra"] = None if objects.extra is None else list(objects.extra)
    row = {name: row.get(name) for name in _SCALARS}
    row |= {name: np.ascontiguousarray(getattr(objects, name), dtype) for name, dtype in COLUMNS.items()}
    return row | {"checksum": row_checksum(row)}


def check_record(record: Record) -> None:
    """Refuse what a data set could not give back or a training could not use."""
    objects = record.objects
    if not record.key:
        raise CatalogError("a record has an empty key; give each a text of its own")
    if record.width < 1 or record.height < 1:
        raise CatalogError(f"record {record.key!r} has {record.width} x {record.height} pixels, expected at least 1 x 1")
    for name in COLUMNS:
        column = getattr(objects, name)
        if not (np.isfinite(column) | (np.isnan(column) & (name in OPTIONAL))).all():
            raise CatalogError(
                f"record {record.key!r}: objects.{name} holds a value that is no finite number; leave such objects out"
            )
    for name, wrong, expected in (
        ("classes", ~np.isin(objects.classes, (GALAXY, STAR)), f"{GALAXY} (galaxy) or {STAR} (star)"),
        ("redshift", objects.redshift < 0, "0 or more, NaN for none"),
        ("boxes", (objects.boxes[:, 2:] <= objects.boxes[:, :2]).any(axis=1), "x0 < x1 and y0 < y1"),
    ):
        if wrong.any():
            found = getattr(objects, name)[wrong][0]
            raise CatalogError(f"record {record.key!r}: objects.{name} is {found} for {wrong.sum()} objects, expected {expected}")
    size = [record.height, record.width]
    odd = next((mask["size"] for mask in objects.masks or () if list(mask["size"]) != size), None)
    if odd is not None:
        raise CatalogError(f"record {record.key!r}: a mask has the size {odd}, expected that of the image, {size}")
    if record.split not in ("", *SPLITS):
        raise CatalogError(
            f"record {record.key!r} is of the unknown split {record.split!r}; expected one of {', '.join(SPLITS)}, or none"
        )
    ids, times = np.unique(objects.ids, return_counts=True)
    if len(ids) < len(objects):
        raise CatalogError(
            f"record {record.key!r}: id {ids[times.argmax()]} stands {times.max()} times; every object needs an id of its own"
        )


def _counts(mask: Mapping[str, Any], key: str) -> str:
    counts = mask["counts"]
    if isinstance(counts, bytes):
        return counts.decode("ascii")
    if not isinstance(counts, str):
        raise CatalogError(
            f"record {key!r}: a mask's counts are a {type(counts).__name__}, expected COCO's compressed text; "
            "pycocotools.mask.frPyObjects makes it"
        )
    return counts


def row_checksum(row: Row) -> int:
    """CRC-32 of all a row holds, whatever the version of Arrow."""
    checksum = zlib.crc32(json.dumps({name: row[name] for name in _SCALARS}).encode())
    for name, dtype in COLUMNS.items():
        checksum = zlib.crc32(np.ascontiguousarray(row[name], np.dtype(dtype).newbyteorder("<")).data, checksum)
    return checksum


def to_batch(row: Row, schema: pa.Schema) -> pa.RecordBatch:
    """A row as a record batch of length one."""
    columns = [pa.array([row[name]], kind) for name, kind in _SCALARS.items()]
    for name, dtype in COLUMNS.items():
        values = pa.array(row[name].ravel(), pa.from_numpy_dtype(dtype))
        if name == "boxes":
            values = pa.FixedSizeListArray.from_arrays(values, 4)
        columns.append(pa.ListArray.from_arrays(pa.array([0, len(row[name])], pa.int32()), values))
    columns.append(pa.array([row["checksum"]], pa.uint32()))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


class Shard:
    """Some records in memory, or mapped into it: row by row, or a column of all at once."""

    def __init__(self, batch: pa.RecordBatch, name: str) -> None:
        self.batch = batch
        self.name = name
        self._columns: dict[str, NDArray[Any]] = {}

    def __len__(self) -> int:
        return int(self.batch.num_rows)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """(rows + 1,) where the objects of each row begin."""
        return self.batch.column("ids").offsets.to_numpy().astype(np.int64)

    def values(self, column: str) -> NDArray[Any]:
        """One column of `Objects` for the objects of all rows, or of a fixed length per row: centre, corners."""
        if column not in self._columns:
            array = self.batch.column(column)
            array = array if column in ("centre", "corners") else array.values
            shape = (len(array), -1) if pa.types.is_fixed_size_list(array.type) else (len(array),)
            numbers = array.values if pa.types.is_fixed_size_list(array.type) else array
            size = array.type.list_size if pa.types.is_fixed_size_list(array.type) else 1
            self._columns[column] = numbers.to_numpy(zero_copy_only=False).reshape(len(array), size)
            if len(shape) == 1:
                self._columns[column] = self._columns[column][:, 0]
        return self._columns[column]

    def row(self, i: int) -> Row:
        """Row ``i`` with its checksum, as it was written."""
        first, last = self.offsets[i], self.offsets[i + 1]
        row: Row = {name: self.batch.column(name)[i].as_py() for name in _SCALARS}
        row |= {name: self.values(name)[first:last].copy() for name in COLUMNS}
        return row | {"checksum": self.batch.column("checksum")[i].as_py()}

    def record(self, i: int, folder: Path) -> Record:
        """Record ``i``; folder is that of the data set."""
        row = self.row(i)
        return Record(
            key=row["key"],
            pixels=self._pixels(row, folder),
            bands=tuple(row["bands"]),
            width=row["width"],
            height=row["height"],
            objects=_objects(row),
            wcs=row["wcs"],
            split=row["split"],
            origin=row["origin"],
            extra=row["extra"],
        )

    def _pixels(self, row: Row, folder: Path) -> Reference | Packed:
        if row["pixel_row"] is not None:
            return Packed(folder / "shards" / f"{self.name}{PIXELS}", row["pixel_row"], row["pixel_checksum"])
        written = Path(os.fsdecode((self.batch.schema.metadata or {}).get(ROOT_KEY, b"")))
        return Reference(
            paths=tuple(_absolute(path, folder, written) for path in row["paths"]),
            window=None if row["window"] is None else Window(*row["window"]),
            zero_point=row["zero_point"],
            plane_bands=None if row["plane_bands"] is None else tuple(row["plane_bands"]),
            pixel_scale=row["pixel_scale"],
            blank=row["blank"],
            fingerprints=tuple(row["fingerprints"]),
        )


def _objects(row: Row) -> Objects:
    masks = None
    if row["mask_counts"] is not None:
        masks = tuple({"size": size, "counts": counts} for size, counts in zip(row["mask_sizes"], row["mask_counts"], strict=True))
    extra = None if row["object_extra"] is None else tuple(row["object_extra"])
    return Objects(**{name: row[name] for name in COLUMNS}, masks=masks, extra=extra)


def _absolute(path: str, folder: Path, written: Path) -> Path:
    """Where a file is now: as seen from the data set's folder, or, if only that was moved, from where it was."""
    here = Path(os.path.normpath(folder / path))
    if path.startswith("../") and written != folder and not here.exists():
        there = Path(os.path.normpath(written / path))
        return there if there.exists() else here
    return here


@dataclass(frozen=True)
class Name:
    """A file of records in a listing: the shard's name, and its number of records where it is sealed."""

    name: str
    count: int | None

    @property
    def file(self) -> str:
        """The name of the file."""
        return f"{self.name}{JOURNAL}" if self.count is None else f"{self.name}-{self.count}{SEALED}"


def list_shards(folder: Path) -> list[Name]:
    """The shards of a folder in order of their names; a journal that has been sealed is left out. No file is opened."""
    found: dict[str, Name] = {}
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".")]
    for file in names:
        if file.endswith(JOURNAL):
            name = file.removesuffix(JOURNAL)
            found.setdefault(name, Name(name, None))
        elif file.endswith(SEALED):
            name, _, count = file.removesuffix(SEALED).rpartition("-")
            if name and count.isdigit():
                found[name] = Name(name, int(count))
    return [found[name] for name in sorted(found)]


def open_sealed(folder: Path, name: Name) -> Shard:
    """A sealed shard, memory-mapped; a damaged or truncated file is a `CatalogError`."""
    path = folder / name.file
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
            _check_schema(reader.schema, path)
            if reader.num_record_batches != 1:
                raise CatalogError(f"{path} holds {reader.num_record_batches} batches, expected 1; restore it from a copy")
            batch = reader.get_batch(0)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise CatalogError(
            f"{path} is no whole shard ({' '.join(str(error).split())}); "
            "restore it from a copy, or delete it and write its records again"
        ) from None
    if batch.num_rows != name.count:
        raise CatalogError(f"{path} holds {batch.num_rows} records, its name says {name.count}; restore it from a copy")
    return Shard(batch, name.name)


def read_journal(folder: Path, name: str, count: int | None = None) -> Shard:
    """The whole records of a journal, at most ``count``; a torn or damaged tail is left out."""
    return _whole_records(folder, name, count)[0]


def _whole_records(folder: Path, name: str, count: int | None = None) -> tuple[Shard, int]:
    """The whole records of a journal, at most ``count``, and the bytes that follow them."""
    path = folder / f"{name}{JOURNAL}"
    content = pa.BufferReader(path.read_bytes())
    batches: list[pa.RecordBatch] = []
    schema, end = SCHEMA, 0
    try:
        with pa.ipc.open_stream(content) as reader:
            schema, end = reader.schema, content.tell()
            while count is None or len(batches) < count:
                batch = reader.read_next_batch()
                row = Shard(batch, name).row(0)
                if row["checksum"] != row_checksum(row):
                    break
                batches.append(batch)
                end = content.tell()
    except StopIteration:
        pass
    except (pa.ArrowException, OSError, ValueError):  # the tail of a writer that was killed
        pass
    if batches:
        _check_schema(schema, path)
    table = pa.Table.from_batches(batches, schema).combine_chunks()
    whole = table.to_batches()
    return Shard(whole[0] if whole else _empty(schema), name), content.size() - end


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


def _check_schema(schema: pa.Schema, path: Path) -> None:
    if not schema.equals(SCHEMA):
        missing = [name for name in SCHEMA.names if name not in schema.names]
        what = f"lacks {', '.join(missing)}" if missing else "has columns of other types"
        raise CatalogError(f"{path} {what}: written by another version; write its records again")


class Journal:
    """A journal being written; its lock, which tells others that its writer lives, ends with the process."""

    def __init__(self, folder: Path, name: str, root: Path) -> None:
        self.name = name
        self.count = 0
        self._folder = folder
        self._schema = SCHEMA.with_metadata({ROOT_KEY: os.fsencode(root)})
        hidden = folder / f".{name}{JOURNAL}"
        self._file = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        _lock(self._file)
        self._size = os.write(self._file, self._schema.serialize())
        hidden.replace(folder / f"{name}{JOURNAL}")  # never seen without its lock

    def append(self, row: Row) -> None:
        """Write a record; once this returns it outlives the process. If the disk is full, nothing of it stays."""
        message = to_batch(row, self._schema).serialize()
        try:
            written = os.write(self._file, message)
            while written < message.size:
                written += os.write(self._file, message[written:])
        except OSError:
            os.ftruncate(self._file, self._size)
            os.lseek(self._file, self._size, os.SEEK_SET)
            raise
        self._size += message.size
        self.count += 1

    def seal(self) -> None:
        """Turn the journal into a sealed shard."""
        os.fsync(self._file)
        seal(self._folder, self.name, self.count)
        os.close(self._file)


def seal(folder: Path, name: str, expected: int | None = None) -> int:
    """Write the records of a journal as a sealed shard, remove the journal, and tell how many they are.

    `CatalogError` if they are not as many as ``expected``; the journal then stays. Where something unreadable follows the
    records, the journal is kept aside: it may be a torn tail, or a damaged record with whole ones behind it.
    """
    shard, left_out = _whole_records(folder, name)
    if expected is not None and len(shard) != expected:
        raise CatalogError(f"{folder / name}{JOURNAL} reads back {len(shard)} of {expected} records; the disk may be failing")
    if len(shard):
        unfinished = folder / f".{name}{SEALED}"
        with unfinished.open("wb") as file:
            with pa.ipc.new_file(file, shard.batch.schema) as writer:
                writer.write_batch(shard.batch)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(folder / Name(name, len(shard)).file)
    journal = folder / f"{name}{JOURNAL}"
    if left_out:
        aside = journal.with_suffix(DAMAGED)
        journal.replace(aside)
        log.warning("%s: %d bytes after record %d are torn or damaged and left out; they are kept", aside, left_out, len(shard))
    else:
        journal.unlink()
    return len(shard)


def seal_abandoned(folder: Path) -> int:
    """Seal the journals that dead processes of this machine left; returns how many. Those of other machines stay readable."""
    sealed = 0
    for path in sorted(folder.glob(f"*-{machine()}-*{JOURNAL}")):
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            if _lock(file) and path.exists():
                _finish(folder, path.name.removesuffix(JOURNAL))
                sealed += 1
        finally:
            os.close(file)
    return sealed


def _finish(folder: Path, name: str) -> None:
    """Do what the dead writer of a shard would have done when it closed."""
    done = list(folder.glob(f"{name}-*{SEALED}"))
    if done:  # killed between the two steps of sealing
        count = int(done[0].stem.rpartition("-")[2])
        (folder / f"{name}{JOURNAL}").unlink()
    else:
        count = seal(folder, name)
    pixels = folder / f"{name}{PIXELS}"
    if (folder / f"{name}{DAMAGED}").exists():
        return  # the pixels of what was left out stay too
    if pixels.exists() and count:
        shorten(pixels, count)
    elif pixels.exists():
        pixels.unlink()


def _lock(file: int) -> bool:
    """Whether this process now holds the lock of a file; False where another has it, or the file system knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            return False
        raise
    return True


def new_name() -> str:
    """A name that no other shard has: time, machine, process, chance."""
    return f"{time.time_ns():020d}-{machine()}-{os.getpid()}-{secrets.token_hex(4)}"


@cache
def machine() -> str:
    """Eight digits that stand for this machine since it was started: locks of files are seen among its processes."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    started = boot.read_text() if boot.exists() else ""
    return hashlib.sha256(f"{socket.gethostname()}{started}".encode()).hexdigest()[:8]
