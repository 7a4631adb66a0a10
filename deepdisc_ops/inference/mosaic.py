"""A mosaic of any size to one catalogue: windows read, predicted (here, by an endpoint, by actors), reconciled, written.

Whoever computes the windows, they and their reconciliation are the same, so every door makes the same catalogue. Nothing here
grows with the mosaic's height: objects go on as soon as no window to come can change them.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Protocol

import numpy as np
from astropy.table import Table
from astropy.wcs import WCS

from deepdisc_ops.errors import ImageError
from deepdisc_ops.inference.journal import Found, Journal
from deepdisc_ops.photoz.mixture import GaussianMixture, summarise
from deepdisc_ops.sky.catalog import Column, Coverage, build_catalog, object_ids, open_catalog
from deepdisc_ops.sky.catalog.coverage import covered_cells
from deepdisc_ops.sky.detections import Array, Detections, Flag, row_order
from deepdisc_ops.sky.dust import EbvPlane, EbvSource, plane_over
from deepdisc_ops.sky.images import Mosaic, SkyImage
from deepdisc_ops.sky.matching import pairwise_iou_candidates
from deepdisc_ops.sky.seams import SAME_IOU, Seams, reconcile
from deepdisc_ops.sky.tiling import Tile, Window, plan

log = logging.getLogger(__name__)

Predictor = Callable[[SkyImage, EbvPlane], Detections]
"""Objects of one window, in its pixels."""
Examiner = Callable[[SkyImage, Detections], tuple[Detections, Sequence[str]]]
"""What is measured on a window and its objects beyond the redshift: objects with more columns and flags, and warnings."""
Progress = Callable[[int, int, int], None]
"""Called with windows done, windows in all, objects found so far (before seams are reconciled)."""
SECOND_SIDE = 448
"""Side of the windows of the second pass, below a member's tile (512), so that nothing is cut again."""
ROWS_AT_ONCE = 4096
"""Rows of the catalogue that are made at once: a row of windows of a wide mosaic holds many more."""
PIECE_IOU = 0.15
"""Least IoU of a piece with the whole object."""


class Looker(Protocol):
    """Whoever looks at windows, in the order given, perhaps several at once."""

    def look(self, windows: Iterable[Window]) -> Generator[Found]:
        """What each window holds, in their order; closing the generator ends the work."""


@dataclass(frozen=True)
class LocalLooker:
    """Looks from this process, with ``workers`` windows predicted at once, and one read ahead of them.

    ``order`` is the order of the HEALPix cells of the area, where it is wanted.
    """

    mosaic: Mosaic
    predictor: Predictor
    ebv: EbvSource
    workers: int = 1
    examiners: Sequence[Examiner] = ()
    order: int | None = None

    def look(self, windows: Iterable[Window]) -> Generator[Found]:
        """As `Looker` says; what a predictor raises comes out here."""
        return self._threads.look(windows)

    @cached_property
    def _threads(self) -> ReadAhead:
        return ReadAhead(self.mosaic, self._predict, self.workers)

    def _predict(self, window: Window, image: SkyImage) -> Found:
        valid = int(np.count_nonzero(~image.mask))
        if not valid:
            return Found(None, 0)
        objects = self.predictor(image, plane_over(window, self.mosaic.wcs, self.ebv))
        told: list[str] = []
        for examine in self.examiners:
            objects, warnings = examine(image, objects)
            told += warnings
        cells = np.zeros(0, np.int64)
        if self.order is not None and self.mosaic.wcs is not None:
            cells = covered_cells(self.mosaic.wcs, window, ~image.mask, self.order)
        # what touched the window's border touches the mosaic's only if the seams say so
        own = replace(objects, flags=objects.flags & ~np.int32(Flag.EDGE)).shift(window.x0, window.y0)
        return Found(own, valid, tuple(told), cells)


