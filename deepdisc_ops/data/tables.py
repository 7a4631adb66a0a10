"""Users' catalogues: any table file, any column names, into columns of known meaning and unit.

A `CatalogColumns` says which column of the file is what, `Rule`s say which rows count; both come from YAML.
Positions are ICRS degrees, brightness is AB magnitude in the end: fluxes need a unit, in the file or declared, counts a zero
point. Reading checks everything before anything is made of it.

Glossary: N rows.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from astropy import units
from astropy.table import MaskedColumn, Table
from astropy.units import UnitsWarning
from astropy.wcs import WCS
from numpy.typing import NDArray
from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from deepdisc_ops.config import Settings
from deepdisc_ops.data.records import GALAXY, STAR
from deepdisc_ops.errors import CatalogError
from deepdisc_ops.sky.fluxes import NJY_ZERO_POINT

Floats = NDArray[np.float64]
Value = StrictBool | StrictInt | StrictFloat | StrictStr

ASTROPY_FORMATS = {
    ".fits": "fits",
    ".fit": "fits",
    ".gz": "fits",
    ".csv": "ascii.csv",
    ".ecsv": "ascii.ecsv",
    ".txt": "ascii.commented_header",
    ".parquet": "parquet",
    ".vot": "votable",
}
HDF5_SUFFIXES = (".h5", ".hdf5")
SHOWN = 5
"""Offending values that an error names."""


class Rule(Settings):
    """A named condition on one column of a catalogue; a masked value fails all conditions but ``not_in``.

    Texts are compared without case and outer blanks; truth values are compared with texts as `true` and `false`.
    """

    name: str = Field(description="what the rule is called in the summary")
    column: str
    is_in: tuple[Value, ...] | None = None
    not_in: tuple[Value, ...] | None = None
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_condition(self) -> Rule:
        given = [key for key in ("is_in", "not_in", "at_least", "at_most") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"rule {self.name!r} has {' and '.join(given) or 'no condition'}; expected one of is_in, not_in, at_least, at_most"
            )
        return self

    def passes(self, table: Table, source: str) -> NDArray[np.bool_]:
        """(N,) which rows fulfil the condition."""
        require(table, [self.column], source)
        column = table[self.column]
        masked = np.asarray(getattr(column, "mask", np.zeros(len(table), bool)))
        if self.is_in is not None:
            return self._among(column, self.is_in, source) & ~masked
        if self.not_in is not None:
            return ~self._among(column, self.not_in, source) | masked
        values = numbers(table, self.column, source)
        lowest = -np.inf if self.at_least is None else self.at_least
        highest = np.inf if self.at_most is None else self.at_most
        return np.asarray((values >= lowest) & (values <= highest))

    def _among(self, column: Any, wanted: Sequence[Value], source: str) -> NDArray[np.bool_]:
        values = np.asarray(column)
        if values.dtype.kind in "USO":
            return np.isin([as_text(value).casefold() for value in values], [as_text(value).casefold() for value in wanted])
        texts = [value for value in wanted if isinstance(value, str)]
        if texts:
            raise CatalogError(
                f"{source}: rule {self.name!r} compares {self.column} with {texts[0]!r}, but the column holds {values.dtype} "
                "values; give numbers or truth values"
            )
        return np.isin(values, np.array(wanted, np.float64))


class CatalogColumns(Settings):
    """Which column of a user's catalogue is what."""

    id: str = Field("id", description="whole numbers, each once")
    ra: str = Field("ra", description="right ascension, degrees unless the column has a unit of its own")
    dec: str = Field("dec", description="declination, the same")
    magnitudes: dict[str, str] = Field({}, description="column of the magnitude or flux in each band")
    unit: str | None = Field(None, description="unit of those columns where the file has none: mag, nJy, uJy, Jy, erg/s/cm2/Hz")
    zero_point: float | None = Field(None, description="AB magnitude of one count, where the columns are counts")
    redshift: str | None = Field(None, description="NaN for none")
    no_redshift: tuple[float, ...] = Field((), description="values that mean no redshift, as -1 or -99")
    star: str | None = Field(None, description="column that tells stars from galaxies")
    star_values: tuple[Value, ...] = Field((True,), description="its values for a star")
    box: tuple[str, str, str, str] | None = Field(None, description="columns of x0, y0, x1, y1 in 0-based pixels of the mosaic")
    box_end: Literal["inclusive", "exclusive"] = Field("inclusive", description="whether x1, y1 are the last pixel or its far edge")


