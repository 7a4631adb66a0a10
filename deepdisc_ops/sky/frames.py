"""Where the pixels of a cut, flipped or turned image lie in the image it was made from.

A `Frame` is an exact map between two pixel grids: a step of one pixel here is a step of one pixel there, along a row or a
column, either way. Positions are 0-based with the first pixel's centre at 0; boxes (N, 4) are edges x0, y0, x1, y1, pixel i
covering [i, i + 1). No pixel is resampled, so that pixels, boxes, masks and the sky stay together to the last digit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from astropy.wcs.wcsapi import BaseLowLevelWCS, HighLevelWCSMixin
from numpy.typing import ArrayLike, NDArray

from deepdisc_ops.sky.tiling import Window

Floats = NDArray[np.float64]
Pixel = TypeVar("Pixel", bound=np.generic)
Step = tuple[int, int]

SYMMETRIES = 8
"""Ways to lay a square on itself; bit 0 flips the columns, bit 1 the rows, bit 2 then exchanges the two."""


@dataclass(frozen=True)
class Frame:
    """A grid of ``width`` x ``height`` pixels: pixel (x, y) here is ``origin + x * step_x + y * step_y`` in the source.

    step_x, step_y: one of (1, 0), (-1, 0), (0, 1), (0, -1) each, at right angles. The default is the source itself.
    """

    width: int
    height: int
    origin: Step = (0, 0)
    step_x: Step = (1, 0)
    step_y: Step = (0, 1)

    def __post_init__(self) -> None:
        lengths = [abs(dx) + abs(dy) for dx, dy in (self.step_x, self.step_y)]
        if lengths != [1, 1] or self.step_x[0] * self.step_y[0] + self.step_x[1] * self.step_y[1]:
            raise ValueError(f"steps {self.step_x} and {self.step_y} are not one pixel each, at right angles")

    @classmethod
    def of(cls, window: Window) -> Frame:
        """The pixels of ``window``, upright."""
        return cls(window.width, window.height, (window.x0, window.y0))

    def within(self, outer: Frame) -> Frame:
        """This frame, whose source is a picture in the frame ``outer``, as a frame of the source of ``outer``."""
        turned = Frame(outer.width, outer.height, (0, 0), outer.step_x, outer.step_y)
        return Frame(
            self.width,
            self.height,
            outer._source_pixel(self.origin),
            turned._source_pixel(self.step_x),
            turned._source_pixel(self.step_y),
        )

    def cropped(self, window: Window) -> Frame:
        """The part ``window`` of this picture, in its own pixels."""
        return Frame.of(window).within(self)

    def flipped_x(self) -> Frame:
        """Columns in reverse."""
        return Frame(self.width, self.height, (self.width - 1, 0), (-1, 0), (0, 1)).within(self)

    def flipped_y(self) -> Frame:
        """Rows in reverse."""
        return Frame(self.width, self.height, (0, self.height - 1), (1, 0), (0, -1)).within(self)

    def transposed(self) -> Frame:
        """Rows become columns."""
        return Frame(self.height, self.width, (0, 0), (0, 1), (1, 0)).within(self)

    def rotated(self, quarters: int = 1) -> Frame:
        """Turned by 90 degrees ``quarters`` times, from the column axis towards the row axis, as `numpy.rot90` with k < 0."""
        frame = self
        for _ in range(quarters % 4):
            frame = frame.flipped_y().transposed()
        return frame

    def symmetric(self, number: int) -> Frame:
        """One of the `SYMMETRIES` of a square, 0 (none) to 7."""
        frame = self.flipped_x() if number & 1 else self
        frame = frame.flipped_y() if number & 2 else frame
        return frame.transposed() if number & 4 else frame

    @property
    def window(self) -> Window:
        """The pixels of the source that this frame shows."""
        (x0, y0), (x1, y1) = self.origin, self._source_pixel((self.width - 1, self.height - 1))
        return Window(min(x0, x1), min(y0, y1), max(x0, x1) + 1, max(y0, y1) + 1)

    def to_source(self, x: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
        """Positions of this picture in the source."""
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        return (
            self.origin[0] + self.step_x[0] * x + self.step_y[0] * y,
            self.origin[1] + self.step_x[1] * x + self.step_y[1] * y,
        )

    def from_source(self, x: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
        """Positions of the source in this picture, inside of it or not."""
        x, y = np.asarray(x, np.float64) - self.origin[0], np.asarray(y, np.float64) - self.origin[1]
        return self.step_x[0] * x + self.step_x[1] * y, self.step_y[0] * x + self.step_y[1] * y

    def boxes_to_source(self, boxes: NDArray[np.floating]) -> Floats:
        """Boxes of this picture in the source."""
        return _boxes(*self.to_source(*_corners(boxes)))

    def boxes_from_source(self, boxes: NDArray[np.floating]) -> Floats:
        """Boxes of the source in this picture; they are not cut at its edges."""
        return _boxes(*self.from_source(*_corners(boxes)))

    def cut(self, pixels: NDArray[Pixel]) -> NDArray[Pixel]:
        """This picture (..., height, width) of all the source's pixels, as a view."""
        x0, y0, x1, y1 = self.window
        if x0 < 0 or y0 < 0 or y1 > pixels.shape[-2] or x1 > pixels.shape[-1]:
            raise ValueError(f"{self.window} does not lie inside an image of {pixels.shape[-1]}x{pixels.shape[-2]} pixels")
        return self.turn(pixels[..., y0:y1, x0:x1])

    def turn(self, pixels: NDArray[Pixel]) -> NDArray[Pixel]:
        """This picture of the source's pixels inside `window`, as a view."""
        if self.step_x[0] == 0:
            pixels = pixels.swapaxes(-1, -2)
        return pixels[..., :: sum(self.step_y), :: sum(self.step_x)]

    def wcs(self, source: BaseLowLevelWCS) -> FrameWCS:
        """Astrometry of this picture, ``source`` being that of the image it was made from."""
        return FrameWCS(source, self)

    def _source_pixel(self, pixel: Step) -> Step:
        x, y = pixel
        return (
            self.origin[0] + self.step_x[0] * x + self.step_y[0] * y,
            self.origin[1] + self.step_x[1] * x + self.step_y[1] * y,
        )


