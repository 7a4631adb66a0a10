"""Whether an image is like those that a member was trained on: its noise, sky, PSF, colours, brightness and pixel scale.

All of it is measured on the pixels by sep, with no network and no truth, so that training images and images to predict are
measured alike:

- noise: robust scatter of the differences of neighbouring pixels, which sources hardly touch;
- sky: the median pixel in units of that noise;
- PSF: the FWHM, were it a Gaussian, of the most compact twentieth of the sources of S/N above 30 (stars, where there are some);
- brightness: the flux of the k-th brightest source, k in proportion to the area, so that depth does not matter;
- colours of the k brightest sources between one band and the next (medians).

An image is outside where a value lies beyond the range of the training images by more than a step of `KINDS`, and by more than a
share of that range. The steps lie, on a logarithmic scale, about half way to the smallest change that must not pass: the noise of a
fifth of the exposure (2.2), a PSF twice as wide, fluxes three times as high, two bands in each other's place. The shares put the
limits of 64 normal values at 3.7 sigma, and at 5 where few sources tell and clustering gives long tails; of fewer images the range
is narrower, and a share of 2/images is added. What an image is too small or too empty to tell is not compared.

Glossary: C bands, n sources, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import sep
from numpy.typing import NDArray

from deepdisc_ops.errors import CheckpointError, ImageError
from deepdisc_ops.sky.images import SkyImage

Floats = NDArray[np.float64]

NOISE_PIXELS = 65536  # pixels of a band that its noise and sky are measured from, about
MIN_PIXELS = 1000  # pairs of neighbours that tell a noise
MIN_SOURCES = 16  # bright sources that tell a colour or a brightness
MIN_STARS = 16  # sources well seen, of which one or two are as compact as a star
DETECTED = 3.0  # threshold of sources, standard deviations of all bands together
WELL_SEEN = 30.0  # least S/N of sources whose size counts
COMPACT = 0.05  # quantile of their sizes
RADIUS_PIXELS = 5.0
FAR_PIXELS = 8.0  # light beyond is not of a source's core
BRIGHT_SHARE = 1 / 2  # of the sources of a typical training image that count as bright
SCALE_TOLERANCE = 0.05


class Kind(NamedTuple):
    """A measured value: its name and unit, and how far it may leave the range of the training set.

    step: by so much (a factor where ``ratio``); share: or by so much of the range.
    """

    name: str
    unit: str
    step: float
    share: float
    ratio: bool


KINDS = {
    "noise": Kind("noise", "nJy a pixel", 1.5, 0.25, ratio=True),
    "sky": Kind("sky level", "times the noise", 1.0, 0.25, ratio=False),
    "psf_fwhm": Kind("width of the PSF", "arcsec", 1.3, 0.5, ratio=True),
    "brightness": Kind("brightness of sources", "nJy", 1.8, 0.5, ratio=True),
    "colour": Kind("colour of sources", "mag", 0.3, 0.5, ratio=False),
}


@dataclass(frozen=True)
class Figures:
    """Values of one image, NaN for unknown.

    noise nJy a pixel, sky in units of it, psf_fwhm arcsec, brightness nJy, each (C,); colour (C - 1,) mag, a band minus the next.
    """

    noise: Floats
    sky: Floats
    psf_fwhm: Floats
    brightness: Floats
    colour: Floats


@dataclass(frozen=True)
class Measured:
    """What `measure_image` sees.

    area arcmin^2 of valid pixels; noise, sky, psf_fwhm as in `Figures`; flux and error (n, C) nJy of the sources, those of the
    highest S/N first.
    """

    area: float
    noise: Floats
    sky: Floats
    psf_fwhm: Floats
    flux: Floats
    error: Floats

    def figures(self, density: float) -> Figures:
        """The image's figures, ``density`` (a square arcminute) being that of bright sources."""
        bands = len(self.noise)
        bright = round(density * self.area)
        brightness, colour = np.full(bands, np.nan), np.full(bands - 1, np.nan)
        if MIN_SOURCES <= bright <= len(self.flux):
            place = len(self.flux) - bright
            ranked, scatter = np.partition(self.flux, place, axis=0)[place], np.median(self.error, axis=0)
            brightness = np.where(ranked > 5 * scatter, ranked, np.nan)
            flux, error = self.flux[:bright], self.error[:bright]
            magnitude = -2.5 * np.log10(np.maximum(flux, error))
            seen = (flux > 3 * error).mean(axis=0) > 0.5
            known = seen[1:] & seen[:-1]
            colour[known] = np.median(magnitude[:, :-1] - magnitude[:, 1:], axis=0)[known]
        return Figures(self.noise, self.sky, self.psf_fwhm, brightness, colour)


