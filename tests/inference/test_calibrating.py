"""An ensemble's calibration: learned on found galaxies, kept in the folder, applied to every mixture, left out on request."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from deepdisc_ops.config import EnsembleSettings, SkySettings
from deepdisc_ops.data.simulate import simulate_dataset
from deepdisc_ops.errors import CatalogError, ConfigError
from deepdisc_ops.inference.calibrating import learn_calibration, store_calibration
from deepdisc_ops.inference.ensemble import DESCRIPTION, Ensemble, digest
from deepdisc_ops.photoz.calibration import Calibration
from deepdisc_ops.sky.dust import EbvPlane

MODEL = Path(__file__).parents[2] / "models" / "lsst-small"
SHIFTED = Calibration("any", (0.0,), (0.02,), (0.3,), (-0.1,), 100, -0.5, -0.6)


@pytest.fixture
def folder(tiny_ensemble: Path, spaced: Path) -> Path:
    return Path(shutil.copytree(tiny_ensemble, spaced / "ensemble"))


def mixtures(ensemble: Ensemble) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sky = np.random.default_rng(3).normal(scale=20, size=(6, 128, 128)).astype(np.float32)
    boxes = np.array([[10, 10, 21, 21], [60, 60, 75, 71]], np.float32)
    found = ensemble.redshift(sky, boxes, EbvPlane.constant(0.02))
    return found.weights, found.means, found.sigmas


def test_every_mixture_is_recalibrated_unless_the_settings_say_otherwise(folder: Path) -> None:
    before, version = mixtures(Ensemble.load(folder)), digest(folder)
    store_calibration(folder, SHIFTED)
    assert digest(folder) != version
    after = mixtures(Ensemble.load(folder))
    for found, expected in zip(after, SHIFTED.apply(*before, np.full(2, np.nan)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert found.dtype == np.float32
    for found, expected in zip(mixtures(Ensemble.load(folder, settings=EnsembleSettings(calibrated=False))), before, strict=True):
        np.testing.assert_array_equal(found, expected)
    store_calibration(folder, None)
    assert digest(folder) == version


def test_a_calibration_by_magnitude_is_refused_with_the_remedy(folder: Path) -> None:
    two = replace(SHIFTED, knots=(20.0, 25.0), shift=(0.0, 0.1), log_width=(0.0, 0.1), log_temperature=(0.0, 0.1))
    store_calibration(folder, two)
    with pytest.raises(ConfigError, match="calibrate with one knot"):
        Ensemble.load(folder)
    tree = yaml.safe_load((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(yaml.safe_dump(tree | {"calibration": {"version": 1}}))
    with pytest.raises(ConfigError, match="a calibration has the entries"):
        Ensemble.load(folder)


def test_what_a_shifted_ensemble_is_off_by_is_learned(spaced: Path) -> None:
    simulate_dataset(SkySettings(), spaced / "scenes", counts={"calibration": 6}, size=256, seed=21)
    folder = Path(shutil.copytree(MODEL, spaced / "ensemble"))
    plain = learn_calibration(folder, spaced / "scenes").calibration
    assert plain.objects > 120
    assert abs(plain.shift[0]) < 0.02
    assert plain.nll_after <= plain.nll_before
    with pytest.MonkeyPatch.context() as patch:
        look = Ensemble.predict

        def off(self: Ensemble, *args: object, **options: object) -> object:
            found = look(self, *args, **options)  # type: ignore[arg-type]
            return replace(found, means=found.means + 0.05 * (1 + found.means), sigmas=found.sigmas * 1.5)

        patch.setattr(Ensemble, "predict", off)
        learned = learn_calibration(folder, spaced / "scenes")
    assert learned.calibration.shift[0] == pytest.approx(plain.shift[0] - 0.05, abs=0.01)
    assert np.exp(learned.calibration.log_width[0] - plain.log_width[0]) == pytest.approx(1 / 1.5, abs=0.1)
    assert all(after < before for before, after in learned.ks)


def test_too_few_galaxies_are_told(folder: Path, mini_dataset: Path) -> None:
    with pytest.raises(CatalogError, match="expected 50 at least in either half"):
        learn_calibration(folder, mini_dataset, "validation")
