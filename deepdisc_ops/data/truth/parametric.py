"""Truth by drawing a parametric catalogue again, the JAGUAR way: each source alone, noiseless, through the PSF of each band.

A source is a single Sersic profile; GalSim draws it. Its mask are the pixels where its own light, the S/N of all bands added in
quadrature, exceeds two sigma of the image's sigma-clipped background (`masks.MASK_SNR`); a source with fewer than
`masks.MIN_PIXELS` of them is left out, unless it is asked for. Masks of neighbours may overlap.

Glossary: N sources, C bands, S side of a stamp in pixels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import galsim
import numpy as np
from astropy import units
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.stats import sigma_clipped_stats
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, model_validator

from deepdisc_ops.config import Settings
from deepdisc_ops.data.masks import MASK_SNR, MIN_PIXELS, RunLengths, all_band_snr, outline
from deepdisc_ops.data.render import Stamps
from deepdisc_ops.data.surveys import to_njy
from deepdisc_ops.data.tables import CatalogSettings, Sources, identifiers, numbers, read_table, require, select_rows
from deepdisc_ops.data.truth.windows import Built, Placed, Progress, Shapes, TruthSettings, WindowTruth, build
from deepdisc_ops.errors import CatalogError, ImageError
from deepdisc_ops.sky.images import SkyImage
from deepdisc_ops.sky.tiling import Window

Floats = NDArray[np.float64]
Psf: TypeAlias = galsim.GSObject

SERSIC_RANGE = (0.3, 6.2)
"""Sersic indices that GalSim draws; those beyond are drawn at the limit."""

FIRST_SIDE, LARGEST_SIDE = 32, 1024


class ShapeColumns(Settings):
    """Columns of the Sersic profiles."""

    radius: str = Field("half_light_radius", description="half-light radius, arcsec")
    radius_of: Literal["major", "circle"] = Field("major", description="along the major axis, or of the circle of equal area")
    index: str = Field("sersic_n", description="Sersic index")
    axis_ratio: str = "axis_ratio"
    angle: str = Field("position_angle", description="of the major axis, degrees")
    angle_from: Literal["north", "x"] = Field("north", description="from north towards east, or from +x towards +y")


class PsfSettings(Settings):
    """The PSF of each band, from images or of a known form and width."""

    images: tuple[Path, ...] | None = Field(None, description="FITS files, a 2-D image each")
    pixel_scale: PositiveFloat | None = Field(
        None, description="arcsec of the images' pixels; the header's PIXELSCL when not given"
    )
    with_pixel: bool = Field(False, description="the images are blurred by the detector's pixel already")
    fwhm: tuple[PositiveFloat, ...] | None = Field(None, description="arcsec")
    profile: Literal["gaussian", "moffat", "kolmogorov"] = "gaussian"

    @model_validator(mode="after")
    def _one_kind(self) -> PsfSettings:
        if (self.images is None) == (self.fwhm is None):
            raise ValueError("the PSF needs images or fwhm, and not both")
        return self


class ParametricSettings(TruthSettings):
    """A mosaic and the parametric catalogue that is drawn on it."""

    shapes: ShapeColumns = ShapeColumns()
    psf: PsfSettings
    faintest: float | None = Field(None, description="AB magnitude in the gold band; fainter sources are left out")
    keep_faint: bool = Field(False, description="keep sources with too few pixels above the threshold, marked by their core")

    @model_validator(mode="after")
    def _complete(self) -> ParametricSettings:
        bands = self.images.bands
        given = self.psf.images or self.psf.fwhm or ()
        if len(given) != len(bands):
            raise ValueError(f"psf has {len(given)} values for {len(bands)} bands {', '.join(bands)}; give one a band")
        missing = [band for band in bands if band not in self.catalog.columns.magnitudes]
        if missing:
            raise ValueError(f"the catalogue's magnitudes lack {', '.join(missing)}; a source is drawn in every band")
        return self


@dataclass(frozen=True)
class Profiles:
    """N Sersic profiles: radius (N,) half-light arcsec of the circle of equal area, index, axis_ratio, angle (radian from +x)."""

    radius: Floats
    index: Floats
    axis_ratio: Floats
    angle: Floats


def from_parametric_catalog(
    settings: ParametricSettings, out: Path, *, packed: bool = False, progress: Progress | None = None
) -> Built:
    """Make a data set in the folder ``out`` of a mosaic and the parametric catalogue of its sources."""

    def prepare(placed: Placed, counts: Counter[str]) -> WindowTruth:
        source = f"catalogue {settings.catalog.path}"
        table = _rows_of(settings.catalog, placed.sources, source)
        assert placed.mosaic.wcs is not None  # `open_mosaic` has seen to it
        profiles = read_profiles(table, settings.shapes, placed.sources, placed.mosaic.wcs, source)
        psfs = open_psfs(settings.psf)
        return lambda window, image, rows: redraw(settings, placed, profiles, psfs, window, image, rows, counts)

    return build(settings, prepare, out, packed=packed, progress=progress)


def redraw(
    settings: ParametricSettings,
    placed: Placed,
    profiles: Profiles,
    psfs: list[Psf],
    window: Window,
    image: SkyImage,
    rows: NDArray[np.intp],
    counts: Counter[str],
) -> Shapes:
    """Shapes of the sources (rows) of a window, each drawn alone."""
    if settings.faintest is not None:
        bright = placed.sources.magnitude(settings.gold_band)[rows] < settings.faintest
        counts["sources too faint"] += int((~bright).sum())
        rows = rows[bright]
    noise = background_noise(image)
    flux = np.stack([np.nan_to_num(to_njy(placed.sources.magnitudes[band])) for band in image.bands], axis=1)
    kept: list[int] = []
    boxes: list[NDArray[np.float32]] = []
    masks: list[RunLengths] = []
    for row in rows:
        position = (float(placed.x[row] - window.x0), float(placed.y[row] - window.y0))
        stamps = draw(profiles, int(row), flux[row], position, psfs, noise, image.pixel_scale, settings.psf.with_pixel)
        above = int((all_band_snr(stamps.flux, noise) > MASK_SNR).sum())
        outlines = outline(stamps, noise, window.width, window.height)
        if len(outlines.sources) and (above >= MIN_PIXELS or settings.keep_faint):
            kept.append(int(row))
            boxes.append(outlines.boxes[0])
            masks.append(outlines.masks[0])
    counts["sources below the threshold"] += len(rows) - len(kept)
    return Shapes(np.array(kept, np.intp), np.array(boxes, np.float32).reshape(-1, 4), tuple(masks))


def draw(
    profiles: Profiles,
    row: int,
    flux: Floats,
    position: tuple[float, float],
    psfs: list[Psf],
    noise: Floats,
    pixel_scale: float,
    psf_with_pixel: bool = False,
) -> Stamps:
    """The noiseless picture of one source of flux (C,) nJy at x, y pixels, so large that no pixel of its mask is missing."""
    index = float(np.clip(profiles.index[row], *SERSIC_RANGE))
    shear = galsim.Shear(q=float(profiles.axis_ratio[row]), beta=float(profiles.angle[row]) * galsim.radians)
    params = galsim.GSParams(maximum_fft_size=16384, folding_threshold=1e-2)
    shape = galsim.Sersic(n=index, half_light_radius=float(profiles.radius[row]), gsparams=params).shear(shear)
    sources = [galsim.Convolve(shape, psf, gsparams=params).withFlux(float(light)) for psf, light in zip(psfs, flux, strict=True)]
    method = "no_pixel" if psf_with_pixel else "auto"
    side = FIRST_SIDE
    while True:
        origin = np.rint(position).astype(np.intp) - side // 2
        offset = np.array(position) - origin - (side - 1) / 2
        pixels = np.zeros((1, len(psfs), side, side), np.float32)
        for band, source in enumerate(sources):
            source.drawImage(image=galsim.Image(pixels[0, band], scale=pixel_scale), offset=tuple(offset), method=method)
        snr = all_band_snr(pixels, noise)[0]
        rim = max(snr[0].max(), snr[-1].max(), snr[:, 0].max(), snr[:, -1].max())
        if rim <= MASK_SNR or side >= LARGEST_SIDE:
            return Stamps(np.array([row]), origin[None], pixels)
        side *= 2


def background_noise(image: SkyImage) -> Floats:
    """(C,) sigma-clipped noise per pixel, nJy, of what is valid; infinite for a band without data."""
    invalid = np.broadcast_to(image.mask, image.data.shape) if image.invalid is None else image.invalid
    noise = np.full(len(image.bands), np.inf)
    for band, (plane, bad) in enumerate(zip(image.data, invalid, strict=True)):
        if not bad.all():
            noise[band] = sigma_clipped_stats(plane[~bad])[2]
    if not (noise > 0).all():
        flat = ", ".join(name for name, value in zip(image.bands, noise, strict=True) if not value > 0)
        raise ImageError(f"the image has no noise in {flat}, so no threshold can be set; hand in the image with its noise")
    return noise


def read_profiles(table: Table, columns: ShapeColumns, sources: Sources, wcs: WCS, source: str) -> Profiles:
    """Sersic profiles of the rows of a table that are ``sources``, angles turned into the image's pixels."""
    names = [columns.radius, columns.index, columns.axis_ratio, columns.angle]
    require(table, names, source)
    radius, index, ratio, angle = (numbers(table, name, source) for name in names)
    if table[columns.radius].unit is not None:
        radius = radius * float(table[columns.radius].unit.to(units.arcsec))
    for name, values, good, wanted in (
        (columns.radius, radius, radius > 0, "above 0 arcsec"),
        (columns.index, index, index > 0, "above 0"),
        (columns.axis_ratio, ratio, (ratio > 0) & (ratio <= 1), "above 0 and at most 1"),
        (columns.angle, angle, np.isfinite(angle), "finite"),
    ):
        if not (good & np.isfinite(values)).all():
            i = int(np.flatnonzero(~(good & np.isfinite(values)))[0])
            raise CatalogError(f"{source}: {name} is {values[i]:g} for id {sources.ids[i]}; expected a value {wanted}")
    if columns.radius_of == "major":
        radius = radius * np.sqrt(ratio)
    turned = pixel_angles(sources, np.radians(angle), wcs) if columns.angle_from == "north" else np.radians(angle)
    return Profiles(radius, index, ratio, turned)


