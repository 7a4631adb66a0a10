"""Noise of simulated images: of the sky and of the sources' own photons, correlated or not, and what sky subtraction leaves.

Photons of sky and sources are many in every pixel of a coadd, so that their noise is normal, with the variance of Poisson's law:
sky and source counts over the gain. Glossary: C bands, H x W pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.data.surveys import Survey, to_njy

Image = NDArray[np.float32]
Floats = NDArray[np.float64]


def sky_level(survey: Survey) -> Floats:
    """(C,) light of the sky in nJy per pixel."""
    return to_njy(np.array(survey.sky_brightness)) * survey.pixel_scale**2


def gain(survey: Survey, noise: Floats) -> Floats:
    """(C,) electrons per nJy of a coadd whose noise (C,) nJy per pixel is that of the sky's photons."""
    return sky_level(survey) / noise**2


def add_noise(
    noiseless: Image,
    survey: Survey,
    noise: Floats,
    streams: list[np.random.SeedSequence],
    *,
    source_noise: bool = True,
    correlation: float = 0.0,
) -> Image:
    """An observation (C, H, W) of a noiseless image (C, H, W) nJy; noise (C,) nJy per pixel of empty sky.

    Each band has a stream of random numbers of its own. correlation is that of neighbouring pixels.
    """
    image = np.empty_like(noiseless)
    level = sky_level(survey)
    height, width = noiseless.shape[1:]
    for band, stream in enumerate(streams):
        rng = np.random.default_rng(stream)
        plane = correlated_noise(width, height, correlation, rng)
        if source_noise:
            plane *= np.sqrt(1 + np.maximum(noiseless[band], 0) * np.float32(1 / level[band]))
        if survey.background:
            plane += np.float32(survey.background) * _tilted_plane(width, height, rng)
        plane *= np.float32(noise[band])
        np.add(noiseless[band], plane, out=image[band])
    return image


def correlated_noise(width: int, height: int, correlation: float, rng: np.random.Generator) -> Image:
    """(H, W) normal noise of variance 1 whose neighbours in a row or column correlate by ``correlation``, below 1/2.

    Each pixel is mixed with the next in share s, along both axes; s / (1 + s^2) is the correlation, to be solved for s.
    """
    if not correlation:
        return rng.standard_normal((height, width), dtype=np.float32)
    share = (1 - np.sqrt(1 - 4 * correlation**2)) / (2 * correlation)
    own, other = np.array([1, share], np.float32) / np.float32(np.sqrt(1 + share**2))
    white = rng.standard_normal((height + 1, width + 1), dtype=np.float32)
    rows = own * white[1:] + other * white[:-1]
    mixed: Image = own * rows[:, 1:] + other * rows[:, :-1]
    return mixed


def _tilted_plane(width: int, height: int, rng: np.random.Generator) -> Image:
    level, tilt_x, tilt_y = rng.standard_normal(3) * np.array([1, 0.5, 0.5])
    plane = level + tilt_x * np.linspace(-1, 1, width) + tilt_y * np.linspace(-1, 1, height)[:, None]
    return plane.astype(np.float32)