@dataclass(frozen=True)
class Domain:
    """What the training images are like: the least, median and largest of their `Figures`.

    pixel_scale arcsec; images: how many were measured; area: arcmin^2 of one; density: bright sources a square arcminute.
    """

    bands: tuple[str, ...]
    pixel_scale: float
    images: int
    area: float
    density: float
    low: Figures
    typical: Figures
    high: Figures

    @classmethod
    def of(cls, measured: Iterable[Measured], bands: tuple[str, ...], pixel_scale: float) -> Domain:
        """The domain of training images, one at least."""
        seen = list(measured)
        area = float(np.median([image.area for image in seen]))
        counts = [len(image.flux) / image.area for image in seen if image.area > 0]
        density = BRIGHT_SHARE * float(np.median(counts)) if counts else 0.0
        figures = [image.figures(density) for image in seen]
        columns = {field.name: np.stack([getattr(one, field.name) for one in figures]) for field in fields(Figures)}
        low, typical, high = (Figures(**{name: _quantile(values, q) for name, values in columns.items()}) for q in (0.0, 0.5, 1.0))
        return cls(bands, pixel_scale, len(seen), area, density, low, typical, high)

    def augmented(self, noise_factor: float = 1.0, blur_px: float = 0.0) -> Domain:
        """The domain of a network that also sees these images at up to so many times the noise, or blurred by a Gaussian sigma."""
        blur = math.sqrt(8 * math.log(2)) * blur_px * self.pixel_scale
        noise, width = self.high.noise * noise_factor, np.hypot(self.high.psf_fwhm, blur)
        return replace(self, high=replace(self.high, noise=noise, psf_fwhm=width))

    def compare(self, image: SkyImage) -> list[str]:
        """What of ``image`` is outside, each a sentence with its values and those of training; nothing where it is inside.

        The bands are found by name; raises `ImageError` if one is missing.
        """
        missing = [band for band in self.bands if band not in image.bands]
        if missing:
            raise ImageError(
                f"the image has bands {', '.join(image.bands)}, lacks {', '.join(missing)} of the training set; add them"
            )
        order = [image.bands.index(band) for band in self.bands]
        if order != list(range(len(image.bands))):
            invalid = None if image.invalid is None else image.invalid[order]
            image = replace(image, data=image.data[order], bands=self.bands, invalid=invalid, variance=None)
        return scale_warning(image.pixel_scale, self.pixel_scale) + self.outside(measure_image(image))

    def outside(self, measured: Measured) -> list[str]:
        """`compare` for what is measured already."""
        figures = measured.figures(self.density)
        small = math.sqrt(max(1.0, self.area / measured.area)) if measured.area > 0 else 1.0
        told = []
        for name, kind in KINDS.items():
            values, low, typical, high = (getattr(part, name) for part in (figures, self.low, self.typical, self.high))
            least, most = _limits(low, typical, high, kind, small, kind.share + 2 / self.images)
            beyond = np.flatnonzero((values < least) | (values > most))
            if len(beyond):
                told.append(self._sentence(kind, name, beyond, values, low, high))
        return told

    def _sentence(self, kind: Kind, name: str, beyond: NDArray[np.intp], values: Floats, low: Floats, high: Floats) -> str:
        bands = [f"{a}-{b}" for a, b in zip(self.bands, self.bands[1:], strict=False)] if name == "colour" else self.bands
        found = ", ".join(f"{bands[i]} {values[i]:.3g}" for i in beyond)
        trained = ", ".join(f"{low[i]:.3g} to {high[i]:.3g}" for i in beyond)
        return f"{kind.name} is {found} {kind.unit}, in training {trained}"

    def as_dict(self) -> dict[str, Any]:
        """In plain types, for YAML."""
        ranges = {
            field.name: {part: _plain(getattr(getattr(self, part), field.name)) for part in ("low", "typical", "high")}
            for field in fields(Figures)
        }
        kept = {name: value for name, value in asdict(self).items() if name not in ("low", "typical", "high")}
        return kept | {"bands": list(self.bands)} | ranges

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], source: str) -> Domain:
        """The inverse of `as_dict`; ``source`` is named in the `CheckpointError`."""
        try:
            parts = {
                part: Figures(**{field.name: np.array(tree[field.name][part], np.float64) for field in fields(Figures)})
                for part in ("low", "typical", "high")
            }
            scale, area, density = (float(tree[name]) for name in ("pixel_scale", "area", "density"))
            return cls(tuple(tree["bands"]), scale, int(tree["images"]), area, density, **parts)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{source}: the domain cannot be read ({error!r}); take it out, or train again") from None


