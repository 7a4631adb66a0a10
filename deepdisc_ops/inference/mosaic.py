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
from deepdisc_ops.sky.detections import Detections, Flag
from deepdisc_ops.sky.dust import EbvPlane, EbvSource, plane_over
from deepdisc_ops.sky.images import Mosaic, SkyImage
from deepdisc_ops.sky.tiling import Tile, plan, reconcile

Predictor = Callable[[SkyImage, EbvPlane], Detections]
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
    mixture = GaussianMixture.from_arrays(detections.weights, detections.means, detections.sigmas)
    return build_catalog(detections, summarise(mixture), mosaic.wcs, provenance or {})


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
