"""DeepDISC's own records, detectron2 dictionaries in JSON, read and written without loss of any field.

Foreign layouts are DC2's (`filename`, redshift, mag_i, obj_id) and HSC's (`filename_G` and so on, imag, hsc_oid). What the columns
of a record cannot give back exactly (polygons, digits beyond float32, fields without a column) is kept as JSON in ``extra`` and
written again as long as it says what the columns say: an object that was moved, cut or given another redshift is written from
its columns. Our own layout is detectron2's with boxes in mode 0, masks as run lengths (mask format ``bitmask``), and every other
column and the whole of a `Record` in fields of their own.

Redshift 0 or -1 and magnitude -1 mean none (0 is kept for stars). Category 0 is DC2's galaxy, but HSC's star. Boxes keep their
detectron2 mode, 0 for x0, y0, x1, y1 and 1 for x0, y0, width, height, and may reach beyond the image. Positions are the
centres of the boxes.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from astropy.wcs.utils import proj_plane_pixel_area
from pycocotools import mask as coco

from deepdisc_ops.data import masks
from deepdisc_ops.data.pixels import header_wcs
from deepdisc_ops.data.records import COLUMNS, GALAXY, STAR, Objects, Packed, Record, Reference
from deepdisc_ops.data.truth.windows import wcs_text
from deepdisc_ops.errors import CatalogError
from deepdisc_ops.sky.coordinates import icrs_positions
from deepdisc_ops.sky.images import open_mosaic
from deepdisc_ops.sky.tiling import Window

XYXY, XYWH = 0, 1
OWN = "deepdisc_ops"
LayoutName = Literal["dc2", "hsc", "deepdisc_ops"]
Json = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """Names of a foreign layout's fields: id is None where it tells no objects apart; classes: the class of each category."""

    id: str | None
    mag: str
    bands: tuple[str, ...]
    classes: Mapping[int, int]


LAYOUTS: dict[str, Layout] = {
    "dc2": Layout("obj_id", "mag_i", tuple("ugrizy"), {0: GALAXY, 1: STAR}),
    "hsc": Layout(None, "imag", tuple("gri"), {0: STAR, 1: GALAXY}),
}
OWN_FIELDS = {"ids": "obj_id", "classes": "category_id"} | {
    name: name for name in ("redshift", "mag", "x", "y", "ra", "dec", "ebv")
}


@dataclass(frozen=True)
class Images:
    """Where the images of foreign records are, and what their files do not say.

    folder: names in the JSON are relative to it; absolute ones that do not exist are looked for in it by their last part.
    bands: the layout's if None; required False lets records name images that are not there.
    """

    folder: Path
    bands: tuple[str, ...] | None = None
    zero_point: float | None = None
    pixel_scale: float | None = None
    required: bool = True


def read_deepdisc(path: Path, images: Images) -> list[Record]:
    """Records of a DeepDISC JSON file, whichever its layout; raises `CatalogError` for what it cannot take."""
    try:
        trees = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CatalogError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CatalogError(f"{path} is not readable JSON ({error})") from None
    if not isinstance(trees, list) or not trees or not all(isinstance(tree, dict) for tree in trees):
        raise CatalogError(f"{path} holds no list of records; expected [{{'file_name': ..., 'annotations': [...]}}, ...]")
    records = []
    for number, tree in enumerate(trees):
        try:
            records.append(from_json(tree, images))
        except CatalogError as error:
            raise CatalogError(f"{path}, record {number}: {error}") from None
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise CatalogError(f"{path}, record {number}: not a DeepDISC record ({what})") from None
    keys = Counter(record.key for record in records)
    double = [key for key, times in keys.items() if times > 1]
    if double:
        raise CatalogError(f"{path}: {len(double)} records repeat a file name and image_id ({double[0]}); expected each once")
    return records


def write_deepdisc(records: Sequence[Record], path: Path, layout: LayoutName | None = None) -> None:
    """Write records as JSON, by default each in the layout it came in; the file appears only when it is complete."""
    trees = [to_json(record, layout) for record in records]
    if not trees:
        raise CatalogError(f"there is no record to write to {path}; choose another split")
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(json.dumps(trees), encoding="utf-8")
    unfinished.replace(path)


