"""Cutting a mosaic into overlapping tiles; `sky.seams` makes one list of objects of what they find.

A tile is a window of pixels; its core is the part of the window that no other tile owns. Cores partition the
mosaic. Windows start on multiples of the network's stride, so that an object is seen on the same feature grid
whichever tile it falls in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from deepdisc_ops.errors import ConfigError


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
