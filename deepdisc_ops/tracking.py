"""Records of training runs in MLflow; the only module that uses it.

One process writes: the driver of a sweep, or the ``train`` command. That keeps a sqlite store free of races (two processes
that open a fresh one both try to migrate it) and trials free of MLflow's start-up and latency. Runs are found again by a tag,
so that a resumed sweep continues them; steps a run already holds are skipped, so that they increase strictly.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import math
import os
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

log = logging.getLogger(__name__)

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


def default_uri(out: Path) -> str:
    """The sqlite store of a results folder."""
    return f"sqlite:///{out.absolute() / 'mlflow.db'}"


@cache
def provenance() -> dict[str, str]:
    """Tags that say which code ran: package versions and, in a checkout, the git commit."""
    tags = {"deepdisc_ops.version": __version__, "mlflow.source.git.commit": git_commit() or "unknown"}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            tags[f"version.{package}"] = importlib.metadata.version(package)
    return tags


class Tracker:
    """Writes to and reads from one experiment of a tracking store; the store is made and migrated on entry."""

    def __init__(self, uri: str, experiment: str = EXPERIMENT) -> None:
        """``uri`` is sqlite:///PATH or a server's address; artifacts of a sqlite store lie beside it in ``artifacts``."""
        self.uri = uri
        self._client = _connect(uri)
        self._last_step: dict[str, int] = {}
        with _reported(f"open experiment {experiment}"):
            found = self._client.get_experiment_by_name(experiment)
            self.experiment_id = (
                found.experiment_id if found else self._client.create_experiment(experiment, _artifact_location(uri))
            )

    def find_or_create(
        self, name: str, identity: tuple[str, str], *, parent: str | None = None, tags: Mapping[str, str] | None = None
    ) -> str:
        """Id of the run that carries the tag ``identity`` (key, value), running again; a new run when there is none."""
        key, value = identity
        clauses = [f"tags.`{key}` = '{value}'"] + ([f"tags.`{PARENT_TAG}` = '{parent}'"] if parent else [])
        with _reported(f"open run {name}"):
            found = self._client.search_runs([self.experiment_id], " and ".join(clauses), max_results=1)
            if found:
                self._client.update_run(found[0].info.run_id, status="RUNNING")
                return str(found[0].info.run_id)
            all_tags = {**provenance(), **(tags or {}), key: value, **({PARENT_TAG: parent} if parent else {})}
            return str(self._client.create_run(self.experiment_id, tags=all_tags, run_name=name).info.run_id)

    def log_measurements(self, run_id: str, rows: Iterable[Measurement]) -> int:
        """Log the rows whose step is beyond the run's last one, in few calls; returns how many were new."""
        from mlflow.entities import Metric

        with _reported("log metrics"):
            last = self._last_step[run_id] if run_id in self._last_step else self._read_last_step(run_id)
            entities, count = [], 0
            for row in sorted(rows, key=lambda row: row.step):
                if row.step > last:
                    entities += [Metric(key, float(value), int(row.time_s * 1000), row.step) for key, value in row.metrics.items()]
                    last, count = row.step, count + 1
            for batch in _batches(entities, METRICS_PER_CALL):
                self._client.log_batch(run_id, metrics=batch)
            self._last_step[run_id] = last
        return count

    def log_summary(self, run_id: str, step: int, metrics: Mapping[str, float]) -> None:
        """Log figures about the run as a whole, such as those of its best checkpoint; the same ones once only."""
        from mlflow.entities import Metric

        with _reported("log metrics"):
            known = _record(self._client.get_run(run_id)).metrics
            now = int(time.time() * 1000)
            new = [
                Metric(key, float(value), now, step) for key, value in metrics.items() if not _same(known.get(key), float(value))
            ]
            for batch in _batches(new, METRICS_PER_CALL):
                self._client.log_batch(run_id, metrics=batch)

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Log settings; logging the same ones again is allowed."""
        from mlflow.entities import Param

        with _reported("log parameters"):
            entities = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in params.items()]
            for batch in _batches(entities, PARAMS_PER_CALL):
                self._client.log_batch(run_id, params=batch)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags, replacing those of the same keys."""
        from mlflow.entities import RunTag

        with _reported("set tags"):
            for batch in _batches([RunTag(key, str(value)) for key, value in tags.items()], TAGS_PER_CALL):
                self._client.log_batch(run_id, tags=batch)

    def log_dataset(self, run_id: str, name: str, digest: str, path: Path, fraction: float) -> None:
        """Say which dataset, and which share of it, the run was trained on."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        tags = [InputTag("mlflow.data.context", "training"), InputTag("fraction", f"{fraction:g}")]
        dataset = Dataset(name=name, digest=digest, source_type="local", source=json.dumps({"uri": str(path)}))
        with _reported("log the dataset"):
            self._client.log_inputs(run_id, [DatasetInput(dataset, tags)])

    def log_artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Copy a file, or all files of a folder, into ``folder`` of the run's artifacts."""
        with _reported(f"store {path}"):
            if path.is_dir():
                self._client.log_artifacts(run_id, str(path), folder)
            else:
                self._client.log_artifact(run_id, str(path), folder)

    def end(self, run_id: str, status: Status = "FINISHED") -> None:
        """Close a run."""
        with _reported("close a run"):
            self._client.set_terminated(run_id, status)

    def record(self, run_id: str) -> RunRecord:
        """One run as it is stored."""
        with _reported(f"read run {run_id}"):
            return _record(self._client.get_run(run_id))

    def runs(self, tags: Mapping[str, str]) -> list[RunRecord]:
        """All runs that carry the tags, newest first."""
        clauses = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        records: list[RunRecord] = []
        token = None
        with _reported("search runs"):
            while True:
                page = self._client.search_runs(
                    [self.experiment_id], clauses, order_by=["attributes.start_time DESC"], page_token=token
                )
                records += [_record(run) for run in page]
                token = page.token
                if not token:
                    return records

    def children(self, parent: str) -> list[RunRecord]:
        """All runs nested in ``parent``."""
        return self.runs({PARENT_TAG: parent})

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, in the order of the steps."""
        with _reported(f"read {metric}"):
            return sorted((entry.step, _value(entry.value)) for entry in self._client.get_metric_history(run_id, metric))

    def artifacts(self, run_id: str, folder: str | None = None) -> list[str]:
        """Paths of the run's artifacts, of one level."""
        with _reported("list artifacts"):
            return sorted(entry.path for entry in self._client.list_artifacts(run_id, folder))

    def fetch(self, run_id: str, path: str, into: Path) -> Path:
        """A local path of an artifact: where it lies in a store on this machine, otherwise a copy in ``into``."""
        from urllib.parse import unquote, urlsplit

        with _reported(f"fetch {path}"):
            root = urlsplit(self._client.get_run(run_id).info.artifact_uri)
            if root.scheme in ("", "file"):
                return Path(unquote(root.path)) / path
            into.mkdir(parents=True, exist_ok=True)
            return Path(self._client.download_artifacts(run_id, path, str(into)))

    def _read_last_step(self, run_id: str) -> int:
        """The largest step among the metrics of the loop; -1 for a run without any."""
        names = [name for name in self._client.get_run(run_id).data.metrics if not name.startswith("best_")]
        return max((entry.step for name in names for entry in self._client.get_metric_history(run_id, name)), default=-1)


