"""The pixels of a record, wherever they lie: in their survey's files, or packed inside the data set.

Glossary: C bands, H x W pixels.
"""

from __future__ import annotations

import os
import threading
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS, FITSFixedWarning
from numpy.typing import NDArray

from deepdisc_ops.data.packed import forget_files, pixel_checksum, pixel_layout, read_slot
from deepdisc_ops.data.records import Packed, Record, Reference
from deepdisc_ops.errors import CatalogError, ImageError
from deepdisc_ops.sky.images import Mosaic, SkyImage, open_mosaic
from deepdisc_ops.sky.tiling import Window

OPEN_MOSAICS = 16
"""Images by reference kept open at once by a process."""

_BLOCK, _BLOCKS = 4096, 16

_lock = threading.Lock()
_mosaics: OrderedDict[tuple[object, ...], Mosaic] = OrderedDict()
_unchanged: set[tuple[int, Path, str]] = set()


def read_pixels(
    record: Record,
    bands: Sequence[str] | None = None,
    window: Window | None = None,
    *,
    with_wcs: bool = True,
    with_variance: bool = False,
) -> SkyImage:
    """The image of a record, or a window of it, in ``bands`` (default: all of the record's).

    with_wcs False leaves out the astrometry of packed pixels, which takes longer than a small window;
    with_variance True adds the variance of packed pixels, if it was packed. Raises `ImageError` for
    bands or windows that are not there, `CatalogError` for a file that was changed since it was indexed.
    """
    bands = tuple(bands or record.bands)
    whole = Window(0, 0, record.width, record.height)
    window = window or whole
    if not (0 <= window.x0 < window.x1 <= whole.x1 and 0 <= window.y0 < window.y1 <= whole.y1):
        raise ImageError(
            f"window {tuple(window)} is not inside record {record.key!r} of {record.width} x {record.height} pixels; "
            "expected 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height"
        )
    if isinstance(record.pixels, Packed):
        return _read_packed(record, record.pixels, bands, window, with_wcs, with_variance)
    return _read_reference(record, record.pixels, bands, window)


def _read_packed(
    record: Record, packed: Packed, bands: tuple[str, ...], window: Window, with_wcs: bool, with_variance: bool
) -> SkyImage:
    planes = _plane_numbers(record, bands)
    data = read_slot(packed, window, planes)
    variance = None
    if with_variance and pixel_layout(packed.path)[1][0] == 2 * len(record.bands):
        variance = read_slot(packed, window, [len(record.bands) + plane for plane in planes])
    invalid = ~np.isfinite(data)
    mask = np.asarray(invalid.any(axis=0))
    partly = bool((mask != invalid.all(axis=0)).any())
    data[invalid] = 0
    wcs = None
    if with_wcs and record.wcs:
        wcs = header_wcs(record.wcs).slice((slice(window.y0, window.y1), slice(window.x0, window.x1)))
    scale = pixel_layout(packed.path)[3]
    return SkyImage(data, bands, wcs, scale, mask, invalid=invalid if partly else None, variance=variance)


def _plane_numbers(record: Record, bands: tuple[str, ...]) -> list[int]:
    missing = [band for band in bands if band not in record.bands]
    if missing:
        raise ImageError(
            f"record {record.key!r} has no band {', '.join(missing)}: found {', '.join(record.bands)}; "
            "choose among these, or write the records again from images that have it"
        )
    return [record.bands.index(band) for band in bands]


def _read_reference(record: Record, reference: Reference, bands: tuple[str, ...], window: Window) -> SkyImage:
    mosaic = _mosaic(record, reference, bands)
    corner = reference.window or Window(0, 0, mosaic.width, mosaic.height)
    inside = corner.x1 <= mosaic.width and corner.y1 <= mosaic.height
    if not inside or (corner.width, corner.height) != (record.width, record.height):
        raise CatalogError(
            f"record {record.key!r} is {record.width} x {record.height} pixels, window {tuple(corner)} of {reference.paths[0]}, "
            f"which has {mosaic.width} x {mosaic.height}; write the record again"
        )
    return mosaic.read(Window(window.x0 + corner.x0, window.y0 + corner.y0, window.x1 + corner.x0, window.y1 + corner.y0))


