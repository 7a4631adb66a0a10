"""What travels between client and endpoint, as pure functions over bytes and headers.

Request: the body is an .npy of little-endian float32 (C, H, W) in nJy per pixel, invalid pixels NaN; the header
``x-deepdisc-bands`` names the planes (``u,g,r``), ``x-deepdisc-ebv`` holds E(B-V) in mag at the window's corners
(x0, y0), (x1, y0), (x0, y1), (x1, y1). Reply: HDF5 with one dataset for each field of `Detections` and the versions
as attributes. A refusal is JSON: ``{"code": ..., "what": ..., "remedy": ...}`` with a 4xx or 5xx status.

Glossary: C bands, H x W pixels, N objects, K mixture components. Header names are lower-case, as HTTP/2 wants them.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import h5py
import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.errors import RequestRejected, ServerError
from deepdisc_ops.sky.detections import Array, Detections
from deepdisc_ops.sky.dust import EbvPlane

MODEL_NAME = "deepdisc"
PREDICT_PATH = f"/predictions/{MODEL_NAME}"
BANDS_HEADER = "x-deepdisc-bands"
EBV_HEADER = "x-deepdisc-ebv"
IMAGE_TYPE = "application/octet-stream"
REPLY_TYPE = "application/x-hdf5"
FAULT_TYPE = "application/json"
REPLY_FORMAT = 1

MAX_BANDS = 64
MAX_SIDE = 32768
MAX_EBV = 100.0
_BAND_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,31}")
_NPY_HEADER = re.compile(r"\{'descr': '([^']{1,16})', 'fortran_order': (True|False), 'shape': \(([\d, ]{0,64})\), \} *\n?")
_COLUMNS = {
    "boxes": (np.float32, 2),
    "scores": (np.float32, 1),
    "classes": (np.int32, 1),
    "weights": (np.float32, 2),
    "means": (np.float32, 2),
    "sigmas": (np.float32, 2),
    "ebv": (np.float32, 1),
    "n_members": (np.int32, 1),
    "flags": (np.int32, 1),
}


@dataclass(frozen=True)
class Request:
    """One window to predict on: data (C, H, W) float32 nJy, bands, mask (H, W) True where invalid, E(B-V)."""

    data: NDArray[np.float32]
    bands: tuple[str, ...]
    mask: NDArray[np.bool_]
    ebv: EbvPlane


@dataclass(frozen=True)
class Fault:
    """Why a request was not answered: a short code, what was found and expected, and the remedy."""

    code: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}" if self.remedy else self.what


class Refused(RequestRejected):
    """A request that breaks the protocol, with the HTTP status and the `Fault` that the endpoint answers."""

    def __init__(self, code: str, what: str, remedy: str, status: int = 400) -> None:
        self.fault = Fault(code, what, remedy)
        self.status = status
        super().__init__(str(self.fault))


def encode_image(
    data: NDArray[np.float32], bands: Sequence[str], mask: NDArray[np.bool_] | None, ebv: EbvPlane
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request for the window ``data`` (C, H, W) in nJy.

    Where ``mask`` (H, W) is True, the bands that are zero travel as NaN (all of them if none is zero), so that an image
    whose invalid pixels are zero arrives as it was.
    """
    if data.ndim != 3 or len(bands) != len(data):
        raise Refused("bad_image", f"image of shape {data.shape} for bands {', '.join(bands)}", "give one plane (H, W) a band")
    pixels = np.ascontiguousarray(data, "<f4")
    if mask is not None and mask.any():
        marked = mask & ((pixels == 0) | (pixels != 0).all(axis=0))
        pixels = np.where(marked, np.float32(np.nan), pixels)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(pixels))
    body = b"".join((header.getvalue(), pixels.data))
    return body, {BANDS_HEADER: ",".join(bands), EBV_HEADER: ",".join(repr(float(value)) for value in ebv.corners)}


def decode_image(body: bytes | bytearray, headers: Mapping[str, str]) -> Request:
    """Read a request; `Refused` says what is wrong with it. Infinite pixels count as invalid; a bytearray is not copied.

    numpy's own reader is not used: it evaluates the header as a Python literal.
    """
    bands = _parse_bands(headers.get(BANDS_HEADER))
    ebv = _parse_ebv(headers.get(EBV_HEADER))
    shape, offset = _parse_npy_header(body)
    if len(shape) != 3 or not (1 <= shape[0] <= MAX_BANDS and all(1 <= side <= MAX_SIDE for side in shape[1:])):
        raise Refused("bad_shape", f"array of shape {shape}", f"send (bands, rows, columns) with sides up to {MAX_SIDE}")
    if shape[0] != len(bands):
        raise Refused("bad_shape", f"{shape[0]} planes for {len(bands)} bands {', '.join(bands)}", "name every plane once")
    expected = 4 * math.prod(shape)
    if len(body) - offset != expected:
        found = len(body) - offset
        raise Refused("bad_size", f"{found} bytes of pixels, expected {expected} for {shape}", "send the whole array")
    data = np.frombuffer(body, "<f4", offset=offset).reshape(shape)
    invalid = ~np.isfinite(data)
    mask = invalid.any(axis=0)
    if mask.any():
        data = np.where(invalid, np.float32(0), data)
    elif not data.flags.writeable:
        data = data.copy()  # torch warns of arrays it could not write to
    return Request(data, bands, mask, ebv)