def from_json(tree: Json, images: Images) -> Record:
    """One record of its JSON tree."""
    return _own_record(tree) if OWN in tree else _foreign_record(tree, images)


def to_json(record: Record, layout: LayoutName | None = None) -> Json:
    """The JSON tree of one record; without a layout, that in which it came."""
    kept = json.loads(record.extra) if record.extra else {}
    layout = layout or kept.get("layout", OWN)
    return _own_tree(record) if layout == OWN else _foreign_tree(record, str(layout), kept if kept.get("layout") == layout else {})


def _foreign_record(tree: Json, images: Images) -> Record:
    files = (
        sorted((key for key in tree if key.startswith("filename_")), key=list(tree).index)
        or [key for key in ("filename", "file_name") if key in tree][:1]
    )
    if not files:
        raise CatalogError(f"it has the fields {', '.join(tree)}; expected filename, file_name or filename_<BAND>")
    annotations = tree["annotations"]
    hsc = files[0].startswith("filename_") or any("imag" in annotation for annotation in annotations[:1])
    layout = "hsc" if hsc else "dc2"
    width, height = int(tree["width"]), int(tree["height"])
    suffixes = tuple(key.removeprefix("filename_").lower() for key in files)
    bands = images.bands or (suffixes if files[0].startswith("filename_") else LAYOUTS[layout].bands)
    paths = tuple(_find(images, tree[key]) for key in files)
    record = Record(
        key=f"{Path(tree[files[0]]).stem}-{tree.get('image_id', 0)}",
        pixels=Reference(paths, None, images.zero_point, bands, images.pixel_scale),
        bands=bands,
        width=width,
        height=height,
        objects=_objects(annotations, LAYOUTS[layout], width, height),
        origin=layout,
    )
    if all(path.is_file() for path in paths):
        record = _with_astrometry(record, images)
    extra = {"layout": layout, "files": {key: tree[key] for key in files}}
    written = _foreign_tree(record, layout, extra)
    per_object = tuple(
        _text(_differing(annotation, other)) for annotation, other in zip(annotations, written["annotations"], strict=True)
    )
    head = _differing({key: value for key, value in tree.items() if key != "annotations"}, {**written, "annotations": None})
    return replace(record, extra=json.dumps(extra | head), objects=replace(record.objects, extra=per_object))


def _find(images: Images, name: str) -> Path:
    """The file that a record names; `CatalogError` if it is needed and not there."""
    near, below = (images.folder / name).absolute(), (images.folder / Path(name).name).absolute()
    path = next((candidate for candidate in (near, below) if candidate.is_file()), near)
    if images.required and not path.is_file():
        raise CatalogError(f"image {name} is neither {near} nor {below}; name the folder of the images")
    return path


def _with_astrometry(record: Record, images: Images) -> Record:
    """The record with the WCS of its image, and the objects' positions on the sky."""
    assert isinstance(record.pixels, Reference)
    pixels = record.pixels
    with open_mosaic(
        list(pixels.paths),
        record.bands,
        plane_bands=pixels.plane_bands,
        zero_point=images.zero_point,
        pixel_scale=images.pixel_scale,
        require_wcs=False,
    ) as mosaic:
        if (mosaic.width, mosaic.height) != (record.width, record.height):
            raise CatalogError(
                f"image {pixels.paths[0]} has {mosaic.width} x {mosaic.height} pixels, the record {record.width} x {record.height}"
            )
        if mosaic.wcs is None or not len(record.objects):
            return replace(record, wcs=wcs_text(mosaic.wcs))
        ra, dec = icrs_positions(mosaic.wcs, record.objects.x, record.objects.y)
        return replace(record, wcs=wcs_text(mosaic.wcs), objects=replace(record.objects, ra=ra, dec=dec))


def pixel_scale_of(record: Record) -> float:
    """Side of a record's pixels in arcsec, from its image or its WCS; `CatalogError` where neither tells it."""
    if isinstance(record.pixels, Reference) and record.pixels.pixel_scale:
        return record.pixels.pixel_scale
    if not record.wcs:
        raise CatalogError(f"record {record.key!r} tells no pixel scale; give it in arcsec")
    return float(np.sqrt(proj_plane_pixel_area(header_wcs(record.wcs))) * 3600)


