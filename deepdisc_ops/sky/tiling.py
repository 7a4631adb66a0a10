"""Cutting a mosaic into overlapping tiles, and making one list of objects of what the tiles found.

A tile is a window of pixels; its core is the part of the window that no other tile owns. Cores partition the
mosaic. Windows start on multiples of the network's stride, so that an object is seen on the same feature grid
whichever tile it falls in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from deepdisc_ops.errors import ConfigError
from deepdisc_ops.sky.detections import Array, Detections, Flag
from deepdisc_ops.sky.matching import pairwise_iou_candidates


class Window(NamedTuple):
    """Pixels [x0, x1) by [y0, y1), 0-based."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def width(self) -> int:
        """Columns."""
        return self.x1 - self.x0

    @property
    def height(self) -> int:
        """Rows."""
        return self.y1 - self.y0


@dataclass(frozen=True)
class Tile:
    """A window and the core it owns, both in mosaic pixels."""

    window: Window
    core: Window


def plan(width: int, height: int, tile: int, overlap: int, stride: int = 1) -> list[Tile]:
    """Tiles of at most ``tile`` pixels a side that share ``overlap`` pixels, row by row."""
    return [
        Tile(Window(wx[0], wy[0], wx[1], wy[1]), Window(cx[0], cy[0], cx[1], cy[1]))
        for wy, cy in _plan_axis(height, tile, overlap, stride)
        for wx, cx in _plan_axis(width, tile, overlap, stride)
    ]


def _plan_axis(size: int, tile: int, overlap: int, stride: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    step = (tile - overlap) // stride * stride
    if step <= 0 or overlap < 0:
        raise ConfigError(f"tiles of {tile} px with overlap {overlap} and stride {stride} do not advance; use larger ones")
    starts = [0]
    while starts[-1] + tile < size:
        starts.append(starts[-1] + step)
    ends = [min(start + tile, size) for start in starts]
    cuts = [0, *((start + end) // 2 for start, end in zip(starts[1:], ends[:-1], strict=True)), size]
    return [((start, end), (cuts[i], cuts[i + 1])) for i, (start, end) in enumerate(zip(starts, ends, strict=True))]


def reconcile(tiles: Sequence[Tile], found: Sequence[Detections], width: int, height: int, min_iou: float = 0.3) -> Detections:
    """One list of objects from the detections of overlapping tiles, all in mosaic pixels.

    Predicted centres jitter between tiles, so ownership by centre alone would lose or double objects. Copies in
    different tiles are matched by IoU, at most one a tile, and the copy farthest from a tile edge is kept; an object that only
    one tile saw is kept if its centre lies in that tile's core, so that overlaps are searched no harder than the rest.
    Detections are flagged `EDGE` at the mosaic's border and `TRUNCATED` at an inner tile edge.
    """
    parts = [_flag_borders(tile.window, detections, width, height) for tile, detections in zip(tiles, found, strict=True)]
    everything = Detections.concatenate(parts)
    if len(tiles) == 1:
        return everything
    tile_of = np.repeat(np.arange(len(tiles)), [len(part) for part in parts])
    depth = np.concatenate([_depth(tile.window, part, width, height) for tile, part in zip(tiles, parts, strict=True)])
    owned = np.concatenate([_inside(tile.core, part) for tile, part in zip(tiles, parts, strict=True)])
    groups = _same_objects(everything.boxes, tile_of, min_iou)
    kept = [max(group, key=lambda i: depth[i]) for group in groups if len(group) > 1 or owned[group[0]]]
    return everything.select(np.array(sorted(kept), np.int64))


def _same_objects(boxes: Array, tile_of: Array, min_iou: float) -> list[list[int]]:
    """Detections grouped by object: at most one from each tile, pairs joined from the best IoU down."""
    first, second, iou = pairwise_iou_candidates(boxes, boxes, min_iou)
    between = tile_of[first] < tile_of[second]
    first, second, iou = first[between], second[between], iou[between]
    group_of = {i: [i] for i in range(len(boxes))}
    for k in np.argsort(-iou, kind="stable"):
        one, other = group_of[int(first[k])], group_of[int(second[k])]
        if one is other or {tile_of[i] for i in one} & {tile_of[i] for i in other}:
            continue
        one.extend(other)
        for i in other:
            group_of[i] = one
    return list({id(group): group for group in group_of.values()}.values())


def _inside(core: Window, detections: Detections) -> Array:
    x, y = ((detections.boxes[:, :2] + detections.boxes[:, 2:]) / 2).T
    return np.asarray((x >= core.x0) & (x < core.x1) & (y >= core.y0) & (y < core.y1))


def _depth(window: Window, detections: Detections, width: int, height: int) -> Array:
    """Distance of the centres from the nearest tile edge that is not the mosaic's border, pixels."""
    x, y = ((detections.boxes[:, :2] + detections.boxes[:, 2:]) / 2).T
    sides = [
        x - window.x0 if window.x0 > 0 else np.full_like(x, np.inf),
        y - window.y0 if window.y0 > 0 else np.full_like(x, np.inf),
        window.x1 - x if window.x1 < width else np.full_like(x, np.inf),
        window.y1 - y if window.y1 < height else np.full_like(x, np.inf),
    ]
    return np.asarray(np.min(sides, axis=0))


def _flag_borders(window: Window, detections: Detections, width: int, height: int) -> Detections:
    low = detections.boxes[:, :2] <= np.array([window.x0, window.y0]) + 0.5
    high = detections.boxes[:, 2:] >= np.array([window.x1, window.y1]) - 0.5
    at_start, at_end = np.array([window.x0 == 0, window.y0 == 0]), np.array([window.x1 == width, window.y1 == height])
    edge = (low & at_start).any(1) | (high & at_end).any(1)
    truncated = (low & ~at_start).any(1) | (high & ~at_end).any(1)
    return detections.flagged(edge, Flag.EDGE).flagged(truncated, Flag.TRUNCATED)
