"""A seeded catalogue of galaxies and stars that looks like the deep sky.

Galaxies follow the number counts and the redshift distribution p(z | i) of the LSST Science Book (v2, section 3.7);
their colours come from the COSMOS template sequence (elliptical to starburst, Ilbert et al. 2009) with Calzetti (2000) dust,
Madau (1995) absorption, emission lines and a smooth scatter, in a bulge and a disc with their own spectra.

Glossary: N sources, C bands, T steps of the template sequence, E steps of dust, Z steps of redshift, W wavelengths.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import numpy as np
from astropy.cosmology import FlatLambdaCDM
from numpy.typing import NDArray

from deepdisc_ops.data.surveys import Filter, Survey, filters, read_curve, to_njy

Floats = NDArray[np.float64]

TEMPLATES = ("Ell5", "S0", "Sb", "Sc", "Sd", "Sdm", "SB1", "SB3", "SB5", "SB7", "SB9", "SB11")
"""The sequence of spectra, red to blue; a galaxy's type is a real number that interpolates between neighbours."""

FAINT_LIMIT = 27.6
"""AB magnitude (gold band) down to which galaxies are drawn."""

BRIGHT_LIMIT = 17.0
"""No source is brighter than this AB magnitude in the gold band."""

COUNTS_AT_25 = 46.0
"""Galaxies per square arcminute brighter than i = 25 (Science Book equation 3.7)."""

COUNTS_SLOPE = 0.31
"""Slope of the logarithm of the counts with magnitude."""

COMPLETE_SHARE = 0.8
"""Share of the counts that is drawn: cosmoDC2's normalisation, which the papers trained on."""

MAX_REDSHIFT = 3.0
COSMOLOGY = FlatLambdaCDM(H0=71.0, Om0=0.265)
EMISSION_LINES = ((3727.0, 30.0), (4980.0, 45.0), (6563.0, 60.0))
"""Rest wavelength (Angstrom) and typical rest equivalent width (Angstrom) in a starburst: [O II], [O III] + H beta, H alpha."""