class ReadAhead:
    """A thread that reads the windows of ``mosaic``, and ``workers`` that make of them what ``answer`` does.

    The threads are kept for all that is looked at: the allocator and the libraries of the network keep memory for each thread
    that ever computed.
    """

    def __init__(self, mosaic: Mosaic, answer: Callable[[Window, SkyImage], Found], workers: int) -> None:
        self._mosaic, self._answer, self._workers = mosaic, answer, workers
        self._reader, self._pool = ThreadPoolExecutor(1), ThreadPoolExecutor(workers)

    def look(self, windows: Iterable[Window]) -> Generator[Found]:
        """The answers in the order of the windows, one of which is read ahead; closing the generator waits for those begun."""
        pending: deque[tuple[Future[SkyImage], Future[Found]]] = deque()
        try:
            for window in windows:
                image = self._reader.submit(self._mosaic.read, window)
                pending.append((image, self._pool.submit(self._one, window, image)))
                if len(pending) > self._workers:
                    yield self._next(pending)
            while pending:
                yield self._next(pending)
        finally:
            for image, found in pending:
                image.cancel()
                found.cancel()
            wait([found for _, found in pending if not found.cancelled()])

    @staticmethod
    def _next(pending: deque[tuple[Future[SkyImage], Future[Found]]]) -> Found:
        """The first answer; it stays pending when waiting for it is interrupted."""
        found = pending[0][1].result()
        pending.popleft()
        return found

    def _one(self, window: Window, image: Future[SkyImage]) -> Found:
        return self._answer(window, image.result())


