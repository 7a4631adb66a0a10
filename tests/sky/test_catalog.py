from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io.votable.ucd import check_ucd
from astropy.table import Table, vstack
from catalogs import BANDS, PROVENANCE, catalog, detections, summary, tangent
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.sky.catalog import COLUMNS, Column, build_catalog, read_catalog, write_catalog
from deepdisc_ops.sky.catalog.columns import MASK_RLE, PER_BAND
from deepdisc_ops.sky.catalog.ids import SIZES, sky_ids, unique_ids
from deepdisc_ops.sky.catalog.masks import box_frames, decoded, run_lengths

WCS = tangent()


def assert_same(back: Table, table: Table) -> None:
    assert back.colnames == table.colnames
    for name in table.colnames:
        np.testing.assert_array_equal(np.asarray(back[name]).reshape(table[name].shape), np.asarray(table[name]), name)
        assert (back[name].unit or None) == (table[name].unit or None)
        assert back[name].description == table[name].description
        assert back[name].meta.get("ucd") == table[name].meta.get("ucd")
    assert {key.lower(): value for key, value in back.meta.items()}.items() >= PROVENANCE.items()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("n", [0, 1, 50])
@pytest.mark.parametrize("suffix", [".parquet", ".fits", ".hdf5", ".ecsv"])
def test_catalogue_survives_a_round_trip(spaced: Path, suffix: str, n: int, full: bool) -> None:
    table, path = catalog(n, WCS, full=full), spaced / f"catalog{suffix}"
    write_catalog(table, path)
    assert_same(read_catalog(path), table)
    assert list(spaced.iterdir()) == [path]
    again = spaced / f"again{suffix}"
    write_catalog(read_catalog(path), again)
    assert_same(read_catalog(again), table)


def test_every_column_has_a_meaning_and_a_descriptor_of_the_standard() -> None:
    for name, column in {**COLUMNS, **PER_BAND, "mask_rle": MASK_RLE}.items():
        assert column.description
        assert check_ucd(column.ucd, check_controlled_vocabulary=True), name


def test_rows_go_by_row_of_the_mosaic_and_positions_through_the_wcs() -> None:
    table = catalog(40, WCS)
    assert (np.diff(table["y"]) >= 0).all()
    x, y = WCS.world_to_pixel_values(table["ra"], table["dec"])
    np.testing.assert_allclose([x, y], [table["x"], table["y"]], atol=1e-6)
    np.testing.assert_allclose(table["x"], (table["x0"] + table["x1"]) / 2 - 0.5, atol=1e-4)


@settings(max_examples=8)
@given(seed=st.integers(0, 1000), wcs=st.sampled_from([WCS, None]))
def test_the_order_of_detections_is_irrelevant(seed: int, wcs: object) -> None:
    objects = detections(30, full=True)
    objects.boxes[3] = objects.boxes[7]
    objects.boxes[4] = objects.boxes[7] + np.array([-1, -1, 1, 1], np.float32)
    objects = objects.select(np.setdiff1d(np.arange(30), [3]))
    shuffled = objects.select(np.random.default_rng(seed).permutation(len(objects)))
    one, other = (build_catalog(each, summary(each), wcs, {}, BANDS) for each in (objects, shuffled))
    for name in one.colnames:
        np.testing.assert_array_equal(one[name], other[name])


def test_fluxes_are_a_column_a_band_with_the_signal_to_noise() -> None:
    objects = detections(20, full=True)
    table = build_catalog(objects, summary(objects), WCS, {}, BANDS, {"sizes": Column("two radii", "arcsec")})
    row = np.flatnonzero(table["given_name"] == "object 3")
    np.testing.assert_array_equal(table["flux_g"][row], objects.extra["flux"][3, 1])
    np.testing.assert_array_equal(table["snr_g"][row], objects.extra["flux"][3, 1] / objects.extra["flux_err"][3, 1])
    assert (table["flux_err_r"].unit, table["flux_err_r"].description) == ("nJy", "error of flux_r")
    assert (table["sizes"].unit, table["sizes"].description) == ("arcsec", "two radii")
    np.testing.assert_array_equal(table["sizes"][row][0], objects.extra["sizes"][3])


def test_columns_that_do_not_fit_are_refused() -> None:
    objects = detections(2, full=True)
    with pytest.raises(CatalogError, match=r"flux has shape \(2, 3\); expected a column for each of the bands \('g', 'r'\)"):
        build_catalog(objects, summary(objects), WCS, {}, ("g", "r"))
    with pytest.raises(CatalogError, match="carry a column 'ID', which the catalogue has already; rename it"):
        build_catalog(replace(objects, extra={"ID": np.arange(2)}), summary(objects), WCS, {})
    with pytest.raises(CatalogError, match=r"'stamp' is float64 of shape \(2, 3, 3\)"):
        build_catalog(replace(objects, extra={"stamp": np.zeros((2, 3, 3))}), summary(objects), WCS, {})


