from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from deepdisc_ops.config import SkySettings
from deepdisc_ops.data import groups, population, surveys
from deepdisc_ops.errors import ConfigError

LSST = surveys.survey("lsst")
JADES = surveys.survey("jades")
AREA = 100.0


def draw(survey: surveys.Survey = LSST, area: float = AREA, seed: int = 3, **settings: object) -> population.Population:
    return population.draw_population(survey, area, np.random.default_rng(seed), SkySettings(survey=survey.name, **settings))


@pytest.fixture(scope="module")
def sky() -> population.Population:
    return draw()


@pytest.fixture(scope="module")
def galaxies(sky: population.Population) -> population.Population:
    return sky.select(~sky.is_star)


def gold_magnitude(sources: population.Population, survey: surveys.Survey = LSST) -> np.ndarray:
    return surveys.to_magnitude(sources.flux[:, survey.gold_index])


def counts_scatter(expected: float, share: float = 0.25) -> float:
    """Standard deviation of a number of galaxies of which a share comes in groups."""
    weights = 1 / groups.SIZES**2
    together = (weights * groups.SIZES**2).sum() / (weights * groups.SIZES).sum()
    return float(np.sqrt(expected * (1 - share + share * together)))


@pytest.mark.parametrize("survey", ["lsst", "jades", "roman"])
@pytest.mark.parametrize("brighter", [0.0, 1.0, 2.5, 4.0, 5.5])
def test_number_counts_follow_the_law(survey: str, brighter: float) -> None:
    of_survey = surveys.survey(survey)
    area, limit = AREA if survey == "lsst" else 20.0, of_survey.faint_limit - brighter
    sources = draw(of_survey, area)
    expected = population.expected_counts(of_survey, area, limit)
    found = (gold_magnitude(sources.select(~sources.is_star), of_survey) < limit + 1e-9).sum()
    assert abs(found - expected) < 4 * counts_scatter(expected)


def test_without_groups_the_counts_are_poisson_and_follow_the_density() -> None:
    area = 2.0
    expected = 0.5 * (population.expected_counts(LSST, area, LSST.faint_limit) + LSST.stars_per_arcmin2 * area)
    counts = [len(draw(area=area, seed=seed, clustering=0.0, density=0.5)) for seed in range(200)]
    assert np.mean(counts) == pytest.approx(expected, abs=4 * np.sqrt(expected / 200))
    assert np.var(counts) == pytest.approx(expected, rel=0.4)


def test_the_counts_bend_without_a_step() -> None:
    limits = np.array([24.9, 25.0, 25.1, 29.0, 30.0])
    below, at, above, faint, fainter = (population.expected_counts(JADES, 1.0, limit) for limit in limits)
    assert (above - at) / (at - below) == pytest.approx(10**0.0255, rel=0.01)  # the mean of slopes 0.31 and 0.2, 0.1 mag apart
    assert 900 < fainter < 1400  # JADES lists 94,000 sources in some 70 square arcminutes
    assert np.log10(fainter / faint) == pytest.approx(0.2, abs=0.03)


def test_redshifts_deepen_with_magnitude_as_in_dc2(galaxies: population.Population) -> None:
    """cosmoDC2, i < 25.3: 0.65 at 21-22, 0.86 at 23-24, 0.97 at 24.5-25, 0.885 in all."""
    magnitude = gold_magnitude(galaxies)
    for low, high, median in ((21, 22, 0.65), (23, 24, 0.86), (24.5, 25, 0.97), (0, 25.3, 0.885)):
        inside = (magnitude >= low) & (magnitude < high)
        assert np.median(galaxies.redshift[inside]) == pytest.approx(median, abs=0.08)


def test_redshifts_spread_as_in_dc2(galaxies: population.Population) -> None:
    gold = galaxies.redshift[gold_magnitude(galaxies) < 25.3]
    np.testing.assert_allclose(np.percentile(gold, [10, 90]), [0.34, 1.53], atol=0.1)


