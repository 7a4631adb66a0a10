"""Training truth on disk: one record per image, one JSON line per record, objects as columns.

A dataset is a folder with ``dataset.yaml``, ``<split>.jsonl`` and the images the lines point to (relative to the folder).
Masks are COCO run lengths in the frame of the whole image.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from deepdisc_ops.errors import CatalogError

SPLITS = ("train", "validation", "calibration", "test")
GALAXY, STAR = 0, 1

_TYPES: dict[str, Any] = {
    "ids": np.int64,
    "boxes": np.float32,
    "classes": np.int32,
    "redshift": np.float32,
    "mag": np.float32,
    "x": np.float64,
    "y": np.float64,
    "ra": np.float64,
    "dec": np.float64,
    "ebv": np.float32,
}
_OPTIONAL = ("redshift", "mag")
"""Columns in which NaN, null in the file, means that there is no value."""


@dataclass(frozen=True)
class Objects:
    """N known objects of an image; zero objects is an ordinary value.

    ids (N,) int64; boxes (N, 4) float32 x0, y0, x1, y1, edges in pixels; classes (N,) int32, 0 galaxy, 1 star;
    redshift (N,) float32, NaN for none, 0 for stars; mag (N,) float32, gold band AB, NaN for none; x, y (N,) float64 pixels,
    0-based; ra, dec (N,) float64 degrees; ebv (N,) float32 mag; masks N COCO run lengths, or None.
    """

    ids: NDArray[np.int64]
    boxes: NDArray[np.float32]
    classes: NDArray[np.int32]
    redshift: NDArray[np.float32]
    mag: NDArray[np.float32]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    ra: NDArray[np.float64]
    dec: NDArray[np.float64]
    ebv: NDArray[np.float32]
    masks: tuple[dict[str, Any], ...] | None = None

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in _TYPES}
        if self.masks is not None:
            lengths["masks"] = len(self.masks)
        wrong = [f"{name} has {length}" for name, length in lengths.items() if length != lengths["ids"]]
        if wrong:
            raise CatalogError(f"columns of unequal length: ids has {lengths['ids']} objects, but {', '.join(wrong)}")
        if self.boxes.shape != (len(self), 4):
            raise CatalogError(f"boxes have the shape {self.boxes.shape}, expected ({len(self)}, 4)")

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def empty(cls) -> Objects:
        """No objects."""
        columns = {name: np.zeros(0, dtype) for name, dtype in _TYPES.items()}
        return cls(**columns | {"boxes": np.zeros((0, 4), np.float32)}, masks=())

    def select(self, which: NDArray[np.generic]) -> Objects:
        """The objects of an index array or a mask."""
        masks = self.masks and tuple(self.masks[i] for i in np.arange(len(self))[which])
        return Objects(**{name: getattr(self, name)[which] for name in _TYPES}, masks=masks)


@dataclass(frozen=True)
class Record:
    """One image and what is known to be in it; ``image`` is absolute once opened."""

    image: Path
    bands: tuple[str, ...]
    width: int
    height: int
    objects: Objects


@dataclass(frozen=True)
class DatasetInfo:
    """What all images of a dataset have in common; pixel_scale arcsec, zero_point AB magnitude of one image unit."""

    survey: str
    bands: tuple[str, ...]
    pixel_scale: float
    zero_point: float
    gold_band: str
    seed: int


@dataclass(frozen=True)
class Dataset:
    """A folder of training truth."""

    info: DatasetInfo
    path: Path

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that are there."""
        return tuple(split for split in SPLITS if (self.path / f"{split}.jsonl").is_file())

    def records(self, split: str) -> list[Record]:
        """All records of a split, in file order."""
        path = self.path / f"{split}.jsonl"
        if not path.is_file():
            there = ", ".join(self.splits) or "none"
            raise CatalogError(
                f"{self.path} has no split {split!r} (there: {there}); an interrupted `simulate` goes on when run again"
            )
        return read_records(path)


