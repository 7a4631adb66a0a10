"""A catalogue on a map of its colours: every object's cell, the spectra in it, and what is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.table import Table
from typer.testing import CliRunner

from deepdisc_ops.cli import app
from deepdisc_ops.errors import CatalogError
from deepdisc_ops.photoz.representation import SelfOrganisingMap
from deepdisc_ops.report import Coverage, map_colours
from deepdisc_ops.sky.catalog import read_catalog, write_catalog

pytest.importorskip("minisom")
N, BANDS = 600, ("g", "r", "i", "z")


@pytest.fixture
def catalog(rng: np.random.Generator, spaced: Path) -> Path:
    """Two kinds of galaxies, red ones and blue, and one without a flux in g."""
    red = np.arange(N) % 2
    magnitude = 24 - np.outer(red + 0.1 * rng.standard_normal(N), np.arange(4)) + 0.3 * rng.standard_normal((N, 1))
    flux = 10 ** (0.4 * (31.4 - magnitude))
    flux[6, 0] = -10
    columns = {f"flux_{band}": flux[:, i] for i, band in enumerate(BANDS)}
    columns |= {f"flux_err_{band}": np.full(N, 2.0) for band in BANDS}
    place = {"id": np.arange(N), "ra": 10 + rng.uniform(0, 0.1, N), "dec": rng.uniform(0, 0.1, N)}
    write_catalog(Table(place | columns), spaced / "catalog.parquet")
    return spaced / "catalog.parquet"


@pytest.fixture
def spectra(catalog: Path) -> Path:
    """Of forty red galaxies, 0.3 arcsec beside them, and of one where there is none."""
    table = read_catalog(catalog)[1:81:2]
    ra, dec = np.append(table["ra"], 10.5), np.append(np.asarray(table["dec"]) + 0.3 / 3600, 0.0)
    Table({"ra": ra, "dec": dec, "redshift": np.linspace(0.3, 0.5, 41)}).write(catalog.parent / "specz.fits")
    return catalog.parent / "specz.fits"


def made(
    catalog: Path, spectra: Path, out: str = "colours", *, stored: Path | None = None, bands: tuple[str, ...] = ()
) -> Coverage:
    return map_colours(catalog, spectra, catalog.parent / out, stored=stored, bands=bands, side=4, steps=2000)


def test_red_galaxies_are_represented_and_blue_ones_wanted(catalog: Path, spectra: Path) -> None:
    found = made(catalog, spectra)
    blue = np.arange(N) % 2 == 0
    assert found.matched == 40
    assert found.cell[6] == -1
    assert (np.delete(found.cell, 6) >= 0).all()
    assert (found.spec_rep[blue] == 0).all()
    assert found.spec_rep[~blue].astype(bool).mean() > 0.9
    assert found.spec_rep[1] == (found.cell[1:81:2] == found.cell[1]).sum()
    assert set(found.advice.cell[:3]) <= set(found.cell[blue])
    kept = read_catalog(catalog.parent / "colours" / "cells.parquet")
    np.testing.assert_array_equal(kept["cell"], found.cell)
    np.testing.assert_array_equal(kept["id"], np.arange(N))
    advice = Table.read(catalog.parent / "colours" / "advice.ecsv")
    assert advice["objects"].sum() == N - 1
    assert advice["spectra"].sum() == found.placed == 40


def test_a_stored_map_gives_the_same_cells(catalog: Path, spectra: Path) -> None:
    first = made(catalog, spectra)
    stored = catalog.parent / "colours" / "map.npz"
    again = made(catalog, spectra, "again", stored=stored)
    np.testing.assert_array_equal(again.cell, first.cell)
    assert SelfOrganisingMap.load(stored).features == ("z", "r - g", "i - r", "z - i")
    with pytest.raises(CatalogError, match=r"is a map of z, r - g, i - r, z - i; .* gives i, r - g, i - r"):
        made(catalog, spectra, "fewer", stored=stored, bands=("g", "r", "i"))


def test_magnitudes_serve_where_there_are_no_fluxes(catalog: Path, spectra: Path) -> None:
    table = read_catalog(catalog)
    magnitude = {f"mag_{band}": 31.4 - 2.5 * np.log10(np.maximum(table[f"flux_{band}"], 1)) for band in BANDS}
    other = catalog.with_name("magnitudes.parquet")
    write_catalog(Table({"ra": table["ra"], "dec": table["dec"], **magnitude}), other)
    bright = np.arange(N) != 6
    np.testing.assert_array_equal(made(other, spectra, bands=BANDS).cell[bright] >= 0, True)
    with pytest.raises(CatalogError, match="no flux_y with its error and no mag_y"):
        made(other, spectra, bands=("z", "y"))


def test_errors_of_magnitudes_are_no_bands_and_masked_rows_no_spectra(catalog: Path, spectra: Path) -> None:
    table = read_catalog(catalog)
    magnitude = {f"mag_{band}": 31.4 - 2.5 * np.log10(np.maximum(table[f"flux_{band}"], 1)) for band in BANDS}
    errors = {f"mag_err_{band}": np.full(N, 0.1) for band in BANDS}
    write_catalog(Table({"ra": table["ra"], "dec": table["dec"], **magnitude, **errors}), catalog.with_name("errors.parquet"))
    measured = Table(Table.read(spectra), masked=True)
    measured["redshift"].mask[:10] = True
    measured["ra"].mask[10:15] = True
    measured.write(catalog.with_name("masked.fits"))
    found = made(catalog.with_name("errors.parquet"), catalog.with_name("masked.fits"))
    assert found.som.features == ("z", "r - g", "i - r", "z - i")
    assert found.matched == 25


def test_bad_tables_are_told(catalog: Path, spectra: Path) -> None:
    table = Table.read(spectra)
    faults = {
        "has no column 'redshift'": Table({"ra": table["ra"], "dec": table["dec"]}),
        "has no column 'dec'": Table({"ra": table["ra"], "redshift": table["redshift"]}),
        r"no redshift of .* within 1 arcsec .* are 30.*deg apart": table.copy(),
    }
    faults[r"no redshift of .* within 1 arcsec .* are 30.*deg apart"]["dec"] += 30
    for message, faulty in faults.items():
        faulty.write(catalog.with_name("faulty.fits"), overwrite=True)
        with pytest.raises(CatalogError, match=message):
            made(catalog, catalog.with_name("faulty.fits"))
    write_catalog(read_catalog(catalog)[:0], catalog.with_name("empty.parquet"))
    with pytest.raises(CatalogError, match=r"empty\.parquet is empty"):
        made(catalog.with_name("empty.parquet"), spectra)
    write_catalog(read_catalog(catalog)["ra", "dec", "flux_g"], catalog.with_name("bare.parquet"))
    with pytest.raises(CatalogError, match="expected flux_<band> and flux_err_<band>"):
        made(catalog.with_name("bare.parquet"), spectra)


def test_the_command_says_what_it_found(catalog: Path, spectra: Path) -> None:
    words = ["colours", str(catalog), "--spectra", str(spectra), "--out", str(catalog.parent / "out"), "--side", "4"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert f"{N} objects, {N - 1} with all bands; 40 spectra" in result.output
    assert (catalog.parent / "out" / "map.png").stat().st_size > 10_000