def _mosaic(record: Record, reference: Reference, bands: tuple[str, ...]) -> Mosaic:
    """The open mosaic of a record; the last few stay open. Processes share none, for they would share the files' positions."""
    key = (os.getpid(), reference.paths, bands, reference.plane_bands, reference.zero_point, reference.pixel_scale, reference.blank)
    with _lock:
        if key in _mosaics:
            _mosaics.move_to_end(key)
            return _mosaics[key]
        check_fingerprints(record)
        mosaic = open_mosaic(
            list(reference.paths),
            bands,
            plane_bands=reference.plane_bands,
            zero_point=reference.zero_point,
            pixel_scale=reference.pixel_scale,
            require_wcs=False,
            blank=reference.blank,
        )
        _mosaics[key] = mosaic
        while len(_mosaics) > OPEN_MOSAICS:
            _mosaics.popitem(last=False)[1].close()
        return mosaic


def check_fingerprints(record: Record) -> None:
    """Refuse files changed since the record was made; each file is looked at once by a process."""
    reference = record.pixels
    if isinstance(reference, Packed):
        return
    for path, expected in zip(reference.paths, reference.fingerprints, strict=False):
        key = (os.getpid(), path, expected)
        if key not in _unchanged:
            found = fingerprint(path)
            if found != expected:
                raise CatalogError(
                    f"{path} was changed since record {record.key!r} was made of it (fingerprint {found}, expected {expected}); "
                    "restore the file, or make the data set again"
                )
            _unchanged.add(key)


def fingerprint(path: Path) -> str:
    """Size and CRC-32 of evenly spread blocks of a file: tells versions of it apart, wherever it is copied to."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            blocks = [file.read()] if size <= _BLOCK * _BLOCKS else _spread_blocks(file.fileno(), size)
    except OSError as error:
        raise CatalogError(f"{path} cannot be read: {error.strerror}; put the file back, or make the data set again") from None
    checksum = 0
    for block in blocks:
        checksum = zlib.crc32(block, checksum)
    return f"{size}-{checksum:08x}"


def _spread_blocks(file: int, size: int) -> list[bytes]:
    return [os.pread(file, _BLOCK, i * (size - _BLOCK) // (_BLOCKS - 1)) for i in range(_BLOCKS)]


def to_planes(image: SkyImage) -> NDArray[np.float32]:
    """The pixels (C, H, W) of an image with NaN where they are invalid."""
    invalid = image.mask if image.invalid is None else image.invalid
    return np.where(invalid, np.float32(np.nan), image.data)


def packed_fault(record: Record) -> str | None:
    """What is wrong with the packed pixels of a record, or None."""
    if not isinstance(record.pixels, Packed):
        return None
    try:
        pixels = read_slot(record.pixels, Window(0, 0, record.width, record.height))
    except CatalogError as error:
        return str(error)
    found = pixel_checksum(pixels)
    if found == record.pixels.checksum:
        return None
    expected = record.pixels.checksum
    return f"record {record.key!r}: checksum of its pixels in {record.pixels.path} is {found:08x}, expected {expected:08x}"


@lru_cache(maxsize=1024)
def header_wcs(cards: str) -> WCS:
    """The WCS of a FITS header's text, as a record keeps it."""
    header = fits.Header.fromstring(cards, sep="\n" if "\n" in cards else "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FITSFixedWarning)
        return WCS(header)


def close_files() -> None:
    """Close the images that `read_pixels` keeps open, and forget which files were seen unchanged."""
    with _lock:
        for mosaic in _mosaics.values():
            mosaic.close()
        _mosaics.clear()
        _unchanged.clear()
    forget_files()
