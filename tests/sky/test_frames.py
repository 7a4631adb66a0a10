from __future__ import annotations

import numpy as np
import pytest
from astropy.wcs import WCS, Sip
from hypothesis import given
from hypothesis import strategies as st

from deepdisc_ops.sky.coordinates import icrs_positions
from deepdisc_ops.sky.frames import SYMMETRIES, Frame
from deepdisc_ops.sky.tiling import Window

WIDTH, HEIGHT = 41, 30
NUMBERS = np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)


def wcs_of(kind: str) -> WCS:
    """A rotated, a mirrored or a SIP-distorted WCS whose reference pixel is not the centre."""
    wcs = WCS(naxis=2)
    distorted = "-SIP" if kind == "sip" else ""
    wcs.wcs.ctype = [f"RA---TAN{distorted}", f"DEC--TAN{distorted}"]
    wcs.wcs.crpix = [12.25, 33.5]
    wcs.wcs.crval = [150.1, -62.2]
    angle, scale = np.deg2rad(33.0), 0.2 / 3600
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    wcs.wcs.cd = scale * turn @ np.diag([1.0 if kind == "mirrored" else -1.0, 1.0])
    if kind == "sip":
        a, b = np.zeros((4, 4)), np.zeros((4, 4))
        a[2, 0], a[1, 1], a[0, 3], b[0, 2], b[2, 1] = 3e-5, -2e-5, 1e-6, 4e-5, -1e-6
        wcs.sip = Sip(a, b, None, None, wcs.wcs.crpix)
    wcs.wcs.set()
    return wcs


def windows(width: int, height: int) -> st.SearchStrategy[Window]:
    def sides(length: int) -> st.SearchStrategy[list[int]]:
        return st.lists(st.integers(0, length), min_size=2, max_size=2, unique=True).map(sorted)

    return st.tuples(sides(width), sides(height)).map(lambda s: Window(s[0][0], s[1][0], s[0][1], s[1][1]))


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    """Cuts and symmetries one upon another."""
    frame = Frame(WIDTH, HEIGHT)
    for _ in range(draw(st.integers(1, 3))):
        frame = frame.cropped(draw(windows(frame.width, frame.height))).symmetric(draw(st.integers(0, SYMMETRIES - 1)))
    return frame


@given(frames())
def test_every_pixel_comes_from_where_the_frame_says(frame: Frame) -> None:
    picture = frame.cut(NUMBERS)
    assert picture.shape == (frame.height, frame.width)
    y, x = np.mgrid[: frame.height, : frame.width]
    source_x, source_y = frame.to_source(x, y)
    np.testing.assert_array_equal(picture, NUMBERS[source_y.astype(int), source_x.astype(int)])
    back_x, back_y = frame.from_source(source_x, source_y)
    np.testing.assert_array_equal((back_x, back_y), (x, y))


@given(frames(), st.data())
def test_the_box_of_a_mask_stays_its_tightest_box(frame: Frame, data: st.DataObject) -> None:
    inner = data.draw(windows(frame.width, frame.height))
    picture = np.zeros((frame.height, frame.width), bool)
    picture[inner.y0 : inner.y1, inner.x0 : inner.x1] = True
    box = np.array([inner], np.float32)
    source = np.zeros((HEIGHT, WIDTH), bool)
    frame.cut(source)[:] = picture
    rows, columns = np.nonzero(source)
    tightest = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_array_equal(frame.boxes_to_source(box), [tightest])
    np.testing.assert_array_equal(frame.boxes_from_source(np.array([tightest])), box)


@given(frames(), frames(), st.floats(-5, 45), st.floats(-5, 45))
def test_one_frame_within_another_is_one_after_the_other(outer: Frame, inner: Frame, x: float, y: float) -> None:
    np.testing.assert_allclose(inner.within(outer).to_source(x, y), outer.to_source(*inner.to_source(x, y)), atol=1e-9)


@pytest.mark.parametrize("kind", ["rotated", "mirrored", "sip"])
@given(frame=frames())
def test_the_sky_does_not_move(kind: str, frame: Frame) -> None:
    wcs = wcs_of(kind)
    x, y = np.array([0.0, 3.3, frame.width - 1]), np.array([0.4, 7.0, frame.height - 1])
    seen = frame.wcs(wcs)
    ra, dec = icrs_positions(wcs, *frame.to_source(x, y))
    np.testing.assert_allclose(icrs_positions(seen, x, y), (ra, dec), rtol=0, atol=1e-6)
    np.testing.assert_allclose(seen.world_to_pixel_values(ra, dec), (x, y), rtol=0, atol=1e-3)
    assert seen.array_shape == frame.cut(NUMBERS).shape


@pytest.mark.parametrize("quarters", range(-1, 5))
def test_rotations_are_those_of_numpy(quarters: int) -> None:
    np.testing.assert_array_equal(Frame(WIDTH, HEIGHT).rotated(quarters).cut(NUMBERS), np.rot90(NUMBERS, -quarters))


def test_the_symmetries_of_the_square_are_eight_different_ones() -> None:
    square = np.arange(9).reshape(3, 3)
    assert len({Frame(3, 3).symmetric(number).cut(square).tobytes() for number in range(SYMMETRIES)}) == SYMMETRIES


def test_a_window_beyond_the_image_and_a_skewed_step_are_refused() -> None:
    with pytest.raises(ValueError, match="does not lie inside an image of 41x30"):
        Frame.of(Window(30, 0, 42, 10)).cut(NUMBERS)
    with pytest.raises(ValueError, match="at right angles"):
        Frame(3, 3, (0, 0), (1, 0), (-1, 0))


def test_no_boxes_are_no_boxes() -> None:
    assert Frame(5, 5).transposed().boxes_from_source(np.zeros((0, 4), np.float32)).shape == (0, 4)
