"""One list of objects from the detections of overlapping windows, made while they come in, row by row of windows.

Copies of an object found in several windows are grouped by IoU, at most one a window, and one of them is kept. Objects are given
back as soon as no window to come can see them, so that what is held in memory goes with the mosaic's width and not its height.
Glossary: N detections held.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from deepdisc_ops.sky.detections import Array, Detections, Flag
from deepdisc_ops.sky.matching import pairwise_iou_candidates
from deepdisc_ops.sky.tiling import Tile, Window

SAME_IOU = 0.3


def reconcile(tiles: Sequence[Tile], found: Sequence[Detections], width: int, height: int) -> Detections:
    """One list of objects from the detections of all ``tiles`` of an image, at least one; see `Seams`."""
    seams = Seams(width, height)
    for tile, detections in zip(tiles, found, strict=True):
        seams.add(tile, detections)
    objects = seams.settled()
    if objects is None:
        raise ValueError("there is nothing to reconcile: no tile was given")
    return objects


class Seams:
    """Takes the detections of every window in the order of `tiling.plan`, all in mosaic pixels, and reconciles them.

    Predicted centres jitter between windows, so ownership by centre alone would lose or double objects. Of the copies of an
    object the one is kept whose centre lies in its window's core, or, of several or none, that farthest from a window edge. An
    object that only one window saw is kept if its centre lies in that window's core, so that overlaps are searched no harder
    than the rest. Objects are flagged `EDGE` at the mosaic's border and `TRUNCATED` at an inner window edge. Which copies are
    one object does not depend on when `settled` is called.
    """

    def __init__(self, width: int, height: int, min_iou: float = SAME_IOU) -> None:
        self._width, self._height, self._min_iou = width, height, min_iou
        self._held: list[Detections] = []
        self._window: list[Array] = []
        self._depth: list[Array] = []
        self._owned: list[Array] = []
        self._windows = 0

    def add(self, tile: Tile, found: Detections) -> None:
        """Take the objects of one more window."""
        cut = truncated(tile.window, found.boxes, self._width, self._height)
        part = found.flagged(at_border(found.boxes, self._width, self._height), Flag.EDGE).flagged(cut, Flag.TRUNCATED)
        self._held.append(part)
        self._window.append(np.full(len(part), self._windows))
        self._depth.append(_depth(tile.window, part, self._width, self._height))
        self._owned.append(_inside(tile.core, part))
        self._windows += 1

    def settled(self, row: float = np.inf) -> Detections | None:
        """Objects that no window beginning at ``row`` or below can see, in no particular order; None before the first window."""
        if not self._held:
            return None
        held = Detections.concatenate(self._held)
        window, depth, owned = (np.concatenate(parts) for parts in (self._window, self._depth, self._owned))
        one, other, iou = pairwise_iou_candidates(held.boxes, held.boxes, self._min_iou)
        between = window[one] < window[other]
        one, other, iou = one[between], other[between], iou[between]
        done = self._out_of_sight(held.boxes, one, other, row)
        pairs = done[one]
        groups = _groups(len(held), one[pairs], other[pairs], iou[pairs], window)
        cut = (held.flags & Flag.TRUNCATED) > 0
        kept = _kept(groups, done, owned, depth, cut)
        rest = np.flatnonzero(~done)
        self._held = [held.select(rest)]
        self._window, self._depth, self._owned = [window[rest]], [depth[rest]], [owned[rest]]
        return held.select(kept)

    def _out_of_sight(self, boxes: Array, one: Array, other: Array, row: float) -> Array:
        """Detections (N,) bool whose every copy, and every copy of those, ends above ``row``."""
        n = len(boxes)
        count, part = connected_components(coo_array((np.ones(len(one), np.int8), (one, other)), shape=(n, n)), directed=False)
        lowest = np.full(count, -np.inf)
        np.maximum.at(lowest, part, boxes[:, 3])
        return np.asarray(lowest[part] <= row)


def _groups(n: int, one: Array, other: Array, iou: Array, window: Array) -> Array:
    """Number (N,) of the object that each detection is a copy of: pairs are joined from the best IoU down, one a window."""
    group = np.arange(n)
    members: dict[int, list[int]] = {}
    for k in np.argsort(-iou, kind="stable"):
        a, b = int(group[one[k]]), int(group[other[k]])
        if a == b:
            continue
        first, second = members.get(a, [a]), members.get(b, [b])
        if {int(window[i]) for i in first} & {int(window[i]) for i in second}:
            continue
        members[a] = first + second
        members.pop(b, None)
        group[second] = a
    return group


def _kept(groups: Array, done: Array, owned: Array, depth: Array, cut: Array) -> Array:
    """Indices of the copies that stand for the objects that are ``done``, in their order.

    Where no copy is owned, the centre jitters over the border between cores; pieces of an object that every window cuts at the
    same line look so too, but these are cut.
    """
    here = np.flatnonzero(done)
    best_first = here[np.lexsort((here, -depth[here], ~owned[here], groups[here]))]
    _, first, count = np.unique(groups[best_first], return_index=True, return_counts=True)
    chosen = best_first[first]
    return np.sort(chosen[owned[chosen] | ((count > 1) & ~cut[chosen])])


def _inside(core: Window, detections: Detections) -> Array:
    x, y = ((detections.boxes[:, :2] + detections.boxes[:, 2:]) / 2).T
    return np.asarray((x >= core.x0) & (x < core.x1) & (y >= core.y0) & (y < core.y1))


def _depth(window: Window, detections: Detections, width: int, height: int) -> Array:
    """Distance of the centres from the nearest window edge that is not the mosaic's border, pixels."""
    x, y = ((detections.boxes[:, :2] + detections.boxes[:, 2:]) / 2).T
    sides = [
        x - window.x0 if window.x0 > 0 else np.full_like(x, np.inf),
        y - window.y0 if window.y0 > 0 else np.full_like(x, np.inf),
        window.x1 - x if window.x1 < width else np.full_like(x, np.inf),
        window.y1 - y if window.y1 < height else np.full_like(x, np.inf),
    ]
    return np.asarray(np.min(sides, axis=0))


def truncated(window: Window, boxes: Array, width: int, height: int) -> NDArray[np.bool_]:
    """Whether each box (N, 4) reaches an edge of ``window`` that is not the border of ``width`` x ``height``."""
    low = (boxes[:, :2] <= np.array([window.x0, window.y0]) + 0.5) & np.array([window.x0 > 0, window.y0 > 0])
    high = (boxes[:, 2:] >= np.array([window.x1, window.y1]) - 0.5) & np.array([window.x1 < width, window.y1 < height])
    return np.asarray((low | high).any(axis=1))


def at_border(boxes: Array, width: int, height: int) -> NDArray[np.bool_]:
    """Whether each box (N, 4) touches the border of an image, or lies beyond."""
    low, high = boxes[:, :2] <= 0.5, boxes[:, 2:] >= np.array([width, height]) - 0.5
    return np.asarray((low | high).any(axis=1))
