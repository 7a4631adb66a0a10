"""Pictures of single galaxies with their redshifts, for pretraining: GalaxiesML files, and files of the same form made here.

A file is HDF5 with ``image`` (N, C, S, S) and ``specz_redshift`` (N,), one row an object, the object in the middle
(pixel S // 2). GalaxiesML (Do et al. 2024) holds 127 x 127 pixels of HSC grizy in counts of AB zero point 27. Files made here
say bands, zero point and pixel scale in attributes of ``image``; their pixels are nJy and NaN where invalid.

Glossary: N objects, C bands, S side of a cutout.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from deepdisc_ops.config import AugmentSettings
from deepdisc_ops.data.augment import draw_symmetry
from deepdisc_ops.data.pixels import read_pixels, to_planes
from deepdisc_ops.data.records import GALAXY, Record
from deepdisc_ops.data.sampling import item_rngs
from deepdisc_ops.errors import CatalogError, ImageError
from deepdisc_ops.sky.fluxes import NJY_ZERO_POINT
from deepdisc_ops.sky.frames import Frame

IMAGE, REDSHIFT = "image", "specz_redshift"
GALAXIESML_BANDS = ("g", "r", "i", "z", "y")
GALAXIESML_ZERO_POINT = 27.0
GALAXIESML_SIDE = 127

Edge = Literal["skip", "pad"]


class Cutouts(Sequence[NDArray[np.float32]]):
    """An open file: item i is the picture (C, S, S) in nJy, NaN where invalid, read when it is asked for.

    redshift (N,) float32, NaN for none. Safe to hand to other processes: each opens the file for itself.
    """

    def __init__(
        self, path: Path, bands: tuple[str, ...], shape: tuple[int, ...], njy: float, redshift: NDArray[np.float32]
    ) -> None:
        self.path, self.bands, self.redshift = path, bands, redshift
        self.side = shape[-1]
        self._length, self._njy = shape[0], njy
        self._file: h5py.File | None = None
        self._process = -1

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: Any) -> Any:
        pixels = np.asarray(self._open()[IMAGE][int(i)], np.float32) * np.float32(self._njy)
        return np.where(np.isfinite(pixels), pixels, np.float32(np.nan))

    def column(self, name: str) -> NDArray[Any]:
        """Another column (N,) of the file, such as ``i_mag``."""
        file = self._open()
        if name not in file or file[name].shape[:1] != (len(self),):
            raise CatalogError(f"{self.path} has no column {name!r} of {len(self)} rows; found {', '.join(sorted(file))}")
        return np.asarray(file[name])

    def _open(self) -> h5py.File:
        if self._file is None or self._process != os.getpid():  # HDF5's handles do not survive a fork
            self._file, self._process = h5py.File(self.path, "r", locking=False), os.getpid()
        return self._file

    def close(self) -> None:
        """Close the file; it is opened again when it is needed."""
        if self._file is not None and self._process == os.getpid():
            self._file.close()
        self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}


def open_cutouts(path: Path, *, bands: Sequence[str] | None = None, zero_point: float | None = None) -> Cutouts:
    """Open a file of cutouts; ``bands`` and ``zero_point`` (AB) are needed where it neither tells them nor is of GalaxiesML's form.

    Raises `CatalogError` for a missing or misshapen column, `ImageError` for bands that do not fit.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            shape = _check_columns(path, file)
            attributes = dict(file[IMAGE].attrs)
            redshift = np.asarray(file[REDSHIFT], np.float32)
    except FileNotFoundError:
        raise CatalogError(f"{path} does not exist") from None
    except OSError as error:
        raise CatalogError(f"{path} cannot be read as HDF5 ({' '.join(str(error).split())}); fetch it again") from None
    named = tuple(bands or [str(band) for band in attributes.get("bands", ())])
    if not named and shape[1] == len(GALAXIESML_BANDS):
        named = GALAXIESML_BANDS
    if len(named) != shape[1]:
        raise ImageError(
            f"{path}: cutouts of {shape[1]} bands, {len(named)} named ({', '.join(named) or 'none'}); name each of them"
        )
    if zero_point is None:
        zero_point = float(attributes.get("zero_point", GALAXIESML_ZERO_POINT))
    redshift = np.where(redshift >= 0, redshift, np.float32(np.nan))  # -99 and the like; NaN compares false
    return Cutouts(path.absolute(), named, shape, 10 ** (0.4 * (NJY_ZERO_POINT - zero_point)), redshift)


def _check_columns(path: Path, file: h5py.File) -> tuple[int, ...]:
    missing = [name for name in (IMAGE, REDSHIFT) if not isinstance(file.get(name), h5py.Dataset)]
    if missing:
        raise CatalogError(f"{path} lacks {' and '.join(missing)}; found {', '.join(sorted(file)) or 'nothing'}")
    shape: tuple[int, ...] = file[IMAGE].shape
    if len(shape) != 4 or shape[2] != shape[3]:
        raise CatalogError(f"{path}: image has the shape {shape}, expected (objects, bands, side, side)")
    if file[REDSHIFT].shape != shape[:1]:
        raise CatalogError(f"{path}: {REDSHIFT} has the shape {file[REDSHIFT].shape} for {shape[0]} images, expected one each")
    return shape


