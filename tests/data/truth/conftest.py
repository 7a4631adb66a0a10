"""A mosaic of two bands with square sources, its segmentation map and its catalogue, written as files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS

SCALE = 0.1
BOXES = {11: (2, 3, 9, 8), 12: (30, 20, 36, 30), 13: (44, 40, 58, 46), 14: (70, 60, 76, 66), 15: (90, 10, 96, 16)}
"""Ids and their squares; 13 crosses the edge at x = 50 of windows of 50 x 40 pixels, its centre just right of it."""


@dataclass(frozen=True)
class SquareField:
    """Files of the field and what the settings of a build say of them."""

    folder: Path
    wcs: WCS
    segmentation: np.ndarray
    table: Table

    def settings(self, **more: Any) -> dict[str, Any]:
        columns = {"id": "ID", "magnitudes": {"b": "mag_b"}, "unit": "mag", "redshift": "z"}
        return {
            "survey": "squares",
            "gold_band": "b",
            "images": {"paths": [str(self.folder / "a.fits"), str(self.folder / "b.fits")], "bands": ["a", "b"]},
            "catalog": {"path": str(self.folder / "catalogue.fits"), "columns": columns},
            "windows": {"width_arcsec": 5.0, "height_arcsec": 4.0},
            "segmentation": str(self.folder / "map.fits"),
        } | more

    def write_table(self, table: Table) -> None:
        table.write(self.folder / "catalogue.fits", overwrite=True)


@pytest.fixture
def field(spaced: Path, rng: np.random.Generator) -> SquareField:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval, wcs.wcs.crpix = [53.0, -27.8], [50.5, 40.5]
    wcs.wcs.cd = SCALE / 3600 * np.array([[-0.8, 0.6], [0.6, 0.8]])
    segmentation = np.zeros((80, 100), np.int32)
    for label, (x0, y0, x1, y1) in BOXES.items():
        segmentation[y0:y1, x0:x1] = label
    for band in "ab":
        pixels = rng.normal(0, 1, segmentation.shape).astype(np.float32) + 20 * (segmentation > 0)
        if band == "a":
            pixels[40:, 50:] = np.nan
        pixels = pixels.astype(np.float32)
        header = wcs.to_header()
        header.update(FILTER=band, BUNIT="nJy")
        fits.writeto(spaced / f"{band}.fits", pixels, header)
    fits.writeto(spaced / "map.fits", segmentation)
    x, y = ((np.array(list(BOXES.values()))[:, i] + np.array(list(BOXES.values()))[:, i + 2]) / 2 - 0.5 for i in (0, 1))
    ra, dec = wcs.pixel_to_world_values(x, y)
    table = Table({"ID": list(BOXES), "ra": ra, "dec": dec, "mag_b": [22.0, 23, 24, 25, 26], "z": [0.5, np.nan, 1.5, 2.5, np.nan]})
    table.write(spaced / "catalogue.fits")
    return SquareField(spaced, wcs, segmentation, table)
