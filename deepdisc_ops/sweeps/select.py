"""Choose ensemble members from the trials of a sweep, straight from MLflow.

A member is judged by the metrics of its best checkpoint (``best_*`` in its run), which is the one that enters the ensemble.
`deepdisc_ops.sweeps.greedy` chooses by what the members are worth together.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.optimize import linprog

from deepdisc_ops import config as settings
from deepdisc_ops.config import Settings, TrainingConfig
from deepdisc_ops.errors import CheckpointError, ConfigError, TrainingError
from deepdisc_ops.sweeps.space import DIRECTIONS
from deepdisc_ops.tracking import CHECKPOINT_FOLDER, KIND_TAG, SWEEP_NAME_TAG, RunRecord, Tracker

log = logging.getLogger(__name__)

BEST = "best_"
SHARED = ("model.bands", "model.classes", "model.pixel_scale")
"""What the members of an ensemble have in common, by the names of their runs' parameters."""


@dataclass(frozen=True)
class SelectedMember:
    """A trained member: its MLflow run, its checkpoint folder, and the metrics and config of that checkpoint.

    ``weight`` is its share of the combined density where the choice depends on it; None leaves it to the ensemble's settings.
    """

    run_id: str
    checkpoint: Path
    metrics: dict[str, float]
    config: TrainingConfig
    weight: float | None = None


@dataclass(frozen=True)
class Conditions:
    """Which trials may be members, ranked by what, and which of them go together.

    max_per_backbone: at most so many of one backbone; one_per_fold: each trained on another partition of the data set
    (`data.partition`; trials on its stored split share one); one_dataset: all trained on the data set of the best one.
    """

    metric: str = "val_nll"
    min_completeness: float = 0.0
    max_per_backbone: int | None = None
    one_per_fold: bool = False
    one_dataset: bool = False

    def __post_init__(self) -> None:
        if self.metric not in DIRECTIONS:
            raise ConfigError(f"metric {self.metric!r} cannot rank members; expected one of {', '.join(DIRECTIONS)}")

    def go_together(self, runs: Sequence[RunRecord]) -> bool:
        """Whether one ensemble may hold all of ``runs``."""
        limits = ((self.max_per_backbone, backbone_of), (1 if self.one_per_fold else None, fold_of))
        return all(limit is None or max(Counter(map(of, runs)).values(), default=0) <= limit for limit, of in limits)


class _Entry(Settings):
    run_id: str
    checkpoint: Path
    metrics: dict[str, float]
    config: TrainingConfig
    weight: float | None = None


class _Selection(Settings):
    members: tuple[_Entry, ...]


def select_members(
    tracking_uri: str,
    sweep: str,
    k: int,
    *,
    into: Path,
    metric: str = "val_nll",
    min_completeness: float = 0.0,
    max_per_backbone: int | None = None,
    one_per_fold: bool = False,
) -> list[SelectedMember]:
    """The best ``k`` trials of ``sweep`` (its name, the newest of that name, or its parent run's id), best first.

    Only trials that did not fail count; the other arguments are `Conditions`. Checkpoints are used where they lie if the store
    is on this machine, and copied to ``into``/<run id> otherwise. Raises TrainingError if fewer than ``k`` trials qualify, with
    how many each condition cost.
    """
    conditions = Conditions(metric, min_completeness, max_per_backbone, one_per_fold)
    tracker = Tracker(tracking_uri, create=False)
    _, chosen = eligible(tracker, sweep, k, conditions)
    return [fetch_member(tracker, run, into) for run in chosen]


