from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from deepdisc_ops.data.simulate import simulate_scene, write_scene
from deepdisc_ops.data.surveys import survey
from deepdisc_ops.errors import ImageError
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.inference.mosaic import predict_mosaic
from deepdisc_ops.sky.dust import EbvPlane, ebv_source
from deepdisc_ops.sky.images import Mosaic, SkyImage, open_mosaic


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "mosaic.fits"
    write_scene(simulate_scene(survey("lsst"), size=(300, 200), seed=4), path)
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
