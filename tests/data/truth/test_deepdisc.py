from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits

from deepdisc_ops.config import SkySettings
from deepdisc_ops.data import masks
from deepdisc_ops.data.records import DatasetInfo, Objects, Record, Reference
from deepdisc_ops.data.scenes import scene_record, simulate_scene, write_scene
from deepdisc_ops.data.store import create_dataset, open_dataset
from deepdisc_ops.data.truth.deepdisc import Images, from_json, read_deepdisc, to_json, write_deepdisc
from deepdisc_ops.data.writer import DatasetWriter
from deepdisc_ops.errors import CatalogError
from deepdisc_ops.sky.tiling import Window

SHARED = Path(__file__).parents[4] / "shared" / "data"
NAMES = ("dc2", "hsc")


def shared(name: str) -> Path:
    path = SHARED / f"{name}_records.json"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    return path


def anywhere() -> Images:
    return Images(Path("images"), required=False)


def dc2_tree() -> dict[str, Any]:
    """Two galaxies without a redshift of their own, a star, a box beyond the edge, digits beyond float32, a foreign field."""
    square = [2, 3, 8, 3, 8, 9, 2, 9]
    return {
        "filename": "./cutouts/a, b.fits",
        "image_id": 7,
        "height": 40,
        "width": 50,
        "annotations": [
            annotation(1, bbox=[2, 3, 6, 6], segmentation=[square, [20, 20, 24, 20, 24, 22, 20, 22]], redshift=0.123456789012345),
            annotation(2, bbox=[-4, -5, 21, 21], segmentation=[[-4, -5, 9, -5, 9, 9]], redshift=0.0, mag_i=-1, note="odd"),
            annotation(3, bbox=[30, 30, 60, 50], bbox_mode=0, segmentation=[], redshift=-1, mag_i=21),
            annotation(2**55 + 1, bbox=[10, 10, 4, 4], segmentation=[[10, 10, 14, 10, 14, 14, 10, 14]], category_id=1, redshift=0),
        ],
    }


def annotation(number: int, **fields: Any) -> dict[str, Any]:
    return {"bbox_mode": 1, "area": 441, "category_id": 0, "obj_id": number, "mag_i": 24.31463688937106, **fields}


def same(first: Record, second: Record) -> bool:
    """Equal in every field, of objects too, types and NaN included."""
    columns = [(getattr(first.objects, field.name), getattr(second.objects, field.name)) for field in fields(Objects)]
    arrays = [(one, other) for one, other in columns if isinstance(one, np.ndarray)]
    others = [one == other for one, other in columns if not isinstance(one, np.ndarray)]
    heads = [getattr(first, field.name) == getattr(second, field.name) for field in fields(Record) if field.name != "objects"]
    return all(others) and all(heads) and all(a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True) for a, b in arrays)


@pytest.mark.parametrize("name", NAMES)
def test_real_records_come_back_equal(name: str) -> None:
    original = json.loads(shared(name).read_text())
    assert [to_json(record) for record in read_deepdisc(shared(name), anywhere())] == original


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packed", [False, True])
def test_real_records_come_back_equal_from_disk(name: str, packed: bool, spaced: Path) -> None:
    original = json.loads(shared(name).read_text())
    for tree in original:
        write_images(tree, spaced, 6 if name == "dc2" else 1)
    records = read_deepdisc(shared(name), Images(spaced, zero_point=27.0))
    assert np.isfinite(records[0].objects.ra).all()
    info = DatasetInfo(name, records[0].bands, 0.2, "i", 0)
    with DatasetWriter(create_dataset(spaced / "data", info), packed=packed) as writer:
        for record in records:
            writer.add(record)
    stored = list(open_dataset(spaced / "data").records())
    assert [to_json(record) for record in stored] == original
    write_deepdisc(stored, spaced / "again.json")
    assert json.loads((spaced / "again.json").read_text()) == original


def write_images(tree: dict[str, Any], folder: Path, planes: int) -> None:
    for key, name in tree.items():
        if key.startswith("filename"):
            shape = (tree["height"], tree["width"])
            header = fits.Header(
                {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 55.0, "CRVAL2": -32.0, "CRPIX1": 1.0, "CRPIX2": 1.0}
                | {"CDELT1": -0.2 / 3600, "CDELT2": 0.2 / 3600}
            )
            pixels = np.zeros(shape if planes == 1 else (planes, *shape), np.float32)
            fits.writeto(folder / Path(name).name, pixels, header)


