from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy import units
from astropy.table import MaskedColumn, Table
from pydantic import ValidationError

from deepdisc_ops.data.tables import CatalogColumns, Rule, read_sources, read_table, select_rows
from deepdisc_ops.errors import CatalogError


def catalogue(**columns: Any) -> Table:
    start = {"id": [3, 1, 2], "ra": [10.0, 359.9, 0.0], "dec": [-30.0, 0.0, 89.0], "flux_i": [100.0, -1.0, 3631e9]}
    return Table(start | columns)


@pytest.mark.parametrize("suffix", [".fits", ".csv", ".ecsv", ".parquet", ".hdf5", ".vot"])
def test_every_format_gives_the_same_sources(suffix: str, spaced: Path) -> None:
    import h5py

    table, path = catalogue(), spaced / f"a catalogue{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({name: np.asarray(table[name]) for name in table.colnames}), path)
    elif suffix == ".hdf5":
        with h5py.File(path, "w") as file:
            for name in table.colnames:
                file.create_dataset(f"photometry/{name}", data=np.asarray(table[name]))
    else:
        table.write(path, format={".csv": "ascii.csv", ".vot": "votable"}.get(suffix))
    sources = read_sources(read_table(path), CatalogColumns(magnitudes={"i": "flux_i"}, unit="nJy"), "x")
    assert sources.ids.tolist() == [3, 1, 2]
    np.testing.assert_allclose(sources.magnitude("i"), [26.4, np.nan, 0.0], atol=3e-4)
    assert np.isnan(sources.redshift).all()
    assert np.isnan(sources.magnitude("z")).all()


def test_units_of_the_file_are_honoured() -> None:
    table = catalogue()
    table["ra"] = (table["ra"] / 15) * units.hourangle
    table["flux_i"] = (table["flux_i"] / 1000) * units.uJy
    sources = read_sources(Table(table), CatalogColumns(magnitudes={"i": "flux_i"}), "x")
    np.testing.assert_allclose(sources.ra, [10.0, 359.9, 0.0])
    np.testing.assert_allclose(sources.magnitude("i")[[0]], [26.4])
    counts = read_sources(catalogue(), CatalogColumns(magnitudes={"i": "flux_i"}, zero_point=27.0), "x")
    np.testing.assert_allclose(counts.magnitude("i")[[0]], [22.0])


def test_sentinels_and_masked_values_mean_no_redshift() -> None:
    table = catalogue(z=MaskedColumn([0.5, -99.0, 1.0], mask=[False, False, True]), star=["yes", "no", " YES "])
    columns = CatalogColumns(redshift="z", no_redshift=(-99,), star="star", star_values=("Yes",))
    sources = read_sources(table, columns, "x")
    np.testing.assert_array_equal(sources.redshift, [0.5, np.nan, np.nan])
    assert sources.classes.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("table", "columns", "message"),
    [
        (catalogue(), {"id": "ID", "ra": "right"}, r"lacks the columns 'ID' \(close: id\), 'right'; it has id, ra, dec, flux_i"),
        (catalogue(), {"magnitudes": {"i": "flux_i"}}, "nothing tells the unit of column flux_i; declare unit"),
        (catalogue(), {"magnitudes": {"i": "flux_i"}, "unit": "deg"}, "unit deg of column flux_i is no flux density"),
        (catalogue(flux_i=[1, 2, 3] * units.uJy), {"magnitudes": {"i": "flux_i"}, "unit": "nJy"}, "has the unit uJy, but nJy is"),
        (catalogue(id=[1, 2, 1]), {}, r"1 ids of column id appear more than once \(1\); keep one row"),
        (catalogue(id=[1.5, 2, 3]), {}, "no whole numbers"),
        (catalogue(ra=[1, np.nan, 3]), {}, "1 of 3 positions are no position on the sky .row 1"),
        (catalogue(dec=[1, 91, 3]), {}, "1 of 3 positions"),
        (catalogue(ra=[1, 2, 3] * units.m), {}, "column ra has the unit m; expected an angle"),
        (catalogue(z=[1, -0.2, -1]), {"redshift": "z", "no_redshift": [-1]}, r"1 redshifts of column z are negative .* \(-0.2\)"),
        (catalogue(z=[1, np.inf, 0]), {"redshift": "z"}, "1 redshifts of column z are negative or infinite"),
        (catalogue(z=["a", "b", "c"]), {"redshift": "z"}, "column z holds <U1"),
        (catalogue(a=[5, 1, 1], b=[5, 1, 1]), {"box": ["a", "a", "b", "b"], "box_end": "exclusive"}, "3 boxes have no area .row 0"),
    ],
)
def test_faults_of_a_catalogue_are_named(table: Table, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(CatalogError, match=message):
        read_sources(table, CatalogColumns.model_validate(columns), "catalogue x")


def test_boxes_given_by_their_last_pixel_end_at_its_edge() -> None:
    table = catalogue(a=[5, 1, 1], b=[5, 3, 1])
    sources = read_sources(table, CatalogColumns(box=("a", "a", "b", "b")), "x")
    assert sources.boxes is not None
    assert sources.boxes.tolist() == [[5, 5, 6, 6], [1, 1, 4, 4], [1, 1, 2, 2]]


@pytest.mark.parametrize(
    ("rule", "passing"),
    [
        ({"column": "flag", "is_in": ["A", "b"]}, [True, True, False]),
        ({"column": "flag", "not_in": ["A"]}, [False, True, True]),
        ({"column": "dr", "is_in": [False]}, [False, True, False]),
        ({"column": "text", "is_in": [False]}, [False, True, True]),
        ({"column": "conf", "not_in": [1]}, [False, True, True]),
        ({"column": "conf", "at_least": 2}, [False, True, False]),
        ({"column": "conf", "at_most": 1.5}, [True, False, False]),
    ],
)
def test_rules_are_conditions_on_rows(rule: dict[str, Any], passing: list[bool]) -> None:
    table = Table(
        {
            "flag": ["A", " B", "C"],
            "dr": [True, False, True],
            "text": ["True", "FALSE", "false"],
            "conf": MaskedColumn([1, 2, 1], mask=[False, False, True]),
        }
    )
    assert Rule(name="r", **rule).passes(table, "x").tolist() == passing


def test_rules_that_leave_nothing_or_say_nothing_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="no row of 3 is left .removed by bright 3.; loosen"):
        select_rows(catalogue(), [Rule(name="bright", column="id", at_least=9)], "x")
    with pytest.raises(ValidationError, match="'r' has no condition; expected one of"):
        Rule(name="r", column="id")
    with pytest.raises(CatalogError, match="compares id with 'A', but the column holds int64"):
        Rule(name="r", column="id", is_in=("A",)).passes(catalogue(), "x")
    with pytest.raises(CatalogError, match="unknown ending"):
        read_table(tmp_path / "x.doc")
    with pytest.raises(CatalogError, match="does not exist"):
        read_table(tmp_path / "x.fits")
    (tmp_path / "x.fits").write_text("no FITS")
    with pytest.raises(CatalogError, match="cannot be read"):
        read_table(tmp_path / "x.fits")
    catalogue()[:0].write(tmp_path / "none.csv")
    with pytest.raises(CatalogError, match="has no rows"):
        read_table(tmp_path / "none.csv")
