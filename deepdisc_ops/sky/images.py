"""Multi-band images with their astrometry, read whole or window by window, in one flux unit.

Pixels are nanojansky per pixel (AB zero point 31.4) once read; invalid pixels are zero and marked in the mask.
Glossary: C bands, H x W pixels.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from astropy import units
from astropy.io import fits
from astropy.utils.exceptions import AstropyUserWarning
from astropy.wcs import WCS, FITSFixedWarning
from astropy.wcs.utils import proj_plane_pixel_area
from numpy.typing import NDArray

from deepdisc_ops.errors import ImageError
from deepdisc_ops.sky.tiling import Window

NJY_ZERO_POINT = 31.4
ZERO_POINT_KEYS = ("MAGZERO", "MAGZPT", "ZEROPT", "PHOTZP")
WCS_TOLERANCE_PIXELS = 0.01
GENERIC_NAMES = ("", "sci", "image", "data", "primary", "compressed_image")
"""Extension names that say nothing of the band."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zip", ".z")


@dataclass(frozen=True)
class SkyImage:
    """One window of the sky.

    data (C, H, W) float32 nJy; bands C names in the order of the planes; wcs of this window or None;
    pixel_scale arcsec; mask (H, W), True where some band has no valid data.
    """

    data: NDArray[np.float32]
    bands: tuple[str, ...]
    wcs: WCS | None
    pixel_scale: float
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class _Plane:
    """Where one band's pixels lie and what turns them into nJy."""

    band: str
    path: Path
    hdu: int
    index: int | None
    shape: tuple[int, int]
    wcs: WCS | None
    to_njy: float | None
    unit: str = ""
    scaled: bool = False


