"""Laws of the mosaic with a trained network: where the windows lie hardly matters, and their seams do not show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.table import Table

from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.simulate import simulate_scene
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.inference.mosaic import Survey, predict_mosaic
from deepdisc_ops.sky.dust import ebv_source
from deepdisc_ops.sky.images import Mosaic
from deepdisc_ops.sky.matching import match_in_plane
from deepdisc_ops.sky.planes import MemoryPixels, Plane

MODEL = Path(__file__).parents[2] / "models" / "lsst-small"
SIDE = 1536
WINDOWS = ((1024, 64), (640, 96))
NEAR_SEAM = 16.0


@pytest.fixture(scope="module")
def catalogs() -> list[Table]:
    scene = simulate_scene(SkySettings(), size=SIDE, seed=77)
    planes = [
        Plane(band, Path("memory"), 0, 0, plane.shape, scene.wcs, 1.0, MemoryPixels(np.asarray(plane, np.float32)))
        for band, plane in zip(scene.survey.bands, scene.image, strict=True)
    ]
    ensemble = Ensemble.load(MODEL)
    mosaic = Mosaic(planes, 0.2).select(ensemble.bands)
    return [
        predict_mosaic(
            mosaic, lambda i, ebv: ensemble.predict(i.data, ebv, i.mask), ebv_source("0.03"), window=window, overlap=overlap
        )
        for window, overlap in WINDOWS
    ]


def centres(catalog: Table) -> np.ndarray:
    return np.stack([catalog["x"], catalog["y"]], axis=1)


@pytest.mark.slow
def test_two_tilings_find_the_same_objects_with_the_same_redshifts(catalogs: list[Table]) -> None:
    one, other = catalogs
    i, j = match_in_plane(centres(one), centres(other), 2.5)
    assert len(i) >= 0.99 * max(len(one), len(other))
    apart = np.abs(np.asarray(one["z_median"])[i] - np.asarray(other["z_median"])[j]) / np.asarray(one["z_std"])[i]
    assert np.median(apart) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_seams_do_not_show_in_the_density_of_objects(catalogs: list[Table], which: int) -> None:
    catalog, (window, overlap) = catalogs[which], WINDOWS[which]
    tiles = Survey(SIDE, SIDE, window, overlap).tiles()
    for axis, column in ((0, "x"), (1, "y")):
        seams = sorted({tile.core[axis] for tile in tiles} - {0})
        distance = np.min([np.abs(np.asarray(catalog[column]) + 0.5 - seam) for seam in seams], axis=0)
        near, expected = (distance < NEAR_SEAM).sum(), len(catalog) * len(seams) * 2 * NEAR_SEAM / SIDE
        assert abs(near - expected) < 4 * np.sqrt(expected), (column, near, expected)
