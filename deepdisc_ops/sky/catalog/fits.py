"""FITS: a binary table that grows, with units, descriptions (TCOMM), UCDs (TUCD) and provenance in its header.

astropy turns each part into the bytes of FITS; this module puts the parts of one table behind each other. Text of no fixed length
is kept as the standard's variable-length arrays: the row holds length and offset, the text lies in the heap behind the table.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np
from astropy.io import fits
from astropy.table import Table

from deepdisc_ops.sky.detections import Array

BLOCK = 2880
CARD = 80
SPARE = 4 * BLOCK
"""Room left in the header of the file for provenance that is known at the end only: the table's header may begin earlier by it."""
TAKEN = ("SIMPLE", "EXTEND", "END", "COMMENT", "HISTORY", "CONTINUE", "HIERARCH", "THEAP")
OTHER = "PROVJSON"
"""Card of the provenance that a plain card cannot hold: long names, names of FITS itself, letters beyond ASCII."""


class FitsFile:
    """A FITS file whose second extension, a table, is written in parts of equal columns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        self._heap: IO[bytes] = TemporaryFile(dir=path.parent)  # noqa: SIM115 - open until the end
        self._header: fits.Header | None = None
        self._texts: list[int] = []
        self._room = self._rows = self._longest = 0

    def write(self, rows: Table) -> None:
        """Append ``rows`` to the table."""
        first, buffer = self._header is None, BytesIO()
        self._texts = [i for i, name in enumerate(rows.colnames) if rows[name].dtype.kind == "O"]
        arrays = {name: np.asarray(rows[name]) for name in rows.colnames}
        arrays |= {rows.colnames[i]: self._in_heap(np.asarray(rows[rows.colnames[i]])) for i in self._texts}
        plain = Table(arrays, copy=False)
        for name in rows.colnames if first else ():
            plain[name].description, plain[name].unit, plain[name].meta = rows[name].description, rows[name].unit, rows[name].meta
        plain.write(buffer, format="fits")
        buffer.seek(0)
        with fits.open(buffer) as made:
            header, place = made[1].header, made[1].fileinfo()
            if first:
                self._start(header, rows)
            size = header["NAXIS1"] * header["NAXIS2"]
            with buffer.getbuffer() as made_bytes:
                self._file.write(made_bytes[place["datLoc"] : place["datLoc"] + size])
        self._rows += len(rows)

    def close(self, provenance: Mapping[str, str]) -> None:
        """Append the heap, write the header and finish the file."""
        header = self._header
        assert header is not None
        heap = self._heap.tell()
        self._heap.seek(0)
        shutil.copyfileobj(self._heap, self._file)
        self._heap.close()
        self._file.write(b"\0" * (-(header["NAXIS1"] * self._rows + heap) % BLOCK))
        header["NAXIS2"], header["PCOUNT"] = self._rows, heap
        for i in self._texts:
            header[f"TFORM{i + 1}"] = f"1QA({self._longest})"
        _add_provenance(header, provenance)
        self._write_headers(header)
        self._file.close()

    def abort(self) -> None:
        """Let go of the file, whatever state it is in."""
        with suppress(OSError):
            self._heap.close()
        self._file.close()

    def _start(self, header: fits.Header, rows: Table) -> None:
        header = header.copy()
        header["EXTNAME"] = "CATALOG"
        for i, name in enumerate(rows.colnames, start=1):
            for key, value in (("TCOMM", rows[name].description), ("TUCD", rows[name].meta.get("ucd"))):
                if value:
                    header.set(f"{key}{i}", value, after=f"TFORM{i}")
        for i in self._texts:
            header.remove(f"TDIM{i + 1}", ignore_missing=True)
        self._header = header
        self._room = BLOCK + SPARE + len(header.tostring())
        self._file.write(b" " * self._room)

    def _in_heap(self, texts: Array) -> Array:
        """Length and offset (N, 2) of texts that are appended to the heap."""
        encoded = [str(text).encode("ascii", "replace") for text in texts]
        lengths = np.array([len(text) for text in encoded], np.int64)
        begin = self._heap.tell() + np.cumsum(lengths) - lengths
        self._heap.write(b"".join(encoded))
        self._longest = max(self._longest, int(lengths.max(initial=0)))
        return np.stack([lengths, begin], axis=1)

    def _write_headers(self, header: fits.Header) -> None:
        """Write the file's header, as long as the table's leaves it, and the table's."""
        table = header.tostring()
        if len(table) + BLOCK > self._room:
            self._make_room(len(table) + BLOCK)
        first = fits.PrimaryHDU().header.tostring(endcard=False, padding=False)
        self._file.seek(0)
        self._file.write((first.ljust(self._room - len(table) - CARD) + "END".ljust(CARD) + table).encode("ascii"))

    def _make_room(self, size: int) -> None:
        """Move the data back, piece by piece from the end, so that the headers may take ``size`` bytes."""
        at = self._file.seek(0, 2)
        while at > self._room:
            start = max(self._room, at - 1024 * BLOCK)
            self._file.seek(start)
            moved = self._file.read(at - start)
            self._file.seek(start + size - self._room)
            self._file.write(moved)
            at = start
        self._room = size


def read_fits(path: Path, hdu: str | None = None) -> Table:
    """Table ``hdu``, or the first, with units, descriptions, UCDs and provenance, where the file has them."""
    table = Table.read(path, format="fits", hdu=hdu or 1)
    for i, name in enumerate(table.colnames, start=1):
        ucd, description = table.meta.pop(f"TUCD{i}", None), table.meta.pop(f"TCOMM{i}", None)
        description = table[name].description or description
        if table[name].dtype.kind == "O":
            table[name] = np.array(["".join(text) for text in table[name]], object)
        table[name].description = description
        if ucd:
            table[name].meta["ucd"] = ucd
    table.convert_bytestring_to_unicode()
    table.meta.pop("EXTNAME", None)
    table.meta.update(json.loads(table.meta.pop(OTHER, "{}")))
    return table


def _add_provenance(header: fits.Header, provenance: Mapping[str, str]) -> None:
    other = {}
    for key, value in provenance.items():
        word = len(key) <= 8 and key.isascii() and key.replace("_", "").isalnum()
        free = key.upper() not in header and key.upper() not in TAKEN
        if word and free and value.isascii() and value.isprintable():
            header[key.upper()] = value
        else:
            other[key] = value
    if other:
        header[OTHER] = json.dumps(other)