class Mosaic:
    """Bands on one pixel grid, opened but not loaded; `read` gives windows. Threads may share it."""

    def __init__(self, planes: Sequence[_Plane], pixel_scale: float, arrays: NDArray[np.float32] | None = None) -> None:
        self._planes = tuple(planes)
        self._arrays = arrays
        self._files: dict[Path, fits.HDUList] = {}
        self._lock = threading.Lock()
        self.pixel_scale = pixel_scale

    @property
    def bands(self) -> tuple[str, ...]:
        """Band names in the order of the planes."""
        return tuple(plane.band for plane in self._planes)

    @property
    def width(self) -> int:
        """Columns."""
        return self._planes[0].shape[1]

    @property
    def height(self) -> int:
        """Rows."""
        return self._planes[0].shape[0]

    @property
    def wcs(self) -> WCS | None:
        """Astrometry of the whole mosaic."""
        return self._planes[0].wcs

    def select(self, bands: Sequence[str]) -> Mosaic:
        """The same mosaic with ``bands`` in the order given; `ImageError` names what is missing."""
        by_name = {plane.band.lower(): i for i, plane in enumerate(self._planes)}
        missing = [band for band in bands if band.lower() not in by_name]
        if missing:
            raise ImageError(
                f"band{'s' * (len(missing) > 1)} {', '.join(missing)} missing: found {', '.join(self.bands)}, "
                f"expected {', '.join(bands)}; add the file or extension, or use a model of the bands you have"
            )
        order = [by_name[band.lower()] for band in bands]
        arrays = None if self._arrays is None else self._arrays[order]
        return Mosaic([replace(self._planes[i], band=band) for i, band in zip(order, bands, strict=True)], self.pixel_scale, arrays)

    def read(self, window: Window | None = None) -> SkyImage:
        """Pixels of ``window`` (default: everything) with the WCS of that window."""
        window = window or Window(0, 0, self.width, self.height)
        data = np.empty((len(self._planes), window.height, window.width), np.float32)
        for i, plane in enumerate(self._planes):
            data[i] = self._read_plane(i, plane, window)
            data[i] *= np.float32(plane.to_njy or 1.0)
        invalid = ~np.isfinite(data)
        data[invalid] = 0
        wcs = self.wcs
        if wcs is not None:
            wcs = wcs.slice((slice(window.y0, window.y1), slice(window.x0, window.x1)))
        return SkyImage(data, self.bands, wcs, self.pixel_scale, np.asarray(invalid.any(axis=0)))

    def _read_plane(self, i: int, plane: _Plane, window: Window) -> NDArray[np.float32]:
        rows, columns = slice(window.y0, window.y1), slice(window.x0, window.x1)
        if self._arrays is not None:
            return self._arrays[i, rows, columns]
        with self._lock:
            if plane.path not in self._files:
                # scaled integers cannot be mapped; astropy then reads the rows of a section from the file
                scaled = any(other.scaled for other in self._planes if other.path == plane.path)
                self._files[plane.path] = fits.open(plane.path, memmap=not scaled)
            section = self._files[plane.path][plane.hdu].section
            pixels = section[rows, columns] if plane.index is None else section[plane.index, rows, columns]
        return np.asarray(pixels, np.float32)

    def close(self) -> None:
        """Close the files; a later `read` opens them again."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def __enter__(self) -> Mosaic:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_mosaic(
    paths: Path | Iterable[Path],
    bands: Sequence[str] | None = None,
    *,
    plane_bands: Sequence[str] | None = None,
    zero_point: float | None = None,
    pixel_scale: float | None = None,
    require_wcs: bool = True,
) -> Mosaic:
    """Open images as one `Mosaic`, its planes ordered by name as ``bands`` says.

    Understands multi-extension FITS (a band per FILTER or EXTNAME), a file per band, a cube, and .npz with
    ``images`` (C, H, W) and ``filters``. ``plane_bands`` names the planes where the files do not, ``zero_point`` (AB)
    overrides the headers', ``pixel_scale`` (arcsec) is needed only without a WCS. Planes that are not among ``bands``
    (a variance, a PSF) are left alone. Raises `ImageError`.
    """
    paths = [paths] if isinstance(paths, Path) else list(paths)
    if len(paths) == 1 and paths[0].suffix == ".npz":
        mosaic = _open_npz(paths[0], plane_bands, zero_point, pixel_scale)
    else:
        planes = [plane for path in paths for plane in _fits_planes(path, zero_point)]
        mosaic = Mosaic(_named(planes, plane_bands), pixel_scale or 0.0)
    if bands:
        mosaic = mosaic.select(bands)
    _check_planes(mosaic)
    _check_grid(mosaic, require_wcs)
    if mosaic.wcs is not None:
        mosaic.pixel_scale = float(np.sqrt(proj_plane_pixel_area(mosaic.wcs)) * 3600)
    elif not mosaic.pixel_scale:
        raise ImageError(f"{paths[0]} has no WCS and no pixel scale; give --pixel-scale in arcsec")
    return mosaic


def _open_npz(path: Path, plane_bands: Sequence[str] | None, zero_point: float | None, pixel_scale: float | None) -> Mosaic:
    try:
        with np.load(path, allow_pickle=False) as file:
            if "images" not in file:
                raise ImageError(f"{path} holds {', '.join(file.files)}; expected an array 'images' (bands, rows, columns)")
            images = np.asarray(file["images"], np.float32)
            names = plane_bands or ([str(name) for name in file["filters"]] if "filters" in file else None)
            # A boolean mask marks invalid pixels; an integer one holds bits of its survey, "detected" among them.
            if "mask" in file and file["mask"].dtype == bool and file["mask"].shape == images.shape:
                images = np.where(file["mask"], np.nan, images)
    except (OSError, ValueError, EOFError) as error:
        raise ImageError(f"{path} cannot be read as .npz: {error}") from None
    if images.ndim != 3 or not names or len(names) != len(images):
        raise ImageError(f"{path}: images of shape {images.shape} with band names {names}; name every plane with --plane-bands")
    if zero_point is None:
        raise ImageError(f"{path} names no zero point; give --zero-point (AB magnitude of one count)")
    factor = _njy_per_count(zero_point)
    planes = [_Plane(name.lower(), path, 0, i, images.shape[1:], None, factor) for i, name in enumerate(names)]
    return Mosaic(planes, pixel_scale or 0.0, images)


def _fits_planes(path: Path, zero_point: float | None) -> list[_Plane]:
    """The image planes of one file; a plane without a name of its own has an empty band."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AstropyUserWarning)
            with fits.open(path, memmap=True) as file:
                _check_complete(path, file)
                general = str(file[0].header.get("FILTER") or "").strip()
                return [plane for i, hdu in enumerate(file) for plane in _hdu_planes(path, i, hdu, zero_point, general)]
    except FileNotFoundError:
        raise ImageError(f"image {path} does not exist") from None
    except (OSError, fits.VerifyError, TypeError) as error:
        raise ImageError(f"{path} is not readable FITS ({error}); fetch it again or check it with fitscheck") from None


def _check_complete(path: Path, file: fits.HDUList) -> None:
    if path.suffix.lower() in COMPRESSED:  # offsets are those of the content; reading tells whether it is whole
        return
    size = path.stat().st_size
    last = [hdu.fileinfo() for hdu in file][-1]
    expected = last["datLoc"] + last["datSpan"]
    if size < expected:
        raise ImageError(f"{path} is truncated: {size} bytes of {expected}; fetch it again")


