"""What all builders of truth share: a mosaic and a catalogue on it, cut into windows, each window a record.

A builder says how the objects of one window look (`WindowTruth`); here is everything else: reading and checking both, redshifts
from spectra, the plan of windows, which windows are left out, and writing. Nothing is written before the first record is
complete, and a build that was interrupted goes on where it stopped.

Glossary: N sources of the catalogue, M of them in a window, C bands, H x W pixels of a window.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, model_validator

from deepdisc_ops.config import Settings
from deepdisc_ops.data.masks import RunLengths
from deepdisc_ops.data.records import DatasetInfo, Objects, Record, Reference
from deepdisc_ops.data.store import Dataset, create_dataset, open_dataset
from deepdisc_ops.data.tables import CatalogSettings, Sources, pixel_positions, read_sources, read_table, select_rows
from deepdisc_ops.data.truth.specz import Compilation, SpecSettings, compile_redshifts
from deepdisc_ops.data.writer import DatasetWriter
from deepdisc_ops.errors import CatalogError, ImageError
from deepdisc_ops.sky.dust import EbvSource, ebv_source
from deepdisc_ops.sky.images import Mosaic, SkyImage, open_mosaic
from deepdisc_ops.sky.tiling import Window

Floats = NDArray[np.float64]
Progress = Callable[[int, int], None]


class ImageSettings(Settings):
    """The files of a mosaic, as `sky.images.open_mosaic` takes them."""

    paths: Annotated[tuple[Path, ...], Field(min_length=1)]
    bands: Annotated[tuple[str, ...], Field(min_length=1)]
    plane_bands: tuple[str, ...] | None = None
    zero_point: float | None = Field(None, description="AB magnitude of one count, where the files do not say")
    blank: float | None = Field(None, description="pixel value that means no data, in the files' unit")

    def open(self) -> Mosaic:
        """The mosaic; it must have a WCS."""
        return open_mosaic(list(self.paths), self.bands, plane_bands=self.plane_bands, zero_point=self.zero_point, blank=self.blank)

    def reference(self, window: Window) -> Reference:
        """The pixels of a window of these files."""
        paths = tuple(path.absolute() for path in self.paths)
        return Reference(paths, window, self.zero_point, self.plane_bands, blank=self.blank)


class WindowSettings(Settings):
    """How the mosaic is cut; the defaults are those of the JADES paper."""

    width_arcsec: PositiveFloat = 8.3
    height_arcsec: PositiveFloat = 7.5
    overlap_arcsec: Annotated[float, Field(ge=0)] = 0.0
    max_missing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.5, description="a window lacks a band, and is left out, when more than this share of its pixels has no data there"
    )
    require_redshift: bool = Field(False, description="leave out windows without any redshift")


class TruthSettings(Settings):
    """A mosaic, a catalogue on it and what is to become of them."""

    survey: str = Field(description="name of the survey, kept as the origin of the records")
    gold_band: str = Field(description="band of the magnitudes that are kept")
    images: ImageSettings
    catalog: CatalogSettings
    spectra: SpecSettings | None = Field(None, description="redshifts from spectra in place of the catalogue's own")
    windows: WindowSettings = WindowSettings()
    outside: Literal["error", "drop"] = Field("error", description="sources of the catalogue that lie outside the mosaic")
    ebv: str | None = Field(None, description="E(B-V) at the objects: a number in mag, or sfd; none when not given")
    dust_maps: Path | None = None

    @model_validator(mode="after")
    def _gold_magnitudes(self) -> TruthSettings:
        magnitudes = self.catalog.columns.magnitudes
        if magnitudes and self.gold_band not in magnitudes:
            raise ValueError(
                f"gold_band is {self.gold_band}, but the catalogue's magnitudes are in {', '.join(magnitudes)}; name one of them"
            )
        return self


@dataclass(frozen=True)
class Placed:
    """A catalogue placed on its mosaic: sources N, x and y (N,) 0-based pixels, ebv (N,) mag or NaN."""

    mosaic: Mosaic
    sources: Sources
    x: Floats
    y: Floats
    ebv: Floats


@dataclass(frozen=True)
class Shapes:
    """What a builder found in a window: rows (M,) of the placed sources, boxes (M, 4) and M masks in the window's frame."""

    rows: NDArray[np.intp]
    boxes: NDArray[np.float32]
    masks: tuple[RunLengths, ...]


