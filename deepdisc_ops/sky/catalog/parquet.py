"""Parquet: a row group for each part; mixtures as lists; unit, description and UCD with the fields, provenance with the schema."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from astropy import units
from astropy.table import Table

from deepdisc_ops.sky.detections import Array


class ParquetFile:
    """A Parquet file that is written in parts of equal columns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._writer: Any = None
        self._known: dict[str, str] = {}

    def write(self, rows: Table) -> None:
        """Append ``rows`` as a row group."""
        import pyarrow as pa
        import pyarrow.parquet as parquet

        part = arrow_table(rows)
        if self._writer is None:
            self._known = dict(rows.meta)
            self._writer = parquet.ParquetWriter(self._file, part.schema, compression="zstd")
        self._writer.write_table(pa.Table.from_arrays(part.columns, schema=self._writer.schema))

    def close(self, provenance: Mapping[str, str]) -> None:
        """Finish the file; what ``provenance`` has beyond the first part's goes to the end of the file."""
        late = {key: value for key, value in provenance.items() if self._known.get(key) != value}
        if late:
            self._writer.add_key_value_metadata(late)
        self._writer.close()
        self._file.close()

    def abort(self) -> None:
        """Let go of the file, whatever state it is in."""
        self._file.close()


def read_parquet(path: Path) -> Table:
    """A table with units, descriptions, UCDs and provenance, where the file has them."""
    import pyarrow.parquet as parquet
    from pyarrow import types

    with parquet.ParquetFile(path) as file:
        source, described = file.read(), file.metadata.metadata or {}
    table = Table()
    for field in source.schema:
        column = source[field.name].combine_chunks()
        if types.is_list(field.type):
            values = column.flatten().to_numpy(zero_copy_only=False)
            array = values.reshape(len(column), -1) if len(column) else values.reshape(0, 0)
        else:
            array = column.to_numpy(zero_copy_only=False)
        table[field.name] = array
        metadata = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
        table[field.name].description = metadata.get("description") or None
        table[field.name].unit = units.Unit(metadata["unit"]) if metadata.get("unit") else None
        if metadata.get("ucd"):
            table[field.name].meta["ucd"] = metadata["ucd"]
    provenance = {**(source.schema.metadata or {}), **described}
    table.meta.update({key.decode(): value.decode() for key, value in provenance.items() if key != b"ARROW:schema"})
    return table


def arrow_table(rows: Table) -> Any:
    """``rows`` as a pyarrow table: mixtures as lists, units and descriptions with the fields, provenance with the schema."""
    import pyarrow as pa

    arrays = [_arrow(np.asarray(rows[name])) for name in rows.colnames]
    described = zip(rows.colnames, arrays, strict=True)
    fields = [pa.field(name, array.type, metadata=_field_metadata(rows[name])) for name, array in described]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata={key: str(value) for key, value in rows.meta.items()}))


def _arrow(column: Array) -> Any:
    import pyarrow as pa

    column = column.astype(column.dtype.newbyteorder("="), copy=False)
    if column.ndim == 1:
        return pa.array(column, pa.string() if column.dtype.kind == "O" else None)
    offsets = np.arange(len(column) + 1, dtype=np.int32) * np.int32(column.shape[1])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(column.reshape(-1)))


def _field_metadata(column: Any) -> dict[str, str]:
    return {"description": column.description or "", "unit": str(column.unit or ""), "ucd": column.meta.get("ucd", "")}
