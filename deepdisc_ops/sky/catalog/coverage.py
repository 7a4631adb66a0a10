"""The area of the sky that was searched, as a Multi-Order Coverage map (MOC, an IVOA recommendation) made window by window.

Glossary: H x W pixels of a window; cells: HEALPix indices (nested) at the map's order.

The order is that whose cells are 22 to 45 pixels wide. A cell belongs to the map if the centre of some block of `BLOCK` pixels
squared lies in it that is valid for the most part. So pixels with valid ones for a block around them are in the map, the map
reaches up to a cell beyond them, and holes smaller than a cell are closed.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray

from deepdisc_ops.errors import SetupError
from deepdisc_ops.sky.coordinates import icrs_positions
from deepdisc_ops.sky.tiling import Window

BLOCK = 8
CELL_PIXELS = 32
CELL_ARCSEC = math.sqrt(math.pi / 3) * math.degrees(1) * 3600
"""Side of a HEALPix cell of order 0, were it a square; a cell of order n is 2^-n of it."""
MAX_ORDER = 29

Cells = NDArray[np.int64]


def require_mocpy() -> None:
    """Raise `SetupError` where maps of coverage cannot be written."""
    if find_spec("mocpy") is None:
        raise SetupError("the package mocpy, which writes maps of coverage (.moc.fits), is missing; install it: pip install mocpy")


def cell_order(pixel_scale: float) -> int:
    """HEALPix order whose cells are about `CELL_PIXELS` pixels of ``pixel_scale`` arcsec wide."""
    return min(max(round(math.log2(CELL_ARCSEC / (CELL_PIXELS * pixel_scale))), 0), MAX_ORDER)


def covered_cells(wcs: WCS, window: Window, valid: NDArray[np.bool_], order: int) -> Cells:
    """The cells of a window of the mosaic whose WCS is given; valid (H, W) tells which of the window's pixels have data."""
    import healpy

    rows, columns = (np.arange(0, size, BLOCK) for size in valid.shape)
    count = np.add.reduceat(np.add.reduceat(valid, rows, axis=0, dtype=np.int64), columns, axis=1)
    height, width = (np.diff(np.append(starts, size)) for starts, size in zip((rows, columns), valid.shape, strict=True))
    row, column = np.nonzero(2 * count >= height[:, None] * width)
    x = window.x0 + columns[column] + (width[column] - 1) / 2
    y = window.y0 + rows[row] + (height[row] - 1) / 2
    ra, dec = icrs_positions(wcs, x, y)
    placed = np.isfinite(ra) & np.isfinite(dec)
    return np.unique(np.asarray(healpy.ang2pix(2**order, ra[placed], dec[placed], nest=True, lonlat=True), np.int64))


class Coverage:
    """A map of coverage that grows; its size in memory goes with the length of the area's edge, not with the area."""

    def __init__(self, order: int) -> None:
        require_mocpy()
        from mocpy import MOC

        self.order = order
        self._moc: Any = MOC.new_empty(order)

    def add(self, cells: Cells) -> None:
        """Take in cells of `covered_cells`, of this map's order."""
        from mocpy import MOC

        self._moc = self._moc.union(MOC.from_healpix_cells(cells.astype(np.uint64), np.uint8(self.order), np.uint8(self.order)))

    @property
    def area_deg2(self) -> float:
        """Covered area in square degrees."""
        return float(self._moc.sky_fraction) * 4 * math.pi * math.degrees(1) ** 2

    def write(self, path: Path) -> None:
        """Write FITS as the MOC standard has it."""
        self._moc.save(path, format="fits", overwrite=True)
