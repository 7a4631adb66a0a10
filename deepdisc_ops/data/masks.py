"""Boxes and masks of known sources: drawn from noiseless pictures, cut from segmentation maps, kept as COCO run lengths.

A pixel belongs to a simulated source where the S/N of its own light, summed in quadrature over all bands, exceeds `MASK_SNR`;
a source too faint for `MIN_PIXELS` such pixels is marked by the isophote of half its peak, or by its brightest `MIN_PIXELS`
pixels. Those masks are each source's own (deblended): the masks of neighbours may overlap.

Run lengths are COCO's, compressed, as text: {"size": [H, W], "counts": str}; they count down the columns and are worked on
without drawing the image. Polygons are COCO's too: flat lists x, y, x, y, ... along the edges of pixels.

Glossary: N sources, C bands, S stamp side, H x W pixels, R runs; boxes x0, y0, x1, y1 are edges: pixel i covers [i, i + 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco
from scipy import ndimage

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.sky.tiling import Window

if TYPE_CHECKING:
    from deepdisc_ops.data.render import Stamps

MASK_SNR = 2.0
MIN_PIXELS = 9

RunLengths = dict[str, Any]
Indices = NDArray[np.int64]
LEFT_TURN = {(1, 0): (0, 1), (0, 1): (-1, 0), (-1, 0): (0, -1), (0, -1): (1, 0)}


@dataclass(frozen=True)
class Outlines:
    """Where the sources of a batch are: sources (N,), boxes (N, 4) float32, masks N COCO run lengths."""

    sources: NDArray[np.intp]
    boxes: NDArray[np.float32]
    masks: tuple[RunLengths, ...]


def outline(stamps: Stamps, noise: NDArray[np.float64], width: int, height: int) -> Outlines:
    """Boxes and masks of a batch, cut at the edges of the image; sources with no pixel in it are left out. noise (C,) nJy."""
    masks = source_masks(all_band_snr(stamps.flux, noise), *_inside(stamps, width, height))
    kept = np.flatnonzero(masks.any(axis=(1, 2)))
    boxes = mask_boxes(masks[kept], stamps.origins[kept])
    lengths = tuple(
        run_lengths(masks[i], int(x0), int(y0), width, height) for i, (x0, y0) in zip(kept, stamps.origins[kept], strict=True)
    )
    return Outlines(stamps.sources[kept], boxes, lengths)


def all_band_snr(flux: NDArray[np.float32], noise: NDArray[np.float64]) -> NDArray[np.float32]:
    """(N, S, S) S/N per pixel of stamps (N, C, S, S), summed in quadrature over the bands."""
    scaled = np.maximum(flux, 0) / noise.astype(np.float32)[:, None, None]
    return np.sqrt(np.einsum("ncyx,ncyx->nyx", scaled, scaled))


def source_masks(snr: NDArray[np.float32], columns: NDArray[np.bool_], rows: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(N, S, S) masks of S/N maps; columns and rows (N, S) tell which pixels of the stamps lie inside the image."""
    inside = rows[:, :, None] & columns[:, None, :]
    snr = np.where(inside, snr, 0)
    masks = snr > MASK_SNR
    for i in np.flatnonzero((masks.sum(axis=(1, 2)) < MIN_PIXELS) & inside.any(axis=(1, 2))):
        brightest = np.partition(snr[i].ravel(), -MIN_PIXELS)[-MIN_PIXELS]
        masks[i] = inside[i] & (snr[i] > 0) & (snr[i] >= min(snr[i].max() / 2, brightest))
    return masks


def mask_boxes(masks: NDArray[np.bool_], origins: NDArray[np.intp]) -> NDArray[np.float32]:
    """(N, 4) tightest boxes of masks (N, S, S) that have a pixel each, at origins (N, 2)."""
    side = masks.shape[-1]
    columns, rows = masks.any(axis=1), masks.any(axis=2)
    lower = np.stack([columns.argmax(axis=1), rows.argmax(axis=1)], axis=1)
    upper = side - np.stack([np.flip(columns, 1).argmax(axis=1), np.flip(rows, 1).argmax(axis=1)], axis=1)
    return np.concatenate([lower + origins, upper + origins], axis=1).astype(np.float32)


