"""Region files of DS9: the boxes of the objects, to lay over an image.

With a WCS each box is the polygon of its corners in ICRS, so that it fits any image of the field; without, a box in the
pixels of its own image (DS9 counts from 1). Objects carry their z_mode as text and their id as a tag.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from astropy.table import Table
from astropy.wcs import WCS

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.sky.coordinates import icrs_positions

EDGES = ("x0", "y0", "x1", "y1")


class RegionFile:
    """A DS9 region file that is written in parts."""

    def __init__(self, path: Path, wcs: WCS | None) -> None:
        self._wcs = wcs
        self._file = path.open("w", encoding="ascii", errors="backslashreplace", newline="\n")
        self._file.write(f"# Region file format: DS9 version 4.1\n{'image' if wcs is None else 'icrs'}\n")

    def write(self, rows: Table) -> None:
        """Append the boxes of ``rows``, without those that are nowhere on the image."""
        missing = [name for name in (*EDGES, "z_mode", "id") if name not in rows.colnames]
        if missing:
            raise CatalogError(f"regions need the columns {', '.join(missing)}, which the catalogue lacks")
        boxes = np.stack([np.asarray(rows[name], np.float64) for name in EDGES], axis=1)
        placed = np.isfinite(boxes).all(axis=1)
        rows, boxes = rows[placed], boxes[placed]
        shapes = _boxes(boxes) if self._wcs is None else _polygons(boxes, self._wcs)
        for shape, z, identity in zip(shapes, rows["z_mode"].tolist(), rows["id"].tolist(), strict=True):
            self._file.write(f"{shape} # text={{{z:.2f}}} tag={{{identity}}}\n")

    def close(self, provenance: Mapping[str, str]) -> None:
        """Append ``provenance`` as comments and finish the file."""
        for key, value in provenance.items():
            self._file.write(f"# {key}: {' '.join(value.split())}\n")
        self._file.close()

    def abort(self) -> None:
        """Let go of the file, whatever state it is in."""
        self._file.close()


def _boxes(boxes: np.ndarray) -> Iterator[str]:
    for x0, y0, x1, y1 in boxes.tolist():
        yield f"box({(x0 + x1 + 1) / 2:.3f},{(y0 + y1 + 1) / 2:.3f},{x1 - x0:.3f},{y1 - y0:.3f},0)"


def _polygons(boxes: np.ndarray, wcs: WCS) -> Iterator[str]:
    ra, dec = icrs_positions(wcs, boxes[:, [0, 2, 2, 0]] - 0.5, boxes[:, [1, 1, 3, 3]] - 0.5)
    for corners in np.stack([ra, dec], axis=2).reshape(-1, 8).tolist():
        yield f"polygon({','.join(f'{degrees:.8f}' for degrees in corners)})"
