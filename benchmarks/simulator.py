"""The simulator against GalSim's own drawing of the same scene: ``python -m benchmarks.simulator [--quick]``.

Both make the whole scene, on one core and in one process: sources, picture, noise, masks and truth. They differ in what draws
the sources: the batched renderer, or GalSim with its default accuracy, source by source and band by band on the same stamps.
The renderer runs before and after GalSim, so that a change of the machine's load shows in the scatter.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import galsim
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from benchmarks import record
from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.render import render, render_galsim
from deepdisc_ops.data.scenes import Renderer, Scene, simulate_scene

SIZE, QUICK_SIZE = 1024, 192
SEED = 1
REPEATS = 3
"""Runs of the renderer before GalSim's, and after it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both, print the figures, and keep them unless the run is quick."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulator", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SIZE} instead of {SIZE} pixels a side; nothing is kept")
    quick = parser.parse_args(arguments).quick
    with threadpool_limits(1):
        ratios, figures = compare(QUICK_SIZE if quick else SIZE)
        lines = [f"{name}: {value:.4g}" for name, value in {**figures, **ratios}.items()]
        print("\n".join(lines))
        if not quick:
            print(record.write("simulator", ratios=ratios, figures=figures, log=lines, arguments=arguments))


def compare(size: int) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios and figures of a scene of ``size`` pixels a side."""
    draw = partial(simulate_scene, SkySettings(), seed=SEED)
    reference: Renderer = partial(render_galsim, params=galsim.GSParams())
    draw(size=64, renderer=render)  # tables of spectra and profiles are made once a process
    before = [timed(lambda: draw(size=size)) for _ in range(REPEATS)]
    slow_seconds, slow = timed(lambda: draw(size=size, renderer=reference))
    after = [timed(lambda: draw(size=size)) for _ in range(REPEATS)]
    scene = before[0][1]
    seconds = [one for one, _ in before + after]
    figures = {
        "pixels_a_side": float(size),
        "bands": float(len(scene.survey.bands)),
        "sources": float(len(scene.catalog)),
        "true_objects": float(len(scene.truth)),
        "seconds_a_scene": float(np.median(seconds)),
        "slowest_seconds_a_scene": max(seconds),
        "galsim_seconds_a_scene": slow_seconds,
        "pixels_off_by_a_third_of_the_noise": float((difference(scene, slow) > 0.3).mean()),
    }
    return {"simulator_over_galsim": slow_seconds / figures["seconds_a_scene"]}, figures


def timed(make: Callable[[], Scene]) -> tuple[float, Scene]:
    """Seconds that a scene took, and the scene."""
    started = time.perf_counter()
    scene = make()
    return time.perf_counter() - started, scene


def difference(one: Scene, other: Scene) -> NDArray[np.float64]:
    """(C, H, W) difference of two noiseless pictures in units of the noise."""
    return np.asarray(np.abs(one.noiseless - other.noiseless) / one.noise[:, None, None])


if __name__ == "__main__":
    main()
