"""A given list of objects, such as the detections of another band or survey, as boxes in the pixels of a mosaic.

Glossary: N given objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from astropy import units
from astropy.table import Column as TableColumn
from astropy.table import Table
from numpy.typing import NDArray

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.sky.catalog import Column, read_catalog
from deepdisc_ops.sky.coordinates import pixel_positions
from deepdisc_ops.sky.detections import Array
from deepdisc_ops.sky.images import Mosaic

BOX = ("x0", "y0", "x1", "y1")
PREFIX = "given_"
ROW = f"{PREFIX}row"
"""Column of the number of the row in the given list, from 0; -1 for an object that is not in it."""


@dataclass(frozen=True)
class Given:
    """N given objects: boxes (N, 4) in pixels of the mosaic, NaN where the sky does not come down on its plane.

    columns (N, ...) go with them under the names that the catalogue gives them; described: what they are.
    """

    boxes: NDArray[np.float32]
    columns: Mapping[str, Array] = field(default_factory=dict)
    described: Mapping[str, Column] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.boxes)

    def carried(self, rows: Array) -> dict[str, Array]:
        """The columns of ``rows``, indices of which -1 is an object that is not in the list: NaN there, -1, False or no text."""
        unknown = rows < 0
        found: dict[str, Array] = {ROW: rows.astype(np.int64)}
        for name, column in self.columns.items():
            # an empty list has no row to take: one of zeros is put behind it
            padded = np.concatenate([column, np.zeros((1, *column.shape[1:]), column.dtype)])
            values = padded[np.where(unknown, len(column), rows)]
            values[unknown] = _nothing(column.dtype)
            found[name] = values
        return found


def read_given(path: Path, mosaic: Mosaic, columns: Sequence[str] = (), size: str | float | None = None) -> Given:
    """Read a table of objects and carry ``columns`` of it along, their names with `PREFIX`.

    Without ``size`` the table has boxes, the columns x0, y0, x1, y1 in pixels of the mosaic as our catalogues have them. With
    it, ra and dec (degrees, ICRS), and squares about them whose side is ``size``: arcsec, or a column of arcsec. Units in the
    table count. Raises `CatalogError`.
    """
    table = read_catalog(path)
    boxes = _given_boxes(table, path) if size is None else _squares(table, path, mosaic, size)
    _require(table, path, columns, "to carry along")
    carried = {f"{PREFIX}{name}": _plain(table[name], path) for name in columns}
    described = {ROW: Column(f"row in {path.name}, -1 for an object that is not in it")}
    for name in columns:
        text = table[name].info.description or "carried along"
        described[f"{PREFIX}{name}"] = Column(f"{name} of {path.name}: {text}", _unit(table[name]))
    return Given(boxes, carried, described)


def _given_boxes(table: Table, path: Path) -> NDArray[np.float32]:
    if not set(BOX) <= set(table.colnames) and {"ra", "dec"} <= set(table.colnames):
        raise CatalogError(
            f"{path} has positions and no boxes ({', '.join(BOX)}); give the boxes' side, a number of arcsec or a column of it"
        )
    _require(table, path, BOX, "in pixels of the mosaic")
    boxes = np.stack([_numbers(table[name], None) for name in BOX], axis=1).reshape(-1, 4)
    wrong = np.flatnonzero(~(np.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)))
    if len(wrong):
        raise CatalogError(
            f"{len(wrong)} of {len(boxes)} boxes of {path} have no extent, the first in row {wrong[0]}, "
            f"{boxes[wrong[0]].tolist()}; expected finite x0 < x1, y0 < y1 in pixels"
        )
    return boxes.astype(np.float32)


def _squares(table: Table, path: Path, mosaic: Mosaic, size: str | float) -> NDArray[np.float32]:
    if mosaic.wcs is None:
        raise CatalogError(f"{path} has positions on the sky and the image has no WCS; give boxes in pixels ({', '.join(BOX)})")
    _require(table, path, ("ra", "dec"), "in degrees")
    ra, dec = (_numbers(table[name], units.deg) for name in ("ra", "dec"))
    if isinstance(size, str):
        _require(table, path, (size,), "of the boxes' sides in arcsec")
        side = _numbers(table[size], units.arcsec)
    else:
        side = np.full(len(table), float(size))
    wrong = np.flatnonzero(~(np.isfinite(ra) & (np.abs(dec) <= 90) & np.isfinite(side) & (side > 0)))
    if len(wrong):
        row = wrong[0]
        raise CatalogError(
            f"{len(wrong)} of {len(table)} rows of {path} have no position or size, the first row {row}: ra {ra[row]:g}, "
            f"dec {dec[row]:g}, size {side[row]:g}; expected degrees, and arcsec above 0"
        )
    x, y = pixel_positions(mosaic.wcs, ra, dec, mosaic.width, mosaic.height)
    centre, half = np.stack([x, y], axis=1) + 0.5, (side / mosaic.pixel_scale / 2)[:, None]
    return np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)


def _require(table: Table, path: Path, names: Sequence[str], what: str) -> None:
    missing = [name for name in names if name not in table.colnames]
    if missing:
        raise CatalogError(f"{path} has no column {', '.join(missing)} {what}; it has {', '.join(table.colnames)}")


def _numbers(column: TableColumn, unit: units.Unit | None) -> NDArray[np.float64]:
    """Finite or NaN, in ``unit`` if the column has one."""
    try:
        values = np.asarray(np.ma.filled(np.ma.asarray(column, np.float64), np.nan))
        return np.asarray(values if unit is None or column.unit is None else units.Quantity(values, column.unit).to_value(unit))
    except (TypeError, ValueError) as error:  # a unit that cannot be converted is a TypeError too
        raise CatalogError(f"column {column.info.name} holds no numbers of the kind expected ({error})") from None


def _plain(column: TableColumn, path: Path) -> Array:
    """The values in the machine's byte order, those missing as `_nothing`; text has a length."""
    values = np.asarray(column.filled(_nothing(column.dtype)) if hasattr(column, "filled") else column)
    if values.dtype.kind in "OS":
        values = np.array([value.decode() if isinstance(value, bytes) else str(value) for value in values], "U")
    if values.ndim > 2 or values.dtype.kind not in "biufU":
        raise CatalogError(f"column {column.info.name} of {path} is {values.dtype}, {values.ndim}-dimensional; leave it out")
    return values.astype(values.dtype.newbyteorder("="))


def _nothing(dtype: np.dtype) -> object:
    """What stands for no value."""
    return {"f": np.nan, "i": -1, "u": np.iinfo(dtype).max if dtype.kind == "u" else 0, "b": False}.get(dtype.kind, "")


def _unit(column: TableColumn) -> str | None:
    return None if column.unit is None else column.unit.to_string()
