from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from deepdisc_ops.data import truth
from deepdisc_ops.data.render import Stamps

NOISE = np.array([1.0, 2.0])


def bell(peak: float, x: float, y: float, side: int = 24, width: float = 2.0) -> Stamps:
    """A Gaussian in the first band only, centred at x, y of the image."""
    origin = np.rint([x, y]).astype(np.intp) - side // 2
    rows, columns = np.indices((side, side))
    flux = np.zeros((1, 2, side, side), np.float32)
    flux[0, 0] = peak * np.exp(-((columns + origin[0] - x) ** 2 + (rows + origin[1] - y) ** 2) / 2 / width**2)
    return Stamps(np.array([5]), origin[None], flux)


@given(
    hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=7)),
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_run_lengths_of_a_cutout_are_those_of_the_full_image(mask: np.ndarray, x0: int, y0: int, right: int, above: int) -> None:
    full = np.zeros((y0 + mask.shape[0] + above, x0 + mask.shape[1] + right), np.uint8)
    full[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]] = mask
    ours = truth.run_lengths(mask, x0, y0, full.shape[1], full.shape[0])
    reference = coco.encode(np.asfortranarray(full))
    assert ours == {"size": list(full.shape), "counts": reference["counts"].decode()}
    np.testing.assert_array_equal(truth.decode(ours), full.astype(bool))
    window = (x0, y0, full.shape[1], full.shape[0])
    np.testing.assert_array_equal(truth.decode(ours, window), full[y0:, x0:].astype(bool))


def test_snr_adds_up_in_quadrature_over_the_bands() -> None:
    flux = np.zeros((1, 2, 1, 1), np.float32)
    flux[0, :, 0, 0] = 3, 8
    assert truth.all_band_snr(flux, NOISE)[0, 0, 0] == pytest.approx(5.0)
    assert truth.all_band_snr(-flux, NOISE)[0, 0, 0] == 0


def test_a_bright_mask_ends_at_the_threshold() -> None:
    outlines = truth.outline(bell(100.0, 30.0, 40.0), NOISE, 64, 64)
    mask = truth.decode(outlines.masks[0])
    rows, columns = np.indices(mask.shape)
    light = 100.0 * np.exp(-((columns - 30.0) ** 2 + (rows - 40.0) ** 2) / 8)
    np.testing.assert_array_equal(mask, light > truth.MASK_SNR)


@given(st.floats(0.01, 300), st.floats(0, 63), st.floats(0, 47))
def test_boxes_hold_the_centre_and_bound_the_mask(peak: float, x: float, y: float) -> None:
    outlines = truth.outline(bell(peak, x, y), NOISE, 64, 48)
    assert outlines.sources.tolist() == [5]
    x0, y0, x1, y1 = outlines.boxes[0]
    assert 0 <= x0 <= x + 0.5 <= x1 <= 64
    assert 0 <= y0 <= y + 0.5 <= y1 <= 48
    mask = truth.decode(outlines.masks[0])
    assert mask.sum() >= truth.MIN_PIXELS
    rows, columns = np.nonzero(mask)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x0, y0, x1, y1)


def test_sources_outside_the_image_are_left_out() -> None:
    outlines = truth.outline(bell(100.0, -40.0, 10.0), NOISE, 64, 64)
    assert len(outlines.sources) == len(outlines.masks) == 0
    assert outlines.boxes.shape == (0, 4)