def scale_warning(found: float, trained: float) -> list[str]:
    """A sentence of `Domain.compare` where the pixel scale, in arcsec, is not that of training to `SCALE_TOLERANCE`."""
    if abs(math.log(found / trained)) <= SCALE_TOLERANCE:
        return []
    return [f"pixel scale is {found:.4g} arcsec, in training {trained:.4g}"]


def measure_image(image: SkyImage) -> Measured:
    """Measure an image of any size; what cannot be measured is NaN, and an image without valid pixels has no sources."""
    invalid = np.broadcast_to(image.mask, image.data.shape) if image.invalid is None else image.invalid
    levels, noise = np.full((2, len(image.bands)), np.nan)
    rows = max(1, image.data[0].size // NOISE_PIXELS)
    for band, (plane, bad) in enumerate(zip(image.data[:, ::rows], invalid[:, ::rows], strict=True)):
        pairs = ~(bad[:, 1:] | bad[:, :-1])
        if pairs.sum() >= MIN_PIXELS:
            noise[band] = 1.4826 / math.sqrt(2) * np.median(np.abs(np.diff(plane, axis=1)[pairs]))
            levels[band] = np.median(plane[~bad])
    area = float(np.mean(~invalid)) * image.data[0].size * (image.pixel_scale / 60) ** 2
    usable = noise > 0
    sky = np.divide(levels, noise, out=np.full(len(noise), np.nan), where=usable)
    planes = [
        np.where(bad, 0, plane - level).astype(np.float32) for plane, bad, level in zip(image.data, invalid, levels, strict=True)
    ]
    flux, error, width = np.zeros((0, len(noise))), np.zeros((0, len(noise))), np.full(len(noise), np.nan)
    if usable.any():
        flux, error, width = _sources([plane if use else None for plane, use in zip(planes, usable, strict=True)], noise)
    return Measured(area, noise, sky, width * image.pixel_scale, flux, error)


def _sources(planes: list[NDArray[np.float32] | None], noise: Floats) -> tuple[Floats, Floats, Floats]:
    """Flux and error (n, C) of the sources, by falling S/N, and the PSF's FWHM (C,) in pixels; a plane that is None has neither."""
    together = np.sum([plane / np.float32(sigma) for plane, sigma in zip(planes, noise, strict=True) if plane is not None], axis=0)
    sample = together[:: max(1, together.size // NOISE_PIXELS)]
    scatter = 1.4826 * float(np.median(np.abs(sample[sample != 0]))) if sample.any() else 0.0
    flux, width = [], np.full(len(noise), np.nan)
    sep.set_extract_pixstack(max(sep.get_extract_pixstack(), together.size))
    found, segments = sep.extract(
        np.ascontiguousarray(together), DETECTED, err=scatter or 1.0, deblend_cont=1.0, segmentation_map=True
    )
    x, y, ids = found["x"], found["y"], np.arange(len(found)) + 1
    error = np.broadcast_to(noise * math.sqrt(math.pi) * RADIUS_PIXELS, (len(found), len(noise)))
    for band, plane in enumerate(planes):
        if plane is None:
            flux.append(np.full(len(found), np.nan))
            continue
        light = sep.sum_circle(plane, x, y, RADIUS_PIXELS)[0]
        flux.append(light)
        good = light > WELL_SEEN * error[:, band]
        if good.sum() >= MIN_STARS:
            far = np.full(int(good.sum()), FAR_PIXELS)
            half, _ = sep.flux_radius(plane, x[good], y[good], far, 0.5, segmap=segments, seg_id=ids[good])
            width[band] = 2 * np.nanquantile(half, COMPACT)
    fluxes = np.stack(flux, axis=1)
    order = np.argsort(-np.nansum(fluxes / error, axis=1), kind="stable")
    return fluxes[order], error[order], width


def _limits(low: Floats, typical: Floats, high: Floats, kind: Kind, small: float, share: float) -> tuple[Floats, Floats]:
    """Least and largest value that count as inside: beyond the range by a step, and by a share of the range.

    ``small`` widens the range about its typical value, for an image smaller than those of training.
    """
    with np.errstate(divide="ignore"):
        low, typical, high = (np.log(part) if kind.ratio else part for part in (low, typical, high))
    step = math.log(kind.step) if kind.ratio else kind.step
    reach = np.maximum(step, (high - low) * share * small)
    limits = typical + (low - typical) * small - reach, typical + (high - typical) * small + reach
    return (np.exp(limits[0]), np.exp(limits[1])) if kind.ratio else limits


def _quantile(values: Floats, q: float) -> Floats:
    """(C,) quantile over the images (n, C); NaN where no image tells."""
    return np.array([np.quantile(known, q) if len(known := row[np.isfinite(row)]) else np.nan for row in values.T])


def _plain(values: Floats) -> list[float]:
    """Four digits are enough."""
    return [float(f"{value:.4g}") for value in values]
