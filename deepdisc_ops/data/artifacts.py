"""Blemishes of real images, laid over a simulated observation: what they spoil is flagged, band by band.

saturation      light beyond the full well of a pixel runs along its column, up and down, and is kept (bleeding)
spikes          arms of light about bright stars, from the struts of the telescope
trail           a satellite's straight track through one band
missing_band    a band without data on one side of a line, or everywhere: not a number, never zero

Each blemish has random numbers of its own, so that one does not change the others, and none changes the sky.
Flags are bits of a plane per band, (C, H, W) uint8. Glossary: C bands, H x W pixels, N stars.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.data.render import Optics, central_share
from deepdisc_ops.data.surveys import Survey, to_njy

Image = NDArray[np.float32]
Floats = NDArray[np.float64]
Flags = NDArray[np.uint8]

FLAG_BITS = {"NO_DATA": 0, "SAT": 1, "BLEED": 2, "SPIKE": 3, "TRAIL": 4}
"""Number of each flag's bit, written to headers as MP_<name>."""

LOST_BITS = np.uint8(sum(1 << bit for name, bit in FLAG_BITS.items() if name != "SPIKE"))
"""Flags of pixels whose value is not the sky's; under a spike the sky still shows."""

KINDS = ("saturation", "spikes", "trail", "missing_band")
"""In the order of their random streams."""

ARMS = {"lsst": 4, "hsc": 4, "jades": 6, "roman": 12}
"""Arms of a survey's diffraction spikes."""

SPIKE_SHARE = 0.01
"""Light in all arms together, relative to the star's."""

VISIBLE = 0.5
"""Light above this share of the noise is flagged, below it is left alone."""

LEAST_SPIKE = 4.0
"""Spikes that are visible no farther out than so many FWHM are not drawn."""

TRAIL_BRIGHTNESS = (5.0, 50.0)
"""Range of a trail's peak in units of the noise per pixel."""

TRAIL_WIDTH = 1.0
"""FWHM of a trail before the PSF from the ground, arcsec: satellites are out of focus there."""

WHOLLY_MISSING = 1 / 3
"""Chance that a missing band is missing everywhere."""

SIGMA_PER_FWHM = 1 / 2.3548


@dataclass(frozen=True)
class Stars:
    """Where bright stars are: x, y (N,) pixels, flux (N, C) nJy."""

    x: Floats
    y: Floats
    flux: Floats


def add_artifacts(
    image: Image, kinds: Iterable[str], survey: Survey, optics: Optics, stars: Stars, stream: np.random.SeedSequence
) -> Flags:
    """Lay blemishes over an observation (C, H, W) nJy, in place, and return the flags of what they cover."""
    flags = np.zeros(image.shape, np.uint8)
    randoms = dict(zip(KINDS, map(np.random.default_rng, stream.spawn(len(KINDS))), strict=True))
    kinds = set(kinds)
    if "spikes" in kinds:
        _add_spikes(image, flags, ARMS.get(survey.name, 4), optics, stars, randoms["spikes"])
    if "trail" in kinds:
        _add_trail(image, flags, optics, randoms["trail"])
    if "saturation" in kinds:
        levels = to_njy(np.array(survey.saturation)) * central_share(optics)
        for plane, plane_flags, level in zip(image, flags, levels, strict=True):
            bleed(plane, plane_flags, float(level))
    if "missing_band" in kinds:
        _drop_band(image, flags, survey.gold_index, randoms["missing_band"])
    return flags


def _flag(flags: Flags, where: NDArray[np.bool_], name: str) -> None:
    flags[where] |= np.uint8(1 << FLAG_BITS[name])


def bleed(plane: Image, flags: Flags, level: float) -> None:
    """Clip a plane (H, W) at ``level`` and let what is above run up and down the columns, half each way, until it is used up."""
    saturated = plane > level
    _flag(flags, saturated, "SAT")
    for column in np.flatnonzero(saturated.any(axis=0)):
        values, full = plane[:, column], saturated[:, column]
        edges = np.flatnonzero(np.diff(np.concatenate([[0], full.astype(np.int8), [0]])))
        excess = [float((values[low:high] - level).sum(dtype=np.float64)) for low, high in edges.reshape(-1, 2)]
        values[full] = level
        for (low, high), charge in zip(edges.reshape(-1, 2), excess, strict=True):
            _fill(values[:low][::-1], flags[:low, column][::-1], level, charge / 2)
            _fill(values[high:], flags[high:, column], level, charge / 2)