@pytest.mark.parametrize(
    ("low", "high", "colours"),
    [
        (0.2, 0.6, [1.10, 1.12, 0.47, 0.21, 0.16]),
        (0.6, 1.0, [0.32, 0.76, 0.89, 0.30, 0.13]),
        (1.0, 1.4, [-0.07, 0.26, 0.35, 0.58, 0.25]),
        (1.4, 2.0, [0.06, -0.02, 0.12, 0.14, 0.33]),
    ],
)
def test_colours_are_near_those_of_dc2(galaxies: population.Population, low: float, high: float, colours: list[float]) -> None:
    """Medians of cosmoDC2 at i < 24.8: the templates are within 0.15 mag, 0.25 in u-g."""
    magnitudes = surveys.to_magnitude(galaxies.flux)
    inside = (magnitudes[:, 3] < 24.8) & (galaxies.redshift > low) & (galaxies.redshift < high)
    difference = np.median(-np.diff(magnitudes[inside], axis=1), axis=0) - colours
    assert (np.abs(difference) < [0.25, 0.15, 0.15, 0.15, 0.15]).all()


def test_the_lyman_break_passes_through_the_u_band(galaxies: population.Population) -> None:
    magnitudes = surveys.to_magnitude(galaxies.flux)
    u_minus_g = magnitudes[:, 0] - magnitudes[:, 1]
    assert np.median(u_minus_g[galaxies.redshift > 2.7]) > np.median(u_minus_g[np.abs(galaxies.redshift - 1.7) < 0.2]) + 0.3


def test_jades_sees_galaxies_that_drop_out_of_its_bluest_bands() -> None:
    sources = draw(JADES, 20.0)
    redshift, magnitudes = sources.redshift, surveys.to_magnitude(sources.flux)
    assert 0.01 < (redshift > 6).mean() < 0.08
    assert (redshift > 9).any()
    assert redshift.max() <= JADES.max_redshift
    dropout = magnitudes[:, 0] - magnitudes[:, 2]
    assert np.median(dropout[redshift > 7.2]) > 3
    assert np.percentile(dropout[(redshift > 1) & (redshift < 4)], 95) < 2.5


@pytest.mark.parametrize("survey", sorted(surveys.SURVEYS))
def test_values_are_physical(survey: str) -> None:
    of_survey = surveys.survey(survey)
    sources = draw(of_survey, 20.0)
    assert (sources.flux > 0).all()
    assert min(sources.disc_flux.min(), sources.bulge_flux.min(), sources.knot_flux.min()) >= 0
    assert ((sources.axis_ratio > 0.1) & (sources.axis_ratio <= 1)).all()
    galaxy = ~sources.is_star
    assert (sources.disc_radius[galaxy] > 0).all()
    assert ((sources.redshift[galaxy] > 0) & (sources.redshift[galaxy] <= of_survey.max_redshift)).all()
    assert (sources.redshift[sources.is_star] == 0).all()
    assert (gold_magnitude(sources, of_survey)[galaxy] > population.BRIGHT_LIMIT - 1e-6).all()
    assert (gold_magnitude(sources, of_survey)[~galaxy] > population.STAR_BRIGHT_LIMIT - 1e-6).all()


def test_the_same_seed_gives_the_same_sky_whatever_the_years() -> None:
    one, other = (draw(area=2.0, years=years) for years in (1.0, 10.0))
    for field in fields(population.Population):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("colours", ["templates", "dc2"])
def test_a_sky_of_nothing_is_empty(share: float, colours: str) -> None:
    for empty in (draw(area=0.0, clustering=share, colours=colours), draw(density=0.0, clustering=share, colours=colours)):
        assert len(empty) == 0
        assert empty.flux.shape == (0, 6)
        assert len(population.draw_positions(empty, LSST, 10, 10, np.random.default_rng(0))[0]) == 0


