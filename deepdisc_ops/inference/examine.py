"""What is measured on a window beyond the redshifts: the light of its objects, and whether it is like the training images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from deepdisc_ops.sky.detections import Detections, Flag
from deepdisc_ops.sky.domain import Domain, scale_warning
from deepdisc_ops.sky.images import Mosaic, SkyImage
from deepdisc_ops.sky.photometry import PixelNoise, measure, measure_noise
from deepdisc_ops.sky.tiling import Window

NOISE_SIDE = 1024
"""The noise of a mosaic without variance planes is measured on the valid pixels of windows of this side."""
NOISE_WINDOWS = 5
"""At most so many, along its diagonals."""


class Photometer:
    """Adds the photometry of `sky.photometry.measure` to the objects of a window; errors are alike all over the mosaic."""

    def __init__(self, diameter: float | None = None, noise: PixelNoise | None = None) -> None:
        self._diameter, self._noise = diameter, noise

    def __call__(self, image: SkyImage, objects: Detections) -> tuple[Detections, Sequence[str]]:
        """Objects with the columns flux, flux_err, flux_iso, flux_iso_err."""
        columns = measure(image, objects, diameter=self._diameter, noise=self._noise)
        return objects.with_columns(columns), ()


class DomainCheck:
    """Warns of windows that are unlike the training images, and flags their objects `OUT_OF_DOMAIN`."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain

    def __call__(self, image: SkyImage, objects: Detections) -> tuple[Detections, Sequence[str]]:
        """Objects, flagged or not, and what of the window is outside: a sentence each, ``NAME is VALUE, in training RANGE``."""
        told = self._domain.compare(image)
        if not told:
            return objects, ()
        return objects.flagged(np.ones(len(objects), bool), Flag.OUT_OF_DOMAIN), told


class ScaleCheck:
    """Warns of a pixel scale (arcsec) other than that of training, and flags objects; for members without a `Domain`."""

    def __init__(self, pixel_scale: float) -> None:
        self._pixel_scale = pixel_scale

    def __call__(self, image: SkyImage, objects: Detections) -> tuple[Detections, Sequence[str]]:
        """As `DomainCheck`."""
        told = scale_warning(image.pixel_scale, self._pixel_scale)
        return objects.flagged(np.ones(len(objects), bool), Flag.OUT_OF_DOMAIN) if told else objects, told


def mosaic_noise(mosaic: Mosaic, side: int = NOISE_SIDE) -> PixelNoise | None:
    """The noise of a mosaic's pixels, measured on a few windows of it; None where its planes tell their variance."""
    seen = []
    for share in np.linspace(0.5 / NOISE_WINDOWS, 1 - 0.5 / NOISE_WINDOWS, NOISE_WINDOWS):
        x0, y0 = (max(0, int(share * size) - side // 2) for size in (mosaic.width, mosaic.height))
        image = mosaic.read(Window(x0, y0, min(x0 + side, mosaic.width), min(y0 + side, mosaic.height)))
        if image.variance is not None:
            return None
        seen.append(measure_noise(image))
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of bands without a valid pixel: NaN
        sigma, correlation = (np.nanmedian([getattr(noise, name) for noise in seen], axis=0) for name in ("sigma", "correlation"))
    return PixelNoise(sigma, correlation)
