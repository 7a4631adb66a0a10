"""What the simulator must know of a survey: bands, pixels, seeing and depth.

Filter curves come from the data that ship with pz-rail-base and, for JWST, with astro-sedpy. Flux is in nanojansky
(AB zero point 31.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sedpy import observate

from deepdisc_ops.errors import ConfigError, SetupError, did_you_mean
from deepdisc_ops.sky.fluxes import NJY_ZERO_POINT


@dataclass(frozen=True)
class Survey:
    """A survey as the simulator sees it; tuples hold one value per band, in the order of ``bands``.

    pixel_scale arcsec; zero_point AB magnitude of one image unit; psf_fwhm arcsec; five_sigma_depth AB magnitude
    of a point source at 5 sigma after ``reference_years`` (None: the depth does not depend on the years).
    Scene to scene, the depth lies anywhere between ``five_sigma_depth`` and ``shallow_depth`` (where given) with a
    scatter of ``depth_scatter`` mag per band, and the seeing scatters by the share ``psf_scatter``.
    background: scatter of what sky subtraction leaves, in units of the noise per pixel;
    noise_correlation: of neighbouring pixels, as coadding onto a new grid leaves it.
    filter_files: names of the curves of pz-rail-base, wavelength in Angstrom and transmission.
    stars_per_arcmin2: number density of stars. psf_profile: the shape of the PSF (Airy pattern above the atmosphere).
    sky_brightness: AB mag per square arcsec; with the noise it tells the electrons per nanojansky. saturation: AB magnitude
    of a star whose central pixel saturates. faint_limit: gold band AB magnitude down to which galaxies are drawn;
    counts_at_25: galaxies per square arcminute brighter than that in the gold band;
    counts_slope: of the logarithm of their number with magnitude beyond 25; max_redshift: the highest drawn.
    """

    name: str
    bands: tuple[str, ...]
    pixel_scale: float
    zero_point: float
    psf_fwhm: tuple[float, ...]
    five_sigma_depth: tuple[float, ...]
    reference_years: float | None
    gold_band: str
    filter_files: tuple[str, ...]
    sky_brightness: tuple[float, ...]
    saturation: tuple[float, ...]
    stars_per_arcmin2: float
    psf_profile: Literal["kolmogorov", "airy"] = "kolmogorov"
    faint_limit: float = 27.6
    counts_at_25: float = 46.0
    counts_slope: float = 0.31
    max_redshift: float = 3.0
    shallow_depth: tuple[float, ...] | None = None
    depth_scatter: float = 0.0
    psf_scatter: float = 0.0
    background: float = 0.0
    noise_correlation: float = 0.0

    @property
    def gold_index(self) -> int:
        """Position of the gold band."""
        return self.bands.index(self.gold_band)

    @property
    def units_per_njy(self) -> float:
        """Factor from nanojansky to image units."""
        return float(10 ** (0.4 * (self.zero_point - NJY_ZERO_POINT)))


@dataclass(frozen=True)
class Conditions:
    """Depth (AB, 5 sigma point source) and seeing (FWHM, arcsec) of one scene, each (C,) float64."""

    depth: NDArray[np.float64]
    psf_fwhm: NDArray[np.float64]


NIRCAM_BANDS = ("f090w", "f115w", "f150w", "f200w", "f277w", "f335m", "f356w", "f410m", "f444w")
"""The nine bands of the JADES photometric redshifts, in the lower case in which images are read."""

SURVEYS = {
    # Dark sky of Ivezic et al. (2019), Table 2; saturation in one visit of two 15-second exposures (Science Book, chapter 3).
    "lsst": Survey(
        name="lsst",
        bands=("u", "g", "r", "i", "z", "y"),
        pixel_scale=0.2,
        zero_point=27.0,
        psf_fwhm=(0.79, 0.75, 0.71, 0.69, 0.68, 0.68),
        five_sigma_depth=(26.1, 27.4, 27.5, 26.8, 26.1, 24.9),
        reference_years=10.0,
        gold_band="i",
        filter_files=tuple(f"DC2LSST_{band}.res" for band in "ugrizy"),
        sky_brightness=(22.99, 22.26, 21.20, 20.48, 19.60, 18.61),
        saturation=(14.7, 15.7, 15.8, 15.8, 15.3, 13.9),
        stars_per_arcmin2=6.0,
    ),
    # Deep end, PSF and correlation measured on a COSMOS UltraDeep coadd (variance plane, PSF models); the shallow end
    # is that of a COSMOS cutout with five times the noise in g and r. Scenes fill the range, so that a network holds for either.
    # Sky and saturation are typical of dark nights on Mauna Kea and of exposures of some minutes, to about 0.3 mag.
    "hsc": Survey(
        name="hsc",
        bands=("g", "r", "i", "z", "y"),
        pixel_scale=0.168,
        zero_point=27.0,
        psf_fwhm=(0.77, 0.55, 0.61, 0.57, 0.73),
        five_sigma_depth=(27.9, 28.1, 27.6, 27.2, 26.2),
        reference_years=None,
        gold_band="i",
        filter_files=tuple(f"hsc_{band}.res" for band in "grizy"),
        sky_brightness=(22.1, 21.2, 20.2, 19.3, 18.2),
        saturation=(17.8, 18.2, 18.4, 17.5, 17.3),
        stars_per_arcmin2=4.0,
        shallow_depth=(25.9, 26.2, 26.4, 26.4, 25.6),
        depth_scatter=0.3,
        psf_scatter=0.1,
        background=0.2,
        noise_correlation=0.2,
        faint_limit=28.4,
        counts_slope=0.25,
    ),
    # JADES Deep: 5-sigma depths of points of about 29.5-30 AB (Eisenstein et al. 2023; Rieke et al. 2023), 0.3-0.5 mag less in the
    # medium bands; FWHM of NIRCam's PSF in flight; sky: zodiacal light, and the telescope's own beyond 4 micron; saturation of
    # the first groups of a deep readout, to about 0.5 mag. Images in nanojansky.
    "jades": Survey(
        name="jades",
        bands=NIRCAM_BANDS,
        pixel_scale=0.03,
        zero_point=31.4,
        psf_fwhm=(0.033, 0.040, 0.050, 0.066, 0.092, 0.111, 0.116, 0.137, 0.145),
        five_sigma_depth=(29.6, 29.9, 29.9, 29.9, 30.1, 29.5, 30.0, 29.5, 29.7),
        reference_years=None,
        gold_band="f444w",
        filter_files=tuple(
            f"jwst_{band}" for band in ("f090w", "f115w", "f150w", "f200w", "f277w", "f335m", "f356w", "f410m", "f444w")
        ),
        sky_brightness=(22.3, 22.5, 22.7, 22.8, 23.1, 23.0, 22.9, 22.5, 22.0),
        saturation=(18.0, 18.0, 18.0, 18.0, 17.5, 17.0, 17.5, 17.0, 17.5),
        stars_per_arcmin2=2.0,
        psf_profile="airy",
        faint_limit=31.2,
        counts_at_25=92.0,  # galaxies are brighter at 4 micron than in i; JADES lists 94,000 sources in some 70 square arcminutes
        counts_slope=0.2,
        max_redshift=12.0,
    ),
    # The High Latitude Wide Area Survey's 5-sigma depths of points, diffraction-limited FWHM (with the detector's blur), zodiacal
    # light, saturation of one exposure to about 0.5 mag.
    "roman": Survey(
        name="roman",
        bands=("f106", "f129", "f158", "f184"),
        pixel_scale=0.11,
        zero_point=31.4,
        psf_fwhm=(0.098, 0.113, 0.137, 0.160),
        five_sigma_depth=(26.9, 26.95, 26.9, 26.25),
        reference_years=None,
        gold_band="f158",
        filter_files=("roman_Y106.res", "roman_J129.res", "roman_H158.res", "roman_F184.res"),
        sky_brightness=(22.5, 22.6, 22.7, 22.6),
        saturation=(16.0, 16.0, 16.0, 15.5),
        stars_per_arcmin2=4.0,
        psf_profile="airy",
        faint_limit=28.2,
        counts_slope=0.2,
        max_redshift=8.0,
    ),
}


def survey(name: str) -> Survey:
    """The survey of that name."""
    if name in SURVEYS:
        return SURVEYS[name]
    raise ConfigError(f"unknown survey {name!r}, {did_you_mean(name, SURVEYS, cutoff=0.3)}")


def to_njy(magnitude: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Flux in nanojansky of an AB magnitude."""
    return 10 ** (-0.4 * (np.asarray(magnitude, np.float64) - NJY_ZERO_POINT))


