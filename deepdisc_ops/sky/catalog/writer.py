"""Catalogues of any length, written in parts in all wanted formats at once, so that no more than a part is ever in memory.

Each file grows under a temporary name in its own folder; all get their names when the last row is written, or are removed if
that fails, so that no half of a catalogue is ever taken for a whole.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Protocol

import numpy as np
from astropy.table import Column as TableColumn
from astropy.table import Table
from astropy.wcs import WCS

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.sky.catalog.coverage import Coverage, require_mocpy
from deepdisc_ops.sky.catalog.ecsv import EcsvFile
from deepdisc_ops.sky.catalog.fits import FitsFile
from deepdisc_ops.sky.catalog.hdf5 import Hdf5File
from deepdisc_ops.sky.catalog.parquet import ParquetFile
from deepdisc_ops.sky.catalog.regions import RegionFile
from deepdisc_ops.sky.detections import Array

MOC = ".moc.fits"
FORMATS = (".parquet", ".fits", ".hdf5", ".ecsv", ".reg", MOC)
PART_ROWS = 2**15


class TableFile(Protocol):
    """A file that takes rows in parts, all with the columns of the first."""

    def write(self, rows: Table) -> None:
        """Append ``rows``."""

    def close(self, provenance: Mapping[str, str]) -> None:
        """Finish the file."""

    def abort(self) -> None:
        """Let go of the file, whatever state it is in."""


TABLES: dict[str, Callable[[Path], TableFile]] = {
    ".parquet": ParquetFile,
    ".fits": FitsFile,
    ".hdf5": Hdf5File,
    ".ecsv": EcsvFile,
}


def check_path(path: Path) -> None:
    """Refuse a catalogue path that cannot be written, before hours of work. Raises `CatalogError`, `SetupError`."""
    ending = _ending(path)
    if path.is_dir():
        raise CatalogError(f"{path} is a folder; expected the name of a file, such as {path}/catalog.parquet")
    try:
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise CatalogError(
            f"folder {path.parent} does not exist or cannot be written ({error.strerror}); make it or choose another"
        ) from None
    if ending == MOC:
        require_mocpy()


def open_catalog(
    paths: Sequence[Path],
    bands: Sequence[str],
    classes: Sequence[str],
    provenance: Mapping[str, str],
    wcs: WCS | None = None,
) -> CatalogWriter:
    """A writer of one catalogue to ``paths``, each of a format by its ending.

    ``bands`` and ``classes``, where given, join the ``provenance``; ``wcs`` puts DS9's regions on the sky.
    Raises `CatalogError`, `SetupError` for a path that cannot be written.
    """
    known = {"bands": ",".join(bands), "classes": ",".join(classes)}
    return CatalogWriter(paths, {**provenance, **{key: value for key, value in known.items() if value}}, wcs)


def write_catalog(table: Table, path: Path) -> None:
    """Write a whole table, with what its meta says as provenance."""
    with open_catalog([path], (), (), {key: str(value) for key, value in table.meta.items()}) as catalog:
        catalog.write(table)


class CatalogWriter:
    """Takes rows any number of times and writes all formats in one pass; as a context manager it closes itself.

    Rows are handed on in parts of `PART_ROWS`, in the order given. What fails takes all files with it: make room, and write
    again from the first row.
    """

    def __init__(self, paths: Sequence[Path], provenance: Mapping[str, str], wcs: WCS | None = None) -> None:
        for path in paths:
            check_path(path)
        self.provenance = dict(provenance)
        self.rows = 0
        self._coverage: Coverage | None = None
        self._columns: Table | None = None
        self._waiting: list[Table] = []
        for path in paths:
            _remove_leftovers(path)
        self._staging = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in paths}
        self._files: dict[Path, TableFile] = {}
        for path, staging in self._staging.items():
            ending = _ending(path)
            with self._guard(path):
                if ending == ".reg":
                    self._files[path] = RegionFile(staging, wcs)
                elif ending != MOC:
                    self._files[path] = TABLES[ending](staging)

    def __enter__(self) -> CatalogWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, rows: Table) -> None:
        """Append ``rows``, which have the columns of the rows before; a table of no rows tells the columns of an empty catalogue.

        Raises `CatalogError` where columns differ or a file cannot be written.
        """
        rows = _checked(rows, self._columns)
        if self._columns is None and len(rows):
            self._columns, self._waiting = rows[:0], []
        if len(rows) or self._columns is None:
            self._waiting.append(rows)
        self.rows += len(rows)
        if sum(map(len, self._waiting)) >= PART_ROWS:
            self._flush()

    def cover(self, coverage: Coverage) -> None:
        """Tell the area that was searched, for files that end in .moc.fits."""
        self._coverage = coverage

    def annotate(self, provenance: Mapping[str, str]) -> None:
        """Add to the provenance, such as the time that it took."""
        self.provenance.update(provenance)

    def close(self) -> None:
        """Finish all files and give them their names, once. Raises `CatalogError` where one cannot be written."""
        if not self._staging:
            return
        if not self._waiting and not self.rows:
            self.abort()
            raise ValueError("nothing was written; write a table of no rows to tell the columns of an empty catalogue")
        self._flush(at_end=True)
        for path, staging in self._staging.items():
            with self._guard(path):
                if path in self._files:
                    self._files[path].close(self.provenance)
                elif self._coverage is None:
                    raise ValueError(f"{path} needs the area that was searched; tell it by `cover` before the end")
                else:
                    self._coverage.write(staging)
        for path, staging in self._staging.items():
            with self._guard(path):
                staging.replace(path)
        self._files, self._staging = {}, {}

    def abort(self) -> None:
        """Remove what was written."""
        for file in self._files.values():
            with suppress(OSError):  # what cannot be written is not wanted any more
                file.abort()
        for staging in self._staging.values():
            staging.unlink(missing_ok=True)

    def _flush(self, at_end: bool = False) -> None:
        """Hand on the waiting rows in parts of `PART_ROWS`, at the end all of them; an empty catalogue has one part of no rows."""
        if not self._waiting:
            return
        rows = _stacked(self._waiting)
        stop = len(rows) if at_end else len(rows) // PART_ROWS * PART_ROWS
        for begin in range(0, max(stop, 1), PART_ROWS):
            part = rows[begin : min(begin + PART_ROWS, stop)]
            part.meta = dict(self.provenance)
            for path, file in self._files.items():
                with self._guard(path):
                    file.write(part)
        self._waiting = [rows[stop:].copy()] if stop < len(rows) else []

    @contextmanager
    def _guard(self, path: Path) -> Iterator[None]:
        """Remove everything if the block fails, and say so in the words of users if the file system is the cause."""
        try:
            yield
        except OSError as error:
            self.abort()
            raise CatalogError(f"{path} could not be written ({error}); free space or choose another place, and repeat") from None
        except BaseException:
            self.abort()
            raise


def _ending(path: Path) -> str:
    """The entry of `FORMATS` that ``path`` ends in."""
    endings = [ending for ending in FORMATS if path.name.endswith(ending)]
    if not endings:
        raise CatalogError(f"{path} ends in {path.suffix!r}; expected one of {', '.join(FORMATS)}")
    return max(endings, key=len)


def _checked(rows: Table, columns: Table | None) -> Table:
    """The rows as plain columns, of the types of ``columns`` where those are known."""
    if columns is not None and rows.colnames != columns.colnames:
        difference = sorted(set(rows.colnames) ^ set(columns.colnames)) or "their order"
        raise CatalogError(f"rows differ from those before in columns: {difference}; give all parts the same")
    plain = {name: _plain(rows[name], None if columns is None else columns[name]) for name in rows.colnames}
    return Table(plain, copy=False)


def _plain(column: TableColumn, like: TableColumn | None) -> TableColumn:
    """The column without mask or quantity, of the type of ``like``."""
    array = _filled(column)
    if like is not None and len(array):
        if array.shape[1:] != like.shape[1:] or not np.can_cast(array.dtype, like.dtype, "same_kind"):
            expected = f"{like.dtype} of shape (N, {', '.join(map(str, like.shape[1:]))})"
            raise CatalogError(f"column {column.name!r} is {array.dtype} of shape {array.shape}; the rows before had {expected}")
        if like.dtype.kind in "SU" and array.dtype.itemsize > like.dtype.itemsize:
            raise CatalogError(f"column {column.name!r} is {array.dtype}; the rows before had shorter text, {like.dtype}")
        array = array.astype(like.dtype, copy=False)
    return TableColumn(array, column.name, description=column.info.description, unit=column.unit, meta=dict(column.info.meta or {}))


def _filled(column: TableColumn) -> Array:
    """The values, NaN or empty where they are masked."""
    mask = getattr(column, "mask", None)
    if mask is None or not np.any(mask):
        return np.asarray(column)
    if column.dtype.kind not in "fSUO":
        raise CatalogError(f"column {column.name!r} of {column.dtype} has missing values; fill them or leave the column out")
    return np.asarray(column.filled(np.nan if column.dtype.kind == "f" else ""))


def _stacked(tables: Sequence[Table]) -> Table:
    """The rows of all ``tables``, whose columns are alike."""
    first = tables[0]
    if len(tables) == 1:
        return first
    columns = {}
    for name in first.colnames:
        array = np.concatenate([np.asarray(table[name]) for table in tables])
        like = first[name]
        columns[name] = TableColumn(array, name, description=like.description, unit=like.unit, meta=dict(like.meta))
    return Table(columns, copy=False)


def _remove_leftovers(path: Path) -> None:
    """Remove what killed writers of ``path`` have left beside it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        process = left.name.rpartition(".")[2]
        if process.isdecimal() and not _is_alive(int(process)):
            left.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