def _connect(uri: str) -> Any:
    """An MLflow client that keeps quiet, sends nothing home, and gives up on a dead server within seconds."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for chatter in ("mlflow.store.db.utils", "mlflow.store.db", "alembic"):
        logging.getLogger(chatter).setLevel(logging.WARNING)
    path = _sqlite_path(uri)
    try:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        remedy = "expected sqlite:///PATH in a writable folder or the address of a running server"
        raise ConfigError(f"tracking store {uri} cannot be opened: {_one_line(error)}; {remedy}") from error
    return client


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _artifact_location(uri: str) -> str | None:
    """Beside a sqlite store; a server decides for itself."""
    path = _sqlite_path(uri)
    return (path.absolute().parent / "artifacts").as_uri() if path else None


def _record(run: Any) -> RunRecord:
    info, data = run.info, run.data
    metrics = {key: _value(value) for key, value in data.metrics.items()}
    return RunRecord(info.run_id, info.run_name, info.status, metrics, dict(data.params), dict(data.tags))


def _same(known: float | None, value: float) -> bool:
    return known == value or (known is not None and math.isnan(known) and math.isnan(value))


def _value(stored: float) -> float:
    """A metric as it was logged: sql stores keep infinity as the largest float."""
    return math.copysign(math.inf, stored) if abs(stored) == sys.float_info.max else stored


@contextlib.contextmanager
def _reported(action: str) -> Iterator[None]:
    """Turn failures of the store, of whatever backend, into one line that names the action."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise TrainingError(f"tracking could not {action}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