def _objects(annotations: Sequence[Json], layout: Layout, width: int, height: int) -> Objects:
    boxes = np.array([_read_box(annotation, layout) for annotation in annotations], np.float32).reshape(-1, 4)
    beyond = (boxes[:, 2:] <= 0).any(axis=1) | (boxes[:, :2] >= np.array([width, height])).any(axis=1)
    flat = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
    if (beyond | flat).any():
        i = int(np.flatnonzero(beyond | flat)[0])
        raise CatalogError(f"box {annotations[i]['bbox']} of annotation {i} has no part in the image of {width} x {height} pixels")
    ids = [int(annotation[layout.id]) if layout.id else i for i, annotation in enumerate(annotations)]
    if len(set(ids)) < len(ids):
        raise CatalogError(f"{len(ids) - len(set(ids))} of {len(ids)} annotations repeat a {layout.id}; expected each once")
    nowhere = np.full(len(ids), np.nan)
    with_masks = all("segmentation" in annotation for annotation in annotations)
    return Objects(
        ids=np.array(ids, np.int64),
        boxes=boxes,
        classes=np.array([_read_class(annotation, layout) for annotation in annotations], np.int32),
        redshift=np.array([_read_redshift(annotation, layout) for annotation in annotations], np.float32),
        mag=np.array([_read_mag(annotation, layout) for annotation in annotations], np.float32),
        x=(boxes[:, 0] + boxes[:, 2]).astype(np.float64) / 2 - 0.5,
        y=(boxes[:, 1] + boxes[:, 3]).astype(np.float64) / 2 - 0.5,
        ra=nowhere,
        dec=nowhere,
        ebv=nowhere.astype(np.float32),
        masks=tuple(_read_mask(annotation["segmentation"], width, height) for annotation in annotations) if with_masks else None,
    )


def _read_box(annotation: Json, _layout: Layout | None) -> tuple[np.float32, ...]:
    x0, y0, right, top = (float(value) for value in annotation["bbox"])
    mode = annotation["bbox_mode"]
    if mode not in (XYXY, XYWH):
        raise CatalogError(f"bbox_mode is {mode}; expected 0 (x0, y0, x1, y1) or 1 (x0, y0, width, height)")
    edges = (x0, y0, right, top) if mode == XYXY else (x0, y0, x0 + right, y0 + top)
    if not all(math.isfinite(edge) for edge in edges):
        raise CatalogError(f"box {annotation['bbox']} holds a value that is no finite number")
    return tuple(np.float32(edge) for edge in edges)


def _read_class(annotation: Json, layout: Layout) -> np.int32:
    category = annotation["category_id"]
    if category not in layout.classes:
        raise CatalogError(f"category_id is {category}; expected {' or '.join(map(str, layout.classes))}")
    return np.int32(layout.classes[category])


def _read_redshift(annotation: Json, layout: Layout) -> np.float32:
    value = annotation.get("redshift")
    if value is None or math.isnan(value) or value == -1 or (value == 0 and _read_class(annotation, layout) != STAR):
        return np.float32(np.nan)
    if value < 0 or math.isinf(value):
        raise CatalogError(f"redshift is {value}; expected 0 or more, and 0, -1 or NaN for none")
    return np.float32(value)


def _read_mag(annotation: Json, layout: Layout) -> np.float32:
    value = annotation.get(layout.mag)
    return np.float32(np.nan if value is None or value == -1 or not math.isfinite(value) else value)


def _read_mask(segmentation: Any, width: int, height: int) -> masks.RunLengths:
    """Run lengths of detectron2's segmentation: polygons, or run lengths packed or not."""
    if isinstance(segmentation, list):
        return masks.from_polygons(segmentation, width, height)
    if list(segmentation["size"]) != [height, width]:
        raise CatalogError(f"a mask has the size {segmentation['size']}; expected that of the image, {[height, width]}")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        counts = coco.frPyObjects(segmentation, height, width)["counts"].decode("ascii")
    return {"size": [height, width], "counts": str(counts)}


