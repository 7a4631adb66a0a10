"""Spectra of galaxies and stars, and the magnitudes they have through a survey's bands.

Galaxies: the COSMOS template sequence (elliptical to starburst, Ilbert et al. 2009) that pz-rail-base ships, with Calzetti (2000)
dust, the intergalactic medium (Madau 1995) and emission lines. Stars: the stellar locus of SDSS and 2MASS.

Glossary: N sources, C bands, T steps of the template sequence, E steps of dust, Z steps of redshift, W wavelengths,
S steps of the stellar locus.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.data.surveys import Filter, Survey, filters, read_curve

Floats = NDArray[np.float64]

TEMPLATES = ("Ell5", "S0", "Sb", "Sc", "Sd", "Sdm", "SB1", "SB3", "SB5", "SB7", "SB9", "SB11")
"""The sequence of spectra, red to blue; a galaxy's type is a real number that interpolates between neighbours."""

BLUEST = float(len(TEMPLATES) - 1)
"""The type of the bluest spectrum: a burst of star formation."""

EMISSION_LINES = ((3727.0, 30.0), (4980.0, 45.0), (6563.0, 60.0))
"""Rest wavelength (Angstrom) and typical rest equivalent width (Angstrom) in a starburst: [O II], [O III] + H beta, H alpha."""

REIONISED = 6.0
"""Redshift beyond which the neutral gas lets no light pass shortward of Lyman alpha (Fan et al. 2006)."""

LOCUS_BANDS = (3550.0, 4690.0, 6170.0, 7480.0, 8930.0, 12350.0, 16620.0, 21590.0, 46000.0)
"""Wavelengths (Angstrom) of u g r i z of SDSS, J H K of 2MASS and W2 of WISE, where the locus is tabulated."""

STELLAR_LOCUS = np.array(
    [
        [0.4, 1.01, 0.34, 0.06, -0.01, 0.02, -0.18, -0.41, -1.49],
        [0.6, 1.26, 0.43, 0.16, 0.05, 0.10, -0.12, -0.40, -1.47],
        [0.8, 1.57, 0.57, 0.23, 0.09, 0.16, -0.04, -0.38, -1.45],
        [1.0, 1.88, 0.73, 0.27, 0.12, 0.22, 0.04, -0.37, -1.45],
        [1.3, 2.27, 0.96, 0.33, 0.17, 0.29, 0.12, -0.34, -1.43],
        [1.6, 2.52, 1.16, 0.44, 0.24, 0.36, 0.17, -0.31, -1.40],
        [2.0, 2.63, 1.33, 0.66, 0.36, 0.45, 0.18, -0.27, -1.36],
        [2.4, 2.61, 1.41, 0.98, 0.52, 0.55, 0.15, -0.24, -1.31],
        [2.8, 2.59, 1.45, 1.35, 0.71, 0.65, 0.12, -0.21, -1.26],
        [3.2, 2.63, 1.48, 1.71, 0.92, 0.77, 0.11, -0.18, -1.21],
        [3.6, 2.62, 1.56, 2.03, 1.10, 0.92, 0.12, -0.14, -1.17],
    ]
)
"""(S, 9) main-sequence stars from F to late M: g-i, then u-g, g-r, r-i, i-z, z-J, J-H, H-K, K-W2, all AB magnitudes
(optical: the polynomials of the median locus of Covey et al. 2007; near infrared: its trend, to about 0.1)."""


def cardelli(wavelength: Floats) -> Floats:
    """A(lambda) / E(B-V) of Cardelli, Clayton & Mathis (1989), R_V = 3.1, from 0.3 micron; beyond 3.3 its power law goes on."""
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


