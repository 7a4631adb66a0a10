"""One simulated piece of sky with its truth, and the FITS file that holds it.

Everything follows from the settings and one seed. Sources, positions, seeing, dust, noise and blemishes have random numbers of
their own, so that the same seed gives the same sky at any depth, with or without blemishes.
Inside, flux is in nanojansky per pixel; files are in the survey's own unit.

A file has an image per band named after it, TRUTH (sources above `TRUTH_SNR`, with boxes and masks) and CATALOG (every source
that was rendered; `id` is the same in both). With blemishes there is a MASK_<BAND> per band, whose bits the MP_ cards name;
a source of which every pixel is lost in every band (`masked` is 1) stays in TRUTH, but is no training truth.

Glossary: C bands, H x W pixels, N sources.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.table import Table
from astropy.utils.exceptions import AstropyUserWarning
from astropy.wcs import WCS
from numpy.typing import NDArray

from deepdisc_ops import __version__
from deepdisc_ops.config import SkySettings
from deepdisc_ops.data import surveys
from deepdisc_ops.data.artifacts import FLAG_BITS, LOST_BITS, Flags, Stars, add_artifacts
from deepdisc_ops.data.masks import decode, outline
from deepdisc_ops.data.noise import add_noise
from deepdisc_ops.data.population import Population, attenuation, draw_population, draw_positions
from deepdisc_ops.data.records import Objects, Record, Reference
from deepdisc_ops.data.render import Optics, Stamps, render
from deepdisc_ops.data.surveys import Conditions, Survey
from deepdisc_ops.errors import CatalogError, ConfigError

Image = NDArray[np.float32]
Floats = NDArray[np.float64]

Renderer = Callable[[Population, Floats, Floats, Optics, Floats], Iterator[Stamps]]

DEFAULT_CENTRE = (55.0, -32.0)
"""ra, dec in degrees: inside the DC2 field."""

TRUTH_SNR = 3.0
"""Sources above this point-source S/N in some band are in the truth table."""

RECORD_SNR = 5.0
"""Sources above this are training truth."""

EBV_RANGE = (0.01, 0.08)
STREAMS = ("sky", "positions", "conditions", "field", "noise", "artifacts")
"""What has random numbers of its own, in the order in which they are spawned from the seed."""


@dataclass(frozen=True)
class Slope:
    """A plane through 0 at the middle of the image that rises by ``change`` from edge to edge towards ``angle`` (radian)."""

    change: float
    angle: float
    width: int
    height: int

    def at(self, x: Floats, y: Floats) -> Floats:
        """Values (N,) at pixel positions."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        along = (x - (self.width - 1) / 2) * cos + (y - (self.height - 1) / 2) * sin
        return np.asarray(self.change * along / (self.width * abs(cos) + self.height * abs(sin)))


@dataclass(frozen=True)
class Field:
    """What the sources of a scene are and how they are seen.

    population (N): behind the Milky Way's dust; x, y (N,) pixels; ebv (N,) mag and stretch (N,), the FWHM relative to the
    conditions', at each source; optics and conditions in the middle of the image.
    """

    population: Population
    x: Floats
    y: Floats
    ebv: Floats
    stretch: Floats
    optics: Optics
    conditions: Conditions


@dataclass(frozen=True)
class Truth:
    """What is known of N sources from their pictures: ids (N,) of the field's sources, boxes (N, 4), masks, blendedness (N,)."""

    ids: NDArray[np.intp]
    boxes: NDArray[np.float32]
    masks: tuple[dict[str, Any], ...]
    blendedness: Floats


@dataclass(frozen=True)
class Scene:
    """A simulated image with its truth.

    image and noiseless (C, H, W) float32 nJy per pixel, the noiseless one without blemishes; noise (C,) nJy per pixel of empty
    sky; ebv in the middle; truth: one row per source above `TRUTH_SNR` (id, x, y, ra, dec, x0, y0, x1, y1, class, redshift,
    mag_<band>, snr, ebv, psf_fwhm, blendedness, masked, mask); catalog: all sources; flags (C, H, W) of the blemishes, or None.
    """

    survey: Survey
    settings: SkySettings
    seed: int
    ebv: float
    conditions: Conditions
    image: Image
    noiseless: Image
    noise: Floats
    wcs: WCS
    truth: Table
    catalog: Table
    flags: Flags | None = None


