"""A seeded catalogue of galaxies and stars that looks like the deep sky.

Galaxies follow the number counts of the LSST Science Book (v2, section 3.7) and a redshift distribution p(z | i) fitted to
cosmoDC2, with the tail of high redshifts that deep infrared surveys find. They are a bulge, a disc and star-forming knots with
spectra of their own (`spectra`), and a share of them lives in groups (`groups`). Colours come from the templates, or redshifts and
colours from real photometry (`painted`); the templates then still tell how the light of a band is shared among the parts.

Glossary: N sources, C bands.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache

import numpy as np
from astropy.cosmology import FlatLambdaCDM
from numpy.typing import NDArray

from deepdisc_ops.config import SkySettings
from deepdisc_ops.data import groups, painted
from deepdisc_ops.data.spectra import (
    BLUEST,
    EMISSION_LINES,
    cardelli,
    line_boost,
    position,
    spectral_grid,
    star_magnitudes,
)
from deepdisc_ops.data.surveys import Survey, filters, to_njy

Floats = NDArray[np.float64]

BRIGHT_LIMIT = 17.0
"""No galaxy is brighter than this AB magnitude in the gold band."""

STAR_BRIGHT_LIMIT = 15.0
"""No star is brighter than this AB magnitude in the gold band."""

COUNTS_SLOPE = 0.31
"""Slope of the logarithm of the counts with magnitude, to 25; beyond it is the survey's."""

COMPLETE_SHARE = 0.8
"""Share of the counts that is drawn: cosmoDC2's normalisation, which the papers trained on."""

MEDIAN_REDSHIFTS = np.array(
    [
        (17.0, 0.17),
        (19.0, 0.28),
        (20.5, 0.44),
        (21.5, 0.65),
        (22.5, 0.77),
        (23.5, 0.86),
        (24.25, 0.91),
        (24.75, 0.97),
        (25.2, 0.985),
    ]
)
"""Gold band magnitudes and the median redshifts of cosmoDC2's training file there. Fainter than the file reaches, the median rises
as in the Science Book (section 3.7), by 0.15 per magnitude."""

REDSHIFT_SHAPE = 2.2
"""Shape of the Weibull distribution p(z | i): fits the 2nd to 99th percentiles of the training file, 22 < i < 25.3, to 5 %."""

HIGH_TAIL = (0.15, 3.0, 1.8)
"""Share at magnitude 30 (none at 25), least redshift and scale of an exponential tail of distant galaxies: with it 0.5-1 % of
the sources of a deep infrared image lie beyond z = 8, as Hainline et al. (2024) find in JADES. Only for surveys that see them."""

KNOTS = 8
"""Points of light that share a galaxy's knot flux."""

KNOT_CEILING = 0.6
"""Knots hold at most this share of the disc's light in any band."""

CLUMPY_SHARE = ((0.0, 0.5, 3.0), (0.2, 0.5, 0.6))
"""Redshifts, and the share of late-type galaxies with knots there: about that of Guo et al. (2015), half beyond z = 0.5."""

KNOT_REACH = 4.0
"""Knots lie within this many scale lengths of the disc."""

GROUP_REDDENING = 0.6
"""Early types are this much more frequent in groups than among all galaxies."""

EXPONENTIAL_RADIUS = 1.67834699
"""Half-light radius of an exponential disc in units of its scale length."""

COSMOLOGY = FlatLambdaCDM(H0=71.0, Om0=0.265)