def intergalactic(wavelength: Floats, redshift: float) -> Floats:
    """Mean transmission of the intergalactic medium at observed wavelengths (Angstrom) towards a redshift.

    Madau (1995), equations 12, 13, 15 and footnote 3; next to nothing passes where the gas is neutral (`REIONISED`).
    """
    depth = np.zeros_like(wavelength)
    rest = wavelength / (1 + redshift)
    for line, strength in ((1216.0, 0.0036), (1026.0, 0.0017), (973.0, 0.0012), (950.0, 0.00093)):
        depth += np.where(rest < line, strength * (wavelength / line) ** 3.46, 0.0)
    depth += np.where((rest < 1216.0) & (wavelength > 1216.0 * (1 + REIONISED)), 10.0, 0.0)
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

    def __init__(self, survey: Survey) -> None:
        self.redshift = _redshift_steps(survey.max_redshift)
        wavelength = np.geomspace(300.0, 6e4, 6000)
        spectra = np.exp(_reddened(_template_sequence(wavelength, self.types_step), wavelength, self.dust))
        planes = [_band_magnitudes(spectra, wavelength, band, self.redshift) for band in filters(survey)]
        self.magnitudes = np.stack(planes, axis=-1)  # (T, E, Z, C)

    def __call__(self, types: Floats, dust: Floats, redshift: Floats) -> Floats:
        """(N, C) magnitudes; arguments (N,) beyond the grid are taken at its edge."""
        axes = (
            position(types / self.types_step, self.magnitudes.shape[0]),
            position(np.interp(dust, self.dust, np.arange(len(self.dust))), self.magnitudes.shape[1]),
            position(np.interp(redshift, self.redshift, np.arange(len(self.redshift))), self.magnitudes.shape[2]),
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


def position(value: Floats, length: int) -> tuple[NDArray[np.intp], Floats]:
    """Index of the node below a value counted in nodes, and how far it lies towards the next (0 to 1)."""
    value = np.clip(value, 0, length - 1)
    index = np.minimum(value.astype(np.intp), length - 2)
    return index, value - index


def _redshift_steps(highest: float) -> Floats:
    """Redshifts of the grid: steps of 0.02 up to 3, of 0.05 beyond."""
    near = np.arange(0.0, min(highest, 3.0) + 0.04, 0.02)
    return np.concatenate([near, np.arange(near[-1] + 0.05, highest + 0.1, 0.05)])


def _template_sequence(wavelength: Floats, step: float) -> Floats:
    """(T, W) natural logarithm of f_nu, 0 at 5500 Angstrom, from the reddest to the bluest template."""
    nodes = np.stack([_template(name, wavelength) for name in TEMPLATES])
    index, share = position(np.arange(0.0, len(nodes) - 1 + step / 2, step), len(nodes))
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
        index, share = position(np.log(band.wavelength / (1 + z) / wavelength[0]) / step, len(wavelength))
        passed = weight * intergalactic(band.wavelength, z)
        projection = np.zeros(len(wavelength))
        np.add.at(projection, index, passed * (1 - share))
        np.add.at(projection, index + 1, passed * share)
        seen = slice(index.min(), index.max() + 2)
        magnitudes[..., k] = -2.5 * np.log10(np.maximum(spectra[..., seen] @ projection[seen], 1e-12))
    return magnitudes


def line_boost(survey: Survey, redshift: Floats, strength: Floats) -> Floats:
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


@cache
def _locus_magnitudes(survey: Survey) -> Floats:
    """(S, C) AB magnitude, of arbitrary normalisation, along `STELLAR_LOCUS`: its spectra are straight between its bands."""
    magnitudes = -np.concatenate([np.zeros((len(STELLAR_LOCUS), 1)), np.cumsum(STELLAR_LOCUS[:, 1:], axis=1)], axis=1)
    nodes = np.log(LOCUS_BANDS)
    planes = []
    for band in filters(survey):
        weight = band.response * np.gradient(np.log(band.wavelength))
        spectra = np.stack([np.interp(np.log(band.wavelength), nodes, star) for star in magnitudes])
        planes.append(-2.5 * np.log10(10 ** (-0.4 * spectra) @ weight))
    return np.stack(planes, axis=1)


def star_magnitudes(survey: Survey, g_minus_i: Floats) -> Floats:
    """(N, C) AB magnitudes, of arbitrary normalisation, of main-sequence stars of a colour g-i (N,) in SDSS."""
    table = _locus_magnitudes(survey)
    return np.stack([np.interp(g_minus_i, STELLAR_LOCUS[:, 0], column) for column in table.T], axis=1)
