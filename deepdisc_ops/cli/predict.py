"""``deepdisc-ops predict``: from mosaic to catalogue, here, through endpoints or on Ray's actors, continued where it stopped."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import deepdisc_ops
from deepdisc_ops.cli.console import console, progress_bar
from deepdisc_ops.cli.eyes import (
    STRIDE,
    Eyes,
    Servers,
    at_endpoints,
    combination,
    ensemble_folder,
    in_process,
    on_actors,
    server_list,
)
from deepdisc_ops.cli.words import ForcedFor, Memory, Words
from deepdisc_ops.errors import ConfigError

if TYPE_CHECKING:
    from deepdisc_ops.inference.forced import ForcedSearch
    from deepdisc_ops.inference.journal import Journal
    from deepdisc_ops.inference.mosaic import Objects, Progress, Survey
    from deepdisc_ops.sky.given import Given
    from deepdisc_ops.sky.images import Mosaic

RECENT = 20
"""The rate is that of so many windows."""


def predict(
    images: Annotated[list[Path], typer.Argument(help="One multi-extension FITS, a cube, a file per band, or .npz.")],
    out: Annotated[
        list[Path], typer.Option(help="Catalogue to write: .parquet, .fits, .hdf5 (qp), .ecsv, .reg, area .moc.fits; repeatable.")
    ],
    model: Annotated[
        Path | None, typer.Option(help="A .mar archive, an ensemble folder or a checkpoint folder (RUN/best).")
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(help="Use endpoints instead: run directories, server.json files or URLs, between commas; repeatable."),
    ] = None,
    token: Annotated[
        str | None, typer.Option(envvar="DEEPDISC_OPS_TOKEN", help="Token of endpoints that are given by URL.")
    ] = None,
    certificate: Annotated[Path | None, typer.Option(help="PEM that https URLs are verified with.")] = None,
    patience: Annotated[float, typer.Option(min=0, help="Seconds to wait for endpoints of which none answers.")] = 300,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Go on when an endpoint is upgraded; windows may then be of different models.")
    ] = False,
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
    workers: Annotated[
        int | None, typer.Option(min=1, help="Windows in flight at once; default 1, at endpoints two for each of their workers.")
    ] = None,
    actors: Annotated[int, typer.Option(min=0, help="Predict in so many Ray actors, a GPU each with --device cuda.")] = 0,
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster to join with --actors; it must see the same paths.")] = None,
    device: Annotated[str, typer.Option(help="torch device of the model, such as cpu or cuda:0.")] = "cpu",
    memory: Annotated[Memory, typer.Option(help="keep all members in memory, or swap: read each when it is used.")] = Memory.KEEP,
    skip_failing: Annotated[bool, typer.Option("--skip-failing", help="Go on without members that fail.")] = False,
    picture: Annotated[Path | None, typer.Option(help="PNG of the middle in colour, with boxes; redshifts where few.")] = None,
) -> None:
    """Make the catalogue of a mosaic, in process (--model) or through the endpoint (--server).

    What is found is kept in the folder OUT.unfinished until the catalogue is complete: start the same command again to go on
    after an interruption.

    Example: `deepdisc-ops predict mosaic.fits --model ensemble.mar --out catalog.parquet`
    """
    servers = server_list(server or ())
    words = Words(out, forced, forced_for, bool(servers), picture)
    if (model is None) == (not servers):
        raise ConfigError("give either --model or --server, one of the two")
    words.refuse({"--set": overrides, "--memory swap": memory == Memory.SWAP, "--skip-failing": skip_failing})
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
        if servers:
            asked = Servers(servers, token, certificate, patience, mixed)
            eyes = at_endpoints(
                stack, asked, pictures, where, words, photometry=photometry, diameter=diameter, workers=workers, masks=masks
            )
        else:
            folder = ensemble_folder(model or Path(), stack, shared=ray_address is not None)
            settings = combination(folder, overrides or ())
            failing: Literal["skip", "raise"] = "skip" if skip_failing else "raise"
            kept: Literal["swap", "keep"] = "swap" if memory == Memory.SWAP else "keep"
            ensemble = ModelRecipe(folder, device, settings, kept, failing, masks)
            recipe = Recipe(pictures, ensemble, where, photometry, diameter, workers=workers or 1)
            eyes = in_process(stack, recipe, words, actors=actors)
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
            eyes = on_actors(stack, eyes, actors, ray_address, device)
        provenance = {
            "package": f"deepdisc_ops {deepdisc_ops.__version__}",
            "command": shlex.join(["deepdisc-ops", *sys.argv[1:]]),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "E(B-V)": str(source),
            **eyes.provenance,
        }
        started = time.monotonic()

        def at_end() -> dict[str, str]:
            return {"seconds": f"{time.monotonic() - started:.2f}"} | eyes.told()

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
    made = ", ".join(map(str, [*out, *([picture] if picture else [])]))
    console.print(f"{rows} objects in {seconds:.1f} s ({rows / max(seconds, 1e-9):.0f} a second), E(B-V) {ebv}: {made}")
    for failure, times in eyes.trouble.most_common():
        console.print(f"waited out {times} times: {failure}", soft_wrap=True)


def _search(
    eyes: Eyes, survey: Survey, journal: Journal, progress: Progress, given: Given | None, words: Words, radius: float
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


def _given(words: Words, mosaic: Mosaic, size: str | None, columns: str | None) -> Given | None:
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
