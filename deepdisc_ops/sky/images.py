"""Multi-band images with their astrometry, read whole or window by window, in one flux unit.

Pixels are nanojansky per pixel (AB zero point 31.4) once read; invalid pixels are zero and marked in the mask.
Glossary: C bands, H x W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray

from deepdisc_ops.errors import ImageError, nearest
from deepdisc_ops.sky.array_planes import SUFFIXES, array_planes
from deepdisc_ops.sky.coordinates import grid_offset_pixels, icrs_positions, pixel_area_arcsec2, window_wcs
from deepdisc_ops.sky.fits_planes import fits_planes
from deepdisc_ops.sky.planes import Plane, Wishes
from deepdisc_ops.sky.tiling import Window

log = logging.getLogger(__name__)

WCS_TOLERANCE_PIXELS = 0.01
ALIKE = 0.3
"""How like a missing band's name another one must be to be suggested: z and HSC-Z are."""
SUSPECT_ZEROS = 0.01
"""Fraction of exact zeros in a window of a band from which on they look like missing coverage."""


@dataclass(frozen=True)
class SkyImage:
    """One window of the sky.

    data (C, H, W) float32 nJy, 0 where invalid; bands C names in the order of the planes; wcs of this window or None;
    pixel_scale arcsec; mask (H, W), True where some band has no valid data; invalid (C, H, W), the same band by band, None
    where the mask holds for all bands alike; variance (C, H, W) float32 nJy^2, infinite where invalid, None where unknown.
    """

    data: NDArray[np.float32]
    bands: tuple[str, ...]
    wcs: WCS | None
    pixel_scale: float
    mask: NDArray[np.bool_]
    invalid: NDArray[np.bool_] | None = None
    variance: NDArray[np.float32] | None = None

    def __repr__(self) -> str:
        height, width = self.mask.shape
        return f"<SkyImage {_told(width, height, self.pixel_scale, self.bands, self.wcs)}, {self.mask.mean():.0%} invalid>"