def test_unwritable_places_are_refused_early(spaced: Path) -> None:
    (spaced / "folder.fits").mkdir()
    for name, said in {
        "catalog.csv": r"ends in '.csv'; expected one of .parquet, .fits, .hdf5, .ecsv, .reg, .moc.fits",
        "absent/catalog.fits": "does not exist or cannot be written",
        "folder.fits": "is a folder; expected the name of a file",
    }.items():
        with pytest.raises(CatalogError, match=said):
            write_catalog(catalog(1), spaced / name)
    with pytest.raises(CatalogError, match="does not exist"):
        read_catalog(spaced / "absent.fits")
    (spaced / "text.parquet").write_text("no table")
    with pytest.raises(CatalogError, match="cannot be read as a table"):
        read_catalog(spaced / "text.parquet")


def test_ids_are_of_the_box_alone_and_name_its_healpix_cell(rng: np.random.Generator) -> None:
    import healpy

    table = catalog(200, WCS)
    ids = np.asarray(table["id"])
    assert len(set(ids)) == 200
    assert (ids > 0).all()
    for order in (0, 8, 20):
        cells = healpy.ang2pix(2**order, table["ra"], table["dec"], nest=True, lonlat=True)
        np.testing.assert_array_equal(ids // SIZES // 4 ** (24 - order), cells)
    parts = [catalog(120, WCS, seed=1), catalog(80, WCS, seed=2)]
    objects = [detections(120, seed=1), detections(80, seed=2)]
    both = objects[0].concatenate(objects)
    whole = build_catalog(both, summary(both), WCS, {})
    assert set(whole["id"]) == set(vstack(parts, metadata_conflicts="silent")["id"])


@pytest.mark.parametrize("wcs", [WCS, None])
def test_ids_survive_what_processors_differ_in(rng: np.random.Generator, wcs: object) -> None:
    objects = detections(3000)
    shaken = replace(objects, boxes=objects.boxes + rng.normal(0, 1e-5, objects.boxes.shape).astype(np.float32))
    one, other = (set(build_catalog(each, summary(objects), wcs, {})["id"]) for each in (objects, shaken))
    assert len(one & other) > 0.997 * len(one)


def test_boxes_of_one_centre_have_ids_of_their_own() -> None:
    objects = detections(6)
    centre = np.array([50.25, 60.5, 50.25, 60.5])
    objects.boxes[:] = centre + np.arange(2, 8)[:, None] * [-1, -0.5, 1, 0.5]
    ids = np.asarray(build_catalog(objects, summary(objects), WCS, {})["id"])
    assert len(set(ids)) == 6
    assert len(set(ids // SIZES)) == 1
    objects.boxes[:] = objects.boxes[0]
    first = sky_ids(np.array([30.0]), np.array([-5.0]), objects.boxes[:1])[0]
    assert sky_ids(np.full(6, 30.0), np.full(6, -5.0), objects.boxes).tolist() == [first] * 6
    assert unique_ids(np.array([5, 7, 5, 6, 5, 1])).tolist() == [5, 7, 8, 6, 9, 1]


@settings(max_examples=50)
@given(
    side=st.floats(1, 60),
    aspect=st.floats(0.3, 3),
    x=st.floats(0, 100),
    y=st.floats(0, 100),
    radius=st.floats(0.2, 0.5),
)
def test_mask_pixels_are_those_of_the_shape_in_the_box(side: float, aspect: float, x: float, y: float, radius: float) -> None:
    box = np.array([[x, y, x + side, y + side * aspect]], np.float32)
    rows, columns = (np.mgrid[:28, :28] + 0.5) / 28
    disc = ((rows - 0.5) ** 2 + (columns - 0.5) ** 2 < radius**2).astype(np.uint8) * 255
    (mask,) = decoded(box, run_lengths(box, disc[None]))
    x0, y0, x1, y1 = box_frames(box)[0]
    assert mask.shape == (y1 - y0, x1 - x0)
    row, column = np.mgrid[y0:y1, x0:x1] + 0.5
    distance = np.hypot((column - box[0, 0]) / (box[0, 2] - box[0, 0]) - 0.5, (row - box[0, 1]) / (box[0, 3] - box[0, 1]) - 0.5)
    clear = np.abs(distance - radius) > 1.5 / 28
    np.testing.assert_array_equal(mask[clear], (distance < radius)[clear])