def simulate_scene(
    settings: SkySettings,
    *,
    size: int | tuple[int, int],
    seed: int,
    centre: tuple[float, float] = DEFAULT_CENTRE,
    renderer: Renderer = render,
) -> Scene:
    """Simulate a piece of sky of ``size`` pixels, a side or (width, height), around ``centre`` (ra, dec in degrees).

    renderer: what draws the sources; `render.render_galsim` is the slow reference.
    """
    width, height = _width_height(size)
    survey = surveys.survey(settings.survey)
    streams = dict(zip(STREAMS, np.random.SeedSequence(seed).spawn(len(STREAMS)), strict=True))
    ebv, field = draw_field(survey, settings, width, height, streams)
    noise = surveys.pixel_noise(survey, field.conditions)
    noiseless, truth = paint(field, noise, survey.gold_index, width, height, renderer)
    correlation = survey.noise_correlation if settings.noise_correlation is None else settings.noise_correlation
    image = add_noise(
        noiseless,
        survey,
        noise,
        streams["noise"].spawn(len(survey.bands)),
        source_noise=settings.source_noise,
        correlation=correlation,
    )
    flags = None
    if settings.artifacts:
        optics = Optics(field.conditions.psf_fwhm, noise, survey.pixel_scale, survey.psf_profile)
        stars = np.flatnonzero(field.population.is_star)
        bright = Stars(field.x[stars], field.y[stars], field.population.flux[stars])
        flags = add_artifacts(image, settings.artifacts, survey, optics, bright, streams["artifacts"])
    wcs = tangent_wcs(survey, width, height, centre)
    catalog = _catalog(survey, field, wcs)
    return Scene(
        survey=survey,
        settings=settings,
        seed=seed,
        ebv=ebv,
        conditions=field.conditions,
        image=image,
        noiseless=noiseless,
        noise=noise,
        wcs=wcs,
        truth=_truth_table(survey, field, catalog, truth, flags),
        catalog=catalog,
        flags=flags,
    )


def draw_field(
    survey: Survey, settings: SkySettings, width: int, height: int, streams: dict[str, np.random.SeedSequence]
) -> tuple[float, Field]:
    """E(B-V) in the middle, and the sources with what lies in front of them; only the conditions depend on the years."""
    rng = {name: np.random.default_rng(stream) for name, stream in streams.items()}
    area = width * height * (survey.pixel_scale / 60) ** 2
    population = draw_population(survey, area, rng["sky"], settings)
    x, y = draw_positions(population, survey, width, height, rng["positions"])
    drawn_ebv = float(rng["field"].uniform(*EBV_RANGE))
    dust, seeing = rng["field"].uniform(0, 2 * np.pi, 2)
    middle = drawn_ebv if settings.ebv is None else settings.ebv
    ebv = np.maximum(middle * (1 + Slope(settings.ebv_variation, dust, width, height).at(x, y)), 0)
    conditions = surveys.draw_conditions(survey, settings.years, rng["conditions"])
    deepest = surveys.draw_conditions(
        survey, survey.reference_years or settings.years, np.random.default_rng(streams["conditions"])
    )
    return middle, Field(
        population=population.dimmed(attenuation(survey, ebv)),
        x=x,
        y=y,
        ebv=ebv,
        stretch=1 + Slope(settings.psf_variation, seeing, width, height).at(x, y),
        optics=Optics(conditions.psf_fwhm, surveys.pixel_noise(survey, deepest), survey.pixel_scale, survey.psf_profile),
        conditions=conditions,
    )


def tangent_wcs(survey: Survey, width: int, height: int, centre: tuple[float, float]) -> WCS:
    """TAN projection, north up and east left, with ``centre`` (ra, dec in degrees) in the middle of the image."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = list(centre)
    wcs.wcs.crpix = [width / 2 + 0.5, height / 2 + 0.5]
    wcs.wcs.cdelt = [-survey.pixel_scale / 3600, survey.pixel_scale / 3600]
    wcs.array_shape = (height, width)
    wcs.wcs.set()
    return wcs


def _width_height(size: int | tuple[int, int]) -> tuple[int, int]:
    width, height = (size, size) if isinstance(size, int) else size
    if min(width, height) < 1:
        raise ConfigError(f"size is {width} x {height} pixels, expected at least 1 x 1")
    return width, height


def paint(field: Field, noise: Floats, gold: int, width: int, height: int, renderer: Renderer = render) -> tuple[Image, Truth]:
    """The noiseless image (C, H, W), and the truth of the sources that have `TRUTH_SNR`; noise (C,) nJy, gold the band's index."""
    image = np.zeros((len(noise), height, width), np.float32)
    bright = point_source_snr(field.population, field.conditions) > TRUTH_SNR
    ids: list[int] = []
    boxes: list[NDArray[np.float32]] = [np.zeros((0, 4), np.float32)]
    masks: list[dict[str, Any]] = []
    own: list[Image] = []
    for stamps in renderer(field.population, field.x, field.y, field.optics, field.stretch):
        for (x0, y0), flux in zip(stamps.origins, stamps.flux, strict=True):
            _add(image, flux, int(x0), int(y0))
        chosen = stamps.select(bright[stamps.sources])
        found = outline(chosen, noise, width, height)
        ids += found.sources.tolist()
        boxes.append(found.boxes)
        masks += found.masks
        own += _inside_boxes(chosen, found.sources, found.boxes, gold)
    order = np.argsort(ids)
    all_boxes = np.concatenate(boxes)
    shares = [_blendedness(image[gold], light, box) for light, box in zip(own, all_boxes, strict=True)]
    blendedness = np.array(shares, np.float64)
    return image, Truth(np.array(ids, np.intp)[order], all_boxes[order], tuple(masks[i] for i in order), blendedness[order])


