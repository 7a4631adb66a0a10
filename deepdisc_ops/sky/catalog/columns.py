"""The columns of the catalogue with their units and meanings, and the table of an image's objects.

Glossary: N objects, K mixture components, C bands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from astropy import units
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import NDArray

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.sky.catalog.ids import Ids, pixel_ids, sky_ids, unique_ids
from deepdisc_ops.sky.catalog.masks import run_lengths
from deepdisc_ops.sky.coordinates import icrs_positions
from deepdisc_ops.sky.detections import Array, Detections, row_order


@dataclass(frozen=True)
class Column:
    """Meaning, unit and Unified Content Descriptor (IVOA, UCD1+) of a catalogue column."""

    description: str
    unit: str | None = None
    ucd: str = ""


_REDSHIFT = "src.redshift.phot"

COLUMNS: dict[str, Column] = {
    "id": Column("made of position and size of the box, so that equal boxes are named alike in every run", ucd="meta.id;meta.main"),
    "ra": Column("right ascension of the box centre, ICRS", "deg", "pos.eq.ra;meta.main"),
    "dec": Column("declination of the box centre, ICRS", "deg", "pos.eq.dec;meta.main"),
    "x": Column("column of the box centre, 0-based, first pixel centre at 0", "pix", "pos.cartesian.x;instr.det"),
    "y": Column("row of the box centre, 0-based, first pixel centre at 0", "pix", "pos.cartesian.y;instr.det"),
    "x0": Column("left edge of the box, pixel i covers i to i + 1", "pix", "pos.cartesian.x;instr.det;stat.min"),
    "y0": Column("lower edge of the box", "pix", "pos.cartesian.y;instr.det;stat.min"),
    "x1": Column("right edge of the box, exclusive", "pix", "pos.cartesian.x;instr.det;stat.max"),
    "y1": Column("upper edge of the box, exclusive", "pix", "pos.cartesian.y;instr.det;stat.max"),
    "score": Column("detection score, mean over members", ucd="stat.likelihood"),
    "class": Column("index into the model's classes", ucd="src.class"),
    "z_mode": Column("highest point of p(z), z >= 0", ucd=_REDSHIFT),
    "z_best": Column("redshift of the least risk (Tanaka et al. 2018), z >= 0", ucd=_REDSHIFT),
    "z_median": Column("median of p(z), z >= 0", ucd=f"{_REDSHIFT};stat.median"),
    "z_mean": Column("mean of p(z), z >= 0", ucd=f"{_REDSHIFT};stat.mean"),
    "z_std": Column("standard deviation of p(z), z >= 0", ucd=f"stat.stdev;{_REDSHIFT}"),
    "z_lo68": Column("16th percentile of p(z), z >= 0", ucd=f"{_REDSHIFT};stat.min"),
    "z_hi68": Column("84th percentile of p(z), z >= 0", ucd=f"{_REDSHIFT};stat.max"),
    "z_lo95": Column("2.5th percentile of p(z), z >= 0", ucd=f"{_REDSHIFT};stat.min"),
    "z_hi95": Column("97.5th percentile of p(z), z >= 0", ucd=f"{_REDSHIFT};stat.max"),
    "z_second_peak": Column("second highest maximum of p(z), NaN if there is none", ucd=_REDSHIFT),
    "z_second_weight": Column("probability of the second peak", ucd=f"stat.probability;{_REDSHIFT}"),
    "mass_below_zero": Column(
        "probability the mixture puts at z < 0, cut away in the columns above", ucd=f"stat.probability;{_REDSHIFT}"
    ),
    "mix_weights": Column("weights of the Gaussian components of p(z)", ucd=f"stat.weight;{_REDSHIFT}"),
    "mix_means": Column("means of the components, redshift", ucd=f"{_REDSHIFT};stat.mean"),
    "mix_sigmas": Column("standard deviations of the components, redshift", ucd=f"stat.stdev;{_REDSHIFT}"),
    "n_members": Column("ensemble members that found the object", ucd="meta.number"),
    "ebv": Column("Milky Way E(B-V) the redshift was computed with", "mag", "phot.color.excess"),
    "flags": Column(
        "bits: 1 edge of the mosaic, 2 truncated by a tile, 4 masked pixels, 8 forced, 16 out of domain, 32 no data",
        ucd="meta.code",
    ),
}

PER_BAND: dict[str, Column] = {
    "flux": Column("flux in band {band}, in a circular aperture", "nJy", "phot.flux.density"),
    "flux_err": Column("error of flux_{band}", "nJy", "stat.error;phot.flux.density"),
    "flux_iso": Column("flux in band {band}, on the pixels of the object", "nJy", "phot.flux.density"),
    "flux_iso_err": Column("error of flux_iso_{band}", "nJy", "stat.error;phot.flux.density"),
    "snr": Column("signal to noise of flux_{band}", ucd="stat.snr;phot.flux.density"),
}
"""What `Detections.extra` may hold as (N, C): the catalogue has a column a band, such as flux_u."""

MASK_RLE = Column("pixels of the object in its box, COCO run lengths (see sky.catalog.masks)", ucd="pos.outline")
CARRIED = Column("carried along from the given objects")


def build_catalog(
    detections: Detections,
    summary: Mapping[str, NDArray[np.floating]],
    wcs: WCS | None,
    provenance: Mapping[str, str],
    bands: Sequence[str] = (),
    described: Mapping[str, Column] | None = None,
    *,
    as_given: bool = False,
    ids: Ids | None = None,
) -> Table:
    """A table of `COLUMNS`, then of ``detections.extra`` and the masks, by row of the mosaic unless ``as_given``.

    ``summary`` gives the z columns; without ``wcs`` ra and dec are NaN. What `PER_BAND` names, (N, C) in the order of ``bands``,
    becomes a column a band, with the signal to noise; ``described`` tells what other extra columns are; ``ids`` are `object_ids`,
    which a part of a list takes from the whole. Raises `CatalogError`.
    """
    order = np.arange(len(detections)) if as_given else row_order(detections.boxes)
    detections = detections.select(order)
    x, y = detections.centres.astype(np.float64).T
    ra, dec = _positions(detections, wcs)
    values: dict[str, Array] = {
        "id": object_ids(detections, wcs) if ids is None else ids[order],
        "ra": ra,
        "dec": dec,
        "x": x,
        "y": y,
        **dict(zip(("x0", "y0", "x1", "y1"), detections.boxes.T, strict=True)),
        "score": detections.scores,
        "class": detections.classes,
        **{name: np.asarray(column)[order] for name, column in summary.items()},
        "mix_weights": detections.weights,
        "mix_means": detections.means,
        "mix_sigmas": detections.sigmas,
        "n_members": detections.n_members,
        "ebv": detections.ebv,
        "flags": detections.flags,
    }
    table = Table(meta=dict(provenance))
    for name, column in COLUMNS.items():
        _add(table, name, values[name], column)
    for name, array, column in _extra_columns(detections, bands, described or {}):
        _add(table, name, array, column)
    return table


def object_ids(detections: Detections, wcs: WCS | None) -> Ids:
    """Ids (N,) of a list of objects, each another; see `ids`."""
    boxes = np.nan_to_num(detections.boxes)  # given ones may be nowhere
    return unique_ids(sky_ids(*_positions(detections, wcs), boxes) if wcs is not None else pixel_ids(boxes))


def _positions(detections: Detections, wcs: WCS | None) -> tuple[Array, Array]:
    """Right ascension and declination (N,) in degrees, NaN without ``wcs``."""
    x, y = detections.centres.astype(np.float64).T
    nowhere = np.full(len(x), np.nan)
    return icrs_positions(wcs, x, y) if wcs is not None else (nowhere, nowhere)


def _extra_columns(
    detections: Detections, bands: Sequence[str], described: Mapping[str, Column]
) -> Iterator[tuple[str, Array, Column]]:
    extra = dict(detections.extra)
    if "flux" in extra and "flux_err" in extra:
        with np.errstate(divide="ignore", invalid="ignore"):
            extra["snr"] = (extra["flux"] / extra["flux_err"]).astype(np.float32)
    for name, array in extra.items():
        if name not in PER_BAND:
            yield name, array, described.get(name, CARRIED)
            continue
        if array.shape[1:] != (len(bands),):
            raise CatalogError(f"{name} has shape {array.shape}; expected a column for each of the bands {tuple(bands)}")
        column = PER_BAND[name]
        for band, values in zip(bands, array.T, strict=True):
            yield f"{name}_{band}", values, Column(column.description.format(band=band), column.unit, column.ucd)
    if detections.masks is not None:
        yield "mask_rle", run_lengths(detections.boxes, detections.masks), MASK_RLE


def _add(table: Table, name: str, array: Array, column: Column) -> None:
    if name.lower() in {known.lower() for known in table.colnames}:  # FITS does not tell capitals
        raise CatalogError(f"the objects carry a column {name!r}, which the catalogue has already; rename it")
    if array.ndim > 2 or array.dtype.kind not in "biufUSO":
        raise CatalogError(f"column {name!r} is {array.dtype} of shape {array.shape}; expected numbers or text, (N,) or (N, k)")
    table[name] = array
    table[name].description = column.description
    table[name].unit = units.Unit(column.unit) if column.unit else None
    if column.ucd:
        table[name].meta["ucd"] = column.ucd
