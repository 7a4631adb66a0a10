"""Redshifts of given objects, row for row in the order of their list: of all of them, or of those that a search did not find.

Each is looked at in the window whose core holds its centre, or, where that window or a member's tile cuts its box, in one centred
on it, as objects that are found. Glossary: N given objects, M objects that are found.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.inference.journal import Found, Journal, no_room, read_found, write_found
from deepdisc_ops.inference.mosaic import Examiner, Notes, Progress, ReadAhead, Search, Survey, answered
from deepdisc_ops.inference.window import touches
from deepdisc_ops.sky.detections import Array, Detections, Flag
from deepdisc_ops.sky.dust import EbvPlane, EbvSource, plane_over
from deepdisc_ops.sky.given import Given
from deepdisc_ops.sky.images import Mosaic, SkyImage
from deepdisc_ops.sky.matching import match_in_plane
from deepdisc_ops.sky.seams import at_border, truncated
from deepdisc_ops.sky.tiling import Window

Redshifter = Callable[[SkyImage, Array, EbvPlane], Detections]
"""The mixtures of boxes (N, 4) in pixels of one window, in their order."""
PART_ROWS = 2**15


@dataclass(frozen=True)
class ForcedLooker:
    """How given boxes are looked at in this process; the options are those of `LocalLooker`."""

    mosaic: Mosaic
    redshift: Redshifter
    ebv: EbvSource
    workers: int = 1
    examiners: Sequence[Examiner] = ()

    def at(self, boxes: Array, asked: Mapping[Window, Array]) -> _Task:
        """A `Looker` at the ``boxes`` (N, 4) in mosaic pixels that are ``asked`` of each window; the others are neighbours."""
        return _Task(self, boxes, asked)


@dataclass(frozen=True)
class _Task:
    """See `ForcedLooker.at`."""

    how: ForcedLooker
    boxes: Array
    asked: Mapping[Window, Array]

    def look(self, windows: Iterable[Window]) -> Generator[Found]:
        """The objects asked of each window, in their order."""
        return ReadAhead(self.how.mosaic, self._answer, self.how.workers).look(windows)

    def _answer(self, window: Window, image: SkyImage) -> Found:
        how, asked = self.how, self.asked[window]
        local = self.boxes - np.tile(np.array([window.x0, window.y0], np.float32), 2)
        usable = touches(~image.mask, local[asked])
        near = np.setdiff1d(_overlapping(window, self.boxes), asked)  # they own pixels too
        rows = np.concatenate([asked[usable], asked[~usable], near]).astype(np.int64)
        seen = how.redshift(image, local[asked[usable]], plane_over(window, how.mosaic.wcs, how.ebv))
        objects = Detections.concatenate([seen, blank(seen, local[rows[len(seen) :]])])
        told: list[str] = []
        for examine in how.examiners:
            objects, warnings = examine(image, objects)
            told += warnings
        back = np.empty(len(asked), np.int64)
        back[np.concatenate([np.flatnonzero(usable), np.flatnonzero(~usable)])] = np.arange(len(asked))
        own = replace(objects.select(back), boxes=self.boxes[asked])
        own = replace(own, flags=own.flags & ~np.int32(Flag.EDGE))
        width, height = how.mosaic.width, how.mosaic.height
        own = own.flagged(at_border(own.boxes, width, height), Flag.EDGE)
        own = own.flagged(truncated(window, own.boxes, width, height), Flag.TRUNCATED)
        return Found(own, int(np.count_nonzero(~image.mask)), tuple(told))


class ForcedSearch(Notes):
    """Given boxes (N, 4) in mosaic pixels looked at, once: iterate over it for all of them, in parts, in their order.

    Boxes with NaN, beyond the mosaic, or without a valid pixel have no mixture (all weights 0) and the flag `NO_DATA`.
    ``neighbours`` (M, 4) own pixels in the photometry. ``journal`` and ``progress`` are as in `Search`. What does not fit in
    memory is kept on disk, in ``scratch``.
    """

    def __init__(
        self,
        survey: Survey,
        looker: ForcedLooker,
        boxes: Array,
        *,
        neighbours: Array | None = None,
        journal: Journal | None = None,
        progress: Progress | None = None,
        scratch: Path | None = None,
    ) -> None:
        super().__init__()
        self.survey, self.boxes = survey, np.asarray(boxes, np.float32).reshape(-1, 4)
        self._every = self.boxes if neighbours is None else np.concatenate([self.boxes, neighbours.astype(np.float32)])
        self._looker, self._journal, self._progress, self._scratch = looker, journal, progress, scratch

    def __iter__(self) -> Iterator[Detections]:
        with TemporaryDirectory(dir=self._scratch, prefix="rows-") as folder:
            rows = _Rows(Path(folder), len(self.boxes))
            asked, nowhere = self._windows()
            cut = self._look(asked, "forced", rows, replacing=False)
            again: dict[Window, list[int]] = {}
            for row in cut:
                window = self.survey.centred(self.boxes[row])
                if not truncated(window, self.boxes[[row]], self.survey.width, self.survey.height)[0]:
                    again.setdefault(window, []).append(int(row))
            self._look({window: np.array(here) for window, here in again.items()}, "forced again", rows, replacing=True)
            rows.put(nowhere, blank(rows.like, self.boxes[nowhere]))
            yield from rows.parts()

    def _windows(self) -> tuple[dict[Window, Array], Array]:
        """The rows that each window is asked for, those of the first at least, and the rows that lie in none."""
        tiles, survey = self.survey.tiles(), self.survey
        x, y = ((self.boxes[:, :2] + self.boxes[:, 2:]) / 2).T
        inside = (x >= 0) & (x < survey.width) & (y >= 0) & (y < survey.height)  # False for NaN
        columns, lines = (np.unique([start[axis] for start in (tile.core for tile in tiles)]) for axis in (0, 1))
        here = np.flatnonzero(inside)
        place = [np.searchsorted(cuts, axis[here], "right") - 1 for cuts, axis in ((lines, y), (columns, x))]
        owner = place[0] * len(columns) + place[1]
        order = np.argsort(owner, kind="stable")
        numbers, starts = np.unique(owner[order], return_index=True)
        parts = np.split(here[order], starts[1:]) if len(numbers) else []
        asked = {tiles[number].window: part for number, part in zip(numbers.tolist(), parts, strict=True)}
        return asked or {tiles[0].window: np.zeros(0, np.int64)}, np.flatnonzero(~inside)

    def _look(self, asked: Mapping[Window, Array], pass_: str, rows: _Rows, *, replacing: bool) -> Array:
        """Put what windows say of the rows they are asked for into ``rows``; the rows whose boxes are cut.

        ``replacing``: those that are cut stay as they were.
        """
        looker, cut, objects = self._looker.at(self._every, asked), [np.zeros(0, np.int64)], 0
        with closing(answered(looker, self._journal, list(asked), pass_)) as answers:
            for done, (here, found) in enumerate(zip(asked.values(), answers, strict=True), start=1):
                self.note(found)
                if found.objects is None or len(found.objects) != len(here):
                    raise CatalogError(f"the journal's answer for {len(here)} given boxes is of another list; remove its folder")
                whole = (found.objects.flags & Flag.TRUNCATED) == 0
                chosen = np.flatnonzero(whole) if replacing else np.arange(len(here))
                rows.put(here[chosen], found.objects.select(chosen))
                cut.append(here[~whole])
                objects += len(here)
                if self._progress:
                    self._progress(done, len(asked), objects)
        return np.concatenate(cut)


class GivenSearch:
    """`ForcedSearch` of all of a list, with its columns."""

    def __init__(self, search: ForcedSearch, given: Given) -> None:
        self._search, self._given = search, given
        self.take_cells = search.take_cells

    @property
    def warnings(self) -> list[str]:
        """As `Notes` says."""
        return self._search.warnings

    def __iter__(self) -> Iterator[Detections]:
        return _carrying(self._search, self._given, np.arange(len(self._given)))


class CompletedSearch:
    """What a search finds, and after it those of a given list that it did not find, with the list's columns for both.

    Found and given objects are matched one-to-one by their centres, within ``radius`` pixels. ``forced`` makes the search for
    the given boxes (N, 4) that are missing, told of the boxes (M, 4) that were found; what is found waits in ``scratch``.
    """

    def __init__(
        self,
        search: Search,
        given: Given,
        radius: float,
        forced: Callable[[Array, Array], ForcedSearch],
        scratch: Path | None = None,
    ) -> None:
        self._search, self._given, self._radius, self._forced, self._scratch = search, given, radius, forced, scratch
        self.take_cells = search.take_cells
        self._told: list[str] = []

    @property
    def warnings(self) -> list[str]:
        """As `Notes` says, first of the search."""
        return [*self._search.warnings, *self._told]

    def __iter__(self) -> Iterator[Detections]:
        with TemporaryDirectory(dir=self._scratch, prefix="found-") as folder:
            boxes, pages = [np.zeros((0, 4), np.float32)], list[Path]()
            for part in self._search:
                pages.append(Path(folder) / f"{len(pages)}.npz")
                try:
                    write_found(pages[-1], Found(part, 0))
                except OSError as error:
                    raise no_room(Path(folder), error) from None
                boxes.append(part.boxes)
            found, given = np.concatenate(boxes), self._given.boxes
            placed = np.flatnonzero(np.isfinite(given).all(axis=1))
            i, j = match_in_plane(_centres(found), _centres(given[placed]), self._radius)
            row_of = np.full(len(found), -1, np.int64)
            row_of[i] = placed[j]
            stored = (read_found(path).objects for path in pages)
            yield from _carrying((part for part in stored if part is not None), self._given, row_of)
        missing = np.setdiff1d(np.arange(len(given)), row_of)
        forced = self._forced(given[missing], found)
        yield from _carrying(forced, self._given, missing)
        self._told = forced.warnings


def blank(like: Detections, boxes: Array) -> Detections:
    """Given ``boxes`` (N, 4) of which nothing is known, with the columns that ``like`` has."""
    n = len(boxes)

    def full(column: Array, value: float) -> Array:
        return np.full((n, *column.shape[1:]), value, column.dtype)

    return Detections(
        boxes=np.asarray(boxes, np.float32),
        scores=full(like.scores, np.nan),
        classes=full(like.classes, -1),
        weights=full(like.weights, 0),
        means=full(like.means, 0),
        sigmas=full(like.sigmas, 1),
        ebv=full(like.ebv, np.nan),
        n_members=full(like.n_members, 0),
        flags=full(like.flags, Flag.FORCED | Flag.NO_DATA),
        extra={name: full(column, np.nan if column.dtype.kind == "f" else 0) for name, column in like.extra.items()},
    )


class _Rows:
    """N objects that are put in in any order, on disk, and taken out in theirs."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._count = folder, count
        self._columns: dict[str, Array] = {}
        self.like = Detections.empty(1)
        """No objects, with the columns of those put in."""

    def put(self, rows: Array, objects: Detections) -> None:
        """Make ``objects`` those of ``rows``."""
        arrays = {field.name: getattr(objects, field.name) for field in fields(objects) if field.name not in ("masks", "extra")}
        arrays |= {f"extra.{name}": column for name, column in objects.extra.items()}
        if not self._columns:
            self._columns = {name: self._column(i, array) for i, (name, array) in enumerate(arrays.items())}
            self.like = objects.select(np.zeros(0, np.int64))
        for name, array in arrays.items():
            self._columns[name][rows] = array

    def parts(self) -> Iterator[Detections]:
        """All of them, `PART_ROWS` at a time, one part of none where there are none."""
        for start in range(0, max(self._count, 1), PART_ROWS):
            part = {name: np.array(column[start : start + PART_ROWS]) for name, column in self._columns.items()}
            extra = {name.removeprefix("extra."): part.pop(name) for name in list(part) if name.startswith("extra.")}
            yield Detections(**part, extra=extra)

    def _column(self, number: int, like: Array) -> Array:
        """A column in a file whose place on disk is sure: a full disk under a mapped file would end the process."""
        path, shape = self._folder / str(number), (self._count, *like.shape[1:])
        size = int(np.prod(shape)) * like.dtype.itemsize
        if not size:
            return np.zeros(shape, like.dtype)
        try:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise no_room(self._folder, error) from None
        return np.memmap(path, like.dtype, "r+", shape=shape)


def _carrying(parts: Iterable[Detections], given: Given, rows: Array) -> Iterator[Detections]:
    """``parts`` with the columns of ``given``, of whose ``rows`` they are one after the other."""
    start = 0
    for part in parts:
        yield part.with_columns(given.carried(rows[start : start + len(part)]))
        start += len(part)


def _centres(boxes: Array) -> NDArray[np.float64]:
    return np.asarray((boxes[:, :2] + boxes[:, 2:]) / 2, np.float64)


def _overlapping(window: Window, boxes: Array) -> NDArray[np.intp]:
    """Indices of the boxes that reach into ``window``."""
    x0, y0, x1, y1 = boxes.T
    return np.flatnonzero((x1 > window.x0) & (x0 < window.x1) & (y1 > window.y0) & (y0 < window.y1))