def open_dataset(path: Path) -> Dataset:
    """Open a dataset folder."""
    source = path / "dataset.yaml"
    try:
        tree = yaml.safe_load(source.read_text())
    except FileNotFoundError:
        raise CatalogError(f"{path} is no dataset: {source.name} is missing; make one with `simulate`") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CatalogError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    names = [field.name for field in fields(DatasetInfo)]
    missing = [name for name in names if not isinstance(tree, dict) or name not in tree]
    if missing:
        raise CatalogError(f"{source} lacks {', '.join(missing)}")
    info = DatasetInfo(**{name: tree[name] for name in names})
    return Dataset(replace(info, bands=tuple(info.bands)), path.absolute())


def read_records(path: Path) -> list[Record]:
    """Records of a JSON-lines file; image paths are taken relative to the file's folder."""
    records = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                records.append(_parse(line, path, number))
    return records


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines, image paths relative to the file's folder; the file appears only when it is complete."""
    unfinished = path.with_name(f".{path.name}.part")
    with unfinished.open("w", encoding="utf-8") as lines:
        for record in records:
            image = Path(os.path.relpath(record.image, path.parent)).as_posix()
            lines.write(json.dumps(_tree(record) | {"image": image}, separators=(",", ":"), allow_nan=False) + "\n")
    unfinished.replace(path)


def subset(records: Sequence[Record], fraction: float, seed: int) -> list[Record]:
    """A random share (0 < fraction <= 1) of the records in their order; with one seed, smaller shares lie inside larger ones."""
    if not 0 < fraction <= 1:
        raise CatalogError(f"fraction is {fraction}, expected more than 0 and at most 1")
    order = np.random.default_rng(seed).permutation(len(records))
    return [records[i] for i in np.sort(order[: math.ceil(fraction * len(records) - 1e-9)])]


def _tree(record: Record) -> dict[str, Any]:
    objects = record.objects
    columns: dict[str, Any] = {name: _plain(getattr(objects, name), name) for name in _TYPES}
    columns["masks"] = None if objects.masks is None else list(objects.masks)
    return {"image": "", "bands": list(record.bands), "width": record.width, "height": record.height, "objects": columns}


def _plain(column: NDArray[Any], name: str) -> list[Any]:
    if column.dtype.kind == "i":
        return column.tolist()
    if name == "boxes":
        return [_plain(box, "box") for box in column]
    if not (np.isfinite(column) | (np.isnan(column) & (name in _OPTIONAL))).all():
        raise CatalogError(f"objects.{name} holds a value that is no finite number")
    shortest = column.astype(str)  # float32 as its shortest text, not as the digits of its float64
    return [None if math.isnan(value) else value for value in map(float, shortest)]


def _parse(line: str, path: Path, number: int) -> Record:
    try:
        tree = json.loads(line)
        objects = tree["objects"]
        columns = {name: _column(objects[name], name) for name in _TYPES}
        masks = objects.get("masks")
        return Record(
            image=(path.parent / tree["image"]).absolute(),
            bands=tuple(tree["bands"]),
            width=int(tree["width"]),
            height=int(tree["height"]),
            objects=Objects(**columns, masks=None if masks is None else tuple(masks)),
        )
    except json.JSONDecodeError as error:
        raise CatalogError(f"{path}, line {number}: not valid JSON ({error.msg} at character {error.pos})") from None
    except KeyError as error:
        raise CatalogError(f"{path}, line {number}: {error.args[0]!r} is missing") from None
    except CatalogError as error:
        raise CatalogError(f"{path}, line {number}: {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise CatalogError(f"{path}, line {number}: not a record ({error})") from None


def _column(values: list[Any], name: str) -> NDArray[Any]:
    if name in _OPTIONAL:
        values = [math.nan if value is None else value for value in values]
    column = np.array(values, dtype=_TYPES[name])
    return column.reshape(-1, 4) if name == "boxes" and not column.size else column
