"""What catalogue codes get out of a frozen sky: ``python -m benchmarks.baselines [--sky NAME] [--code NAME] [--quick]``.

The codes of `benchmarks.codes` learn from the gold galaxies (i < 25.3) of the train split, choose what they leave open on the
calibration split, and are judged on those of the test split: the galaxies of `benchmarks.photoz`, at their true positions, found
by the network or not, but for those whose box the border of their scene cuts. All are held to the same functions: points,
densities, bins of magnitude, redshift and blendedness, with bootstrap errors.

How many galaxies a code answers for in a second of one core's time, their fluxes given, is measured in the same run, and so is the
speed of the network of ``--model``, which finds and deblends them in the image by itself.

The answers go to ``--out``, a file a code, too large for git; the result keeps their digests. A code whose file is there is not
asked again. EAZY is not among the codes: it has no wheel on the package index, and its package is without templates and filters.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from benchmarks import record, scoring
from benchmarks.codes import CODES
from benchmarks.gold import YEARS, Gold, Traits, read_gold, read_traits
from benchmarks.reference_sky import GRID, SPLITS
from benchmarks.scoring import EDGES, Judged
from deepdisc_ops.data.reference import ReferenceSky, check_reference, load_reference, reference_names, reference_scene
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.photoz.figures import binned_statistics, write_figure
from deepdisc_ops.photoz.metrics import binned_metrics
from deepdisc_ops.sky.dust import EbvPlane

TIMED_SCENES = 4
AXES = {"magnitude": "i (AB mag)", "redshift": "true redshift", "blendedness": "blendedness"}


@dataclass(frozen=True)
class Asked:
    """One code: what it says, and seconds of CPU to learn and to answer for all galaxies of the test split, one thread."""

    judged: Judged
    learn_s: float
    answer_s: float


def ask(code: str, gold: dict[str, Gold], work: Path) -> Asked:
    """Let a code learn and answer, on one thread."""
    with threadpool_limits(1):
        torch.set_num_threads(1)
        started = time.process_time()
        predict = CODES[code](gold["train"], gold["calibration"], work)
        learned = time.process_time()
        answer = predict(gold["test"])
        done = time.process_time()
    judged = Judged.of_grid(answer.redshift, answer.densities, gold["test"].redshift)
    return Asked(judged, learned - started, done - learned)


def asked_once(code: str, gold: dict[str, Gold], work: Path, out: Path) -> Asked:
    """As `ask`, or what an earlier run kept in ``out``."""
    file, truth = out / f"{code}.npz", gold["test"].redshift
    times = file.with_suffix(".json")
    if file.is_file() and times.is_file():
        kept = json.loads(times.read_text())
        return Asked(scoring.read(file, truth), kept["learn_s"], kept["answer_s"])
    asked = ask(code, gold, work)
    scoring.keep(asked.judged, truth, file)
    times.write_text(json.dumps({"learn_s": asked.learn_s, "answer_s": asked.answer_s}) + "\n")
    return asked


def network_speed(sky: ReferenceSky, model: Path, scenes: int = TIMED_SCENES) -> float:
    """Objects a second of one core that the network finds, deblends and gives a redshift, from the image alone."""
    ensemble = Ensemble.load(model)
    objects, seconds = 0, 0.0
    with threadpool_limits(1):
        torch.set_num_threads(1)
        for index in range(scenes + 1):
            scene = reference_scene(sky, "test", index, years=YEARS)
            pixels = scene.image[[scene.survey.bands.index(band) for band in ensemble.bands]]
            started = time.process_time()
            found = ensemble.predict(pixels, EbvPlane.constant(scene.ebv))
            if index:  # the first warms up
                seconds += time.process_time() - started
                objects += len(found)
    return objects / seconds


def judge(asked: dict[str, Asked], gold: Gold, traits: Traits) -> dict[str, Any]:
    """All figures, on the galaxies clear of the border."""
    whole = traits.whole
    truth = gold.redshift[whole]
    codes = {name: one.judged.select(whole) for name, one in asked.items()}
    columns = {"magnitude": gold.magnitude, "redshift": gold.redshift, "blendedness": traits.blendedness}
    return {
        "codes": {
            name: scoring.scores(codes[name], truth)
            | {
                "objects_per_s_per_core": scoring.rounded(len(gold) / one.answer_s),
                "learn_s": scoring.rounded(one.learn_s),
                "digest": scoring.digest(one.judged),
            }
            for name, one in asked.items()
        },
        "blended": {name: blended(judged, truth, traits.blendedness[whole]) for name, judged in codes.items()},
        "binned": {column: scoring.binned(codes, truth, values[whole], EDGES[column]) for column, values in columns.items()},
    }


def blended(judged: Judged, truth: np.ndarray, blendedness: np.ndarray) -> dict[str, Any]:
    """The scores of significantly blended galaxies."""
    chosen = blendedness > scoring.BLENDED
    return scoring.scores(judged.select(chosen), truth[chosen]) if chosen.sum() > 1 else {"n": int(chosen.sum())}


def draw(asked: dict[str, Asked], gold: Gold, traits: Traits, folder: Path, sky: str) -> None:
    """Bias, scatter and outliers of every code against each column."""
    whole = traits.whole
    columns = {"magnitude": gold.magnitude, "redshift": gold.redshift, "blendedness": traits.blendedness}
    for column, values in columns.items():
        series = {
            name.replace("_", " "): binned_metrics(
                one.judged.redshift[whole],
                gold.redshift[whole],
                values[whole],
                EDGES[column],
                "lsst",
                np.random.default_rng(0),
                samples=100,
                least=20,
            )
            for name, one in asked.items()
        }
        if any(series.values()):
            write_figure(binned_statistics(series, AXES[column]), folder / f"baselines-{sky}-{column}.png")


def main() -> None:
    """Ask, judge, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sky", choices=reference_names(), action="append", help="by default all")
    parser.add_argument("--code", choices=sorted(CODES), action="append", help="by default all")
    parser.add_argument("--model", type=Path, default=Path("models/lsst-small"), help="network whose speed stands beside")
    parser.add_argument("--out", type=Path, default=Path("build/baselines"), help="folder of the answers")
    parser.add_argument("--quick", action="store_true", help="a tenth of the scenes; all results go to --out")
    parser.add_argument(
        "--work", type=Path, default=Path("build/reference-sky"), help="folder of benchmarks.reference_sky's tables"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in arguments.sky or reference_names():
        check_reference(name)
        sky, out = load_reference(name), arguments.out / (f"{name}-quick" if arguments.quick else name)
        with ProcessPoolExecutor(arguments.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            gold = {split: read_gold(sky, split, arguments.work, quick=arguments.quick, pool=pool) for split in SPLITS}
            traits = read_traits(sky, arguments.work, quick=arguments.quick, pool=pool)
        asked = {}
        for code in arguments.code or CODES:
            asked[code] = asked_once(code, gold, arguments.work, out)
            print(f"{name}: {code} learned in {asked[code].learn_s:.0f} s, answered in {asked[code].answer_s:.0f} s", flush=True)
        found = judge(asked, gold["test"], traits) | {"trained_on": len(gold["train"])}
        found["network_objects_per_s_per_core"] = scoring.rounded(network_speed(sky, arguments.model))
        lines = [name, *scoring.lines(found["codes"])]
        for column, rows in found["binned"].items():
            lines += scoring.binned_lines(rows, list(asked), column)
        lines += [
            f"{code:<22}{one['objects_per_s_per_core']:>9.0f} objects a second of one core" for code, one in found["codes"].items()
        ]
        lines.append(f"{'network, from images':<22}{found['network_objects_per_s_per_core']:>9.0f} objects a second of one core")
        best = min(found["codes"].values(), key=lambda one: float(one["sigma_iqr"]))
        draw(asked, gold["test"], traits, out if arguments.quick else Path(__file__).parents[1] / "docs", name)
        print("\n".join(lines))
        kept = {"grid": [float(GRID[0]), float(GRID[-1]), len(GRID)], name: found}
        folder = arguments.out if arguments.quick else record.RESULTS
        print(
            record.write(
                record.of_sky("baselines", name),
                ratios={f"{name}/least_sigma_iqr": best["sigma_iqr"]},
                figures=kept,
                log=lines,
                folder=folder,
                module="baselines",
            )
        )


if __name__ == "__main__":
    main()
