"""Photometry: light in circles around positions and inside the outlines of detections, with the errors that the pixels give it.

Circles are summed by sep, pixels counting by the share of their area inside, exactly. Fluxes are nanojansky, positions pixels,
0-based with the first pixel's centre at 0. A pixel has one owner at most:

- with masks, the object whose mask is the most probable there, and at least 1/2;
- without, the object that it is most central to, in the ellipse through the corners of its box. On simulated LSST skies that
  ellipse holds 93 % of the light at i < 24 and 99 % at 24 < i < 25.3 (medians); masks end at an isophote and hold less.

Pixels that a neighbour owns count as dark: what it hides is about what it shines into the others. On the same skies this leaves
less bias for close pairs than scaling the rest up or taking the pixels opposite, and as good colours.

No local background is taken off. Training sets and coadds are sky-subtracted; undetected sources leave 0.1 of the noise per pixel,
and taking that off made colours no better and bright galaxies fainter (annuli, meshes and medians tried on the same skies).

Glossary: N objects, C bands, A apertures, H x W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import sep
from numpy.typing import ArrayLike, NDArray

from deepdisc_ops.errors import CatalogError, ImageError
from deepdisc_ops.sky.detections import MASK_SIDE, Array, Detections
from deepdisc_ops.sky.fluxes import NJY_ZERO_POINT
from deepdisc_ops.sky.images import SkyImage

Floats = NDArray[np.float64]
Owners = NDArray[np.int32]

DIAMETER_PIXELS = 10.0
"""Default diameter of the circles: 2 arcsec of LSST, three times the PSF's FWHM where that is sampled as usual.

