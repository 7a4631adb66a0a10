"""ECSV (Enhanced Character-Separated Values): text that astropy and people read; for small catalogues, as it is large and slow."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from astropy.table import Column, Table

from deepdisc_ops.sky.detections import Array


class EcsvFile:
    """An ECSV file; its header, which holds the provenance, is written last, so the rows wait in an unnamed file beside it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", newline="\n")
        self._body = TemporaryFile("w+", dir=path.parent, encoding="utf-8", newline="\n")  # noqa: SIM115 - until the end
        self._columns: Table | None = None
        self._empty = True

    def write(self, rows: Table) -> None:
        """Append ``rows``."""
        if self._columns is None:
            self._columns = rows[:0]
        self._empty = self._empty and not len(rows)
        cells = [_cells(np.asarray(rows[name])) for name in rows.colnames]
        csv.writer(self._body, delimiter=" ", lineterminator="\n").writerows(zip(*cells, strict=True))

    def close(self, provenance: Mapping[str, str]) -> None:
        """Write the header and the rows behind it."""
        assert self._columns is not None
        # astropy does not read vectors of which there are none
        columns = {name: _described(self._columns[name], flat=self._empty) for name in self._columns.colnames}
        Table(columns, meta=dict(provenance), copy=False).write(self._file, format="ascii.ecsv")
        self._body.seek(0)
        shutil.copyfileobj(self._body, self._file)
        self._body.close()
        self._file.close()

    def abort(self) -> None:
        """Let go of the files, whatever state they are in."""
        with suppress(OSError):
            self._body.close()
        self._file.close()


def read_ecsv(path: Path) -> Table:
    """The table with everything its header says."""
    return Table.read(path, format="ascii.ecsv")


def _described(column: Column, flat: bool) -> Column:
    """A column for the header: with text of a fixed length, as ECSV knows no other, and without its second axis if ``flat``."""
    array = np.asarray(column)
    array = array.astype(str) if array.dtype.kind == "O" else array
    array = array.reshape(-1) if flat else array
    return Column(array, column.name, description=column.description, unit=column.unit, meta=dict(column.meta))


def _cells(array: Array) -> list[str]:
    """The text of each value, of a vector as JSON; no digit is lost."""
    if array.ndim == 1:
        return list(array.astype(str).tolist())
    return [f"[{','.join(values).replace('nan', 'NaN')}]" for values in array.astype(str).tolist()]
