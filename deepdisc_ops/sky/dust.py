"""Milky Way reddening E(B-V): a constant, or a dustmaps map read from a local directory.

Reddening varies over arcminutes (SFD: 6.1'), a window is smaller; over a window it is held as the bilinear
surface through the window's corners, so that whoever computes the window needs no map.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.coordinates import SkyCoord
from astropy.wcs import WCS
from numpy.typing import NDArray

from deepdisc_ops.errors import ConfigError, SetupError
from deepdisc_ops.sky.coordinates import icrs_positions
from deepdisc_ops.sky.tiling import Window

EbvSource = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""E(B-V) in mag at right ascensions and declinations in degrees."""


@dataclass(frozen=True)
class EbvPlane:
    """Bilinear E(B-V) over a window: values at its corners (x0, y0), (x1, y0), (x0, y1), (x1, y1), mag."""

    corners: tuple[float, float, float, float]

    @classmethod
    def constant(cls, ebv: float) -> EbvPlane:
        """The same value everywhere."""
        return cls((ebv, ebv, ebv, ebv))

    def at(self, x: NDArray[np.floating], y: NDArray[np.floating], width: int, height: int) -> NDArray[np.float32]:
        """E(B-V) at pixel positions of a window of ``width`` x ``height``."""
        u, v = (np.asarray(x) + 0.5) / width, (np.asarray(y) + 0.5) / height
        a, b, c, d = self.corners
        return np.asarray((1 - v) * ((1 - u) * a + u * b) + v * ((1 - u) * c + u * d), np.float32)


def plane_over(window: Window, wcs: WCS | None, source: EbvSource) -> EbvPlane:
    """E(B-V) at the corners of ``window``; ``wcs`` is the mosaic's (without one, the source is asked at 0, 0)."""
    x = np.array([window.x0, window.x1, window.x0, window.x1]) - 0.5
    y = np.array([window.y0, window.y0, window.y1, window.y1]) - 0.5
    ra, dec = icrs_positions(wcs, x, y) if wcs is not None else (np.zeros(4), np.zeros(4))
    a, b, c, d = (float(value) for value in source(ra, dec))
    return EbvPlane((a, b, c, d))


def ebv_source(text: str, maps: Path | None = None, scale: float = 1.0) -> EbvSource:
    """Read ``0.03`` as a constant and ``sfd`` as the Schlegel-Finkbeiner-Davis map in the directory ``maps``.

    ``scale`` multiplies the map: 0.86 turns SFD into Schlafly & Finkbeiner (2011).
    """
    try:
        value = float(text)
    except ValueError:
        if text != "sfd":
            raise ConfigError(f"E(B-V) source {text!r} is unknown; give a number in mag or 'sfd'") from None
        return _sfd(maps, scale)
    if not 0 <= value < 10:
        raise ConfigError(f"E(B-V) = {value} mag is out of range; expected 0 to 10")
    return lambda ra, _dec: np.full(np.shape(ra), value)


def _sfd(maps: Path | None, scale: float) -> EbvSource:
    if maps is None or not (maps / "SFD_dust_4096_ngp.fits").exists():
        raise SetupError(
            f"SFD dust map not found in {maps}: expected SFD_dust_4096_ngp.fits and SFD_dust_4096_sgp.fits; "
            "fetch them with dustmaps.sfd.fetch() where there is internet and pass their folder with --dust-maps"
        )
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        # dustmaps writes a settings file into the home directory on import unless told of another place, and then says so
        warnings.simplefilter("ignore")
        os.environ.setdefault("DUSTMAPS_CONFIG_FNAME", str(Path(scratch) / "dustmapsrc"))
        from dustmaps.sfd import SFDQuery

    query = SFDQuery(map_dir=str(maps))
    return lambda ra, dec: scale * np.asarray(query(SkyCoord(ra, dec, unit="deg")), np.float64)
