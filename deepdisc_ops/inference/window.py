"""One member and one window: cut into the member's own tiles, predicted, and made one list of objects again.

Glossary: C bands, H x W pixels of the window, N objects, K components.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.errors import ImageError
from deepdisc_ops.inference.engine import Member
from deepdisc_ops.sky.detections import Array, Detections, Flag
from deepdisc_ops.sky.dust import EbvPlane
from deepdisc_ops.sky.seams import at_border, reconcile, truncated
from deepdisc_ops.sky.tiling import Tile, Window, plan

Pixels = NDArray[np.float32]


def find(member: Member, data: Pixels, ebv: EbvPlane, *, masks: bool = False) -> Detections:
    """Objects of a window (C, H, W) nJy as ``member`` sees them, each from the tile in which it lies deepest."""
    height, width = data.shape[1:]
    tiles = _tiles(member, width, height)
    found: dict[int, Detections] = {}
    for batch in _batches(tiles, member.config.inference.batch):
        windows = [tiles[i].window for i in batch]
        reddening = [partial(_ebv_at, ebv, window, width, height) for window in windows]
        parts = member.predict_batch([_cut(data, window) for window in windows], reddening, masks)
        found |= {i: part.shift(window.x0, window.y0) for i, window, part in zip(batch, windows, parts, strict=True)}
    return reconcile(tiles, [found[i] for i in range(len(tiles))], width, height)


def redshift(member: Member, data: Pixels, boxes: Pixels, ebv: EbvPlane) -> Detections:
    """The mixtures of given ``boxes`` (N, 4) px of a window, in their order, each from the tile whose core it lies in.

    Scores are 1 and classes 0; the flags say that the boxes were given, which of them touch the window's edge, and which are
    cut by the edge of the tile.
    """
    (height, width), n = data.shape[1:], len(boxes)
    tiles = _tiles(member, width, height)
    tile_of = _owners(tiles, boxes, width, height)
    reddening = ebv.at(*centres(boxes), width, height)
    columns = {name: np.zeros((n, member.components), np.float32) for name in ("weights", "means", "sigmas")}
    flags = np.full(n, Flag.FORCED, np.int32)
    for number in np.unique(tile_of):
        here, window = np.flatnonzero(tile_of == number), tiles[number].window
        inside = boxes[here] - np.tile(np.array([window.x0, window.y0], np.float32), 2)
        flags[here] |= np.where(truncated(window, boxes[here], width, height), np.int32(Flag.TRUNCATED), 0)
        mixture = member.redshift(_cut(data, window), inside, reddening[here])
        for name, column in columns.items():
            column[here] = getattr(mixture, name).float().cpu().numpy()
    zero, one = np.zeros(n, np.int32), np.ones(n, np.int32)
    weights, means, sigmas = columns.values()
    forced = Detections(boxes, one.astype(np.float32), zero, weights, means, sigmas, reddening, one, flags)
    return forced.flagged(at_border(boxes, width, height), Flag.EDGE)


def given_boxes(boxes: Array) -> Pixels:
    """``boxes`` as float32 (N, 4), refused with an `ImageError` where a box is no number or has no extent."""
    array = np.asarray(boxes, np.float32).reshape(-1, 4) if np.size(boxes) == 0 else np.asarray(boxes, np.float32)
    if array.ndim != 2 or array.shape[1] != 4:
        raise ImageError(f"given boxes have shape {array.shape}; expected (N, 4): x0, y0, x1, y1 in pixels")
    wrong = np.flatnonzero(~(np.isfinite(array).all(1) & (array[:, 2:] > array[:, :2]).all(1)))
    if len(wrong):
        raise ImageError(
            f"{len(wrong)} of {len(array)} given boxes have no extent, the first is number {wrong[0]}, {array[wrong[0]].tolist()}; "
            "expected finite x0 < x1, y0 < y1 in pixels"
        )
    return array


def touches(mask: NDArray[np.bool_], boxes: Array) -> NDArray[np.bool_]:
    """Whether each box (N, 4) holds a pixel of ``mask`` (H, W), by a summed-area table."""
    area = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    area[1:, 1:] = mask.cumsum(0, dtype=np.int64).cumsum(1)
    x0, x1 = (edge.clip(0, mask.shape[1]).astype(int) for edge in (np.floor(boxes[:, 0]), np.ceil(boxes[:, 2])))
    y0, y1 = (edge.clip(0, mask.shape[0]).astype(int) for edge in (np.floor(boxes[:, 1]), np.ceil(boxes[:, 3])))
    return np.asarray(area[y1, x1] - area[y0, x1] - area[y1, x0] + area[y0, x0] > 0)


def centres(boxes: Array) -> tuple[Array, Array]:
    """Columns and rows (N,) of the centres in astropy's 0-based pixel coordinates."""
    return (boxes[:, 0] + boxes[:, 2]) / 2 - 0.5, (boxes[:, 1] + boxes[:, 3]) / 2 - 0.5


def _tiles(member: Member, width: int, height: int) -> list[Tile]:
    return plan(width, height, member.config.inference.tile, member.config.inference.overlap, member.stride)


def _batches(tiles: Sequence[Tile], size: int) -> Iterator[list[int]]:
    """Numbers of tiles that go through the network together: alike, and at most ``size`` of them."""
    alike: dict[tuple[int, int], list[int]] = {}
    for i, tile in enumerate(tiles):
        alike.setdefault((tile.window.width, tile.window.height), []).append(i)
    for same in alike.values():
        yield from (same[start : start + size] for start in range(0, len(same), size))


def _cut(data: Pixels, window: Window) -> Pixels:
    return data[:, window.y0 : window.y1, window.x0 : window.x1]


def _ebv_at(ebv: EbvPlane, window: Window, width: int, height: int, x: Array, y: Array) -> NDArray[np.float32]:
    """E(B-V) at positions of the tile ``window``."""
    return ebv.at(x + window.x0, y + window.y0, width, height)


def _owners(tiles: Sequence[Tile], boxes: Array, width: int, height: int) -> NDArray[np.int64]:
    """Number (N,) of the tile whose core holds each centre; those outside of the window go to the nearest tile."""
    x, y = (axis + 0.5 for axis in centres(boxes))
    x, y = x.clip(0, width - 0.5), y.clip(0, height - 0.5)
    owner = np.zeros(len(boxes), np.int64)
    for number, tile in enumerate(tiles):
        owner[(x >= tile.core.x0) & (x < tile.core.x1) & (y >= tile.core.y0) & (y < tile.core.y1)] = number
    return owner
