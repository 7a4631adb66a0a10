"""Replies: HDF5 with the fields of `Detections`, which a client reads back, or a catalogue for whoever has no client of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import h5py
import numpy as np

from deepdisc_ops.errors import ServerError
from deepdisc_ops.serving.wire.protocol import REPLY_FORMAT
from deepdisc_ops.sky.detections import MASK_SIDE, Array, Detections

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
_MASKS, _EXTRA = "masks", "extra"


@dataclass(frozen=True)
class Origin:
    """Where a reply comes from: the request's name, versions of model and package, seconds by stage, and notes of the reply."""

    request: str = ""
    model_version: str = "unknown"
    package_version: str = "unknown"
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def words(self) -> dict[str, str]:
        """All of it as texts by name, for a file's attributes."""
        seconds = json.dumps({stage: round(value, 6) for stage, value in self.seconds.items()})
        own = {"request": self.request, "model_version": self.model_version, "package_version": self.package_version}
        return {**own, "seconds": seconds, **self.notes}


def encode_detections(
    detections: Detections,
    *,
    model_version: str,
    package_version: str,
    request: str = "",
    seconds: Mapping[str, float] | None = None,
    notes: Mapping[str, str] | None = None,
) -> bytes:
    """`Detections` as an HDF5 file in memory: a dataset a field, masks and further columns where there are some."""
    origin = Origin(request, model_version, package_version, seconds or {}, notes or {})
    with h5py.File.in_memory() as file:
        file.attrs.update({"format": REPLY_FORMAT, **origin.words()})
        for name, (kind, _) in _COLUMNS.items():
            file.create_dataset(name, data=np.asarray(getattr(detections, name), kind))
        if detections.masks is not None:
            file.create_dataset(_MASKS, data=np.asarray(detections.masks, np.uint8))
        for name, column in detections.extra.items():
            file.create_dataset(f"{_EXTRA}/{name}", data=column)
        file.flush()
        return bytes(file.id.get_file_image())


def decode_detections(body: bytes) -> Detections:
    """Read a reply; `ServerError` when it is not one of ours."""
    with _open_reply(body) as file:
        columns = {name: _read_column(file, name) for name in _COLUMNS}
        masks = np.asarray(file[_MASKS][()]) if _MASKS in file else None
        extra = {name: np.asarray(column[()]) for name, column in file.get(_EXTRA, {}).items()}
    detections = Detections(**columns, masks=masks, extra=extra)
    lengths = {len(column) for column in (*columns.values(), *extra.values())}
    components = {columns[name].shape[1] for name in ("weights", "means", "sigmas")}
    crops = masks is None or masks.shape == (len(detections), MASK_SIDE, MASK_SIDE)
    if len(lengths) != 1 or len(components) != 1 or detections.boxes.shape[1] != 4 or not crops:
        shapes = ", ".join(f"{name} {column.shape}" for name, column in columns.items())
        raise ServerError(f"the endpoint's reply has columns of unequal length ({shapes}); is it another version's?")
    return detections


def reply_origin(body: bytes) -> Origin:
    """Where a reply comes from, as far as it says so."""
    with _open_reply(body) as file:
        words = {name: str(value) for name, value in file.attrs.items() if isinstance(value, str)}
    seconds = json.loads(words.pop("seconds", "{}"))
    known = {name: words.pop(name, "unknown") for name in ("request", "model_version", "package_version")}
    return Origin(**known, seconds=seconds, notes=words)


def reply_versions(body: bytes) -> dict[str, str]:
    """``model_version`` and ``package_version`` of a reply."""
    origin = reply_origin(body)
    return {"model_version": origin.model_version, "package_version": origin.package_version}


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
