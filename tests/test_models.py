"""The committed ensembles: what models/README.md says of them, on a smaller sky."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.reference import load_reference
from deepdisc_ops.data.simulate import simulate_scene, write_scene
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.inference.mosaic import predict_mosaic
from deepdisc_ops.report import evaluate_files
from deepdisc_ops.sky.catalog import read_catalog, write_catalog
from deepdisc_ops.sky.dust import ebv_source
from deepdisc_ops.sky.images import open_mosaic

MODELS = Path(__file__).parents[1] / "models"
REAL = Path(__file__).parents[2] / "shared" / "data"
needs_real_pixels = pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real HSC pixels is not here")


def catalogue(model: str, image: Path, out: Path, **options: object) -> None:
    ensemble = Ensemble.load(MODELS / model)
    with open_mosaic(image, ensemble.bands, **options) as mosaic:  # type: ignore[arg-type]
        table = predict_mosaic(mosaic, lambda i, ebv: ensemble.predict(i.data, ebv, i.mask), ebv_source("0.03"))
    write_catalog(table, out)


def test_the_lsst_ensemble_is_three_calibrated_members_that_agree(spaced: Path) -> None:
    """Its members went on from `lsst-small`: together they find what that finds, a little less purely, with densities no worse."""
    assert len(Ensemble.load(MODELS / "lsst-ensemble").seats) == 3
    assert Ensemble.load(MODELS / "lsst-ensemble").calibration is not None
    write_scene(simulate_scene(SkySettings(), size=768, seed=4343), spaced / "sky.fits")
    told = {}
    for model in ("lsst-small", "lsst-ensemble"):
        catalogue(model, spaced / "sky.fits", spaced / f"{model}.parquet")
        told[model] = evaluate_files(spaced / f"{model}.parquet", spaced / "sky.fits", spaced / model)
    one, three = told["lsst-small"], told["lsst-ensemble"]
    assert set(read_catalog(spaced / "lsst-ensemble.parquet")["n_members"]) == {2, 3}
    assert three.completeness.value >= one.completeness.value - 0.02
    assert three.purity.value >= one.purity.value - 0.04
    assert three.mean_nll <= one.mean_nll + 0.02


def test_the_dc2_ensemble_knows_the_colours_of_its_sky(spaced: Path) -> None:
    """Its members went on from the three of `lsst-ensemble`, which saw the templates' colours alone."""
    sky = load_reference("lsst_reference_dc2").sky_settings("test")
    write_scene(simulate_scene(sky, size=768, seed=4444), spaced / "sky.fits")
    told = {}
    for model in ("lsst-ensemble", "dc2-ensemble"):
        catalogue(model, spaced / "sky.fits", spaced / f"{model}.parquet")
        told[model] = evaluate_files(spaced / f"{model}.parquet", spaced / "sky.fits", spaced / model)
    before, after = told["lsst-ensemble"], told["dc2-ensemble"]
    assert Ensemble.load(MODELS / "dc2-ensemble").calibration is not None
    assert after.completeness.value >= 0.95
    assert after.lsst.sigma_iqr <= 0.06
    assert after.mean_nll <= before.mean_nll - 0.05


def test_the_lsst_member_on_a_sky_it_has_not_seen(spaced: Path) -> None:
    write_scene(simulate_scene(SkySettings(), size=1024, seed=4242), spaced / "sky.fits")
    catalogue("lsst-small", spaced / "sky.fits", spaced / "catalog.parquet")
    result = evaluate_files(spaced / "catalog.parquet", spaced / "sky.fits", spaced / "evaluation")
    assert result.completeness.value >= 0.96
    assert result.purity.value >= 0.73
    assert result.lsst.sigma_iqr <= 0.055
    assert result.gain_over_constant >= 4
    made = {path.name for path in (spaced / "evaluation").iterdir()}
    assert made >= {"index.html", "metrics.json", "picture.png", "redshifts.png", "pit.png", "densities.png", "completeness.png"}


def test_no_model_names_a_path_of_the_machine_it_was_made_on() -> None:
    for path in MODELS.glob("*/ensemble.yaml"):
        assert "path: /" not in path.read_text(), path
    assert sum(path.stat().st_size for path in MODELS.rglob("*.safetensors")) < 32e6


@needs_real_pixels
def test_hsc_model_finds_the_listed_sources_of_a_real_cutout(spaced: Path) -> None:
    out = spaced / "catalog.parquet"
    catalogue("hsc-small", REAL / "hsc_cosmos_35.npz", out, zero_point=27.0, pixel_scale=0.168, require_wcs=False)
    table = read_catalog(out)
    with np.load(REAL / "hsc_cosmos_35.npz") as file:
        listed = file["catalog"]
    apart = np.hypot(table["x"] - listed["x"][:, None], table["y"] - listed["y"][:, None])
    pairs = linear_sum_assignment(apart)
    assert (apart[pairs] < 3).sum() >= 5
    assert np.isnan(table["ra"]).all()


@needs_real_pixels
def test_hsc_model_gives_cosmos_coordinates(spaced: Path) -> None:
    out = spaced / "catalog.parquet"
    catalogue("hsc-small", REAL / "hsc_cosmos_grizy.fits", out, plane_bands="grizy", zero_point=27.0)
    table = read_catalog(out)
    assert len(table) >= 3
    assert (np.abs(np.asarray(table["ra"]) - 150.33) < 0.01).all()
    assert (np.abs(np.asarray(table["dec"]) - 2.07) < 0.01).all()
