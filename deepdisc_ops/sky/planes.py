"""Where the pixels of a band lie and how a window of them is read, without holding more than the window.

Glossary: a source of pixels gives windows of one (H, W) array as the file means them (scaled, integers exact, blanks NaN);
a plane is a band: its source, its companions (variance, mask, weight) and what turns its values into nJy.
Reads take no lock where the operating system needs none, keep no memory map (mapped pages count as memory of the process),
and notice a file that is no longer the one that was opened.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyUserWarning
from astropy.wcs import WCS
from numpy.typing import NDArray

from deepdisc_ops.errors import ImageError
from deepdisc_ops.sky.tiling import Window

Array = NDArray[Any]


class Pixels(Protocol):
    """A source of pixels; threads may share it."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""

    def read(self, window: Window) -> Array:
        """(height, width) values of ``window``, any type."""

    def close(self) -> None:
        """Let go of what is open; a later `read` opens it again."""


class Scaling(NamedTuple):
    """FITS: value = stored * scale + zero; ``blank`` is the stored integer that means no value."""

    scale: float = 1.0
    zero: float = 0.0
    blank: int | None = None

    def apply(self, stored: Array) -> Array:
        """The values that ``stored`` stands for: integers stay integers where that is exact."""
        unscaled = self.scale == 1 and self.zero == 0
        if unscaled and (self.blank is None or stored.dtype.kind == "f"):
            return stored
        whole = self.scale == 1 and float(self.zero).is_integer() and abs(self.zero) < 2**32
        if whole and self.blank is None and stored.dtype.kind != "f":
            return stored.astype(np.int64) + int(self.zero)
        values = np.asarray(stored * self.scale + self.zero, np.float64)
        if self.blank is not None and stored.dtype.kind != "f":
            values[stored == self.blank] = np.nan
        return values


AS_STORED = Scaling()


class Stamp(NamedTuple):
    """Size in bytes and time of change of a file: what it was when it was opened."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """The stamp of `os.stat`'s answer."""
        return cls(status.st_size, status.st_mtime_ns)

    def check(self, path: Path, status: os.stat_result) -> None:
        """Raise `ImageError` if the file is another one by now."""
        now = Stamp.of(status)
        if now != self:
            raise ImageError(
                f"{path} has changed since it was opened: {self.size} bytes then, {now.size} bytes now; "
                "let whatever writes it finish and open it again"
            )


@dataclass(frozen=True)
class RawPixels:
    """An uncompressed array in a file, from byte ``offset`` on, rows one after the other."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, int]
    stamp: Stamp
    scaling: Scaling = AS_STORED

    def read(self, window: Window) -> Array:
        """Read the bytes of the window, row by row unless the rows are whole."""
        stored = np.empty((window.height, window.width), self.dtype)
        rows = stored.view(np.uint8)
        start, step = self.offset + window.x0 * stored.itemsize, self.shape[1] * stored.itemsize
        try:
            with self.path.open("rb", buffering=0) as file:
                self.stamp.check(self.path, os.fstat(file.fileno()))
                if window.width == self.shape[1]:
                    self._fill(file.fileno(), rows.reshape(-1), start + window.y0 * step)
                else:
                    for i, row in enumerate(rows, window.y0):
                        self._fill(file.fileno(), row, start + i * step)
        except OSError as error:
            raise ImageError(f"{self.path} cannot be read any more ({error}); check the disk and open it again") from None
        return self.scaling.apply(stored)

    def _fill(self, descriptor: int, target: NDArray[np.uint8], offset: int) -> None:
        view = memoryview(target.data)
        while view:
            count = os.preadv(descriptor, [view], offset)
            if not count:
                raise ImageError(f"{self.path} is truncated: it ends {len(view)} bytes before its pixels do; fetch it again")
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """Nothing stays open."""


@dataclass(frozen=True)
class MemoryPixels:
    """An (H, W) array in memory."""

    array: Array
    scaling: Scaling = AS_STORED

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""
        return self.array.shape[0], self.array.shape[1]

    def read(self, window: Window) -> Array:
        """A view of the window where nothing is scaled."""
        return self.scaling.apply(self.array[window.y0 : window.y1, window.x0 : window.x1])

    def close(self) -> None:
        """Nothing is open."""


@dataclass
class TiledPixels:
    """A tile-compressed FITS image (.fz): the tiles that a window touches are decompressed."""

    path: Path
    hdu: int
    index: int | None
    shape: tuple[int, int]
    stamp: Stamp
    _file: fits.HDUList | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def read(self, window: Window) -> Array:
        """Decompress the tiles of the window; one thread at a time, for they share the file's position."""
        rows, columns = slice(window.y0, window.y1), slice(window.x0, window.x1)
        try:
            with self._lock:
                self.stamp.check(self.path, self.path.stat())
                if self._file is None:
                    self._file = fits.open(self.path, memmap=False)
                section = self._file[self.hdu].section
                pixels = section[rows, columns] if self.index is None else section[self.index, rows, columns]
        except (OSError, ValueError, RuntimeError) as error:
            raise ImageError(f"{self.path}[{self.hdu}] cannot be decompressed ({error}); fetch it again") from None
        return np.asarray(pixels)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _file=None, _lock=threading.Lock())


