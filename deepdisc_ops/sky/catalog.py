"""The catalogue: one row an object, units and descriptions with the columns, provenance with the table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy import units
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import NDArray

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.sky.coordinates import icrs_positions
from deepdisc_ops.sky.detections import Detections

FORMATS = (".parquet", ".fits")


@dataclass(frozen=True)
class Column:
    """Unit and meaning of a catalogue column."""

    description: str
    unit: str | None = None


COLUMNS: dict[str, Column] = {
    "id": Column("number of the object in this catalogue, from 1, row by row of the mosaic"),
    "ra": Column("right ascension of the box centre, ICRS", "deg"),
    "dec": Column("declination of the box centre, ICRS", "deg"),
    "x": Column("column of the box centre, 0-based, first pixel centre at 0", "pix"),
    "y": Column("row of the box centre, 0-based, first pixel centre at 0", "pix"),
    "x0": Column("left edge of the box", "pix"),
    "y0": Column("lower edge of the box", "pix"),
    "x1": Column("right edge of the box, exclusive", "pix"),
    "y1": Column("upper edge of the box, exclusive", "pix"),
    "score": Column("detection score, mean over members"),
    "class": Column("index into the model's classes"),
    "z_mode": Column("highest point of p(z), z >= 0"),
    "z_median": Column("median of p(z), z >= 0"),
    "z_mean": Column("mean of p(z), z >= 0"),
    "z_std": Column("standard deviation of p(z), z >= 0"),
    "z_lo68": Column("16th percentile of p(z), z >= 0"),
    "z_hi68": Column("84th percentile of p(z), z >= 0"),
    "z_lo95": Column("2.5th percentile of p(z), z >= 0"),
    "z_hi95": Column("97.5th percentile of p(z), z >= 0"),
    "z_second_peak": Column("second highest maximum of p(z), NaN if there is none"),
    "z_second_weight": Column("probability of the second peak"),
    "mass_below_zero": Column("probability the mixture puts at z < 0, cut away in the columns above"),
    "mix_weights": Column("weights of the Gaussian components of p(z)"),
    "mix_means": Column("means of the components, redshift"),
    "mix_sigmas": Column("standard deviations of the components, redshift"),
    "n_members": Column("ensemble members that found the object"),
    "ebv": Column("Milky Way E(B-V) the redshift was computed with", "mag"),
    "flags": Column("bits: 1 edge of the mosaic, 2 truncated by a tile, 4 masked pixels, 8 forced, 16 out of domain"),
}


def build_catalog(
    detections: Detections, summary: Mapping[str, NDArray[np.floating]], wcs: WCS | None, provenance: Mapping[str, str]
) -> Table:
    """A table with the columns of `COLUMNS`; ``summary`` gives the z columns, without ``wcs`` ra and dec are NaN."""
    centre, boxes = detections.centres.astype(np.float64), detections.boxes
    order = np.lexsort((centre[:, 0], centre[:, 1]))
    x, y = centre.T
    nowhere = np.full(len(x), np.nan)
    ra, dec = icrs_positions(wcs, x, y) if wcs is not None else (nowhere, nowhere)
    values = {
        "id": np.arange(1, len(x) + 1),
        "ra": ra,
        "dec": dec,
        "x": x,
        "y": y,
        **dict(zip(("x0", "y0", "x1", "y1"), boxes.T, strict=True)),
        "score": detections.scores,
        "class": detections.classes,
        **summary,
        "mix_weights": detections.weights,
        "mix_means": detections.means,
        "mix_sigmas": detections.sigmas,
        "n_members": detections.n_members,
        "ebv": detections.ebv,
        "flags": detections.flags,
    }
    table = Table()
    for name, column in COLUMNS.items():
        array = values[name]
        table[name] = array if name == "id" else np.asarray(array)[order]
        table[name].description = column.description
        table[name].unit = units.Unit(column.unit) if column.unit else None
    table.meta.update(provenance)
    return table


def check_path(path: Path) -> None:
    """Refuse a catalogue path that cannot be written, before hours of work."""
    if path.suffix not in FORMATS:
        raise CatalogError(f"{path} ends in {path.suffix!r}; expected one of {', '.join(FORMATS)}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise CatalogError(f"folder {path.parent} does not exist or cannot be written; make it or choose another")


def write_catalog(table: Table, path: Path) -> None:
    """Write Parquet or FITS by suffix, under a temporary name first."""
    check_path(path)
    staging = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        if path.suffix == ".parquet":
            _write_parquet(table, staging)
        else:
            table.write(staging, format="fits", overwrite=True)
        staging.replace(path)
    except OSError as error:
        raise CatalogError(f"{path} could not be written ({error}); free space and repeat") from None
    finally:
        staging.unlink(missing_ok=True)


def read_catalog(path: Path, hdu: str | None = None) -> Table:
    """Read a catalogue written by `write_catalog`, or table ``hdu`` of a FITS file."""
    if not path.exists():
        raise CatalogError(f"catalogue {path} does not exist")
    try:
        if path.suffix == ".parquet":
            return _read_parquet(path)
        return Table.read(path, format="fits", hdu=hdu or 1)
    except (OSError, ValueError, KeyError) as error:
        raise CatalogError(f"{path} cannot be read as a table ({error}); expected {', '.join(FORMATS)}") from None


def _write_parquet(table: Table, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    arrays, fields = [], []
    for name in table.colnames:
        column = np.asarray(table[name])
        array = pa.array(list(column)) if column.ndim == 2 and len(column) else _flat_array(column)
        metadata = {"description": table[name].description or "", "unit": str(table[name].unit or "")}
        arrays.append(array)
        fields.append(pa.field(name, array.type, metadata=metadata))
    schema = pa.schema(fields, metadata={str(key): str(value) for key, value in table.meta.items()})
    parquet.write_table(pa.Table.from_arrays(arrays, schema=schema), path)


def _flat_array(column: NDArray[np.generic]) -> Any:
    import pyarrow as pa

    return pa.array(column) if column.ndim == 1 else pa.array([], type=pa.list_(pa.from_numpy_dtype(column.dtype)))


def _read_parquet(path: Path) -> Table:
    import pyarrow.parquet as parquet
    from pyarrow import types

    source = parquet.read_table(path)
    table = Table()
    for field in source.schema:
        column = source[field.name].combine_chunks()
        if types.is_list(field.type):
            values = column.flatten().to_numpy(zero_copy_only=False)
            array = values.reshape(len(column), -1) if len(column) else values.reshape(0, 0)
        else:
            array = column.to_numpy(zero_copy_only=False)
        table[field.name] = array
        metadata = field.metadata or {}
        table[field.name].description = metadata.get(b"description", b"").decode() or None
        unit = metadata.get(b"unit", b"").decode()
        table[field.name].unit = units.Unit(unit) if unit else None
    table.meta.update({key.decode(): value.decode() for key, value in (source.schema.metadata or {}).items()})
    return table