def _fill(values: Image, flags: Flags, level: float, charge: float) -> None:
    """Fill pixels to the level, one after the other, as far as the charge lasts; at the edge of the image it is lost."""
    room = np.maximum(level - values, 0).astype(np.float64)
    before = np.cumsum(room) - room
    poured = np.clip(charge - before, 0, room)
    values += poured.astype(np.float32)
    _flag(flags, poured > 0, "BLEED")


def _add_spikes(image: Image, flags: Flags, arms: int, optics: Optics, stars: Stars, rng: np.random.Generator) -> None:
    """Arms of equal brightness at equal angles, falling as (1 + r / r0)^-2 with r0 three FWHM, as wide as the PSF."""
    turn = rng.uniform(0, 2 * np.pi / arms)
    fwhm = optics.fwhm / optics.pixel_scale
    sigma, core = fwhm * SIGMA_PER_FWHM, 3 * fwhm
    peak = stars.flux * SPIKE_SHARE / arms / core / (np.sqrt(2 * np.pi) * sigma)
    reach = core * (np.sqrt(np.maximum(peak / (VISIBLE * optics.noise), 1)) - 1)
    for star, band in np.argwhere(reach > LEAST_SPIKE * fwhm):
        rows, columns = _around(stars.x[star], stars.y[star], reach[star, band], image.shape[1:])
        dx, dy = np.arange(columns.start, columns.stop) - stars.x[star], np.arange(rows.start, rows.stop) - stars.y[star]
        light = np.zeros((len(dy), len(dx)))
        for angle in turn + 2 * np.pi / arms * np.arange(arms):
            along = dx * np.cos(angle) + dy[:, None] * np.sin(angle)
            across = dy[:, None] * np.cos(angle) - dx * np.sin(angle)
            arm = peak[star, band] * (1 + np.maximum(along, 0) / core[band]) ** -2 * np.exp(-0.5 * (across / sigma[band]) ** 2)
            light += np.where(along > 0, arm, 0)
        image[band, rows, columns] += light.astype(np.float32)
        _flag(flags[band, rows, columns], light > VISIBLE * optics.noise[band], "SPIKE")


def _around(x: float, y: float, reach: float, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Rows and columns of an image (H, W) within ``reach`` of a position."""
    low_x, low_y = (max(int(np.floor(position - reach)), 0) for position in (x, y))
    return slice(low_y, min(int(y + reach) + 2, shape[0])), slice(low_x, min(int(x + reach) + 2, shape[1]))


def _add_trail(image: Image, flags: Flags, optics: Optics, rng: np.random.Generator) -> None:
    bands, height, width = image.shape
    band = int(rng.integers(bands))
    angle = rng.uniform(0, np.pi)
    x, y = rng.uniform(0, width), rng.uniform(0, height)
    brightness = np.exp(rng.uniform(*np.log(TRAIL_BRIGHTNESS))) * optics.noise[band]
    blur = TRAIL_WIDTH if optics.profile == "kolmogorov" else 0.0
    sigma = np.hypot(optics.fwhm[band], blur) * SIGMA_PER_FWHM / optics.pixel_scale
    distance = (np.arange(height)[:, None] - y) * np.cos(angle) - (np.arange(width) - x) * np.sin(angle)
    light = (brightness * np.exp(-0.5 * (distance / sigma) ** 2)).astype(np.float32)
    image[band] += light
    _flag(flags[band], light > VISIBLE * optics.noise[band], "TRAIL")


def _drop_band(image: Image, flags: Flags, gold: int, rng: np.random.Generator) -> None:
    """Any band but the gold one, which names the sample; of an image with one band, that."""
    bands, height, width = image.shape
    band = int((gold + rng.integers(1, max(bands, 2))) % bands)
    everywhere = rng.uniform() < WHOLLY_MISSING
    angle = rng.uniform(0, 2 * np.pi)
    x, y = rng.uniform(0.2, 0.8, 2) * (width, height)
    beyond = (np.arange(width) - x) * np.cos(angle) + (np.arange(height)[:, None] - y) * np.sin(angle) > 0
    missing = beyond | everywhere
    image[band][missing] = np.nan
    _flag(flags[band], missing, "NO_DATA")
