"""Requests as the client sends them: body, headers, and what errors call the window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.serving.wire import IMAGE_TYPE, MASKS_HEADER, encode_image
from deepdisc_ops.serving.wire.hdf5 import encode_hdf5
from deepdisc_ops.serving.wire.options import Options, render_options
from deepdisc_ops.serving.wire.protocol import HDF5_TYPE, JSON_TYPE
from deepdisc_ops.serving.wire.reference import Reference
from deepdisc_ops.sky.detections import Array
from deepdisc_ops.sky.dust import EbvPlane
from deepdisc_ops.sky.tiling import Window

Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Outgoing:
    """One request, ready to be sent as often as it takes."""

    body: bytes
    headers: Mapping[str, str]
    size: str


def image_request(
    data: Pixels, bands: Sequence[str], mask: NDArray[np.bool_] | None, ebv: EbvPlane, *, masks: bool = False
) -> Outgoing:
    """The objects of ``data`` (C, H, W) nJy, with their masks if they are wanted."""
    body, headers = encode_image(data, bands, mask, ebv)
    wish = {MASKS_HEADER: "1"} if masks else {}
    return Outgoing(body, {**headers, **wish, "content-type": IMAGE_TYPE}, _size(data, body))


def boxes_request(data: Pixels, bands: Sequence[str], mask: NDArray[np.bool_] | None, boxes: Array, ebv: EbvPlane) -> Outgoing:
    """The redshifts of ``boxes`` (N, 4) px of ``data``."""
    body, headers = encode_hdf5(data, bands, mask, ebv, boxes)
    return Outgoing(body, {**headers, "content-type": HDF5_TYPE}, f"{_size(data, body)}, {len(boxes)} given boxes")


def reference_request(
    paths: Sequence[Path], window: Window, ebv: EbvPlane, *, masks: bool = False, reading: Mapping[str, Any] | None = None
) -> Outgoing:
    """The objects of a ``window`` of files that the server reads; ``reading`` holds further fields of a `Reference`."""
    names = tuple(str(path.absolute()) for path in paths)
    reference = Reference.model_validate({**(reading or {}), "paths": names, "window": tuple(window)})
    headers = render_options(Options(ebv, masks=masks))
    body = reference.model_dump_json(exclude_none=True).encode()
    return Outgoing(body, {**headers, "content-type": JSON_TYPE}, f"{window.width} x {window.height} pixels of {paths[0].name}")


def _size(data: Pixels, body: bytes) -> str:
    return f"{data.shape[2]} x {data.shape[1]} pixels in {len(data)} bands, {len(body) / 1e6:.0f} MB"
