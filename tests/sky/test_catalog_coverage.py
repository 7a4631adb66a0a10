from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy import units
from catalogs import catalog, tangent
from scipy import ndimage

from deepdisc_ops.errors import SetupError
from deepdisc_ops.sky.catalog import coverage, open_catalog
from deepdisc_ops.sky.catalog.coverage import Coverage, cell_order, covered_cells
from deepdisc_ops.sky.coordinates import icrs_positions
from deepdisc_ops.sky.tiling import Window, plan

SIDE = 1024
WCS = tangent()
ORDER = cell_order(0.2)


@pytest.fixture(scope="module")
def valid() -> np.ndarray:
    """A mosaic with a hole, a missing corner and a dead row."""
    pixels = np.ones((SIDE, SIDE), bool)
    pixels[300:600, 400:700] = False
    pixels[900:, 900:] = False
    pixels[100] = False
    return pixels


def covered(valid: np.ndarray, tile: int, overlap: int) -> Coverage:
    area = Coverage(ORDER)
    for window in (each.window for each in plan(SIDE, SIDE, tile, overlap)):
        area.add(covered_cells(WCS, window, valid[window.y0 : window.y1, window.x0 : window.x1], ORDER))
    return area


def test_cells_are_22_to_45_pixels_wide() -> None:
    for scale in (0.03, 0.168, 0.2, 0.263, 1.0):
        assert 22 < coverage.CELL_ARCSEC / 2 ** cell_order(scale) / scale < 46


def test_mocpy_reads_the_area_that_was_searched(spaced: Path, valid: np.ndarray) -> None:
    from mocpy import MOC

    path, area = spaced / "area.moc.fits", covered(valid, 256, 32)
    with open_catalog([path, spaced / "catalog.fits"], (), (), {}, WCS) as writer:
        writer.write(catalog(5, WCS))
        writer.cover(area)
    moc = MOC.from_fits(path)
    true_area = valid.sum() * (0.2 / 3600) ** 2
    assert moc.sky_fraction * 4 * np.pi * np.degrees(1) ** 2 == pytest.approx(area.area_deg2)
    assert true_area < area.area_deg2 < 1.15 * true_area
    y, x = np.mgrid[:SIDE:16, :SIDE:16]
    ra, dec = icrs_positions(WCS, x.ravel(), y.ravel())
    inside = moc.contains_lonlat(ra * units.deg, dec * units.deg).reshape(x.shape)
    surrounded = ndimage.binary_erosion(valid, np.ones((2 * coverage.BLOCK + 1,) * 2))
    assert inside[surrounded[::16, ::16]].all()
    assert not inside[22:35, 29:40].any()


def test_the_map_does_not_depend_on_the_windows(valid: np.ndarray) -> None:
    maps = [covered(valid, tile, overlap) for tile, overlap in ((1024, 0), (256, 32), (512, 64))]
    for other in maps[1:]:
        assert other.area_deg2 == pytest.approx(maps[0].area_deg2)


def test_windows_without_a_valid_pixel_add_nothing() -> None:
    area = Coverage(ORDER)
    area.add(covered_cells(WCS, Window(0, 0, 67, 41), np.zeros((41, 67), bool), ORDER))
    assert area.area_deg2 == 0
    area.add(covered_cells(WCS, Window(0, 0, 1, 1), np.ones((1, 1), bool), ORDER))
    assert area.area_deg2 > 0


def test_a_missing_package_is_told_before_the_work(spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match="mocpy, which writes maps of coverage .* pip install mocpy"):
        open_catalog([spaced / "area.moc.fits"], (), (), {})


def test_an_area_that_was_not_told_is_an_error(spaced: Path) -> None:
    with pytest.raises(ValueError, match="tell it by `cover`"), open_catalog([spaced / "area.moc.fits"], (), (), {}) as writer:
        writer.write(catalog(1))
    assert not list(spaced.iterdir())