@dataclass(frozen=True)
class Survey:
    """How a mosaic is searched: its size in pixels, and windows that share ``overlap`` and start on multiples of ``stride``.

    ``stride`` should be a multiple of the network's (32 is, for every pyramid of up to four levels on a stem of 4).
    """

    width: int
    height: int
    window: int = 1024
    overlap: int = 64
    stride: int = 32

    def tiles(self) -> list[Tile]:
        """The windows with their cores, row by row."""
        return plan(self.width, self.height, self.window, self.overlap, self.stride)

    def centred(self, box: Array) -> Window:
        """A window of `SECOND_SIDE` about the box, inside the mosaic as far as that reaches, on multiples of the stride."""
        x, y = (box[:2] + box[2:]) / 2
        x0, y0 = (max(0, int(round(float(c)) - SECOND_SIDE // 2) // self.stride * self.stride) for c in (x, y))
        return Window(x0, y0, min(x0 + SECOND_SIDE, self.width), min(y0 + SECOND_SIDE, self.height))


class Notes:
    """What is told of windows beside their objects.

    valid: pixels that are (those in overlaps count each time).
    """

    def __init__(self) -> None:
        self.valid = 0
        self._cells: list[Array] = []
        self._told: dict[str, tuple[str, int]] = {}

    @property
    def warnings(self) -> list[str]:
        """Of each kind of warning, the first, and in how many windows there was one."""
        return [f"{sentence} ({count} windows)" for sentence, count in self._told.values()]

    def take_cells(self) -> list[Array]:
        """The HEALPix cells seen since this was last asked."""
        cells, self._cells = self._cells, []
        return cells

    def note(self, found: Found) -> None:
        """Take in what one window gave."""
        self.valid += found.valid
        self._cells.append(found.cells)
        for sentence in found.warnings:
            kind = sentence.split(" is ")[0]
            first, count = self._told.get(kind, (sentence, 0))
            if not count:
                log.warning("a window is unlike the training images: its %s", sentence)
            self._told[kind] = first, count + 1


class Search(Notes):
    """A mosaic looked at, once: iterate over it for its objects, in parts, by row of the mosaic over all of them.

    ``journal`` keeps what windows gave; a search with one that holds some of it goes on from there. Without ``second_pass``,
    objects that are whole in no window stay in pieces, flagged `TRUNCATED`. Raises `ImageError` where no pixel of the mosaic is
    valid.
    """

    def __init__(
        self,
        survey: Survey,
        looker: Looker,
        journal: Journal | None = None,
        progress: Progress | None = None,
        *,
        second_pass: bool = True,
    ) -> None:
        super().__init__()
        self.survey, self.second_pass = survey, second_pass
        self._looker, self._journal, self._progress = looker, journal, progress

    def __iter__(self) -> Iterator[Detections]:
        survey, tiles = self.survey, self.survey.tiles()
        seams, shelf, objects = Seams(survey.width, survey.height), _Shelf(survey, self._again if self.second_pass else None), 0
        done = 0
        with closing(answered(self._looker, self._journal, [tile.window for tile in tiles], "first")) as answers:
            for y0, row in groupby(tiles, lambda tile: tile.window.y0):
                for tile in row:
                    found = next(answers)
                    done += 1
                    if found.objects is not None:
                        seams.add(tile, found.objects)
                        objects += len(found.objects)
                    self.note(found)
                    if self._progress:
                        self._progress(done, len(tiles), objects)
                following = tiles[done].window.y0 if done < len(tiles) else np.inf
                shelf.put(seams.settled(following))
                part = shelf.take(y0 if done < len(tiles) else np.inf)
                if part is not None:
                    yield part
        if not self.valid:
            if self._journal is not None:
                self._journal.remove()
            raise ImageError(
                f"no pixel of {survey.width}x{survey.height} is valid in all bands: each is NaN in some; "
                "check that the files cover the same field"
            )

    def _again(self, window: Window) -> Detections:
        """The objects of a window of the second pass that are whole in it."""
        (found,) = answered(self._looker, self._journal, [window], "second")
        if found.objects is None:
            raise ImageError(f"no pixel of {tuple(window)} is valid, where an object was found before; did the files change?")
        seen = reconcile([Tile(window, window)], [found.objects], self.survey.width, self.survey.height)
        return seen.select(np.flatnonzero((seen.flags & Flag.TRUNCATED) == 0))


def answered(looker: Looker, journal: Journal | None, windows: Sequence[Window], pass_: str) -> Generator[Found]:
    """What windows give in the pass of that name, in their order: from the journal, or looked at now and written there."""
    if journal is None:
        with closing(looker.look(windows)) as fresh:
            yield from fresh
        return
    known = {window for window in windows if journal.has(window, pass_)}
    with closing(looker.look(window for window in windows if window not in known)) as fresh:
        for window in windows:
            found = journal.get(window, pass_) if window in known else None
            if found is None:
                (found,) = looker.look([window]) if window in known else (next(fresh),)
                journal.put(window, pass_, found)
            yield found


class _Shelf:
    """Objects that no window can change any more, until those that are cut have been looked at again.

    An object larger than the overlap is whole in no window (the JADES paper re-runs such objects on re-centred cutouts): it is
    looked at in a window centred on it, and its pieces are replaced by the whole. One that is not whole there either stays
    flagged `TRUNCATED`.
    """

    def __init__(self, survey: Survey, again: Callable[[Window], Detections] | None) -> None:
        self._survey, self._again = survey, again
        self._objects: Detections | None = None
        self._looked: set[bytes] = set()

    def put(self, objects: Detections | None) -> None:
        """Take more objects."""
        if objects is not None:
            self._objects = objects if self._objects is None else Detections.concatenate([self._objects, objects])

    def take(self, row: float) -> Detections | None:
        """Objects above all that may still change, by row of the mosaic, when all that begin above ``row`` are here."""
        if self._objects is None:
            return None
        objects, waiting = self._look_again(self._objects, row)
        y = (objects.boxes[:, 1] + objects.boxes[:, 3]) / 2
        ready = y < min(row - SECOND_SIDE, waiting)
        self._objects = objects.select(np.flatnonzero(~ready))
        out = objects.select(np.flatnonzero(ready))
        return out.select(row_order(out.boxes))

    def _look_again(self, objects: Detections, row: float) -> tuple[Detections, float]:
        """Objects after a second look at those cut whose surroundings are complete, and the first row of those that wait."""
        if self._again is None:
            return objects, np.inf
        while True:
            cut = np.flatnonzero((objects.flags & Flag.TRUNCATED) > 0)
            cut = cut[row_order(objects.boxes[cut])]
            windows = [self._survey.centred(objects.boxes[i]) for i in cut]
            waiting = [window.y0 for window in windows if window.y1 > row]
            ready = [
                (i, window)
                for i, window in zip(cut, windows, strict=True)
                if window.y1 <= row and objects.boxes[i].tobytes() not in self._looked
            ]
            if not ready:
                return objects, min(waiting, default=np.inf)
            i, window = ready[0]
            box = objects.boxes[i]
            self._looked.add(box.tobytes())
            objects = _with_whole(objects, box, self._again(window))


def _with_whole(objects: Detections, box: Array, seen: Detections) -> Detections:
    """``objects`` with the pieces of the object at ``box`` replaced by it, where it is among the ``seen``.

    What overlaps it and another of the ``seen`` more is not a piece of it: a neighbour, cut or not, stays.
    """
    _, candidates, iou = pairwise_iou_candidates(box[None], seen.boxes, PIECE_IOU)
    if not len(candidates):
        return objects
    which = int(candidates[np.argmax(iou)])
    piece, whole, overlap = pairwise_iou_candidates(objects.boxes, seen.boxes, PIECE_IOU)
    best_first = np.lexsort((-overlap, piece))
    piece, first = np.unique(piece[best_first], return_index=True)
    whole, overlap = whole[best_first][first], overlap[best_first][first]
    cut = (objects.flags[piece] & Flag.TRUNCATED) > 0
    rest = np.setdiff1d(np.arange(len(objects)), piece[(whole == which) & (cut | (overlap >= SAME_IOU))])
    return Detections.concatenate([objects.select(rest), seen.select(np.array([which]))])


def predict_mosaic(
    mosaic: Mosaic,
    predictor: Predictor,
    ebv: EbvSource,
    *,
    window: int = 1024,
    overlap: int = 64,
    stride: int = 32,
    workers: int = 1,
    examiners: Sequence[Examiner] = (),
    provenance: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Table:
    """Catalogue of the whole mosaic as a table (columns: `sky.catalog.COLUMNS`); see `write_mosaic` for large ones.

    ``workers`` windows are in flight at once; the order in which they end does not matter. Raises `ImageError` where no pixel
    of the mosaic is valid.
    """
    survey = Survey(mosaic.width, mosaic.height, window, overlap, stride)
    search = Search(survey, LocalLooker(mosaic, predictor, ebv, workers, examiners), progress=progress)
    return catalogue_rows(Detections.concatenate(list(search)), mosaic.wcs, mosaic.bands, provenance or {}, {})


class Objects(Protocol):
    """Objects in parts, in the order of the catalogue's rows, and what was told of windows meanwhile, as a `Search` has them."""

    @property
    def warnings(self) -> Sequence[str]:
        """Complete when all parts were given."""

    def take_cells(self) -> Sequence[Array]:
        """The HEALPix cells seen since this was last asked."""

    def __iter__(self) -> Iterator[Detections]:
        """The parts."""


def write_mosaic(
    search: Objects,
    paths: Sequence[Path],
    *,
    bands: Sequence[str],
    classes: Sequence[str] = (),
    wcs: WCS | None = None,
    order: int | None = None,
    provenance: Mapping[str, str] | None = None,
    described: Mapping[str, Column] | None = None,
    at_end: Callable[[], Mapping[str, str]] = dict,
) -> int:
    """Write what a search finds to ``paths`` (formats by their endings), a part at a time; gives the number of objects.

    ``order`` is that of the search's HEALPix cells, needed for a map of the area; ``described`` tells what extra columns are,
    ``at_end`` what is known of the provenance only when all windows have been seen.
    """
    coverage = Coverage(order) if order is not None else None
    with open_catalog(paths, bands, classes, provenance or {}, wcs) as catalog:
        for objects in search:
            ids = object_ids(objects, wcs)
            for first in range(0, max(len(objects), 1), ROWS_AT_ONCE):
                part = np.arange(first, min(first + ROWS_AT_ONCE, len(objects)))
                catalog.write(catalogue_rows(objects.select(part), wcs, bands, {}, described or {}, ids[part]))
            for cells in search.take_cells():
                if coverage is not None:
                    coverage.add(cells)
        if coverage is not None:
            catalog.cover(coverage)
        if search.warnings:
            catalog.annotate({"warnings": "; ".join(search.warnings)})
        catalog.annotate(at_end())
        return catalog.rows


def catalogue_rows(
    objects: Detections,
    wcs: WCS | None,
    bands: Sequence[str],
    provenance: Mapping[str, str],
    described: Mapping[str, Column],
    ids: Array | None = None,
) -> Table:
    """The rows of ``objects`` in their order; NaN redshifts for those whose mixture is nothing.

    ``ids``: where the objects are a part of a list, theirs in it.
    """
    known = np.flatnonzero((objects.weights > 0).any(axis=1))
    mixtures = [column[known] for column in (objects.weights, objects.means, objects.sigmas)]
    summary = {}
    for name, values in summarise(GaussianMixture.from_arrays(*mixtures)).items():
        summary[name] = np.full(len(objects), np.nan, values.dtype)
        summary[name][known] = values
    return build_catalog(objects, summary, wcs, provenance, bands, described, as_given=True, ids=ids)
