"""Ids that say where an object is: a function of its box alone, so that no tiling, order, number of workers or run changes them.

An id is a HEALPix index (nested, order 24: cells of 12.6 mas) times 2048, plus 11 bits that tell boxes of one centre apart by
their sizes, counted in half pixels. `id // 2048 // 4**(24 - order)` is the object's HEALPix cell at any lower order, as in the
source_id of Gaia. Images without a WCS take cells of 1/32 pixel. Boxes that differ by 1e-4 pixel share an id in all but
about 1 of 300 cases at 0.2 arcsec a pixel; objects of different images are to be matched by position, not by id.

Two objects of one catalogue have one id only if their centres are in one cell and their sizes the same modulo 2048. Such
ids are counted upwards in the order of the rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.sky.detections import Array

ORDER = 24
SIZES = 2048
SUBPIXELS = 32
ROW_SHIFT = 25
"""Bits for the column of a cell of 1/32 pixel: mosaics up to a million pixels wide."""

Ids = NDArray[np.int64]


def sky_ids(ra: Array, dec: Array, boxes: Array) -> Ids:
    """Ids (N,) of boxes (N, 4) in pixels with centres at ra, dec in degrees; of pixels alone where those are NaN."""
    import healpy

    placed = np.isfinite(ra) & np.isfinite(dec)
    cells = healpy.ang2pix(2**ORDER, np.where(placed, ra, 0.0), np.where(placed, dec, 0.0), nest=True, lonlat=True)
    return np.where(placed, np.asarray(cells, np.int64) * SIZES + _size_bits(boxes), pixel_ids(boxes))


def pixel_ids(boxes: Array) -> Ids:
    """Ids (N,) of boxes (N, 4) in the pixels of one image."""
    x, y = np.floor((boxes[:, :2] + boxes[:, 2:]).astype(np.float64).T / 2 * SUBPIXELS).astype(np.int64)
    return np.asarray((np.maximum(y, 0) << ROW_SHIFT | np.maximum(x, 0)) * SIZES + _size_bits(boxes))


def unique_ids(ids: Ids) -> Ids:
    """The same ids, where one that occurred in a row before is the next higher that no other row has."""
    first = np.unique(ids, return_index=True)[1]
    if len(first) == len(ids):
        return ids
    ids, taken = ids.copy(), set(ids.tolist())
    for row in np.setdiff1d(np.arange(len(ids)), first):
        while int(ids[row]) in taken:
            ids[row] += 1
        taken.add(int(ids[row]))
    return ids


def _size_bits(boxes: Array) -> Ids:
    """Width and height (N,) in half pixels as one number below `SIZES`."""
    width, height = np.rint((boxes[:, 2:] - boxes[:, :2]).astype(np.float64).T * 2).astype(np.int64)
    return np.asarray((width + 45 * height) % SIZES)
