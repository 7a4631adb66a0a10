"""Training crops: pixels and truth cut, flipped and turned alike; item k of a run is decided by the seed and k alone.

Glossary: C bands, S side of the crop, N objects, B samples of a batch. Boxes are (x0, y0, x1, y1) pixels, exclusive end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deepdisc_ops.config import DataSettings, ModelSettings
from deepdisc_ops.data.augment import blur_margin, degrade, draw_symmetry
from deepdisc_ops.data.cache import ImageCache
from deepdisc_ops.data.masks import RunLengths, bounds, decode
from deepdisc_ops.data.pixels import read_pixels, to_planes
from deepdisc_ops.data.records import GALAXY, DatasetInfo, Objects, Packed, Record
from deepdisc_ops.data.sampling import Balance, BalancedOrder, ImageOrder, Order, RunSampler, item_rngs
from deepdisc_ops.data.store import Records
from deepdisc_ops.errors import ConfigError, DeepdiscOpsError
from deepdisc_ops.sky.frames import Frame
from deepdisc_ops.sky.tiling import Window

T = TypeVar("T")
CLASS_NAMES = ("galaxy", "star")
"""Names of the codes GALAXY and STAR of the truth."""
EDGE = 1.0
"""An object belongs to a crop if its centre lies this many pixels inside of the crop's edges."""
MEASURED_IMAGES = 64
"""Noise, mean and standard deviation are measured on this many images, spread evenly over the training set."""


@dataclass(frozen=True)
class Truth:
    """N objects of a crop.

    boxes (N, 4) float32; classes (N,) int64 index into the model's classes; redshift (N,) float32, NaN where the object
    does not train the redshift head; ebv (N,) float32 mag; masks (N, S, S) bool or None.
    """

    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]
    redshift: NDArray[np.float32]
    ebv: NDArray[np.float32]
    masks: NDArray[np.bool_] | None


@dataclass(frozen=True)
class Sample:
    """One training image: pixels (C, S, S) float32 nJy, zero where invalid, as the network sees them at inference.

    missing (C,) bool: bands without a valid pixel; frame: where its pixels lie in the record ``image`` (place in the records).
    """

    pixels: NDArray[np.float32]
    truth: Truth
    missing: NDArray[np.bool_]
    frame: Frame
    image: int


class Batch(NamedTuple):
    """pixels (B, C, S, S) float32 nJy and the truth of each."""

    pixels: Tensor
    truths: tuple[Truth, ...]