def run_lengths(mask: NDArray[np.bool_], x0: int, y0: int, width: int, height: int) -> RunLengths:
    """Run lengths of a cutout's mask that lies at x0, y0 of an image of width x height and inside it."""
    columns, rows = np.nonzero(mask.T)
    pixels = (columns + int(x0)) * height + rows + int(y0)
    return _from_runs(pixels, pixels + 1, width, height)


def encode(mask: NDArray[np.bool_]) -> RunLengths:
    """Run lengths of a whole mask (H, W)."""
    return run_lengths(mask, 0, 0, mask.shape[1], mask.shape[0])


def decode(mask: RunLengths, window: tuple[int, int, int, int] | None = None) -> NDArray[np.bool_]:
    """The mask (H, W) of run lengths, or the part of it inside a window x0, y0, x1, y1; nothing more is drawn."""
    height, width = mask["size"]
    x0, y0, x1, y1 = window or (0, 0, width, height)
    edges = np.cumsum(_counts(mask["counts"]))
    pixels = np.arange(x0, x1) * height + np.arange(y0, y1)[:, None]
    return np.searchsorted(edges, pixels, side="right") % 2 == 1


def area(mask: RunLengths) -> int:
    """Number of pixels."""
    return sum(_counts(mask["counts"])[1::2])


def bounds(mask: RunLengths) -> tuple[int, int, int, int] | None:
    """Tightest box x0, y0, x1, y1 of a mask; None if it has no pixel."""
    columns, lower, upper = _columns(mask)
    return (int(columns[0]), int(lower.min()), int(columns[-1]) + 1, int(upper.max())) if len(columns) else None


def shift(mask: RunLengths, dx: int, dy: int, width: int, height: int) -> RunLengths:
    """The mask moved by dx, dy pixels into an image of width x height; what falls outside is lost."""
    columns, lower, upper = _columns(mask)
    columns, lower, upper = columns + dx, np.maximum(lower + dy, 0), np.minimum(upper + dy, height)
    kept = (columns >= 0) & (columns < width) & (lower < upper)
    first = columns[kept] * height
    return _from_runs(first + lower[kept], first + upper[kept], width, height)


def crop(mask: RunLengths, window: Window) -> RunLengths:
    """The part of a mask inside a window, in the window's frame."""
    return shift(mask, -window.x0, -window.y0, window.width, window.height)


def from_polygons(polygons: Sequence[Sequence[float]], width: int, height: int) -> RunLengths:
    """Run lengths of the pixels that COCO's rasteriser counts to any of the polygons; what lies outside the image is cut off."""
    shapes = [polygon for polygon in polygons if len(polygon) >= 6]  # fewer than three corners enclose nothing
    odd = next((polygon for polygon in shapes if len(polygon) % 2), None)
    if odd is not None:
        raise CatalogError(f"a polygon has {len(odd)} coordinates; expected an even number: x, y, x, y, ...")
    if not shapes:
        return _from_runs(np.zeros(0, np.int64), np.zeros(0, np.int64), width, height)
    merged = coco.merge(coco.frPyObjects([list(polygon) for polygon in shapes], height, width))
    return {"size": [height, width], "counts": merged["counts"].decode("ascii")}


def polygons(mask: RunLengths) -> list[list[float]]:
    """One polygon along the pixel edges of each connected part (4 neighbours); holes are joined to it by a cut of no width.

    `from_polygons` gives the mask back exactly.
    """
    box = bounds(mask)
    if box is None:
        return []
    labels, parts = ndimage.label(decode(mask, box))
    return [_part_polygon(labels == part, box[0], box[1]) for part in range(1, parts + 1)]


def label_outlines(segmentation: NDArray[np.integer], labels: NDArray[np.integer] | None = None) -> Outlines:
    """Boxes and masks of the labels of a segmentation map (H, W), 0 being the sky; ``sources`` are the labels, ascending.

    Without ``labels``, all that are there; with it, those of them that are there.
    """
    height, width = segmentation.shape
    there, index = np.unique(segmentation, return_inverse=True)
    index = index.reshape(segmentation.shape)
    wanted = there != 0 if labels is None else np.isin(there, labels) & (there != 0)
    slices = ndimage.find_objects(index + 1)
    masks, boxes = [], []
    for i in np.flatnonzero(wanted):
        rows, columns = slices[i]
        masks.append(run_lengths(index[rows, columns] == i, columns.start, rows.start, width, height))
        boxes.append((columns.start, rows.start, columns.stop, rows.stop))
    return Outlines(there[wanted].astype(np.intp), np.array(boxes, np.float32).reshape(-1, 4), tuple(masks))