def _hdu_planes(path: Path, i: int, hdu: fits.ImageHDU, zero_point: float | None, general: str) -> list[_Plane]:
    """Planes of one extension; ``general`` is the FILTER of the file's primary header."""
    if not hdu.is_image or hdu.header.get("NAXIS", 0) not in (2, 3):
        return []
    header = hdu.header
    extension = str(header.get("EXTNAME") or "").strip()
    named = "" if extension.lower() in GENERIC_NAMES else extension
    name = (str(header.get("FILTER") or "").strip() or named or general).lower()
    scaled = any(key in header for key in ("BSCALE", "BZERO", "BLANK"))
    shape = hdu.shape[-2:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FITSFixedWarning)
        wcs = WCS(header, naxis=2)
    celestial = wcs if wcs.has_celestial else None
    factor, unit = _header_to_njy(path, header, zero_point), str(header.get("BUNIT", "none"))
    if header["NAXIS"] == 2:
        return [_Plane(name, path, i, None, shape, celestial, factor, unit, scaled)]
    return [_Plane("", path, i, plane, shape, celestial, factor, unit, scaled) for plane in range(hdu.shape[0])]


def _header_to_njy(path: Path, header: fits.Header, zero_point: float | None) -> float | None:
    """Factor from the file's counts to nJy; None where nothing tells it."""
    if zero_point is not None:
        return _njy_per_count(zero_point)
    for key in ZERO_POINT_KEYS:
        if key in header:
            try:
                return _njy_per_count(float(header[key]))
            except (TypeError, ValueError):
                raise ImageError(f"{path}: {key} is {header[key]!r}, not a magnitude; give --zero-point") from None
    try:
        return float(units.Unit(header.get("BUNIT", "")).to(units.nJy))
    except (units.UnitConversionError, ValueError, TypeError):
        return None


def _njy_per_count(zero_point: float) -> float:
    return float(10 ** (0.4 * (NJY_ZERO_POINT - zero_point)))


def _named(planes: Sequence[_Plane], plane_bands: Sequence[str] | None) -> list[_Plane]:
    if plane_bands:
        if len(plane_bands) != len(planes):
            raise ImageError(
                f"{len(planes)} image planes for {len(plane_bands)} bands {', '.join(plane_bands)}; give one band a plane"
            )
        planes = [replace(plane, band=band.lower()) for plane, band in zip(planes, plane_bands, strict=True)]
    if not planes:
        raise ImageError("no image planes found; expected a 2-D image per band or a cube")
    nameless = sum(not plane.band for plane in planes)
    if nameless:
        raise ImageError(
            f"{nameless} of {len(planes)} image planes of {planes[0].path} name no band; give --plane-bands in their order"
        )
    names = [plane.band for plane in planes]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ImageError(f"band {', '.join(double)} appears more than once; hand in each band once")
    return list(planes)


def _check_planes(mosaic: Mosaic) -> None:
    for plane in mosaic._planes:
        if plane.to_njy is None:
            raise ImageError(
                f"{plane.path}: band {plane.band} has no zero point ({', '.join(ZERO_POINT_KEYS)}) and its unit {plane.unit!r} "
                "is no flux; give --zero-point"
            )


def _check_grid(mosaic: Mosaic, require_wcs: bool) -> None:
    """All planes must have one shape and one WCS, to a hundredth of a pixel."""
    first, *others = mosaic._planes
    for plane in others:
        if plane.shape != first.shape:
            raise ImageError(
                f"band {plane.band} has shape {plane.shape}, band {first.band} {first.shape}; resample them to one grid"
            )
    systems = [(plane.band, plane.wcs) for plane in mosaic._planes if plane.wcs is not None]
    without = [plane.band for plane in mosaic._planes if plane.wcs is None]
    if without and require_wcs:
        raise ImageError(
            f"{first.path}: no celestial WCS for band{'s' * (len(without) > 1)} {', '.join(without)}; add one to the header, "
            "or ask for pixel positions only with --pixels-only"
        )
    if without:
        return
    height, width = first.shape
    x = np.array([0, width - 1, 0, width - 1, (width - 1) / 2])
    y = np.array([0, 0, height - 1, height - 1, (height - 1) / 2])
    for band, wcs in systems[1:]:
        there = systems[0][1].world_to_pixel_values(*wcs.pixel_to_world_values(x, y))
        offset = float(np.nanmax(np.hypot(there[0] - x, there[1] - y)))
        if not offset <= WCS_TOLERANCE_PIXELS:
            raise ImageError(
                f"WCS of band {band} is {offset:.3g} px off that of band {first.band} (tolerance {WCS_TOLERANCE_PIXELS}); "
                "resample the bands to one grid"
            )
