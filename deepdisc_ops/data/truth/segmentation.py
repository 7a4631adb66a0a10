"""Truth from a segmentation map and its catalogue, the JADES way: each source is the pixels that carry its id.

The map is a 2-D FITS image of whole numbers on the mosaic's grid, 0 being the sky. A source belongs to the window that holds its
centre; a window's edge cuts its mask, and its box. Boxes are the catalogue's where it has some, else those of the masks.
A plain FITS map is read window by window; a compressed or scaled one is held in memory.

Glossary: N sources, M sources of a window, H x W pixels.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from deepdisc_ops.data.masks import label_outlines
from deepdisc_ops.data.truth.windows import Built, Placed, Progress, Shapes, TruthSettings, WindowTruth, build
from deepdisc_ops.errors import CatalogError, ImageError
from deepdisc_ops.sky.tiling import Window

ROWS_AT_ONCE = 256
LEAST_ON_LABEL = 0.5
"""Share of the centres that must lie on their own labels: where fewer do, map and catalogue are not of one field."""


class SegmentationSettings(TruthSettings):
    """A mosaic, its segmentation map and the catalogue of the map's labels."""

    segmentation: Path


def from_segmentation(
    settings: SegmentationSettings, out: Path, *, packed: bool = False, progress: Progress | None = None
) -> Built:
    """Make a data set in the folder ``out`` of a mosaic, its segmentation map and its catalogue."""

    def prepare(placed: Placed, counts: Counter[str]) -> WindowTruth:
        segmentation = open_segmentation(settings.segmentation, (placed.mosaic.height, placed.mosaic.width))
        check_labels(segmentation, placed, settings.segmentation)
        return lambda window, _image, rows: cut_labels(segmentation, placed, window, rows, counts)

    return build(settings, prepare, out, packed=packed, progress=progress)


def open_segmentation(path: Path, shape: tuple[int, int]) -> NDArray[np.integer]:
    """The map (H, W) of a FITS file, its first 2-D image; memory-mapped where the file allows it."""
    try:
        file = fits.open(path, memmap=True)
    except FileNotFoundError:
        raise ImageError(f"segmentation map {path} does not exist") from None
    except OSError as error:
        raise ImageError(f"segmentation map {path} is not readable FITS ({error})") from None
    with file:
        images = [hdu for hdu in file if hdu.is_image and hdu.header.get("NAXIS") == 2]
        if not images:
            raise ImageError(f"segmentation map {path} holds no 2-D image; expected one of {shape[0]} rows and {shape[1]} columns")
        header, data = images[0].header, None
        if images[0].shape != shape:
            raise ImageError(
                f"segmentation map {path} has {images[0].shape[0]} rows and {images[0].shape[1]} columns, the image {shape[0]} and "
                f"{shape[1]}; they must be on one grid"
            )
        data = images[0].data
    if data.dtype.kind not in "iu":
        raise ImageError(
            f"segmentation map {path} holds {data.dtype} (BITPIX {header['BITPIX']}); expected whole numbers, one label a source"
        )
    return np.asanyarray(data)


def check_labels(segmentation: NDArray[np.integer], placed: Placed, path: Path) -> None:
    """Every source needs a label in the map, and most centres must lie on theirs."""
    ids = placed.sources.ids
    there = labels_present(segmentation, ids)
    if not there.all():
        missing = ids[~there].tolist()
        raise CatalogError(
            f"{len(missing)} of {len(ids)} ids of the catalogue are no labels of {path} ({', '.join(map(str, missing[:5]))}"
            f"{', ...' if len(missing) > 5 else ''}); hand in the map of this catalogue, or leave these rows out by a rule"
        )
    height, width = segmentation.shape
    columns = np.clip(np.rint(placed.x).astype(np.intp), 0, width - 1)
    rows = np.clip(np.rint(placed.y).astype(np.intp), 0, height - 1)
    share = float((segmentation[rows, columns] == ids).mean())
    if share < LEAST_ON_LABEL:
        raise CatalogError(
            f"only {share:.0%} of the {len(ids)} centres lie on their own labels in {path}, expected {LEAST_ON_LABEL:.0%} or "
            "more; check the id column and that map, image and catalogue are of one field"
        )


def labels_present(segmentation: NDArray[np.integer], ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N,) which ids are labels of the map, which is read some rows at a time."""
    there = np.zeros(len(ids), bool)
    for start in range(0, len(segmentation), ROWS_AT_ONCE):
        rows = np.asarray(segmentation[start : start + ROWS_AT_ONCE])
        edges = np.concatenate([[True], rows.ravel()[1:] != rows.ravel()[:-1]])  # labels come in runs
        there |= np.isin(ids, rows.ravel()[edges])
    return there & (ids != 0)


def cut_labels(
    segmentation: NDArray[np.integer], placed: Placed, window: Window, rows: NDArray[np.intp], counts: Counter[str]
) -> Shapes:
    """Boxes and masks of the sources (rows) of a window; those whose label lies outside of it altogether are left out."""
    labels = np.asarray(segmentation[window.y0 : window.y1, window.x0 : window.x1])
    ids = placed.sources.ids[rows]
    found = label_outlines(labels, ids)
    order = np.argsort(ids)
    kept = rows[order[np.searchsorted(ids, found.sources, sorter=order)]]
    counts["objects without a pixel in their window"] += len(rows) - len(kept)
    return Shapes(kept, _cut_boxes(placed, kept, window, found.boxes), found.masks)


def _cut_boxes(placed: Placed, rows: NDArray[np.intp], window: Window, mask_boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """The catalogue's boxes cut at the window's edges; those of the masks where it has none, or none in the window."""
    if placed.sources.boxes is None:
        return mask_boxes
    corner = np.array([window.x0, window.y0, window.x0, window.y0], np.float32)
    limit = np.array([window.width, window.height, window.width, window.height], np.float32)
    boxes = np.clip(placed.sources.boxes[rows] - corner, 0, limit)
    solid = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return np.where(solid[:, None], boxes, mask_boxes).astype(np.float32)
