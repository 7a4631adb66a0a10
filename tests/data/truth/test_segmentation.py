from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from deepdisc_ops.config import validate
from deepdisc_ops.data.masks import area, decode
from deepdisc_ops.data.pixels import read_pixels
from deepdisc_ops.data.truth.segmentation import SegmentationSettings, from_segmentation
from deepdisc_ops.errors import CatalogError, ConfigError, DeepdiscOpsError, ImageError

from .conftest import BOXES, SquareField


def build(field: SquareField, out: Path | None = None, *, packed: bool = False, **more: Any):
    settings = validate(SegmentationSettings, field.settings(**more), "test")
    return from_segmentation(settings, out or field.folder / "out", packed=packed)


@pytest.mark.parametrize("packed", [False, True])
def test_windows_hold_their_sources_and_their_pixels(field: SquareField, packed: bool) -> None:
    built = build(field, packed=packed)
    found = {record.key: record for record in built.dataset.records()}
    # the window at 50, 40 lacks band a; that at 0, 40 holds part of 13, but not its centre
    assert sorted(found) == ["a-0-0", "a-50-0"]
    assert {key: record.objects.ids.tolist() for key, record in found.items()} == {"a-0-0": [11, 12], "a-50-0": [15]}
    assert built.counts["windows that lack a band"] == 1
    assert built.counts["windows without an object"] == 1
    record = found["a-50-0"]
    assert record.objects.boxes.tolist() == [[40, 10, 46, 16]]
    np.testing.assert_allclose([record.objects.x, record.objects.y], [[42.5], [12.5]], atol=1e-6)
    pixels = read_pixels(record)
    np.testing.assert_array_equal(pixels.data[1], fits.getdata(field.folder / "b.fits")[:40, 50:])
    assert pixels.wcs is not None
    there = pixels.wcs.pixel_to_world_values(record.objects.x, record.objects.y)
    np.testing.assert_allclose(there, [record.objects.ra, record.objects.dec], atol=1e-9)
    np.testing.assert_array_equal(found["a-0-0"].objects.redshift, np.array([0.5, np.nan], np.float32))
    assert found["a-0-0"].objects.mag.tolist() == [22, 23]


def test_a_source_cut_by_an_edge_belongs_to_the_window_of_its_centre(field: SquareField) -> None:
    built = build(field, windows={"width_arcsec": 5.0, "height_arcsec": 4.0, "max_missing": 0.999})
    assert "a-50-40" not in built.dataset.records().keys
    with fits.open(field.folder / "a.fits", mode="update") as file:
        file[0].data = np.zeros((80, 100), np.float32)
    built = build(field, field.folder / "again")
    record = next(record for record in built.dataset.records() if record.key == "a-50-40")
    assert record.objects.ids.tolist() == [13, 14]
    assert record.objects.boxes[0].tolist() == [0, 0, 8, 6]
    assert record.objects.masks is not None
    np.testing.assert_array_equal(decode(record.objects.masks[0]), field.segmentation[40:, 50:] == 13)
    with_boxes = field.table.copy()
    for i, name in enumerate(("xmin", "ymin", "xmax", "ymax")):
        with_boxes[name] = np.array(list(BOXES.values()))[:, i] + (-2 if i < 2 else 1)
    field.write_table(with_boxes)
    catalog = field.settings()["catalog"]
    catalog["columns"] |= {"box": ["xmin", "ymin", "xmax", "ymax"]}
    built = build(field, field.folder / "boxes", catalog=catalog)
    record = next(record for record in built.dataset.records() if record.key == "a-50-40")
    assert record.objects.boxes.tolist() == [[0, 0, 10, 8], [18, 18, 28, 28]]
    assert [area(mask) for mask in record.objects.masks or ()] == [48, 36]


def test_redshifts_come_from_the_spectra_and_windows_without_are_left_out(field: SquareField) -> None:
    spectrum = Table(field.table[4:5][["ra", "dec"]])
    spectrum["z"] = [7.5]
    spectrum.write(field.folder / "spectra.fits")
    spectra = {"catalogs": [{"name": "s", "path": str(field.folder / "spectra.fits")}]}
    windows = {"width_arcsec": 5.0, "height_arcsec": 4.0, "require_redshift": True}
    built = build(field, spectra=spectra, windows=windows, ebv="0.02")
    (record,) = built.dataset.records()
    assert record.key == "a-50-0"
    assert record.objects.redshift.tolist() == [7.5]
    assert record.objects.ebv.tolist() == [np.float32(0.02)]
    assert built.counts["windows without a redshift"] == 3
    assert built.compilation is not None
    assert len(built.compilation) == 1