def eligible(tracker: Tracker, sweep: str, k: int, conditions: Conditions) -> tuple[list[RunRecord], list[RunRecord]]:
    """All trials that may be members, best first, and the best ``k`` of them that go together; see `select_members`."""
    if k < 1:
        raise ConfigError(f"{k} members asked for; at least 1 makes an ensemble")
    parent = find_sweep(tracker, sweep)
    trials = tracker.children(parent.run_id)
    ranked, lost = _sieved(trials, _tests(tracker, conditions), conditions)
    chosen = best_set(ranked, k, conditions)
    if len(chosen) < k:
        lost |= _lost_to_limits(ranked, chosen, conditions)
        told = "; ".join(f"{count} {why}" for why, count in lost.items()) or "there are no more"
        raise TrainingError(
            f"{len(chosen)} of {len(trials)} trials of sweep {parent.name!r} qualify, {k} members asked for ({told}); "
            "ask for fewer or relax the conditions"
        )
    return ranked, chosen


def best_set(ranked: Sequence[RunRecord], k: int, conditions: Conditions) -> list[RunRecord]:
    """The ``k`` runs of ``ranked``, or as many as there are, that go together and have the best mean metric, best first.

    Under one limit these are the first that fit. Under both the first that fit may bar better company: then the set is a flow
    from backbones to folds, whose linear programme has whole numbers for a solution.
    """
    if conditions.max_per_backbone is None or not conditions.one_per_fold:
        chosen: list[RunRecord] = []
        for run in ranked:
            if len(chosen) < k and conditions.go_together([*chosen, run]):
                chosen.append(run)
        return chosen
    if not ranked:
        return []
    value = np.array([run.metrics[BEST + conditions.metric] for run in ranked])
    cost = np.abs(value - value[0]) / max(float(np.ptp(value)), np.finfo(np.float64).tiny)
    rows = [np.ones(len(ranked))]
    limits = [float(k)]
    for of, limit in ((backbone_of, conditions.max_per_backbone), (fold_of, 1)):
        for name in sorted({of(run) for run in ranked}):
            rows.append(np.array([float(of(run) == name) for run in ranked]))
            limits.append(float(limit))
    # a member more is worth more than all that it can cost the others
    flow = linprog(cost - (k + 1), np.stack(rows), limits, bounds=(0, 1), method="highs-ds")
    return [run for run, share in zip(ranked, flow.x, strict=True) if share > 0.5]


def write_selection(members: Sequence[SelectedMember], path: Path) -> None:
    """Write the members for ``archive build --members``; checkpoints are named relative to ``path``'s folder."""
    folder = path.absolute().parent
    entries = [
        {
            "run_id": member.run_id,
            "checkpoint": os.path.relpath(member.checkpoint.absolute(), folder),
            "metrics": dict(member.metrics),
            **({} if member.weight is None else {"weight": member.weight}),
            "config": member.config.model_dump(mode="json"),
        }
        for member in members
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"members": entries}, sort_keys=False))


def read_selection(path: Path) -> list[SelectedMember]:
    """Read what `write_selection` wrote; checkpoint paths come back absolute and are there."""
    folder = path.absolute().parent
    entries = settings.load(path, schema=_Selection).members
    if not entries:
        raise ConfigError(f"{path} lists no members; expected at least one under 'members'")
    members = []
    for entry in entries:
        checkpoint = Path(os.path.normpath(folder / entry.checkpoint))
        if not checkpoint.is_dir():
            raise CheckpointError(f"{path} names checkpoint {checkpoint}, which does not exist; select the members again")
        members.append(SelectedMember(entry.run_id, checkpoint, entry.metrics, entry.config, entry.weight))
    return members


def find_sweep(tracker: Tracker, sweep: str) -> RunRecord:
    """The parent run of a sweep, by its id or by the sweep's name, of which the newest is meant."""
    sweeps = tracker.runs({KIND_TAG: "sweep"})
    found = [run for run in sweeps if sweep in (run.run_id, run.tags[SWEEP_NAME_TAG])]
    if not found:
        names = ", ".join(sorted({run.tags[SWEEP_NAME_TAG] for run in sweeps})) or "none"
        raise ConfigError(f"no sweep {sweep!r} in {tracker.uri}; it holds: {names}")
    return found[0]


def backbone_of(run: RunRecord) -> str:
    """The backbone of a trial."""
    return run.tags["backbone"]


