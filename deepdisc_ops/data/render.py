"""Pictures of sources: a fast renderer in Fourier space and GalSim's drawing of the same sources as its reference.

A source is a disc (exponential) and a bulge (Sersic n = 4) with one axis ratio and angle, and star-forming knots, which are
points; stars are points. The PSF, Kolmogorov's or that of a round aperture with an obscured middle, and the square pixel act in
Fourier space, where all of them are analytic or radial tables, so that a stamp costs one inverse transform per band.

Glossary: N sources of a batch, C bands, J knots a source, S the side of a stamp in pixels, P points per side that are computed;
k angular frequency in radian per pixel.
A stamp with the origin (x0, y0) shows the pixels x0 .. x0 + S - 1; positions are 0-based, the centre of the first pixel is (0, 0).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import galsim
import numpy as np
from numpy.typing import NDArray
from scipy import fft, optimize

from deepdisc_ops.data.population import Population

Floats = NDArray[np.float64]
Image = NDArray[np.float32]
Profile = Literal["kolmogorov", "airy"]

STAMP_SIDES = (16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1024)
FAINTEST = 0.05
"""A stamp reaches to where the surface brightness falls to this share of the noise per pixel."""

ALIASED = 0.05
"""Most light, in units of the noise, that a pixel may get from frequencies beyond the computed ones; decides how fine they are."""

FINEST = 3
"""Most points per pixel and axis: beyond these frequencies no telescope passes light onto the pixels of its survey."""

PSF_STEP = 0.01
"""Relative change of the FWHM over which the transform of a PSF is interpolated by a parabola (error 1e-6 of the peak)."""

OBSCURATION = 0.2
"""Linear obscuration of the Airy profile's aperture."""

_QUADRANT_EDGE = 6 * np.pi

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


@dataclass(frozen=True)
class Optics:
    """How a field is seen: fwhm (C,) arcsec of the PSF's ``profile`` at stretch 1, pixel_scale arcsec, noise (C,) nJy per pixel.

    The noise says how far and how finely sources are drawn; it is not added.
    """

    fwhm: Floats
    noise: Floats
    pixel_scale: float
    profile: Profile = "kolmogorov"


def stamp_sides(population: Population, optics: Optics, stretch: Floats) -> NDArray[np.intp]:
    """(N,) side in pixels of the stamp that holds each source down to `FAINTEST` of the noise in every band.

    The FWHM at each source is stretch (N,) times the optics'. The profiles are inverted one by one; their convolution adds
    the PSF's core.
    """
    limit = FAINTEST * optics.noise / optics.pixel_scale**2
    fwhm = optics.fwhm * stretch[:, None]
    reach = np.maximum(
        _disc_reach(population.disc_flux, population.disc_radius, limit),
        _bulge_reach(population.bulge_flux, population.bulge_radius, limit),
    )
    reach /= np.sqrt(population.axis_ratio)  # the major axis
    reach = np.maximum(reach + fwhm.max(axis=1), _psf_reach(population.flux, fwhm, limit, optics.profile))
    farthest = np.hypot(population.knot_offsets[..., 0], population.knot_offsets[..., 1]).max(axis=1, initial=0.0)
    reach = np.maximum(reach, farthest + _psf_reach(population.knot_flux, fwhm, limit, optics.profile))
    wanted = 2 * reach / optics.pixel_scale + 2
    return np.array(STAMP_SIDES)[np.minimum(np.searchsorted(STAMP_SIDES, wanted), len(STAMP_SIDES) - 1)]


def _disc_reach(flux: Floats, radius: Floats, limit: Floats) -> Floats:
    length = np.maximum(radius, 1e-3)[:, None] / EXPONENTIAL_RADIUS
    central = flux / (2 * np.pi * length**2)
    return (length * np.log(np.maximum(central / limit, 1.0))).max(axis=1)


def _bulge_reach(flux: Floats, radius: Floats, limit: Floats) -> Floats:
    length = np.maximum(radius, 1e-3)[:, None]
    central = flux / (SERSIC4_LIGHT * length**2) * np.exp(SERSIC4_B)
    return (length * (np.log(np.maximum(central / limit, 1.0)) / SERSIC4_B) ** 4).max(axis=1)


