"""Masks of the catalogue: the pixels of each object as COCO run lengths, in the frame of its own box.

The frame holds the pixels that the box touches: columns floor(x0) to ceil(x1), rows floor(y0) to ceil(y1). The text counts the
pixels outside and inside in turn, down the columns, compressed as by COCO: `pycocotools.mask.decode({"size": [h, w], "counts":
text})` is the mask.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.sky.detections import Array

HALF = 127.5
"""An object's pixels are those of probability above one half, in 1/255."""


def run_lengths(boxes: Array, masks: Array) -> NDArray[np.object_]:
    """Text (N,) of masks (N, S, S) of 1/255, each over its whole box (N, 4), looked at in the centres of pixels."""
    from pycocotools import mask as coco

    texts = np.empty(len(boxes), object)
    frames = box_frames(boxes)
    for i, (box, (x0, y0, x1, y1), crop) in enumerate(zip(boxes.astype(np.float64), frames.tolist(), masks, strict=True)):
        side = crop.shape[0]
        down, across = _interpolation(y0, y1, box[1], box[3], side), _interpolation(x0, x1, box[0], box[2], side)
        inside = down @ crop.astype(np.float64) @ across.T > HALF
        texts[i] = coco.encode(np.asfortranarray(inside, np.uint8))["counts"].decode("ascii")
    return texts


def decoded(boxes: Array, texts: Array) -> Iterator[NDArray[np.bool_]]:
    """The mask (h, w) of each object, over the pixels of its `box_frames`."""
    from pycocotools import mask as coco

    for (x0, y0, x1, y1), text in zip(box_frames(boxes).tolist(), texts, strict=True):
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # pycocotools and numpy 2
            mask = coco.decode({"size": [y1 - y0, x1 - x0], "counts": text}).astype(bool)
        yield mask


def box_frames(boxes: Array) -> NDArray[np.int64]:
    """Whole pixels x0, y0, x1, y1 (N, 4), the end exclusive, that boxes (N, 4) touch; one at least."""
    low = np.floor(boxes[:, :2]).astype(np.int64)
    return np.concatenate([low, np.maximum(np.ceil(boxes[:, 2:]).astype(np.int64), low + 1)], axis=1)


def _interpolation(first: int, end: int, low: float, high: float, side: int) -> NDArray[np.float64]:
    """(pixels, side) weights that take values in the middles of ``side`` equal parts of low..high to pixels' centres, linearly.

    Beyond the outermost middles the value stays; a centre outside low..high has none.
    """
    centre = np.arange(first, end) + 0.5
    at = np.clip((centre - low) / max(high - low, 1e-6) * side - 0.5, 0, side - 1)
    left = np.minimum(at.astype(np.int64), side - 2)
    share = at - left
    inside = (centre >= low) & (centre <= high)
    weights = np.zeros((len(centre), side))
    rows = np.arange(len(centre))
    weights[rows, left] = (1 - share) * inside
    weights[rows, left + 1] = share * inside
    return weights