def test_columns_say_what_the_json_says() -> None:
    record = from_json(dc2_tree(), anywhere())
    objects = record.objects
    assert (record.bands, record.width, record.height) == (tuple("ugrizy"), 50, 40)
    assert objects.boxes.tolist() == [[2, 3, 8, 9], [-4, -5, 17, 16], [30, 30, 60, 50], [10, 10, 14, 14]]
    np.testing.assert_array_equal(objects.redshift, np.array([0.123456789012345, np.nan, np.nan, 0], np.float32))
    np.testing.assert_array_equal(np.isnan(objects.mag), [False, True, False, False])
    assert objects.classes.tolist() == [0, 0, 0, 1]
    assert objects.ids.tolist() == [1, 2, 3, 2**55 + 1]
    assert (objects.x[0], objects.y[0]) == (4.5, 5.5)
    assert objects.masks is not None
    assert [masks.area(mask) for mask in objects.masks[:3:2]] == [44, 0]
    assert to_json(record) == dc2_tree()


def test_what_was_changed_is_written_from_the_columns_and_the_rest_as_it_came() -> None:
    record = from_json(dc2_tree(), anywhere())
    objects = record.objects
    assert objects.masks is not None
    moved = replace(
        objects,
        redshift=np.array([0.5, 1.5, np.nan, 0], np.float32),
        boxes=objects.boxes + np.array([0, 0, 0, 0], np.float32) + np.array([[1], [0], [0], [0]], np.float32),
        masks=(masks.shift(objects.masks[0], 1, 1, 50, 40), *objects.masks[1:]),
    )
    rows, before = to_json(replace(record, objects=moved))["annotations"], dc2_tree()["annotations"]
    assert (rows[0]["redshift"], rows[0]["bbox"], rows[0]["mag_i"]) == (0.5, [3, 4, 6, 6], 24.31463688937106)
    assert rows[0]["area"] == 36
    assert masks.from_polygons(rows[0]["segmentation"], 50, 40) == moved.masks[0]
    assert rows[1] == before[1] | {"redshift": 1.5}
    assert rows[2:] == before[2:]
    assert to_json(replace(record, objects=objects.select(np.array([3, 1]))))["annotations"] == [before[3], before[1]]


def own_record(rng: np.random.Generator, count: int) -> Record:
    boxes = np.sort(rng.uniform(0, 30, (count, 2, 2)), axis=1).reshape(count, 4) + np.array([0, 0, 2, 2])
    some = rng.uniform(size=(5, count)) < 0.5
    optional = [np.where(gap, np.nan, rng.uniform(0.1, 30, count)) for gap in some]
    return Record(
        key="a scene",
        pixels=Reference(
            (Path("/a folder/x.fits"), Path("/y.fits")), Window(3, 4, 43, 44), 27.0, ("g", "r"), None, 0.0, ("1-a", "2-b")
        ),
        bands=("g", "r"),
        width=40,
        height=40,
        objects=Objects(
            ids=rng.integers(0, 2**62, count),
            boxes=boxes.astype(np.float32),
            classes=rng.integers(0, 2, count).astype(np.int32),
            redshift=optional[0].astype(np.float32),
            mag=optional[1].astype(np.float32),
            x=rng.uniform(0, 40, count),
            y=rng.uniform(0, 40, count),
            ra=optional[2],
            dec=optional[3],
            ebv=optional[4].astype(np.float32),
            masks=tuple(masks.encode(rng.uniform(size=(40, 40)) < 0.1) for _ in range(count)),
        ),
        wcs="CRPIX1 = 1.0\nCRPIX2 = 2.0",
        split="train",
    )


@pytest.mark.parametrize("count", [0, 1, 7])
def test_our_own_records_come_back_equal(rng: np.random.Generator, count: int, tmp_path: Path) -> None:
    record = own_record(rng, count)
    without_masks = replace(record, key="b", objects=replace(record.objects, masks=None, extra=("{}",) * count))
    foreign = replace(from_json(dc2_tree(), anywhere()), key="c")
    write_deepdisc([record, without_masks, foreign], tmp_path / "records.json", "deepdisc_ops")
    text = (tmp_path / "records.json").read_text()
    assert "NaN" not in text
    again = read_deepdisc(tmp_path / "records.json", anywhere())
    assert all(same(*pair) for pair in zip([record, without_masks, foreign], again, strict=True))
    assert to_json(again[2]) == dc2_tree()


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")  # pycocotools and numpy 2
def test_detectron2_takes_our_json(rng: np.random.Generator) -> None:
    utils = pytest.importorskip("detectron2.data.detection_utils")
    record = own_record(rng, 3)
    tree = json.loads(json.dumps(to_json(record)))
    rows = [utils.transform_instance_annotations(row, [], (40, 40)) for row in tree["annotations"]]
    instances = utils.annotations_to_instances(rows, (40, 40), mask_format="bitmask")
    np.testing.assert_allclose(instances.gt_boxes.tensor.numpy(), record.objects.boxes.clip(0, 40), atol=1e-5)
    assert record.objects.masks is not None
    np.testing.assert_array_equal(
        instances.gt_masks.tensor.numpy(), np.stack([masks.decode(mask) for mask in record.objects.masks])
    )


