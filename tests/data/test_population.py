from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepdisc_ops.data import population, surveys

LSST = surveys.survey("lsst")
AREA = 60.0


@pytest.fixture(scope="module")
def sky() -> population.Population:
    return population.draw_population(LSST, AREA, np.random.default_rng(3))


@pytest.fixture(scope="module")
def galaxies(sky: population.Population) -> population.Population:
    return sky.select(~sky.is_star)


def gold_magnitude(sources: population.Population) -> np.ndarray:
    return surveys.to_magnitude(sources.flux[:, LSST.gold_index])


@pytest.mark.parametrize("limit", [22.0, 24.0, 25.3, 27.0])
def test_number_counts_follow_the_law(galaxies: population.Population, limit: float) -> None:
    expected = population.expected_counts(AREA, limit)
    assert abs((gold_magnitude(galaxies) < limit).sum() - expected) < 4 * np.sqrt(expected)


def test_density_multiplies_the_counts() -> None:
    count = len(population.draw_population(LSST, AREA, np.random.default_rng(0), density=0.1))
    expected = 0.1 * (population.expected_counts(AREA, population.FAINT_LIMIT) + LSST.stars_per_arcmin2 * AREA)
    assert abs(count - expected) < 4 * np.sqrt(expected)


def test_redshifts_deepen_with_magnitude_as_in_dc2(galaxies: population.Population) -> None:
    """cosmoDC2, i < 25.3: 0.65 at 21-22, 0.87 at 23-24, 1.00 at 24.5-25, 0.89 in all."""
    magnitude = gold_magnitude(galaxies)
    for low, high, median in ((21, 22, 0.65), (23, 24, 0.87), (24.5, 25, 1.0), (0, 25.3, 0.89)):
        inside = (magnitude >= low) & (magnitude < high)
        assert np.median(galaxies.redshift[inside]) == pytest.approx(median, abs=0.12)


def test_colours_are_near_those_of_dc2(galaxies: population.Population) -> None:
    """cosmoDC2 at 24 < i < 24.5: u-g 0.13, g-r 0.50, r-i 0.47, i-z 0.27, z-y 0.14."""
    magnitudes = surveys.to_magnitude(galaxies.flux)
    inside = (magnitudes[:, 3] > 24) & (magnitudes[:, 3] < 24.5)
    colours = -np.diff(np.median(magnitudes[inside], axis=0))
    np.testing.assert_allclose(colours, [0.13, 0.50, 0.47, 0.27, 0.14], atol=0.2)


def test_the_lyman_break_passes_through_the_u_band(galaxies: population.Population) -> None:
    magnitudes = surveys.to_magnitude(galaxies.flux)
    u_minus_g = magnitudes[:, 0] - magnitudes[:, 1]
    assert np.median(u_minus_g[galaxies.redshift > 2.7]) > np.median(u_minus_g[np.abs(galaxies.redshift - 1.7) < 0.2]) + 0.5


def test_values_are_physical(sky: population.Population) -> None:
    assert (sky.flux > 0).all()
    assert ((sky.axis_ratio > 0.1) & (sky.axis_ratio <= 1)).all()
    galaxy = ~sky.is_star
    assert (sky.disc_radius[galaxy] > 0).all()
    assert ((sky.redshift[galaxy] > 0) & (sky.redshift[galaxy] <= population.MAX_REDSHIFT)).all()
    assert (sky.redshift[sky.is_star] == 0).all()
    assert (gold_magnitude(sky) > population.BRIGHT_LIMIT - 1e-6).all()


def test_the_same_seed_gives_the_same_sky() -> None:
    one, other = (population.draw_population(LSST, 2.0, np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(one.flux, other.flux)


def test_grid_returns_its_own_nodes() -> None:
    grid = population.spectral_grid(LSST)
    node = grid(np.array([3 * grid.types_step]), grid.dust[[2]], grid.redshift[[40]])
    np.testing.assert_allclose(node[0], grid.magnitudes[3, 2, 40])


@given(st.floats(0, 11), st.floats(0, 0.5), st.floats(0, 3))
def test_dust_reddens_every_spectrum(kind: float, dust: float, redshift: float) -> None:
    grid = population.spectral_grid(LSST)
    clear, dusty = (grid(np.array([kind]), np.array([value]), np.array([redshift]))[0] for value in (dust, dust + 0.1))
    assert (dusty[1] - dusty[4]) > (clear[1] - clear[4])


def test_milky_way_dust_takes_most_from_the_blue() -> None:
    passed = population.attenuation(LSST, 0.1)
    assert (np.diff(passed) > 0).all()
    assert (population.attenuation(LSST, 0.0) == 1).all()
    v_band = population.cardelli(np.array([5500.0]))[0]
    assert v_band == pytest.approx(3.1, rel=0.02)  # R_V