def test_painted_colours_need_lsst() -> None:
    with pytest.raises(ConfigError, match="'dc2' are photometry of LSST, the survey is 'hsc'"):
        draw(surveys.survey("hsc"), colours="dc2")


def test_knots_are_the_discs_light_moved_and_bluer() -> None:
    with_knots, without = draw(area=20.0), draw(area=20.0, knots=False)
    np.testing.assert_allclose(with_knots.flux, without.flux)
    assert not without.knot_flux.any()
    assert not without.knot_offsets.any()
    np.testing.assert_array_equal(with_knots.bulge_flux, without.bulge_flux)
    assert (with_knots.knot_flux <= population.KNOT_CEILING * without.disc_flux * (1 + 1e-9)).all()
    own = with_knots.knot_flux[:, LSST.gold_index] > 0
    blue = with_knots.knot_flux[own, 1] / with_knots.knot_flux[own, LSST.gold_index]
    assert np.mean(blue >= without.disc_flux[own, 1] / without.disc_flux[own, LSST.gold_index]) > 0.95
    assert not own[with_knots.is_star].any()


def test_more_distant_discs_have_more_knots() -> None:
    sources = draw(clustering=0.0)
    has = sources.knot_flux[:, LSST.gold_index] > 0
    redshift = sources.redshift
    assert has[redshift > 1].mean() > has[(redshift > 0) & (redshift < 0.4)].mean() + 0.1


def test_knots_lie_in_the_inclined_disc(galaxies: population.Population) -> None:
    own = galaxies.knot_flux[:, LSST.gold_index] > 0
    assert not galaxies.knot_offsets[~own].any()
    chosen = galaxies.select(own)
    cos, sin = np.cos(chosen.angle)[:, None], np.sin(chosen.angle)[:, None]
    x, y = chosen.knot_offsets[..., 0], chosen.knot_offsets[..., 1]
    along, across = x * cos + y * sin, y * cos - x * sin
    stretch = np.sqrt(chosen.axis_ratio)[:, None]
    length = chosen.disc_radius[:, None] / population.EXPONENTIAL_RADIUS
    radius = np.hypot(along * stretch, across / stretch) / length
    assert radius.max() < population.KNOT_REACH + 1e-9
    assert np.median(radius) == pytest.approx(1.55, abs=0.05)  # that of x exp(-x) cut at 4
    flat = chosen.axis_ratio < 0.35
    assert np.std(across[flat]) < 0.5 * np.std(along[flat])
    places = [len(np.unique(knots, axis=0)) for knots in chosen.knot_offsets[:500]]
    assert set(places) == set(range(1, population.KNOTS + 1))


def test_groups_hold_their_share_and_lie_at_one_redshift(sky: population.Population, galaxies: population.Population) -> None:
    assert (sky.group[sky.is_star] == -1).all()
    grouped = galaxies.group >= 0
    assert grouped.mean() == pytest.approx(0.25, abs=0.05)
    _, sizes = np.unique(galaxies.group[grouped], return_counts=True)
    assert groups.SIZES[0] <= sizes.min() <= sizes.max() <= groups.SIZES[-1]
    spreads = [np.ptp(galaxies.redshift[galaxies.group == number]) for number in np.unique(galaxies.group[grouped])]
    assert np.median(spreads) < 0.003


@pytest.mark.parametrize("area", [1.0, 100.0])
def test_groups_leave_redshifts_and_magnitudes_as_they_are(area: float) -> None:
    """A group has one redshift, so that it takes many to see the distribution; they may come from many small skies."""
    grouped = [draw(area=area, seed=seed, clustering=0.9, density=0.5) for seed in range(round(200 / area))]
    alone = draw(area=100.0, clustering=0.0)
    for column in (lambda sources: sources.redshift, gold_magnitude):
        one = np.concatenate([column(sky.select(~sky.is_star)) for sky in grouped])
        assert ks_2samp(one, column(alone.select(~alone.is_star))).statistic < 0.05


