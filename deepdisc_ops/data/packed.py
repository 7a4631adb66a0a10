"""Pixels inside a data set: one contiguous array in an HDF5 file, whose structure is complete before the first pixel is written.

The library makes the file and says where the array lies; pixels go in and come out at that place, past the library, so that
a writer killed at any moment cannot damage the file and a reader takes a window without reading the rest.

Glossary: K slots, P planes (C bands, then perhaps their variances), H x W pixels of a slot; an image smaller than its slot
lies at the slot's origin, NaN around it.
"""

from __future__ import annotations

import math
import mmap
import os
import zlib
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.data.records import Packed
from deepdisc_ops.errors import CatalogError, ImageError
from deepdisc_ops.sky.tiling import Window

DATASET = "pixels"
MAPS = 64
"""Files kept mapped at once by a process."""


def create_pixels(path: Path, shape: tuple[int, int, int, int], bands: tuple[str, ...], pixel_scale: float) -> int:
    """Make a file of empty images (K, P, H, W) and tell at which byte its array begins; disk is taken as pixels come."""
    unfinished = path.with_name(f".{path.name}.part")
    offset = _structure(unfinished, shape, bands, pixel_scale)
    unfinished.replace(path)
    return offset


def _structure(path: Path, shape: tuple[int, int, int, int], bands: tuple[str, ...], pixel_scale: float) -> int:
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(path, "w", libver="latest", locking=False) as file:
        file.attrs["bands"] = np.array([band.encode() for band in bands])  # of fixed length, to lie before the array
        file.attrs["unit"] = np.bytes_("nJy")
        file.attrs["pixel_scale"] = pixel_scale
        file.flush()
        offset = h5py.h5d.create(file.id, DATASET.encode(), h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple(shape), layout).get_offset()
    if offset is None or path.stat().st_size != offset + 4 * math.prod(shape):
        raise ImageError(f"{path}: HDF5 did not end the file with the array (byte {offset} of {path.stat().st_size}); report this")
    return int(offset)


class PixelFile:
    """The array of a shard being written."""

    def __init__(self, path: Path, shape: tuple[int, int, int, int], bands: tuple[str, ...], pixel_scale: float) -> None:
        self.path = path
        self.slots, self.planes, self.height, self.width = shape
        self._offset = create_pixels(path, shape, bands, pixel_scale)
        self._file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def takes(self, planes: int, height: int, width: int) -> bool:
        """Whether an image of this size fits, and fills at least half of a slot."""
        if planes != self.planes:
            return False
        return height <= self.height and width <= self.width and 2 * height * width >= self.height * self.width

    def write(self, slot: int, pixels: NDArray[np.float32]) -> Packed:
        """Put an image (P, h, w), NaN where invalid, into a slot."""
        pixels = np.ascontiguousarray(pixels, "<f4")
        whole = pixels
        if pixels.shape[1:] != (self.height, self.width):
            whole = np.full((len(pixels), self.height, self.width), np.nan, "<f4")
            whole[:, : pixels.shape[1], : pixels.shape[2]] = pixels
        content = whole.data.cast("B")
        place, done = self._offset + slot * len(content), 0
        while done < len(content):
            done += os.pwrite(self._file, content[done:], place + done)
        return Packed(self.path, slot, pixel_checksum(pixels))

    def close(self, used: int) -> None:
        """Finish the file, cutting off slots beyond the ``used`` ones."""
        os.fsync(self._file)
        os.close(self._file)
        if 0 < used < self.slots:
            shorten(self.path, used)
        elif not used:
            self.path.unlink()


def shorten(path: Path, used: int) -> None:
    """Cut a file to its first ``used`` images: its structure is replaced, in a single write, by that of a smaller array."""
    offset, slot, bands, pixel_scale = pixel_layout(path)
    scratch = path.with_name(f".{path.name}.part")
    try:
        if _structure(scratch, (used, *slot), bands, pixel_scale) == offset and scratch.stat().st_size < path.stat().st_size:
            with scratch.open("rb") as small, path.open("r+b") as file:
                os.pwrite(file.fileno(), small.read(offset), 0)
                os.ftruncate(file.fileno(), scratch.stat().st_size)
    finally:
        scratch.unlink(missing_ok=True)


def pixel_checksum(pixels: NDArray[np.float32]) -> int:
    """CRC-32 of an image's own pixels (P, h, w)."""
    return zlib.crc32(np.ascontiguousarray(pixels, "<f4").data)


@cache
def pixel_layout(path: Path) -> tuple[int, tuple[int, int, int], tuple[str, ...], float]:
    """Byte at which the array of a file begins, (P, H, W) of a slot, bands, pixel scale in arcsec."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            array = file[DATASET]
            shape, offset = array.shape, array.id.get_offset()
            bands, scale = tuple(band.decode() for band in file.attrs["bands"]), float(file.attrs["pixel_scale"])
    except (OSError, KeyError) as error:
        raise CatalogError(f"{path} cannot be read ({' '.join(str(error).split())}); restore it from a copy") from None
    return int(offset), (int(shape[1]), int(shape[2]), int(shape[3])), bands, scale


@lru_cache(maxsize=MAPS)
def _map(path: Path) -> tuple[mmap.mmap, NDArray[np.float32]]:
    """A file mapped into memory and its array (K, P, H, W), read-only."""
    offset, slot, _, _ = pixel_layout(path)
    slots = (path.stat().st_size - offset) // (4 * math.prod(slot))
    if slots < 1:
        raise CatalogError(f"{path} ends before its first image; restore it from a copy")
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return content, np.frombuffer(content, "<f4", slots * math.prod(slot), offset).reshape(slots, *slot)


def read_slot(packed: Packed, window: Window, planes: Sequence[int] | None = None) -> NDArray[np.float32]:
    """The pixels (planes, H, W) of a window of a packed image in some planes (default: all), NaN where invalid."""
    content, pixels = _map(packed.path)
    if packed.row >= len(pixels):
        raise CatalogError(f"{packed.path} holds {len(pixels)} images, the record is number {packed.row}; restore it from a copy")
    slot = pixels[packed.row]
    place, row = pixel_layout(packed.path)[0] + packed.row * slot.nbytes, 4 * slot.shape[2]
    planes = range(len(slot)) if planes is None else planes
    for plane in planes:  # the kernel reads ahead what it is told of, which pages touched one by one do not make it do
        first = place + (plane * slot.shape[1] + window.y0) * row
        start = first // mmap.PAGESIZE * mmap.PAGESIZE
        content.madvise(mmap.MADV_WILLNEED, start, first + window.height * row - start)
    return np.stack([slot[plane, window.y0 : window.y1, window.x0 : window.x1] for plane in planes])


def forget_files() -> None:
    """Unmap the files, so that a later read finds them as they are then."""
    _map.cache_clear()
    pixel_layout.cache_clear()
