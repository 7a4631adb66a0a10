"""A window that is too large for an endpoint, asked for in overlapping pieces and put together as if it had been one.

Glossary: C bands, H x W pixels of the window, N objects. Boxes are in pixels of the window, or of the piece inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.sky.detections import Array, Detections, Flag
from deepdisc_ops.sky.dust import EbvPlane
from deepdisc_ops.sky.seams import at_border, reconcile, truncated
from deepdisc_ops.sky.tiling import Tile, Window, plan

STRIDE = 32
"""Pieces start on multiples of it, as windows do."""
OVERLAP = 64
LEAST_SIDE = 128
"""Nothing smaller is sent: what does not fit then does not fit at all."""

Find = Callable[[Window, EbvPlane], Detections]
"""The objects of a piece (as a part of the window), in pixels of the piece."""
Redshift = Callable[[Window, Array, EbvPlane], Detections]
"""The mixtures of boxes (N, 4) px of a piece, in their order."""


def pieces(width: int, height: int, side: int | None = None) -> list[Tile]:
    """Pieces of at most ``side`` pixels (default: half the window and the overlap); none where they would be too small."""
    longest = max(width, height)
    wanted = -(-(longest + OVERLAP) // 2) if side is None else side
    fitting = -(-wanted // STRIDE) * STRIDE if side is None else wanted // STRIDE * STRIDE
    return plan(width, height, fitting, OVERLAP, STRIDE) if LEAST_SIDE <= fitting < longest else []


def find_in(tiles: Sequence[Tile], find: Find, ebv: EbvPlane, width: int, height: int) -> Detections:
    """The objects of a window from those of its pieces, each once."""
    found = []
    for tile in tiles:
        window = tile.window
        seen = find(window, plane_of(ebv, window, width, height))
        own = replace(seen, flags=seen.flags & ~np.int32(Flag.EDGE))  # the window's border is not the piece's
        found.append(own.shift(window.x0, window.y0))
    return reconcile(tiles, found, width, height)


def redshift_in(tiles: Sequence[Tile], redshift: Redshift, boxes: Array, ebv: EbvPlane, width: int, height: int) -> Detections:
    """The mixtures of ``boxes`` (N, 4) of a window in their order, each from the piece whose core its centre lies in."""
    x, y = ((boxes[:, :2] + boxes[:, 2:]) / 2).T
    x, y = x.clip(0, width - 0.5), y.clip(0, height - 0.5)
    rows: list[Array] = []
    parts: list[Detections] = []
    for tile in tiles:
        window, core = tile.window, tile.core
        here = np.flatnonzero((x >= core.x0) & (x < core.x1) & (y >= core.y0) & (y < core.y1))
        if not len(here) and (len(boxes) or parts):
            continue  # one piece at least is asked, for the number of components
        offset = np.tile(np.array([window.x0, window.y0], np.float32), 2)
        seen = redshift(window, boxes[here] - offset, plane_of(ebv, window, width, height))
        seen = replace(seen, boxes=boxes[here], flags=seen.flags & ~np.int32(Flag.EDGE))
        seen = seen.flagged(at_border(boxes[here], width, height), Flag.EDGE)
        parts.append(seen.flagged(truncated(window, boxes[here], width, height), Flag.TRUNCATED))
        rows.append(here)
    return Detections.concatenate(parts).select(np.argsort(np.concatenate(rows)))


def plane_of(ebv: EbvPlane, window: Window, width: int, height: int) -> EbvPlane:
    """E(B-V) over a part of a window of ``width`` x ``height``."""
    x = np.array([window.x0, window.x1, window.x0, window.x1]) - 0.5
    y = np.array([window.y0, window.y0, window.y1, window.y1]) - 0.5
    a, b, c, d = (float(value) for value in ebv.at(x, y, width, height))
    return EbvPlane((a, b, c, d))


def cut(plane: NDArray[np.generic], window: Window) -> Array:
    """The part of a plane or cube (..., H, W) that a window covers."""
    return np.ascontiguousarray(plane[..., window.y0 : window.y1, window.x0 : window.x1])