def _psf_reach(flux: Floats, fwhm: Floats, limit: Floats, profile: Profile) -> Floats:
    """Radius beyond which a point is fainter than the limit in all bands, at least 1.2 FWHM; fwhm (N, C) arcsec."""
    radius, brightness = psf_envelope(profile)
    wanted = np.log(np.maximum(limit * fwhm**2 / np.maximum(flux, 1e-9), 1e-30))
    halo = np.exp(np.interp(wanted, np.log(brightness[::-1]), np.log(radius[::-1])))
    return (fwhm * np.maximum(halo, 1.2)).max(axis=1)


def samplings(population: Population, optics: Optics) -> NDArray[np.intp]:
    """(N,) points per pixel and axis that keep the aliased light of each source below `ALIASED` of the noise in every band."""
    wanted = np.ones(len(population), np.intp)
    scale = optics.pixel_scale * np.sqrt(1 / population.axis_ratio)
    for sampling in range(1, FINEST):
        edge = np.pi * sampling  # the smallest frequency that is not computed
        disc = (1 + (edge * population.disc_radius / EXPONENTIAL_RADIUS / scale) ** 2) ** -1.5
        bulge = sersic4_table()((edge * population.bulge_radius / scale).astype(np.float32))
        sharp = population.disc_flux * disc[:, None] + population.bulge_flux * bulge[:, None] + population.knot_flux
        beyond = np.array([_share_beyond(optics.profile, fwhm / optics.pixel_scale, sampling) for fwhm in optics.fwhm])
        wanted += (sharp * beyond > ALIASED * optics.noise).any(axis=1)
    return wanted


def _share_beyond(profile: Profile, fwhm: float, sampling: int) -> float:
    """Light of a point of flux 1 that frequencies above ``sampling`` points per pixel can put into one pixel; fwhm in pixels."""
    k, response = _quadrant(profile, fwhm)
    computed = k < np.pi * sampling
    response[np.ix_(computed, computed)] = 0
    return float(np.abs(response).mean() * _QUADRANT_EDGE**2 / np.pi**2)


def central_share(optics: Optics) -> Floats:
    """(C,) share of a point's light in the pixel on whose centre it lies."""
    edge = _QUADRANT_EDGE**2 / np.pi**2
    return np.array([_quadrant(optics.profile, fwhm / optics.pixel_scale)[1].mean() * edge for fwhm in optics.fwhm])


def _quadrant(profile: Profile, fwhm: float) -> tuple[Image, Image]:
    """Frequencies (K,) along an axis, the middles of equal steps, and the transform (K, K) of PSF times pixel; fwhm in pixels."""
    step = np.pi / 16
    k = np.arange(step / 2, _QUADRANT_EDGE, step, dtype=np.float32)
    pixel = np.sinc(k / 2 / np.pi)
    response = psf_table(profile)(np.hypot(k, k[:, None]) * np.float32(fwhm)) * pixel * pixel[:, None]
    return k, response.astype(np.float32)