@dataclass(frozen=True)
class Hdf5Pixels:
    """A dataset (H, W), or plane ``index`` of one (C, H, W), in an HDF5 file."""

    path: Path
    dataset: str
    index: int | None
    shape: tuple[int, int]
    stamp: Stamp

    def read(self, window: Window) -> Array:
        """Read the chunks that the window touches; the file is opened for each window, so processes may fork."""
        import h5py

        rows, columns = slice(window.y0, window.y1), slice(window.x0, window.x1)
        try:
            self.stamp.check(self.path, self.path.stat())
            with h5py.File(self.path, "r") as file:
                dataset = file[self.dataset]
                return np.asarray(dataset[rows, columns] if self.index is None else dataset[self.index, rows, columns])
        except (OSError, KeyError) as error:
            raise ImageError(f"{self.path} dataset {self.dataset} cannot be read ({error}); fetch it again") from None

    def close(self) -> None:
        """Nothing stays open."""


@dataclass(frozen=True)
class Wishes:
    """What the caller says that goes before the files: see `images.open_mosaic`."""

    zero_point: float | None = None
    pixel_scale: float | None = None
    bad_bits: Sequence[str] | int | None = None


@dataclass(frozen=True)
class Noise:
    """The variance of a band: ``kind`` says whether the pixels hold it or its root."""

    pixels: Pixels
    kind: Literal["variance", "sigma"]

    def variance(self, window: Window, to_njy: np.float32) -> NDArray[np.float32]:
        """(height, width) nJy^2; a negative sigma stays negative, so that it is seen to be none."""
        stored = self.pixels.read(window)
        # 1e-64 is a variance in cgs
        values: NDArray[np.floating] = np.array(stored, np.float64 if stored.dtype.itemsize == 8 else np.float32)
        values *= to_njy
        values *= np.abs(values) if self.kind == "sigma" else to_njy
        return values.astype(np.float32, copy=False)


@dataclass(frozen=True)
class Mask:
    """Flags of a band; a pixel is invalid if one of the bits in ``bad`` is set, or any at all where ``bad`` is None."""

    pixels: Pixels
    bad: int | None

    def invalid(self, window: Window) -> NDArray[np.bool_]:
        """(height, width), True where the mask says that there is no data."""
        flags = self.pixels.read(window)
        if self.bad is None:
            return np.asarray(flags != 0)
        if flags.dtype.kind == "f":
            return np.asarray(np.isnan(flags) | (np.nan_to_num(flags).astype(np.int64) & self.bad != 0))
        return np.asarray(flags.astype(np.int64, copy=False) & self.bad != 0)


@dataclass(frozen=True)
class Plane:
    """One band of a mosaic.

    hdu: number of the extension or name of the dataset; index: plane of a cube; to_njy: factor to nJy, None where ``problem``
    says why there is none; unit: what the file says of it.
    """

    band: str
    path: Path
    hdu: int | str
    index: int | None
    shape: tuple[int, int]
    wcs: WCS | None
    to_njy: float | None
    pixels: Pixels
    unit: str = ""
    problem: str = ""
    noise: Noise | None = None
    mask: Mask | None = None
    weight: Pixels | None = None

    def companions(self) -> dict[str, Pixels]:
        """The sources beside the image, by name."""
        noise = {} if self.noise is None else {self.noise.kind: self.noise.pixels}
        mask = {} if self.mask is None else {"mask": self.mask.pixels}
        weight = {} if self.weight is None else {"weight": self.weight}
        return noise | mask | weight

    def read(
        self,
        window: Window,
        data: NDArray[np.float32],
        invalid: NDArray[np.bool_],
        variance: NDArray[np.float32] | None,
        blank: float | None = None,
    ) -> None:
        """Fill (H, W) arrays with pixels in nJy, where they are invalid, and their variance in nJy^2 if that is wanted.

        Invalid are NaN, infinite and ``blank`` pixels (in the file's unit), bad bits, weights that are not positive, and
        variances that are not positive and finite. There the pixel is 0 and the variance infinite.
        """
        factor = np.float32(self.to_njy or 1.0)
        values = self.pixels.read(window)
        with np.errstate(over="ignore", invalid="ignore"):
            np.multiply(values, factor, out=data, dtype=np.float32, casting="unsafe")
            np.logical_not(np.isfinite(data, out=invalid), out=invalid)
            if blank is not None:
                invalid |= values == blank
            if self.noise is not None:
                noise = self.noise.variance(window, factor)
                invalid |= ~((noise > 0) & np.isfinite(noise))
                if variance is not None:
                    variance[:] = noise
            if self.weight is not None:
                invalid |= ~(self.weight.read(window) > 0)
        if self.mask is not None:
            invalid |= self.mask.invalid(window)
        np.copyto(data, np.float32(0), where=invalid)
        if variance is not None:
            np.copyto(variance, np.float32(np.inf), where=invalid)


def quiet_fits() -> warnings.catch_warnings[None]:
    """Silence what astropy has to say of odd cards and ends of files; what matters is checked by the readers."""
    return warnings.catch_warnings(action="ignore", category=AstropyUserWarning)
