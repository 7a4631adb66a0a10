"""HDF5 in the layout of qp: one file is the table of objects and, where it has mixtures, the ensemble that `qp.read` opens.

meta/pdf_name and pdf_version: mixmod, 0. data/weights, means and stds (N, K): the mixtures, where a component of weight 0 is
0 ± 1. ancil: a data set (N,) for every other column with its description, unit and ucd as attributes; the group's attribute
columns is the order of all. vectors: columns (N, k), with which qp could not take one object out of an ensemble. The attributes
of the file are the provenance.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from astropy import units
from astropy.table import Table

from deepdisc_ops.errors import CatalogError

MIXTURE = {"mix_weights": "data/weights", "mix_means": "data/means", "mix_sigmas": "data/stds"}
CHUNK_BYTES = 2**16
TEXT_BYTES = 64
"""Of a text's place in HDF5, beyond its letters."""
FILE_BYTES = 2**20
"""Of the structure of a file beyond the data, and what a part adds to it."""


class Hdf5File:
    """An HDF5 file whose data sets grow with each part."""

    def __init__(self, path: Path) -> None:
        import h5py

        self._path = path
        self._file = h5py.File(path, "w")

    def write(self, rows: Table) -> None:
        """Append ``rows`` to every data set."""
        self._make_room(rows)
        names = {name: _place(name, np.ndim(rows[name])) for name in rows.colnames}
        if not self._file.keys():
            self._begin(rows, names)
        absent = np.asarray(rows["mix_weights"]) <= 0 if "meta" in self._file else None
        for name, place in names.items():
            array = np.asarray(rows[name])
            if absent is not None and name in ("mix_means", "mix_sigmas"):
                array = np.where(absent, array.dtype.type(name == "mix_sigmas"), array)
            data = self._file[place]
            data.resize(len(data) + len(array), axis=0)
            if len(array):
                data[-len(array) :] = array.astype(object) if array.dtype.kind == "U" else array

    def close(self, provenance: Mapping[str, str]) -> None:
        """Write the provenance and finish the file."""
        for key, value in provenance.items():
            self._file.attrs[key] = value
        self._file.flush()
        size = self._file.id.get_filesize()
        self._file.close()
        os.truncate(self._path, size)

    def abort(self) -> None:
        """Let go of the file, whatever state it is in."""
        self._file.close()

    def _make_room(self, rows: Table) -> None:
        """Claim the disk space that ``rows`` may take: the HDF5 library does not survive a disk that fills up under it."""
        arrays = [np.asarray(rows[name]) for name in rows.colnames]
        texts = sum(2 * (TEXT_BYTES + len(str(text))) for array in arrays if array.dtype.kind in "UO" for text in array)
        size = sum(array.nbytes + CHUNK_BYTES for array in arrays) + texts + FILE_BYTES
        with self._path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), self._file.id.get_filesize(), size)

    def _begin(self, rows: Table, names: Mapping[str, str]) -> None:
        import h5py

        self._file.create_group("ancil").attrs["columns"] = rows.colnames
        if set(MIXTURE) <= set(rows.colnames):
            self._file["meta/pdf_name"] = np.array([b"mixmod"])
            self._file["meta/pdf_version"] = np.array([0])
        for name, place in names.items():
            array, column = np.asarray(rows[name]), rows[name]
            text = array.dtype.kind in "UO"
            dtype = h5py.string_dtype() if text else array.dtype
            row_bytes = TEXT_BYTES if text else array.dtype.itemsize * int(np.prod(array.shape[1:]))
            chunk = (max(1, min(CHUNK_BYTES // max(row_bytes, 1), len(rows))), *array.shape[1:])
            shape, limit = (0, *array.shape[1:]), (None, *array.shape[1:])
            data = self._file.create_dataset(place, shape, dtype, maxshape=limit, chunks=chunk)
            for key, value in (("description", column.description), ("unit", column.unit), ("ucd", column.meta.get("ucd"))):
                data.attrs[key] = str(value or "")


def read_hdf5(path: Path) -> Table:
    """The table of a file of this layout."""
    import h5py

    with h5py.File(path) as file:
        if "columns" not in getattr(file.get("ancil"), "attrs", ()):
            raise CatalogError(f"{path} has no group 'ancil' that lists its columns; expected a catalogue written by deepdisc-ops")
        table = Table()
        for name in file["ancil"].attrs["columns"]:
            data = next(file[place] for place in (_place(name, 1), _place(name, 2)) if place in file)
            table[name] = data.asstr()[:] if h5py.check_string_dtype(data.dtype) else data[:]
            table[name].description = data.attrs.get("description") or None
            table[name].unit = units.Unit(data.attrs["unit"]) if data.attrs.get("unit") else None
            if data.attrs.get("ucd"):
                table[name].meta["ucd"] = data.attrs["ucd"]
        table.meta.update({key: value for key, value in file.attrs.items() if isinstance(value, str)})
    return table


def _place(name: str, ndim: int) -> str:
    return MIXTURE.get(name, f"{'ancil' if ndim == 1 else 'vectors'}/{name}")