@dataclass(frozen=True)
class Population:
    """N sources, above the atmosphere of the Milky Way.

    redshift (N,), 0 for stars; is_star (N,) bool; disc_flux, bulge_flux and knot_flux (N, C) nanojansky, a star being a
    disc of size 0; disc_radius and bulge_radius (N,) half-light radii, the geometric mean of both axes, arcsec;
    axis_ratio (N,); angle (N,) of the major axis from +x towards +y, radian; knot_offsets (N, KNOTS, 2) arcsec x, y from the centre
    of the knots, which share knot_flux equally (zeros where there are none); group (N,) int64 number of the group, -1 for the
    field and for stars.
    """

    redshift: Floats
    is_star: NDArray[np.bool_]
    disc_flux: Floats
    bulge_flux: Floats
    knot_flux: Floats
    disc_radius: Floats
    bulge_radius: Floats
    axis_ratio: Floats
    angle: Floats
    knot_offsets: Floats
    group: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.redshift)

    @property
    def flux(self) -> Floats:
        """(N, C) total flux in nanojansky."""
        return self.disc_flux + self.bulge_flux + self.knot_flux

    def select(self, which: NDArray[np.generic]) -> Population:
        """The sources of an index array or a mask."""
        return Population(**{field.name: getattr(self, field.name)[which] for field in fields(self)})

    def dimmed(self, factor: Floats) -> Population:
        """The same sources with the flux multiplied band by band, factor (C,) or (N, C), as by dust in front."""
        return replace(
            self, disc_flux=self.disc_flux * factor, bulge_flux=self.bulge_flux * factor, knot_flux=self.knot_flux * factor
        )


@dataclass(frozen=True)
class _Draft:
    """Galaxies before they have a shape: magnitude and redshift (N,), group (N,) int64.

    early (N,): lots, of which the smallest make a galaxy elliptical, uniform from 0 to 1 over all galaxies;
    colours: band minus gold band, (N, C) mag of painted galaxies, (N, 0) of others.
    """

    magnitude: Floats
    redshift: Floats
    group: NDArray[np.int64]
    early: Floats
    colours: Floats


def expected_counts(survey: Survey, area_arcmin2: float, limit: float, density: float = 1.0) -> float:
    """Expected number of galaxies between `BRIGHT_LIMIT` and ``limit`` (gold band, AB)."""
    return density * area_arcmin2 * float(_surface_density(survey, limit) - _surface_density(survey, BRIGHT_LIMIT))


def draw_population(survey: Survey, area_arcmin2: float, rng: np.random.Generator, settings: SkySettings) -> Population:
    """Draw the sources of a piece of sky; the years of observation do not matter.

    With settings.knots off the same sources come out, without knots.
    """
    if settings.colours == "dc2":
        painted.check_survey(survey)
    galaxies = _shaped(survey, _draft(survey, area_arcmin2, rng, settings), rng)
    stars = _draw_stars(survey, rng.poisson(survey.stars_per_arcmin2 * area_arcmin2 * settings.density), rng)
    if settings.knots:
        galaxies = _with_knots(survey, galaxies, rng)
    names = [field.name for field in fields(Population)]
    return Population(**{name: np.concatenate([getattr(galaxies, name), getattr(stars, name)]) for name in names})