@dataclass(frozen=True)
class Population:
    """N sources, above the atmosphere of the Milky Way.

    redshift (N,), 0 for stars; is_star (N,) bool; disc_flux and bulge_flux (N, C) nanojansky (a star is a disc of size 0);
    disc_radius and bulge_radius (N,) half-light radii, the geometric mean of both axes, arcsec;
    axis_ratio (N,); angle (N,) of the major axis from +x towards +y, radian.
    """

    redshift: Floats
    is_star: NDArray[np.bool_]
    disc_flux: Floats
    bulge_flux: Floats
    disc_radius: Floats
    bulge_radius: Floats
    axis_ratio: Floats
    angle: Floats

    def __len__(self) -> int:
        return len(self.redshift)

    @property
    def flux(self) -> Floats:
        """(N, C) total flux in nanojansky."""
        return self.disc_flux + self.bulge_flux

    def select(self, which: NDArray[np.generic]) -> Population:
        """The sources of an index array or a mask."""
        return Population(**{field.name: getattr(self, field.name)[which] for field in fields(self)})

    def dimmed(self, factor: Floats) -> Population:
        """The same sources with the flux of each band (C,) multiplied, as by dust in front."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return Population(**columns | {"disc_flux": self.disc_flux * factor, "bulge_flux": self.bulge_flux * factor})


def expected_counts(area_arcmin2: float, limit: float, density: float = 1.0) -> float:
    """Expected number of galaxies brighter than ``limit`` (gold band, AB) before any are cut at the bright end."""
    return COMPLETE_SHARE * density * area_arcmin2 * COUNTS_AT_25 * 10 ** (COUNTS_SLOPE * (limit - 25.0))


def draw_population(survey: Survey, area_arcmin2: float, rng: np.random.Generator, density: float = 1.0) -> Population:
    """Draw the sources of a piece of sky; ``density`` multiplies the number of galaxies and stars."""
    galaxies = _draw_galaxies(survey, rng.poisson(expected_counts(area_arcmin2, FAINT_LIMIT, density)), rng)
    stars = _draw_stars(survey, rng.poisson(survey.stars_per_arcmin2 * area_arcmin2 * density), rng)
    names = [field.name for field in fields(Population)]
    return Population(**{name: np.concatenate([getattr(galaxies, name), getattr(stars, name)]) for name in names})


def attenuation(survey: Survey, ebv: float) -> Floats:
    """(C,) share of the light that passes the dust of the Milky Way (Cardelli, Clayton & Mathis 1989, R_V = 3.1)."""
    wavelength = np.array([band.effective_wavelength for band in filters(survey)])
    return 10 ** (-0.4 * ebv * cardelli(wavelength))


def cardelli(wavelength: Floats) -> Floats:
    """A(lambda) / E(B-V) of Cardelli, Clayton & Mathis (1989), R_V = 3.1, between 0.3 and 3 micron."""
    x = 1e4 / wavelength
    y = x - 1.82
    optical_a = np.polyval([0.32999, -0.77530, 0.01979, 0.72085, -0.02427, -0.50447, 0.17699, 1.0], y)
    optical_b = np.polyval([-2.09002, 5.30260, -0.62251, -5.38434, 1.07233, 2.28305, 1.41338, 0.0], y)
    infrared = x < 1.1
    a = np.where(infrared, 0.574 * x**1.61, optical_a)
    b = np.where(infrared, -0.527 * x**1.61, optical_b)
    return 3.1 * a + b


def calzetti(wavelength: Floats) -> Floats:
    """k(lambda) = A(lambda) / E(B-V) of Calzetti et al. (2000), equation 4, not below 0."""
    micron = wavelength / 1e4
    blue = 2.659 * (-2.156 + 1.509 / micron - 0.198 / micron**2 + 0.011 / micron**3)
    red = 2.659 * (-1.857 + 1.040 / micron)
    return np.maximum(np.where(micron < 0.63, blue, red) + 4.05, 0.0)


def madau(wavelength: Floats, redshift: float) -> Floats:
    """Mean transmission of the intergalactic medium at observed wavelengths (Angstrom) towards a redshift (Madau 1995)."""
    depth = np.zeros_like(wavelength)
    rest = wavelength / (1 + redshift)
    for line, strength in ((1216.0, 0.0036), (1026.0, 0.0017), (973.0, 0.0012), (950.0, 0.00093)):
        depth += np.where(rest < line, strength * (wavelength / line) ** 3.46, 0.0)
    x, emitted = wavelength / 912.0, 1 + redshift
    continuum = (
        0.25 * x**3 * (emitted**0.46 - x**0.46)
        + 9.4 * x**1.5 * (emitted**0.18 - x**0.18)
        - 0.7 * x**3 * (x**-1.32 - emitted**-1.32)
        - 0.023 * (emitted**1.68 - x**1.68)
    )
    return np.exp(-depth - np.where(rest < 912.0, np.maximum(continuum, 0.0), 0.0))


class SpectralGrid:
    """AB magnitudes, of arbitrary normalisation, over type x dust x redshift x band; linear in between."""

    types_step = 0.5
    dust = np.array([0.0, 0.1, 0.2, 0.3, 0.45, 0.6])
    redshift_step = 0.02

    def __init__(self, survey: Survey) -> None:
        self.redshift = np.arange(0.0, MAX_REDSHIFT + 2 * self.redshift_step, self.redshift_step)
        wavelength = np.geomspace(300.0, 6e4, 6000)
        spectra = np.exp(_reddened(_template_sequence(wavelength, self.types_step), wavelength, self.dust))
        planes = [_band_magnitudes(spectra, wavelength, band, self.redshift) for band in filters(survey)]
        self.magnitudes = np.stack(planes, axis=-1)  # (T, E, Z, C)

    def __call__(self, types: Floats, dust: Floats, redshift: Floats) -> Floats:
        """(N, C) magnitudes; arguments (N,) beyond the grid are taken at its edge."""
        axes = (
            _position(types / self.types_step, self.magnitudes.shape[0]),
            _position(np.interp(dust, self.dust, np.arange(len(self.dust))), self.magnitudes.shape[1]),
            _position(redshift / self.redshift_step, self.magnitudes.shape[2]),
        )
        total = np.zeros((len(types), self.magnitudes.shape[3]))
        for corner in np.ndindex(2, 2, 2):
            weight = np.ones(len(types))
            for side, (_, share) in zip(corner, axes, strict=True):
                weight = weight * (share if side else 1 - share)
            cell = tuple(index + side for side, (index, _) in zip(corner, axes, strict=True))
            total += weight[:, None] * self.magnitudes[cell]
        return total


@cache
def spectral_grid(survey: Survey) -> SpectralGrid:
    """The survey's grid, computed once per process."""
    return SpectralGrid(survey)


