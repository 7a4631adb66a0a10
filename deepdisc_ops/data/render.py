"""Pictures of sources: a fast renderer in Fourier space and GalSim's drawing of the same sources as its reference.

A source is a disc (exponential) and a bulge (Sersic n = 4) with one axis ratio and angle; stars are points. The Kolmogorov PSF
and the square pixel act in Fourier space, where all four are analytic or radial tables, so that a stamp costs one inverse
transform per band.

Glossary: N sources of a batch, C bands, S the side of a stamp in pixels; k angular frequency in radian per pixel.
A stamp with the origin (x0, y0) shows the pixels x0 .. x0 + S - 1; positions are 0-based, the centre of the first pixel is (0, 0).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import galsim
import numpy as np
from numpy.typing import NDArray
from scipy import fft

from deepdisc_ops.data.population import Population

Floats = NDArray[np.float64]
Image = NDArray[np.float32]

STAMP_SIDES = (16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512)
FAINTEST = 0.05
"""A stamp reaches to where the surface brightness falls to this share of the noise per pixel."""

SHARP_SNR = 300.0
"""Sources whose peak, were they points, exceeds this S/N are drawn on half pixels: aliasing costs up to 5e-4 of a peak."""

BATCH_PIXELS = 1 << 15
"""Pixels of one band that are transformed together: small enough for the processor's cache."""

EXPONENTIAL_RADIUS = 1.67834699
"""Half-light radius of an exponential disc in units of its scale length."""

SERSIC4_B = 7.66924944
"""b_n of the Sersic profile with n = 4: I(r) = I_e exp(-b ((r / r_e)^(1/4) - 1))."""

SERSIC4_LIGHT = 22.66523
"""Total light of the n = 4 profile in units of I_e r_e^2."""


@dataclass(frozen=True)
class Stamps:
    """A batch of noiseless pictures: which sources (N,), origins (N, 2) int x0, y0, and flux (N, C, S, S) nJy per pixel."""

    sources: NDArray[np.intp]
    origins: NDArray[np.intp]
    flux: Image

    def select(self, which: NDArray[np.generic]) -> Stamps:
        """The stamps of an index array or a mask."""
        return Stamps(self.sources[which], self.origins[which], self.flux[which])


def stamp_sides(population: Population, psf_fwhm: Floats, noise: Floats, pixel_scale: float) -> NDArray[np.intp]:
    """(N,) side in pixels of the stamp that holds each source down to `FAINTEST` of the noise (C,) in every band.

    psf_fwhm (C,) and pixel_scale in arcsec. The profiles are inverted one by one; their convolution adds the PSF's core.
    """
    limit = FAINTEST * noise / pixel_scale**2
    reach = np.maximum(
        _disc_reach(population.disc_flux, population.disc_radius, limit),
        _bulge_reach(population.bulge_flux, population.bulge_radius, limit),
    )
    reach /= np.sqrt(population.axis_ratio)  # the major axis
    reach = np.maximum(reach + 1.0 * psf_fwhm.max(), _psf_reach(population.flux, psf_fwhm, limit))
    wanted = 2 * reach / pixel_scale + 2
    return np.array(STAMP_SIDES)[np.minimum(np.searchsorted(STAMP_SIDES, wanted), len(STAMP_SIDES) - 1)]


def _disc_reach(flux: Floats, radius: Floats, limit: Floats) -> Floats:
    length = np.maximum(radius, 1e-3)[:, None] / EXPONENTIAL_RADIUS
    central = flux / (2 * np.pi * length**2)
    return (length * np.log(np.maximum(central / limit, 1.0))).max(axis=1)


def _bulge_reach(flux: Floats, radius: Floats, limit: Floats) -> Floats:
    length = np.maximum(radius, 1e-3)[:, None]
    central = flux / (SERSIC4_LIGHT * length**2) * np.exp(SERSIC4_B)
    return (length * (np.log(np.maximum(central / limit, 1.0)) / SERSIC4_B) ** 4).max(axis=1)


def _psf_reach(flux: Floats, psf_fwhm: Floats, limit: Floats) -> Floats:
    """Radius where a point's halo falls to the limit: 0.03 FWHM^(5/3) r^(-11/3) for Kolmogorov's, from 1.2 FWHM outwards."""
    halo = (0.03 * flux * psf_fwhm ** (5 / 3) / limit) ** (3 / 11)
    return np.maximum(halo, 1.2 * psf_fwhm).max(axis=1)


