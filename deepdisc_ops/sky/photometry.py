"""Forced photometry: the flux in circles around given positions, with the errors that the pixels' noise gives it.

Pixels count by the share of their area that lies in the circle, exactly; invalid ones and those beyond the edge do not count.
Fluxes are nanojansky, positions pixels, 0-based with the first pixel's centre at 0.

Glossary: N objects, C bands, A apertures, H x W pixels, S x S pixels of the square around an aperture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepdisc_ops.errors import CatalogError, ImageError
from deepdisc_ops.sky.fluxes import NJY_ZERO_POINT
from deepdisc_ops.sky.images import SkyImage

Floats = NDArray[np.float64]

MIN_COVERAGE = 0.75
BATCH_PIXELS = 4_000_000  # pixels of squares held at once


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
    divided by its share of the area; below ``min_coverage`` it is NaN.
    """
    centres = np.stack([np.asarray(x, np.float64), np.asarray(y, np.float64)], axis=-1).reshape(-1, 2)
    if not np.isfinite(centres).all():
        raise CatalogError(f"{int((~np.isfinite(centres)).any(axis=1).sum())} of {len(centres)} positions are not finite")
    sizes = np.broadcast_to(np.asarray(radii, np.float64), (len(image.bands), np.shape(radii)[-1]))
    if sizes.size and not sizes.min() > 0:
        raise CatalogError(f"an aperture has the radius {sizes.min()} arcsec; expected positive radii")
    noise = _variance(image, variance)
    invalid = image.invalid if image.invalid is not None else np.broadcast_to(image.mask, image.data.shape)
    flux, error, coverage = (np.empty((len(centres), *sizes.shape)) for _ in range(3))
    for band, pixels in enumerate(sizes / image.pixel_scale):
        plane = np.where(invalid[band], 0.0, image.data[band])
        spread = np.where(invalid[band], 0.0, noise[band])  # an image's own variance is infinite where it is invalid
        measured = _measure(plane, spread, ~invalid[band], centres, pixels)
        flux[:, band], error[:, band], coverage[:, band] = measured
        error[:, band] *= np.sqrt(correlated_variance(pixels, noise_correlation))
    enough = (coverage >= min_coverage) & (coverage > 0)
    share = np.where(enough, coverage, np.nan)
    return Photometry(image.bands, sizes.copy(), flux / share, error / share, coverage)


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


def circle_overlap(dx: Floats, dy: Floats, radius: Floats) -> Floats:
    """Share of each pixel's area inside circles: (N, S, S), row by row.

    dx, dy (N, S + 1): positions of the pixels' edges from the circle's centre; radius (N,), all in pixels.
    The area of the circle within [0, x] x [0, y] is odd in x and in y; a pixel is what four of them leave.
    """
    r = radius[:, None]
    u, v = np.minimum(np.abs(dx), r), np.minimum(np.abs(dy), r)
    half = [0.5 * (w * np.sqrt(r**2 - w**2) + r**2 * np.arcsin(w / r)) for w in (u, v)]
    u, v = u[:, None, :], v[:, :, None]
    cut = half[0][:, None, :] + half[1][:, :, None] - np.pi / 4 * r[:, :, None] ** 2
    corner = np.where(u**2 + v**2 <= r[:, :, None] ** 2, u * v, cut) * np.sign(dx)[:, None, :] * np.sign(dy)[:, :, None]
    return np.asarray(np.diff(np.diff(corner, axis=1), axis=2))


def correlated_variance(radius: ArrayLike, correlation: float) -> Floats:
    """Factor (A,) on the variance in circles of ``radius`` (A,) pixels when neighbours correlate along rows and columns.

    Diagonal neighbours correlate by the square. Pixels a distance d apart meet within the circle over the lens that it
    shares with itself shifted by d.
    """
    r = np.asarray(radius, np.float64)

    def shared(d: float) -> Floats:
        s = np.minimum(d / (2 * r), 1.0)
        return np.asarray(2 / np.pi * (np.arccos(s) - s * np.sqrt(1 - s**2)))

    return np.asarray(1 + 4 * correlation * shared(1.0) + 4 * correlation**2 * shared(math.sqrt(2)))


def _variance(image: SkyImage, given: ArrayLike | None) -> NDArray[np.floating]:
    """(C, H, W) or (C, 1, 1) variance of the pixels."""
    values = image.variance if given is None else np.asarray(given, np.float64)
    if values is None:
        raise ImageError("the image has no variance; pass the variance of its pixels, nJy^2, one value a band")
    if values.shape not in ((len(image.bands),), image.data.shape):
        raise ImageError(f"the variance has the shape {values.shape}; expected ({len(image.bands)},) or {image.data.shape}")
    return values[:, None, None] if values.ndim == 1 else values


def _measure(
    plane: Floats, variance: NDArray[np.floating], valid: NDArray[np.bool_], centres: Floats, radii: Floats
) -> tuple[Floats, Floats, Floats]:
    """Summed flux, its error and the covered share, each (N, A), of one band; radii (A,) pixels."""
    sums, errors, shares = (np.empty((len(centres), len(radii))) for _ in range(3))
    for a, radius in enumerate(radii):
        reach = math.ceil(radius + 0.5)
        steps = np.arange(-reach, reach + 1)
        batch = max(1, BATCH_PIXELS // len(steps) ** 2)
        for start in range(0, len(centres), batch):
            rows = slice(start, start + batch)
            x, y = centres[rows].T
            columns, lines = (np.rint(position).astype(np.int64)[:, None] + steps for position in (x, y))
            edges = [
                np.concatenate([pixels - 0.5, pixels[:, -1:] + 0.5], axis=1) - position[:, None]
                for pixels, position in ((columns, x), (lines, y))
            ]
            weight = circle_overlap(edges[0], edges[1], np.full(len(x), radius))
            inside = ((lines >= 0) & (lines < plane.shape[0]))[:, :, None] & ((columns >= 0) & (columns < plane.shape[1]))[:, None]
            at = lines.clip(0, plane.shape[0] - 1)[:, :, None], columns.clip(0, plane.shape[1] - 1)[:, None]
            weight *= inside & valid[at]
            sums[rows, a] = np.einsum("nij,nij->n", weight, plane[at])
            errors[rows, a] = np.sqrt(np.einsum("nij,nij,nij->n", weight, weight, variance[at]))
            shares[rows, a] = weight.sum(axis=(1, 2)) / (np.pi * radius**2)
    return sums, errors, shares