WindowTruth = Callable[[Window, SkyImage, NDArray[np.intp]], Shapes]
"""The shapes in a window, of its image and of those sources (rows) whose centres lie in it."""


@dataclass(frozen=True)
class Built:
    """A finished build: the data set, what became of windows and sources, the compilation of spectra if there was one."""

    dataset: Dataset
    counts: Counter[str]
    compilation: Compilation | None


def place(settings: TruthSettings) -> tuple[Placed, Compilation | None, Counter[str]]:
    """Read and check everything: the mosaic, its catalogue with redshifts and E(B-V), and how many sources were left out."""
    source = f"catalogue {settings.catalog.path}"
    mosaic = settings.images.open()
    table, removed = select_rows(read_table(settings.catalog.path), settings.catalog.rules, source)
    sources = read_sources(table, settings.catalog.columns, source)
    counts = Counter({f"sources removed by {name}": count for name, count in removed})
    compilation = compile_redshifts(settings.spectra, sources) if settings.spectra else None
    if compilation is not None:
        sources = replace(sources, redshift=compilation.redshift_of(sources.ids))
    assert mosaic.wcs is not None  # `open_mosaic` has seen to it
    x, y, inside = pixel_positions(sources, mosaic.wcs, mosaic.width, mosaic.height)
    if not inside.all() and (settings.outside == "error" or not inside.any()):
        i = int(np.flatnonzero(~inside)[0])
        raise CatalogError(
            f"{source}: {int((~inside).sum())} of {len(sources)} sources lie outside the image of {mosaic.width} x {mosaic.height} "
            f"pixels (id {sources.ids[i]} at x {x[i]:.1f}, y {y[i]:.1f}); hand in the image they belong to, or set outside: drop"
        )
    counts["sources outside the image"] = int((~inside).sum())
    sources, x, y = sources.select(inside), x[inside], y[inside]
    reddening = _reddening(settings, sources)
    return Placed(mosaic, sources, x, y, reddening), compilation, counts


def plan_windows(mosaic: Mosaic, settings: WindowSettings) -> list[Window]:
    """Whole windows of one size, side by side, row by row; what they leave of the mosaic is shared between its edges."""
    sides = [round(side / mosaic.pixel_scale) for side in (settings.width_arcsec, settings.height_arcsec)]
    overlap = round(settings.overlap_arcsec / mosaic.pixel_scale)
    starts = []
    for name, size, side in zip(("columns", "rows"), (mosaic.width, mosaic.height), sides, strict=True):
        if side > size or side <= overlap:
            raise ImageError(
                f"windows of {side} {name} with an overlap of {overlap} do not fit an image of {size} {name} "
                f"({mosaic.pixel_scale:.4g} arcsec a pixel); change width_arcsec, height_arcsec or overlap_arcsec"
            )
        step = side - overlap
        number = (size - side) // step + 1
        first = (size - side - (number - 1) * step) // 2
        starts.append(range(first, first + number * step, step))
    return [Window(x, y, x + sides[0], y + sides[1]) for y in starts[1] for x in starts[0]]


def build(
    settings: TruthSettings,
    truth: Callable[[Placed, Counter[str]], WindowTruth],
    out: Path,
    *,
    packed: bool = False,
    progress: Progress | None = None,
) -> Built:
    """Make a data set in the folder ``out`` of a mosaic and its catalogue; ``truth`` prepares the builder for them.

    Windows that are there are kept. No window with an object (and a redshift, where required) is an error.
    """
    placed, compilation, counts = place(settings)
    windows = plan_windows(placed.mosaic, settings.windows)
    info = DatasetInfo(settings.survey, placed.mosaic.bands, placed.mosaic.pixel_scale, settings.gold_band, 0)
    known = set(open_dataset(out).written_keys.tolist()) if (out / "dataset.yaml").is_file() else set()
    counts["windows written before"] = len(known)
    records = _records(settings, placed, truth(placed, counts), windows, known, counts, progress)
    first = next(records, None)
    if first is None and not known:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        raise CatalogError(
            f"no window of {len(windows)} is left ({listed}); loosen the rules, or hand in the images of this catalogue"
        )
    dataset = create_dataset(out, info, {"truth": settings.model_dump(mode="json")})
    with DatasetWriter(dataset, packed=packed) as writer:
        for record, image in chain([first] if first else [], records):
            writer.add(record, image if packed else None)
    return Built(open_dataset(out), counts, compilation)


