"""Truth from a catalogue of positions and the image itself, the DC2 way: boxes and masks by deblending around known centres.

sep (Source Extractor's background and noise) and scikit-image (the watershed) do the work: the centres are known, so what is
left to find is where each object's light ends and which of two neighbours owns a pixel. scarlet2, the heir of the papers' scarlet,
fits every object's spectrum and shape and wants jax for it; DeepDISC takes nothing of the fit but boxes and masks (the package
called scarlet on the index is something else).

The image of each band is smoothed by its own PSF, the filter that finds points best. A source counts if its S/N as a point exceeds
``min_snr`` in any band: from the catalogue's magnitudes where it has them, from the smoothed image where not. The image alone is
the poorer judge: on simulated LSST scenes it takes 60 % of what the magnitudes take, for it sees less of what is extended, and of
what it takes 14 % are fainter sources in the light of a neighbour. The pixels above ``isophote`` in the all-band S/N are shared by
a watershed that floods from the centres; sources fainter than ``min_snr`` but above `SEED_SNR` hold their ground against it and are
then left out. Masks do not overlap.

Glossary: N sources, C bands, H x W pixels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import sep
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from scipy import ndimage
from skimage.segmentation import watershed

from deepdisc_ops.data.masks import bounds, crop, label_outlines
from deepdisc_ops.data.surveys import to_njy
from deepdisc_ops.data.tables import Sources
from deepdisc_ops.data.truth.windows import Built, Placed, Progress, Shapes, TruthSettings, WindowTruth, build, sources_in
from deepdisc_ops.sky.images import Mosaic, SkyImage
from deepdisc_ops.sky.tiling import Window

Floats = NDArray[np.float64]
Plane = NDArray[np.float32]

FWHM_PER_SIGMA = 2.354820045
SEED_SNR = 3.0
ISOPHOTE_FILTER = 0.5
"""Width of the filter under the isophotes relative to the PSF: the whole PSF doubles a point's area and halves its peak."""

CORE = 0.65
"""Radius in FWHM that a source has at least: the half-peak isophote of one that is barely resolved."""


class DeblendSettings(TruthSettings):
    """A mosaic and the catalogue of what is truly in it."""

    psf_fwhm: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = Field(description="arcsec, a value a band")
    min_snr: PositiveFloat = Field(5.0, description="sources above this S/N in any band are truth")
    isophote: PositiveFloat = Field(2.0, description="edge of the masks: all-band S/N of a pixel")
    mesh: PositiveInt = Field(64, description="side in pixels of the cells in which background and noise are measured")
    margin_arcsec: Annotated[float, Field(ge=0)] = Field(5.0, description="pixels around a window that are looked at with it")

    @model_validator(mode="after")
    def _a_psf_a_band(self) -> DeblendSettings:
        if len(self.psf_fwhm) != len(self.images.bands):
            raise ValueError(f"psf_fwhm has {len(self.psf_fwhm)} values for {len(self.images.bands)} bands {self.images.bands}")
        return self


@dataclass(frozen=True)
class Smoothed:
    """What is seen of an image: point_snr (C, H, W) of a point at each pixel, light (H, W) all-band S/N, noise (C, H, W) nJy."""

    point_snr: Plane
    light: Plane
    noise: Plane


def from_truth_catalog(settings: DeblendSettings, out: Path, *, packed: bool = False, progress: Progress | None = None) -> Built:
    """Make a data set in the folder ``out`` of a mosaic and a truth catalogue."""

    def prepare(placed: Placed, counts: Counter[str]) -> WindowTruth:
        return lambda window, _image, _rows: deblend_window(settings, placed, window, counts)

    return build(settings, prepare, out, packed=packed, progress=progress)


def deblend_window(settings: DeblendSettings, placed: Placed, window: Window, counts: Counter[str]) -> Shapes:
    """Shapes of the sources of a window, deblended on it and a margin around it."""
    wide = _widened(window, round(settings.margin_arcsec / placed.mosaic.pixel_scale), placed.mosaic)
    rows = sources_in(placed, wide)
    image = placed.mosaic.read(wide)
    smoothed = smooth(image, np.array(settings.psf_fwhm), settings.mesh)
    x, y = placed.x[rows] - wide.x0, placed.y[rows] - wide.y0
    snr = source_snr(smoothed, image, placed.sources.select(rows), x, y, np.array(settings.psf_fwhm))
    labels = flood(smoothed.light, x, y, snr, settings.isophote, CORE * min(settings.psf_fwhm) / image.pixel_scale)
    inside = np.isin(rows, sources_in(placed, window))
    mine = inside & (snr > settings.min_snr)
    found = label_outlines(labels, np.flatnonzero(mine) + 1)
    frame = Window(window.x0 - wide.x0, window.y0 - wide.y0, window.x1 - wide.x0, window.y1 - wide.y0)
    cut = [
        (row, mask) for row, whole in zip(rows[found.sources - 1], found.masks, strict=True) if bounds(mask := crop(whole, frame))
    ]
    counts["sources below min_snr"] += int((inside & ~mine).sum())
    counts["sources on the pixel of a brighter one"] += int(mine.sum()) - len(cut)
    boxes = np.array([bounds(mask) for _, mask in cut], np.float32).reshape(-1, 4)
    return Shapes(np.array([row for row, _ in cut], np.intp), boxes, tuple(mask for _, mask in cut))