BOX_FIELDS = ("bbox", "bbox_mode", "area")
HOMES: dict[str, tuple[tuple[str, ...], Callable[[Json, Layout], Any]]] = {
    "boxes": (BOX_FIELDS, _read_box),
    "redshift": (("redshift",), _read_redshift),
    "classes": (("category_id",), _read_class),
}
"""Columns with a home of one name in all foreign layouts: their fields, and how they are read."""


def _foreign_tree(record: Record, name: str, kept: Json) -> Json:
    """A record in a foreign layout; ``kept`` is what its extra holds of that layout."""
    layout = LAYOUTS[name]
    names = _file_names(record, name, kept.get("files", {}))
    tree: Json = names | {"image_id": 0, "height": record.height, "width": record.width} | kept.get("fields", {})
    texts = record.objects.extra if kept and record.objects.extra is not None else ("",) * len(record.objects)
    rows = [_foreign_annotation(record.objects, i, json.loads(text or "{}"), layout) for i, text in enumerate(texts)]
    absent = kept.get("absent", ())
    return {key: value for key, value in tree.items() if key not in absent} | {"annotations": rows}


def _file_names(record: Record, name: str, kept: dict[str, str]) -> dict[str, str]:
    """Fields that name the image's files: as they came where they still name these files, or where the pixels are packed."""
    pixels = record.pixels
    if isinstance(pixels, Packed) or pixels.window is not None:
        if kept and isinstance(pixels, Packed):
            return kept
        raise CatalogError(
            f"record {record.key!r} is part of a file, or packed: the layout {name} has no place for that; write it as {OWN}"
        )
    if [Path(file).name for file in kept.values()] == [path.name for path in pixels.paths]:
        return kept
    fields = ["filename"] if name == "dc2" else [f"filename_{band.upper()}" for band in record.bands]
    fields = fields if len(fields) == len(pixels.paths) else ["file_name"]
    if len(fields) != len(pixels.paths):
        raise CatalogError(f"record {record.key!r} has {len(pixels.paths)} files: the layout {name} has no place for them")
    return {field: str(path) for field, path in zip(fields, pixels.paths, strict=True)}


def _foreign_annotation(objects: Objects, i: int, kept: Json, layout: Layout) -> Json:
    """One object: its columns, then of what was kept whatever does not contradict them."""
    x0, y0, x1, y1 = (_plain(edge) for edge in objects.boxes[i])
    category = {value: key for key, value in layout.classes.items()}[int(objects.classes[i])]
    row: Json = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "bbox_mode": XYWH}
    row |= {"category_id": category, "redshift": _plain(objects.redshift[i], -1), layout.mag: _plain(objects.mag[i], -1)}
    if layout.id:
        row[layout.id] = int(objects.ids[i])
    mask = None if objects.masks is None else objects.masks[i]
    if mask is not None and "segmentation" not in kept.get("fields", {}):
        row["segmentation"] = masks.polygons(mask)
    absent = set(kept.get("absent", ()))
    full = {key: value for key, value in (row | kept.get("fields", {})).items() if key not in absent}
    for fields, reader, value in _homes(objects, i, layout):
        if not _same(reader(full, layout), value):
            full = {key: entry for key, entry in full.items() if key not in fields} | {key: row[key] for key in fields}
    if mask is not None and _read_mask(full["segmentation"], mask["size"][1], mask["size"][0]) != mask:
        full["segmentation"] = masks.polygons(mask)
    return full


def _homes(objects: Objects, i: int, layout: Layout) -> list[tuple[tuple[str, ...], Callable[[Json, Layout], Any], Any]]:
    """Fields, reader and value of every column of an object that has a home in the layout."""
    homes = [(fields, reader, getattr(objects, column)[i]) for column, (fields, reader) in HOMES.items()]
    homes.append(((layout.mag,), _read_mag, objects.mag[i]))
    if layout.id is not None:
        homes.append(((layout.id,), lambda row, form: row[str(form.id)], objects.ids[i]))
    return homes


