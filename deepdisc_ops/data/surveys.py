"""What the simulator must know of a survey: bands, pixels, seeing and depth.

Filter curves come from the data that ship with pz-rail-base. Flux is in nanojansky (AB zero point 31.4).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.errors import ConfigError, SetupError

AB_ZERO_POINT_NJY = 31.4
"""AB magnitude of one nanojansky."""


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
    stars_per_arcmin2: number density of stars.
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
    stars_per_arcmin2: float
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
        return float(10 ** (0.4 * (self.zero_point - AB_ZERO_POINT_NJY)))


@dataclass(frozen=True)
class Conditions:
    """Depth (AB, 5 sigma point source) and seeing (FWHM, arcsec) of one scene, each (C,) float64."""

    depth: NDArray[np.float64]
    psf_fwhm: NDArray[np.float64]


SURVEYS = {
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
        stars_per_arcmin2=6.0,
    ),
    # Deep end, PSF and correlation measured on a COSMOS UltraDeep coadd (variance plane, PSF models); the shallow end
    # is that of a COSMOS cutout with five times the noise in g and r. Scenes fill the range, so that a network holds for either.
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
        stars_per_arcmin2=4.0,
        shallow_depth=(25.9, 26.2, 26.4, 26.4, 25.6),
        depth_scatter=0.3,
        psf_scatter=0.1,
        background=0.2,
        noise_correlation=0.2,
    ),
}


def survey(name: str) -> Survey:
    """The survey of that name."""
    if name in SURVEYS:
        return SURVEYS[name]
    near = difflib.get_close_matches(name, SURVEYS, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"unknown survey {name!r}, expected one of {', '.join(SURVEYS)}{hint}")


def to_njy(magnitude: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Flux in nanojansky of an AB magnitude."""
    return 10 ** (-0.4 * (np.asarray(magnitude, np.float64) - AB_ZERO_POINT_NJY))


def to_magnitude(flux_njy: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """AB magnitude of a flux in nanojansky; fluxes below 1e-9 nJy count as that."""
    return AB_ZERO_POINT_NJY - 2.5 * np.log10(np.maximum(flux_njy, 1e-9))


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
    """(C,) noise per pixel in nanojansky: the depth spread over the effective area of the PSF, 2.266 (FWHM / pixel)^2."""
    area = np.maximum(2.266 * (conditions.psf_fwhm / survey.pixel_scale) ** 2, 1.0)
    return to_njy(conditions.depth) / 5 / np.sqrt(area)


def noise(survey: Survey, years: float = 5.0) -> NDArray[np.float64]:
    """(C,) typical noise per pixel in nanojansky."""
    return pixel_noise(survey, typical_conditions(survey, years))


def rail_data() -> Traversable:
    """Folder of the templates and filter curves inside pz-rail-base."""
    try:
        folder = files("rail") / "examples_data" / "estimation_data" / "data"
    except ModuleNotFoundError:
        folder = None
    if folder is None or not (folder / "FILTER").is_dir():
        raise SetupError("the example data of pz-rail-base, filters and templates, are missing: pip install pz-rail-base")
    return folder


def read_curve(*path: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Wavelength (Angstrom, ascending, above 0) and value (0 or more) from a two-column text file of pz-rail-base."""
    with rail_data().joinpath(*path).open() as lines:
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
    wavelength, transmission = read_curve("FILTER", name)
    inside = wavelength[transmission > 0.01 * transmission.max()]
    grid = np.linspace(inside[0], inside[-1], 120)
    response = np.interp(grid, wavelength, transmission)
    return Filter(grid, response / np.trapezoid(response, np.log(grid)))