def test_a_build_is_taken_up_where_it_stopped_and_refused_with_other_settings(field: SquareField) -> None:
    first = build(field)
    again = build(field)
    assert again.counts["windows written before"] == len(first.dataset) == len(again.dataset) == 2
    assert again.counts["windows written"] == 0
    with pytest.raises(ConfigError, match="made otherwise"):
        build(field, survey="other")


def change(column: str, row: int, value: float) -> Any:
    def changed(field: SquareField) -> None:
        table = field.table.copy()
        table[column][row] = value
        field.write_table(table)

    return changed


def test_a_build_that_stopped_before_its_first_record_goes_on(field: SquareField) -> None:
    build(field)
    for path in (field.folder / "out" / "shards").iterdir():
        path.unlink()
    assert len(build(field).dataset) == 2


def test_labels_larger_than_the_ids_and_unlisted_ones_do_no_harm(field: SquareField) -> None:
    more = field.segmentation.copy()
    more[0, 0], more[20, 20] = 2**31 - 1, 1
    fits.writeto(field.folder / "map.fits", more, overwrite=True)
    assert build(field).counts["objects"] == 3


@pytest.mark.parametrize(
    ("break_it", "more", "error", "message"),
    [
        (change("ID", 1, 99), {}, CatalogError, r"1 of 5 ids of the catalogue are no labels of .*map.fits \(99\); hand in the map"),
        (change("ra", 1, 54.0), {}, CatalogError, "1 of 5 sources lie outside the image of 100 x 80 pixels .id 12 at x"),
        (change("ID", 1, 11), {}, CatalogError, "1 ids of column ID appear more than once"),
        (change("z", 1, -3.0), {}, CatalogError, "1 redshifts of column z are negative"),
    ],
)
def test_faults_of_the_catalogue_are_named_and_nothing_is_written(
    field: SquareField, break_it: Any, more: dict[str, Any], error: type[DeepdiscOpsError], message: str
) -> None:
    break_it(field)
    with pytest.raises(error, match=message):
        build(field, **more)
    assert not (field.folder / "out").exists()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (np.zeros((80, 99), np.int32), "has 80 rows and 99 columns, the image 80 and 100; they must be on one grid"),
        (np.zeros((80, 100), np.float32), r"holds >f4 .*expected whole numbers"),
        (np.zeros((2, 80, 100), np.int32), "holds no 2-D image"),
    ],
)
def test_faults_of_the_map_are_named(field: SquareField, segmentation: np.ndarray, message: str) -> None:
    fits.writeto(field.folder / "map.fits", segmentation, overwrite=True)
    with pytest.raises(ImageError, match=message):
        build(field)
    assert not (field.folder / "out").exists()


def test_a_map_of_another_field_is_noticed(field: SquareField) -> None:
    fits.writeto(field.folder / "map.fits", field.segmentation[:, ::-1].copy(), overwrite=True)
    with pytest.raises(CatalogError, match="only 20% of the 5 centres lie on their own labels"):
        build(field)


def test_faults_of_the_settings_and_an_empty_selection_are_named(field: SquareField) -> None:
    catalog = field.settings()["catalog"]
    with pytest.raises(CatalogError, match="no row of 5 is left"):
        build(field, catalog=catalog | {"rules": [{"name": "bright", "column": "mag_b", "at_most": 10}]})
    with pytest.raises(ImageError, match="windows of 5000 columns with an overlap of 0 do not fit an image of 100 columns"):
        build(field, windows={"width_arcsec": 500.0})
    with pytest.raises(ConfigError, match="gold_band is r, but the catalogue's magnitudes are in b"):
        build(field, gold_band="r")
    field.write_table(field.table[3:4])
    with pytest.raises(CatalogError, match="no window of 4 is left .*windows without an object 3.*loosen"):
        build(field)
    assert not (field.folder / "out").exists()
