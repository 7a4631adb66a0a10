from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdisc_ops.sky.detections import Detections, Flag, row_order
from deepdisc_ops.sky.seams import Seams, reconcile
from deepdisc_ops.sky.tiling import Tile, Window, plan


def boxes_of(centres: np.ndarray, size: float = 8.0) -> np.ndarray:
    return np.concatenate([centres - size / 2, centres + size / 2], axis=1).astype(np.float32)


def as_detections(boxes: np.ndarray) -> Detections:
    n = len(boxes)
    ones = np.ones((n, 1), np.float32)
    index = np.zeros(n, np.int32)
    scores = np.linspace(1, 0.5, n, dtype=np.float32)
    return Detections(boxes, scores, index, ones, ones, ones, np.zeros(n, np.float32), index, index)


def look(window: Window, boxes: np.ndarray, jitter: float, rng: np.random.Generator) -> Detections:
    """A local detector: what lies in the window, cut at its edges, with positions a little off."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    low, high = [window.x0, window.y0], [window.x1, window.y1]
    seen = boxes[((centres > low) & (centres < high)).all(1)]
    moved = seen + np.repeat(rng.uniform(-jitter, jitter, (len(seen), 2)), 2, axis=0).reshape(-1, 4)[:, [0, 2, 1, 3]]
    return as_detections(np.clip(moved, [*low, *low], [*high, *high]).astype(np.float32))


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(50, 110), st.sampled_from([16, 24, 32]))
def test_every_object_is_kept_once_whatever_the_tiles(seed: int, tile: int, overlap: int) -> None:
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(12, 240, 15.0), np.arange(12, 200, 15.0)), -1).reshape(-1, 2)
    boxes = boxes_of(grid + rng.uniform(-2, 2, grid.shape))
    tiles = plan(250, 210, tile, overlap, 4)
    kept = reconcile(tiles, [look(t.window, boxes, 0.3, rng) for t in tiles], 250, 210)
    nearest = np.abs(kept.centres[:, None] + 0.5 - (boxes[None, :, :2] + boxes[None, :, 2:]) / 2).max(-1).argmin(1)
    assert sorted(nearest) == list(range(len(boxes)))


def test_the_copy_farthest_from_a_tile_edge_is_kept() -> None:
    tiles = plan(100, 40, 60, 20)
    there = np.array([[46.0, 20.0]])  # 14 px inside the first tile, 6 px inside the second
    left, right = boxes_of(there), boxes_of(there + 1)
    kept = reconcile(tiles, [as_detections(left), as_detections(right)], 100, 40)
    np.testing.assert_array_equal(kept.boxes, left)


def test_what_one_tile_alone_saw_counts_in_its_core_only() -> None:
    tiles = plan(100, 40, 60, 20)  # the cores meet at 50
    seen = as_detections(boxes_of(np.array([[45.0, 20.0], [54.0, 20.0]])))
    kept = reconcile(tiles, [seen, Detections.empty(1)], 100, 40)
    np.testing.assert_array_equal(kept.boxes, seen.boxes[:1])


def test_borders_are_flagged() -> None:
    window = plan(100, 40, 60, 20)[0].window
    at_border, at_edge = boxes_of(np.array([[4.0, 20.0]])), np.array([[52.0, 10.0, 60.0, 14.0]], np.float32)
    found = reconcile([Tile(window, window)], [as_detections(np.concatenate([at_border, at_edge]))], 100, 40)
    assert found.flags.tolist() == [Flag.EDGE, Flag.TRUNCATED]


def test_nothing_found_is_an_ordinary_result() -> None:
    tiles = plan(100, 100, 60, 20)
    assert len(reconcile(tiles, [Detections.empty(5)] * len(tiles), 100, 100)) == 0


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(60, 110), st.sampled_from([16, 24]))
def test_what_is_settled_row_by_row_is_what_is_settled_at_once(seed: int, tile: int, overlap: int) -> None:
    rng = np.random.default_rng(seed)
    boxes = boxes_of(rng.uniform(5, 205, (150, 2)), 7.0)
    tiles = plan(210, 210, tile, overlap, 4)
    found = [look(t.window, boxes, 0.5, rng) for t in tiles]
    seams, parts = Seams(210, 210), []
    for number, (one, seen) in enumerate(zip(tiles, found, strict=True)):
        seams.add(one, seen)
        following = tiles[number + 1].window.y0 if number + 1 < len(tiles) else np.inf
        part = seams.settled(following) if following != one.window.y0 else None
        parts += [] if part is None else [part]
    assert len(parts) > 1
    at_once, in_rows = reconcile(tiles, found, 210, 210), Detections.concatenate(parts)
    for name in ("boxes", "scores", "flags"):
        one, other = (getattr(each, name)[row_order(each.boxes)] for each in (at_once, in_rows))
        np.testing.assert_array_equal(one, other)


def test_pieces_cut_at_the_same_line_are_no_object_of_their_own() -> None:
    whole = np.array([[20.0, 46, 45, 54]], np.float32)  # reaches into the right windows, which begin at 40
    piece = np.array([[40.0, 46, 45, 54]], np.float32)
    tiles = plan(100, 100, 60, 20)  # left and right, above and below
    kept = reconcile(tiles, [as_detections(boxes) for boxes in (whole, piece, whole, piece)], 100, 100)
    np.testing.assert_array_equal(kept.boxes, whole)
