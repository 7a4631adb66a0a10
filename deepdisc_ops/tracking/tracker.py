"""The runs of one experiment: written by whoever trains, read by whoever compares."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from deepdisc_ops import __version__
from deepdisc_ops.errors import ConfigError, TrainingError
from deepdisc_ops.resources import git_commit
from deepdisc_ops.tracking import registry
from deepdisc_ops.tracking.registry import RegisteredMember, quoted
from deepdisc_ops.tracking.store import artifact_location, connect, local_artifacts, reported

EXPERIMENT = "deepdisc_ops"
Status = Literal["FINISHED", "FAILED", "KILLED"]
PARENT_TAG = "mlflow.parentRunId"
SWEEP_TAG, SWEEP_NAME_TAG, TRIAL_TAG = "deepdisc_ops.sweep", "deepdisc_ops.sweep_name", "deepdisc_ops.trial"
KIND_TAG, STATE_TAG, STOPPED_TAG = "deepdisc_ops.kind", "deepdisc_ops.state", "stopped_early"
CHECKPOINT_FOLDER = "checkpoint"
"""Artifact folder of a run that holds its best checkpoint."""
PACKAGES = ("torch", "torchvision", "sal-detectron2", "ray", "mlflow", "numpy")
METRICS_PER_CALL, PARAMS_PER_CALL, TAGS_PER_CALL, PARAM_LENGTH = 1000, 100, 100, 6000
"""Limits of one ``log_batch`` call and of one parameter's text."""


@dataclass(frozen=True)
class Measurement:
    """Metrics of one training step, taken at ``time_s`` (seconds since 1970)."""

    step: int
    time_s: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RunRecord:
    """A run as the store holds it; ``metrics`` are the latest values."""

    run_id: str
    name: str
    status: str
    metrics: Mapping[str, float]
    params: Mapping[str, str]
    tags: Mapping[str, str]


@cache
def provenance() -> dict[str, str]:
    """Tags that say which code ran: package versions and, in a checkout, the git commit."""
    tags = {"deepdisc_ops.version": __version__, "mlflow.source.git.commit": git_commit() or "unknown"}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            tags[f"version.{package}"] = importlib.metadata.version(package)
    return tags