def render(population: Population, x: Floats, y: Floats, optics: Optics, stretch: Floats | None = None) -> Iterator[Stamps]:
    """Noiseless stamps of all sources at x, y (N,) pixels, in batches of equal side.

    stretch (N,): FWHM at each source relative to the optics', 1 without one.
    """
    stretch = np.ones(len(population)) if stretch is None else stretch
    cell = np.rint((stretch - 1) / (2 * PSF_STEP)).astype(np.intp)
    kinds = np.stack([stamp_sides(population, optics, stretch), samplings(population, optics), cell], axis=1)
    for kind in np.unique(kinds, axis=0):
        members = np.flatnonzero((kinds == kind).all(axis=1))
        side, sampling, centre = int(kind[0]), int(kind[1]), 1 + 2 * PSF_STEP * float(kind[2])
        varies = bool((stretch[members] != centre).any())
        plane = _FourierPlane(side, sampling, optics, centre, varies)
        batch = max(1, BATCH_PIXELS // (side * sampling) ** 2)
        for start in range(0, len(members), batch):
            chosen = members[start : start + batch]
            origins = stamp_origins(x[chosen], y[chosen], side)
            offsets = np.stack([x[chosen], y[chosen]], axis=1) - origins
            yield Stamps(chosen, origins, plane.draw(population.select(chosen), offsets, stretch[chosen]))


def stamp_origins(x: Floats, y: Floats, side: int) -> NDArray[np.intp]:
    """(N, 2) first pixel of stamps whose middle is the pixel nearest to each position."""
    return np.rint(np.stack([x, y], axis=1)).astype(np.intp) - side // 2


class _FourierPlane:
    """The frequencies of stamps of one side, and the transform of PSF times pixel in each band.

    sampling points per pixel and axis are computed, of which those at the pixels' centres are kept. centre is the stretch of the
    PSF about which it varies by up to `PSF_STEP`.
    """

    def __init__(self, side: int, sampling: int, optics: Optics, centre: float, varies: bool) -> None:
        self.sampling, self.pixel_scale, self.centre, self.varies = sampling, optics.pixel_scale, centre, varies
        self.points = side * sampling
        self.kx = (2 * np.pi * np.fft.rfftfreq(self.points, 1 / sampling)).astype(np.float32)
        self.ky = (2 * np.pi * np.fft.fftfreq(self.points, 1 / sampling)).astype(np.float32)
        self.response = self._response(optics, centre)
        if varies:
            below, above = (self._response(optics, centre + step) for step in (-PSF_STEP, PSF_STEP))
            self.slope = (above - below) / 2
            self.curvature = (above + below) / 2 - self.response

    def _response(self, optics: Optics, stretch: float) -> Image:
        """(C, P, P // 2 + 1) transform of PSF times pixel."""
        radius = np.hypot(self.kx[None, :], self.ky[:, None])
        pixel = np.sinc(self.kx / 2 / np.pi)[None, :] * np.sinc(self.ky / 2 / np.pi)[:, None] * self.sampling**2
        table = psf_table(optics.profile)
        return np.stack([table(radius * np.float32(fwhm * stretch / self.pixel_scale)) * pixel for fwhm in optics.fwhm]).astype(
            np.float32
        )

    def draw(self, population: Population, offsets: Floats, stretch: Floats) -> Image:
        """(N, C, S, S) stamps of sources at offsets (N, 2) x, y from the centre of the stamps' first pixel."""
        disc, bulge = self._profiles(population)
        shift = self._waves(self.ky, offsets[:, 1])[:, :, None] * self._waves(self.kx, offsets[:, 0])[:, None, :]
        knotted = np.flatnonzero(population.knot_flux.any(axis=1))
        knots = self._knots(population.knot_offsets[knotted], offsets[knotted])
        disc_flux, bulge_flux, knot_flux = (
            flux.astype(np.float32)[:, :, None, None]
            for flux in (population.disc_flux, population.bulge_flux, population.knot_flux)
        )
        share = ((stretch - self.centre) / PSF_STEP).astype(np.float32)[:, None, None]
        side = self.points // self.sampling
        stamps = np.empty((len(population), len(self.response), side, side), np.float32)
        for band, response in enumerate(self.response):
            if self.varies:
                response = response + share * (self.slope[band] + share * self.curvature[band])
            light = disc * disc_flux[:, band]
            if bulge is not None:
                light += bulge * bulge_flux[:, band]
            spectrum = light * shift
            if len(knotted):
                spectrum[knotted] += knots * knot_flux[knotted, band]
            spectrum *= response
            picture = fft.irfft2(spectrum, s=(self.points, self.points), workers=1, overwrite_x=True)
            stamps[:, band] = picture[:, :: self.sampling, :: self.sampling]
        return stamps

    def _waves(self, k: Image, position: Floats) -> NDArray[np.complex64]:
        """exp(-i k x) of positions (...,) in pixels, with an axis of frequencies behind theirs."""
        return np.exp(-1j * position[..., None] * k).astype(np.complex64)

    def _knots(self, knot_offsets: Floats, offsets: Floats) -> NDArray[np.complex64]:
        """(N, P, P // 2 + 1) transforms of the knots, of flux 1 together: the mean of exp(-i k.x_j), which separates in x and y."""
        place = offsets[:, None, :] + knot_offsets / self.pixel_scale
        rows, columns = self._waves(self.ky, place[..., 1]), self._waves(self.kx, place[..., 0])
        return rows.swapaxes(1, 2) @ columns / np.float32(max(place.shape[1], 1))

    def _profiles(self, population: Population) -> tuple[Image, Image | None]:
        """Transforms (N, P, P // 2 + 1) of disc and bulge of flux 1; no bulge if none of the sources has one."""
        cos, sin, ratio = (
            column.astype(np.float32)[:, None, None]
            for column in (np.cos(population.angle), np.sin(population.angle), population.axis_ratio)
        )
        along = self.kx[None, None, :] * cos + self.ky[None, :, None] * sin
        across = self.ky[None, :, None] * cos - self.kx[None, None, :] * sin
        squared = along * along / ratio + across * across * ratio
        length = (population.disc_radius / EXPONENTIAL_RADIUS / self.pixel_scale).astype(np.float32)[:, None, None]
        base = 1 + squared * (length * length)
        disc = 1 / (base * np.sqrt(base))
        with_bulge = np.flatnonzero(population.bulge_flux.any(axis=1))
        if not len(with_bulge):
            return disc, None
        radius = (population.bulge_radius[with_bulge] / self.pixel_scale).astype(np.float32)[:, None, None]
        bulge = np.zeros_like(disc)
        bulge[with_bulge] = sersic4_table()(np.sqrt(squared[with_bulge]) * radius)
        return disc, bulge


class RadialTable:
    """The Fourier transform of a round profile of flux 1, tabulated over the logarithm of frequency."""

    lowest, highest, points = 1e-3, 3e3, 9000

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


def unit_psf(profile: Profile) -> galsim.GSObject:
    """The PSF of FWHM 1 and flux 1 as GalSim has it."""
    if profile == "kolmogorov":
        return galsim.Kolmogorov(fwhm=1.0)
    airy = galsim.Airy(lam_over_diam=1.0, obscuration=OBSCURATION)
    half = optimize.brentq(lambda r: airy.xValue(r, 0.0) - airy.xValue(0.0, 0.0) / 2, 0.3, 0.8)
    return galsim.Airy(lam_over_diam=float(0.5 / half), obscuration=OBSCURATION)


@cache
def psf_table(profile: Profile) -> RadialTable:
    """Transform of the PSF of FWHM 1."""
    return RadialTable(unit_psf(profile))


@cache
def psf_envelope(profile: Profile) -> tuple[Floats, Floats]:
    """Radii, in FWHM, and the greatest surface brightness of the PSF of FWHM 1 from there outwards: it falls, rings do not."""
    radius = np.geomspace(0.3, 2e3, 4000)
    psf = unit_psf(profile)
    brightness = np.maximum.accumulate([psf.xValue(r, 0.0) for r in radius[::-1]])[::-1]
    return radius, np.maximum(brightness, 1e-30)


@cache
def sersic4_table() -> RadialTable:
    """De Vaucouleurs bulge of half-light radius 1."""
    return RadialTable(galsim.DeVaucouleurs(half_light_radius=1.0, gsparams=galsim.GSParams(maxk_threshold=1e-4)))


ACCURATE = galsim.GSParams(maxk_threshold=1e-4, kvalue_accuracy=1e-6, maximum_fft_size=16384, folding_threshold=2e-3)
"""Settings with which GalSim is right to well below the noise."""


def render_galsim(
    population: Population,
    x: Floats,
    y: Floats,
    optics: Optics,
    stretch: Floats | None = None,
    params: galsim.GSParams = ACCURATE,
) -> Iterator[Stamps]:
    """The stamps of `render` drawn by GalSim, one source at a time: slow, and independent of the tables above."""
    stretch = np.ones(len(population)) if stretch is None else stretch
    unit = unit_psf(optics.profile).withGSParams(params)
    for i, side in enumerate(stamp_sides(population, optics, stretch)):
        origin = stamp_origins(x[[i]], y[[i]], int(side))
        shapes = _galsim_shapes(population, i, params)
        offset = np.array([x[i], y[i]]) - origin[0] - (side - 1) / 2
        flux = np.zeros((1, len(optics.fwhm), side, side), np.float32)
        for band, fwhm in enumerate(optics.fwhm):
            psf = unit.dilate(float(fwhm * stretch[i]))
            image = galsim.Image(flux[0, band], scale=optics.pixel_scale)
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
    knots = galsim.Add([galsim.DeltaFunction(gsparams=params).shift(*place) for place in population.knot_offsets[i]])
    parts = [(disc, population.disc_flux[i]), (bulge, population.bulge_flux[i]), (knots, population.knot_flux[i])]
    return [(shape, light) for shape, light in parts if light.any()]
