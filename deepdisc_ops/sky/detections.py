"""What the network found in an image: boxes, scores and redshift mixtures, as plain arrays.

Glossary: N objects, K mixture components. Boxes are (x0, y0, x1, y1) in pixels, 0-based, the end exclusive:
pixel i covers [i, i + 1) and its centre, in the FITS-minus-one coordinates of astropy, is at i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntFlag
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Flag(IntFlag):
    """Bits of the catalogue's ``flags`` column."""

    EDGE = 1  # the box touches the edge of the mosaic
    TRUNCATED = 2  # the box touches the edge of the tile it was found in
    MASKED = 4  # a pixel of the box has no valid data in some band
    FORCED = 8  # the box was given, not found
    OUT_OF_DOMAIN = 16  # the image differs from the training set


@dataclass(frozen=True)
class Detections:
    """N detected objects; zero objects is an ordinary value with the same columns.

    boxes (N, 4) float32 pixels; scores (N,) float32; classes (N,) int32 index into the model's classes;
    weights, means, sigmas (N, K) float32, a Gaussian mixture in redshift with weights summing to 1;
    ebv (N,) float32 mag, the E(B-V) the mixture was computed with; n_members (N,) int32;
    flags (N,) int32, bits of `Flag`.
    """

    boxes: Array
    scores: Array
    classes: Array
    weights: Array
    means: Array
    sigmas: Array
    ebv: Array
    n_members: Array
    flags: Array

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def centres(self) -> Array:
        """(N, 2) x, y in astropy's 0-based pixel coordinates (the centre of the first pixel is 0, 0)."""
        return np.asarray((self.boxes[:, :2] + self.boxes[:, 2:]) / 2 - 0.5)

    @classmethod
    def empty(cls, components: int) -> Detections:
        """No objects, with mixtures of ``components``."""
        mixture = np.zeros((0, components), np.float32)
        none, index = np.zeros(0, np.float32), np.zeros(0, np.int32)
        return cls(np.zeros((0, 4), np.float32), none, index, mixture, mixture, mixture, none, index, index)

    @classmethod
    def concatenate(cls, parts: Sequence[Detections]) -> Detections:
        """All objects of ``parts`` (at least one part, equal K)."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def select(self, index: Array) -> Detections:
        """The objects at ``index`` (integers or a boolean mask), in that order."""
        return Detections(*(getattr(self, f.name)[index] for f in fields(self)))

    def shift(self, dx: float, dy: float) -> Detections:
        """The same objects with boxes moved by (dx, dy) pixels."""
        return replace(self, boxes=self.boxes + np.array([dx, dy, dx, dy], np.float32))

    def flagged(self, where: Array, flag: Flag) -> Detections:
        """The same objects with ``flag`` set where the boolean mask says so."""
        return replace(self, flags=(self.flags | np.where(where, np.int32(flag), 0)).astype(np.int32))