def _position(value: Floats, length: int) -> tuple[NDArray[np.intp], Floats]:
    value = np.clip(value, 0, length - 1)
    index = np.minimum(value.astype(np.intp), length - 2)
    return index, value - index


def _template_sequence(wavelength: Floats, step: float) -> Floats:
    """(T, W) natural logarithm of f_nu, 0 at 5500 Angstrom, from the reddest to the bluest template."""
    nodes = np.stack([_template(name, wavelength) for name in TEMPLATES])
    index, share = _position(np.arange(0.0, len(nodes) - 1 + step / 2, step), len(nodes))
    return (1 - share)[:, None] * nodes[index] + share[:, None] * nodes[index + 1]


def _template(name: str, wavelength: Floats) -> Floats:
    grid, per_wavelength = read_curve("SED", f"{name}_A_0.sed")
    per_frequency = per_wavelength * grid**2
    log_flux = np.log(np.maximum(per_frequency, 1e-8 * per_frequency.max()))
    log_grid = np.log(grid)
    return np.interp(np.log(wavelength), log_grid, log_flux) - np.interp(np.log(5500.0), log_grid, log_flux)


def _reddened(log_flux: Floats, wavelength: Floats, dust: Floats) -> Floats:
    """(T, E, W) natural logarithm of f_nu behind each E(B-V) of ``dust``."""
    return log_flux[:, None] - 0.4 * np.log(10.0) * dust[None, :, None] * calzetti(wavelength)


def _band_magnitudes(spectra: Floats, wavelength: Floats, band: Filter, redshift: Floats) -> Floats:
    """(T, E, Z) AB magnitude of the spectra (T, E, W) seen through a band at each redshift."""
    weight = band.response * np.gradient(np.log(band.wavelength))
    step = np.log(wavelength[1] / wavelength[0])
    magnitudes = np.empty((*spectra.shape[:2], len(redshift)))
    for k, z in enumerate(redshift):
        index, share = _position(np.log(band.wavelength / (1 + z) / wavelength[0]) / step, len(wavelength))
        flux = spectra[..., index] * (1 - share) + spectra[..., index + 1] * share
        magnitudes[..., k] = -2.5 * np.log10(np.maximum(flux @ (weight * madau(band.wavelength, z)), 1e-12))
    return magnitudes


@cache
def _distances() -> tuple[Floats, Floats, Floats]:
    """Redshift, distance modulus (mag) and angular diameter distance (kpc) on a grid."""
    redshift = np.linspace(0.005, MAX_REDSHIFT + 0.1, 400)
    return redshift, COSMOLOGY.distmod(redshift).value, COSMOLOGY.angular_diameter_distance(redshift).value * 1e3


def _draw_redshifts(magnitude: Floats, rng: np.random.Generator) -> Floats:
    """p(z | i) = Gamma(4, z0), z0 = 0.0417 i - 0.744; the medians are those of cosmoDC2 (0.87 at 23.5, 1.05 at 24.75)."""
    scale = np.maximum(0.0417 * magnitude - 0.744, 0.05)
    redshift = rng.gamma(4.0, scale)
    while (outside := (redshift > MAX_REDSHIFT) | (redshift < 0.02)).any():
        redshift[outside] = rng.gamma(4.0, scale[outside])
    return redshift


