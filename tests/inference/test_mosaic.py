from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import NDArray

from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.simulate import simulate_scene, write_scene
from deepdisc_ops.errors import ImageError
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.inference.mosaic import Predictor, predict_mosaic
from deepdisc_ops.sky.detections import Detections, Flag
from deepdisc_ops.sky.dust import EbvPlane, ebv_source
from deepdisc_ops.sky.images import Mosaic, SkyImage, open_mosaic
from deepdisc_ops.sky.matching import pairwise_iou_candidates
from deepdisc_ops.sky.planes import MemoryPixels, Plane


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "mosaic.fits"
    write_scene(simulate_scene(SkySettings(), size=(300, 200), seed=4), path)
    return path


def predict(mosaic: Mosaic, ensemble: Ensemble, **options: int) -> Table:
    def predictor(image: SkyImage, ebv: EbvPlane):  # type: ignore[no-untyped-def]
        return ensemble.predict(image.data, ebv, image.mask)

    return predict_mosaic(mosaic, predictor, ebv_source("0.03"), **options)


def test_the_order_in_which_windows_end_does_not_matter(scene: Path, tiny_ensemble: Path) -> None:
    ensemble = Ensemble.load(tiny_ensemble)
    with open_mosaic(scene, ensemble.bands) as mosaic:
        one = predict(mosaic, ensemble, window=128, overlap=32)
        three = predict(mosaic, ensemble, window=128, overlap=32, workers=3)
    assert len(one) > 20
    for name in one.colnames:
        np.testing.assert_allclose(one[name], three[name], rtol=1e-5, atol=1e-5)


def test_positions_go_through_the_wcs(scene: Path, tiny_ensemble: Path) -> None:
    ensemble = Ensemble.load(tiny_ensemble)
    with open_mosaic(scene, ensemble.bands) as mosaic:
        table = predict(mosaic, ensemble)
        assert mosaic.wcs is not None
        x, y = mosaic.wcs.world_to_pixel_values(table["ra"], table["dec"])
    np.testing.assert_allclose([x, y], [table["x"], table["y"]], atol=1e-6)


def boxes_on_the_sky(boxes: NDArray[np.float32]) -> Predictor:
    """A detector of known boxes in mosaic pixels: finds what shows in a window, cut at its edges."""

    def predict_window(image: SkyImage, ebv: EbvPlane) -> Detections:
        assert image.wcs is not None
        corner = np.round(-image.wcs.wcs.crpix + ORIGIN).astype(int)
        height, width = image.mask.shape
        shown = np.clip(boxes - np.tile(corner, 2), 0, [width, height] * 2).astype(np.float32)
        size = (shown[:, 2:] - shown[:, :2]).min(axis=1)
        shown = shown[size > 6]
        n, index = len(shown), np.zeros(len(shown), np.int32)
        ones = np.ones((n, 1), np.float32)
        return Detections(shown, ones[:, 0], index, ones, ones, ones / 10, ones[:, 0] / 50, index + 1, index)

    return predict_window


ORIGIN = np.array([500.5, 300.5])


def test_objects_larger_than_the_overlap_are_whole_and_single() -> None:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.crpix = ["RA---TAN", "DEC--TAN"], [10.0, 20.0], ORIGIN
    wcs.wcs.cdelt = [-5e-5, 5e-5]
    pixels = MemoryPixels(np.zeros((600, 1000), np.float32))
    mosaic = Mosaic([Plane("g", Path("memory"), 0, 0, pixels.shape, wcs, 1.0, pixels)], 0.18)
    rng = np.random.default_rng(2)
    small = rng.uniform(10, 560, (60, 2)) * [1.6, 1]
    truth = [[360, 100, 540, 240], [430, 380, 580, 560], [700, 20, 990, 250], [880, 400, 980, 590]]
    truth += [[x, y, x + 12, y + 12] for x, y in small]
    boxes = np.array(truth, np.float32)
    far = pairwise_iou_candidates(boxes, boxes, 0.05)
    boxes = boxes[np.setdiff1d(np.arange(len(boxes)), far[0][far[0] > far[1]])]
    table = predict_mosaic(mosaic, boxes_on_the_sky(boxes), ebv_source("0"), window=512, overlap=64)
    found = np.stack([table[name] for name in ("x0", "y0", "x1", "y1")], axis=1)
    assert (np.asarray(table["flags"]) & Flag.TRUNCATED == 0).all()
    order = [np.lexsort(one.T) for one in (found, boxes)]
    np.testing.assert_array_equal(found[order[0]], boxes[order[1]])


@pytest.mark.parametrize("order", [1, -1])
def test_pieces_of_a_neighbour_are_not_taken_for_pieces_of_the_object(order: int) -> None:
    """Two objects larger than the overlap, cut by the same edge; a piece of one overlaps the other."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.crpix = ["RA---TAN", "DEC--TAN"], [10.0, 20.0], ORIGIN
    wcs.wcs.cdelt = [-5e-5, 5e-5]
    pixels = MemoryPixels(np.zeros((600, 1000), np.float32))
    mosaic = Mosaic([Plane("g", Path("memory"), 0, 0, pixels.shape, wcs, 1.0, pixels)], 0.18)
    truth = np.array([[300, 380, 400, 560], [348, 380, 448, 530]][::order], np.float32)
    whole = predict_mosaic(mosaic, boxes_on_the_sky(truth), ebv_source("0"), window=1024, overlap=64)
    table = predict_mosaic(mosaic, boxes_on_the_sky(truth), ebv_source("0"), window=512, overlap=64)
    assert len(whole) == 2
    for name in ("x0", "y0", "x1", "y1", "flags"):
        np.testing.assert_array_equal(table[name], whole[name])


def test_without_a_valid_pixel_there_is_no_catalogue(scene: Path, tiny_ensemble: Path, spaced: Path) -> None:
    with fits.open(scene) as file:
        file["G"].data[:] = np.nan
        file.writeto(spaced / "nan.fits")
    ensemble = Ensemble.load(tiny_ensemble)
    with (
        open_mosaic(spaced / "nan.fits", ensemble.bands) as mosaic,
        pytest.raises(ImageError, match="no pixel of 300x200 is valid"),
    ):
        predict(mosaic, ensemble)
