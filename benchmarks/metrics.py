"""The statistics of the published table for a survey's catalogue: ``python -m benchmarks.metrics [--quick]``.

1.25 million objects (the LSST paper matched 1,254,379), five components each, redshifts drawn from the densities, modes as a
catalogue has them: bias, sigma_IQR and outliers in both conventions, CDE loss, NLL, and KS, CvM and AD of the PIT, each with its
error from 200 bootstrap samples, in one process of its own whose largest memory is told. After it, of a million objects each: two
lists matched on the sky and by their boxes, and six colours put on a self-organising map of 32 x 32 cells.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks import record
from deepdisc_ops.photoz import metrics
from deepdisc_ops.photoz.representation import SelfOrganisingMap
from deepdisc_ops.sky.matching import match_boxes, match_on_sky

OBJECTS, COMPONENTS = 1_250_000, 5
LISTED, FIELD_DEG, FIELD_PX = 1_000_000, 1.6, 60_000.0
"""Objects of the lists that are matched, about as dense as galaxies of LSST's gold sample and fainter are."""
SIDE, FEATURES = 32, 6
QUICK_SHARE = 0.1
SECONDS, GIGABYTES, MAP_SECONDS = 60.0, 4.0, 30.0
"""What the statistics, and a map's cells of a million objects, may take."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute, print, and keep unless the run is quick."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.metrics", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the objects; nothing is kept")
    parser.add_argument("--folder", type=Path, default=record.RESULTS, help="folder of the result")
    known = parser.parse_args(arguments)
    with threadpool_limits(1):
        figures = measure(int(OBJECTS * QUICK_SHARE) if known.quick else OBJECTS)
        figures |= measure_lists(int(LISTED * QUICK_SHARE) if known.quick else LISTED)
    ratios = {
        "seconds_over_limit": figures["seconds"] / SECONDS,
        "memory_over_limit": figures["memory_gb"] / GIGABYTES,
        "map_seconds_over_limit": figures["map_s"] / MAP_SECONDS,
    }
    lines = [f"{name}: {value:.6g}" for name, value in {**figures, **ratios}.items()]
    print("\n".join(lines))
    if not known.quick:
        print(record.write("metrics", ratios=ratios, figures=figures, log=lines, arguments=arguments, folder=known.folder))


def measure(objects: int, seed: int = 1) -> dict[str, float]:
    """Seconds and memory of the table for as many ``objects``, and the table."""
    rng = np.random.default_rng(seed)
    shape = (objects, COMPONENTS)
    weights = rng.dirichlet(np.ones(COMPONENTS), objects)
    means, sigmas = rng.gamma(4, 0.25, shape) + 0.2, rng.uniform(0.01, 0.1, shape)
    component = (rng.random((objects, 1)) > weights.cumsum(1)[:, :-1]).sum(1)
    row = np.arange(objects)
    z_true = np.abs(rng.normal(means[row, component], sigmas[row, component]))
    z_mode = means[row, (weights / sigmas).argmax(1)]
    started, cpu_started = time.perf_counter(), time.process_time()
    lsst, jades = (metrics.point_metrics(z_mode, z_true, convention, rng) for convention in metrics.CONVENTIONS)
    densities = metrics.density_metrics(weights, means, sigmas, z_true, rng)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return {
        "objects": float(objects),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "bias": lsst.bias,
        "sigma_iqr": lsst.sigma_iqr,
        "outliers_lsst": lsst.outlier_fraction,
        "outliers_jades": jades.outlier_fraction,
        "cde_loss": densities.cde_loss.value,
        "nll": densities.nll.value,
        "ks": densities.ks.value,
        "ks_error": densities.ks.error,
        "cvm": densities.cvm.value,
        "ad": densities.ad.value,
    }


def measure_lists(objects: int, seed: int = 2) -> dict[str, float]:
    """Seconds to match two lists of so many ``objects``, the second with errors, and to find their cells on a map."""
    rng = np.random.default_rng(seed)
    share = math.sqrt(objects / LISTED)
    ra, dec = rng.uniform(0, FIELD_DEG * share, (2, objects))
    started = time.perf_counter()
    on_sky = match_on_sky(ra, dec, ra + rng.normal(0, 0.1 / 3600, objects), dec, 1.0)
    sky_done = time.perf_counter()
    centre, size = rng.uniform(0, FIELD_PX * share, (objects, 2)), rng.lognormal(2.3, 0.5, (objects, 2))
    boxes = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
    boxes_begun = time.perf_counter()
    by_boxes = match_boxes(boxes, boxes + rng.normal(0, 0.3, boxes.shape), 0.5)
    boxes_done = time.perf_counter()
    som = SelfOrganisingMap(
        rng.normal(size=(SIDE, SIDE, FEATURES)), np.zeros(FEATURES), np.ones(FEATURES), tuple(map(str, range(FEATURES)))
    )
    colours = rng.normal(size=(objects, FEATURES))
    map_begun = time.perf_counter()
    cell = som.assign(colours)
    return {
        "listed": float(objects),
        "sky_match_s": sky_done - started,
        "sky_matched": float((on_sky.index1 == on_sky.index2).sum() / objects),
        "box_match_s": boxes_done - boxes_begun,
        "box_matched": float((by_boxes.index1 == by_boxes.index2).sum() / objects),
        "map_s": time.perf_counter() - map_begun,
        "cells_used": float(len(np.unique(cell))),
    }


if __name__ == "__main__":
    main()
