"""Training crops: pixels and truth cut, flipped and transposed alike, the same for a given seed and step.

Glossary: C bands, S side of the crop, N objects. Boxes are (x0, y0, x1, y1) pixels, exclusive end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.config import DataSettings, ModelSettings
from deepdisc_ops.data.records import GALAXY, DatasetInfo, Objects, Record
from deepdisc_ops.data.truth import decode
from deepdisc_ops.errors import ConfigError
from deepdisc_ops.sky.images import open_mosaic
from deepdisc_ops.sky.tiling import Window

CLASS_NAMES = ("galaxy", "star")
"""Names of the codes GALAXY and STAR of the truth."""


@dataclass(frozen=True)
class Sample:
    """One training image: pixels (C, S, S) float32 nJy and N objects.

    boxes (N, 4) float32; classes (N,) int64 index into the model's classes; redshift (N,) float32, NaN where the object
    does not train the redshift head; ebv (N,) float32 mag; masks (N, S, S) bool or None.
    """

    pixels: NDArray[np.float32]
    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]
    redshift: NDArray[np.float32]
    ebv: NDArray[np.float32]
    masks: NDArray[np.bool_] | None


class CropLoader:
    """Batches of augmented crops, a pure function of (seed, step); decoded images are kept up to ``cache_gb``."""

    def __init__(self, records: Sequence[Record], info: DatasetInfo, data: DataSettings, model: ModelSettings, seed: int) -> None:
        if not records:
            raise ConfigError(f"no training images in {data.path}; simulate more scenes or raise data.fraction")
        self._records = list(records)
        self._truth = [label(record.objects, info, model, data.min_box) for record in records]
        self._data, self._model, self._seed = data, model, seed
        self._cache: dict[int, NDArray[np.float32]] = {}
        self._cached_bytes = 0.0

    def batch(self, step: int, size: int) -> list[Sample]:
        """``size`` samples of optimisation step ``step``."""
        rng = np.random.default_rng([self._seed, step])
        return [self._sample(int(i), rng) for i in rng.integers(len(self._records), size=size)]

    def _sample(self, i: int, rng: np.random.Generator) -> Sample:
        record, side = self._records[i], self._data.crop
        if record.width < side or record.height < side:
            raise ConfigError(f"data.crop {side} is larger than {record.image} ({record.width}x{record.height}); use smaller crops")
        x0, y0 = int(rng.integers(record.width - side + 1)), int(rng.integers(record.height - side + 1))
        window = Window(x0, y0, x0 + side, y0 + side)
        sample = cut(self._pixels(i, window), self._truth[i], window, record.objects if self._model.mask_head else None)
        return augment(sample, flip_x=rng.random() < 0.5, flip_y=rng.random() < 0.5, transpose=rng.random() < 0.5)

    def _pixels(self, i: int, window: Window) -> NDArray[np.float32]:
        if i in self._cache:
            return self._cache[i][:, window.y0 : window.y1, window.x0 : window.x1]
        whole = self._cached_bytes < self._data.cache_gb * 1e9
        with open_mosaic(self._records[i].image, self._model.bands) as mosaic:
            pixels = mosaic.read(None if whole else window).data
        if not whole:
            return pixels
        self._cache[i] = pixels
        self._cached_bytes += pixels.nbytes
        return self._pixels(i, window)


@dataclass(frozen=True)
class Labels:
    """Truth as the network wants it: widened boxes, centres (N, 2) in box coordinates, class, redshift, E(B-V)."""

    boxes: NDArray[np.float32]
    centres: NDArray[np.float64]
    classes: NDArray[np.int64]
    redshift: NDArray[np.float32]
    ebv: NDArray[np.float32]


def label(objects: Objects, info: DatasetInfo, model: ModelSettings, min_box: float) -> Labels:
    """Widen small boxes about the objects' centres, name the classes, and leave redshifts to gold galaxies alone.

    The gold cut applies to the redshift only; every object trains detection (LSST paper).
    """
    if model.redshift_head.gold_band != info.gold_band:
        raise ConfigError(
            f"model.redshift_head.gold_band is {model.redshift_head.gold_band!r}, the data's magnitudes are {info.gold_band!r}"
        )
    centres = np.stack([objects.x, objects.y], axis=1) + 0.5
    gold = (objects.classes == GALAXY) & (objects.mag < model.redshift_head.gold_limit)
    codes = [model.classes.index(name) for name in CLASS_NAMES] if len(model.classes) > 1 else [0, 0]
    low = np.minimum(objects.boxes[:, :2], centres - min_box / 2)
    high = np.maximum(objects.boxes[:, 2:], centres + min_box / 2)
    return Labels(
        boxes=np.concatenate([low, high], axis=1).astype(np.float32),
        centres=centres,
        classes=np.array(codes, np.int64)[objects.classes],
        redshift=np.where(gold, objects.redshift, np.nan).astype(np.float32),
        ebv=objects.ebv.astype(np.float32),
    )


def cut(pixels: NDArray[np.float32], labels: Labels, window: Window, masks_of: Objects | None = None) -> Sample:
    """The objects whose centres lie in ``window``, in its coordinates, with ``pixels`` already cut to it."""
    corner = np.array([window.x0, window.y0])
    centres = labels.centres - corner
    inside = np.flatnonzero(((centres > 1) & (centres < np.array([window.width, window.height]) - 1)).all(axis=1))
    limits = np.array([window.width, window.height] * 2)
    boxes = np.clip(labels.boxes[inside] - np.tile(corner, 2), 0, limits).astype(np.float32)
    masks = None
    if masks_of is not None:
        if masks_of.masks is None:
            raise ConfigError("model.mask_head is on but the data set holds no masks; simulate again or switch it off")
        masks = np.array([decode(masks_of.masks[i], window) for i in inside], bool).reshape(
            len(inside), window.height, window.width
        )
    return Sample(pixels, boxes, labels.classes[inside], labels.redshift[inside], labels.ebv[inside], masks)


def augment(sample: Sample, *, flip_x: bool, flip_y: bool, transpose: bool) -> Sample:
    """Flip and transpose pixels, boxes and masks alike: the eight symmetries of the square."""
    pixels, boxes, masks = sample.pixels, sample.boxes, sample.masks
    side = pixels.shape[-1]
    if flip_x:
        pixels = pixels[..., ::-1]
        boxes = np.stack([side - boxes[:, 2], boxes[:, 1], side - boxes[:, 0], boxes[:, 3]], axis=1)
        masks = None if masks is None else masks[..., ::-1]
    if flip_y:
        pixels = pixels[..., ::-1, :]
        boxes = np.stack([boxes[:, 0], side - boxes[:, 3], boxes[:, 2], side - boxes[:, 1]], axis=1)
        masks = None if masks is None else masks[..., ::-1, :]
    if transpose:
        pixels, boxes = pixels.swapaxes(-1, -2), boxes[:, [1, 0, 3, 2]]
        masks = None if masks is None else masks.swapaxes(-1, -2)
    if masks is not None:
        masks = np.ascontiguousarray(masks)
    return Sample(np.ascontiguousarray(pixels), boxes, sample.classes, sample.redshift, sample.ebv, masks)


def measure_noise(records: Sequence[Record], bands: Sequence[str], images: int = 16) -> tuple[float, ...]:
    """Robust scatter per pixel of every band in nJy (1.4826 x MAD) over the first ``images`` records."""
    scatter = []
    for record in records[:images]:
        with open_mosaic(record.image, bands) as mosaic:
            image = mosaic.read()
        valid = image.data[:, ~image.mask]
        scatter.append(1.4826 * np.median(np.abs(valid - np.median(valid, axis=1, keepdims=True)), axis=1))
    return tuple(float(value) for value in np.median(scatter, axis=0))
