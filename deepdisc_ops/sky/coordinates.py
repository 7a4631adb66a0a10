"""Pixels to positions on the sky, whatever frame the image's WCS is in."""

from __future__ import annotations

import numpy as np
from astropy.wcs import WCS
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def icrs_positions(wcs: WCS, x: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    """ICRS right ascension and declination in degrees of 0-based pixel positions.

    Galactic, FK4, FK5 and swapped axes come out right; an image that names no frame is taken as ICRS.
    """
    position = wcs.pixel_to_world(np.asarray(x, np.float64), np.asarray(y, np.float64)).icrs
    return np.asarray(position.ra.deg, np.float64), np.asarray(position.dec.deg, np.float64)
