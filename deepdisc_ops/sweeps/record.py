"""The records of a sweep: trial folders on one side, MLflow runs on the other, and what brings the second up to the first.

All of MLflow happens in the driver, from the trial folders (see `deepdisc_ops.sweeps.trial`). A trial that the scheduler stops
is ended inside its report, so it cannot log anything afterwards; but its checkpoint and its journal were complete before that
report, and the driver outlives it. One writer also means no sqlite races and no MLflow start-up in the workers. Records are
written as reports arrive, by a thread of their own, and once more at the end, each time only what is missing: a store that was
slow or away, or a driver that was killed, costs nothing but the wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from deepdisc_ops.config import TrainingConfig, flatten
from deepdisc_ops.data.store import open_dataset
from deepdisc_ops.errors import TrainingError
from deepdisc_ops.sweeps import space, trial
from deepdisc_ops.sweeps.space import SweepSpec
from deepdisc_ops.tracking import (
    CHECKPOINT_FOLDER,
    KIND_TAG,
    STATE_TAG,
    STOPPED_TAG,
    SWEEP_NAME_TAG,
    SWEEP_TAG,
    TRIAL_TAG,
    Background,
    RunRecord,
    Tracker,
)

log = logging.getLogger(__name__)

State = Literal["running", "finished", "stopped_early", "failed", "interrupted"]
SETTLED = ("finished", "stopped_early", "failed")
DROPPED_TAG = "deepdisc_ops.checkpoint_dropped"
"""Of a trial whose checkpoint was not among those that the specification keeps."""


@dataclass(frozen=True)
class TrialProgress:
    """News of one trial, for whoever shows the sweep's progress."""

    trial_id: str
    state: State
    step: int
    steps: int
    values: Mapping[str, Any]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class TrialResult:
    """One trial at its end; ``best`` are the metrics of its best checkpoint."""

    trial_id: str
    run_id: str
    state: State
    step: int
    values: Mapping[str, Any]
    best: Mapping[str, float]
    folder: Path
    error: str | None = None


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep; ``best`` is the trial with the best metric."""

    name: str
    parent_run_id: str
    tracking_uri: str
    out: Path
    trials: tuple[TrialResult, ...]
    best: TrialResult


Progress = Callable[[TrialProgress], None]


class Recorder:
    """Brings the MLflow runs of a sweep up to what its trial folders hold."""

    def __init__(self, tracker: Tracker, spec: SweepSpec, sweep_id: str, out: Path, progress: Progress | None) -> None:
        """Open the parent run; child runs are opened when their trials start, or found when they ran before."""
        self._tracker, self._spec, self._out = tracker, spec, out
        self._background = Background()
        self._progress = progress
        tags = {KIND_TAG: "sweep", SWEEP_NAME_TAG: spec.name, "metric": spec.metric, "mode": spec.direction}
        self.parent = tracker.find_or_create(spec.name, (SWEEP_TAG, sweep_id), tags=tags)
        earlier = tracker.children(self.parent)
        self._children = {child.tags[TRIAL_TAG]: child.run_id for child in earlier}
        self._settled = {child.tags[TRIAL_TAG] for child in earlier if child.tags.get(STATE_TAG) in SETTLED}
        self._describe_sweep()

    def started(self, trial_id: str, ray_config: Mapping[str, Any]) -> None:
        """Prepare the folder of a trial that begins or continues, and open its child run."""
        trial.prepare(self._folder(trial_id), ray_config)
        self._background.submit(trial_id, partial(self._open, trial_id))
        self._tell(trial_id, "running")

    def measured(self, trial_id: str) -> None:
        """Log the reports that are not yet in the child run, and pass the news on."""
        self._background.submit(trial_id, partial(self._bring_up, trial_id))
        self._tell(trial_id, "running")

    def ended(self, trial_id: str, *, failed: bool) -> None:
        """Close the child run of a trial whose training is over."""
        self._background.submit(trial_id, partial(self._settle, trial_id, failed=failed))
        self._tell(trial_id, self._final_state(trial_id, failed=failed))

    def catch_up(self) -> None:
        """Wait until all that was handed over is written; raises TrainingError if the store cannot be reached."""
        self._background.drain()

    def lost(self) -> bool:
        """Whether a trial has failed for no fault of its own, as when its node went down."""
        children = self._tracker.children(self.parent)
        return any(child.tags.get(STATE_TAG) == "failed" and child.tags.get("error") == trial.DIED for child in children)

    def close(self, failed: Collection[str] = ()) -> SweepResult:
        """Write what is still missing, ``failed`` trials included, and close the parent run.

        Raises TrainingError if the store still cannot be reached, or if no trial is usable.
        """
        self.catch_up()
        self._background.close()
        for folder in sorted((self._out / "trials").glob("*/")):
            if folder.name not in self._settled:
                self._settle(folder.name, failed=folder.name in failed)
        for snapshots in (self._out / "trials").glob(f"*/{trial.POPULATION}"):
            shutil.rmtree(snapshots, ignore_errors=True)
        trials = self._trials()
        usable = self._usable(trials)
        if self._spec.keep.members:
            for one in trials:
                if (one.folder / "best").exists():
                    self._tracker.log_artifact(one.run_id, one.folder / "best", CHECKPOINT_FOLDER)
        self._tracker.log_params(self.parent, {"trials": str(len(trials))})
        if not usable:
            self._tracker.end(self.parent, "FAILED")
            faults = sorted({one.error for one in trials if one.error})
            raise TrainingError(
                f"sweep {self._spec.name}: none of {len(trials)} trials left a checkpoint with a finite {self._spec.metric}; "
                + (f"first fault: {faults[0]}" if faults else f"see {self._out / 'trials'}")
            )
        best = usable[0]
        self._tracker.set_tags(self.parent, {"best_trial": best.trial_id, "best_run_id": best.run_id})
        self._tracker.log_summary(self.parent, best.step, {f"best_{key}": value for key, value in best.best.items()})
        self._tracker.end(self.parent)
        return SweepResult(self._spec.name, self.parent, self._tracker.uri, self._out, tuple(trials), best)

    def close_interrupted(self) -> None:
        """Close the runs of an interrupted sweep as KILLED; a resume opens them again."""
        with _deferred(f"the interruption of sweep {self._spec.name}"):
            self.catch_up()
            for trial_id, run_id in self._children.items():
                if trial_id not in self._settled:
                    self._tracker.set_tags(run_id, {STATE_TAG: "interrupted"})
                    self._tracker.end(run_id, "KILLED")
            self._tracker.end(self.parent, "KILLED")
        self._background.close()

    def _describe_sweep(self) -> None:
        path = self._out / "spec.yaml"
        path.write_text(space.dump(self._spec))
        self._tracker.log_artifact(self.parent, path)
        params = {
            "scheduler": self._spec.scheduler.name,
            "search": self._spec.search,
            "expected_trials": str(space.number_of_trials(self._spec)),
            "metric": self._spec.metric,
            "seed": str(self._spec.seed),
        }
        self._tracker.log_params(self.parent, params)

    def _child(self, trial_id: str) -> str:
        """The child run of a trial, opened with what is known beforehand."""
        if trial_id not in self._children:
            config, drawn = trial.read_prepared(self._folder(trial_id))
            dataset = _dataset_tags(config)
            tags = {KIND_TAG: "trial", SWEEP_NAME_TAG: self._spec.name, "backbone": config.model.backbone.name, **dataset}
            name = f"{self._spec.name}-{trial_id.rpartition('_')[2]}"
            run_id = self._tracker.find_or_create(name, (TRIAL_TAG, trial_id), parent=self.parent, tags=tags)
            # those of a trial whose settings a population has changed stay as they began
            known = self._tracker.record(run_id).params
            params = flatten(config.model_dump(mode="json"))
            self._tracker.log_params(run_id, {key: value for key, value in params.items() if key not in known})
            self._tracker.set_tags(run_id, {STATE_TAG: "running", "drawn": json.dumps(drawn)})
            self._tracker.log_dataset(run_id, dataset["dataset"], dataset["dataset_digest"], config.data.path, config.data.fraction)
            self._children[trial_id] = run_id
        return self._children[trial_id]

    def _open(self, trial_id: str) -> None:
        """Find or make the child run of a trial that runs, whatever was known of it before."""
        self._settled.discard(trial_id)
        self._children.pop(trial_id, None)
        self._bring_up(trial_id)

    def _bring_up(self, trial_id: str) -> None:
        if trial_id in self._settled:  # it runs again, and its opening gave way to this
            self._open(trial_id)
        else:
            self._tracker.log_measurements(self._child(trial_id), trial.read_journal(self._folder(trial_id)))

    def _final_state(self, trial_id: str, *, failed: bool) -> State:
        config, _ = trial.read_prepared(self._folder(trial_id))
        rows = trial.read_journal(self._folder(trial_id))
        return "failed" if failed else "finished" if rows and rows[-1].step >= config.train.steps else "stopped_early"

    def _settle(self, trial_id: str, *, failed: bool) -> None:
        """Log all that the trial's folder holds and close its child run; may be repeated."""
        run_id, folder = self._child(trial_id), self._folder(trial_id)
        rows = trial.read_journal(folder)
        self._tracker.log_measurements(run_id, rows)
        for file in (folder / "config.yaml", folder / "loss.png"):
            if file.exists():
                self._tracker.log_artifact(run_id, file)
        best = trial.read_checkpoint(folder / "best")
        if best is not None:
            if not self._spec.keep.members:
                self._tracker.log_artifact(run_id, folder / "best", CHECKPOINT_FOLDER)
            summary = {f"best_{key}": value for key, value in best.metrics.items() if key == "train_loss" or key.startswith("val_")}
            self._tracker.log_summary(run_id, best.step, summary | trial.size_of(folder / "best"))
        last_step = rows[-1].step if rows else 0
        state = self._final_state(trial_id, failed=failed)
        tags = {STATE_TAG: state, STOPPED_TAG: str(state == "stopped_early").lower(), "last_step": str(last_step)}
        if rows and trial.SECONDS in rows[-1].metrics:
            tags["wall_time_s"] = f"{rows[-1].metrics[trial.SECONDS]:.1f}"
        if failed:
            tags["error"] = trial.read_fault(folder)
            log.warning("trial %s failed: %s", trial_id, tags["error"])
        self._tracker.set_tags(run_id, tags)
        self._tracker.end(run_id, "FAILED" if failed else "FINISHED")
        self._settled.add(trial_id)
        self._tidy(folder, state)

    def _tidy(self, folder: Path, state: State) -> None:
        """Remove what the specification does not keep: the state of a trial that has ended, and all but the best checkpoints."""
        keep = self._spec.keep
        if not keep.states and state != "failed":
            shutil.rmtree(folder / "last", ignore_errors=True)
        if keep.members is None:
            return
        sign, metric = (1 if self._spec.direction == "min" else -1), self._spec.metric
        scores = {}
        for other in (self._folder(one) for one in self._settled):
            best = trial.read_checkpoint(other / "best")
            if best is not None:
                score = sign * best.metrics.get(metric, math.nan)
                scores[other] = score if math.isfinite(score) else math.inf
        for other in sorted(scores, key=lambda one: (scores[one], one.name))[keep.members :]:
            shutil.rmtree(other / "best")
            self._tracker.set_tags(self._child(other.name), {DROPPED_TAG: "true"})

    def _trials(self) -> list[TrialResult]:
        return sorted(
            (self._trial_result(child) for child in self._tracker.children(self.parent)), key=lambda child: child.trial_id
        )

    def _trial_result(self, child: RunRecord) -> TrialResult:
        best = {key.removeprefix("best_"): value for key, value in child.metrics.items() if key.startswith("best_")}
        tags = child.tags
        return TrialResult(
            trial_id=tags[TRIAL_TAG],
            run_id=child.run_id,
            state=cast(State, tags[STATE_TAG]),
            step=int(tags.get("last_step", 0)),
            values=json.loads(tags["drawn"]),
            best=best,
            folder=self._folder(tags[TRIAL_TAG]),
            error=tags.get("error"),
        )

    def _usable(self, trials: Sequence[TrialResult]) -> list[TrialResult]:
        """Trials with a checkpoint and a finite metric, best first."""
        sign, metric = (1 if self._spec.direction == "min" else -1), self._spec.metric
        good = [one for one in trials if one.state != "failed" and math.isfinite(one.best.get(metric, math.nan))]
        return sorted(good, key=lambda one: sign * one.best[metric])

    def _folder(self, trial_id: str) -> Path:
        return self._out / "trials" / trial_id

    def _tell(self, trial_id: str, state: State) -> None:
        if self._progress is None:
            return
        folder = self._folder(trial_id)
        config, drawn = trial.read_prepared(folder)
        rows = trial.read_journal(folder)
        step, metrics = (rows[-1].step, rows[-1].metrics) if rows else (0, {})
        self._progress(TrialProgress(trial_id, state, step, config.train.steps, drawn, metrics))


@contextlib.contextmanager
def _deferred(subject: str) -> Iterator[None]:
    """While trials run, a store that cannot be reached is only told: the trial folders keep what could not be written."""
    try:
        yield
    except TrainingError as error:
        log.warning("%s not recorded yet: %s", subject, error)


def _dataset_tags(config: TrainingConfig) -> dict[str, str]:
    description = config.data.path / "dataset.yaml"
    tags = {"dataset": config.data.path.name, "dataset_digest": "unknown", "dataset_fraction": f"{config.data.fraction:g}"}
    if description.exists():
        data = config.data
        images = len(open_dataset(data.path).records("train", fraction=data.fraction, partition=data.partition))
        digest = hashlib.sha256(description.read_bytes()).hexdigest()[:12]
        tags |= {"dataset_digest": digest, "training_images": str(images)}
    return tags
