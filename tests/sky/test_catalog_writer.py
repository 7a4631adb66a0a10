"""Catalogues in parts: the same files however the rows come, flat memory, nothing half-done."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from astropy.io import fits
from astropy.table import Table
from catalogs import BANDS, PROVENANCE, catalog, tangent

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.sky.catalog import CatalogWriter, open_catalog, read_catalog, write_catalog, writer

WCS = tangent()
ENDINGS = (".parquet", ".fits", ".hdf5", ".ecsv", ".reg")


@pytest.fixture(scope="module")
def rows() -> Table:
    return catalog(500, WCS, full=True)


def open_all(folder: Path, provenance: dict[str, str] | None = None) -> CatalogWriter:
    return open_catalog([folder / f"catalog{ending}" for ending in ENDINGS], BANDS, (), provenance or PROVENANCE, WCS)


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("pieces", [(500,), (0, 1, 0, 250, 249, 0), (99, 101, 300)])
def test_files_do_not_depend_on_how_the_rows_come(
    tmp_path: Path, rows: Table, pieces: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PART_ROWS", 100)
    with open_all(tmp_path) as out:
        for begin, size in zip(np.cumsum((0, *pieces)), pieces, strict=False):
            out.write(rows[begin : begin + size])
        out.annotate({"seconds": "12.5"})
        out.close()
    assert out.rows == 500
    assert sorted(tmp_path.iterdir()) == sorted(tmp_path / f"catalog{ending}" for ending in ENDINGS)
    for ending in ENDINGS[:-1]:
        back = read_catalog(tmp_path / f"catalog{ending}")
        for name in rows.colnames:
            np.testing.assert_array_equal(back[name], rows[name])
        assert {key.lower(): value for key, value in back.meta.items()} == {**PROVENANCE, "bands": "u,g,r", "seconds": "12.5"}
    assert (tmp_path / "catalog.reg").read_text().count("polygon") == 500


def test_provenance_of_any_length_finds_room_at_the_end(tmp_path: Path, rows: Table) -> None:
    path = tmp_path / "catalog.fits"
    for size in (10, 3000, 20_000):
        with open_catalog([path], (), (), {}) as out:
            out.write(rows)
            out.annotate({"command": "x" * size, "another_long_name": "y" * size})
        with fits.open(path) as file:
            file.verify("exception")
        back = read_catalog(path)
        assert (back.meta["COMMAND"], back.meta["another_long_name"]) == ("x" * size, "y" * size)
        np.testing.assert_array_equal(back["mask_rle"], rows["mask_rle"])
        np.testing.assert_array_equal(back["ra"], rows["ra"])


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_full_disk_leaves_nothing_and_room_made_lets_it_go_on(tmp_path: Path, rows: Table, ending: str) -> None:
    path = tmp_path / f"catalog{ending}"
    write_catalog(rows, path)
    whole, size = path.read_bytes(), path.stat().st_size
    for share in (0.1, 0.6, 0.95):
        with room_for(int(share * size)), pytest.raises(CatalogError, match="could not be written .* free space"):
            write_catalog(rows[::-1], path)
        assert list(tmp_path.iterdir()) == [path]
        assert path.read_bytes() == whole
    write_catalog(rows[::-1], path)
    assert path.read_bytes() != whole


def test_what_fails_elsewhere_leaves_nothing(tmp_path: Path, rows: Table) -> None:
    def interrupted() -> None:
        with open_all(tmp_path) as out:
            out.write(rows)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_parts_that_differ_are_refused(tmp_path: Path, rows: Table) -> None:
    def write_both(one: Table, other: Table) -> None:
        with open_all(tmp_path) as out:
            out.write(one)
            out.write(other)

    longer, wider, other = rows.copy(), rows.copy(), rows.copy()
    longer["given_name"] = np.array(["a name longer than those before"] * 500)
    wider["mix_means"] = np.zeros((500, 9), np.float32)
    other.remove_column("snr_u")
    for part, said in (
        (longer, "'given_name' is <U31; the rows before had shorter text, <U12"),
        (wider, r"'mix_means' is float32 of shape \(500, 9\); the rows before had float32 of shape \(N, 4\)"),
        (other, r"rows differ from those before in columns: \['snr_u'\]"),
    ):
        with pytest.raises(CatalogError, match=said):
            write_both(rows, part)
        assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="nothing was written"), open_all(tmp_path):
        pass


def test_missing_values_are_nan_or_refused(tmp_path: Path) -> None:
    table = Table({"flux": np.ma.array([1.0, 2.0], mask=[False, True]), "name": np.ma.array(["a", "b"], mask=[True, False])})
    write_catalog(table, tmp_path / "catalog.fits")
    back = read_catalog(tmp_path / "catalog.fits")
    assert np.isnan(np.ma.filled(back["flux"], np.nan)).tolist() == [False, True]
    assert np.ma.filled(back["name"], "").tolist() == ["", "b"]
    table["count"] = np.ma.array([1, 2], mask=[True, False])
    with pytest.raises(CatalogError, match="'count' of int64 has missing values"):
        write_catalog(table, tmp_path / "catalog.fits")


def test_memory_does_not_grow_with_the_catalogue(tmp_path: Path, rows: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PART_ROWS", 100)

    def peak(parts: int) -> tuple[int, int]:
        tracemalloc.start()
        with open_all(tmp_path) as out:
            for _ in range(parts):
                out.write(rows[:100])
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return traced, pa.total_allocated_bytes()

    peak(1)
    (short, arrow_short), (long, arrow_long) = peak(3), peak(9)
    assert long < 1.1 * short
    assert arrow_long <= arrow_short + 1000


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(spaced: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    dead, alive = spaced / f".c.fits.{ended.stdout.strip()}", spaced / f".c.fits.{os.getppid()}"
    other = spaced / f".other.fits.{ended.stdout.strip()}"
    for file in (dead, alive, other):
        file.touch()
    open_catalog([spaced / "c.fits"], (), ("object",), {}).abort()
    assert [file.exists() for file in (dead, alive, other)] == [False, True, True]
