"""What the network found in an image: boxes, scores and redshift mixtures, as plain arrays.

Glossary: N objects, K mixture components, C bands. Boxes are (x0, y0, x1, y1) in pixels, 0-based, the end exclusive:
pixel i covers [i, i + 1) and its centre, in the FITS-minus-one coordinates of astropy, is at i.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntFlag
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
MASK_SIDE = 28
"""Rows and columns of a mask, which covers its object's box."""


class Flag(IntFlag):
    """Bits of the catalogue's ``flags`` column."""

    EDGE = 1  # the box touches the edge of the mosaic
    TRUNCATED = 2  # the box touches the edge of the tile it was found in
    MASKED = 4  # a pixel of the box has no valid data in some band
    FORCED = 8  # the box was given, not found
    OUT_OF_DOMAIN = 16  # the image differs from the training set
    NO_DATA = 32  # the box was given where the mosaic has no valid pixel: there is no redshift


@dataclass(frozen=True)
class Detections:
    """N detected objects; zero objects is an ordinary value with the same columns.

    boxes (N, 4) float32 pixels; scores (N,) float32; classes (N,) int32 index into the model's classes;
    weights, means, sigmas (N, K) float32, a Gaussian mixture in redshift with weights summing to 1;
    ebv (N,) float32 mag, the E(B-V) the mixture was computed with; n_members (N,) int32;
    flags (N,) int32, bits of `Flag`; masks (N, 28, 28) uint8 or none, the probability in 1/255 that each part of the box
    belongs to the object: row i covers the box from y0 + i h/28 to y0 + (i + 1) h/28. ``extra`` holds further columns (N, ...)
    that travel with the objects, by name: photometry (``flux``, ``flux_err``, each (N, C) nJy), columns of a forced catalogue.
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
    masks: Array | None = None
    extra: Mapping[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.boxes)

    def __repr__(self) -> str:
        flagged = {flag.name.lower(): int(np.count_nonzero(self.flags & flag)) for flag in Flag if flag.name}
        told = [f"{len(self)} objects", f"{self.weights.shape[1]} components"]
        told += [f"{count} {name}" for name, count in flagged.items() if count]
        told += ["masks"] * (self.masks is not None) + list(self.extra)
        return f"<Detections {', '.join(told)}>"

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
        """All objects of ``parts`` (at least one part, equal K), with the same columns; a part of no objects may lack some."""
        every = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ALWAYS}
        masks = _concatenate("masks", [part.masks for part in parts], parts)
        names = dict.fromkeys(name for part in parts for name in part.extra)
        columns = {name: _concatenate(f"the column {name}", [part.extra.get(name) for part in parts], parts) for name in names}
        return cls(**every, masks=masks, extra={name: column for name, column in columns.items() if column is not None})

    def select(self, index: Array) -> Detections:
        """The objects at ``index`` (integers or a boolean mask), in that order."""
        return Detections(
            **{name: getattr(self, name)[index] for name in _ALWAYS},
            masks=None if self.masks is None else self.masks[index],
            extra={name: column[index] for name, column in self.extra.items()},
        )

    def shift(self, dx: float, dy: float) -> Detections:
        """The same objects with boxes moved by (dx, dy) pixels."""
        return replace(self, boxes=self.boxes + np.array([dx, dy, dx, dy], np.float32))

    def with_columns(self, columns: Mapping[str, Array]) -> Detections:
        """The same objects with more (or other) columns in ``extra``."""
        return replace(self, extra={**self.extra, **columns})

    def flagged(self, where: Array, flag: Flag) -> Detections:
        """The same objects with ``flag`` set where the boolean mask says so."""
        return replace(self, flags=(self.flags | np.where(where, np.int32(flag), 0)).astype(np.int32))


def row_order(boxes: Array) -> Array:
    """Indices that sort boxes (N, 4) by row and column of their centres, then by size, so that equal centres are settled too."""
    size, centre = boxes[:, 2:] - boxes[:, :2], boxes[:, 2:] + boxes[:, :2]
    return np.lexsort((size[:, 0], size[:, 1], centre[:, 0], centre[:, 1]))


_ALWAYS = tuple(f.name for f in fields(Detections) if f.name not in {"masks", "extra"})
"""The columns that all detections have."""


def _concatenate(what: str, columns: Iterable[Array | None], parts: Sequence[Detections]) -> Array | None:
    """One optional column of ``parts``, None if none has it; raises if some part with objects lacks what another has."""
    pairs = list(zip(columns, parts, strict=True))
    given = [column for column, part in pairs if column is not None and len(part)]
    if not given:
        return next((column for column, _ in pairs if column is not None), None)
    lacking = sum(len(part) for column, part in pairs if column is None)
    if lacking:
        raise ValueError(f"{lacking} objects lack {what}, {sum(map(len, given))} have it; ask for it everywhere or nowhere")
    return np.concatenate(given)