def _add(image: Image, stamp: Image, x0: int, y0: int) -> None:
    """Add a stamp (C, S, S) to an image (C, H, W) at x0, y0; what lies outside is dropped."""
    height, width = image.shape[1:]
    side = stamp.shape[-1]
    left, low = max(x0, 0), max(y0, 0)
    right, high = min(x0 + side, width), min(y0 + side, height)
    if left < right and low < high:
        image[:, low:high, left:right] += stamp[:, low - y0 : high - y0, left - x0 : right - x0]


def _inside_boxes(stamps: Stamps, sources: NDArray[np.intp], boxes: NDArray[np.float32], gold: int) -> list[Image]:
    """The light of each of the sources in the gold band within its box (4,)."""
    row = {int(source): i for i, source in enumerate(stamps.sources)}
    light = []
    for source, box in zip(sources.tolist(), boxes.astype(np.intp), strict=True):
        i = row[source]
        x0, y0, x1, y1 = (box - np.tile(stamps.origins[i], 2)).tolist()
        light.append(stamps.flux[i, gold, y0:y1, x0:x1].copy())
    return light


def _blendedness(plane: Image, light: Image, box: NDArray[np.float32]) -> float:
    """1 - f_child / f_parent within a box, both weighted by the child's own light; 0 for a source alone."""
    x0, y0, x1, y1 = box.astype(np.intp).tolist()
    child, parent = np.vdot(light, light), np.vdot(light, plane[y0:y1, x0:x1])
    return float(np.clip(1 - child / parent, 0, 1)) if parent > 0 else 0.0


def point_source_snr(population: Population, conditions: Conditions) -> Floats:
    """(N,) largest S/N over the bands that a point of the source's flux would have."""
    return np.asarray((5 * population.flux / surveys.to_njy(conditions.depth)).max(axis=1, initial=0.0))


def _catalog(survey: Survey, field: Field, wcs: WCS) -> Table:
    """All sources of a field, in its order."""
    population, gold = field.population, survey.gold_index
    count = len(population)
    ra, dec = wcs.wcs_pix2world(field.x, field.y, 0) if count else (np.zeros(0), np.zeros(0))
    magnitudes = surveys.to_magnitude(population.flux)
    table = Table({"id": np.arange(count, dtype=np.int64), "x": field.x, "y": field.y, "ra": ra, "dec": dec})
    table["class"] = population.is_star.astype(np.int32)
    table["redshift"] = population.redshift.astype(np.float32)
    for column, band in enumerate(survey.bands):
        table[f"mag_{band}"] = magnitudes[:, column].astype(np.float32)
    table["ebv"] = field.ebv.astype(np.float32)
    total = np.maximum(population.flux[:, gold], 1e-9)
    table["bulge_share"] = (population.bulge_flux[:, gold] / total).astype(np.float32)
    table["knot_share"] = (population.knot_flux[:, gold] / total).astype(np.float32)
    for name in ("disc_radius", "bulge_radius", "axis_ratio", "angle"):
        table[name] = getattr(population, name).astype(np.float32)
    table["group"] = population.group
    return table


def _truth_table(survey: Survey, field: Field, catalog: Table, truth: Truth, flags: Flags | None) -> Table:
    listed = truth.ids
    table = catalog["id", "x", "y", "ra", "dec"][listed]
    for column, name in enumerate(("x0", "y0", "x1", "y1")):
        table[name] = truth.boxes[:, column]
    for name in ("class", "redshift", *(f"mag_{band}" for band in survey.bands)):
        table[name] = catalog[name][listed]
    table["snr"] = point_source_snr(field.population, field.conditions)[listed].astype(np.float32)
    table["ebv"] = catalog["ebv"][listed]
    table["psf_fwhm"] = (field.optics.fwhm[survey.gold_index] * field.stretch[listed]).astype(np.float32)
    table["blendedness"] = truth.blendedness.astype(np.float32)
    table["masked"] = _masked_shares(truth, flags)
    table["mask"] = np.array([mask["counts"] for mask in truth.masks], dtype=str if len(listed) else "U1")
    return table