class Tracker:
    """Writes to and reads from one experiment of a tracking store; the store is made and migrated on entry.

    ``client`` is MLflow's own, for the modules of this room.
    """

    def __init__(self, uri: str, experiment: str = EXPERIMENT, *, create: bool = True) -> None:
        """``uri`` is sqlite:///PATH or a server's address; artifacts of a sqlite store lie beside it in ``artifacts``.

        With ``create=False`` nothing is made: ConfigError where the store or the experiment is missing.
        """
        self.uri = uri
        self.client = connect(uri, create=create)
        self._last_step: dict[str, int] = {}
        with reported(f"open experiment {experiment}"):
            found = self.client.get_experiment_by_name(experiment)
            if not found and not create:
                raise ConfigError(f"tracking store {uri} holds no experiment {experiment}; name the store of a sweep")
            self.experiment_id = found.experiment_id if found else self.client.create_experiment(experiment, artifact_location(uri))

    def find_or_create(
        self, name: str, identity: tuple[str, str], *, parent: str | None = None, tags: Mapping[str, str] | None = None
    ) -> str:
        """Id of the run that carries the tag ``identity`` (key, value), running again; a new run when there is none."""
        key, value = identity
        wanted = {key: value, **({PARENT_TAG: parent} if parent else {})}
        with reported(f"open run {name}"):
            found = self.client.search_runs([self.experiment_id], _having(wanted), max_results=1)
            if found:
                self.client.update_run(found[0].info.run_id, status="RUNNING")
                return str(found[0].info.run_id)
            all_tags = {**provenance(), **(tags or {}), **wanted}
            return str(self.client.create_run(self.experiment_id, tags=all_tags, run_name=name).info.run_id)

    def log_measurements(self, run_id: str, rows: Iterable[Measurement]) -> int:
        """Log the rows whose step is beyond the run's last one; returns how many were new.

        As many rows as fit go into one call, each whole: the store writes a call wholly or not at all, so that an interruption
        leaves no step with some of its metrics.
        """
        from mlflow.entities import Metric

        with reported("log metrics"):
            if run_id not in self._last_step:
                self._last_step[run_id] = self._read_last_step(run_id)
            last = self._last_step[run_id]
            new = sorted({row.step: row for row in rows if row.step > last}.values(), key=lambda row: row.step)
            per_call = max(1, METRICS_PER_CALL // max((len(row.metrics) for row in new), default=1))
            for batch in batches(new, per_call):
                metrics = [
                    Metric(key, float(value), int(row.time_s * 1000), row.step)
                    for row in batch
                    for key, value in row.metrics.items()
                ]
                self.client.log_batch(run_id, metrics=metrics)
                self._last_step[run_id] = batch[-1].step
        return len(new)

    def log_summary(self, run_id: str, step: int, metrics: Mapping[str, float]) -> None:
        """Log figures about the run as a whole, such as those of its best checkpoint; the same ones once only."""
        from mlflow.entities import Metric

        with reported("log metrics"):
            known = _record(self.client.get_run(run_id)).metrics
            now = int(time.time() * 1000)
            new = [
                Metric(key, float(value), now, step) for key, value in metrics.items() if not _same(known.get(key), float(value))
            ]
            for batch in batches(new, METRICS_PER_CALL):
                self.client.log_batch(run_id, metrics=batch)

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Log settings; logging the same ones again is allowed."""
        from mlflow.entities import Param

        with reported("log parameters"):
            entities = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in params.items()]
            for batch in batches(entities, PARAMS_PER_CALL):
                self.client.log_batch(run_id, params=batch)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags, replacing those of the same keys."""
        from mlflow.entities import RunTag

        with reported("set tags"):
            for batch in batches([RunTag(key, str(value)) for key, value in tags.items()], TAGS_PER_CALL):
                self.client.log_batch(run_id, tags=batch)

    def log_dataset(self, run_id: str, name: str, digest: str, path: Path, fraction: float) -> None:
        """Say which dataset, and which share of it, the run was trained on."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        tags = [InputTag("mlflow.data.context", "training"), InputTag("fraction", f"{fraction:g}")]
        dataset = Dataset(name=name, digest=digest, source_type="local", source=json.dumps({"uri": str(path)}))
        with reported("log the dataset"):
            self.client.log_inputs(run_id, [DatasetInput(dataset, tags)])

    def log_artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Copy a file, or all files of a folder, into ``folder`` of the run's artifacts."""
        with reported(f"store {path}"):
            if path.is_dir():
                self.client.log_artifacts(run_id, str(path), folder)
            else:
                self.client.log_artifact(run_id, str(path), folder)

    def end(self, run_id: str, status: Status = "FINISHED") -> None:
        """Close a run."""
        with reported("close a run"):
            self.client.set_terminated(run_id, status)

    def record(self, run_id: str) -> RunRecord:
        """One run as it is stored."""
        with reported(f"read run {run_id}"):
            return _record(self.client.get_run(run_id))

    def runs(self, tags: Mapping[str, str]) -> list[RunRecord]:
        """All runs that carry the tags, newest first."""
        with reported("search runs"):
            order = ["attributes.start_time DESC"]
            found = registry.pages(self.client.search_runs, [self.experiment_id], _having(tags), order_by=order)
            return [_record(run) for run in found]

    def children(self, parent: str) -> list[RunRecord]:
        """All runs nested in ``parent``."""
        return self.runs({PARENT_TAG: parent})

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, in the order of the steps."""
        with reported(f"read {metric}"):
            return sorted((entry.step, _value(entry.value)) for entry in self.client.get_metric_history(run_id, metric))

    def artifacts(self, run_id: str, folder: str | None = None) -> list[str]:
        """Paths of the run's artifacts, of one level."""
        with reported("list artifacts"):
            return sorted(entry.path for entry in self.client.list_artifacts(run_id, folder))

    def fetch(self, run_id: str, path: str, into: Path) -> Path:
        """A local path of an artifact: where it lies in a store on this machine, otherwise a copy in ``into``."""
        with reported(f"fetch {path}"):
            root = local_artifacts(self.uri, self.client.get_run(run_id))
            if root:
                return root / path
            into.mkdir(parents=True, exist_ok=True)
            return Path(self.client.download_artifacts(run_id, path, str(into)))

    def register(self, name: str, run_id: str, aliases: Sequence[str] = ()) -> RegisteredMember:
        """Register the checkpoint of a run as a version of model ``name`` and point ``aliases`` at it.

        A run that is registered already keeps its version. An alias names one version of a model and moves here from another.
        """
        registry.check_names(name, aliases)
        with reported(f"register run {run_id}"):
            run = self.client.get_run(run_id)
            if not self.client.list_artifacts(run_id, CHECKPOINT_FOLDER):
                raise TrainingError(f"run {run_id} has no checkpoint to register; take a trial that left one")
            source = f"{run.info.artifact_uri}/{CHECKPOINT_FOLDER}"
            version = registry.find_or_create_version(self.client, name, run_id, source)
            for alias in aliases:
                self.client.set_registered_model_alias(name, alias, str(version))
        return next(one for one in self.registered(name) if one.version == version)

    def registered(self, name: str) -> list[RegisteredMember]:
        """All versions of model ``name``, oldest first; none when it is not registered."""
        with reported(f"read model {name}"):
            return registry.members(self.client, name)

    def _read_last_step(self, run_id: str) -> int:
        """The largest step among the metrics of the loop; -1 for a run without any."""
        latest = self.client.get_run(run_id).data.to_proto().metrics
        return max((metric.step for metric in latest if not is_summary(metric.key)), default=-1)


def is_summary(metric: str) -> bool:
    """Whether a metric is about the run as a whole (`Tracker.log_summary`) and no part of its history."""
    return metric.startswith("best_") or metric == "parameters"


def _having(tags: Mapping[str, str]) -> str:
    """MLflow's filter for runs that carry all of the tags."""
    return " and ".join(f"tags.`{key}` = {quoted(value)}" for key, value in tags.items())


def _record(run: Any) -> RunRecord:
    info, data = run.info, run.data
    metrics = {key: _value(value) for key, value in data.metrics.items()}
    return RunRecord(info.run_id, info.run_name, info.status, metrics, dict(data.params), dict(data.tags))


def _same(known: float | None, value: float) -> bool:
    return known == value or (known is not None and math.isnan(known) and math.isnan(value))


def _value(stored: float) -> float:
    """A metric as it was logged: sql stores keep infinity as the largest float."""
    return math.copysign(math.inf, stored) if abs(stored) == sys.float_info.max else stored


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """The items in order, at most ``size`` at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