def order_planes(data: NDArray[np.float32], bands: Sequence[str], wanted: Sequence[str]) -> NDArray[np.float32]:
    """The planes of ``data`` (C, H, W) named ``wanted``, in that order; further bands are left out."""
    if tuple(bands) == tuple(wanted):
        return data
    missing = [band for band in wanted if band not in bands]
    if missing:
        what = f"band{'s' * (len(missing) > 1)} {', '.join(missing)} missing: found {', '.join(bands)}"
        raise Refused("missing_band", what, f"send all of {', '.join(wanted)}, or use a model of the bands you have", 422)
    return np.ascontiguousarray(data[[list(bands).index(band) for band in wanted]])


def encode_detections(detections: Detections, *, model_version: str, package_version: str) -> bytes:
    """`Detections` as an HDF5 file in memory, without masks and further columns."""
    with h5py.File.in_memory() as file:
        file.attrs.update({"format": REPLY_FORMAT, "model_version": model_version, "package_version": package_version})
        for name, (kind, _) in _COLUMNS.items():
            file.create_dataset(name, data=np.asarray(getattr(detections, name), kind))
        file.flush()
        return bytes(file.id.get_file_image())


def decode_detections(body: bytes) -> Detections:
    """Read a reply; `ServerError` when it is not one of ours."""
    with _open_reply(body) as file:
        columns = {name: _read_column(file, name) for name in _COLUMNS}
    detections = Detections(**columns)  # type: ignore[arg-type]  # those that all detections have
    lengths = {len(column) for column in columns.values()}
    components = {columns[name].shape[1] for name in ("weights", "means", "sigmas")}
    if len(lengths) != 1 or len(components) != 1 or detections.boxes.shape[1] != 4:
        shapes = ", ".join(f"{name} {column.shape}" for name, column in columns.items())
        raise ServerError(f"the endpoint's reply has columns of unequal length ({shapes}); is it another version's?")
    return detections


def reply_versions(body: bytes) -> dict[str, str]:
    """``model_version`` and ``package_version`` of a reply."""
    with _open_reply(body) as file:
        return {name: str(file.attrs.get(name, "unknown")) for name in ("model_version", "package_version")}


def encode_fault(fault: Fault) -> str:
    """The JSON of a refusal."""
    return json.dumps({"code": fault.code, "what": fault.what, "remedy": fault.remedy})


def decode_fault(body: bytes) -> Fault | None:
    """The refusal in a reply's body, or None when it is no JSON of ours."""
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(tree, dict) or not all(isinstance(tree.get(key), str) for key in ("code", "what", "remedy")):
        return None
    return Fault(tree["code"], tree["what"], tree["remedy"])


def _parse_bands(text: str | None) -> tuple[str, ...]:
    if text is None:
        raise Refused("no_bands", f"no header {BANDS_HEADER}", "name the planes, as in u,g,r,i,z,y")
    bands = tuple(name.strip() for name in text.split(","))
    wrong = [name for name in bands if not _BAND_NAME.fullmatch(name)]
    if wrong or len(set(bands)) != len(bands) or len(bands) > MAX_BANDS:
        raise Refused("bad_bands", f"header {BANDS_HEADER} is {text[:200]!r}", "give each band once, as in u,g,r,i,z,y")
    return bands


def _parse_ebv(text: str | None) -> EbvPlane:
    if text is None:
        raise Refused("no_ebv", f"no header {EBV_HEADER}", "give E(B-V) in mag at the four corners, as in 0.02,0.02,0.02,0.02")
    try:
        values = [float(value) for value in text.split(",")]
        a, b, c, d = values
    except ValueError:
        raise Refused("bad_ebv", f"header {EBV_HEADER} is {text[:200]!r}", "give four numbers in mag") from None
    if not all(abs(value) <= MAX_EBV for value in values):
        raise Refused("bad_ebv", f"header {EBV_HEADER} is {text[:200]!r}", f"give four finite numbers up to {MAX_EBV} mag")
    return EbvPlane((a, b, c, d))


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


def _open_reply(body: bytes) -> h5py.File:
    try:
        return h5py.File.in_memory(body)
    except (OSError, ValueError) as error:
        raise ServerError(f"the endpoint's reply of {len(body)} bytes is no HDF5 ({error}); is it another server's?") from None


def _read_column(file: h5py.File, name: str) -> Array:
    kind, dimensions = _COLUMNS[name]
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim != dimensions or dataset.dtype != kind:
        found = f"{dataset.dtype} {dataset.shape}" if isinstance(dataset, h5py.Dataset) else "nothing"
        expected = f"{np.dtype(kind)} of {dimensions} dimension(s)"
        raise ServerError(f"the endpoint's reply has {found} for {name}, expected {expected}; is it another version's?")
    return np.asarray(dataset[()])
