from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from deepdisc_ops.data import masks
from deepdisc_ops.data.render import Stamps
from deepdisc_ops.errors import CatalogError
from deepdisc_ops.sky.tiling import Window

NOISE = np.array([1.0, 2.0])
BITMAPS = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9))


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
    ours = masks.run_lengths(mask, x0, y0, full.shape[1], full.shape[0])
    reference = coco.encode(np.asfortranarray(full))
    assert ours == {"size": list(full.shape), "counts": reference["counts"].decode()}
    np.testing.assert_array_equal(masks.decode(ours), full.astype(bool))
    window = (x0, y0, full.shape[1], full.shape[0])
    np.testing.assert_array_equal(masks.decode(ours, window), full[y0:, x0:].astype(bool))


def test_snr_adds_up_in_quadrature_over_the_bands() -> None:
    flux = np.zeros((1, 2, 1, 1), np.float32)
    flux[0, :, 0, 0] = 3, 8
    assert masks.all_band_snr(flux, NOISE)[0, 0, 0] == pytest.approx(5.0)
    assert masks.all_band_snr(-flux, NOISE)[0, 0, 0] == 0


def test_a_bright_mask_ends_at_the_threshold() -> None:
    outlines = masks.outline(bell(100.0, 30.0, 40.0), NOISE, 64, 64)
    mask = masks.decode(outlines.masks[0])
    rows, columns = np.indices(mask.shape)
    light = 100.0 * np.exp(-((columns - 30.0) ** 2 + (rows - 40.0) ** 2) / 8)
    np.testing.assert_array_equal(mask, light > masks.MASK_SNR)


@given(st.floats(0.01, 300), st.floats(0, 63), st.floats(0, 47))
def test_boxes_hold_the_centre_and_bound_the_mask(peak: float, x: float, y: float) -> None:
    outlines = masks.outline(bell(peak, x, y), NOISE, 64, 48)
    assert outlines.sources.tolist() == [5]
    x0, y0, x1, y1 = outlines.boxes[0]
    assert 0 <= x0 <= x + 0.5 <= x1 <= 64
    assert 0 <= y0 <= y + 0.5 <= y1 <= 48
    mask = masks.decode(outlines.masks[0])
    assert mask.sum() >= masks.MIN_PIXELS
    rows, columns = np.nonzero(mask)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x0, y0, x1, y1)


def test_sources_outside_the_image_are_left_out() -> None:
    outlines = masks.outline(bell(100.0, -40.0, 10.0), NOISE, 64, 64)
    assert len(outlines.sources) == len(outlines.masks) == 0
    assert outlines.boxes.shape == (0, 4)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")  # pycocotools and numpy 2
@given(BITMAPS)
def test_run_lengths_are_those_of_pycocotools(mask: np.ndarray) -> None:
    ours = masks.encode(mask)
    reference = coco.encode(np.asfortranarray(mask, np.uint8))
    assert ours == {"size": list(mask.shape), "counts": reference["counts"].decode()}
    np.testing.assert_array_equal(coco.decode(ours), mask)
    assert masks.area(ours) == int(coco.area(ours)) == mask.sum()
    box = masks.bounds(ours)
    if box is None:
        assert not mask.any()
    else:
        assert [box[0], box[1], box[2] - box[0], box[3] - box[1]] == coco.toBbox(ours).tolist()


@given(BITMAPS, st.integers(-12, 12), st.integers(-12, 12), st.integers(1, 15), st.integers(1, 15))
def test_a_shifted_mask_shows_the_same_pixels_elsewhere(mask: np.ndarray, dx: int, dy: int, width: int, height: int) -> None:
    moved = masks.shift(masks.encode(mask), dx, dy, width, height)
    expected = np.zeros((height, width), bool)
    for y, x in np.argwhere(mask):
        if 0 <= y + dy < height and 0 <= x + dx < width:
            expected[y + dy, x + dx] = True
    assert moved == masks.encode(expected)
    window = Window(-dx, -dy, width - dx, height - dy)
    assert masks.crop(masks.encode(mask), window) == moved


@given(BITMAPS)
def test_polygons_give_the_mask_back_through_the_rasteriser_of_coco(mask: np.ndarray) -> None:
    lengths = masks.encode(mask)
    polygons = masks.polygons(lengths)
    assert masks.from_polygons(polygons, mask.shape[1], mask.shape[0]) == lengths
    for polygon in polygons:
        assert len(polygon) >= 8
        assert 0 <= min(polygon[::2]) < max(polygon[::2]) <= mask.shape[1]
        assert 0 <= min(polygon[1::2]) < max(polygon[1::2]) <= mask.shape[0]


def test_a_pixel_is_a_square_of_four_corners() -> None:
    mask = np.zeros((4, 5), bool)
    mask[1, 3] = True
    (polygon,) = masks.polygons(masks.encode(mask))
    corners = set(zip(polygon[::2], polygon[1::2], strict=True))
    assert corners == {(3, 1), (4, 1), (4, 2), (3, 2)}


def test_polygons_beyond_the_image_are_cut_and_those_without_area_are_empty() -> None:
    cut = masks.from_polygons([[-2, -2, 2, -2, 2, 2, -2, 2]], 4, 4)
    np.testing.assert_array_equal(masks.bounds(cut), (0, 0, 2, 2))
    assert masks.area(masks.from_polygons([[1, 1, 2, 2]], 4, 4)) == 0
    assert masks.polygons(masks.from_polygons([], 4, 4)) == []
    with pytest.raises(CatalogError, match="7 coordinates; expected an even number"):
        masks.from_polygons([[0, 0, 3, 0, 3, 3, 1]], 4, 4)


@given(
    hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 3).map(lambda i: i * 70001))
)
def test_labels_of_a_map_become_their_own_masks(segmentation: np.ndarray) -> None:
    outlines = masks.label_outlines(segmentation)
    assert outlines.sources.tolist() == [label for label in np.unique(segmentation).tolist() if label]
    for label, box, mask in zip(outlines.sources, outlines.boxes, outlines.masks, strict=True):
        assert mask == masks.encode(segmentation == label)
        assert tuple(box) == masks.bounds(mask)
    some = masks.label_outlines(segmentation, np.array([0, 70001, 5]))
    assert some.sources.tolist() == [label for label in outlines.sources.tolist() if label == 70001]
