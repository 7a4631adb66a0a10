"""Objects that windows cut, with the second pass and without: ``python -m benchmarks.second_look [--skies N] [--quick]``.

Simulated LSST skies of 2048 pixels, seen by a committed ensemble in windows of 512 pixels that share 64, and in windows of 128
that share 32, as few as the command allows. The true sources above 5 sigma whose boxes (at least 11 px, as the network learned
them) straddle an inner edge of a window are searched in the catalogue, one-to-one by boxes that overlap with an IoU of at least
0.5; those that are whole in no window are also counted alone. The first pass is the same with and without the second. Central
objects are the same sources in windows of 448 pixels that share half, where all lie at least 112 pixels deep; the error of a
difference is that of the number of sources that one of the two finds alone.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.mosaic import MODEL
from benchmarks.tilings import REFERENCE, in_memory, look
from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.scenes import RECORD_SNR, Scene, simulate_scene
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.inference.journal import Journal
from deepdisc_ops.inference.mosaic import Survey
from deepdisc_ops.sky.detections import Detections
from deepdisc_ops.sky.matching import match_boxes

TILINGS = ((512, 64), (128, 32))
MIN_IOU = 0.5
MIN_BOX = 11.0
Bools = NDArray[np.bool_]
console = Console(width=110, record=True)


def true_boxes(scene: Scene) -> NDArray[np.float64]:
    """Boxes (N, 4) px of the sources above `RECORD_SNR`, none smaller than `MIN_BOX`."""
    truth = scene.truth[(np.asarray(scene.truth["snr"]) > RECORD_SNR) & (np.asarray(scene.truth["masked"]) == 0)]
    low, high = (
        np.stack([np.asarray(truth[name], np.float64) for name in names], axis=1) for names in (("x0", "y0"), ("x1", "y1"))
    )
    centres = np.stack([np.asarray(truth[name], np.float64) + 0.5 for name in ("x", "y")], axis=1)
    height, width = scene.image.shape[1:]
    low, high = np.minimum(low, centres - MIN_BOX / 2).clip(0), np.maximum(high, centres + MIN_BOX / 2)
    return np.concatenate([low, np.minimum(high, [width, height])], axis=1)


def straddling(survey: Survey, boxes: NDArray[np.float64]) -> Bools:
    """Whether each box (N, 4) crosses an inner edge of some window."""
    crossed = np.zeros(len(boxes), bool)
    for axis, side in ((0, survey.width), (1, survey.height)):
        edges = {edge for tile in survey.tiles() for edge in (tile.window[axis], tile.window[axis + 2])} - {0, side}
        for edge in edges:
            crossed |= (boxes[:, axis] < edge) & (boxes[:, axis + 2] > edge)
    return crossed


def cut_everywhere(survey: Survey, boxes: NDArray[np.float64]) -> Bools:
    """Whether each box (N, 4) is whole in no window."""
    whole = np.zeros(len(boxes), bool)
    for tile in survey.tiles():
        x0, y0, x1, y1 = tile.window
        whole |= (boxes[:, 0] >= x0) & (boxes[:, 1] >= y0) & (boxes[:, 2] <= x1) & (boxes[:, 3] <= y1)
    return ~whole


def found(boxes: NDArray[np.float64], objects: Detections) -> Bools:
    """Which true boxes (N, 4) an object was matched with."""
    here = np.zeros(len(boxes), bool)
    here[match_boxes(boxes, objects.boxes, MIN_IOU).index1] = True
    return here


def compared(with_pass: Bools, without: Bools, central: Bools) -> dict[str, float]:
    """Completeness of the same N sources in three ways, and the differences from central ones in percentage points."""
    n = len(central)
    told: dict[str, float] = {"sources": n}
    if not n:
        return told
    told["central"] = float(central.mean())
    for name, seen in (("with", with_pass), ("without", without)):
        told[name] = float(seen.mean())
        told[f"{name}_minus_central_points"] = 100 * (told[name] - told["central"])
        told[f"{name}_error_points"] = 100 * math.sqrt(int((seen != central).sum())) / n
    return told


def looked_at(scene: Scene, ensemble: Ensemble, scratch: Path) -> dict[str, dict[str, Bools]]:
    """For each tiling: which true sources straddle, which are cut everywhere, and which were found in three ways."""
    mosaic, boxes = in_memory(scene, ensemble.bands), true_boxes(scene)
    central = found(boxes, look(mosaic, ensemble, REFERENCE).objects)
    answers = {}
    for tiling in TILINGS:
        journal = Journal(scratch / name_of(tiling), {"tiling": tiling})
        passes = {name: look(mosaic, ensemble, tiling, journal, second_pass=name == "with") for name in ("with", "without")}
        journal.remove()
        survey = passes["with"].survey
        answers[name_of(tiling)] = {
            "straddling": straddling(survey, boxes),
            "cut everywhere": cut_everywhere(survey, boxes),
            "central": central,
            **{name: found(boxes, one.objects) for name, one in passes.items()},
        }
    return answers


def name_of(tiling: tuple[int, int]) -> str:
    """Window and overlap in pixels, as the result file calls them."""
    return "{}_{}".format(*tiling)


def table(figures: dict[str, dict[str, dict[str, float]]]) -> Table:
    """The comparison for readers."""
    shown = Table("window_overlap", "sources", "N", "central", "without", "with", "with - central, points")
    for tiling, kinds in figures.items():
        for kind, told in kinds.items():
            if not told["sources"]:
                continue
            shares = (f"{100 * told[name]:.1f} %" for name in ("central", "without", "with"))
            difference = f"{told['with_minus_central_points']:+.2f} ± {told['with_error_points']:.2f}"
            shown.add_row(tiling, kind, f"{told['sources']:.0f}", *shares, difference)
    return shown


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a sky of 512 pixels; nothing is kept")
    parser.add_argument("--skies", type=int, default=8)
    arguments = parser.parse_args()
    side, skies = (512, 1) if arguments.quick else (2048, arguments.skies)
    names = [name_of(tiling) for tiling in TILINGS]
    ensemble = Ensemble.load(MODEL)
    every: list[dict[str, dict[str, Bools]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(skies):
            scene = simulate_scene(SkySettings(), size=side, seed=177 + seed)
            every.append(looked_at(scene, ensemble, Path(scratch) / str(seed)))
            console.print(f"sky {seed}: {len(every[-1][names[0]]['central'])} sources")

    def over_skies(tiling: str, of: Callable[[dict[str, Bools]], Bools]) -> dict[str, float]:
        chosen = [{name: seen[tiling][name][of(seen[tiling])] for name in ("with", "without", "central")} for seen in every]
        return compared(*(np.concatenate([one[name] for one in chosen]) for name in ("with", "without", "central")))

    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name in names:
        figures[name] = {kind: over_skies(name, lambda seen, kind=kind: seen[kind]) for kind in ("straddling", "cut everywhere")}
    ratios = {
        f"{way}_over_central_{name}": figures[name][kind][way] / figures[name][kind]["central"]
        for name, kind in zip(names, ("straddling", "cut everywhere"), strict=True)
        for way in ("with", "without")
        if figures[name][kind].get("central")
    }
    console.print(table(figures), ratios)
    if not arguments.quick:
        kept: dict[str, Any] = {"skies": skies, "tilings": figures}
        console.print(str(record.write("second_look", ratios=ratios, figures=kept, log=console.export_text().splitlines())))


if __name__ == "__main__":
    main()
