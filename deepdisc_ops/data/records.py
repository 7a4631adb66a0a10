"""Training truth as values: one record is one image and what is known to be in it.

Boxes are edges in pixels (x0, y0, x1, y1), pixel i covering [i, i + 1); positions are 0-based, the first pixel's centre at 0.
Masks are COCO run lengths in the frame of the record's image. `deepdisc_ops.data.store` keeps records on disk.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.sky.tiling import Window

SPLITS = ("train", "validation", "calibration", "test")
GALAXY, STAR = 0, 1

COLUMNS: dict[str, Any] = {
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
"""Columns of `Objects` with their types."""

OPTIONAL = ("redshift", "mag", "ra", "dec", "ebv")
"""Columns in which NaN means that there is no value."""


@dataclass(frozen=True)
class Objects:
    """N known objects of an image; zero objects is an ordinary value.

    ids (N,) int64; boxes (N, 4) float32 x0, y0, x1, y1, edges in pixels; classes (N,) int32, 0 galaxy, 1 star;
    redshift (N,) float32, NaN for none, 0 for stars; mag (N,) float32, gold band AB, NaN for none; x, y (N,) float64 pixels,
    0-based; ra, dec (N,) float64 degrees, NaN for none; ebv (N,) float32 mag, NaN for unknown; masks N COCO run lengths, or
    None; extra N texts (JSON) with the fields of a foreign format that have no column here, or None.
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
    extra: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        lengths = {field.name: len(column) for field in fields(self) if (column := getattr(self, field.name)) is not None}
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
        columns: dict[str, Any] = {name: np.zeros(0, dtype) for name, dtype in COLUMNS.items()}
        return cls(**columns | {"boxes": np.zeros((0, 4), np.float32), "masks": ()})

    def select(self, which: NDArray[np.generic]) -> Objects:
        """The objects of an index array or a mask."""
        rows = np.arange(len(self))[which]
        masks = None if self.masks is None else tuple(self.masks[i] for i in rows)
        extra = None if self.extra is None else tuple(self.extra[i] for i in rows)
        return Objects(**{name: getattr(self, name)[rows] for name in COLUMNS}, masks=masks, extra=extra)


@dataclass(frozen=True)
class Reference:
    """Pixels that stay in their own files: one file, or one a band; absolute paths.

    window: the part that is the record's image, None for all; zero_point (AB), plane_bands, pixel_scale (arcsec) and blank as
    `sky.images.open_mosaic` takes them, None where the files tell; fingerprints: one per file, of the content at the time
    it was indexed, so that a file changed since is noticed.
    """

    paths: tuple[Path, ...]
    window: Window | None = None
    zero_point: float | None = None
    plane_bands: tuple[str, ...] | None = None
    pixel_scale: float | None = None
    blank: float | None = None
    fingerprints: tuple[str, ...] = ()


@dataclass(frozen=True)
class Packed:
    """Pixels (C, H, W) float32 nJy inside the data set: row of the array in an HDF5 file, and their CRC-32; NaN is invalid."""

    path: Path
    row: int
    checksum: int


@dataclass(frozen=True)
class Record:
    """One image and what is known to be in it.

    key: unique in its data set; wcs: the cards of the image's celestial WCS as one FITS header text, "" for none;
    split: one of `SPLITS` or "" where a stored split decides; origin: "simulated", or what the user calls the survey;
    extra: JSON with the fields of a foreign format that have no place here, or "".
    """

    key: str
    pixels: Reference | Packed
    bands: tuple[str, ...]
    width: int
    height: int
    objects: Objects
    wcs: str = ""
    split: str = ""
    origin: str = "simulated"
    extra: str = ""


@dataclass(frozen=True)
class DatasetInfo:
    """What all images of a dataset have in common; pixel_scale arcsec; magnitudes are those of the gold band."""

    survey: str
    bands: tuple[str, ...]
    pixel_scale: float
    gold_band: str
    seed: int
