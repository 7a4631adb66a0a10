"""A catalogue's colours on a self-organising map, beside those of a spectroscopic sample: what it covers and what it lacks.

Glossary: N objects of the catalogue, M of them with a spectrum, C bands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.table import Table
from numpy.typing import NDArray

from deepdisc_ops.data.tables import read_table
from deepdisc_ops.errors import CatalogError
from deepdisc_ops.photoz.evaluation import numbers
from deepdisc_ops.photoz.figures import map_of_cells, write_figure
from deepdisc_ops.photoz.representation import (
    SIDE,
    STEPS,
    Advice,
    SelfOrganisingMap,
    advise,
    colour_features,
    colour_names,
    train_map,
)
from deepdisc_ops.sky.catalog import read_catalog, write_catalog
from deepdisc_ops.sky.matching import centre_separation_arcsec, match_on_sky
from deepdisc_ops.sky.photometry import magnitudes

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

RADIUS_ARCSEC = 1.0
MAP, CELLS, ADVICE, FIGURE = "map.npz", "cells.parquet", "advice.ecsv", "map.png"


@dataclass(frozen=True)
class Coverage:
    """cell and spec_rep (N,): each object's cell, -1 for none, and the spectra in it; advice: cells in need.

    matched: M; placed: how many of these have a cell.
    """

    som: SelfOrganisingMap
    cell: Indices
    spec_rep: Indices
    matched: int
    placed: int
    advice: Advice


def map_colours(
    catalog: Path,
    spectra: Path,
    out: Path,
    *,
    stored: Path | None = None,
    bands: Sequence[str] = (),
    side: int = SIDE,
    steps: int = STEPS,
    wanted: int | None = None,
    seed: int = 0,
) -> Coverage:
    """Put a catalogue with fluxes (as of ``predict``) or mag_<band> columns on a map, and count the spectra around each object.

    ``spectra`` has ra, dec and redshift; each belongs to the object within 1". The map is ``stored``, or trained on the catalogue.
    Writes the map, cells.parquet, advice.ecsv and map.png to ``out``. Raises `CatalogError` for columns that lack and for spectra
    of another field.
    """
    table, measured = read_catalog(catalog), read_table(spectra)
    if not len(table):
        raise CatalogError(f"{catalog} is empty; a map takes objects")
    index, redshift = _matched(table, measured, catalog, spectra)
    som = None if stored is None else SelfOrganisingMap.load(stored)
    names = tuple(bands) or _bands(table, catalog)
    features = colour_features(_magnitudes(table, names, catalog))
    if som is None:
        som = train_map(features, colour_names(names), side=side, steps=steps, seed=seed)
    elif som.features != colour_names(names):
        raise CatalogError(f"{stored} is a map of {', '.join(som.features)}; {catalog} gives {', '.join(colour_names(names))}")
    cell = som.assign(features)
    of_spectra = cell[index]
    found = Coverage(
        som,
        cell,
        som.spec_rep(cell, of_spectra),
        len(index),
        int((of_spectra >= 0).sum()),
        advise(som, cell, of_spectra, redshift, wanted=wanted),
    )
    out.mkdir(parents=True, exist_ok=True)
    som.save(out / MAP)
    identity = {"id": table["id"]} if "id" in table.colnames else {}
    write_catalog(Table({**identity, "cell": cell.astype(np.int32), "spec_rep": found.spec_rep.astype(np.int32)}), out / CELLS)
    found.advice.as_table().write(out / ADVICE, overwrite=True)
    known = np.full(len(table), np.nan)
    if "z_mode" in table.colnames:
        known = numbers(table, "z_mode").copy()
    known[index] = redshift
    write_figure(map_of_cells(som, cell, known, of_spectra), out / FIGURE)
    return found


def _bands(table: Table, source: Path) -> tuple[str, ...]:
    """Names of the bands (C) with a flux and its error, or else with a magnitude, in the order of the columns."""
    names = table.colnames
    flux = tuple(name[5:] for name in names if name.startswith("flux_") and f"flux_err_{name[5:]}" in names)
    found = flux or tuple(name[4:] for name in names if name.startswith("mag_") and not name.startswith("mag_err_"))
    if len(found) < 2:
        raise CatalogError(
            f"{source} has the columns {', '.join(names[:12])}; expected flux_<band> and flux_err_<band>, as `predict` "
            "writes them, or mag_<band>, of two bands at least"
        )
    return found


def _magnitudes(table: Table, bands: Sequence[str], source: Path) -> Floats:
    """(N, C) AB magnitudes, NaN where an object has none; of fluxes those above 1 sigma."""
    columns = []
    for band in bands:
        if f"flux_{band}" in table.colnames and f"flux_err_{band}" in table.colnames:
            flux, error = (numbers(table, f"{kind}_{band}") for kind in ("flux", "flux_err"))
            magnitude, _, detected = magnitudes(flux, error)
            columns.append(np.where(detected, magnitude, np.nan))
        elif f"mag_{band}" in table.colnames:
            columns.append(numbers(table, f"mag_{band}"))
        else:
            raise CatalogError(f"{source} has no flux_{band} with its error and no mag_{band}; name other bands")
    return np.stack(columns, axis=1)


def _matched(table: Table, measured: Table, catalog: Path, spectra: Path) -> tuple[Indices, Floats]:
    """The object (M,) of each spectrum that has one, and its redshift."""
    for name, one, source in [(n, t, s) for t, s in ((table, catalog), (measured, spectra)) for n in ("ra", "dec")]:
        if name not in one.colnames:
            raise CatalogError(f"{source} has no column {name!r}; expected ra and dec in degrees")
    if "redshift" not in measured.colnames:
        raise CatalogError(f"{spectra} has no column 'redshift'; rename the one that holds it")
    rows = np.flatnonzero(np.isfinite([numbers(measured, name) for name in ("ra", "dec", "redshift")]).all(axis=0))
    ra, dec = (numbers(table, name) for name in ("ra", "dec"))
    ra_measured, dec_measured, redshift = (numbers(measured, name)[rows] for name in ("ra", "dec", "redshift"))
    if not len(rows):
        raise CatalogError(f"none of the {len(measured)} rows of {spectra} has a position and a redshift; expected some")
    pairs = match_on_sky(ra, dec, ra_measured, dec_measured, RADIUS_ARCSEC)
    if not len(pairs):
        apart = centre_separation_arcsec(ra, dec, ra_measured, dec_measured) / 3600
        raise CatalogError(
            f"no redshift of {spectra} lies within {RADIUS_ARCSEC:g} arcsec of an object of {catalog}; their centres are "
            f"{apart:.3g} deg apart: are they of the same field and WCS?"
        )
    return pairs.index1, redshift[pairs.index2]