class Mosaic:
    """Bands on one pixel grid, opened but not loaded; `read` gives windows. Threads may share it.

    ``blank`` is the pixel value, in the files' unit, that means no data.
    """

    def __init__(self, planes: Sequence[Plane], pixel_scale: float, blank: float | None = None) -> None:
        self._planes = tuple(planes)
        self._blank = blank
        self._zeros_seen: set[str] = set()
        self.pixel_scale = pixel_scale

    def __repr__(self) -> str:
        return f"<Mosaic {_told(self.width, self.height, self.pixel_scale, self.bands, self.wcs)}>"

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

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, each once, in the order of the planes."""
        return tuple(dict.fromkeys(plane.path for plane in self._planes))

    def select(self, bands: Sequence[str]) -> Mosaic:
        """The same mosaic with ``bands`` in the order given; `ImageError` names what is missing."""
        by_name = {plane.band.lower(): plane for plane in self._planes}
        missing = [band for band in bands if band.lower() not in by_name]
        if missing:
            raise ImageError(
                f"band{'s' * (len(missing) > 1)} {', '.join(missing)} missing: found {', '.join(self.bands)}, "
                f"expected {', '.join(bands)}{_other_names(missing, self.bands, bands)}; "
                "add the file or extension, or use a model of the bands you have"
            )
        return Mosaic([replace(by_name[band.lower()], band=band) for band in bands], self.pixel_scale, blank=self._blank)

    def read(self, window: Window | None = None) -> SkyImage:
        """Pixels of ``window`` (default: everything) with the WCS of that window.

        A window without a single valid pixel is an ordinary one. Raises `ImageError` if it is not inside the mosaic, or if a
        file has changed or been cut since it was opened.
        """
        window = window or Window(0, 0, self.width, self.height)
        if not (0 <= window.x0 < window.x1 <= self.width and 0 <= window.y0 < window.y1 <= self.height):
            raise ImageError(f"{tuple(window)} is no window of {self.width}x{self.height} pixels; give x0, y0, x1, y1 inside")
        shape = (len(self._planes), window.height, window.width)
        data, invalid = np.empty(shape, np.float32), np.empty(shape, np.bool_)
        variance = np.empty(shape, np.float32) if all(plane.noise for plane in self._planes) else None
        for i, plane in enumerate(self._planes):
            plane.read(window, data[i], invalid[i], None if variance is None else variance[i], self._blank)
            self._look_for_zeros(plane, data[i], invalid[i])
        wcs = self.wcs if self.wcs is None else window_wcs(self.wcs, window)
        return SkyImage(data, self.bands, wcs, self.pixel_scale, np.asarray(invalid.any(axis=0)), invalid, variance)

    def _look_for_zeros(self, plane: Plane, data: NDArray[np.float32], invalid: NDArray[np.bool_]) -> None:
        """Say once a band that missing coverage may be hidden in zeros, where nothing else tells coverage."""
        if plane.band in self._zeros_seen or self._blank is not None or plane.companions():
            return
        zeros = 1 - (np.count_nonzero(data) + np.count_nonzero(invalid)) / data.size
        if zeros > SUSPECT_ZEROS:
            self._zeros_seen.add(plane.band)
            log.warning(
                "%s: %.0f %% of a window of band %s are exactly 0; if that means no coverage, open it with blank=0",
                plane.path,
                100 * zeros,
                plane.band,
            )

    def close(self) -> None:
        """Close the files; a later `read` opens them again."""
        for plane in self._planes:
            for pixels in (plane.pixels, *plane.companions().values()):
                if pixels is not None:
                    pixels.close()

    def __enter__(self) -> Mosaic:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _other_names(missing: Sequence[str], found: Sequence[str], wanted: Sequence[str]) -> str:
    """Bands that nobody asked for, and that may be the missing ones under other names: z as HSC-Z."""
    asked = {band.lower() for band in wanted}
    unasked = [band for band in found if band.lower() not in asked]
    near = {band: name for band in missing if (name := nearest(band, unasked, ALIKE))}
    meant = ", ".join(f"{name} for {band}" for band, name in near.items())
    return f"; did you mean {meant}? name planes by --plane-bands" if near else ""


def _told(width: int, height: int, pixel_scale: float, bands: Sequence[str], wcs: WCS | None) -> str:
    """Size, bands and centre in the words of an astronomer."""
    told = f"{width} x {height} pixels of {pixel_scale:.3g} arcsec, bands {' '.join(bands)}"
    if wcs is None:
        return f"{told}, nowhere on the sky"
    ra, dec = icrs_positions(wcs, np.array([(width - 1) / 2]), np.array([(height - 1) / 2]))
    return f"{told}, centre {ra[0]:.5f} {dec[0]:+.5f} deg"


def open_mosaic(
    paths: Path | Iterable[Path],
    bands: Sequence[str] | None = None,
    *,
    plane_bands: Sequence[str] | None = None,
    zero_point: float | None = None,
    pixel_scale: float | None = None,
    require_wcs: bool = True,
    blank: float | None = None,
    bad_bits: Sequence[str] | int | None = None,
) -> Mosaic:
    """Open images as one `Mosaic`, its planes ordered by name as ``bands`` says.

    Understands FITS (multi-extension, a file per band, cubes, tile-compressed, gzip; SCI/ERR/WHT, IMAGE/MASK/VARIANCE and
    <BAND>_MASK beside the bands: see `sky.fits_planes`), .npy, .npz and HDF5 (see `sky.array_planes`). ``plane_bands`` names
    the image planes where the files do not, in their order; ``zero_point`` (AB) overrides what the files say of their unit;
    ``pixel_scale`` (arcsec) is needed only without a WCS. ``blank`` is a pixel value that means no data; ``bad_bits`` are the
    mask planes (or the bits as one number) whose pixels are invalid, by default `fits_planes.BAD_BITS`. Planes that are not
    among ``bands`` are left alone. Raises `ImageError`.
    """
    paths = [paths] if isinstance(paths, Path) else list(paths)
    if not paths:
        raise ImageError("no image given; expected one file, or one a band")
    wishes = Wishes(zero_point, pixel_scale, bad_bits)
    planes = [plane for path in paths for plane in _planes_of(path, wishes)]
    if not planes:
        files = ", ".join(map(str, paths))
        raise ImageError(f"{files} holds no image; expected a 2-D plane per band, or a cube")
    mosaic = Mosaic(_named(planes, plane_bands, bands), pixel_scale or 0.0, blank=blank)
    if bands:
        mosaic = mosaic.select(bands)
    _check_planes(mosaic)
    _check_grid(mosaic, require_wcs)
    if mosaic.wcs is not None:
        mosaic.pixel_scale = float(np.sqrt(pixel_area_arcsec2(mosaic.wcs, mosaic.width, mosaic.height)))
    elif not mosaic.pixel_scale:
        raise ImageError(f"{paths[0]} has no WCS and no pixel scale; give --pixel-scale in arcsec")
    return mosaic


def _planes_of(path: Path, wishes: Wishes) -> list[Plane]:
    if path.suffix.lower() in SUFFIXES:
        return array_planes(path, wishes)
    return fits_planes(path, wishes)


def _named(planes: Sequence[Plane], plane_bands: Sequence[str] | None, wanted: Sequence[str] | None) -> list[Plane]:
    """The planes, all with names of their own; what is not ``wanted`` may do without."""
    if plane_bands:
        if len(plane_bands) != len(planes):
            raise ImageError(
                f"{len(planes)} image planes for {len(plane_bands)} bands {', '.join(plane_bands)}; give one band a plane"
            )
        planes = [replace(plane, band=band.lower()) for plane, band in zip(planes, plane_bands, strict=True)]
    names = [plane.band for plane in planes]
    needed = {band.lower() for band in wanted} if wanted else set(names)
    nameless = names.count("")
    if nameless and not (wanted and needed <= set(names)):
        raise ImageError(
            f"{nameless} of {len(planes)} image planes of {planes[0].path} name no band; give --plane-bands in their order"
        )
    double = sorted({name for name in names if names.count(name) > 1} & needed)
    if double:
        raise ImageError(f"band {', '.join(double)} appears more than once; hand in each band once")
    return [plane for plane in planes if plane.band]


def _check_planes(mosaic: Mosaic) -> None:
    for plane in mosaic._planes:
        if plane.problem:
            raise ImageError(f"{plane.path}: band {plane.band}: {plane.problem}")


def _check_grid(mosaic: Mosaic, require_wcs: bool) -> None:
    """All planes must have one shape and one WCS, to a hundredth of a pixel."""
    first, *others = mosaic._planes
    for plane in others:
        if plane.shape != first.shape:
            raise ImageError(
                f"band {plane.band} has shape {plane.shape}, band {first.band} {first.shape}; resample them to one grid"
            )
    without = [plane.band for plane in mosaic._planes if plane.wcs is None]
    if without and require_wcs:
        raise ImageError(
            f"{first.path}: no celestial WCS for band{'s' * (len(without) > 1)} {', '.join(without)}; add one to the header, "
            "or ask for pixel positions only with --pixels-only"
        )
    for plane in others:
        if first.wcs is None or plane.wcs is None or plane.wcs is first.wcs:
            continue
        offset = grid_offset_pixels(first.wcs, plane.wcs, *reversed(first.shape))
        if not offset <= WCS_TOLERANCE_PIXELS:
            raise ImageError(
                f"WCS of band {plane.band} is {offset:.3g} px off that of band {first.band} (tolerance {WCS_TOLERANCE_PIXELS}); "
                "resample the bands to one grid"
            )
