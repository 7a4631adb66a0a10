"""What an estimator looks at, in pieces that any process can look at in any order: records of a data set, windows of a mosaic.

What the pieces gave becomes objects in one place afterwards, so that it does not matter who looked at which.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from astropy.wcs import WCS

from deepdisc_ops.data.pixels import read_pixels
from deepdisc_ops.data.records import Record
from deepdisc_ops.data.store import Records
from deepdisc_ops.errors import ImageError
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.inference.examine import DomainCheck, Photometer
from deepdisc_ops.inference.journal import Found
from deepdisc_ops.inference.mosaic import Examiner, LocalLooker, Search, Survey
from deepdisc_ops.inference.recipe import examiners
from deepdisc_ops.sky.detections import Detections, row_order
from deepdisc_ops.sky.dust import EbvPlane, Reddening, plane_over
from deepdisc_ops.sky.images import Mosaic, SkyImage
from deepdisc_ops.sky.tiling import Window

Answers = Callable[[int], Found]
"""What a piece gave, by its number."""


class Part(NamedTuple):
    """Objects in the order of the catalogue's rows, the WCS of their pixels, and the number of their image."""

    objects: Detections
    wcs: WCS | None
    image: int


class Sight(Protocol):
    """Something to look at in ``len`` pieces."""

    def __len__(self) -> int: ...

    def look(self, number: int) -> Found:
        """What one piece holds."""

    def parts(self, answers: Answers) -> Iterator[Part]:
        """The objects of all pieces, given what each gave."""


@dataclass(frozen=True)
class Look:
    """How to look: with which ensemble, E(B-V) (None: what records tell), with masks and photometry or without."""

    ensemble: Ensemble
    ebv: Reddening | None
    masks: bool
    photometry: bool

    def __call__(self, image: SkyImage, ebv: EbvPlane) -> Detections:
        """The objects of one window."""
        return self.ensemble.predict(image.data, ebv, image.mask, masks=self.masks)


class RecordSight:
    """The images of ``records``, a piece each."""

    def __init__(self, records: Records, look: Look) -> None:
        self._records, self._look = records, look
        domains = {str(seat.info.domain.as_dict()): seat.info.domain for seat in look.ensemble.seats if seat.info.domain}
        self._examiners: list[Examiner] = [DomainCheck(domain) for domain in domains.values()]
        if look.photometry:
            self._examiners.insert(0, Photometer())

    def __len__(self) -> int:
        return len(self._records)

    def look(self, number: int) -> Found:
        """The objects of an image."""
        record = self._records[number]
        image = read_pixels(record, self._look.ensemble.bands, with_variance=True)
        valid = int(np.count_nonzero(~image.mask))
        if not valid:
            return Found(None, 0)
        objects = self._look(image, self._ebv(record, image))
        for examine in self._examiners:
            objects, _ = examine(image, objects)
        return Found(objects.select(row_order(objects.boxes)), valid)

    def parts(self, answers: Answers) -> Iterator[Part]:
        """Image by image; raises `ImageError` where no pixel of any is valid."""
        seen = False
        for number, record in enumerate(self._records):
            objects = answers(number).objects
            if objects is None:
                continue
            seen = True
            wcs = read_pixels(record, self._look.ensemble.bands, Window(0, 0, 1, 1)).wcs if record.wcs else None
            yield Part(objects, wcs, number)
        if not seen:
            raise ImageError(f"no pixel of {len(self)} images is valid in all bands; check the files of the data set")

    def _ebv(self, record: Record, image: SkyImage) -> EbvPlane:
        if self._look.ebv is not None:
            return plane_over(Window(0, 0, record.width, record.height), image.wcs, self._look.ebv)
        known = record.objects.ebv[np.isfinite(record.objects.ebv)]
        default = self._look.ensemble.seats[0].info.config.data.default_ebv
        return EbvPlane.constant(float(np.median(known)) if len(known) else default)


class MosaicSight:
    """A mosaic, its windows a piece each; what their edges cut is looked at again by who puts the pieces together."""

    def __init__(self, mosaic: Mosaic, look: Look, ebv: Reddening, window: int, overlap: int) -> None:
        ensemble = look.ensemble
        self._mosaic = mosaic.select(ensemble.bands)
        self._survey = Survey(mosaic.width, mosaic.height, window, overlap, int(np.lcm(32, ensemble.stride)))
        domains = [seat.info.domain for seat in ensemble.seats]
        measured = examiners(self._mosaic, domains, ensemble.pixel_scale, photometry=look.photometry)
        self._looker = LocalLooker(self._mosaic, look, ebv, examiners=measured)
        self._windows = [tile.window for tile in self._survey.tiles()]

    def __len__(self) -> int:
        return len(self._windows)

    def look(self, number: int) -> Found:
        """The objects of a window."""
        (found,) = self._looker.look([self._windows[number]])
        return found

    def parts(self, answers: Answers) -> Iterator[Part]:
        """The objects of the mosaic, seams reconciled."""
        for objects in Search(self._survey, _Remembered(self._windows, answers, self._looker)):
            yield Part(objects, self._mosaic.wcs, 0)


@dataclass(frozen=True)
class _Remembered:
    """A `Looker` that remembers what ``windows`` gave, and looks at others."""

    windows: Sequence[Window]
    answers: Answers
    looker: LocalLooker

    def look(self, windows: Iterable[Window]) -> Generator[Found]:
        """As `Looker` says."""
        known = {window: number for number, window in enumerate(self.windows)}
        for window in windows:
            if window in known:
                yield self.answers(known[window])
            else:
                yield from self.looker.look([window])
