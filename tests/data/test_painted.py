from __future__ import annotations

import h5py
import numpy as np
import pytest
from scipy.stats import ks_2samp

from deepdisc_ops.config import SkySettings
from deepdisc_ops.data import painted, population, surveys

LSST = surveys.survey("lsst")


@pytest.fixture(scope="module")
def real() -> dict[str, np.ndarray]:
    """Photometry of the galaxies of the validation file, which nothing was fitted to."""
    with h5py.File(str(surveys.example_data("testdata", "test_dc2_validation_9816.hdf5"))) as file:
        table = file["photometry"]
        columns = {name: np.stack([table[f"{name}_{b}_lsst"][:] for b in LSST.bands], axis=1) for name in ("mag", "mag_err")}
        return columns | {"redshift": table["redshift"][:]}


@pytest.fixture(scope="module")
def sky() -> population.Population:
    settings = SkySettings(colours="dc2", clustering=0.0)
    drawn = population.draw_population(LSST, 300.0, np.random.default_rng(4), settings)
    return drawn.select(~drawn.is_star)


def observed(sky: population.Population, real: dict[str, np.ndarray]) -> np.ndarray:
    """Magnitudes of the sky with noise like that of the real photometry; 99 where nothing is detected."""
    flux, rng = sky.flux.copy(), np.random.default_rng(8)
    for band in range(6):
        faint = real["mag"][:, band] < 90
        noise = np.median(surveys.to_njy(real["mag"][faint, band]) * real["mag_err"][faint, band] * 0.921)
        flux[:, band] += noise * rng.standard_normal(len(flux))
    return np.where(flux > 0, surveys.to_magnitude(flux), 99.0)


def test_colours_are_those_of_the_validation_file(sky: population.Population, real: dict[str, np.ndarray]) -> None:
    gold = real["mag"][:, 3] < 25.3
    magnitudes = observed(sky, real)[surveys.to_magnitude(sky.flux[:, 3]) < 25.3]
    for band in range(5):
        ours = magnitudes[:, band] - magnitudes[:, band + 1]
        theirs = real["mag"][gold, band] - real["mag"][gold, band + 1]
        assert ks_2samp(ours, theirs).statistic < 0.06, LSST.bands[band]


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.5), (0.5, 0.8), (0.8, 1.1), (1.1, 1.5), (1.5, 2.2)])
def test_colours_at_each_redshift_are_those_of_the_validation_file(
    sky: population.Population, real: dict[str, np.ndarray], low: float, high: float
) -> None:
    magnitudes = surveys.to_magnitude(sky.flux)
    ours = (magnitudes[:, 3] < 24.5) & (sky.redshift > low) & (sky.redshift < high)
    theirs = (real["mag"][:, 3] < 24.5) & (real["redshift"] > low) & (real["redshift"] < high)
    medians = [np.median(-np.diff(m, axis=1), axis=0) for m in (magnitudes[ours], real["mag"][theirs])]
    np.testing.assert_allclose(medians[0][1:], medians[1][1:], atol=0.07)
    assert medians[0][0] == pytest.approx(medians[1][0], abs=0.15)  # u is noisy in the file


def test_redshifts_are_those_of_the_validation_file(sky: population.Population, real: dict[str, np.ndarray]) -> None:
    magnitude = surveys.to_magnitude(sky.flux[:, 3])
    for low, high in ((21.0, 23.0), (23.0, 24.5), (24.5, 25.3)):
        ours = sky.redshift[(magnitude > low) & (magnitude < high)]
        theirs = real["redshift"][(real["mag"][:, 3] > low) & (real["mag"][:, 3] < high)]
        assert ks_2samp(ours, theirs).statistic < 0.06


def test_beyond_the_file_redshifts_go_on_rising(sky: population.Population) -> None:
    magnitude = surveys.to_magnitude(sky.flux[:, 3])
    at = [np.median(sky.redshift[np.abs(magnitude - centre) < 0.2]) for centre in (25.0, 25.6, 26.5, 27.4)]
    assert at == sorted(at)
    assert at[1] - at[0] < 0.15


def test_no_galaxy_is_a_copy(sky: population.Population) -> None:
    colours = np.round(-np.diff(surveys.to_magnitude(sky.flux), axis=1), 5)
    assert len(np.unique(colours, axis=0)) == len(sky)
    lender = painted.lenders("all")
    assert len(np.intersect1d(np.round(lender.redshift, 9), np.round(sky.redshift, 9))) < 0.01 * len(sky)


def test_parts_are_disjoint_and_fixed() -> None:
    train, test, both = (set(painted.lenders(part).identity.tolist()) for part in ("train", "test", "all"))
    assert not train & test
    assert train | test == both
    assert len(train) / len(both) == pytest.approx(painted.TRAIN_SHARE, abs=0.02)
    assert painted.in_part(np.array([8062500000, 8062500062]), "train").tolist() == [True, True]


def test_a_part_has_the_colours_of_the_whole() -> None:
    train, test = painted.lenders("train"), painted.lenders("test")
    for column in ("redshift", "magnitude"):
        assert ks_2samp(getattr(train, column), getattr(test, column)).pvalue > 0.01


def test_parts_and_knots_share_the_painted_light() -> None:
    """What bulge, disc and knots add up to does not depend on how they share it."""
    with_knots, without = (
        population.draw_population(LSST, 5.0, np.random.default_rng(1), SkySettings(colours="dc2", knots=knots))
        for knots in (True, False)
    )
    np.testing.assert_allclose(with_knots.flux, without.flux)
    assert (with_knots.knot_flux[~with_knots.is_star].sum(axis=0) > 0).all()


def test_undetected_bands_get_the_colours_of_neighbours() -> None:
    source = painted.lenders("all")
    assert np.isfinite(source.colours).all()
    assert np.isfinite(source.scatter).all()
    assert (source.colours[:, 0] < 8).all()
    assert (source.scatter[:, 0] > 0).all()
    assert not source.colours[:, 3].any()
    assert not source.scatter[:, 3].any()


def test_redder_lenders_give_redder_galaxies() -> None:
    source, magnitude = painted.lenders("all"), np.full(4000, 23.0)

    def redness(redder: float) -> float:
        seen = painted.paint(source, magnitude, lambda faint: faint, redder, np.random.default_rng(0))
        return float(seen.redness.mean())

    assert redness(0.0) < 0.42 < redness(0.5) < 0.58 < redness(1.0)
    assert redness(0.5) == pytest.approx(0.5, abs=0.03)