Of 6 to 16 px, colours of simulated LSST galaxies are best at 10: smaller circles feel the PSF of each band (-0.06 mag in g - i
at 6 px, -0.03 at 10), larger ones noise and neighbours.
"""
MIN_COVERAGE = 0.75
NOISE_PIXELS = 65536  # pixels of a band that its noise is measured from
CLIP = 4.0  # pixels further from the median than so many times the noise belong to sources
_NODES, _NODE_WEIGHTS = (values / 2 for values in np.polynomial.legendre.leggauss(8))  # Gauss-Legendre of [-1/2, 1/2]


@dataclass(frozen=True)
class Photometry:
    """Fluxes of N objects through A apertures.

    radii (C, A) arcsec; flux and error (N, C, A) nJy, NaN where too little of the aperture is valid;
    coverage (N, C, A) share of the aperture's area on valid pixels.
    """

    bands: tuple[str, ...]
    radii: Floats
    flux: Floats
    error: Floats
    coverage: Floats

    def __len__(self) -> int:
        return len(self.flux)

    def dereddened(self, ebv: ArrayLike, coefficients: ArrayLike) -> Photometry:
        """As seen without the dust of the Milky Way: ebv (N,) or () mag, coefficients (C,) are A(band) / E(B-V)."""
        extinction = np.asarray(ebv, np.float64)[..., None] * np.asarray(coefficients, np.float64)
        factor = 10 ** (0.4 * extinction)[..., None]
        return replace(self, flux=self.flux * factor, error=self.error * factor)


@dataclass(frozen=True)
class PixelNoise:
    """Noise of the pixels of empty sky: sigma (C,) nJy; correlation (C,) of neighbours along rows and columns, 0 to 0.5."""

    sigma: Floats
    correlation: Floats


def measure(
    image: SkyImage, detections: Detections, *, diameter: ArrayLike | None = None, noise: PixelNoise | None = None
) -> dict[str, Array]:
    """Columns for `Detections.extra`: flux, flux_err, flux_iso, flux_iso_err, each (N, C) float32 nJy in the image's bands.

    flux is the light in a circle of ``diameter`` arcsec (default: `DIAMETER_PIXELS`; (C,) to follow each band's PSF) about the
    box's centre; flux_iso that of the pixels an object owns. Invalid pixels are made up for by the rest of the area; NaN where
    they are more than a quarter of it, neighbours own all, or there is no noise. Errors are those of the image's variance, or of
    its measured ``noise``, without the photons of the source; hand that in where objects of several windows are to have
    comparable errors.
    """
    bands = len(image.bands)
    sizes = DIAMETER_PIXELS if diameter is None else np.asarray(diameter, np.float64) / image.pixel_scale
    if np.shape(sizes) not in ((), (bands,)) or not np.all(np.asarray(sizes) > 0):
        found = np.asarray(diameter).tolist()
        raise CatalogError(f"the apertures' diameter is {found}; expected arcsec above 0, one, or one for each of {bands} bands")
    radii = np.broadcast_to(np.asarray(sizes) / 2, bands)[:, None]
    owners = owner_map(detections, *image.data.shape[1:])
    noise = noise or _pixel_noise(image, owners == 0)
    variance = _variance(image, noise.sigma**2 if image.variance is None else None)
    sums = _circle_sums(image, variance, detections.centres.astype(np.float64), radii, owners)
    factor = noise_factor(radii, noise.correlation[:, None])
    flux, error = _made_up(sums.flux, np.sqrt(sums.variance * factor), sums.covered)
    iso, iso_error = _isophotal(image, variance, owners, len(detections), noise.correlation)
    columns = {"flux": flux[..., 0], "flux_err": error[..., 0], "flux_iso": iso, "flux_iso_err": iso_error}
    return {name: values.astype(np.float32) for name, values in columns.items()}


def measure_noise(image: SkyImage, detections: Detections | None = None) -> PixelNoise:
    """Noise of an image from the pixels that no detection owns: robust scatter, and correlation of neighbours in a row.

    NaN in bands without a valid pixel, 0 where all are alike. Undetected sources count as noise, and correlate.
    """
    shape = image.data.shape[1:]
    return _pixel_noise(image, np.ones(shape, bool) if detections is None else owner_map(detections, *shape) == 0)


def forced_photometry(
    image: SkyImage,
    x: ArrayLike,
    y: ArrayLike,
    radii: ArrayLike,
    *,
    variance: ArrayLike | None = None,
    noise_correlation: float = 0.0,
    min_coverage: float = MIN_COVERAGE,
) -> Photometry:
    """Measure the fluxes at x, y (N,) pixels in circles of ``radii`` arcsec, (A,) or (C, A) where they follow each band's PSF.

    variance of the pixels, nJy^2, (C,) or (C, H, W), by default the image's own; noise_correlation: of neighbouring pixels,
    along rows and columns alike, 0.5 at most. Where part of an aperture is invalid, the flux is that of the valid part
    divided by its share of the area; below ``min_coverage`` it is NaN. Neighbours are not taken out.
    """
    centres = np.stack([np.asarray(x, np.float64), np.asarray(y, np.float64)], axis=-1).reshape(-1, 2)
    if not np.isfinite(centres).all():
        raise CatalogError(f"{int((~np.isfinite(centres)).any(axis=1).sum())} of {len(centres)} positions are not finite")
    sizes = np.broadcast_to(np.asarray(radii, np.float64), (len(image.bands), np.shape(radii)[-1]))
    if sizes.size and not sizes.min() > 0:
        raise CatalogError(f"an aperture has the radius {sizes.min()} arcsec; expected positive radii")
    pixels = sizes / image.pixel_scale
    sums = _circle_sums(image, _variance(image, variance), centres, pixels, None)
    error = np.sqrt(sums.variance * noise_factor(pixels, noise_correlation))
    flux, error = _made_up(sums.flux, error, sums.covered, min_coverage)
    return Photometry(image.bands, sizes.copy(), flux, error, sums.covered)


def magnitudes(flux: ArrayLike, error: ArrayLike) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """AB magnitudes, their errors and whether the object is detected, from fluxes and errors in nJy of any one shape.

    What lies below one sigma is not detected: its magnitude is the 1-sigma limit, its error 2.5 log10(2) mag, as the
    template codes take it. NaN where there is no flux.
    """
    f, sigma = np.asarray(flux, np.float64), np.asarray(error, np.float64)
    if sigma.size and np.nanmin(sigma, initial=np.inf) <= 0:
        raise CatalogError("a flux error is zero or negative; expected errors above 0 nJy")
    detected = f >= sigma
    unknown = ~(np.isfinite(f) & np.isfinite(sigma))
    bright = np.where(detected, f, sigma)
    magnitude = NJY_ZERO_POINT - 2.5 * np.log10(bright)
    uncertainty = np.where(detected, 2.5 / math.log(10) * sigma / bright, 2.5 * math.log10(2))
    return np.where(unknown, np.nan, magnitude), np.where(unknown, np.nan, uncertainty), detected


def owner_map(detections: Detections, height: int, width: int) -> Owners:
    """(H, W): 1 + the number of the object that owns the pixel, 0 for none (who owns what: see the module)."""
    owners = np.zeros((height, width), np.int32)
    claims = np.zeros((height, width), np.float32)
    margin = 0.0 if detections.masks is not None else (math.sqrt(2) - 1) / 2
    sides = detections.boxes[:, 2:] - detections.boxes[:, :2]
    corners = np.rint(np.concatenate([detections.boxes[:, :2] - margin * sides, detections.boxes[:, 2:] + margin * sides], axis=1))
    corners = np.clip(corners.astype(np.int64), 0, [width, height, width, height])
    for number in np.lexsort(detections.boxes.T).tolist():  # not in the order of the objects: a draw is decided alike in any
        x0, y0, x1, y1 = corners[number]
        box = detections.boxes[number].astype(np.float64)
        across, along = ((np.arange(a, b) + 0.5 - box[k]) / (box[k + 2] - box[k]) for k, a, b in ((0, x0, x1), (1, y0, y1)))
        if detections.masks is None:
            claim = 1 - 2 * ((across - 0.5) ** 2 + (along[:, None] - 0.5) ** 2)
        else:
            rows, columns = ((part * MASK_SIDE).astype(np.int64).clip(0, MASK_SIDE - 1) for part in (along, across))
            probability = detections.masks[number][rows[:, None], columns] / 255
            claim = np.where(probability >= 0.5, probability, 0)
        there = claims[y0:y1, x0:x1]
        won = claim > there
        there[won] = claim[won]
        owners[y0:y1, x0:x1][won] = number + 1
    return owners


def noise_factor(radius: ArrayLike, correlation: ArrayLike, *, whole_pixels: bool = False) -> Floats:
    """Variance of a sum over a circle of ``radius`` pixels in units of sum(area share x variance), as sep gives it.

    It is below 1 for white noise, since pixels that lie inside by a share w add w^2 of their variance, unless the area is made of
    whole_pixels; ``correlation`` (0.5 at most) of neighbours along rows and columns adds, that of diagonal ones is its square.
    Mean over all places of the circle among the pixels.
    """
    r, rho = np.asarray(radius, np.float64), np.asarray(correlation, np.float64)
    own = 1 if whole_pixels else _shared(r, 0, 0)
    return np.asarray(own + 4 * rho * _shared(r, 1, 0) + 4 * rho**2 * _shared(r, 1, 1))


def _shared(radius: Floats, dx: float, dy: float) -> Floats:
    """Share of a circle that lies in itself shifted by (dx, dy), the mean over pairs of points in two pixels that far apart."""
    u, v = (np.concatenate([-0.5 + _NODES, 0.5 + _NODES]),) * 2
    weight = np.tile(_NODE_WEIGHTS, 2) * (1 - np.abs(u))
    apart = np.hypot(u[:, None] + dx, v + dy)
    s = np.minimum(apart / (2 * radius[..., None, None]), 1.0)
    lens = 2 / np.pi * (np.arccos(s) - s * np.sqrt(1 - s**2))
    return np.asarray(np.einsum("...ij,i,j->...", lens, weight, weight))


def _variance(image: SkyImage, given: ArrayLike | None) -> NDArray[np.floating]:
    """(C, H, W) or (C, 1, 1) variance of the pixels."""
    values = image.variance if given is None else np.asarray(given, np.float64)
    if values is None:
        raise ImageError("the image has no variance; pass the variance of its pixels, nJy^2, one value a band")
    if values.shape not in ((len(image.bands),), image.data.shape):
        raise ImageError(f"the variance has the shape {values.shape}; expected ({len(image.bands)},) or {image.data.shape}")
    return values[:, None, None] if values.ndim == 1 else values


def _invalid(image: SkyImage) -> NDArray[np.bool_]:
    """(C, H, W)."""
    return np.broadcast_to(image.mask, image.data.shape) if image.invalid is None else image.invalid


def _pixel_noise(image: SkyImage, blank: NDArray[np.bool_]) -> PixelNoise:
    """Noise of the pixels where ``blank`` (H, W), or of all valid ones in a band that has none there."""
    rows = max(1, math.ceil(image.data[0].size / NOISE_PIXELS))
    sigma, correlation = np.full(len(image.bands), np.nan), np.zeros(len(image.bands))
    for band, (plane, invalid) in enumerate(zip(image.data[:, ::rows], _invalid(image)[:, ::rows], strict=True)):
        used = blank[::rows] & ~invalid
        used = used if used.any() else ~invalid
        if not used.any():
            continue
        middle = np.median(plane[used])
        sigma[band] = 1.4826 * np.median(np.abs(plane[used] - middle))
        used &= np.abs(plane - middle) < CLIP * sigma[band]
        scaled = plane - middle
        pairs = used[:, 1:] & used[:, :-1]
        if pairs.any():
            product = np.mean(scaled[:, 1:][pairs] * scaled[:, :-1][pairs], dtype=np.float64)
            correlation[band] = np.clip(product / np.mean(np.square(scaled[used]), dtype=np.float64), 0, 0.5)
    return PixelNoise(sigma, correlation)


class _Sums(NamedTuple):
    """Of circles, each (N, C, A): flux, variance (area share x variance), and the share of the area that is valid."""

    flux: Floats
    variance: Floats
    covered: Floats


def _circle_sums(
    image: SkyImage, variance: NDArray[np.floating], centres: Floats, radii: Floats, owners: Owners | None = None
) -> _Sums:
    """Sums of valid pixels over circles of radii (C, A) pixels about centres (N, 2); ``owners``: none of another object."""
    found = _Sums(*(np.zeros((len(centres), *radii.shape)) for _ in _Sums._fields))
    invalid = _invalid(image)
    for band, sizes in enumerate(radii):
        valid = ~invalid[band]
        plane, spread = np.where(valid, image.data[band], 0), np.where(valid, variance[band], 0)
        seen = valid.astype(np.float32)
        # one-dimensional, since sep's time grows with the square of the number of circles otherwise
        x, y, radius = (np.ascontiguousarray(values).ravel() for values in np.broadcast_arrays(*centres.T[:, :, None], sizes))
        others = {} if owners is None else {"segmap": owners, "seg_id": np.repeat(np.arange(len(centres)) + 1, len(sizes))}
        flux, error, _ = sep.sum_circle(plane, x, y, radius, var=spread.astype(np.float32), subpix=0, **others)
        area, _, _ = sep.sum_circle(seen, x, y, radius, subpix=0)
        for kept, values in zip(found, (flux, error**2, area / (np.pi * radius**2)), strict=True):
            kept[:, band] = values.reshape(-1, len(sizes))
    return found


def _isophotal(
    image: SkyImage, variance: NDArray[np.floating], owners: Owners, count: int, correlation: Floats
) -> tuple[Floats, Floats]:
    """Flux and error (N, C) of the pixels that each of ``count`` objects owns."""
    place = np.flatnonzero(owners)
    owner = owners.ravel()[place] - 1
    pixels = np.maximum(np.bincount(owner, minlength=count), 1)
    factor = noise_factor(np.sqrt(pixels / np.pi)[:, None], correlation, whole_pixels=True)
    invalid = _invalid(image)
    flux, error = np.empty((count, len(image.bands))), np.empty((count, len(image.bands)))
    for band in range(len(image.bands)):
        valid = ~invalid[band].ravel()[place]
        spread = np.broadcast_to(variance[band], owners.shape).ravel()[place]
        light, noise, share = (
            np.bincount(owner[valid], weights=values[valid], minlength=count).astype(np.float64)
            for values in (image.data[band].ravel()[place], spread, 1 / pixels[owner])
        )
        flux[:, band], error[:, band] = _made_up(light, np.sqrt(noise * factor[:, band]), share)
    return flux, error


def _made_up(flux: Floats, error: Floats, covered: Floats, min_coverage: float = MIN_COVERAGE) -> tuple[Floats, Floats]:
    """Flux and error of whole areas from those of the share that is covered; NaN where that is too little or no pixel counts."""
    share = np.where((covered >= min_coverage) & (error > 0), covered, np.nan)
    return flux / share, error / share