def render(population: Population, x: Floats, y: Floats, psf_fwhm: Floats, noise: Floats, pixel_scale: float) -> Iterator[Stamps]:
    """Noiseless stamps of all sources, in batches of equal side; x, y (N,) pixels, psf_fwhm and noise (C,) arcsec and nJy."""
    sides = stamp_sides(population, psf_fwhm, noise, pixel_scale)
    sampling = 1 + (population.flux * pixel_scale / psf_fwhm > SHARP_SNR * noise).any(axis=1)
    for side, fine in np.unique(np.stack([sides, sampling], axis=1), axis=0).tolist():
        members = np.flatnonzero((sides == side) & (sampling == fine))
        frequencies = _Frequencies(side, fine, psf_fwhm / pixel_scale)
        batch = max(1, BATCH_PIXELS // (side * fine) ** 2)
        for start in range(0, len(members), batch):
            chosen = members[start : start + batch]
            origins = stamp_origins(x[chosen], y[chosen], side)
            offsets = np.stack([x[chosen], y[chosen]], axis=1) - origins
            flux = frequencies.draw(population.select(chosen), offsets, pixel_scale)
            yield Stamps(chosen, origins, flux)


def stamp_origins(x: Floats, y: Floats, side: int) -> NDArray[np.intp]:
    """(N, 2) first pixel of stamps whose middle is the pixel nearest to each position."""
    return np.rint(np.stack([x, y], axis=1)).astype(np.intp) - side // 2


class _Frequencies:
    """The Fourier plane of stamps of one side: frequencies and the transform of PSF times pixel in each band.

    sampling points per pixel and axis are computed, of which those at the pixels' centres are kept; psf_fwhm (C,) pixels.
    """

    def __init__(self, side: int, sampling: int, psf_fwhm: Floats) -> None:
        self.sampling = sampling
        self.points = side * sampling
        self.kx = (2 * np.pi * np.fft.rfftfreq(self.points, 1 / sampling)).astype(np.float32)
        self.ky = (2 * np.pi * np.fft.fftfreq(self.points, 1 / sampling)).astype(np.float32)
        radius = np.hypot(self.kx[None, :], self.ky[:, None])
        pixel = np.sinc(self.kx / 2 / np.pi)[None, :] * np.sinc(self.ky / 2 / np.pi)[:, None]
        responses = [kolmogorov_table()(radius * np.float32(fwhm)) * pixel * sampling**2 for fwhm in psf_fwhm]
        self.response = np.stack(responses).astype(np.float32)

    def draw(self, population: Population, offsets: Floats, pixel_scale: float) -> Image:
        """(N, C, S, S) stamps of sources at offsets (N, 2) x, y from the centre of the stamps' first pixel."""
        disc, bulge = self._profiles(population, pixel_scale)
        shift = np.exp(-1j * offsets[:, 1, None] * self.ky).astype(np.complex64)[:, :, None]
        shift = shift * np.exp(-1j * offsets[:, 0, None] * self.kx).astype(np.complex64)[:, None, :]
        disc_flux = population.disc_flux.astype(np.float32)[:, :, None, None]
        bulge_flux = population.bulge_flux.astype(np.float32)[:, :, None, None]
        side = self.points // self.sampling
        stamps = np.empty((len(population), len(self.response), side, side), np.float32)
        for band, response in enumerate(self.response):
            light = disc * disc_flux[:, band]
            if bulge is not None:
                light += bulge * bulge_flux[:, band]
            light *= response
            picture = fft.irfft2(light * shift, s=(self.points, self.points), workers=1)
            stamps[:, band] = picture[:, :: self.sampling, :: self.sampling]
        return stamps

    def _profiles(self, population: Population, pixel_scale: float) -> tuple[Image, Image | None]:
        """Transforms (N, points, points // 2 + 1) of disc and bulge of flux 1; no bulge if none of the sources has one."""
        cos, sin, ratio = (
            column.astype(np.float32)[:, None, None]
            for column in (np.cos(population.angle), np.sin(population.angle), population.axis_ratio)
        )
        along = self.kx[None, None, :] * cos + self.ky[None, :, None] * sin
        across = self.ky[None, :, None] * cos - self.kx[None, None, :] * sin
        squared = along * along / ratio + across * across * ratio
        length = (population.disc_radius / EXPONENTIAL_RADIUS / pixel_scale).astype(np.float32)[:, None, None]
        base = 1 + squared * (length * length)
        disc = 1 / (base * np.sqrt(base))
        with_bulge = np.flatnonzero(population.bulge_flux.any(axis=1))
        if not len(with_bulge):
            return disc, None
        radius = (population.bulge_radius[with_bulge] / pixel_scale).astype(np.float32)[:, None, None]
        bulge = np.zeros_like(disc)
        bulge[with_bulge] = sersic4_table()(np.sqrt(squared[with_bulge]) * radius)
        return disc, bulge


class RadialTable:
    """The Fourier transform of a round profile of flux 1, tabulated over the logarithm of frequency."""

    lowest, highest, points = 1e-3, 3e3, 3000

    def __init__(self, profile: galsim.GSObject) -> None:
        grid = np.geomspace(self.lowest, self.highest, self.points)
        values = [profile.kValue(k, 0.0).real if k < profile.maxk else 0.0 for k in grid]
        self._values = np.append(values, values[-1]).astype(np.float32)
        self._slopes = np.diff(self._values)
        self._step = np.float32((self.points - 1) / np.log(self.highest / self.lowest))

    def __call__(self, frequency: Image) -> Image:
        """Values at frequencies of any shape, in units of one over the profile's size."""
        position = np.log(np.maximum(frequency, np.float32(self.lowest)) * np.float32(1 / self.lowest)) * self._step
        np.minimum(position, np.float32(self.points - 1), out=position)
        index = position.astype(np.int32)
        position -= index
        return self._values[index] + self._slopes[index] * position


@cache
def kolmogorov_table() -> RadialTable:
    """Atmospheric PSF of FWHM 1."""
    return RadialTable(galsim.Kolmogorov(fwhm=1.0))


@cache
def sersic4_table() -> RadialTable:
    """De Vaucouleurs bulge of half-light radius 1."""
    return RadialTable(galsim.DeVaucouleurs(half_light_radius=1.0, gsparams=galsim.GSParams(maxk_threshold=1e-4)))


def render_galsim(
    population: Population, x: Floats, y: Floats, psf_fwhm: Floats, noise: Floats, pixel_scale: float
) -> Iterator[Stamps]:
    """The stamps of `render` drawn by GalSim, one source at a time: slow, and independent of the tables above."""
    sides = stamp_sides(population, psf_fwhm, noise, pixel_scale)
    params = galsim.GSParams(maxk_threshold=1e-4, kvalue_accuracy=1e-6, maximum_fft_size=16384, folding_threshold=1e-2)
    psfs = [galsim.Kolmogorov(fwhm=fwhm, gsparams=params) for fwhm in psf_fwhm]
    for i, side in enumerate(sides):
        origin = stamp_origins(x[[i]], y[[i]], int(side))
        shapes = _galsim_shapes(population, i, params)
        offset = np.array([x[i], y[i]]) - origin[0] - (side - 1) / 2
        flux = np.zeros((1, len(psfs), side, side), np.float32)
        for band, psf in enumerate(psfs):
            image = galsim.Image(flux[0, band], scale=pixel_scale)
            for shape, light in shapes:
                source = psf if shape is None else galsim.Convolve(shape, psf)
                source.withFlux(light[band]).drawImage(image=image, add_to_image=True, offset=tuple(offset), method="auto")
        yield Stamps(np.array([i]), origin, flux)


def _galsim_shapes(population: Population, i: int, params: galsim.GSParams) -> list[tuple[galsim.GSObject | None, Floats]]:
    """Components of a source with their fluxes (C,); no shape stands for a point."""
    if population.is_star[i]:
        return [(None, population.disc_flux[i])]
    shear = galsim.Shear(q=population.axis_ratio[i], beta=population.angle[i] * galsim.radians)
    disc = galsim.Exponential(half_light_radius=population.disc_radius[i], gsparams=params).shear(shear)
    bulge = galsim.DeVaucouleurs(half_light_radius=population.bulge_radius[i], gsparams=params).shear(shear)
    parts = [(disc, population.disc_flux[i]), (bulge, population.bulge_flux[i])]
    return [(shape, light) for shape, light in parts if light.any()]