@pytest.mark.parametrize("colours", ["templates", "dc2"])
def test_galaxies_in_groups_are_redder_but_all_together_are_not(colours: str) -> None:
    def near(share: float) -> population.Population:
        sources = draw(area=200.0, colours=colours, clustering=share)
        magnitude = gold_magnitude(sources)
        return sources.select((sources.redshift > 0.3) & (sources.redshift < 0.7) & (magnitude < 25))

    def colour(sources: population.Population) -> np.ndarray:
        return surveys.to_magnitude(sources.flux[:, 1]) - gold_magnitude(sources)

    mixed, alone = near(0.25), near(0.0)
    member = mixed.group >= 0
    assert colour(mixed)[member].mean() > colour(mixed)[~member].mean() + 0.08
    assert colour(mixed).mean() == pytest.approx(colour(alone).mean(), abs=0.06)


def test_members_of_groups_are_clustered_and_the_field_is_not() -> None:
    side = 1024

    def pairs(sources: population.Population, reach: float) -> float:
        """Pairs closer than ``reach`` pixels, across the edges, relative to a uniform sky."""
        x, y = population.draw_positions(sources, LSST, side, side, np.random.default_rng(5))
        assert ((x >= -0.5) & (x < side - 0.5) & (y >= -0.5) & (y < side - 0.5)).all()
        apart = [np.abs(c[:, None] - c[None, :]) for c in (x, y)]
        distance = np.hypot(*[np.minimum(a, side - a) for a in apart])
        close = (distance < reach).sum() - len(x)
        return float(close / (len(x) * (len(x) - 1) * np.pi * reach**2 / side**2))

    skies = [draw(area=(side * LSST.pixel_scale / 60) ** 2, seed=seed) for seed in range(5)]
    grouped, field = ([sky.select(chosen(sky.group)) for sky in skies] for chosen in (lambda g: g >= 0, lambda g: g < 0))
    near, far, everywhere = (np.mean([pairs(sky, reach) for sky in grouped]) for reach in (15.0, 60.0, 250.0))
    assert near > 1.4
    assert near > far > everywhere > 1
    assert np.mean([pairs(sky, 40.0) for sky in field]) == pytest.approx(1.0, abs=0.03)


def test_positions_cover_the_image_evenly() -> None:
    drawn = [
        population.draw_positions(draw(area=12.0, seed=s, clustering=1.0), LSST, 640, 320, np.random.default_rng(s))
        for s in range(12)
    ]
    for axis, side in ((0, 640), (1, 320)):
        values = np.concatenate([xy[axis] for xy in drawn])
        shares = np.histogram(values, bins=4, range=(-0.5, side - 0.5))[0] / len(values)
        np.testing.assert_allclose(shares, 0.25, atol=0.025)


def test_milky_way_dust_takes_most_from_the_blue() -> None:
    passed = population.attenuation(LSST, 0.1)
    assert (np.diff(passed) > 0).all()
    assert (population.attenuation(LSST, 0.0) == 1).all()


@given(st.lists(st.floats(0, 3), min_size=0, max_size=5))
def test_attenuation_of_many_is_that_of_each(ebv: list[float]) -> None:
    together = population.attenuation(LSST, np.array(ebv))
    assert together.shape == (len(ebv), len(LSST.bands))
    for value, row in zip(ebv, together, strict=True):
        np.testing.assert_allclose(row, population.attenuation(LSST, value))


def test_dust_dims_every_part_source_by_source(sky: population.Population) -> None:
    factor = population.attenuation(LSST, np.linspace(0, 0.3, len(sky)))
    dimmed = sky.dimmed(factor)
    np.testing.assert_allclose(dimmed.flux, sky.flux * factor)
    np.testing.assert_allclose(dimmed.knot_flux, sky.knot_flux * factor)