class FrameWCS(BaseLowLevelWCS, HighLevelWCSMixin):  # type: ignore[misc]  # astropy is untyped
    """The astrometry of an image seen through a `Frame`: that of the source, distortions and all, at the mapped pixels.

    It serves wherever astropy takes a WCS of its common interface (APE 14), also ``pixel_to_world``.
    """

    def __init__(self, source: BaseLowLevelWCS, frame: Frame) -> None:
        self._source, self.frame = source, frame

    @property
    def pixel_n_dim(self) -> int:
        """Two: x and y."""
        return 2

    @property
    def world_n_dim(self) -> int:
        """Number of axes of the sky."""
        return int(self._source.world_n_dim)

    @property
    def world_axis_physical_types(self) -> list[str | None]:
        """As the source's."""
        return list(self._source.world_axis_physical_types)

    @property
    def world_axis_units(self) -> list[str]:
        """As the source's."""
        return list(self._source.world_axis_units)

    @property
    def world_axis_object_components(self) -> list[tuple[Any, ...]]:
        """As the source's."""
        return list(self._source.world_axis_object_components)

    @property
    def world_axis_object_classes(self) -> Mapping[str, tuple[Any, ...]]:
        """As the source's."""
        classes: Mapping[str, tuple[Any, ...]] = self._source.world_axis_object_classes
        return classes

    @property
    def pixel_shape(self) -> tuple[int, int]:
        """Columns and rows."""
        return self.frame.width, self.frame.height

    @property
    def array_shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.frame.height, self.frame.width

    def pixel_to_world_values(self, *pixel_arrays: ArrayLike) -> Any:
        """Positions on the sky, in the source's axes and units."""
        return self._source.pixel_to_world_values(*self.frame.to_source(*pixel_arrays))

    def world_to_pixel_values(self, *world_arrays: ArrayLike) -> tuple[Floats, Floats]:
        """0-based positions x, y in this frame."""
        return self.frame.from_source(*self._source.world_to_pixel_values(*world_arrays))


def _corners(boxes: NDArray[np.floating]) -> tuple[Floats, Floats]:
    """X and y (N, 2) of two opposite corners as positions: the edge before pixel i lies at i - 0.5."""
    edges = np.asarray(boxes, np.float64).reshape(-1, 2, 2) - 0.5
    return edges[..., 0], edges[..., 1]


def _boxes(x: Floats, y: Floats) -> Floats:
    corners = np.stack([x, y], axis=-1) + 0.5
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
