"""Changes of training pixels that leave positions alone: blur, noise, bands that are missing.

Pixels (C, H, W) are nJy, NaN where invalid. `Frame` in sky/frames does the flips and rotations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from deepdisc_ops.config import AugmentSettings

FLIPS, ALL = 4, 8
"""Number of symmetries of `Frame.symmetric` without and with transposes."""
REACH = 4.0
"""Radius of the blurring kernel in units of its sigma."""


def draw_symmetry(settings: AugmentSettings, rng: np.random.Generator) -> int:
    """A number for `Frame.symmetric`."""
    return int(rng.integers({"none": 1, "flips": FLIPS, "all": ALL}[settings.symmetries]))


def blur_margin(settings: AugmentSettings) -> int:
    """Pixels around a crop that the widest blur looks at."""
    return math.ceil(REACH * settings.blur_px[1])


def degrade(
    pixels: NDArray[np.float32], settings: AugmentSettings, noise_njy: Sequence[float], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Blur, then noise, then missing bands, each drawn within its settings; noise_njy (C,) is the images' own per pixel.

    What is off draws nothing and costs nothing.
    """
    if settings.blur_px[1] > 0:
        pixels = blur(pixels, rng.uniform(*settings.blur_px))
    if settings.noise_factor[1] > 1:
        pixels = add_noise(pixels, rng.uniform(*settings.noise_factor), noise_njy, rng)
    if settings.band_dropout > 0:
        pixels = drop_bands(pixels, settings.band_dropout, rng)
    return pixels


def blur(pixels: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """Convolve every band with a Gaussian of ``sigma`` pixels; invalid pixels lend nothing to their neighbours."""
    if sigma == 0:
        return pixels
    valid = np.isfinite(pixels)
    light = _smooth(np.where(valid, pixels, 0), sigma)
    if not valid.all():
        share = _smooth(valid.astype(np.float32), sigma)
        light = np.divide(light, share, out=np.full_like(light, np.nan), where=valid)
    return light


def add_noise(
    pixels: NDArray[np.float32], factor: float, noise_njy: Sequence[float], rng: np.random.Generator
) -> NDArray[np.float32]:
    """White Gaussian noise that makes noise_njy (C,) ``factor`` times as large; sqrt(t1 / t2) turns t1 years into t2.

    Noise correlated over pixels stays underneath, and the photon noise of sources that a shorter exposure had is left out.
    """
    extra = math.sqrt(factor**2 - 1) * np.asarray(noise_njy, np.float32)[:, None, None]
    return pixels + extra * rng.standard_normal(pixels.shape, dtype=np.float32)


def drop_bands(pixels: NDArray[np.float32], chance: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Make each band invalid with the given chance, as one that does not cover the place; one band with pixels always stays."""
    dropped = rng.random(len(pixels)) < chance
    covered = np.isfinite(pixels).any(axis=(1, 2))
    kept = rng.permutation(np.flatnonzero(covered))[:1]
    if not (covered & ~dropped).any():
        dropped[kept] = False
    return np.where(dropped[:, None, None], np.float32(np.nan), pixels)


def _smooth(pixels: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    smoothed: NDArray[np.float32] = ndimage.gaussian_filter(pixels, (0, sigma, sigma), mode="nearest", truncate=REACH)
    return smoothed
