"""A request of any form, read by its media type and checked as a whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.serving.service import ServiceSettings
from deepdisc_ops.serving.wire.fault import Refused
from deepdisc_ops.serving.wire.files import Job, Pixels, body_descriptor, wcs_from_bytes
from deepdisc_ops.serving.wire.image import Request, decode_image
from deepdisc_ops.serving.wire.options import Options, parse_options
from deepdisc_ops.serving.wire.protocol import (
    BODY_TYPES,
    BOXES_HEADER,
    CORE_HEADER,
    FITS_TYPE,
    HDF5_TYPE,
    IMAGE_TYPE,
    JSON_TYPE,
    MAX_BANDS,
    MAX_BOXES,
    MAX_COVERAGE,
)
from deepdisc_ops.serving.wire.reader import SPARE_BYTES, Reader
from deepdisc_ops.serving.wire.reference import close, open_files, parse_reference

_ALIASES = {"": IMAGE_TYPE, "image/fits": FITS_TYPE, "application/x-hdf": HDF5_TYPE}


@dataclass(frozen=True)
class Model:
    """What a reader must know of the ensemble: the bands it needs and its pixel scale in arcsec, if known."""

    bands: tuple[str, ...]
    pixel_scale: float | None = None


def make_reader(model: Model, service: ServiceSettings) -> Reader:
    """A reader with room for the largest window: pixels, their variance, what is between, and two planes of another type."""
    pixels = service.max_window**2
    return Reader(SPARE_BYTES + service.request_bytes + pixels * (12 * min(len(model.bands), MAX_BANDS) + 64))


def decode_request(body: object, headers: Mapping[str, str], model: Model, service: ServiceSettings, reader: Reader) -> Request:
    """Read a request whose header names are lower-case; `Refused` or `ImageError` say what is wrong with it."""
    kind = _media_type(headers)
    if kind == JSON_TYPE:
        request = _referenced(body, headers, model, service, reader)
    elif not isinstance(body, bytes | bytearray):
        raise Refused("unsupported_type", "the request has no binary body", f"send it as {IMAGE_TYPE}, not as text or a form")
    elif kind == IMAGE_TYPE:
        request = decode_image(body, headers, service.max_window)
    else:
        request = _sent(body, "fits" if kind == FITS_TYPE else "hdf5", headers, model, service, reader)
    height, width = request.data.shape[1:]
    if request.boxes is not None:
        check_boxes(request.boxes, width, height)
    check_core(request, width, height)
    return request


def check_boxes(boxes: NDArray[np.float32], width: int, height: int) -> None:
    """Refuse given boxes that are no rectangles, lie elsewhere, or would take longer than a search."""
    if len(boxes) > MAX_BOXES:
        raise Refused("too_many_boxes", f"{len(boxes)} boxes, expected up to {MAX_BOXES}", "send them in several requests")
    low, high = boxes[:, :2], boxes[:, 2:]
    side = np.array([width, height], np.float32)
    with np.errstate(invalid="ignore"):
        sound = ((low < high) & (low >= -side) & (high <= 2 * side)).all(axis=1)
    wrong = np.flatnonzero(~sound)
    if len(wrong):
        what = f"{len(wrong)} of {len(boxes)} boxes, the first {boxes[wrong[0]].tolist()}, are no rectangles near the window"
        raise Refused("bad_boxes", what, "give x0 < x1 and y0 < y1 in its pixels, beyond its edges by a side at most")
    covered = float((high - low).astype(np.float64).prod(axis=1).sum())
    if covered > MAX_COVERAGE * width * height:
        what = f"boxes of {covered:.3g} pixels together in a window of {width} x {height}"
        raise Refused("too_many_boxes", what, f"ask for up to {MAX_COVERAGE} times the window in one request")


def check_core(request: Request, width: int, height: int) -> None:
    """Refuse a core that is not in the window, or that is to choose among given boxes."""
    core = request.options.core
    if core is None:
        return
    if request.boxes is not None:
        raise Refused("bad_core", f"{CORE_HEADER} beside given boxes", "send the boxes whose redshifts are wanted, and no core")
    if not (core[0] >= 0 and core[1] >= 0 and core[2] <= width and core[3] <= height):
        raise Refused("bad_core", f"core {core} in a window of {width} x {height}", "give a rectangle in the window, in its pixels")


def _media_type(headers: Mapping[str, str]) -> str:
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise Refused("unsupported_type", f"a body in encoding {encoding[:80]!r}", "send it as it is")
    said = headers.get("content-type", "").partition(";")[0].strip().lower()
    kind = _ALIASES.get(said, said)
    if kind not in BODY_TYPES:
        raise Refused("unsupported_type", f"a body of type {said[:80]!r}", f"send one of {', '.join(BODY_TYPES)}")
    return kind


def _sent(
    body: bytes | bytearray, kind: str, headers: Mapping[str, str], model: Model, service: ServiceSettings, reader: Reader
) -> Request:
    options = parse_options(headers)
    form = Job("fits" if kind == "fits" else "hdf5", model.bands, service.max_window, options.bands, model.pixel_scale)
    descriptor = body_descriptor(body)
    try:
        return _request(reader.read(form, [descriptor]), options)
    finally:
        os.close(descriptor)


def _referenced(body: object, headers: Mapping[str, str], model: Model, service: ServiceSettings, reader: Reader) -> Request:
    options = parse_options(headers)
    reference = parse_reference(body)
    files = open_files(reference.paths, service.roots)
    try:
        job = Job(
            "files",
            model.bands,
            service.max_window,
            options.bands,
            model.pixel_scale,
            tuple(file.name for file in files),
            reference,
        )
        return _request(reader.read(job, [file.descriptor for file in files]), options)
    finally:
        close(files)


def _request(pixels: Pixels, options: Options) -> Request:
    if pixels.boxes is not None and options.boxes is not None:
        raise Refused("bad_boxes", f"boxes in the body and in {BOXES_HEADER}", "give them once")
    boxes = options.boxes if pixels.boxes is None else pixels.boxes
    options = replace(options, bands=pixels.bands, boxes=boxes)
    return Request(pixels.data, pixels.bands, pixels.mask, options.ebv, options, boxes, wcs_from_bytes(pixels.wcs))
