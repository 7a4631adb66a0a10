"""One trial of a sweep: what runs in a Ray worker, and the folder it leaves behind.

A trial folder holds config.yaml, drawn.json, metrics.jsonl (one `Measurement` per report), loss.png, best/, last/ and, after a
failure, error.txt. It is the trial's whole state: whoever starts the trial again, on this or another machine that sees the folder,
continues it; and the driver writes the records in MLflow from it alone, now or after a crash. A trial with a journal and no last/
has ended before.

In population based training, where a trial goes on from another's state, population/ holds the latest of them, and what Ray keeps
as a checkpoint is their address.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deepdisc_ops import config as settings
from deepdisc_ops.config import TrainingConfig
from deepdisc_ops.errors import CheckpointError, ConfigError
from deepdisc_ops.sweeps.space import TUNABLE, SweepSpec, trial_config
from deepdisc_ops.tracking import Measurement

Report = Callable[[int, Mapping[str, float]], None]
Train = Callable[..., object]
VALUES, PLAN = "values", "plan"
"""The two keys of a Ray trial's config: what was drawn, by dotted key, and the constants of the sweep."""
WORST = 1e30
"""What the scheduler is told of a metric that is no number: it must rank last, and schedulers cannot rank NaN or infinity."""
POPULATION, SNAPSHOTS = "population", 4
"""Where a trial keeps so many snapshots of itself."""
SECONDS = "train_seconds"
"""The metric that says how long a trial has trained, over all its attempts."""
DIED = "its process died without a word; memory is the usual reason"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
JOURNAL, CONFIG, DRAWN, FAULT, ORIGIN = "metrics.jsonl", "config.yaml", "drawn.json", "error.txt", "origin.json"


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
        "cpus": spec.resources.cpus,
        "population": spec.scheduler.name == "pbt",
        "cwd": str(Path.cwd()),
    }


def planned_config(ray_config: Mapping[str, Any]) -> TrainingConfig:
    """The training config of a Ray trial: absolute paths, the trial's CPUs divided among its ranks as threads."""
    plan = ray_config[PLAN]
    config = trial_config(plan["base"], ray_config[VALUES])
    here = Path(plan["cwd"])
    starts = {name: here / path for name in ("weights", "backbone_weights") if (path := getattr(config.model, name))}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"path": here / config.data.path}),
            "model": config.model.model_copy(update=starts),
            "train": config.train.model_copy(
                update={"threads": config.train.threads or max(1, int(plan["cpus"] // config.train.ranks))}
            ),
        }
    )


def prepare(folder: Path, ray_config: Mapping[str, Any]) -> None:
    """Write config and drawn values into the folder of a trial that is about to start; a former failure is forgotten."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAULT).unlink(missing_ok=True)
    write_atomically(folder / CONFIG, yaml.safe_dump(planned_config(ray_config).model_dump(mode="json"), sort_keys=False))
    write_atomically(folder / DRAWN, json.dumps(ray_config[VALUES]))


def read_prepared(folder: Path) -> tuple[TrainingConfig, dict[str, Any]]:
    """Config and drawn values of the trial in ``folder``."""
    return settings.load(folder / CONFIG), json.loads((folder / DRAWN).read_text())


def read_fault(folder: Path) -> str:
    """Why the trial in ``folder`` failed, in one line."""
    path = folder / FAULT
    return path.read_text() if path.exists() else DIED


def size_of(checkpoint: Path) -> dict[str, float]:
    """The number of a member's weights, as the metric ``parameters``; nothing where there are none."""
    from safetensors import safe_open

    from deepdisc_ops.model.weights import WEIGHTS

    if not (checkpoint / WEIGHTS).exists():
        return {}
    with safe_open(checkpoint / WEIGHTS, framework="numpy") as tensors:
        shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys() if not key.endswith(_STATISTICS)]  # noqa: SIM118  it is no mapping
    return {"parameters": float(sum(math.prod(shape) for shape in shapes))}