def _differing(tree: Json, written: Json) -> Json:
    """What of ``tree`` the columns do not give back: its fields that differ, and fields that it has not."""
    fields = {key: value for key, value in tree.items() if key not in written or written[key] != value}
    if any(key in fields for key in BOX_FIELDS):  # an area or a mode holds for the box it came with
        fields |= {key: tree[key] for key in BOX_FIELDS if key in tree}
    absent = [key for key in written if key not in tree and key != "annotations"]
    return ({"fields": fields} if fields else {}) | ({"absent": absent} if absent else {})


def _text(tree: Json) -> str:
    return json.dumps(tree, separators=(",", ":")) if tree else ""


def _same(found: Any, value: Any) -> bool:
    return bool(np.array_equal(np.asarray(found), np.asarray(value), equal_nan=True))


def _plain(value: Any, none: float = math.nan) -> Any:
    """A float32 as the shortest number that gives it back; ``none`` for NaN."""
    return none if np.isnan(value) else float(str(value))


def _own_tree(record: Record) -> Json:
    objects, pixels = record.objects, record.pixels
    place: Json
    if isinstance(pixels, Packed):
        name = pixels.path
        place = {"path": str(pixels.path), "row": pixels.row, "checksum": pixels.checksum}
    else:
        name = pixels.paths[0]
        place = {
            key: getattr(pixels, key) for key in ("window", "zero_point", "plane_bands", "pixel_scale", "blank", "fingerprints")
        }
        place["paths"] = [str(path) for path in pixels.paths]
    own = {key: getattr(record, key) for key in ("key", "bands", "wcs", "split", "origin", "extra")}
    own |= {"pixels": place, "masks": objects.masks is not None, "object_extra": objects.extra is not None}
    return {
        "file_name": str(name),
        "image_id": record.key,
        "height": record.height,
        "width": record.width,
        "annotations": [_own_annotation(objects, i) for i in range(len(objects))],
        OWN: own,
    }


def _own_annotation(objects: Objects, i: int) -> Json:
    row: Json = {"bbox": [_plain(edge) for edge in objects.boxes[i]], "bbox_mode": XYXY}
    for column, field in OWN_FIELDS.items():
        value = getattr(objects, column)[i]
        if not np.isnan(value):
            row[field] = int(value) if COLUMNS[column] in (np.int64, np.int32) else float(str(value))
    if objects.masks is not None:
        row["segmentation"] = objects.masks[i]
    if objects.extra is not None:
        row["extra"] = objects.extra[i]
    return row


def _own_record(tree: Json) -> Record:
    own, rows = tree[OWN], tree["annotations"]
    width, height = int(tree["width"]), int(tree["height"])
    negative = [row["redshift"] for row in rows if row.get("redshift", 0) < 0]
    if negative:
        raise CatalogError(
            f"{len(negative)} redshifts are negative ({negative[0]}, ...); expected 0 or more, none where there is none"
        )
    columns = {
        column: np.array([row.get(field, math.nan) for row in rows], COLUMNS[column]) for column, field in OWN_FIELDS.items()
    }
    columns["boxes"] = np.array([_read_box(row, None) for row in rows], np.float32).reshape(-1, 4)
    return Record(
        key=own["key"],
        pixels=_own_pixels(own["pixels"]),
        bands=tuple(own["bands"]),
        width=width,
        height=height,
        objects=Objects(
            **columns,
            masks=tuple(_read_mask(row["segmentation"], width, height) for row in rows) if own["masks"] else None,
            extra=tuple(row["extra"] for row in rows) if own["object_extra"] else None,
        ),
        wcs=own["wcs"],
        split=own["split"],
        origin=own["origin"],
        extra=own["extra"],
    )


def _own_pixels(place: Json) -> Reference | Packed:
    if "path" in place:
        return Packed(Path(place["path"]), place["row"], place["checksum"])
    return Reference(
        paths=tuple(map(Path, place["paths"])),
        window=None if place["window"] is None else Window(*place["window"]),
        zero_point=place["zero_point"],
        plane_bands=None if place["plane_bands"] is None else tuple(place["plane_bands"]),
        pixel_scale=place["pixel_scale"],
        blank=place["blank"],
        fingerprints=tuple(place["fingerprints"]),
    )
