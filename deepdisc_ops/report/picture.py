"""Pictures of a mosaic with the objects of its catalogue: the middle in full, and a thumbnail of each object."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from astropy.table import Table
from numpy.typing import ArrayLike, NDArray

from deepdisc_ops.photoz import figures
from deepdisc_ops.sky.images import Mosaic
from deepdisc_ops.sky.tiling import Window

Floats = NDArray[np.float64]

PICTURE_SIDE = 400
THUMBNAIL = 40
"""Side of a thumbnail in pixels of the mosaic; an object's centre lies in its middle."""
ACROSS = 16
"""Thumbnails of a sheet along either side; a browser unpacks a sheet when one of them comes into view."""
BLOCK = 1024
"""Pixels of the mosaic read at once, along either side."""
QUALITY = 72


def draw_picture(mosaic: Mosaic, catalog: Table, path: Path, real: NDArray[np.bool_] | None = None) -> None:
    """Lupton RGB of the middle of a mosaic with the objects' boxes, coloured by ``real`` (N,) where truth is known."""
    x0, y0 = max(0, (mosaic.width - PICTURE_SIDE) // 2), max(0, (mosaic.height - PICTURE_SIDE) // 2)
    window = Window(x0, y0, min(x0 + PICTURE_SIDE, mosaic.width), min(y0 + PICTURE_SIDE, mosaic.height))
    image = mosaic.read(window)
    planes = rgb_planes(len(image.bands))
    blue, green, red = image.data[planes]
    x, y = np.asarray(catalog["x"]), np.asarray(catalog["y"])
    inside = np.flatnonzero((x >= window.x0) & (x < window.x1) & (y >= window.y0) & (y < window.y1))
    boxes = np.stack([catalog[name][inside] for name in ("x0", "y0", "x1", "y1")], axis=1) - [x0, y0, x0, y0]
    count = str(len(inside)) if len(inside) == len(catalog) else f"{len(inside)} of {len(catalog)}"
    height, width = image.mask.shape
    title = f"{count} objects, middle {width} x {height} px, colours {' '.join(image.bands[i] for i in reversed(planes))}"
    labels = [f"{z:.2f}" for z in catalog["z_mode"][inside]]
    matched = None if real is None else real[inside]
    figures.write_figure(figures.rgb_with_boxes(red, green, blue, boxes, matched, labels, title=title), path)


def rgb_planes(bands: int) -> list[int]:
    """Planes for blue, green and red: spread over the bands, without the noisy ends where there are six."""
    return [1, 2, 3] if bands >= 5 else [0, bands // 2, bands - 1]


def thumbnail_sheets(mosaic: Mosaic, x: ArrayLike, y: ArrayLike) -> list[str]:
    """WebP sheets, base64, of `ACROSS` x `ACROSS` thumbnails of objects at x, y (N,), row by row, north as in the mosaic (up).

    All have the stretch of the middle of the mosaic, so that faint objects look faint.
    """
    columns, rows = np.asarray(x, np.float64), np.asarray(y, np.float64)
    planes = rgb_planes(len(mosaic.bands))[::-1]
    level, noise, stretch = _stretch(mosaic, planes)
    cut = np.zeros((len(columns), 3, THUMBNAIL, THUMBNAIL), np.float32)
    for index, thumbnail in _cutouts(mosaic, columns, rows, planes):
        cut[index] = (thumbnail - level[:, None, None]) / noise[:, None, None]
    return [_sheet(cut[start : start + ACROSS**2], stretch) for start in range(0, len(cut), ACROSS**2)]


def _stretch(mosaic: Mosaic, planes: list[int]) -> tuple[Floats, Floats, float]:
    """Sky level and noise (3,) of the planes and the stretch of a picture in units of that noise, from the mosaic's middle."""
    x0, y0 = max(0, (mosaic.width - PICTURE_SIDE) // 2), max(0, (mosaic.height - PICTURE_SIDE) // 2)
    window = Window(x0, y0, min(x0 + PICTURE_SIDE, mosaic.width), min(y0 + PICTURE_SIDE, mosaic.height))
    pixels = np.nan_to_num(mosaic.read(window).data[planes].astype(np.float64)).reshape(3, -1)
    level = np.median(pixels, axis=1)
    noise = 1.4826 * np.median(np.abs(pixels - level[:, None]), axis=1)
    noise = np.where(noise > 0, noise, 1.0)
    bright = float(np.percentile((pixels[1] - level[1]) / noise[1], 99.5))
    return level, noise, max(bright / 2, 4.0)


def _cutouts(mosaic: Mosaic, x: Floats, y: Floats, planes: list[int]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Index and pixels (3, S, S) of each object whose centre lies in the mosaic, block by block; beyond the border 0."""
    half = THUMBNAIL // 2
    at = np.stack([np.round(x), np.round(y)], axis=1)
    inside = np.flatnonzero(np.isfinite(at).all(1) & (at >= 0).all(1) & (at < [mosaic.width, mosaic.height]).all(1))
    corner = at[inside].astype(np.int64) // BLOCK
    for block in np.unique(corner, axis=0).tolist():
        x0, y0 = (max(0, side * BLOCK - half) for side in block)
        x1, y1 = (min(end, (side + 1) * BLOCK + half) for side, end in zip(block, (mosaic.width, mosaic.height), strict=True))
        data = np.pad(np.nan_to_num(mosaic.read(Window(x0, y0, x1, y1)).data[planes]), ((0, 0), (half, half), (half, half)))
        for index in inside[(corner == block).all(1)].tolist():
            column, row = int(at[index, 0]) - x0, int(at[index, 1]) - y0  # padding has moved the centre by half a thumbnail
            yield index, data[:, row : row + THUMBNAIL, column : column + THUMBNAIL]


def _sheet(cut: NDArray[np.float32], stretch: float) -> str:
    from PIL import Image

    side = ACROSS * THUMBNAIL
    down = -(-len(cut) // ACROSS)
    canvas = np.zeros((3, down * THUMBNAIL, side), np.float32)
    for i, thumbnail in enumerate(cut):
        row, column = divmod(i, ACROSS)
        place = (slice(row * THUMBNAIL, (row + 1) * THUMBNAIL), slice(column * THUMBNAIL, (column + 1) * THUMBNAIL))
        canvas[:, *place] = thumbnail[:, ::-1]
    buffer = io.BytesIO()
    Image.fromarray(figures.lupton_colours(*canvas, stretch=stretch)).save(buffer, "WEBP", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
