"""What a sweep costs beside its trainings: ``python -m benchmarks.sweep [--quick]``.

Eight trainings of about a minute, one rank and one CPU each, in two slots whose processes are used again. The ideal is the sum of
the trainings' own time, from the call of the loop to its return, over the slots; the wall time counts from the start of the first
training to the end of the sweep, its records closed. Tracking is the time that the driver spends in calls of the MLflow store.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import record
from deepdisc_ops.config import SkySettings, TrainingConfig
from deepdisc_ops.data.simulate import simulate_dataset
from deepdisc_ops.sweeps.run import run_sweep
from deepdisc_ops.sweeps.space import SweepSpec, parse_spec
from deepdisc_ops.tracking import Tracker
from deepdisc_ops.training import loop

SLOTS, TRIALS = 2, 8
SPENT = "spent.json"
CALLS = ("find_or_create", "log_measurements", "log_summary", "log_params", "set_tags", "log_dataset", "log_artifact", "end")


def timed_train(config: TrainingConfig, out: Path, *, report: Any) -> Path:
    """The training loop, with its beginning and end written beside its results."""
    began = time.time()
    best = loop.train(config, out, report=report)
    (out / SPENT).write_text(json.dumps({"began": began, "ended": time.time()}))
    return best


def specification(scenes: Path, steps: int) -> SweepSpec:
    """Trials that differ in learning rate and seed."""
    return parse_spec(
        {
            "name": "cost",
            "base": {
                "data": {"path": str(scenes)},
                "model": {"backbone": {"name": "tiny"}},
                "train": {"steps": steps, "batch_size": 4, "warmup_steps": 10, "validate_every": max(1, steps // 5), "threads": 1},
            },
            "space": {"train.lr": {"grid": [1e-3, 2e-3]}, "seed": {"grid": list(range(TRIALS // 2))}},
            "scheduler": {"name": "fifo"},
            "resources": {"cpus": 1},
            "concurrency": SLOTS,
        },
        "cost",
    )


class Stopwatch:
    """Seconds spent in the tracker's calls."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, timed; one inside another counts once."""

        def timed(*words: Any, **named: Any) -> Any:
            self._depth += 1
            began = time.perf_counter()
            try:
                return call(*words, **named)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.perf_counter() - began

        return timed


def main() -> None:
    """Run the sweep, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short trainings; nothing is kept")
    parser.add_argument("--steps", type=int, default=500, help="of a training: choose them for about a minute")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    watch = Stopwatch()
    for name in CALLS:
        setattr(Tracker, name, watch.around(getattr(Tracker, name)))
    importable = import_module("benchmarks.sweep")  # by its own name, not as __main__, for Ray's workers
    with tempfile.TemporaryDirectory(prefix="sweep-") as made:
        work = Path(made)
        simulate_dataset(SkySettings(), work / "scenes", counts={"train": 24, "validation": 4}, size=256, seed=3)
        spec = specification(work / "scenes", 20 if arguments.quick else arguments.steps)
        result = run_sweep(spec, work / "sweep", train=importable.timed_train)
        ended = time.time()
        spent = [json.loads((trial.folder / SPENT).read_text()) for trial in result.trials]
    loops = [one["ended"] - one["began"] for one in spent]
    wall, ideal = ended - min(one["began"] for one in spent), sum(loops) / SLOTS
    ratios = {"wall_over_ideal": wall / ideal, "tracking_share": watch.seconds / sum(loops)}
    log = [
        f"{TRIALS} trainings of {min(loops):.1f} to {max(loops):.1f} s in {SLOTS} slots: ideal {ideal:.1f} s, wall {wall:.1f} s",
        f"{watch.seconds:.2f} s in calls of the tracking store",
        ", ".join(f"{name} {value:.4f}" for name, value in ratios.items()),
    ]
    print("\n".join(log))
    if not arguments.quick:
        figures = {"loop_s": [round(one, 2) for one in loops], "wall_s": round(wall, 2), "tracking_s": round(watch.seconds, 3)}
        print(record.write("sweep", ratios=ratios, figures=figures, log=log))


if __name__ == "__main__":
    main()
