"""What the benchmarks of the endpoint share: a sky, an archive, servers, catalogues through them, and how these differ."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from astropy.table import Table

from benchmarks.mosaic import MODEL, SCENE, write_mosaic
from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.scenes import simulate_scene
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.inference.mosaic import Predictor, predict_mosaic
from deepdisc_ops.serving import archive, server
from deepdisc_ops.serving.fleet import Fleet
from deepdisc_ops.sky.dust import EbvPlane, ebv_source
from deepdisc_ops.sky.images import Mosaic, SkyImage, open_mosaic
from deepdisc_ops.sky.matching import match_boxes, pairwise_iou_candidates

POSITION_DEG, MIXTURE = 1e-6, 1e-4
"""Within which served and in-process rows agree."""
SAME_IOU = 0.5
EBV = EbvPlane.constant(0.03)


@dataclass(frozen=True)
class Work:
    """An archive, the ensemble in it, and a mosaic, in a folder of their own."""

    folder: Path
    mar: Path
    ensemble: Ensemble
    mosaic: Mosaic
    path: Path


@contextmanager
def prepared(folder: Path, side: int, model: Path = MODEL) -> Iterator[Work]:
    """The committed ensemble as an archive, and ``side`` x ``side`` pixels of simulated sky."""
    size = min(side, SCENE)
    scene = simulate_scene(SkySettings(), size=size, seed=7)
    path = folder / "sky.fits"
    if side % SCENE:
        from deepdisc_ops.data.simulate import write_scene

        write_scene(scene, path)
    else:
        write_mosaic(scene, side, path)
    ensemble = Ensemble.load(model)
    mar = archive.build_archive([model], folder / "ensemble.mar")
    with open_mosaic(path, ensemble.bands) as mosaic:
        yield Work(folder, mar, ensemble, mosaic, path)


@contextmanager
def serving(work: Work, name: str, count: int = 1, **settings: Any) -> Iterator[list[Path]]:
    """The run directories of so many servers of one thread a worker; they are stopped at the end."""
    runs = [work.folder / f"{name}-{number}" for number in range(count)]
    with ExitStack() as stack:
        for run in runs:
            stack.callback(server.stop, run)
            server.start(work.mar, run, threads=1, **settings)
        yield runs


def local(work: Work) -> Predictor:
    """The ensemble in this process as a predictor."""
    return lambda image, ebv: work.ensemble.predict(image.data, ebv, image.mask)


def catalogue(work: Work, predictor: Predictor, window: int, workers: int = 1) -> Table:
    """The catalogue of the mosaic."""
    return predict_mosaic(work.mosaic, predictor, ebv_source("0.03"), window=window, workers=workers)


def differences(found: Table, expected: Table) -> dict[str, Any]:
    """How a catalogue differs from the expected one.

    lost, added: rows without a counterpart; doubled: pairs of rows that are one object, beyond those of the expected catalogue;
    position_deg, mixture: the largest difference of counterparts; in_order: whether rows are where they were.
    """
    one, other = _boxes(found), _boxes(expected)
    pairs = match_boxes(one, other, SAME_IOU)
    i, j = pairs.index1, pairs.index2
    away = np.hypot(
        (found["ra"][i] - expected["ra"][j]) * np.cos(np.radians(expected["dec"][j])), found["dec"][i] - expected["dec"][j]
    )
    mixture = [
        np.abs(np.asarray(found[name])[i] - np.asarray(expected[name])[j]) for name in ("mix_weights", "mix_means", "mix_sigmas")
    ]
    return {
        "rows": len(found),
        "lost": len(expected) - len(j),
        "added": len(found) - len(i),
        "doubled": max(0, _doubled(one) - _doubled(other)),
        "position_deg": float(np.max(away, initial=0.0)),
        "mixture": max(float(np.max(column, initial=0.0)) for column in mixture),
        "in_order": bool(np.array_equal(i[np.argsort(i)], j[np.argsort(i)])),
    }


def equal(difference: dict[str, Any]) -> bool:
    """Whether catalogues are the same row for row, to the accuracy that is promised."""
    sums = difference["lost"] + difference["added"] + difference["doubled"]
    return sums == 0 and difference["in_order"] and difference["position_deg"] <= POSITION_DEG and difference["mixture"] <= MIXTURE


def noise(fleet: Fleet, side: int, seed: int = 0) -> SkyImage:
    """A window of empty sky."""
    bands = fleet.bands or ()
    data = np.random.default_rng(seed).normal(size=(len(bands), side, side)).astype(np.float32)
    return SkyImage(data, bands, None, 0.2, np.zeros((side, side), bool))


def latencies(answer: Callable[[int], Any], count: int, concurrency: int) -> tuple[list[float], float]:
    """Seconds that each of ``count`` calls took, so many at once, and all of them together."""

    def timed(number: int) -> float:
        started = time.monotonic()
        answer(number)
        return time.monotonic() - started

    began = time.monotonic()
    with ThreadPoolExecutor(concurrency) as pool:
        seconds = list(pool.map(timed, range(count)))
    return seconds, time.monotonic() - began


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """The 50th, 95th and 99th."""
    return {f"p{share}": float(np.percentile(seconds, share)) for share in (50, 95, 99)}


def cut(image: SkyImage, side: int, x0: int = 0, y0: int = 0) -> SkyImage:
    """A square part of a window."""
    part = slice(y0, y0 + side), slice(x0, x0 + side)
    return replace(
        image, data=np.ascontiguousarray(image.data[:, *part]), mask=image.mask[part], wcs=None, invalid=None, variance=None
    )


def _boxes(table: Table) -> np.ndarray:
    return np.stack([np.asarray(table[name], np.float64) for name in ("x0", "y0", "x1", "y1")], axis=1)


def _doubled(boxes: np.ndarray) -> int:
    one, other, _ = pairwise_iou_candidates(boxes, boxes, SAME_IOU)
    return int(np.count_nonzero(one < other))
