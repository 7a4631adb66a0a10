"""Choose ensemble members from the trials of a sweep, straight from MLflow.

A member is judged by the metrics of its best checkpoint (``best_*`` in its run), which is the one that enters the ensemble.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deepdisc_ops import config as settings
from deepdisc_ops.config import Settings, TrainingConfig
from deepdisc_ops.errors import CheckpointError, ConfigError, TrainingError
from deepdisc_ops.sweeps.space import DIRECTIONS
from deepdisc_ops.tracking import CHECKPOINT_FOLDER, KIND_TAG, SWEEP_NAME_TAG, RunRecord, Tracker

BEST = "best_"


@dataclass(frozen=True)
class SelectedMember:
    """A trained member: its MLflow run, its checkpoint folder, and the metrics and config of that checkpoint."""

    run_id: str
    checkpoint: Path
    metrics: dict[str, float]
    config: TrainingConfig


class _Entry(Settings):
    run_id: str
    checkpoint: Path
    metrics: dict[str, float]
    config: TrainingConfig


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
) -> list[SelectedMember]:
    """The best ``k`` trials of ``sweep`` (its name, the newest of that name, or its parent run's id), best first.

    Only trials that did not fail count. Checkpoints are used where they lie if the store is on this machine, and copied to
    ``into``/<run id> otherwise. Raises TrainingError if fewer than ``k`` trials meet the conditions.
    """
    if metric not in DIRECTIONS:
        raise ConfigError(f"metric {metric!r} cannot rank members; expected one of {', '.join(DIRECTIONS)}")
    if k < 1:
        raise ConfigError(f"{k} members asked for; at least 1 makes an ensemble")
    tracker = Tracker(tracking_uri)
    parent = _parent(tracker, sweep)
    trials = tracker.children(parent.run_id)
    ranked = _ranked(trials, metric, min_completeness)
    chosen = _at_most_per_backbone(ranked, max_per_backbone)[:k]
    if len(chosen) < k:
        raise TrainingError(
            f"{len(chosen)} of {len(trials)} trials of sweep {parent.name!r} qualify, {k} members asked for "
            f"(finite {metric}, completeness >= {min_completeness:g}, per backbone at most {max_per_backbone or 'any number'}); "
            "ask for fewer or relax the conditions"
        )
    return [_member(tracker, run, into) for run in chosen]


def write_selection(members: Sequence[SelectedMember], path: Path) -> None:
    """Write the members for ``archive build --members``; checkpoints are named relative to ``path``'s folder."""
    folder = path.absolute().parent
    entries = [
        {
            "run_id": member.run_id,
            "checkpoint": os.path.relpath(member.checkpoint.absolute(), folder),
            "metrics": dict(member.metrics),
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
        members.append(SelectedMember(entry.run_id, checkpoint, entry.metrics, entry.config))
    return members


def _parent(tracker: Tracker, sweep: str) -> RunRecord:
    sweeps = tracker.runs({KIND_TAG: "sweep"})
    found = [run for run in sweeps if sweep in (run.run_id, run.tags[SWEEP_NAME_TAG])]
    if not found:
        names = ", ".join(sorted({run.tags[SWEEP_NAME_TAG] for run in sweeps})) or "none"
        raise ConfigError(f"no sweep {sweep!r} in {tracker.uri}; it holds: {names}")
    return found[0]


def _ranked(trials: Sequence[RunRecord], metric: str, min_completeness: float) -> list[RunRecord]:
    """Finished trials that meet the conditions, best first; equal ones in the order of their ids."""
    sign = 1 if DIRECTIONS[metric] == "min" else -1
    good = [
        run
        for run in trials
        if run.status == "FINISHED"
        and math.isfinite(run.metrics.get(BEST + metric, math.nan))
        and (min_completeness <= 0 or run.metrics.get(f"{BEST}val_completeness", 0.0) >= min_completeness)
    ]
    return sorted(good, key=lambda run: (sign * run.metrics[BEST + metric], run.run_id))


def _at_most_per_backbone(ranked: Sequence[RunRecord], limit: int | None) -> list[RunRecord]:
    if limit is None:
        return list(ranked)
    kept, count = [], Counter[str]()
    for run in ranked:
        backbone = run.tags["backbone"]
        if count[backbone] < limit:
            kept.append(run)
        count[backbone] += 1
    return kept


def _member(tracker: Tracker, run: RunRecord, into: Path) -> SelectedMember:
    checkpoint = tracker.fetch(run.run_id, CHECKPOINT_FOLDER, into / run.run_id)
    description = checkpoint / "member.yaml"
    if not description.exists():
        raise CheckpointError(f"run {run.run_id} has no checkpoint at {checkpoint}; its artifacts were moved or deleted")
    tree: dict[str, Any] = settings.read_yaml(description)
    config = settings.validate(TrainingConfig, tree["config"], str(description))
    return SelectedMember(run.run_id, checkpoint, dict(tree["metrics"]), config)