class CatalogSettings(Settings):
    """A user's catalogue: where it is, what its columns mean, which rows count."""

    path: Path
    columns: CatalogColumns = CatalogColumns()
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class Sources:
    """N sources of a catalogue.

    ids (N,) int64, each once; ra, dec (N,) ICRS degrees; redshift (N,), NaN for none; classes (N,) 0 galaxy, 1 star;
    magnitudes: AB by band, (N,) each, NaN for none; boxes (N, 4) x0, y0, x1, y1 in pixels of the mosaic, edges, or None.
    """

    ids: NDArray[np.int64]
    ra: Floats
    dec: Floats
    redshift: Floats
    classes: NDArray[np.int32]
    magnitudes: Mapping[str, Floats]
    boxes: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def magnitude(self, band: str) -> Floats:
        """(N,) AB magnitudes in a band, NaN where the catalogue has none."""
        return self.magnitudes.get(band, np.full(len(self), np.nan))

    def select(self, which: NDArray[np.generic]) -> Sources:
        """The sources of an index array or a mask."""
        return Sources(
            self.ids[which],
            self.ra[which],
            self.dec[which],
            self.redshift[which],
            self.classes[which],
            {band: values[which] for band, values in self.magnitudes.items()},
            None if self.boxes is None else self.boxes[which],
        )


def read_table(path: Path) -> Table:
    """A table file: FITS, CSV, ECSV, text with a commented header, Parquet, VOTable, or HDF5 with one data set a column."""
    suffix = path.suffix.lower()
    if suffix not in ASTROPY_FORMATS and suffix not in HDF5_SUFFIXES:
        known = ", ".join((*ASTROPY_FORMATS, *HDF5_SUFFIXES))
        raise CatalogError(f"catalogue {path} has an unknown ending; expected one of {known}")
    if not path.is_file():
        raise CatalogError(f"catalogue {path} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnitsWarning)
            table = _read_hdf5(path) if suffix in HDF5_SUFFIXES else Table.read(path, format=ASTROPY_FORMATS[suffix])
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise CatalogError(f"catalogue {path} cannot be read: {' '.join(str(error).split())}") from None
    if not len(table):
        raise CatalogError(f"catalogue {path} has no rows; expected at least one source")
    return table


def select_rows(table: Table, rules: Iterable[Rule], source: str) -> tuple[Table, list[tuple[str, int]]]:
    """The rows that pass all rules, and how many each rule took away, one after the other; no row left is an error."""
    removed = []
    total = len(table)
    for rule in rules:
        passes = rule.passes(table, source)
        removed.append((rule.name, int((~passes).sum())))
        table = table[passes]
    if not len(table):
        steps = ", ".join(f"{name} {count}" for name, count in removed)
        raise CatalogError(f"{source}: no row of {total} is left (removed by {steps}); loosen the rules")
    return table, removed


def read_sources(table: Table, columns: CatalogColumns, source: str) -> Sources:
    """Sources of a user's table; every fault is a `CatalogError` that begins with ``source``."""
    optional = [name for name in (columns.redshift, columns.star) if name]
    require(table, [columns.id, columns.ra, columns.dec, *optional, *columns.magnitudes.values(), *(columns.box or ())], source)
    ra, dec = positions(table, columns.ra, columns.dec, source)
    star = Rule(name="star", column=columns.star, is_in=columns.star_values).passes(table, source) if columns.star else None
    return Sources(
        ids=identifiers(table, columns.id, source),
        ra=ra,
        dec=dec,
        redshift=redshifts(table, columns.redshift, columns.no_redshift, source),
        classes=np.full(len(table), GALAXY, np.int32) if star is None else np.where(star, STAR, GALAXY).astype(np.int32),
        magnitudes={
            band: ab_magnitudes(table, name, columns.unit, columns.zero_point, source) for band, name in columns.magnitudes.items()
        },
        boxes=_boxes(table, columns, source),
    )


def require(table: Table, names: Sequence[str], source: str) -> None:
    """Raise a `CatalogError` that names all missing columns and the closest there are."""
    missing = [name for name in names if name not in table.colnames]
    if not missing:
        return
    hints = []
    for name in missing:
        folded = {other.casefold(): other for other in table.colnames}
        near = difflib.get_close_matches(name.casefold(), folded, n=2, cutoff=0.5)
        hints.append(f"{name!r}" + (f" (close: {', '.join(folded[other] for other in near)})" if near else ""))
    listed = ", ".join(table.colnames[:30]) + (", ..." if len(table.colnames) > 30 else "")
    raise CatalogError(f"{source} lacks the column{'s' * (len(missing) > 1)} {', '.join(hints)}; it has {listed}")


def numbers(table: Table, name: str, source: str) -> Floats:
    """(N,) values of a column as numbers, masked ones NaN."""
    column = table[name]
    if column.dtype.kind not in "biuf" or column.ndim != 1:
        raise CatalogError(f"{source}: column {name} holds {column.dtype} of shape {column.shape}; expected one number a row")
    values = np.array(column, np.float64)
    if isinstance(column, MaskedColumn):
        values[np.asarray(column.mask)] = np.nan
    return values


def identifiers(table: Table, name: str, source: str) -> NDArray[np.int64]:
    """(N,) whole numbers, each once."""
    column = table[name]
    if column.dtype.kind not in "iu" or (isinstance(column, MaskedColumn) and np.any(column.mask)):
        values = numbers(table, name, source)
        if not (np.isfinite(values) & (values == np.rint(values)) & (np.abs(values) < 2**53)).all():
            raise CatalogError(f"{source}: column {name} holds values that are no whole numbers; expected an id for every row")
    ids = np.asarray(column).astype(np.int64)
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        double = values[counts > 1]
        raise CatalogError(
            f"{source}: {len(double)} ids of column {name} appear more than once ({_some(double)}); keep one row for each source"
        )
    return ids


def positions(table: Table, ra: str, dec: str, source: str) -> tuple[Floats, Floats]:
    """ra, dec (N,) in ICRS degrees; the columns' own angular units are honoured."""
    pair = []
    for name in (ra, dec):
        unit = table[name].unit or units.deg
        try:
            pair.append(numbers(table, name, source) * float(units.Unit(unit).to(units.deg)))
        except (units.UnitConversionError, ValueError, TypeError):
            raise CatalogError(f"{source}: column {name} has the unit {unit}; expected an angle such as deg") from None
    right, declination = pair
    bad = ~(np.isfinite(right) & np.isfinite(declination) & (right >= -360) & (right <= 360) & (np.abs(declination) <= 90))
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise CatalogError(
            f"{source}: {int(bad.sum())} of {len(bad)} positions are no position on the sky (row {i}: {ra} {right[i]}, "
            f"{dec} {declination[i]}); expected degrees, -360 to 360 and -90 to 90"
        )
    return right % 360, declination


def redshifts(table: Table, name: str | None, none: Sequence[float], source: str) -> Floats:
    """(N,) redshifts, NaN for none; a value below 0 that is not declared as meaning none is an error, as is infinity."""
    if name is None:
        return np.full(len(table), np.nan)
    values = numbers(table, name, source)
    values[np.isin(values, np.array(none))] = np.nan
    bad = np.flatnonzero((values < 0) | np.isinf(values))
    if len(bad):
        raise CatalogError(
            f"{source}: {len(bad)} redshifts of column {name} are negative or infinite ({_some(values[bad])}); expected 0 or more, "
            "NaN for none; declare values that mean none as no_redshift"
        )
    return values


def ab_magnitudes(table: Table, name: str, unit: str | None, zero_point: float | None, source: str) -> Floats:
    """(N,) AB magnitudes from a column of magnitudes, fluxes or counts; NaN where there is no positive flux.

    The column's own unit counts; ``unit`` is for a column without one, ``zero_point`` (AB) for counts.
    """
    values = numbers(table, name, source)
    own = "" if table[name].unit is None else str(table[name].unit)
    if zero_point is not None:
        return zero_point - 2.5 * np.log10(np.where(values > 0, values, np.nan))
    text = own or unit or ""
    if own and unit and units.Unit(own, parse_strict="silent") != units.Unit(unit, parse_strict="silent"):
        raise CatalogError(f"{source}: column {name} has the unit {own}, but {unit} is declared; take the declaration away")
    if not text:
        raise CatalogError(
            f"{source}: nothing tells the unit of column {name}; declare unit (mag, nJy, uJy, Jy) or, for counts, zero_point"
        )
    if text.casefold() in ("mag", "mag(ab)", "abmag"):
        return np.where(np.isfinite(values), values, np.nan)
    try:
        njy = values * float(units.Unit(text).to(units.nJy))
    except (units.UnitConversionError, ValueError, TypeError):
        raise CatalogError(
            f"{source}: the unit {text} of column {name} is no flux density and no magnitude; expected mag, nJy, uJy, Jy, or "
            "declare zero_point"
        ) from None
    return NJY_ZERO_POINT - 2.5 * np.log10(np.where(njy > 0, njy, np.nan))


def as_text(value: object) -> str:
    """A cell of a table as text without outer blanks."""
    return (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)).strip()