def run_trial(ray_config: Mapping[str, Any]) -> None:
    """Train one member inside a Ray worker, reporting each validation to the trial's journal and to Ray."""
    from ray import tune

    folder = Path(ray_config[PLAN]["trials"]) / tune.get_context().get_trial_id()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _train_trial(ray_config, folder)
    except Exception as error:
        write_atomically(folder / FAULT, f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise


def _train_trial(ray_config: Mapping[str, Any], folder: Path) -> None:
    from ray import tune

    from deepdisc_ops.sweeps.system import SystemSampler

    plan, config = ray_config[PLAN], planned_config(ray_config)

    def tell(metrics: dict[str, float]) -> None:
        shown = rankable(metrics, plan["metric"], plan["worst"])
        if not plan["population"]:
            tune.report(shown)
            return
        with tempfile.TemporaryDirectory(prefix="origin-") as made:
            origin = {"trial": folder.name, "snapshot": str(take_snapshot(folder, int(metrics["step"])))}
            (Path(made) / ORIGIN).write_text(json.dumps(origin))
            tune.report(shown, checkpoint=tune.Checkpoint.from_directory(made))

    if plan["population"] and (given := tune.get_checkpoint()) is not None:
        with given.as_directory() as copy:
            origin = json.loads((Path(copy) / ORIGIN).read_text())
        if origin["trial"] != folder.name:
            inherit(Path(origin["snapshot"]), folder, config)
    with SystemSampler(folder) as system:
        train_in_folder(config, folder, _load(plan["train"]), tell, system.read)


def take_snapshot(folder: Path, step: int) -> Path:
    """Keep state and best checkpoint of a trial as they are now, for others to go on from; only the latest are kept."""
    snapshot = folder / POPULATION / f"{step:09d}"
    shutil.rmtree(snapshot, ignore_errors=True)
    _copy(folder, snapshot)
    for old in sorted((folder / POPULATION).iterdir())[:-SNAPSHOTS]:
        shutil.rmtree(old)
    return snapshot


def inherit(snapshot: Path, folder: Path, config: TrainingConfig) -> None:
    """Take over another trial's ``snapshot``, or its next one where that has gone; the run goes on under ``config``.

    Raises CheckpointError where the config differs in more than what may change while a network trains.
    """
    from deepdisc_ops.training.checkpoint import adopt_state

    later = [found for found in sorted(snapshot.parent.glob("*/")) if found.name >= snapshot.name]
    if not later:
        raise CheckpointError(f"{snapshot} is gone, and nothing came after it; run the sweep again in a new folder")
    _copy(later[0], folder)
    adopt_state(folder / "last", config, TUNABLE)


def _copy(source: Path, target: Path) -> None:
    """Copy a trial's state and best checkpoint; the state is linked, as it is never changed, only replaced."""
    for part, copy in (("last", os.link), ("best", shutil.copy2)):
        shutil.rmtree(target / part, ignore_errors=True)
        if (source / part).exists():
            shutil.copytree(source / part, target / part, copy_function=copy)


def rankable(metrics: Mapping[str, float], metric: str, worst: float) -> dict[str, float]:
    """The metrics with ``worst`` in the place of a ``metric`` that is not finite."""
    return {**metrics, metric: metrics[metric] if math.isfinite(metrics[metric]) else worst}


def train_in_folder(
    config: TrainingConfig,
    folder: Path,
    train: Train,
    tell: Callable[[dict[str, float]], None],
    measure: Callable[[], Mapping[str, float]] = dict,
) -> None:
    """Train in ``folder``, continuing what lies there, and pass every report on to ``tell`` (Ray's scheduler).

    ``measure`` gives metrics that are added to each report. A crash between a checkpoint and its report would leave a gap in
    the journal: the checkpoint's own history closes it. Training that was complete, or ended before, still tells its last
    metrics once, as the scheduler knows a trial by its reports only.
    """
    from deepdisc_ops.training.checkpoint import STATE, read_history

    journal = Journal(folder)
    for entry in read_history(folder / "last"):
        journal.append(int(entry["step"]), {key: value for key, value in entry.items() if key != "step"})
    told, began = False, time.monotonic()
    before = journal.last.metrics.get(SECONDS, 0.0) if journal.last else 0.0

    def report(step: int, metrics: Mapping[str, float]) -> None:
        nonlocal told
        everything = {**metrics, **measure(), SECONDS: before + time.monotonic() - began}
        journal.append(step, everything)
        told = True
        tell({**everything, "step": step})

    if journal.last is None or (folder / "last" / STATE).exists():
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
