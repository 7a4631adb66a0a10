"""``deepdisc-ops predict``: from mosaic to catalogue, here, through an endpoint or on Ray's actors, continued where it stopped."""

from __future__ import annotations

import json
import math
import shlex
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import deepdisc_ops
from deepdisc_ops.cli.console import console, progress_bar
from deepdisc_ops.errors import ConfigError

if TYPE_CHECKING:
    from deepdisc_ops.config import EnsembleSettings
    from deepdisc_ops.inference.forced import ForcedLooker
    from deepdisc_ops.inference.journal import Journal
    from deepdisc_ops.inference.mosaic import Looker, Objects, Progress, Survey
    from deepdisc_ops.inference.recipe import Recipe
    from deepdisc_ops.sky.given import Given
    from deepdisc_ops.sky.images import Mosaic

STRIDE = 32
"""Windows start on multiples of this and of the members' strides."""
AREA = ".moc.fits"
TABLES = (".parquet", ".fits", ".hdf5", ".ecsv")
RECENT = 20
"""The rate is that of so many windows."""


class ForcedFor(StrEnum):
    """Which objects of a given list are looked at."""

    ALL = "all"
    MISSING = "missing"


class Memory(StrEnum):
    """Whether members stay in memory."""

    KEEP = "keep"
    SWAP = "swap"


