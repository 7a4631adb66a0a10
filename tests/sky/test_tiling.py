from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepdisc_ops.errors import ConfigError
from deepdisc_ops.sky.tiling import plan

geometry = st.tuples(st.integers(1, 300), st.integers(1, 300), st.integers(40, 120), st.integers(0, 30), st.sampled_from([1, 4, 8]))


@given(geometry)
def test_every_pixel_is_owned_by_exactly_one_tile(shape: tuple[int, int, int, int, int]) -> None:
    width, height, tile, overlap, stride = shape
    owners = np.zeros((height, width), int)
    for one in plan(width, height, tile, overlap, stride):
        core, window = one.core, one.window
        assert window.x0 <= core.x0 < core.x1 <= window.x1 <= width
        assert window.y0 <= core.y0 < core.y1 <= window.y1 <= height
        assert window.width <= tile
        assert window.height <= tile
        assert window.x0 % stride == window.y0 % stride == 0
        owners[core.y0 : core.y1, core.x0 : core.x1] += 1
    assert (owners == 1).all()


def test_a_tile_that_does_not_advance_is_refused() -> None:
    with pytest.raises(ConfigError, match="use larger ones"):
        plan(100, 100, 32, 32)
