from __future__ import annotations

import numpy as np
import pytest

from deepdisc_ops.data import records
from deepdisc_ops.errors import CatalogError


def make_objects(count: int) -> records.Objects:
    rng = np.random.default_rng(count)
    corners = rng.uniform(0, 50, (count, 2))
    columns = {name: rng.uniform(0, 9, count).astype(dtype) for name, dtype in records.COLUMNS.items()}
    columns |= {"ids": np.arange(count), "boxes": np.concatenate([corners, corners + 4], axis=1).astype(np.float32)}
    masks = tuple({"size": [64, 64], "counts": f"{i}"} for i in range(count))
    return records.Objects(**columns, masks=masks, extra=tuple(f'{{"a": {i}}}' for i in range(count)))


def test_no_objects_is_an_ordinary_value() -> None:
    empty = records.Objects.empty()
    assert len(empty) == 0
    assert empty.boxes.shape == (0, 4)
    assert len(make_objects(4).select(np.zeros(4, bool))) == 0


def test_selection_keeps_columns_together() -> None:
    objects = make_objects(8)
    chosen = objects.select(np.array([6, 1]))
    assert chosen.ids.tolist() == [6, 1]
    assert chosen.masks == (objects.masks[6], objects.masks[1])
    assert chosen.extra == (objects.extra[6], objects.extra[1])
    same = objects.select(np.isin(objects.ids, [1, 6])).select(np.array([1, 0]))
    for name in records.COLUMNS:
        np.testing.assert_array_equal(getattr(chosen, name), getattr(same, name))


def test_unequal_columns_are_refused() -> None:
    columns = {name: getattr(make_objects(3), name) for name in records.COLUMNS}
    with pytest.raises(CatalogError, match="ids has 3 objects, but x has 2"):
        records.Objects(**columns | {"x": np.zeros(2)})
    with pytest.raises(CatalogError, match="ids has 3 objects, but masks has 1"):
        records.Objects(**columns, masks=({"size": [1, 1], "counts": "0"},))
    with pytest.raises(CatalogError, match=r"boxes have the shape \(3, 2\)"):
        records.Objects(**columns | {"boxes": np.zeros((3, 2), np.float32)})
