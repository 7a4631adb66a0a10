"""The window of a request, and the body that most clients send: an .npy of float32 (C, H, W) in nJy, invalid pixels NaN."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray

from deepdisc_ops.serving.wire.fault import Refused
from deepdisc_ops.serving.wire.options import Options, parse_options, render_options
from deepdisc_ops.serving.wire.protocol import BANDS_HEADER, MAX_BANDS, MAX_NJY, MAX_SIDE
from deepdisc_ops.sky.dust import EbvPlane

_NPY_HEADER = re.compile(r"\{'descr': '([^']{1,16})', 'fortran_order': (True|False), 'shape': \(([\d, ]{0,64})\), \} *\n?")


@dataclass(frozen=True)
class Request:
    """One window to predict on: data (C, H, W) float32 nJy, bands, mask (H, W) True where invalid, and what is asked of it.

    ebv: None where the server's map is to be asked, with the positions of ``wcs``; boxes (N, 4): given ones, None for a search.
    """

    data: NDArray[np.float32]
    bands: tuple[str, ...]
    mask: NDArray[np.bool_]
    ebv: EbvPlane | None
    options: Options = field(default_factory=lambda: Options(None))
    boxes: NDArray[np.float32] | None = None
    wcs: WCS | None = None


def encode_image(
    data: NDArray[np.float32], bands: Sequence[str], mask: NDArray[np.bool_] | None, ebv: EbvPlane
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request for the window ``data`` (C, H, W) in nJy.

    Where ``mask`` (H, W) is True, the bands that are zero travel as NaN (all of them if none is zero), so that an image
    whose invalid pixels are zero arrives as it was.
    """
    check_planes(data, bands)
    pixels = np.ascontiguousarray(data, "<f4")
    if mask is not None and mask.any():
        marked = mask & ((pixels == 0) | (pixels != 0).all(axis=0))
        pixels = np.where(marked, np.float32(np.nan), pixels)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(pixels))
    return b"".join((header.getvalue(), pixels.data)), render_options(Options(ebv, tuple(bands)))


def check_planes(data: NDArray[np.float32], bands: Sequence[str]) -> None:
    """Refuse an image without a plane for each band before it is sent."""
    if data.ndim != 3 or len(bands) != len(data):
        raise Refused("bad_image", f"image of shape {data.shape} for bands {', '.join(bands)}", "give one plane (H, W) a band")


def decode_image(body: bytes | bytearray, headers: Mapping[str, str], max_window: int = MAX_SIDE) -> Request:
    """Read a request; `Refused` says what is wrong with it. A bytearray is not copied.

    Pixels that are no numbers, or beyond `MAX_NJY`, count as invalid. numpy's own reader is not used: it evaluates the header
    as a Python literal.
    """
    options = parse_options(headers)
    if not options.bands:
        raise Refused("no_bands", f"no header {BANDS_HEADER}", "name the planes, as in u,g,r,i,z,y")
    shape, offset = _parse_npy_header(body)
    check_shape(shape, options.bands, max_window)
    expected = 4 * math.prod(shape)
    if len(body) - offset != expected:
        found = len(body) - offset
        raise Refused("bad_size", f"{found} bytes of pixels, expected {expected} for {shape}", "send the whole array")
    data, mask = clean(np.frombuffer(body, "<f4", offset=offset).reshape(shape))
    return Request(data, options.bands, mask, options.ebv, options, options.boxes)


def check_shape(shape: tuple[int, ...], bands: Sequence[str], max_window: int) -> None:
    """Refuse what is no (bands, rows, columns), has no plane a band, or is larger than a window may be."""
    if len(shape) != 3 or not (1 <= shape[0] <= MAX_BANDS and all(1 <= side <= MAX_SIDE for side in shape[1:])):
        raise Refused("bad_shape", f"array of shape {shape}", f"send (bands, rows, columns) with sides up to {MAX_SIDE}")
    if shape[0] != len(bands):
        raise Refused("bad_shape", f"{shape[0]} planes for {len(bands)} bands {', '.join(bands)}", "name every plane once")
    check_side(shape[2], shape[1], max_window)


def check_side(width: int, height: int, max_window: int) -> None:
    """Refuse a window that is larger than the server takes."""
    if max(width, height) > max_window:
        what = f"a window of {width} x {height} pixels, expected sides up to {max_window}"
        raise Refused("window_too_large", what, "send smaller windows, or start the server with a larger --max-window")


def clean(data: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Pixels (C, H, W) with zeros where they are no light, and the mask (H, W) of where that is in some band."""
    low, high = data.min(), data.max()  # NaN where there is one
    if low >= -MAX_NJY and high <= MAX_NJY:
        # torch warns of arrays it could not write to
        return (data if data.flags.writeable else data.copy()), np.zeros(data.shape[1:], np.bool_)
    with np.errstate(invalid="ignore"):
        invalid = ~(np.abs(data) <= MAX_NJY)
    return np.where(invalid, np.float32(0), data), np.asarray(invalid.any(axis=0))


def order_planes(data: NDArray[np.float32], bands: Sequence[str], wanted: Sequence[str]) -> NDArray[np.float32]:
    """The planes of ``data`` (C, H, W) named ``wanted``, in that order; further bands are left out."""
    if tuple(bands) == tuple(wanted):
        return data
    missing = [band for band in wanted if band not in bands]
    if missing:
        what = f"band{'s' * (len(missing) > 1)} {', '.join(missing)} missing: found {', '.join(bands)}"
        raise Refused("missing_band", what, f"send all of {', '.join(wanted)}, or use a model of the bands you have")
    return np.ascontiguousarray(data[[list(bands).index(band) for band in wanted]])


def _parse_npy_header(body: bytes | bytearray) -> tuple[tuple[int, ...], int]:
    """Shape of the array and the offset of its first byte."""
    if bytes(body[:6]) != b"\x93NUMPY" or len(body) < 10:
        raise Refused("not_npy", f"body of {len(body)} bytes is no .npy", "send numpy.save of a float32 array")
    major = body[6]
    if major not in (1, 2):
        raise Refused("not_npy", f".npy format version {major}", "write version 1.0, numpy's default")
    start = 10 if major == 1 else 12
    offset = start + int.from_bytes(body[8:start], "little")
    match = _NPY_HEADER.fullmatch(bytes(body[start : min(offset, start + 4096)]).decode("latin-1"))
    if match is None or offset > len(body):
        raise Refused("not_npy", "the .npy header cannot be read", "write it with numpy.save")
    kind, fortran, numbers = match.groups()
    if kind != "<f4" or fortran == "True":
        order = "Fortran" if fortran == "True" else "C"
        raise Refused("bad_dtype", f"pixels are {kind} in {order} order", "send little-endian float32 ('<f4') in C order")
    return tuple(int(number) for number in re.findall(r"\d+", numbers)), offset