def _draw_galaxies(survey: Survey, count: int, rng: np.random.Generator) -> Population:
    grid, gold = spectral_grid(survey), survey.gold_index
    magnitude = np.maximum(FAINT_LIMIT + np.log10(1 - rng.uniform(size=count)) / COUNTS_SLOPE, BRIGHT_LIMIT)
    redshift = _draw_redshifts(magnitude, rng)
    z_grid, modulus, kpc_per_radian = _distances()
    correction = grid(np.full(count, 3.0), np.full(count, 0.1), redshift)[:, gold]
    absolute = magnitude - np.interp(redshift, z_grid, modulus) - correction + 2.5 * np.log10(1 + redshift)

    elliptical, spiral = _draw_families(absolute, redshift, rng)
    blueing = np.clip(0.5 * (absolute + 21.0) + 1.2 * redshift, -1.0, 4.0)  # faint and distant galaxies are bluer
    types = np.select(
        [elliptical, spiral],
        [np.abs(rng.normal(0.0, 0.35, count)), np.clip(rng.normal(3.2, 1.0, count) + 0.4 * blueing, 1.0, 6.5)],
        np.clip(rng.normal(7.0, 1.3, count) + 0.9 * blueing, 4.5, 11.0),
    )
    dust = np.where(elliptical, 0.0, np.clip(rng.exponential(0.07, count), 0.0, 0.6))
    bulge_share = np.select(
        [elliptical, spiral], [rng.uniform(0.5, 1.0, count), rng.beta(1.2, 4.0, count)], rng.beta(1.0, 12.0, count)
    )
    bulge = grid(np.where(elliptical, types, np.maximum(types - 2.0, 0.0)), np.where(elliptical, 0.0, dust / 2), redshift)
    disc = grid(types, dust, redshift)
    variety = _draw_variety(survey, redshift, rng)
    strength = np.select([elliptical, spiral], [0.0, 0.35], 1.0)
    lines = _line_boost(survey, redshift, strength[:, None] * rng.lognormal(0.0, 0.5, (count, len(EMISSION_LINES))))
    flux = to_njy(magnitude)[:, None]
    bulge_flux = _scaled_to_band(10 ** (-0.4 * (bulge + variety)), gold) * bulge_share[:, None] * flux
    disc_flux = _scaled_to_band(10 ** (-0.4 * (disc + variety)) * lines, gold) * (1 - bulge_share)[:, None] * flux

    radius = _draw_radii(absolute, redshift, elliptical, rng) / np.interp(redshift, z_grid, kpc_per_radian)
    radius = np.clip(np.degrees(radius) * 3600, 0.02, 3.0)
    axis_ratio = np.where(elliptical, rng.uniform(0.6, 1.0, count), np.sqrt(0.04 + 0.96 * rng.uniform(size=count) ** 2))
    return Population(
        redshift=redshift,
        is_star=np.zeros(count, bool),
        disc_flux=disc_flux,
        bulge_flux=bulge_flux,
        disc_radius=radius,
        bulge_radius=np.maximum(radius * np.where(elliptical, 1.0, 0.45), 0.02),
        axis_ratio=axis_ratio,
        angle=rng.uniform(0.0, np.pi, count),
    )


def _scaled_to_band(flux: Floats, band: int) -> Floats:
    return flux / flux[:, [band]]