def draw_positions(
    population: Population, survey: Survey, width: int, height: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """x, y (N,) pixels inside [-0.5, side - 0.5): uniform in the field, about a common centre in a group.

    Members that fall outside come in again on the other side, so that the density is the same everywhere.
    """
    size = np.array([width, height])
    position = rng.uniform(0.0, 1.0, (len(population), 2)) * size
    members = np.flatnonzero(population.group >= 0)
    if len(members):
        numbers, which = np.unique(population.group[members], return_inverse=True)
        centres = rng.uniform(0.0, 1.0, (len(numbers), 2)) * size
        scale = _kpc_per_arcsec(population.redshift[members], survey)
        position[members] = np.mod(centres[which] + groups.draw_offsets(scale, rng) / survey.pixel_scale, size)
    position = np.minimum(position - 0.5, np.nextafter(size - 0.5, 0.0))
    return position[:, 0], position[:, 1]


def attenuation(survey: Survey, ebv: float | Floats) -> Floats:
    """Share of the light that passes the dust of the Milky Way (Cardelli, Clayton & Mathis 1989, R_V = 3.1).

    (C,) for one E(B-V), (N, C) for an array of them, mag.
    """
    wavelength = np.array([band.effective_wavelength for band in filters(survey)])
    return 10 ** (-0.4 * np.multiply.outer(ebv, cardelli(wavelength)))


@cache
def _distances(highest: float) -> tuple[Floats, Floats, Floats]:
    """Redshift, distance modulus (mag) and kpc per arcsec on a grid."""
    redshift = np.concatenate([np.linspace(0.005, 0.5, 100, endpoint=False), np.linspace(0.5, highest + 0.1, 400)])
    kpc = COSMOLOGY.angular_diameter_distance(redshift).value * 1e3
    return redshift, COSMOLOGY.distmod(redshift).value, kpc * np.radians(1 / 3600)


def _kpc_per_arcsec(redshift: Floats, survey: Survey) -> Floats:
    grid, _, scale = _distances(survey.max_redshift)
    return np.interp(redshift, grid, scale)


def _surface_density(survey: Survey, limit: Floats | float) -> Floats:
    """Galaxies per square arcminute brighter than a magnitude: a power law whose slope changes at 25 without a step."""
    at_25, steep, flat = COMPLETE_SHARE * survey.counts_at_25, COUNTS_SLOPE, survey.counts_slope
    beyond = np.asarray(limit, np.float64) - 25.0
    faint = at_25 * (1 + steep / flat * (10 ** (flat * np.maximum(beyond, 0.0)) - 1))
    return np.where(beyond < 0, at_25 * 10 ** (steep * beyond), faint)


def _draw_magnitudes(survey: Survey, count: int, rng: np.random.Generator) -> Floats:
    """Gold band magnitudes by inverting `_surface_density`."""
    at_25, steep, flat = COMPLETE_SHARE * survey.counts_at_25, COUNTS_SLOPE, survey.counts_slope
    ends = _surface_density(survey, BRIGHT_LIMIT), _surface_density(survey, survey.faint_limit)
    brighter = rng.uniform(*ends, size=count) / at_25
    faint = np.log10(1 + flat / steep * (np.maximum(brighter, 1.0) - 1)) / flat
    return 25.0 + np.where(brighter < 1, np.log10(brighter) / steep, faint)


def _draw_redshifts(survey: Survey, magnitude: Floats, rng: np.random.Generator) -> Floats:
    """p(z | i), Weibull with the medians of `MEDIAN_REDSHIFTS`, and `HIGH_TAIL`; between 0.02 and the survey's highest."""
    median = np.interp(magnitude, *MEDIAN_REDSHIFTS.T) + 0.153 * np.maximum(magnitude - MEDIAN_REDSHIFTS[-1, 0], 0.0)
    scale = median / np.log(2.0) ** (1 / REDSHIFT_SHAPE)
    at_30, least, tail = HIGH_TAIL
    share = at_30 * np.clip((magnitude - 25.0) / 5.0, 0.0, 1.0) * (survey.max_redshift > least)
    redshift = np.full(len(magnitude), np.inf)
    while len(outside := np.flatnonzero((redshift > survey.max_redshift) | (redshift < 0.02))):
        near = scale[outside] * rng.weibull(REDSHIFT_SHAPE, len(outside))
        far = least + rng.exponential(tail, len(outside))
        redshift[outside] = np.where(rng.uniform(size=len(outside)) < share[outside], far, near)
    return redshift


def _draft(survey: Survey, area: float, rng: np.random.Generator, settings: SkySettings) -> _Draft:
    """Galaxies of the field, then those of groups, of which the redder ones are more often in groups; all in all no redder."""
    expected = expected_counts(survey, area, survey.faint_limit, settings.density)
    share = settings.clustering
    surplus = min(GROUP_REDDENING, 0.9 * (1 - share) / share) if share else 0.0
    in_field = _draw_draft(survey, rng.poisson((1 - share) * expected), -surplus * share / max(1 - share, 1e-9), rng, settings)
    if not share * expected:
        return in_field
    pool = _draw_draft(survey, groups.pool_size(share * expected), surplus, rng, settings)
    members, number = groups.draw_groups(pool.redshift, share * expected, rng)
    return _Draft(
        magnitude=np.concatenate([in_field.magnitude, pool.magnitude[members]]),
        redshift=np.concatenate([in_field.redshift, pool.redshift[members]]),
        group=np.concatenate([in_field.group, number]),
        early=np.concatenate([in_field.early, pool.early[members]]),
        colours=np.concatenate([in_field.colours, pool.colours[members]]),
    )


def _draw_draft(survey: Survey, count: int, surplus: float, rng: np.random.Generator, settings: SkySettings) -> _Draft:
    """Galaxies outside groups whose early types are more frequent by the share ``surplus`` (-1 to 1)."""
    magnitude = _draw_magnitudes(survey, count, rng)
    alone = np.full(count, -1, np.int64)
    if settings.colours == "templates":
        redshift = _draw_redshifts(survey, magnitude, rng)
        return _Draft(magnitude, redshift, alone, rng.uniform(size=count) / (1 + surplus), np.zeros((count, 0)))
    source = painted.lenders(settings.dc2_part)
    seen = painted.paint(source, magnitude, lambda faint: _draw_redshifts(survey, faint, rng), 0.5 * (1 + surplus), rng)
    return _Draft(magnitude, np.clip(seen.redshift, 0.01, survey.max_redshift), alone, 1 - seen.redness, seen.colours)


@dataclass(frozen=True)
class _Parts:
    """Flux (N, C), 1 in the gold band for both, of bulge and disc, and the bulge's share (N,) of the light there."""

    bulge: Floats
    disc: Floats
    bulge_share: Floats


def _shaped(survey: Survey, draft: _Draft, rng: np.random.Generator) -> Population:
    """Bulges and discs for the galaxies of a draft, with fluxes and sizes."""
    count, redshift = len(draft.magnitude), draft.redshift
    z_grid, modulus, _ = _distances(survey.max_redshift)
    types = 3.0 + 2.0 * np.clip(redshift - 2.0, 0.0, 3.5)
    typical = spectral_grid(survey)(types, np.full(count, 0.1), redshift)[:, survey.gold_index]
    absolute = draft.magnitude - np.interp(redshift, z_grid, modulus) - typical + 2.5 * np.log10(1 + redshift)
    elliptical, spiral = _families(absolute, redshift, draft.early)
    parts = _draw_parts(survey, absolute, redshift, elliptical, spiral, rng)
    flux = to_njy(draft.magnitude)[:, None]
    bulge_flux = parts.bulge * parts.bulge_share[:, None] * flux
    disc_flux = parts.disc * (1 - parts.bulge_share)[:, None] * flux
    if draft.colours.shape[1]:
        correction = to_njy(draft.magnitude[:, None] + draft.colours) / (bulge_flux + disc_flux)
        bulge_flux, disc_flux = bulge_flux * correction, disc_flux * correction
    radius = np.clip(_draw_radii(absolute, redshift, elliptical, rng) / _kpc_per_arcsec(redshift, survey), 0.02, 3.0)
    axis_ratio = np.where(elliptical, rng.uniform(0.6, 1.0, count), np.sqrt(0.04 + 0.96 * rng.uniform(size=count) ** 2))
    return Population(
        redshift=redshift,
        is_star=np.zeros(count, bool),
        disc_flux=disc_flux,
        bulge_flux=bulge_flux,
        knot_flux=np.zeros_like(disc_flux),
        disc_radius=radius,
        bulge_radius=np.maximum(radius * np.where(elliptical, 1.0, 0.45), 0.02),
        axis_ratio=axis_ratio,
        angle=rng.uniform(0.0, np.pi, count),
        knot_offsets=np.zeros((count, KNOTS, 2)),
        group=draft.group,
    )


def _families(absolute: Floats, redshift: Floats, early: Floats) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which galaxies are elliptical and which spiral, from absolute V magnitude, redshift and lots; the rest are starbursts."""
    bright = np.clip(0.40 - 0.18 * (absolute + 21.0), 0.10, 0.80)
    old = np.clip(1.90 - 1.65 * redshift, np.where(redshift < 4, 0.02, 0.0), 1.0)
    elliptical = bright * old
    spiral = np.clip(1.00 - 0.60 * redshift, np.where(redshift < 4, 0.05, 0.0), 0.8) * (1 - elliptical)
    return early < elliptical, (early >= elliptical) & (early < elliptical + spiral)


def _draw_parts(
    survey: Survey,
    absolute: Floats,
    redshift: Floats,
    elliptical: NDArray[np.bool_],
    spiral: NDArray[np.bool_],
    rng: np.random.Generator,
) -> _Parts:
    """Spectra of bulges and discs."""
    count, grid, gold, families = len(redshift), spectral_grid(survey), survey.gold_index, [elliptical, spiral]
    blueing = np.clip(0.3 * (absolute + 21.0) + 1.8 * redshift, -1.5, 4.0)  # faint and distant galaxies are bluer
    types = np.select(
        families,
        [np.abs(rng.normal(0.0, 0.35, count)), np.clip(rng.normal(2.7, 1.0, count) + 1.0 * blueing, 1.0, 7.5)],
        np.clip(rng.normal(5.5, 1.5, count) + 1.3 * blueing, 3.0, BLUEST),
    )
    dust = np.where(elliptical, 0.0, np.clip(rng.exponential(0.08, count), 0.0, 0.6))
    shares = [rng.uniform(0.5, 1.0, count), rng.beta(1.2, 4.0, count)]
    bulge_types = np.where(elliptical, types, np.maximum(types - 2.0, 0.0))
    bulge = grid(bulge_types, np.where(elliptical, 0.0, dust / 2), redshift)
    disc = grid(types, dust, redshift)
    variety = _draw_variety(survey, redshift, rng)
    strength = np.select(families, [0.0, 0.35], 1.0) * np.clip(0.5 * (1 + redshift), 1.0, 4.0)  # stronger when young
    lines = line_boost(survey, redshift, strength[:, None] * rng.lognormal(0.0, 0.5, (count, len(EMISSION_LINES))))
    return _Parts(
        bulge=_scaled_to_band(10 ** (-0.4 * (bulge + variety)), gold),
        disc=_scaled_to_band(10 ** (-0.4 * (disc + variety)) * lines, gold),
        bulge_share=np.select(families, shares, rng.beta(1.0, 12.0, count)),
    )


def _scaled_to_band(flux: Floats, band: int) -> Floats:
    return flux / flux[:, [band]]


def _draw_variety(survey: Survey, redshift: Floats, rng: np.random.Generator, scatter: float = 0.03) -> Floats:
    """(N, C) magnitudes of a smooth random curve over rest wavelength: real spectra do not lie on a template sequence."""
    nodes = np.linspace(np.log(900.0), np.log(45000.0), 9)
    heights = rng.normal(0.0, scatter, (len(redshift), len(nodes)))
    effective = np.array([band.effective_wavelength for band in filters(survey)])
    rest = np.log(effective / (1 + redshift[:, None]))
    index, share = position((rest - nodes[0]) / (nodes[1] - nodes[0]), len(nodes))
    share = 0.5 - 0.5 * np.cos(np.pi * share)
    left = np.take_along_axis(heights, index, axis=1)
    return left * (1 - share) + np.take_along_axis(heights, index + 1, axis=1) * share


def _draw_radii(absolute: Floats, redshift: Floats, elliptical: NDArray[np.bool_], rng: np.random.Generator) -> Floats:
    """Half-light radii in kpc: size-luminosity relations with 0.2 dex scatter that shrink with redshift."""
    early = 10 ** (0.62 - 0.24 * (absolute + 21.5)) * (1 + redshift) ** -1.2
    late = 10 ** (0.78 - 0.13 * (absolute + 21.0)) * (1 + redshift) ** -0.8
    return np.where(elliptical, early, late) * 10 ** rng.normal(0.0, 0.2, len(redshift))


def _with_knots(survey: Survey, galaxies: Population, rng: np.random.Generator) -> Population:
    """The same galaxies with part of each disc's light moved into knots of the bluest spectrum; the total stays.

    Of the galaxies with more disc than bulge, `CLUMPY_SHARE` have knots; they hold a part of the disc's light in the gold band that
    rises from 8 % nearby to 20 % beyond z = 2 on average, but never more than `KNOT_CEILING` of it in any band.
    """
    count, gold = len(galaxies), survey.gold_index
    burst = _scaled_to_band(10 ** (-0.4 * spectral_grid(survey)(np.full(count, BLUEST), np.zeros(count), galaxies.redshift)), gold)
    share = np.minimum(0.08 + 0.06 * galaxies.redshift, 0.20) * rng.gamma(2.0, 0.5, count)
    clumpy = rng.uniform(size=count) < np.interp(galaxies.redshift, *CLUMPY_SHARE)
    clumpy &= galaxies.bulge_flux[:, gold] < galaxies.disc_flux[:, gold]
    wanted = np.where(clumpy, share, 0.0)[:, None] * galaxies.disc_flux[:, [gold]] * burst
    excess = (wanted / (KNOT_CEILING * galaxies.disc_flux)).max(axis=1, initial=1.0)
    knot_flux = wanted / excess[:, None]
    return replace(
        galaxies,
        disc_flux=galaxies.disc_flux - knot_flux,
        knot_flux=knot_flux,
        knot_offsets=np.where(clumpy[:, None, None], _draw_knot_offsets(galaxies, rng), 0.0),
    )


def _draw_knot_offsets(galaxies: Population, rng: np.random.Generator) -> Floats:
    """(N, KNOTS, 2) arcsec x, y: 1 to KNOTS places drawn from the inclined exponential disc, taken in turn by the knots."""
    lengths = np.linspace(0.0, KNOT_REACH, 200)
    inside = 1 - (1 + lengths) * np.exp(-lengths)
    shape = (len(galaxies), KNOTS)
    radius = np.interp(rng.uniform(0.0, inside[-1], shape), inside, lengths) / EXPONENTIAL_RADIUS * galaxies.disc_radius[:, None]
    turn = rng.uniform(0.0, 2 * np.pi, shape)
    stretch = np.sqrt(galaxies.axis_ratio)[:, None]
    along, across = radius * np.cos(turn) / stretch, radius * np.sin(turn) * stretch
    cos, sin = np.cos(galaxies.angle)[:, None], np.sin(galaxies.angle)[:, None]
    places = np.stack([along * cos - across * sin, along * sin + across * cos], axis=-1)
    taken = np.arange(KNOTS) % rng.integers(1, KNOTS + 1, (len(galaxies), 1))
    return np.take_along_axis(places, taken[:, :, None], axis=1)


def _draw_stars(survey: Survey, count: int, rng: np.random.Generator) -> Population:
    """Stars of the main sequence: a quarter F to K, the rest M dwarfs, ever more of them towards faint magnitudes."""
    least = np.exp(-(survey.faint_limit - STAR_BRIGHT_LIMIT) / 3.0)
    magnitude = survey.faint_limit + 3.0 * np.log(rng.uniform(least, 1.0, count))
    warm = rng.uniform(size=count) < 0.25
    g_minus_i = np.clip(np.where(warm, rng.normal(0.8, 0.3, count), rng.normal(2.5, 0.45, count)), 0.4, 3.6)
    spectrum = 10 ** (-0.4 * (star_magnitudes(survey, g_minus_i) + rng.normal(0.0, 0.02, (count, len(survey.bands)))))
    zero = np.zeros(count)
    flux = _scaled_to_band(spectrum, survey.gold_index) * to_njy(magnitude)[:, None]
    return Population(
        redshift=zero,
        is_star=np.ones(count, bool),
        disc_flux=flux,
        bulge_flux=np.zeros_like(flux),
        knot_flux=np.zeros_like(flux),
        disc_radius=zero,
        bulge_radius=zero,
        axis_ratio=np.ones(count),
        angle=zero,
        knot_offsets=np.zeros((count, KNOTS, 2)),
        group=np.full(count, -1, np.int64),
    )