def to_magnitude(flux_njy: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """AB magnitude of a flux in nanojansky; fluxes below 1e-9 nJy count as that."""
    return NJY_ZERO_POINT - 2.5 * np.log10(np.maximum(flux_njy, 1e-9))


def depth(survey: Survey, years: float) -> NDArray[np.float64]:
    """(C,) AB magnitude of a point source at 5 sigma after ``years`` (noise falls with the root of the time)."""
    if years <= 0:
        raise ConfigError(f"years is {years}, expected a positive number")
    reference = np.array(survey.five_sigma_depth)
    return reference if survey.reference_years is None else reference + 1.25 * np.log10(years / survey.reference_years)


def typical_conditions(survey: Survey, years: float) -> Conditions:
    """Depth and seeing of the survey's table, without scatter."""
    return Conditions(depth(survey, years), np.array(survey.psf_fwhm))


def draw_conditions(survey: Survey, years: float, rng: np.random.Generator) -> Conditions:
    """Depth and seeing of one scene, drawn from the survey's range."""
    bands = len(survey.bands)
    deep = depth(survey, years)
    shallow = deep if survey.shallow_depth is None else np.array(survey.shallow_depth)
    scene_depth = deep + rng.uniform() * (shallow - deep) + survey.depth_scatter * rng.standard_normal(bands)
    stretch = np.exp(survey.psf_scatter * rng.standard_normal(bands))
    return Conditions(scene_depth, np.array(survey.psf_fwhm) * stretch)


def pixel_noise(survey: Survey, conditions: Conditions) -> NDArray[np.float64]:
    """(C,) noise per pixel in nanojansky: the depth spread over the effective area of the PSF in pixels.

    From the ground 2.266 (FWHM / pixel)^2 (LSST's n_eff). Above the atmosphere an Airy pattern's rings and the pixel, no smaller
    than the PSF, count: 1 / sum of the squared shares of the pixels, 1.8 + 3.08 (FWHM / pixel)^2 to 2 %.
    """
    squared = (conditions.psf_fwhm / survey.pixel_scale) ** 2
    area = 1.8 + 3.08 * squared if survey.psf_profile == "airy" else np.maximum(2.266 * squared, 1.0)
    return to_njy(conditions.depth) / 5 / np.sqrt(area)


def noise(survey: Survey, years: float = 5.0) -> NDArray[np.float64]:
    """(C,) typical noise per pixel in nanojansky."""
    return pixel_noise(survey, typical_conditions(survey, years))


def example_data(*path: str) -> Traversable:
    """A file of the example data that pz-rail-base ships: templates, filter curves, photometry."""
    try:
        file = (files("rail") / "examples_data").joinpath(*path)
    except ModuleNotFoundError:
        file = None
    if file is None or not file.is_file():
        raise SetupError(f"{'/'.join(path)} is missing, an example data file of pz-rail-base: pip install pz-rail-base")
    return file


def read_curve(*path: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Wavelength (Angstrom, ascending, above 0) and value (0 or more) from a two-column text file of pz-rail-base."""
    with example_data("estimation_data", "data", *path).open() as lines:
        columns = np.loadtxt(lines, usecols=(0, 1), comments="#")
    columns = columns[columns[:, 0] > 0]
    return columns[:, 0], np.maximum(columns[:, 1], 0.0)


@dataclass(frozen=True)
class Filter:
    """A photon-counting passband: wavelength (W,) Angstrom and response (W,), with integral 1 over the logarithm of wavelength."""

    wavelength: NDArray[np.float64]
    response: NDArray[np.float64]

    @property
    def effective_wavelength(self) -> float:
        """Mean of the logarithmic wavelength, in Angstrom."""
        weight = self.response * np.gradient(np.log(self.wavelength))
        return float(np.exp(np.sum(weight * np.log(self.wavelength)) / np.sum(weight)))


@cache
def filters(survey: Survey) -> tuple[Filter, ...]:
    """The survey's passbands, trimmed to where they pass more than 1 % of their peak, on 120 points each."""
    return tuple(_filter(name) for name in survey.filter_files)


def _filter(name: str) -> Filter:
    wavelength, transmission = read_curve("FILTER", name) if name.endswith(".res") else _read_sedpy(name)
    inside = wavelength[transmission > 0.01 * transmission.max()]
    grid = np.linspace(inside[0], inside[-1], 120)
    response = np.interp(grid, wavelength, transmission)
    return Filter(grid, response / np.trapezoid(response, np.log(grid)))


def _read_sedpy(name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Wavelength (Angstrom, ascending) and transmission of a filter that astro-sedpy ships."""
    curve = observate.Filter(name)
    return np.asarray(curve.wavelength, np.float64), np.maximum(np.asarray(curve.transmission, np.float64), 0.0)