def broken(**change: Any) -> dict[str, Any]:
    tree = dc2_tree()
    tree["annotations"][0] |= change
    return tree


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"image_id": 0, "annotations": []}, "fields image_id, annotations; expected filename, file_name or filename_<BAND>"),
        (broken(redshift=-0.5), "redshift is -0.5; expected 0 or more, and 0, -1 or NaN for none"),
        (broken(bbox_mode=4), "bbox_mode is 4; expected 0 .* or 1"),
        (broken(bbox=[200, 3, 6, 6]), "no part in the image of 50 x 40 pixels"),
        (broken(bbox=[2, 3, 0, 6]), "no part in the image"),
        (broken(bbox=[2, 3, float("nan"), 6]), "no finite number"),
        (broken(bbox=[2, 3]), "not a DeepDISC record"),
        (broken(obj_id=2), "1 of 4 annotations repeat a obj_id; expected each once"),
        (broken(category_id=3), "category_id is 3; expected 0 or 1"),
        (broken(segmentation={"size": [9, 9], "counts": [81]}), r"size \[9, 9\]; expected that of the image"),
        ({key: value for key, value in dc2_tree().items() if key != "height"}, "'height' is missing"),
    ],
)
def test_bad_records_are_named(tree: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([dc2_tree(), tree]))
    with pytest.raises(CatalogError, match=f"bad.json, record 1: .*{message}"):
        read_deepdisc(path, anywhere())


def test_files_that_are_no_records_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(CatalogError, match="does not exist"):
        read_deepdisc(path, anywhere())
    for text, message in (("[", "not readable JSON"), ("{}", "no list of records"), ("[]", "no list of records")):
        path.write_text(text)
        with pytest.raises(CatalogError, match=message):
            read_deepdisc(path, anywhere())
    path.write_text(json.dumps([dc2_tree(), dc2_tree()]))
    with pytest.raises(CatalogError, match="repeat a file name and image_id"):
        read_deepdisc(path, anywhere())
    path.write_text(json.dumps([dc2_tree()]))
    with pytest.raises(CatalogError, match="a, b.fits is neither .*; name the folder of the images"):
        read_deepdisc(path, Images(tmp_path))
    with pytest.raises(CatalogError, match="no record to write"):
        write_deepdisc([], tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


def test_a_window_of_a_file_fits_no_foreign_layout(rng: np.random.Generator) -> None:
    with pytest.raises(CatalogError, match="layout dc2 has no place for that; write it as deepdisc_ops"):
        to_json(own_record(rng, 1), "dc2")


def test_our_objects_are_written_as_polygons_in_a_foreign_layout(rng: np.random.Generator) -> None:
    record = replace(own_record(rng, 4), pixels=Reference((Path("/x.fits"),)))
    again = from_json(to_json(record, "dc2"), anywhere())
    assert again.objects.masks == record.objects.masks
    np.testing.assert_array_equal(again.objects.ids, record.objects.ids)
    np.testing.assert_array_equal(again.objects.mag, record.objects.mag)


def test_a_simulated_scene_comes_back_equal_from_json_and_from_disk(spaced: Path) -> None:
    write_scene(simulate_scene(SkySettings(), size=128, seed=5), spaced / "scene.fits")
    record = scene_record(spaced / "scene.fits")
    assert len(record.objects) > 5
    write_deepdisc([record], spaced / "scene.json")
    (again,) = read_deepdisc(spaced / "scene.json", anywhere())
    assert same(again, record)
    info = DatasetInfo("lsst", record.bands, 0.2, "i", 0)
    with DatasetWriter(create_dataset(spaced / "data", info)) as writer:
        writer.add(again)
    (stored,) = open_dataset(spaced / "data").records()
    assert to_json(stored)["annotations"] == to_json(record)["annotations"]