@dataclass(frozen=True)
class _Chosen:
    """Cutouts of one record: pixels (n, C, S, S) and the columns of the objects shown."""

    pixels: NDArray[np.float32]
    columns: dict[str, NDArray[Any]]


def write_cutouts(
    records: Sequence[Record],
    path: Path,
    *,
    bands: Sequence[str],
    gold_band: str,
    pixel_scale: float,
    side: int = GALAXIESML_SIDE,
    edge: Edge = "skip",
    faintest: float = np.inf,
) -> int:
    """Cut out every galaxy with a redshift and a magnitude in ``gold_band`` below ``faintest``, and tell how many there were.

    Objects closer than half a side to an edge are left out (``skip``) or padded with NaN (``pad``). The file appears when it
    is complete. Columns besides image and specz_redshift: object_id, ra, dec (degrees), ``<gold band>_mag``, key (the record).
    """
    if side < 1:
        raise CatalogError(f"side of the cutouts is {side} pixels, expected at least 1")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    written = 0
    try:
        with h5py.File(unfinished, "w", locking=False) as file:
            image = file.create_dataset(
                IMAGE,
                (0, len(bands), side, side),
                "f4",
                maxshape=(None, len(bands), side, side),
                chunks=(1, len(bands), side, side),
            )
            image.attrs.update({"bands": list(bands), "zero_point": NJY_ZERO_POINT, "pixel_scale": pixel_scale})
            for chosen in _cut_records(records, bands, gold_band, side, edge, faintest):
                written += _append(file, chosen, written)
        if not written:
            raise CatalogError(
                f"no galaxy with a redshift and {gold_band} < {faintest:g} in {len(records)} images"
                + (f" lies {side // 2} pixels inside; use a smaller side, or edge 'pad'" if edge == "skip" else "")
            )
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return written


def _cut_records(
    records: Sequence[Record], bands: Sequence[str], gold_band: str, side: int, edge: Edge, faintest: float
) -> Iterator[_Chosen]:
    half = side // 2
    for record in records:
        objects = record.objects
        x0, y0 = (np.round(axis).astype(int) - half for axis in (objects.x, objects.y))
        shown = (objects.classes == GALAXY) & (objects.redshift >= 0)
        shown &= (objects.mag < faintest) if np.isfinite(faintest) else True
        if edge == "skip":
            shown &= (x0 >= 0) & (y0 >= 0) & (x0 + side <= record.width) & (y0 + side <= record.height)
        index = np.flatnonzero(shown)
        if not len(index):
            continue
        whole = to_planes(read_pixels(record, bands, with_wcs=False))
        pixels = np.stack([_cut(whole, int(x0[i]), int(y0[i]), side) for i in index])
        kept = objects.select(index)
        columns: dict[str, NDArray[Any]] = {
            REDSHIFT: kept.redshift,
            "object_id": kept.ids,
            "ra": kept.ra,
            "dec": kept.dec,
            f"{gold_band}_mag": kept.mag,
            "key": np.array([record.key.encode()] * len(index), object),
        }
        yield _Chosen(pixels, columns)


def _cut(whole: NDArray[np.float32], x0: int, y0: int, side: int) -> NDArray[np.float32]:
    """(C, side, side) from x0, y0 on, NaN beyond the image's edges."""
    _, height, width = whole.shape
    part = np.full((len(whole), side, side), np.nan, np.float32)
    columns, rows = slice(max(x0, 0), min(x0 + side, width)), slice(max(y0, 0), min(y0 + side, height))
    part[:, rows.start - y0 : rows.stop - y0, columns.start - x0 : columns.stop - x0] = whole[:, rows, columns]
    return part


def _append(file: h5py.File, chosen: _Chosen, start: int) -> int:
    """Write the cutouts of one record behind the others and tell how many they are."""
    n = len(chosen.pixels)
    for name, values in ({IMAGE: chosen.pixels} | chosen.columns).items():
        if name not in file:
            dtype = h5py.string_dtype() if values.dtype == object else values.dtype
            file.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(4096,))
        file[name].resize(start + n, axis=0)
        file[name][start:] = values
    return n


class CutoutDataset(Dataset[tuple[Tensor, Tensor]]):
    """Pixels (C, S, S) nJy, zero where invalid, flipped and turned, and the redshift, of the cutouts that have one.

    Item k, for every k >= 0, depends on the seed and k alone; an epoch is ``len(dataset)`` items, in the file's order, so that
    a sampler shuffles within an epoch.
    """

    def __init__(self, cutouts: Cutouts, augment: AugmentSettings, seed: int) -> None:
        self._cutouts, self._augment, self._seed = cutouts, augment, seed
        self._index = np.flatnonzero(np.isfinite(cutouts.redshift))
        if not len(self._index):
            raise CatalogError(f"no cutout of {cutouts.path} has a redshift; choose another file")

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        i = int(self._index[k % len(self)])
        (rng,) = item_rngs(self._seed, k, 1)
        pixels = self._cutouts[i]
        turned = Frame(self._cutouts.side, self._cutouts.side).symmetric(draw_symmetry(self._augment, rng)).cut(pixels)
        shown = np.ascontiguousarray(np.where(np.isfinite(turned), turned, np.float32(0)))
        return torch.from_numpy(shown), torch.tensor(self._cutouts.redshift[i])
