"""One trial of a sweep: what runs in a Ray worker, and the folder it leaves behind.

A trial folder holds config.yaml, drawn.json, metrics.jsonl (one `Measurement` per report), loss.png, best/, last/ and, after a
failure, error.txt. It is the trial's whole state: whoever starts the trial again, on this or another machine that sees the folder,
continues it; and the driver writes the records in MLflow from it alone, now or after a crash.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deepdisc_ops import config as settings
from deepdisc_ops.config import TrainingConfig
from deepdisc_ops.errors import ConfigError
from deepdisc_ops.sweeps.space import SweepSpec, trial_config
from deepdisc_ops.tracking import Measurement

Report = Callable[[int, Mapping[str, float]], None]
Train = Callable[..., object]
PLAN = "plan"
"""The key of a Ray trial's config that holds the sweep's constants; all others are drawn values."""
WORST = 1e30
"""What the scheduler is told of a metric that is no number: it must rank last, and schedulers cannot rank NaN or infinity."""
JOURNAL, CONFIG, DRAWN, FAULT = "metrics.jsonl", "config.yaml", "drawn.json", "error.txt"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder says about itself."""

    step: int
    metrics: Mapping[str, float]


class Journal:
    """The metrics of a trial, one line per report; steps increase strictly, and a line torn by a crash is dropped."""

    def __init__(self, folder: Path) -> None:
        """Continue the journal of ``folder`` if it has one."""
        self._path = folder / JOURNAL
        rows = read_journal(folder)
        if self._path.exists():
            write_atomically(self._path, "".join(_line(row) for row in rows))
        self.last = rows[-1] if rows else None

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line; a step that is already there is left as it is."""
        if self.last is not None and step <= self.last.step:
            return
        self.last = Measurement(step, time.time(), {key: float(value) for key, value in metrics.items()})
        with self._path.open("a") as file:
            file.write(_line(self.last))


def read_journal(folder: Path) -> list[Measurement]:
    """The reports of the trial in ``folder``, complete lines only; none before the first."""
    path = folder / JOURNAL
    if not path.exists():
        return []
    *lines, _unfinished = path.read_text().split("\n")
    return [Measurement(**json.loads(line)) for line in lines]


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """Step and metrics of a checkpoint folder; None when there is none."""
    path = folder / "member.yaml"
    if not path.exists():
        return None
    tree = yaml.safe_load(path.read_text())
    return Checkpoint(int(tree["step"]), {key: float(value) for key, value in tree["metrics"].items()})


def plan_of(spec: SweepSpec, trials: Path, train: Train) -> dict[str, Any]:
    """The constants of a sweep, as plain values that every worker can read."""
    return {
        "base": spec.base,
        "metric": spec.metric,
        "worst": WORST if spec.direction == "min" else -WORST,
        "trials": str(trials.absolute()),
        "train": f"{train.__module__}:{train.__qualname__}",
        "threads": max(1, int(spec.resources.cpus)),
        "cwd": str(Path.cwd()),
    }


def planned_config(ray_config: Mapping[str, Any]) -> TrainingConfig:
    """The training config of a Ray trial: absolute paths, threads as many as the trial's CPUs."""
    plan = ray_config[PLAN]
    config = trial_config(plan["base"], drawn_values(ray_config))
    data = config.data.model_copy(update={"path": Path(plan["cwd"]) / config.data.path})
    train = config.train.model_copy(update={"threads": config.train.threads or plan["threads"]})
    return config.model_copy(update={"data": data, "train": train})


def drawn_values(ray_config: Mapping[str, Any]) -> dict[str, Any]:
    """The values drawn from the space, by dotted key."""
    return {key: value for key, value in ray_config.items() if key != PLAN}


def prepare(folder: Path, ray_config: Mapping[str, Any]) -> None:
    """Write config and drawn values into the folder of a trial that is about to start; a former failure is forgotten."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAULT).unlink(missing_ok=True)
    write_atomically(folder / CONFIG, yaml.safe_dump(planned_config(ray_config).model_dump(mode="json"), sort_keys=False))
    write_atomically(folder / DRAWN, json.dumps(drawn_values(ray_config)))


def read_prepared(folder: Path) -> tuple[TrainingConfig, dict[str, Any]]:
    """Config and drawn values of the trial in ``folder``."""
    return settings.load(folder / CONFIG), json.loads((folder / DRAWN).read_text())


def read_fault(folder: Path) -> str:
    """Why the trial in ``folder`` failed, in one line."""
    path = folder / FAULT
    return path.read_text() if path.exists() else "its process died without a word; memory is the usual reason"


def run_trial(ray_config: Mapping[str, Any]) -> None:
    """Train one member inside a Ray worker, reporting each validation to the trial's journal and to Ray."""
    from ray import tune

    plan = ray_config[PLAN]
    folder = Path(plan["trials"]) / tune.get_context().get_trial_id()
    folder.mkdir(parents=True, exist_ok=True)

    def tell(metrics: dict[str, float]) -> None:
        tune.report(rankable(metrics, plan["metric"], plan["worst"]))

    try:
        train_in_folder(planned_config(ray_config), folder, _load(plan["train"]), tell)
    except Exception as error:
        write_atomically(folder / FAULT, f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise


def rankable(metrics: Mapping[str, float], metric: str, worst: float) -> dict[str, float]:
    """The metrics with ``worst`` in the place of a ``metric`` that is not finite."""
    return {**metrics, metric: metrics[metric] if math.isfinite(metrics[metric]) else worst}


def train_in_folder(config: TrainingConfig, folder: Path, train: Train, tell: Callable[[dict[str, float]], None]) -> None:
    """Train in ``folder``, continuing what lies there, and pass every report on to ``tell`` (Ray's scheduler).

    A crash between a checkpoint and its report would leave a gap in the journal: the checkpoint's own history closes it.
    Training that was already complete still tells its last metrics once, as the scheduler knows a trial by its reports only.
    """
    from deepdisc_ops.training.checkpoint import read_history

    journal = Journal(folder)
    for entry in read_history(folder / "last"):
        journal.append(int(entry["step"]), {key: value for key, value in entry.items() if key != "step"})
    told = False

    def report(step: int, metrics: Mapping[str, float]) -> None:
        nonlocal told
        journal.append(step, metrics)
        told = True
        tell({**metrics, "step": step})

    train(config, folder, report=report)
    if not told and journal.last is not None:
        tell({**journal.last.metrics, "step": journal.last.step})


def _load(name: str) -> Train:
    module, _, function = name.partition(":")
    found: Train | None = getattr(importlib.import_module(module), function, None)
    if found is None:
        raise ConfigError(f"training function {name} is not importable; expected a function at the top level of a module")
    return found


def _line(row: Measurement) -> str:
    return json.dumps({"step": row.step, "time_s": row.time_s, "metrics": dict(row.metrics)}) + "\n"


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is never seen half-written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
