"""Boxes and masks of known sources, from their noiseless pictures.

A pixel belongs to a source where the S/N of its own light, summed in quadrature over all bands, exceeds `MASK_SNR`;
a source too faint for `MIN_PIXELS` such pixels is marked by the isophote of half its peak, or by its brightest `MIN_PIXELS`
pixels. Masks are each source's own (deblended): those of neighbours may overlap. They are kept as COCO run lengths in the
frame of the full image.

Glossary: N sources, C bands, S stamp side; boxes x0, y0, x1, y1 are edges: pixel i covers [i, i + 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from deepdisc_ops.data.render import Stamps

MASK_SNR = 2.0
MIN_PIXELS = 9


@dataclass(frozen=True)
class Outlines:
    """Where the sources of a batch are: sources (N,), boxes (N, 4) float32, masks N COCO run lengths."""

    sources: NDArray[np.intp]
    boxes: NDArray[np.float32]
    masks: tuple[dict[str, Any], ...]


def outline(stamps: Stamps, noise: NDArray[np.float64], width: int, height: int) -> Outlines:
    """Boxes and masks of a batch, cut at the edges of the image; sources with no pixel in it are left out. noise (C,) nJy."""
    masks = source_masks(all_band_snr(stamps.flux, noise), *_inside(stamps, width, height))
    kept = np.flatnonzero(masks.any(axis=(1, 2)))
    boxes = mask_boxes(masks[kept], stamps.origins[kept])
    lengths = tuple(
        run_lengths(masks[i], int(x0), int(y0), width, height) for i, (x0, y0) in zip(kept, stamps.origins[kept], strict=True)
    )
    return Outlines(stamps.sources[kept], boxes, lengths)


def all_band_snr(flux: NDArray[np.float32], noise: NDArray[np.float64]) -> NDArray[np.float32]:
    """(N, S, S) S/N per pixel of stamps (N, C, S, S), summed in quadrature over the bands."""
    scaled = np.maximum(flux, 0) / noise.astype(np.float32)[:, None, None]
    return np.sqrt(np.einsum("ncyx,ncyx->nyx", scaled, scaled))


def source_masks(snr: NDArray[np.float32], columns: NDArray[np.bool_], rows: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(N, S, S) masks of S/N maps; columns and rows (N, S) tell which pixels of the stamps lie inside the image."""
    inside = rows[:, :, None] & columns[:, None, :]
    snr = np.where(inside, snr, 0)
    masks = snr > MASK_SNR
    for i in np.flatnonzero((masks.sum(axis=(1, 2)) < MIN_PIXELS) & inside.any(axis=(1, 2))):
        brightest = np.partition(snr[i].ravel(), -MIN_PIXELS)[-MIN_PIXELS]
        masks[i] = inside[i] & (snr[i] > 0) & (snr[i] >= min(snr[i].max() / 2, brightest))
    return masks


def mask_boxes(masks: NDArray[np.bool_], origins: NDArray[np.intp]) -> NDArray[np.float32]:
    """(N, 4) tightest boxes of masks (N, S, S) that have a pixel each, at origins (N, 2)."""
    side = masks.shape[-1]
    columns, rows = masks.any(axis=1), masks.any(axis=2)
    lower = np.stack([columns.argmax(axis=1), rows.argmax(axis=1)], axis=1)
    upper = side - np.stack([np.flip(columns, 1).argmax(axis=1), np.flip(rows, 1).argmax(axis=1)], axis=1)
    return np.concatenate([lower + origins, upper + origins], axis=1).astype(np.float32)


def run_lengths(mask: NDArray[np.bool_], x0: int, y0: int, width: int, height: int) -> dict[str, Any]:
    """COCO run lengths (compressed, as text) of a cutout's mask that lies at x0, y0 of an image; nothing is drawn in full."""
    columns, rows = np.nonzero(mask.T)
    pixels = (columns + int(x0)) * height + rows + int(y0)  # COCO counts down the columns
    breaks = np.flatnonzero(np.diff(pixels) != 1) + 1
    starts = pixels[np.concatenate([[0], breaks])] if len(pixels) else pixels
    ends = pixels[np.concatenate([breaks - 1, [-1]])] + 1 if len(pixels) else pixels
    edges = np.concatenate([[0], np.stack([starts, ends], axis=1).ravel(), [width * height]])
    counts = np.diff(edges)
    counts = counts if counts[-1] else counts[:-1]  # as COCO, no run of no pixels at the end
    packed = coco.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return {"size": [height, width], "counts": packed["counts"].decode("ascii")}


def decode(mask: dict[str, Any], window: tuple[int, int, int, int] | None = None) -> NDArray[np.bool_]:
    """The mask (H, W) of COCO run lengths, or the part of it inside a window x0, y0, x1, y1; nothing more is drawn."""
    height, width = mask["size"]
    x0, y0, x1, y1 = window or (0, 0, width, height)
    edges = np.cumsum(_counts(mask["counts"]))
    pixels = np.arange(x0, x1) * height + np.arange(y0, y1)[:, None]
    return np.searchsorted(edges, pixels, side="right") % 2 == 1


def _counts(text: str) -> list[int]:
    """Run lengths from COCO's text: 5 bits a character, the sixth says that more follow, from the third run on differences."""
    counts: list[int] = []
    value = bits = 0
    for code in text.encode("ascii"):
        code -= 48
        value |= (code & 31) << bits
        bits += 5
        if not code & 32:
            if code & 16:
                value -= 1 << bits
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = bits = 0
    return counts


def _inside(stamps: Stamps, width: int, height: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    pixels = np.arange(stamps.flux.shape[-1])
    columns = stamps.origins[:, 0, None] + pixels
    rows = stamps.origins[:, 1, None] + pixels
    return (columns >= 0) & (columns < width), (rows >= 0) & (rows < height)