def wcs_text(wcs: WCS | None) -> str:
    """The cards of a WCS as a record keeps them, "" for none."""
    return "" if wcs is None else str(wcs.to_header(relax=True).tostring(sep="\n"))


def missing_bands(image: SkyImage, max_missing: float) -> list[str]:
    """Bands of which more than the share ``max_missing`` of the pixels has no data."""
    invalid = np.broadcast_to(image.mask, image.data.shape) if image.invalid is None else image.invalid
    return [band for band, share in zip(image.bands, invalid.mean(axis=(1, 2)), strict=True) if share > max_missing]


def window_objects(placed: Placed, shapes: Shapes, window: Window, gold_band: str) -> Objects:
    """The shapes with what the catalogue says of them, in the frame of the window."""
    rows = shapes.rows
    sources = placed.sources.select(rows)
    return Objects(
        ids=sources.ids,
        boxes=shapes.boxes,
        classes=sources.classes,
        redshift=sources.redshift.astype(np.float32),
        mag=sources.magnitude(gold_band).astype(np.float32),
        x=placed.x[rows] - window.x0,
        y=placed.y[rows] - window.y0,
        ra=sources.ra,
        dec=sources.dec,
        ebv=placed.ebv[rows].astype(np.float32),
        masks=shapes.masks,
    )


def sources_in(placed: Placed, window: Window) -> NDArray[np.intp]:
    """Rows of the sources whose centres lie in a window."""
    x, y = placed.x, placed.y
    return np.flatnonzero((x >= window.x0 - 0.5) & (x < window.x1 - 0.5) & (y >= window.y0 - 0.5) & (y < window.y1 - 0.5))


def _records(
    settings: TruthSettings,
    placed: Placed,
    truth: WindowTruth,
    windows: list[Window],
    known: set[str],
    counts: Counter[str],
    progress: Progress | None,
) -> Iterator[tuple[Record, SkyImage]]:
    """Records of the windows that are kept, with their images."""
    stem = settings.images.paths[0].stem
    for number, window in enumerate(windows, start=1):
        key = f"{stem}-{window.x0}-{window.y0}"
        record = None if key in known else _record(settings, placed, truth, window, key, counts)
        if record is not None:
            yield record
        if progress is not None:
            progress(number, len(windows))


def _record(
    settings: TruthSettings, placed: Placed, truth: WindowTruth, window: Window, key: str, counts: Counter[str]
) -> tuple[Record, SkyImage] | None:
    """One window's record, None (and counted) where it is left out."""
    rows = sources_in(placed, window)
    if settings.windows.require_redshift and not np.isfinite(placed.sources.redshift[rows]).any():
        counts["windows without a redshift"] += 1
        return None
    image = placed.mosaic.read(window)
    missing = missing_bands(image, settings.windows.max_missing)
    if missing:
        counts["windows that lack a band"] += 1
        return None
    objects = window_objects(placed, truth(window, image, rows), window, settings.gold_band)
    if settings.windows.require_redshift and not np.isfinite(objects.redshift).any():
        counts["windows without a redshift"] += 1
        return None
    if not len(objects):
        counts["windows without an object"] += 1
        return None
    counts["windows written"] += 1
    counts["objects"] += len(objects)
    counts["objects with a redshift"] += int(np.isfinite(objects.redshift).sum())
    record = Record(
        key=key,
        pixels=settings.images.reference(window),
        bands=image.bands,
        width=window.width,
        height=window.height,
        objects=objects,
        wcs=wcs_text(image.wcs),
        origin=settings.survey,
    )
    return record, image


def _reddening(settings: TruthSettings, sources: Sources) -> Floats:
    if settings.ebv is None:
        return np.full(len(sources), np.nan)
    source: EbvSource = ebv_source(settings.ebv, settings.dust_maps)
    return np.asarray(source(sources.ra, sources.dec), np.float64)