def _from_runs(starts: Indices, ends: Indices, width: int, height: int) -> RunLengths:
    """Pack runs [start, end) of column-major pixels, ascending and apart; those that touch are joined."""
    apart = starts[1:] != ends[:-1]
    begins = starts[np.concatenate([[True], apart])] if len(starts) else starts
    stops = ends[np.concatenate([apart, [True]])] if len(ends) else ends
    edges = np.zeros(2 * len(begins) + 2, np.int64)
    edges[1:-1:2], edges[2:-1:2], edges[-1] = begins, stops, width * height
    counts = edges[1:] - edges[:-1]
    counts = counts if counts[-1] else counts[:-1]  # as COCO, no run of no pixels at the end
    packed = coco.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return {"size": [height, width], "counts": packed["counts"].decode("ascii")}


def _columns(mask: RunLengths) -> tuple[Indices, Indices, Indices]:
    """A mask as pieces of columns, in order: column, first row and end row, each (R,)."""
    height = mask["size"][0]
    edges = np.cumsum(_counts(mask["counts"]), dtype=np.int64)
    ends = edges[1::2]
    starts = edges[::2][: len(ends)]
    starts, ends = starts[starts < ends], ends[starts < ends]
    first = starts // height
    pieces = (ends - 1) // height - first + 1
    run = np.repeat(np.arange(len(starts)), pieces)
    columns = first[run] + np.arange(len(run)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    top = columns * height
    return columns, np.maximum(starts[run] - top, 0), np.minimum(ends[run] - top, height)


def _part_polygon(part: NDArray[np.bool_], x0: int, y0: int) -> list[float]:
    """Corners of one connected part: its rings one after the other, each left for the next and come back to."""
    rings = _rings(np.pad(part, 1))
    path = [*rings[0], rings[0][0]]
    for ring in rings[1:]:
        path += [*ring, ring[0], rings[0][0]]
    if len(rings) == 1:
        path.pop()
    return [float(value) for x, y in path for value in (x - 1 + x0, y - 1 + y0)]


def _rings(padded: NDArray[np.bool_]) -> list[list[tuple[int, int]]]:
    """Closed paths x, y along the edges of the pixels, the mask on the left (y upwards), only corners kept."""
    onward: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for (dy, dx), step, corner in (
        ((-1, 0), (1, 0), (0, 0)),
        ((0, 1), (0, 1), (1, 0)),
        ((1, 0), (-1, 0), (1, 1)),
        ((0, -1), (0, -1), (0, 1)),
    ):
        edge = padded & ~np.roll(padded, (-dy, -dx), axis=(0, 1))
        for y, x in np.argwhere(edge).tolist():
            onward.setdefault((x + corner[0], y + corner[1]), []).append(step)
    rings = []
    while onward:
        rings.append(_follow(min(onward), onward))  # the leftmost corner: of the outer ring first, of holes then
    return rings


def _follow(start: tuple[int, int], onward: dict[tuple[int, int], list[tuple[int, int]]]) -> list[tuple[int, int]]:
    """Walk from a corner until it is reached again, taking the steps out of ``onward``."""
    corners, here, heading = [], start, (0, 0)
    while here in onward:
        steps = onward[here]
        step = LEFT_TURN.get(heading, steps[0])
        step = step if step in steps else steps[0]
        steps.remove(step)
        if not steps:
            del onward[here]
        if step != heading:
            corners.append(here)
        here, heading = (here[0] + step[0], here[1] + step[1]), step
    return corners


def _counts(text: str) -> list[int]:
    """Run lengths from COCO's text: 5 bits a character, the sixth says that more follow, from the third run on differences."""
    counts: list[int] = []
    value = bits = 0
    for code in text.encode("ascii"):
        code -= 48
        value |= (code & 31) << bits
        bits += 5
        if not code & 32:
            if code & 16:
                value -= 1 << bits
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = bits = 0
    return counts


def _inside(stamps: Stamps, width: int, height: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    pixels = np.arange(stamps.flux.shape[-1])
    columns = stamps.origins[:, 0, None] + pixels
    rows = stamps.origins[:, 1, None] + pixels
    return (columns >= 0) & (columns < width), (rows >= 0) & (rows < height)