class CropDataset(Dataset[Sample]):
    """Item k, for every k >= 0, is an augmented crop of an image of ``records``; an epoch is ``len(dataset)`` items.

    Workers hold no copy of the data: the records are memory-mapped, and so are packed images and decoded ones (`ImageCache`).
    """

    def __init__(self, records: Records, info: DatasetInfo, data: DataSettings, model: ModelSettings, seed: int) -> None:
        if len(records) == 0:
            raise ConfigError(f"no training images in {data.path}; simulate more scenes or raise data.fraction")
        _check_gold_band(info, model)
        _check_sizes(records, data.crop)
        if model.input.noise_njy is None and data.augment.noise_factor[1] > 1:
            raise ConfigError(
                "data.augment.noise_factor needs model.input.noise_njy; give the noise per pixel of every band in nJy"
            )
        self._records, self._info, self._data, self._model, self._seed = records, info, data, model, seed
        self._order: Order = ImageOrder(len(records), seed)
        self._balance: Balance | None = None
        if data.balance > 0:
            redshift, image = training_redshifts(records, model)
            self._balance = Balance(redshift, data.balance)
            self._order = BalancedOrder(self._balance.weight(redshift), image, seed)
        self._cache = ImageCache(data.cache_gb * 1e9) if data.cache_gb > 0 else None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, k: int) -> Sample:
        image, target = self._order.choose(k)
        record, side = self._records[image], self._data.crop
        place, pixel, label_rng = item_rngs(self._seed, k, 3)
        labels = label(record.objects, self._info, self._model, self._data)
        at = (None, None) if target is None else labels.centres[target]
        x0, y0 = _corner(place, record.width, side, at[0]), _corner(place, record.height, side, at[1])
        window = Window(x0, y0, x0 + side, y0 + side)
        frame = Frame.of(window).symmetric(draw_symmetry(self._data.augment, place))
        inside = objects_inside(labels, frame)
        truth = truth_in(labels, frame, inside, record.objects if self._model.mask_head else None)
        if self._balance is not None:
            truth = replace(truth, redshift=self._balance.thin(truth.redshift, inside == target, label_rng))
        return sample_of(frame.turn(self._pixels(image, record, window, pixel)), truth, frame, image)

    def _pixels(self, image: int, record: Record, window: Window, rng: np.random.Generator) -> NDArray[np.float32]:
        """(C, S, S) nJy of ``window``, degraded, NaN where invalid."""
        margin = blur_margin(self._data.augment)
        x0, y0 = max(window.x0 - margin, 0), max(window.y0 - margin, 0)
        wide = Window(x0, y0, min(window.x1 + margin, record.width), min(window.y1 + margin, record.height))
        noise = self._model.input.noise_njy or ()
        pixels = degrade(self._valid_pixels(image, record, wide), self._data.augment, noise, rng)
        return pixels[:, window.y0 - y0 : window.y1 - y0, window.x0 - x0 : window.x1 - x0]

    def _valid_pixels(self, image: int, record: Record, window: Window) -> NDArray[np.float32]:
        """(C, H, W) nJy of ``window``, NaN where invalid, from the cache where images are worth keeping decoded."""
        read = partial(_read, record, self._model.bands)
        if self._cache is None or isinstance(record.pixels, Packed):  # packed pixels are memory-mapped already
            return read(window)
        whole = self._cache.image(image, 4 * len(self._model.bands) * record.width * record.height, read)
        return read(window) if whole is None else whole[:, window.y0 : window.y1, window.x0 : window.x1]