def _masked_shares(truth: Truth, flags: Flags | None) -> Image:
    """(N,) share of each source's pixels that is lost, in the band where it is least."""
    shares = np.zeros(len(truth.ids), np.float32)
    if flags is None:
        return shares
    for i, (box, mask) in enumerate(zip(truth.boxes.astype(np.intp).tolist(), truth.masks, strict=True)):
        x0, y0, x1, y1 = box
        flagged = flags[:, y0:y1, x0:x1] & LOST_BITS != 0
        if flagged.any():
            shares[i] = flagged[:, decode(mask, (x0, y0, x1, y1))].mean(axis=1).min()
    return shares


def write_scene(scene: Scene, path: Path) -> None:
    """Write a scene as FITS; the file appears only when it is complete."""
    survey = scene.survey
    primary = fits.PrimaryHDU()
    primary.header.update(
        SURVEY=survey.name, SEED=scene.seed, YEARS=scene.settings.years, EBV=scene.ebv, PIXSCALE=survey.pixel_scale
    )
    primary.header["SETTINGS"] = scene.settings.model_dump_json()
    primary.header["ORIGIN"] = f"deepdisc_ops {__version__}"
    tables = [fits.BinTableHDU(scene.catalog, name="CATALOG"), fits.BinTableHDU(scene.truth, name="TRUTH")]
    hdus = fits.HDUList([primary, *_planes(scene), *_masks(scene), *tables])
    unfinished = path.with_name(f".{path.name}.part")
    hdus.writeto(unfinished, overwrite=True)
    unfinished.replace(path)


def _planes(scene: Scene) -> list[fits.ImageHDU]:
    survey, planes = scene.survey, []
    for band, plane, noise, fwhm in zip(survey.bands, scene.image, scene.noise, scene.conditions.psf_fwhm, strict=True):
        header = scene.wcs.to_header()
        header["FILTER"] = band
        header["MAGZERO"] = (survey.zero_point, "AB magnitude of one unit")
        header["SKYSIG"] = (float(noise * survey.units_per_njy), "noise per pixel")
        header["PSFFWHM"] = (float(fwhm), "[arcsec] of the PSF")
        header["BUNIT"] = "adu"
        planes.append(fits.ImageHDU(plane * np.float32(survey.units_per_njy), header, name=band.upper()))
    return planes


def _masks(scene: Scene) -> list[fits.ImageHDU]:
    if scene.flags is None:
        return []
    header = fits.Header([(f"HIERARCH MP_{name}", bit, "number of the bit") for name, bit in FLAG_BITS.items()])
    return [
        fits.ImageHDU(plane, header, name=f"MASK_{band.upper()}")
        for band, plane in zip(scene.survey.bands, scene.flags, strict=True)
    ]


def scene_record(path: Path, min_snr: float = RECORD_SNR, *, split: str = "") -> Record:
    """The training truth of a scene file, keyed by its name: its sources above ``min_snr`` that blemishes leave to be seen."""
    try:
        with warnings.catch_warnings(), fits.open(path, memmap=True) as hdus:
            warnings.simplefilter("error", AstropyUserWarning)  # a file cut short
            survey = surveys.survey(hdus[0].header["SURVEY"])
            header = hdus[survey.bands[0].upper()].header
            truth = Table(hdus["TRUTH"].data)  # the last extension: what comes before it is there
    except (OSError, KeyError, AstropyUserWarning) as error:
        raise CatalogError(f"{path} is no complete scene: {' '.join(str(error).split())}") from None
    width, height = int(header["NAXIS1"]), int(header["NAXIS2"])
    truth = truth[(np.asarray(truth["snr"]) > min_snr) & (np.asarray(truth["masked"]) < 1)]
    return Record(
        key=path.stem,
        pixels=Reference((path.absolute(),)),
        bands=survey.bands,
        width=width,
        height=height,
        objects=_objects(truth, survey, width, height),
        wcs=WCS(header).to_header().tostring(sep="\n", endcard=False, padding=False),
        split=split,
    )


def _objects(truth: Table, survey: Survey, width: int, height: int) -> Objects:
    def column(name: str, dtype: Any) -> NDArray[Any]:
        return np.array(truth[name], dtype=dtype)

    return Objects(
        ids=column("id", np.int64),
        boxes=np.stack([column(name, np.float32) for name in ("x0", "y0", "x1", "y1")], axis=1),
        classes=column("class", np.int32),
        redshift=column("redshift", np.float32),
        mag=column(f"mag_{survey.gold_band}", np.float32),
        x=column("x", np.float64),
        y=column("y", np.float64),
        ra=column("ra", np.float64),
        dec=column("dec", np.float64),
        ebv=column("ebv", np.float32),
        masks=tuple({"size": [height, width], "counts": str(counts)} for counts in truth["mask"]),
    )