def _draw_families(absolute: Floats, redshift: Floats, rng: np.random.Generator) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which galaxies are elliptical and which spiral, from the absolute V magnitude and the redshift; the rest are starbursts."""
    elliptical = np.clip(0.55 - 0.25 * (absolute + 22.0), 0.0, 0.75) * np.clip(1.15 - 0.60 * redshift, 0.02, 1.0)
    spiral = np.clip(0.75 - 0.30 * redshift, 0.10, 0.8) * (1 - elliptical)
    lot = rng.uniform(size=len(absolute))
    return lot < elliptical, (lot >= elliptical) & (lot < elliptical + spiral)


def _draw_variety(survey: Survey, redshift: Floats, rng: np.random.Generator, scatter: float = 0.03) -> Floats:
    """(N, C) magnitudes of a smooth random curve over rest wavelength: real spectra do not lie on a template sequence."""
    knots = np.linspace(np.log(900.0), np.log(45000.0), 9)
    heights = rng.normal(0.0, scatter, (len(redshift), len(knots)))
    effective = np.array([band.effective_wavelength for band in filters(survey)])
    rest = np.log(effective / (1 + redshift[:, None]))
    index, share = _position((rest - knots[0]) / (knots[1] - knots[0]), len(knots))
    share = 0.5 - 0.5 * np.cos(np.pi * share)
    left = np.take_along_axis(heights, index, axis=1)
    return left * (1 - share) + np.take_along_axis(heights, index + 1, axis=1) * share


def _line_boost(survey: Survey, redshift: Floats, strength: Floats) -> Floats:
    """(N, C) factor by which emission lines brighten each band; strength (N, lines) multiplies `EMISSION_LINES`.

    A line of observed equivalent width w at wavelength l adds w R(l) / l to a flat continuum of 1.
    """
    boost = np.ones((len(redshift), len(survey.bands)))
    for k, (rest, width) in enumerate(EMISSION_LINES):
        observed = rest * (1 + redshift)
        for j, band in enumerate(filters(survey)):
            response = np.interp(observed, band.wavelength, band.response, left=0.0, right=0.0)
            boost[:, j] += strength[:, k] * width * (1 + redshift) * response / observed
    return boost


def _draw_radii(absolute: Floats, redshift: Floats, elliptical: NDArray[np.bool_], rng: np.random.Generator) -> Floats:
    """Half-light radii in kpc: size-luminosity relations with 0.2 dex scatter that shrink with redshift."""
    early = 10 ** (0.62 - 0.24 * (absolute + 21.5)) * (1 + redshift) ** -1.2
    late = 10 ** (0.78 - 0.13 * (absolute + 21.0)) * (1 + redshift) ** -0.8
    return np.where(elliptical, early, late) * 10 ** rng.normal(0.0, 0.2, len(redshift))


@cache
def _blackbody_grid(survey: Survey) -> tuple[Floats, Floats]:
    """Log temperature (K), and (temperatures, C) flux of black bodies."""
    temperature = np.geomspace(1800.0, 20000.0, 60)
    flux = np.empty((len(temperature), len(survey.bands)))
    for j, band in enumerate(filters(survey)):
        x = 1.4388e8 / (band.wavelength * temperature[:, None])
        flux[:, j] = (1 / (band.wavelength**3 * np.expm1(x))) @ (band.response * np.gradient(np.log(band.wavelength)))
    return np.log(temperature), flux


def _draw_stars(survey: Survey, count: int, rng: np.random.Generator) -> Population:
    magnitude = np.maximum(FAINT_LIMIT - rng.exponential(3.0, count), BRIGHT_LIMIT)
    log_temperature, table = _blackbody_grid(survey)
    drawn = rng.normal(np.log(4200.0), 0.3, count)
    spectrum = np.stack([np.exp(np.interp(drawn, log_temperature, np.log(column))) for column in table.T], axis=1)
    flux = _scaled_to_band(spectrum, survey.gold_index) * to_njy(magnitude)[:, None]
    zero = np.zeros(count)
    return Population(
        redshift=zero,
        is_star=np.ones(count, bool),
        disc_flux=flux,
        bulge_flux=np.zeros_like(flux),
        disc_radius=zero,
        bulge_radius=zero,
        axis_ratio=np.ones(count),
        angle=zero,
    )