def predict(
    images: Annotated[list[Path], typer.Argument(help="One multi-extension FITS, a cube, a file per band, or .npz.")],
    out: Annotated[
        list[Path], typer.Option(help="Catalogue to write: .parquet, .fits, .hdf5 (qp), .ecsv, .reg, area .moc.fits; repeatable.")
    ],
    model: Annotated[
        Path | None, typer.Option(help="A .mar archive, an ensemble folder or a checkpoint folder (RUN/best).")
    ] = None,
    server: Annotated[Path | None, typer.Option(help="Use the endpoint of this run directory (or server.json) instead.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Combine members otherwise, as in match=union, min_iou=0.4, components=5.")
    ] = None,
    ebv: Annotated[
        str, typer.Option(help="Milky Way E(B-V): a number in mag, or a map: sfd, csfd, planck, planck_gnilc, lenz2017, bh.")
    ] = "0.03",
    dust_maps: Annotated[Path | None, typer.Option(help="Folder of the dust maps.")] = None,
    dust_scale: Annotated[float, typer.Option(help="Factor on the dust map; 0.86 turns SFD into SF11.")] = 1.0,
    plane_bands: Annotated[
        str | None, typer.Option(help="Names of the image planes where the files do not tell: g,r,i,z,y.")
    ] = None,
    zero_point: Annotated[float | None, typer.Option(help="AB magnitude of one count where the headers do not tell.")] = None,
    pixel_scale: Annotated[float | None, typer.Option(help="Arcsec per pixel where there is no WCS.")] = None,
    blank: Annotated[float | None, typer.Option(help="Pixel value that means no data, in the files' unit, such as 0.")] = None,
    bad_bits: Annotated[
        str | None, typer.Option(help="Planes of a mask that make a pixel invalid, by name (NO_DATA,SAT), or an integer.")
    ] = None,
    pixels_only: Annotated[bool, typer.Option("--pixels-only", help="Accept images without a WCS; ra and dec stay NaN.")] = False,
    photometry: Annotated[bool, typer.Option(help="Measure flux, error and S/N of every object in every band.")] = True,
    diameter: Annotated[float | None, typer.Option(min=0.01, help="Of the apertures in arcsec; 10 pixels without one.")] = None,
    masks: Annotated[bool, typer.Option("--masks", help="Add the objects' masks to the catalogue, run-length encoded.")] = False,
    forced: Annotated[
        Path | None, typer.Option(help="Given objects: x0, y0, x1, y1 in pixels of the mosaic; or, with --forced-size, ra, dec.")
    ] = None,
    forced_for: Annotated[
        ForcedFor,
        typer.Option(help="Their redshifts row for row, nothing else; or of those that were not detected, behind the rest."),
    ] = ForcedFor.ALL,
    forced_size: Annotated[
        str | None, typer.Option(help="Side of the boxes about ra, dec: a number in arcsec, or the column that holds it.")
    ] = None,
    forced_columns: Annotated[str | None, typer.Option(help="Columns to carry over, as given_NAME: id,mag_i.")] = None,
    forced_radius: Annotated[float, typer.Option(min=0.001, help="Arcsec within which a given object is a detected one.")] = 0.5,
    window: Annotated[int, typer.Option(min=128, help="Side of the windows that are read and predicted at once.")] = 1024,
    overlap: Annotated[int, typer.Option(min=16, help="Pixels that neighbouring windows share.")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Windows in flight at once, for an endpoint with several workers.")] = 1,
    actors: Annotated[int, typer.Option(min=0, help="Predict in so many Ray actors, a GPU each with --device cuda.")] = 0,
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster to join with --actors; it must see the same paths.")] = None,
    device: Annotated[str, typer.Option(help="torch device of the model, such as cpu or cuda:0.")] = "cpu",
    memory: Annotated[Memory, typer.Option(help="keep all members in memory, or swap: read each when it is used.")] = Memory.KEEP,
    skip_failing: Annotated[bool, typer.Option("--skip-failing", help="Go on without members that fail.")] = False,
    picture: Annotated[Path | None, typer.Option(help="PNG of the mosaic's middle in colour, with boxes and redshifts.")] = None,
) -> None:
    """Make the catalogue of a mosaic, in process (--model) or through the endpoint (--server).

    What is found is kept in the folder OUT.unfinished until the catalogue is complete: start the same command again to go on
    after an interruption.

    Example: `deepdisc-ops predict mosaic.fits --model ensemble.mar --out catalog.parquet`
    """
    words = _Words(out, forced, forced_for, server is not None, picture)
    if (model is None) == (server is None):
        raise ConfigError("give either --model or --server, one of the two")
    words.refuse({"--masks": masks, "--set": overrides, "--memory swap": memory == Memory.SWAP, "--skip-failing": skip_failing})
    words.check(masks=masks, actors=actors, ray_address=ray_address, pixels_only=pixels_only)
    from deepdisc_ops.inference.recipe import EbvRecipe, ImageRecipe, ModelRecipe, Recipe
    from deepdisc_ops.sky.tiling import plan

    plan(window, window, window, overlap, STRIDE)  # refuses windows that do not advance
    bands = tuple(plane_bands.split(",")) if plane_bands else None
    bits = None if bad_bits is None else _mask_bits(bad_bits)
    pictures = ImageRecipe(tuple(images), bands, zero_point, pixel_scale, not pixels_only, blank, bits)
    where = EbvRecipe(ebv, dust_maps, dust_scale)
    source = where.open()
    with ExitStack() as stack:
        if server is not None:
            eyes = _endpoint(stack, server, pictures, where, words, photometry=photometry, diameter=diameter, workers=workers)
        else:
            folder = _ensemble_folder(model or Path(), stack, shared=ray_address is not None)
            settings = _combination(folder, overrides or ())
            failing: Literal["skip", "raise"] = "skip" if skip_failing else "raise"
            kept: Literal["swap", "keep"] = "swap" if memory == Memory.SWAP else "keep"
            ensemble = ModelRecipe(folder, device, settings, kept, failing, masks)
            recipe = Recipe(pictures, ensemble, where, photometry, diameter, workers=workers)
            eyes = _in_process(stack, recipe, words, actors=actors)
        from deepdisc_ops.inference.mosaic import Survey, write_mosaic

        mosaic = eyes.mosaic
        survey = Survey(mosaic.width, mosaic.height, window, overlap, math.lcm(STRIDE, eyes.stride))
        given = _given(words, mosaic, forced_size, forced_columns)
        about = eyes.about | {
            "images": [_identity(path) for path in mosaic.paths],
            "read": [plane_bands, zero_point, pixel_scale, blank, bad_bits],
            "E(B-V)": [ebv, dust_scale, None if dust_maps is None else str(dust_maps.absolute())],
            "windows": [window, overlap, survey.stride],
            "photometry": [photometry, diameter],
            "area": words.area,
            "forced": None if forced is None else [_identity(forced), forced_for.value, forced_size, forced_columns, forced_radius],
        }
        journal = stack.enter_context(_journal(words.journal, about))
        if actors:
            eyes = _on_actors(stack, eyes, actors, ray_address, device)
        provenance = {
            "package": f"deepdisc_ops {deepdisc_ops.__version__}",
            "command": shlex.join(["deepdisc-ops", *sys.argv[1:]]),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "E(B-V)": str(source),
            **eyes.provenance,
        }
        started = time.monotonic()

        def at_end() -> dict[str, str]:
            failures = "; ".join(f"{name}: {why}" for name, why in eyes.failures.items())
            return {"seconds": f"{time.monotonic() - started:.2f}"} | ({"failures": failures} if failures else {})

        with progress_bar("predicting", 1, "windows") as advance:
            told = _pace(advance)
            rows = write_mosaic(
                _search(eyes, survey, journal, told, given, words, forced_radius),
                out,
                bands=mosaic.bands,
                classes=eyes.classes,
                wcs=mosaic.wcs,
                order=eyes.order,
                provenance=provenance,
                described=None if given is None else given.described,
                at_end=at_end,
            )
        journal.remove()
        seconds = time.monotonic() - started
        if picture:
            from deepdisc_ops import report
            from deepdisc_ops.sky.catalog import read_catalog

            report.draw_picture(mosaic, read_catalog(words.tables[0]), picture)
    console.print(f"{rows} objects in {seconds:.1f} s ({rows / max(seconds, 1e-9):.0f} a second): {', '.join(map(str, out))}")


@dataclass(frozen=True)
class _Words:
    """What was asked for, as far as one word bears on another."""

    out: Sequence[Path]
    forced: Path | None
    forced_for: ForcedFor
    server: bool
    picture: Path | None

    @property
    def journal(self) -> Path:
        """The folder of an unfinished run."""
        return self.out[0].with_name(f"{self.out[0].name}.unfinished")

    @property
    def area(self) -> bool:
        """Whether a map of the area is asked for."""
        return any(path.name.endswith(AREA) for path in self.out)

    @property
    def tables(self) -> list[Path]:
        """The outputs that are tables, whole."""
        return [path for path in self.out if path.suffix in TABLES and not path.name.endswith(AREA)]

    def refuse(self, asked: Mapping[str, Any]) -> None:
        """Refuse what an endpoint does not do."""
        if self.server and (said := [name for name, value in {**asked, "--forced": self.forced}.items() if value]):
            raise ConfigError(f"an endpoint does not understand {', '.join(said)}; leave it out, or predict with --model")

    def check(self, *, masks: bool, actors: int, ray_address: str | None, pixels_only: bool) -> None:
        """Refuse what does not go together, and outputs that cannot be written."""
        from deepdisc_ops.sky.catalog import check_path

        for path in self.out:
            check_path(path)
        for wrong, why in (
            (ray_address is not None and not actors, "--ray-address is of use with --actors alone; say how many"),
            (actors and self.server, "--actors predict in process and --server does not; leave one of them out"),
            (actors and self.forced, "--forced does not run on --actors; leave one of them out"),
            (masks and self.forced, "given objects have no masks; leave --masks or --forced out"),
            (self.area and pixels_only, f"a map of the area (*{AREA}) needs a WCS; leave it or --pixels-only out"),
            (
                self.area and self.forced and self.forced_for == ForcedFor.ALL,
                f"--forced-for all searches no area; leave *{AREA} out, or take --forced-for missing",
            ),
            (self.picture and not self.tables, f"--picture is drawn from a table; add one to --out ({', '.join(TABLES)})"),
        ):
            if wrong:
                raise ConfigError(why)


@dataclass(frozen=True)
class _Eyes:
    """Who looks at which mosaic, and what has to be known of them.

    about: what a run with them is about; order: of the HEALPix cells of the area, if that is wanted; failures: members that were
    left out, and why.
    """

    mosaic: Mosaic
    looker: Looker
    classes: tuple[str, ...]
    stride: int
    about: dict[str, Any]
    provenance: dict[str, str]
    order: int | None
    failures: Mapping[str, str] = field(default_factory=dict)
    forced: ForcedLooker | None = None
    recipe: Recipe | None = None


def _in_process(stack: ExitStack, recipe: Recipe, words: _Words, *, actors: int) -> _Eyes:
    """An ensemble in this process; with ``actors`` it only tells of itself here."""
    from deepdisc_ops.inference.ensemble import digest
    from deepdisc_ops.inference.forced import ForcedLooker

    model = replace(recipe.model, device="cpu") if actors else recipe.model
    ensemble = model.load()
    mosaic = stack.enter_context(recipe.images.open(ensemble.bands))
    recipe = replace(recipe, order=_cell_order(mosaic, words))
    looker = recipe.looker_with(ensemble, mosaic)
    settings, name = ensemble.settings.model_dump(mode="json"), digest(recipe.model.folder)
    options = [recipe.model.masks, recipe.model.on_failure, recipe.model.device.partition(":")[0]]
    return _Eyes(
        mosaic,
        looker,
        ensemble.seats[0].info.config.model.classes,
        ensemble.stride,
        {"model": name, "members": settings, "options": options},
        {"model": name, "members": json.dumps(settings | {"names": ensemble.names, "shares": ensemble.weights})},
        recipe.order,
        ensemble.failures,
        ForcedLooker(
            mosaic,
            lambda image, boxes, plane: ensemble.redshift(image.data, boxes, plane, image.mask),
            looker.ebv,
            recipe.workers,
            looker.examiners,
        ),
        recipe,
    )


def _endpoint(
    stack: ExitStack,
    server: Path,
    images: Any,
    ebv: Any,
    words: _Words,
    *,
    photometry: bool,
    diameter: float | None,
    workers: int,
) -> _Eyes:
    """The endpoint of a run directory; what is beyond redshifts is measured here."""
    from deepdisc_ops.inference.mosaic import LocalLooker
    from deepdisc_ops.inference.recipe import examiners
    from deepdisc_ops.serving.client import Client
    from deepdisc_ops.serving.server import discover

    info = discover(server)
    client = stack.enter_context(Client(info.url, info.token))
    mosaic = stack.enter_context(images.open(info.bands))
    order, name = _cell_order(mosaic, words), f"{info.model} {info.model_version}"
    measured = examiners(mosaic, (), info.pixel_scale, photometry=photometry, diameter=diameter)
    looker = LocalLooker(mosaic, client.predict, ebv.open(), workers, measured, order)
    return _Eyes(mosaic, looker, (), STRIDE, {"model": name}, {"model": f"{name} at {info.url}"}, order)


def _on_actors(stack: ExitStack, eyes: _Eyes, actors: int, address: str | None, device: str) -> _Eyes:
    from deepdisc_ops.inference.cluster import RayLooker

    if eyes.recipe is None:
        raise ValueError("actors need a recipe")
    gpus = 1 if device.startswith("cuda") else 0
    looker = stack.enter_context(RayLooker(eyes.recipe.looker, actors, gpus=gpus, address=address))
    return replace(eyes, looker=looker, failures=looker.failures)


def _search(
    eyes: _Eyes, survey: Survey, journal: Journal, progress: Progress, given: Given | None, words: _Words, radius: float
) -> Objects:
    """The objects of the catalogue: those found, those given, or both."""
    from deepdisc_ops.inference.forced import CompletedSearch, ForcedSearch, GivenSearch
    from deepdisc_ops.inference.mosaic import Search

    scratch = journal.folder
    if given is None or eyes.forced is None:
        return Search(survey, eyes.looker, journal, progress)
    if words.forced_for == ForcedFor.ALL:
        search = ForcedSearch(survey, eyes.forced, given.boxes, journal=journal, progress=progress, scratch=scratch)
        return GivenSearch(search, given)
    looker = eyes.forced

    def forced(missing: Any, found: Any) -> ForcedSearch:
        return ForcedSearch(survey, looker, missing, neighbours=found, journal=journal, progress=progress, scratch=scratch)

    pixels = radius / eyes.mosaic.pixel_scale
    return CompletedSearch(Search(survey, eyes.looker, journal, progress), given, pixels, forced, scratch)


def _given(words: _Words, mosaic: Mosaic, size: str | None, columns: str | None) -> Given | None:
    if words.forced is None:
        return None
    from deepdisc_ops.sky.given import read_given

    try:
        side: str | float | None = None if size is None else float(size)
    except ValueError:
        side = size
    return read_given(words.forced, mosaic, columns.split(",") if columns else (), side)


@contextmanager
def _journal(folder: Path, about: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal of a run, left behind where it holds something when the run fails."""
    from deepdisc_ops.inference.journal import Journal

    journal = Journal(folder, about)
    if len(journal):
        console.print(f"{folder} holds {len(journal)} windows of an unfinished run, which goes on")
    try:
        yield journal
    finally:
        if not len(journal):
            journal.remove()


def _pace(advance: Callable[..., None]) -> Progress:
    """Progress that also tells the rate and the time left, from the last `RECENT` windows."""
    seen: deque[tuple[int, float]] = deque(maxlen=RECENT + 1)

    def told(done: int, total: int, objects: int) -> None:
        if seen and done <= seen[-1][0]:
            seen.clear()  # another pass
        seen.append((done, time.monotonic()))
        (first, began), (last, now) = seen[0], seen[-1]
        note = f"{objects} objects"
        if last > first and now > began:
            rate = (last - first) / (now - began)
            left = int((total - done) / rate)
            note += f", {rate:.2g} a second, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        advance(done, note, total)

    return told


def _ensemble_folder(model: Path, stack: ExitStack, *, shared: bool) -> Path:
    """The ensemble folder of an archive, a checkpoint folder, or itself; ``shared``: other machines are to see it."""
    from deepdisc_ops.inference.ensemble import write_ensemble
    from deepdisc_ops.model.weights import DESCRIPTION

    archive = model.suffix == ".mar"
    if not archive and not (model / DESCRIPTION).exists():
        return model
    if shared:
        raise ConfigError(f"{model} is no ensemble folder, which a cluster needs; make one with `deepdisc-ops members gather`")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "ensemble"
    if archive:
        from deepdisc_ops.serving.archive import unpack_archive

        return unpack_archive(model, folder)
    write_ensemble(folder, [model])
    return folder


def _combination(folder: Path, overrides: Sequence[str]) -> EnsembleSettings | None:
    """The folder's own settings with ``overrides``, None without any."""
    from deepdisc_ops.config import EnsembleSettings, parse_override, set_by_path, validate
    from deepdisc_ops.inference.ensemble import read_description

    if not overrides:
        return None
    tree = dict(read_description(folder).get("combination", {}))
    for text in overrides:
        set_by_path(tree, *parse_override(text))
    return validate(EnsembleSettings, tree, "--set")


def _cell_order(mosaic: Mosaic, words: _Words) -> int | None:
    from deepdisc_ops.sky.catalog.coverage import cell_order

    return cell_order(mosaic.pixel_scale) if words.area else None


def _identity(path: Path) -> list[Any]:
    """Name, size and time of a file, by which a run knows that it is the same."""
    stat = path.stat()
    return [str(path.absolute()), stat.st_size, stat.st_mtime_ns]


def _mask_bits(text: str) -> tuple[str, ...] | int:
    """Names of mask planes, or their bits as one integer."""
    if not text[:1].isdigit():
        return tuple(text.split(","))
    try:
        return int(text, 0)
    except ValueError:
        raise ConfigError(f"--bad-bits {text} is neither an integer, as 5 or 0x5, nor names, as NO_DATA,SAT") from None