def open_batches(
    dataset: CropDataset, *, first_step: int, steps: int, batch_size: int, workers: int = 0, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """The batches of optimisation steps ``first_step`` to ``steps``, prepared ahead by ``workers`` processes (0: by a thread).

    ``batch_size`` counts the samples of all ranks. Errors of the package come out of workers as they are.
    """
    loader = DataLoader(
        _Forwarded(dataset),
        batch_sampler=RunSampler(first_step, steps, batch_size, rank=rank, ranks=ranks),
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # torch would draw from the global one, and a resumed run differ
        pin_memory=torch.cuda.is_available(),
    )
    for batch in loader if workers else _one_ahead(loader):
        if isinstance(batch, DeepdiscOpsError):
            raise batch
        yield batch


def _one_ahead(batches: Iterable[T]) -> Iterator[T]:
    """The same, each prepared by a thread while its predecessor is used."""
    source = iter(batches)
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        coming = thread.submit(next, source, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, source, None)
            yield batch


class _Forwarded(Dataset[Sample | DeepdiscOpsError]):
    """Errors as items, since torch would wrap what is raised in a worker into the text of its traceback."""

    def __init__(self, dataset: CropDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, k: int) -> Sample | DeepdiscOpsError:
        try:
            return self._dataset[k]
        except DeepdiscOpsError as error:
            return error


def _collate(samples: Sequence[Sample | DeepdiscOpsError]) -> Batch | DeepdiscOpsError:
    """One tensor of pixels, which travels from a worker in shared memory."""
    for sample in samples:
        if isinstance(sample, DeepdiscOpsError):
            return sample
    good = [sample for sample in samples if isinstance(sample, Sample)]
    return Batch(torch.from_numpy(np.stack([sample.pixels for sample in good])), tuple(sample.truth for sample in good))


@dataclass(frozen=True)
class Labels:
    """Truth of an image as the network wants it: widened boxes, centres (N, 2) in box coordinates, class, redshift, E(B-V)."""

    boxes: NDArray[np.float32]
    centres: NDArray[np.float64]
    classes: NDArray[np.int64]
    redshift: NDArray[np.float32]
    ebv: NDArray[np.float32]


def label(objects: Objects, info: DatasetInfo, model: ModelSettings, data: DataSettings) -> Labels:
    """Widen small boxes about the objects' centres, name the classes, and leave redshifts to gold galaxies alone.

    With ``data.centred_boxes`` all boxes are widened until they are centred on their objects. The gold cut applies to the redshift
    only; every object trains detection (LSST paper). An unknown E(B-V) becomes ``data.default_ebv``.
    """
    _check_gold_band(info, model)
    centres = np.stack([objects.x, objects.y], axis=1) + 0.5
    codes = [model.classes.index(name) for name in CLASS_NAMES] if len(model.classes) > 1 else [0, 0]
    low = np.minimum(objects.boxes[:, :2], centres - data.min_box / 2)
    high = np.maximum(objects.boxes[:, 2:], centres + data.min_box / 2)
    if data.centred_boxes:
        half = np.maximum(centres - low, high - centres)
        low, high = centres - half, centres + half
    return Labels(
        boxes=np.concatenate([low, high], axis=1).astype(np.float32),
        centres=centres,
        classes=np.array(codes, np.int64)[objects.classes],
        redshift=gold_redshift(objects.classes, objects.mag, objects.redshift, model),
        ebv=np.where(np.isfinite(objects.ebv), objects.ebv, data.default_ebv).astype(np.float32),
    )


def gold_redshift(
    classes: NDArray[np.integer], mag: NDArray[np.floating], redshift: NDArray[np.floating], model: ModelSettings
) -> NDArray[np.float32]:
    """Redshifts (N,) that train the redshift head: those of galaxies brighter than the gold limit; NaN for all others.

    z_all adds stars brighter than the limit, at z = 0 (LSST paper).
    """
    head = model.redshift_head
    gold = np.ones(len(mag), bool) if head.gold_limit is None else mag < head.gold_limit
    known = np.where(classes == GALAXY, redshift, 0.0 if head.stars == "z_all" else np.nan)
    return np.where(gold, known, np.nan).astype(np.float32)


def training_redshifts(records: Records, model: ModelSettings) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Redshift as in `gold_redshift` and image, by its place in the records, of every object (N,) of a data set."""
    classes, image = records.column("classes")
    mag, _ = records.column("mag")
    redshift, _ = records.column("redshift")
    return gold_redshift(classes, mag, redshift, model), image


def objects_inside(labels: Labels, frame: Frame) -> NDArray[np.intp]:
    """Objects whose centres lie in ``frame``, `EDGE` from its edges; the boxes of some reach out of it."""
    window = frame.window
    low, high = np.array([window.x0, window.y0]), np.array([window.x1, window.y1])
    return np.flatnonzero(((labels.centres > low + EDGE) & (labels.centres < high - EDGE)).all(axis=1))


def truth_in(labels: Labels, frame: Frame, inside: NDArray[np.intp], masks_of: Objects | None = None) -> Truth:
    """The objects ``inside`` in the pixels of ``frame``, their boxes cut at its edges; with masks if ``masks_of`` has them."""
    limits = np.array([frame.width, frame.height] * 2)
    masks = None
    if masks_of is not None:
        if masks_of.masks is None:
            raise ConfigError("model.mask_head is on but the data set holds no masks; simulate again or switch it off")
        masks = np.zeros((len(inside), frame.window.height, frame.window.width), bool)
        for drawn, i in zip(masks, inside, strict=True):
            _draw(drawn, masks_of.masks[i], frame.window)
        masks = np.ascontiguousarray(frame.turn(masks))
    return Truth(
        boxes=np.clip(frame.boxes_from_source(labels.boxes[inside]), 0, limits).astype(np.float32),
        classes=labels.classes[inside],
        redshift=labels.redshift[inside],
        ebv=labels.ebv[inside],
        masks=masks,
    )


def sample_of(pixels: NDArray[np.float32], truth: Truth, frame: Frame, image: int = 0) -> Sample:
    """Pixels (C, S, S), NaN where invalid, and truth as the network gets them."""
    valid = np.isfinite(pixels)
    shown = np.ascontiguousarray(np.where(valid, pixels, np.float32(0)))
    return Sample(shown, truth, np.asarray(~valid.any(axis=(1, 2))), frame, image)


@dataclass(frozen=True)
class PixelStatistics:
    """Of every band, in nJy: noise per pixel (1.4826 x MAD), mean and standard deviation over the pixels, sources and all."""

    noise_njy: tuple[float, ...]
    mean_njy: tuple[float, ...]
    std_njy: tuple[float, ...]


def measure_pixels(records: Sequence[Record], bands: Sequence[str], images: int = MEASURED_IMAGES) -> PixelStatistics:
    """Statistics of the valid pixels of at most ``images`` records, spread evenly; the noise is the median over the images."""
    spread = np.unique(np.linspace(0, len(records) - 1, min(images, len(records))).round().astype(int))
    noise, sums = [], np.zeros((3, len(bands)))
    for i in spread:
        pixels = _read(records[int(i)], bands).reshape(len(bands), -1)
        valid = [band[np.isfinite(band)].astype(np.float64) for band in pixels]
        noise.append([1.4826 * np.median(np.abs(band - np.median(band))) if len(band) else np.nan for band in valid])
        sums += [[len(band) for band in valid], [band.sum() for band in valid], [np.square(band).sum() for band in valid]]
    empty = [band for band, count in zip(bands, sums[0], strict=True) if count == 0]
    if empty:
        raise ConfigError(f"no valid pixel of {', '.join(empty)} in {len(spread)} training images; train on bands the data have")
    mean = sums[1] / sums[0]
    std = np.sqrt(np.maximum(sums[2] / sums[0] - mean**2, 0))
    return PixelStatistics(*(tuple(map(float, column)) for column in (np.nanmedian(noise, axis=0), mean, std)))


def _read(record: Record, bands: Sequence[str], window: Window | None = None) -> NDArray[np.float32]:
    """(C, H, W) nJy, NaN where invalid."""
    return to_planes(read_pixels(record, bands, window, with_wcs=False))


def _corner(rng: np.random.Generator, length: int, side: int, target: float | None) -> int:
    """Where a crop begins along an axis: anywhere, or so that it holds a target (box coordinate) by the rule of `EDGE`."""
    low, high = 0, length - side
    if target is not None:
        low = max(low, min(int(np.floor(target + EDGE - side)) + 1, high))
        high = min(high, max(int(np.ceil(target - EDGE)) - 1, low))
    return int(rng.integers(low, high + 1))


def _draw(drawn: NDArray[np.bool_], mask: RunLengths, window: Window) -> None:
    """Draw a mask inside ``window`` into ``drawn``; only the part that has pixels is decoded."""
    box = bounds(mask)
    if box is None:
        return
    x0, y0, x1, y1 = max(box[0], window.x0), max(box[1], window.y0), min(box[2], window.x1), min(box[3], window.y1)
    if x0 < x1 and y0 < y1:
        drawn[y0 - window.y0 : y1 - window.y0, x0 - window.x0 : x1 - window.x0] = decode(mask, (x0, y0, x1, y1))


def _check_gold_band(info: DatasetInfo, model: ModelSettings) -> None:
    if model.redshift_head.gold_limit is not None and model.redshift_head.gold_band != info.gold_band:
        raise ConfigError(
            f"model.redshift_head.gold_band is {model.redshift_head.gold_band!r}, the data's magnitudes are {info.gold_band!r}"
        )


def _check_sizes(records: Records, side: int) -> None:
    small = np.flatnonzero((records.sizes < side).any(axis=1))
    if len(small):
        width, height = records.sizes[small[0]]
        raise ConfigError(
            f"data.crop {side} is larger than {len(small)} of {len(records)} training images, {records.keys[small[0]]} "
            f"({width}x{height}) among them; use smaller crops"
        )
