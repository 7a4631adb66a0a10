"""Pixels to positions on the sky, whatever frame the image's WCS is in.

astropy's WCS changes itself while it calculates and is not safe to share between threads (seen: one wrong answer in a few
hundred). All functions here take turns, so windows may be read and placed by several threads.
"""

from __future__ import annotations

import threading
import warnings

import numpy as np
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from astropy.wcs import WCS, WcsError
from numpy.typing import ArrayLike, NDArray

from deepdisc_ops.errors import ImageError
from deepdisc_ops.sky.tiling import Window

Floats = NDArray[np.float64]
_ONE_AT_A_TIME = threading.Lock()
ROUND_TRIP = 1e-6
"""Radians (0.2 arcsec) by which a position may differ from that of its pixel."""


def icrs_positions(wcs: WCS, x: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    """ICRS right ascension and declination in degrees of 0-based pixel positions.

    Galactic, FK4, FK5 and swapped axes come out right; an image that names no frame is taken as ICRS. Distortions count.
    """
    with _ONE_AT_A_TIME:
        position = wcs.pixel_to_world(np.asarray(x, np.float64), np.asarray(y, np.float64)).icrs
    return np.asarray(position.ra.deg, np.float64), np.asarray(position.dec.deg, np.float64)


def pixel_positions(wcs: WCS, ra: ArrayLike, dec: ArrayLike, width: int, height: int) -> tuple[Floats, Floats]:
    """0-based pixel positions of ICRS right ascensions and declinations in degrees on an image of ``width`` x ``height``.

    NaN where the sky does not come down on the image's plane, or only the extrapolation of a distortion says so.
    """
    with _ONE_AT_A_TIME, warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):
        sky = SkyCoord(np.asarray(ra, np.float64), np.asarray(dec, np.float64), unit="deg", frame="icrs")
        x, y = (np.array(axis, np.float64) for axis in wcs.world_to_pixel(sky))
    wrong = ~(np.isfinite(x) & np.isfinite(y))
    inside = np.flatnonzero((x > -0.5) & (x < width - 0.5) & (y > -0.5) & (y < height - 0.5))
    back = unit_vectors(*icrs_positions(wcs, x[inside], y[inside]))
    there = unit_vectors(np.asarray(ra, np.float64)[inside], np.asarray(dec, np.float64)[inside])
    wrong[inside] = ~(np.linalg.norm(back - there, axis=1) < ROUND_TRIP)
    x[wrong] = y[wrong] = np.nan
    return x, y


def celestial_wcs(header: fits.Header, file: fits.HDUList | None = None) -> WCS | None:
    """The WCS of a header with its distortions, None without a celestial one; ``file`` holds the tables it may refer to.

    Raises `ImageError` where the header contradicts itself.
    """
    try:
        with warnings.catch_warnings(action="ignore", category=AstropyWarning):
            wcs = WCS(header, fobj=file, naxis=2)
    except (WcsError, ValueError, KeyError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ImageError(f"its WCS cannot be read ({reason}); correct the header") from None
    return wcs if wcs.has_celestial else None


def window_wcs(wcs: WCS, window: Window) -> WCS:
    """The astrometry of ``window``, whose first pixel becomes (0, 0); distortions move with it."""
    with _ONE_AT_A_TIME:
        return wcs.slice((slice(window.y0, window.y1), slice(window.x0, window.x1)))


def unit_vectors(ra: ArrayLike, dec: ArrayLike) -> Floats:
    """(..., 3) directions of positions in degrees."""
    ra, dec = np.radians(np.asarray(ra, np.float64)), np.radians(np.asarray(dec, np.float64))
    return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=-1)


def pixel_area_arcsec2(wcs: WCS, width: int, height: int) -> float:
    """Sky area of the pixel in the middle of an image, arcsec^2, distortions included."""
    x, y = (width - 1) / 2, (height - 1) / 2
    corners = unit_vectors(*icrs_positions(wcs, [x - 0.5, x + 0.5, x + 0.5, x - 0.5], [y - 0.5, y - 0.5, y + 0.5, y + 0.5]))
    diagonals = np.cross(corners[2] - corners[0], corners[3] - corners[1])
    return float(np.degrees(np.degrees(np.linalg.norm(diagonals) / 2)) * 3600**2)


def grid_offset_pixels(first: WCS, second: WCS, width: int, height: int, points: int = 17) -> float:
    """Largest distance between where two WCS put the same pixels, in pixels, on a grid of ``points`` squared over the image.

    The grid sees distortions (SIP, TPV, tables) between the corners. Where one WCS alone has no sky, it is infinite.
    """
    x, y = (axis.ravel() for axis in np.meshgrid(np.linspace(0, width - 1, points), np.linspace(0, height - 1, points)))
    here, there = (unit_vectors(*icrs_positions(wcs, x, y)) for wcs in (first, second))
    seen = np.isfinite(here).all(axis=1), np.isfinite(there).all(axis=1)
    if not np.array_equal(*seen) or not seen[0].any():
        return float("inf")
    steps = [unit_vectors(*icrs_positions(first, x + dx, y + dy)) - here for dx, dy in ((1, 0), (0, 1))]
    pixel = np.min([np.linalg.norm(step, axis=1) for step in steps], axis=0)
    return float(np.nanmax((np.linalg.norm(there - here, axis=1) / pixel)[seen[0]]))
