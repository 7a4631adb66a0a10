"""The HDF5 body: datasets ``data`` (C, H, W) nJy and, if wanted, ``mask`` (H, W) and ``boxes`` (N, 4); the attribute ``bands``.

Written without filters, so that what a dataset declares lies in the body byte for byte: a reader knows its size before it makes
room for it. What leads to other files (external links and storage, virtual datasets) is refused, soft links too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import h5py
import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.serving.wire.fault import Refused
from deepdisc_ops.serving.wire.image import check_planes, check_shape
from deepdisc_ops.serving.wire.options import Options, parse_bands, render_options
from deepdisc_ops.serving.wire.protocol import MAX_BOXES
from deepdisc_ops.sky.detections import Array
from deepdisc_ops.sky.dust import EbvPlane

MAX_WORDS = 1 << 20
"""Bytes of an attribute."""


@dataclass(frozen=True)
class Hdf5Body:
    """What the body holds: data (C, H, W), bands, mask (H, W) and boxes (N, 4) or none, and cards of a WCS or none."""

    data: NDArray[np.float32]
    bands: tuple[str, ...]
    mask: NDArray[np.bool_] | None
    boxes: NDArray[np.float32] | None
    wcs: str


def encode_hdf5(
    data: NDArray[np.float32],
    bands: Sequence[str],
    mask: NDArray[np.bool_] | None,
    ebv: EbvPlane | None,
    boxes: Array | None = None,
    *,
    wcs: str = "",
    options: Options | None = None,
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request for ``data`` (C, H, W) in nJy, searched, or asked for ``boxes`` (N, 4) in its pixels.

    ``wcs`` holds the cards of the window's FITS header as one text, for the server's dust map (``ebv`` None) and for positions
    in catalogues; ``options`` are the further wishes.
    """
    check_planes(data, bands)
    with h5py.File.in_memory() as file:
        file.create_dataset("data", data=np.ascontiguousarray(data, "<f4"))
        file.attrs["bands"] = ",".join(bands)
        if wcs:
            file.attrs["wcs"] = wcs
        if mask is not None:
            file.create_dataset("mask", data=np.asarray(mask, np.uint8))
        if boxes is not None:
            file.create_dataset("boxes", data=np.asarray(boxes, "<f4").reshape(-1, 4))
        file.flush()
        body = bytes(file.id.get_file_image())
    return body, render_options(replace(options or Options(ebv), ebv=ebv, bands=(), boxes=None))


def read_hdf5(file: h5py.File, bands: Sequence[str], max_window: int) -> Hdf5Body:
    """Read a body; ``bands`` are those of the header, which go before the attribute. `Refused` says what is wrong."""
    data = _dataset(file, "data", 3, "f4")
    if data is None:
        raise Refused("bad_hdf5", f"datasets {_names(file)}, expected data", "send data (bands, rows, columns) of float32")
    named = tuple(bands) or parse_bands(_words(file, data, "bands"), "the attribute bands")
    check_shape(data.shape, named, max_window)
    mask, boxes = _dataset(file, "mask", 2, "u1"), _dataset(file, "boxes", 2, "f4")
    if mask is not None and mask.shape != data.shape[1:]:
        raise Refused("bad_shape", f"mask of shape {mask.shape} for {data.shape[1:]} pixels", "send one value a pixel")
    if boxes is not None and len(boxes) > MAX_BOXES:
        raise Refused("too_many_boxes", f"{len(boxes)} boxes, expected up to {MAX_BOXES}", "send them in several requests")
    if boxes is not None and boxes.shape[1] != 4:
        raise Refused("bad_boxes", f"boxes of shape {boxes.shape}", "send (N, 4): x0, y0, x1, y1 in pixels")
    return Hdf5Body(
        np.asarray(_content(data), np.float32),
        named,
        None if mask is None else np.asarray(_content(mask) != 0),
        None if boxes is None else np.asarray(_content(boxes), np.float32),
        _words(file, data, "wcs"),
    )


def _dataset(file: h5py.File, name: str, dimensions: int, kind: str) -> h5py.Dataset | None:
    """The dataset of that name, if there is one, when it holds in the body what it declares."""
    if name not in file:
        return None
    link = file.get(name, getlink=True)
    dataset = file.get(name) if isinstance(link, h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset):
        raise Refused("bad_hdf5", f"{name} is no dataset but {type(link).__name__}", "write the dataset itself into the body")
    created = dataset.id.get_create_plist()
    if dataset.is_virtual or created.get_external_count():
        raise Refused("bad_hdf5", f"{name} lies in other files", "write the values themselves into the body")
    if created.get_nfilters():
        raise Refused("bad_hdf5", f"{name} is compressed or filtered", "write it without filters")
    truth = kind == "u1" and dataset.dtype == np.bool_
    if not (truth or dataset.dtype.newbyteorder("=") == np.dtype(kind)) or dataset.ndim != dimensions:
        what = f"{name} is {dataset.dtype} of {dataset.ndim} dimensions, expected {np.dtype(kind)} of {dimensions}"
        raise Refused("bad_dtype", what, "convert it")
    size = math.prod(dataset.shape) * dataset.dtype.itemsize
    if dataset.id.get_storage_size() < size:
        what = f"{name} {dataset.shape} needs {size} bytes and has {dataset.id.get_storage_size()}"
        raise Refused("bad_size", what, "write the whole dataset")
    return dataset


def _content(dataset: h5py.Dataset) -> Array:
    return np.ascontiguousarray(dataset[()])


def _words(file: h5py.File, data: h5py.Dataset, name: str) -> str:
    """An attribute of the dataset or of the file as text, names between commas; empty where there is none."""
    for attributes in (data.attrs, file.attrs):
        if name not in attributes:
            continue
        if attributes.get_id(name).get_storage_size() > MAX_WORDS:
            raise Refused("bad_hdf5", f"the attribute {name} is over {MAX_WORDS} bytes", "shorten it")
        value = attributes[name]
        parts = value.tolist() if isinstance(value, np.ndarray) else [value]
        parts = parts if isinstance(parts, list) else [parts]
        return ",".join(part.decode("utf-8", "replace") if isinstance(part, bytes) else str(part) for part in parts)
    return ""


def _names(file: h5py.File) -> str:
    return ", ".join(list(file)[:8])[:200] or "none"
