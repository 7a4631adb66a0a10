"""Detections: what travels with the objects stays with them."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from deepdisc_ops.sky.detections import MASK_SIDE, Detections, Flag


def objects(n: int, *, columns: bool = True, first: int = 0) -> Detections:
    """Objects whose every column tells their number."""
    index = np.arange(first, first + n, dtype=np.int32)
    number = index.astype(np.float32)
    boxes = np.stack([number, number, number + 2, number + 2], axis=1)
    mixture = np.repeat(number[:, None], 3, axis=1)
    plain = Detections(boxes, number, index, mixture, mixture, mixture, number, index, index * 0)
    if not columns:
        return plain
    masks = np.repeat(index.astype(np.uint8), MASK_SIDE**2).reshape(n, MASK_SIDE, MASK_SIDE)
    names = np.array([f"galaxy {i}" for i in index], dtype="U12")
    return replace(plain, masks=masks, extra={"flux": np.stack([number, -number], axis=1), "name": names})


def same(one: Detections, other: Detections) -> None:
    """Every column equal, those in ``extra`` in the same order."""
    for name in [field.name for field in fields(Detections)][:-1]:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert list(one.extra) == list(other.extra)
    for name, column in one.extra.items():
        np.testing.assert_array_equal(column, other.extra[name])
        assert column.dtype == other.extra[name].dtype


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("cut", [0, 3, 7])
def test_parts_make_the_whole(cut: int, columns: bool) -> None:
    whole = objects(7, columns=columns)
    same(Detections.concatenate([whole.select(np.arange(cut)), whole.select(np.arange(7) >= cut)]), whole)


def test_an_order_is_the_same_for_every_column() -> None:
    order = np.array([4, 0, 2])
    chosen = objects(5).select(order)
    np.testing.assert_array_equal(chosen.scores, order)
    np.testing.assert_array_equal(chosen.extra["flux"][:, 1], -order)
    np.testing.assert_array_equal(chosen.extra["name"], [f"galaxy {i}" for i in order])
    assert chosen.masks is not None
    np.testing.assert_array_equal(chosen.masks[:, 5, 5], order)


def test_moving_and_flagging_leave_the_columns() -> None:
    before = objects(4)
    after = before.shift(10, 20).flagged(before.classes == 1, Flag.OUT_OF_DOMAIN).shift(-10, -20)
    same(replace(after, flags=before.flags), before)
    np.testing.assert_array_equal(after.flags, [0, Flag.OUT_OF_DOMAIN, 0, 0])


def test_a_part_of_no_objects_may_lack_columns() -> None:
    whole = objects(3)
    for parts in ([Detections.empty(3), whole], [whole, Detections.empty(3)]):
        same(Detections.concatenate(parts), whole)
    none = Detections.concatenate([Detections.empty(3), objects(0)])
    assert len(none) == 0
    assert none.masks is not None
    assert none.masks.shape == (0, MASK_SIDE, MASK_SIDE)
    assert none.extra["flux"].shape == (0, 2)
    assert Detections.concatenate([Detections.empty(3)] * 2).masks is None


def test_objects_that_lack_a_column_of_others_are_an_error() -> None:
    whole, bare = objects(3), objects(2, columns=False)
    with pytest.raises(ValueError, match=r"2 objects lack masks, 3 have it"):
        Detections.concatenate([whole, bare])
    with pytest.raises(ValueError, match=r"2 objects lack the column flux"):
        Detections.concatenate([replace(whole, masks=None), bare])
