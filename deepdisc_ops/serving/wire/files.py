"""Bodies and files in the formats whose libraries are large and partly C: what the reader's process does with one of them.

Nothing here is trusted with a path of the user's: files come as descriptors, and leave as arrays.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS
from numpy.typing import NDArray

from deepdisc_ops.errors import ImageError
from deepdisc_ops.serving.wire.fault import Refused
from deepdisc_ops.serving.wire.image import check_side, clean
from deepdisc_ops.serving.wire.reference import Reference
from deepdisc_ops.sky.array_planes import HDF5_SUFFIXES
from deepdisc_ops.sky.coordinates import celestial_wcs, icrs_positions
from deepdisc_ops.sky.images import Mosaic, open_mosaic
from deepdisc_ops.sky.planes import quiet_fits

CODES = {"fits": "bad_fits", "hdf5": "bad_hdf5", "files": "bad_reference"}
REMEDIES = {"fits": "write it with astropy.io.fits", "hdf5": "write it with h5py", "files": "check it with fitscheck or h5dump"}
MAX_NODES = 1024
"""Datasets and groups in an HDF5 file of a reference."""


@dataclass(frozen=True)
class Job:
    """One thing to read: a FITS or HDF5 body, or the files of a reference.

    bands: those of the model; planes: names from the header, which go before those in the file; pixel_scale: arcsec, where no
    WCS tells; names: of the files, as their user knows them; reference: what is asked of them.
    """

    kind: Literal["fits", "hdf5", "files"]
    bands: tuple[str, ...]
    max_window: int
    planes: tuple[str, ...] = ()
    pixel_scale: float | None = None
    names: tuple[str, ...] = ()
    reference: Reference | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        reference = None if self.reference is None else self.reference.model_dump(mode="json")
        return {**asdict(self), "reference": reference}

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Job:
        """The job of `as_dict`."""
        reference = None if tree["reference"] is None else Reference.model_validate(tree["reference"])
        return cls(**{**tree, "reference": reference, **{name: tuple(tree[name]) for name in ("bands", "planes", "names")}})


@dataclass(frozen=True)
class Pixels:
    """What was read: data (C, H, W) float32 nJy, 0 where ``mask`` (H, W), their bands, given boxes (N, 4), and a WCS as FITS."""

    data: NDArray[np.float32]
    bands: tuple[str, ...]
    mask: NDArray[np.bool_]
    boxes: NDArray[np.float32] | None = None
    wcs: bytes = b""


def read(job: Job, descriptors: Sequence[int]) -> Pixels:
    """Read one thing. Raises `Refused` or `ImageError`, and whatever the libraries raise of what is damaged."""
    with TemporaryDirectory(prefix="read-") as scratch:
        names = job.names or (f"body.{job.kind}",)
        paths = [_named(Path(scratch) / str(i), name, descriptors[i]) for i, name in enumerate(names)]
        try:
            return _hdf5_body(paths[0], job) if job.kind == "hdf5" else _mosaic(paths, job)
        except ImageError as error:
            raise ImageError(_told(str(error), paths, names)) from None


def wcs_bytes(wcs: WCS | None) -> bytes:
    """A WCS with its distortions as a FITS file, nothing where there is none; raises where it gives no positions."""
    if wcs is None:
        return b""
    buffer = BytesIO()
    wcs.to_fits(relax=True).writeto(buffer)
    again = wcs_from_bytes(buffer.getvalue())
    if again is None:
        raise ImageError("its WCS is lost on the way; write a header that says all of it, without lookup tables elsewhere")
    icrs_positions(again, [0.0, 1.0], [0.0, 1.0])
    return buffer.getvalue()


def wcs_from_bytes(content: bytes) -> WCS | None:
    """The WCS of `wcs_bytes`."""
    if not content:
        return None
    with quiet_fits(), fits.open(BytesIO(content)) as file:
        return celestial_wcs(file[0].header, file)


def _named(folder: Path, name: str, descriptor: int) -> Path:
    """A path whose ending tells the format, and whose file is the one that is open."""
    folder.mkdir()
    path = folder / f"file{Path(name).suffix[:16]}"
    path.symlink_to(f"/proc/self/fd/{descriptor}")
    return path


def _told(text: str, paths: Sequence[Path], names: Sequence[str]) -> str:
    """The text with the names that the user knows."""
    for path, name in zip(paths, names, strict=True):
        text = text.replace(str(path), name)
    return text


def _mosaic(paths: Sequence[Path], job: Job) -> Pixels:
    wishes = job.reference or Reference(paths=("body",))
    for path in paths:
        if job.kind == "fits":
            _check_plain(path)
        elif path.suffix.lower() in HDF5_SUFFIXES:
            _check_links(path)
    with open_mosaic(
        paths,
        job.bands,
        plane_bands=wishes.plane_bands or job.planes or None,
        zero_point=wishes.zero_point,
        pixel_scale=wishes.pixel_scale or job.pixel_scale or 1.0,
        require_wcs=False,
        blank=wishes.blank,
        bad_bits=wishes.bad_bits,
    ) as mosaic:
        return _window(mosaic, wishes, job)


def _window(mosaic: Mosaic, wishes: Reference, job: Job) -> Pixels:
    part = wishes.part
    width, height = (mosaic.width, mosaic.height) if part is None else (part.width, part.height)
    check_side(width, height, job.max_window)
    image = mosaic.read(part)
    data, extreme = clean(image.data)
    return Pixels(data, image.bands, image.mask | extreme, None, wcs_bytes(image.wcs))


def _hdf5_body(path: Path, job: Job) -> Pixels:
    import h5py

    from deepdisc_ops.serving.wire.hdf5 import read_hdf5

    with path.open("rb") as raw, h5py.File(raw, "r") as file:  # HDF5 itself wants files to have a name
        body = read_hdf5(file, job.planes, job.max_window)
    data, mask = clean(body.data)
    wcs = celestial_wcs(fits.Header.fromstring(body.wcs, sep="\n" if "\n" in body.wcs else "")) if body.wcs else None
    return Pixels(data, body.bands, mask if body.mask is None else mask | body.mask, body.boxes, wcs_bytes(wcs))


def _check_plain(path: Path) -> None:
    """A body that is compressed as a whole could be of any size; tiles are compressed one by one, and known beforehand."""
    with path.open("rb") as file:
        if file.read(6) != b"SIMPLE":
            raise Refused("bad_fits", "the body does not begin with SIMPLE", "send plain FITS, compressed by tiles if at all")


def _check_links(path: Path) -> None:
    """Refuse an HDF5 file that leads to other files, wherever in it."""
    import h5py

    seen = 0

    def look(name: str, link: object) -> str | None:
        nonlocal seen
        seen += 1
        if seen > MAX_NODES or isinstance(link, h5py.ExternalLink):
            return name
        node = file.get(name) if isinstance(link, h5py.HardLink) else None
        if isinstance(node, h5py.Dataset) and (node.is_virtual or node.id.get_create_plist().get_external_count()):
            return name
        return None

    with h5py.File(path, "r") as file:
        wrong = file.visititems_links(look)
    if wrong is not None:
        what = f"the file has more than {MAX_NODES} nodes, or {str(wrong)[:100]!r} lies in another file"
        raise Refused("bad_reference", what, "copy what it leads to into one file")


def body_descriptor(body: bytes | bytearray) -> int:
    """A descriptor of an unnamed file in memory that holds the body."""
    descriptor = os.memfd_create("body", os.MFD_CLOEXEC)
    view = memoryview(body)
    while view:
        view = view[os.write(descriptor, view) :]
    return descriptor