def fold_of(run: RunRecord) -> str:
    """The number of the partition that a trial was trained on, or "stored split"."""
    partition = run.params.get("data.partition", "None")
    return "stored split" if partition == "None" else partition


def fetch_member(tracker: Tracker, run: RunRecord, into: Path) -> SelectedMember:
    """A trial as a member, its checkpoint where it lies or in ``into``/<run id>."""
    checkpoint = tracker.fetch(run.run_id, CHECKPOINT_FOLDER, into / run.run_id)
    description = checkpoint / "member.yaml"
    if not description.exists():
        raise CheckpointError(f"run {run.run_id} has no checkpoint at {checkpoint}; its artifacts were moved or deleted")
    tree: dict[str, Any] = settings.read_yaml(description)
    config = settings.validate(TrainingConfig, tree["config"], str(description))
    return SelectedMember(run.run_id, checkpoint, dict(tree["metrics"]), config)


def _tests(tracker: Tracker, conditions: Conditions) -> dict[str, Callable[[RunRecord], bool]]:
    """What a trial has to pass on its own, by what is said of those that do not."""
    metric, least = conditions.metric, conditions.min_completeness
    tests: dict[str, Callable[[RunRecord], bool]] = {
        "failed or not at their end": lambda run: run.status == "FINISHED",
        f"without a finite {metric}": lambda run: math.isfinite(run.metrics.get(BEST + metric, math.nan)),
    }
    if least > 0:
        tests[f"with a completeness below {least:g}"] = lambda run: run.metrics.get(f"{BEST}val_completeness", 0.0) >= least
    tests["without a checkpoint"] = lambda run: bool(tracker.artifacts(run.run_id, CHECKPOINT_FOLDER))
    return tests


def _sieved(
    trials: Sequence[RunRecord], tests: Mapping[str, Callable[[RunRecord], bool]], conditions: Conditions
) -> tuple[list[RunRecord], dict[str, int]]:
    """Trials that pass and can share an ensemble with the best of them, best first, and how many were lost to what.

    Equal ones are in the order of their ids; a trial counts as lost to the first test that it does not pass.
    """
    lost, left = {}, list(trials)
    for why, passes in tests.items():
        before, left = len(left), [run for run in left if passes(run)]
        if len(left) < before:
            lost[why] = before - len(left)
    sign = 1 if DIRECTIONS[conditions.metric] == "min" else -1
    ranked = sorted(left, key=lambda run: (sign * run.metrics[BEST + conditions.metric], run.run_id))
    for what, of in _shared(conditions).items():
        alike = [run for run in ranked if of(run) == of(ranked[0])]
        if len(alike) < len(ranked):
            why = f"with another {what} than that of the best, {ranked[0].name}: {of(ranked[0])}"
            lost[why] = len(ranked) - len(alike)
            log.warning("left out: %d %s", lost[why], why)
        ranked = alike
    return ranked, lost


def _shared(conditions: Conditions) -> dict[str, Callable[[RunRecord], str | None]]:
    """What all members must have in common, by its name."""
    shared: dict[str, Callable[[RunRecord], str | None]] = {key: partial(_param, key) for key in SHARED}
    if conditions.one_dataset:
        shared["data set"] = lambda run: f"{run.tags.get('dataset')} ({run.tags.get('dataset_digest')})"
    return shared


def _param(key: str, run: RunRecord) -> str | None:
    return run.params.get(key)


def _lost_to_limits(ranked: Sequence[RunRecord], chosen: Sequence[RunRecord], conditions: Conditions) -> dict[str, int]:
    """How many of the ``ranked`` found no place beside those ``chosen``."""
    rest = [run for run in ranked if run not in chosen]
    folds = {fold_of(run) for run in chosen} if conditions.one_per_fold else set()
    of_fold = sum(fold_of(run) in folds for run in rest)
    lost = {
        "of a fold that is taken": of_fold,
        f"beyond {conditions.max_per_backbone} of a backbone": len(rest) - of_fold,
    }
    return {why: count for why, count in lost.items() if count}
