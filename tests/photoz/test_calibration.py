from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from scipy.optimize import check_grad

from deepdisc_ops.errors import CatalogError, ConfigError
from deepdisc_ops.photoz import metrics
from deepdisc_ops.photoz.calibration import PARTS, Calibration, _Fit, _hats, calibrate

Mixture = tuple[np.ndarray, np.ndarray, np.ndarray]


def wrong_mixtures(n: int, seed: int) -> tuple[Mixture, np.ndarray, np.ndarray]:
    """Mixtures, magnitudes and redshifts: faint objects have too narrow densities, and all are shifted."""
    rng = np.random.default_rng(seed)
    w, m, s = rng.dirichlet(np.ones(3), n), rng.uniform(0.5, 2, (n, 3)), rng.uniform(0.03, 0.1, (n, 3))
    mag = rng.uniform(20, 25, n)
    component = (rng.random((n, 1)) > w.cumsum(1)[:, :-1]).sum(1)
    row = np.arange(n)
    true_width = np.where(mag > 22.5, 1.6, 1.0) * s[row, component]
    mean = m[row, component]
    return (w, m, s), mag, np.maximum(rng.normal(mean + 0.02 * (1 + mean), true_width), 0)


def test_what_was_wrong_is_put_right_on_other_objects(rng: np.random.Generator) -> None:
    mixture, mag, z = wrong_mixtures(3000, 1)
    found = calibrate(*mixture, mag, z, band="i")
    other, other_mag, other_z = wrong_mixtures(3000, 2)
    before = metrics.density_metrics(*other, other_z, rng, samples=5)
    after = metrics.density_metrics(*found.apply(*other, other_mag), other_z, rng, samples=5)
    assert before.ks.value > 0.08
    assert after.ks.value < 0.03
    assert after.nll.value < before.nll.value - 0.05
    assert np.mean(found.shift) == pytest.approx(0.02, abs=0.004)
    assert np.exp(found.log_width[0]) == pytest.approx(1, abs=0.15)
    assert np.exp(found.log_width[-1]) == pytest.approx(1.6, rel=0.12)
    assert found.nll_after < found.nll_before


def test_right_densities_are_hardly_changed(rng: np.random.Generator) -> None:
    n = 2000
    m, s = rng.uniform(0.5, 2, (n, 1)), rng.uniform(0.03, 0.1, (n, 1))
    found = calibrate(np.ones((n, 1)), m, s, rng.uniform(20, 25, n), rng.normal(m, s)[:, 0], band="i")
    assert np.abs(found.shift).max() < 0.004
    assert np.abs(found.log_width).max() < 0.1


def test_it_stays_a_mixture_and_survives_json_and_yaml() -> None:
    mixture, mag, z = wrong_mixtures(400, 3)
    found = calibrate(*mixture, mag, z, band="i")
    w, m, s = found.apply(*mixture, mag)
    np.testing.assert_allclose(w.sum(1), 1)
    assert (s > 0).all()
    order = np.argsort(mixture[1], axis=1)
    assert (np.diff(np.take_along_axis(m, order, 1), axis=1) >= 0).all()
    for again in (json.loads(json.dumps(found.as_dict())), yaml.safe_load(yaml.safe_dump(found.as_dict()))):
        assert Calibration.from_dict(again) == found


def test_the_gradient_is_that_of_the_function(rng: np.random.Generator) -> None:
    mixture, mag, z = wrong_mixtures(50, 4)
    fit = _Fit(*mixture, z, _hats(np.array([20.0, 22.0, 25.0]), mag), PARTS)
    x = rng.normal(size=9)
    assert check_grad(lambda x: fit(x)[0], lambda x: fit(x)[1], x) < 1e-5 * np.linalg.norm(fit(x)[1])


def test_parts_that_are_not_asked_stay() -> None:
    mixture, mag, z = wrong_mixtures(300, 5)
    found = calibrate(*mixture, mag, z, band="i", parts=("width",), knots=1)
    assert found.shift == (0,)
    assert found.log_temperature == (0,)
    np.testing.assert_allclose(found.apply(*mixture, mag)[0], mixture[0])


def test_objects_without_a_magnitude_and_missing_components(rng: np.random.Generator) -> None:
    mixture, mag, z = wrong_mixtures(400, 6)
    found = calibrate(*mixture, mag, z, band="i")
    w, m, s = (part[:3].copy() for part in mixture)
    w[0] = 0
    w[1, 2] = 0
    calibrated = found.apply(w, m, s, [np.nan, np.inf, 99.0])
    faintest = found.apply(w, m, s, np.full(3, found.knots[-1]))
    for one, other in zip(calibrated, faintest, strict=True):
        np.testing.assert_array_equal(one, other)
    assert calibrated[0][0].tolist() == [0, 0, 0]
    assert calibrated[0][1, 2] == 0
    empty = found.apply(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 3)), [])
    assert [part.shape for part in empty] == [(0, 3)] * 3


def test_bad_calibrations_are_named() -> None:
    mixture, mag, z = wrong_mixtures(400, 7)
    good = calibrate(*mixture, mag, z, band="i").as_dict()
    for change, message in (
        ({"version": 7}, "version 7"),
        ({"knots": [3.0, 2.0]}, "ascending knots"),
        ({"log_width": [9.0] * len(good["knots"])}, "width is"),
        ({"shift": ["x"]}, "cannot be read"),
        ({"more": 1}, "has the entries"),
    ):
        with pytest.raises(ConfigError, match=message):
            Calibration.from_dict(good | change)
    with pytest.raises(CatalogError, match="49 objects to calibrate on"):
        calibrate(*(part[:49] for part in mixture), mag[:49], z[:49], band="i")
    with pytest.raises(CatalogError, match="1 of 400 magnitudes"):
        calibrate(*mixture, np.r_[np.nan, mag[1:]], z, band="i")