def pixel_positions(sources: Sources, wcs: WCS, width: int, height: int) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """x, y (N,) of sources in 0-based pixels of an image, and (N,) which of them are inside it."""
    from astropy.coordinates import SkyCoord

    x, y = wcs.world_to_pixel(SkyCoord(sources.ra, sources.dec, unit="deg", frame="icrs"))
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    inside = (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)
    return x, y, inside


def _boxes(table: Table, columns: CatalogColumns, source: str) -> NDArray[np.float32] | None:
    if columns.box is None:
        return None
    boxes = np.stack([numbers(table, name, source) for name in columns.box], axis=1)
    boxes[:, 2:] += columns.box_end == "inclusive"
    bad = ~np.isfinite(boxes).all(axis=1) | (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise CatalogError(
            f"{source}: {int(bad.sum())} boxes have no area (row {i}: {', '.join(f'{value:g}' for value in boxes[i])}); "
            f"expected x0 < x1 and y0 < y1 in {', '.join(columns.box)}"
        )
    return boxes.astype(np.float32)


def _read_hdf5(path: Path) -> Table:
    """Columns of an HDF5 file: its data sets of equal length, at the top or in its only group."""
    with h5py.File(path) as file:
        group: Any = file
        while len(group) == 1 and isinstance(inner := next(iter(group.values())), h5py.Group):
            group = inner
        data = {name: item[()] for name, item in group.items() if isinstance(item, h5py.Dataset) and item.ndim == 1}
    return Table(data)


def _some(values: NDArray[Any]) -> str:
    shown = ", ".join(str(value) for value in values[:SHOWN].tolist())
    return shown + (", ..." if len(values) > SHOWN else "")
