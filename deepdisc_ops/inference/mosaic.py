"""A mosaic of any size to one catalogue: windows read, predicted (here or by an endpoint), reconciled, written.

The predictor is the seam between the doors: in process it is an ensemble, remote it is a client of the endpoint.
Both get the same windows, so both make the same catalogue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from astropy.table import Table

from deepdisc_ops.errors import ImageError
from deepdisc_ops.photoz.mixture import GaussianMixture, summarise
from deepdisc_ops.sky.catalog import build_catalog
from deepdisc_ops.sky.detections import Array, Detections, Flag
from deepdisc_ops.sky.dust import EbvPlane, EbvSource, plane_over
from deepdisc_ops.sky.images import Mosaic, SkyImage
from deepdisc_ops.sky.matching import pairwise_iou_candidates
from deepdisc_ops.sky.tiling import Tile, Window, plan, reconcile

Predictor = Callable[[SkyImage, EbvPlane], Detections]
SECOND_SIDE = 448
"""Side of the windows of the second pass, below a member's tile (512), so that nothing is cut again."""
SAME_IOU = 0.3
PIECE_IOU = 0.15
"""Least IoU of a piece with the whole object."""
Progress = Callable[[int, int, int], None]
"""Called with windows done, windows in all, objects found so far (before seams are reconciled)."""


def predict_mosaic(
    mosaic: Mosaic,
    predictor: Predictor,
    ebv: EbvSource,
    *,
    window: int = 1024,
    overlap: int = 64,
    stride: int = 32,
    workers: int = 1,
    provenance: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Table:
    """Catalogue of the whole mosaic (columns: `sky.catalog.COLUMNS`).

    ``workers`` windows are in flight at once; the order in which they end does not matter. Windows start on multiples of
    ``stride``, which should be one of the network's stride (32 is, for every pyramid of up to four levels on a stem of 4).
    Raises `ImageError` where no pixel of the mosaic is valid.
    """
    tiles = plan(mosaic.width, mosaic.height, window, overlap, stride)
    found: list[Detections] = []
    valid = 0
    for tile, (detections, pixels) in zip(tiles, _in_flight(mosaic, tiles, predictor, ebv, workers), strict=True):
        # what touched the window's border touches the mosaic's only if reconcile says so
        own = replace(detections, flags=detections.flags & ~np.int32(Flag.EDGE))
        found.append(own.shift(tile.window.x0, tile.window.y0))
        valid += pixels
        if progress:
            progress(len(found), len(tiles), sum(len(part) for part in found))
    if not valid:
        raise ImageError(
            f"no pixel of {mosaic.width}x{mosaic.height} is valid in all of {', '.join(mosaic.bands)}: each is NaN in some band; "
            "check that the files cover the same field"
        )
    detections = reconcile(tiles, found, mosaic.width, mosaic.height)
    detections = _second_pass(mosaic, predictor, ebv, detections, stride)
    mixture = GaussianMixture.from_arrays(detections.weights, detections.means, detections.sigmas)
    return build_catalog(detections, summarise(mixture), mosaic.wcs, provenance or {})


def _second_pass(mosaic: Mosaic, predictor: Predictor, ebv: EbvSource, detections: Detections, stride: int) -> Detections:
    """Look again at objects that a window's edge cut, in a window centred on each, and replace the pieces by the whole.

    An object larger than the overlap is whole in no window of the first pass (the JADES paper re-runs such
    objects on re-centred cutouts). One that is not whole here either stays flagged `TRUNCATED`.
    """
    for box in detections.boxes[(detections.flags & Flag.TRUNCATED) > 0]:
        window = _centred(box, mosaic.width, mosaic.height, stride)
        seen = predictor(mosaic.read(window), plane_over(window, mosaic.wcs, ebv)).shift(window.x0, window.y0)
        seen = replace(seen, flags=seen.flags & ~np.int32(Flag.EDGE))
        seen = reconcile([Tile(window, window)], [seen], mosaic.width, mosaic.height)
        whole = seen.select(np.flatnonzero((seen.flags & Flag.TRUNCATED) == 0))
        _, candidates, iou = pairwise_iou_candidates(box[None], whole.boxes, PIECE_IOU)
        if not len(candidates):
            continue
        best = whole.select(candidates[[int(np.argmax(iou))]])
        _, same, overlap = pairwise_iou_candidates(best.boxes, detections.boxes, PIECE_IOU)
        cut = (detections.flags[same] & Flag.TRUNCATED) > 0
        rest = np.setdiff1d(np.arange(len(detections)), same[cut | (overlap >= SAME_IOU)])
        detections = Detections.concatenate([detections.select(rest), best])
    return detections


def _centred(box: Array, width: int, height: int, stride: int) -> Window:
    """A window of `SECOND_SIDE` about the box, inside the mosaic as far as that reaches, on multiples of ``stride``."""
    x, y = (box[:2] + box[2:]) / 2
    x0, y0 = (max(0, int(round(float(c)) - SECOND_SIDE // 2) // stride * stride) for c in (x, y))
    return Window(x0, y0, min(x0 + SECOND_SIDE, width), min(y0 + SECOND_SIDE, height))


def _in_flight(
    mosaic: Mosaic, tiles: list[Tile], predictor: Predictor, ebv: EbvSource, workers: int
) -> Iterator[tuple[Detections, int]]:
    """Results in the order of ``tiles``, at most ``workers`` windows ahead of the one being handed out."""

    def one(tile: Tile) -> tuple[Detections, int]:
        image = mosaic.read(tile.window)
        return predictor(image, plane_over(tile.window, mosaic.wcs, ebv)), int(np.count_nonzero(~image.mask))

    if workers == 1:
        yield from map(one, tiles)
        return
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[tuple[Detections, int]]] = deque()
        for tile in tiles:
            pending.append(pool.submit(one, tile))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