def smooth(image: SkyImage, psf_fwhm: Floats, mesh: int) -> Smoothed:
    """Take the background off, smooth every band by a Gaussian of its PSF (FWHM (C,) arcsec), measure what noise remains."""
    shape = image.data.shape
    invalid = np.broadcast_to(image.mask, shape) if image.invalid is None else image.invalid
    point_snr, noise = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    light = np.zeros(shape[1:], np.float32)
    for band, fwhm in enumerate(psf_fwhm):
        masked = np.array(invalid[band])  # sep wants an array of its own
        if masked.all():
            noise[band] = np.inf
            continue
        plane = np.ascontiguousarray(image.data[band], np.float32)
        background = sep.Background(plane, mask=masked, bw=mesh, bh=mesh)
        noise[band] = background.rms() if image.variance is None else np.sqrt(image.variance[band])
        noise[band][masked | ~(noise[band] > 0)] = np.inf
        scaled = np.where(masked, 0, plane - background.back()) / noise[band]
        sigma = fwhm / FWHM_PER_SIGMA / image.pixel_scale
        matched = ndimage.gaussian_filter(scaled, sigma)
        point_snr[band] = matched / _rms(matched, masked, mesh)  # measured, for the noise may be correlated
        softened = ndimage.gaussian_filter(scaled, ISOPHOTE_FILTER * sigma)
        light += np.maximum(softened, 0) ** 2 - _rms(softened, masked, mesh) ** 2 / 2  # the half of the noise that is positive
    return Smoothed(point_snr, np.sqrt(np.maximum(light, 0)), noise)


def source_snr(smoothed: Smoothed, image: SkyImage, sources: Sources, x: Floats, y: Floats, psf_fwhm: Floats) -> Floats:
    """(N,) best S/N of a point over the bands: the catalogue's flux where it has a magnitude, else the smoothed image's."""
    height, width = smoothed.light.shape
    columns = np.clip(np.rint(x).astype(np.intp), 0, width - 1)
    rows = np.clip(np.rint(y).astype(np.intp), 0, height - 1)
    best = np.zeros(len(sources))
    for i, band in enumerate(image.bands):
        here = smoothed.noise[i, rows, columns]
        if band in sources.magnitudes:
            area = 4 * np.pi * (psf_fwhm[i] / FWHM_PER_SIGMA / image.pixel_scale) ** 2
            snr = np.nan_to_num(to_njy(sources.magnitudes[band])) / here / np.sqrt(max(area, 1.0))
        else:
            snr = smoothed.point_snr[i, rows, columns]
        best = np.maximum(best, snr)
    return best


def flood(light: Plane, x: Floats, y: Floats, snr: Floats, isophote: float, core: float) -> NDArray[np.int32]:
    """Labels (H, W) 1 .. N of the sources above `SEED_SNR`, 0 elsewhere; of several on one pixel the brightest has it.

    A pixel is shared out if it is above the isophote, or within ``core`` pixels of a centre.
    """
    height, width = light.shape
    markers = np.zeros(light.shape, np.int32)
    for i in np.argsort(snr, kind="stable"):
        if snr[i] > SEED_SNR:
            markers[min(max(round(float(y[i])), 0), height - 1), min(max(round(float(x[i])), 0), width - 1)] = i + 1
    if not markers.any():
        return markers
    cores = ndimage.distance_transform_edt(markers == 0) <= max(core, 1.5)
    return np.asarray(watershed(-light, markers, mask=(light > isophote) | cores), np.int32)


def _rms(plane: Plane, masked: NDArray[np.bool_], mesh: int) -> float:
    return float(sep.Background(plane, mask=masked, bw=mesh, bh=mesh).globalrms)


def _widened(window: Window, margin: int, mosaic: Mosaic) -> Window:
    return Window(
        max(window.x0 - margin, 0),
        max(window.y0 - margin, 0),
        min(window.x1 + margin, mosaic.width),
        min(window.y1 + margin, mosaic.height),
    )