def pixel_angles(sources: Sources, position_angle: Floats, wcs: WCS) -> Floats:
    """(N,) angles from +x towards +y, radian, of position angles from north towards east at the sources."""
    here = SkyCoord(sources.ra, sources.dec, unit="deg", frame="icrs")
    there = here.directional_offset_by(position_angle * units.rad, 0.1 * units.arcsec)
    (x0, y0), (x1, y1) = wcs.world_to_pixel(here), wcs.world_to_pixel(there)
    return np.asarray(np.arctan2(y1 - y0, x1 - x0), np.float64)


def open_psfs(settings: PsfSettings) -> list[Psf]:
    """The PSF of each band, of flux 1."""
    if settings.images is not None:
        return [_psf_image(path, settings.pixel_scale) for path in settings.images]
    forms = {
        "gaussian": lambda fwhm: galsim.Gaussian(fwhm=fwhm),
        "moffat": lambda fwhm: galsim.Moffat(beta=2.5, fwhm=fwhm),
        "kolmogorov": lambda fwhm: galsim.Kolmogorov(fwhm=fwhm),
    }
    return [forms[settings.profile](fwhm) for fwhm in settings.fwhm or ()]


def _psf_image(path: Path, pixel_scale: float | None) -> Psf:
    try:
        with fits.open(path) as file:
            planes = [hdu for hdu in file if hdu.is_image and hdu.header.get("NAXIS") == 2]
            if not planes:
                raise ImageError(f"PSF {path} holds no 2-D image; expected one")
            pixels, scale = np.array(planes[0].data, np.float64), pixel_scale or planes[0].header.get("PIXELSCL")
    except OSError as error:
        raise ImageError(f"PSF {path} cannot be read: {error}") from None
    if not scale:
        raise ImageError(f"PSF {path} tells no scale (PIXELSCL); give psf.pixel_scale in arcsec")
    if not np.isfinite(pixels).all() or not pixels.sum() > 0:
        raise ImageError(f"PSF {path} holds invalid pixels or no light; expected a picture of a point with finite values")
    return galsim.InterpolatedImage(galsim.Image(pixels, scale=float(scale)), flux=1.0)


def _rows_of(settings: CatalogSettings, sources: Sources, source: str) -> Table:
    """The catalogue's rows of the sources, in their order."""
    table, _ = select_rows(read_table(settings.path), settings.rules, source)
    ids = identifiers(table, settings.columns.id, source)
    order = np.argsort(ids)
    return table[order[np.searchsorted(ids, sources.ids, sorter=order)]]
