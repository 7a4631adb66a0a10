"""Numbers to watch: what the workers tell TorchServe, which adds its own and gives all of them to Prometheus.

A worker writes one line for each value to its log, TorchServe reads it there, and forgets what its configuration does not name:
the names below are in `render_metrics_config`, and monitoring/ (a Grafana dashboard and alert rules) uses no others. Seconds are
emitted as such, since TorchServe's histograms have fixed buckets from 0.005 to 10. No value has a dimension that grows without
end: statuses, stages and workers are few.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml

MONITORING = Path(__file__).with_name("monitoring")
"""Folder of dashboard.json and alerts.yaml."""

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Metric:
    """A number that is emitted: its name there, kind, unit, dimensions (labels of Prometheus), and what it means."""

    name: str
    kind: Kind
    unit: str
    dimensions: tuple[str, ...]
    meaning: str

    @property
    def series(self) -> tuple[str, ...]:
        """Names that Prometheus knows it by: histograms have three. TorchServe adds no _total to counters."""
        if self.kind == "histogram":
            return tuple(f"{self.name}_{part}" for part in ("bucket", "count", "sum"))
        return (self.name,)


REQUESTS = Metric("deepdisc_requests_total", "counter", "Count", ("status",), "requests a worker answered, by HTTP status")
OBJECTS = Metric("deepdisc_objects_total", "counter", "Count", (), "objects in the replies")
MEGAPIXELS = Metric("deepdisc_megapixels_total", "counter", "Count", (), "pixels asked about, millions")
STAGE_SECONDS = Metric("deepdisc_stage_seconds_total", "counter", "Count", ("stage",), "seconds spent in each stage of a request")
REQUEST_SECONDS = Metric("deepdisc_request_seconds", "histogram", "Count", (), "seconds of a request in the worker")
STARTS = Metric("deepdisc_worker_starts_total", "counter", "Count", ("worker",), "times a worker became ready")
MEMBERS = Metric("deepdisc_members", "gauge", "Count", ("worker",), "members that a worker asks")
MEMBERS_LEFT_OUT = Metric("deepdisc_members_left_out", "gauge", "Count", ("worker",), "members that failed and are left out")
RESIDENT = Metric("deepdisc_resident_bytes", "gauge", "Count", ("worker",), "resident memory of a worker after a request")
MODEL = Metric("deepdisc_model", "gauge", "Count", ("version", "package"), "1 for the ensemble that is served")

OWN = (REQUESTS, OBJECTS, MEGAPIXELS, STAGE_SECONDS, REQUEST_SECONDS, STARTS, MEMBERS, MEMBERS_LEFT_OUT, RESIDENT, MODEL)
"""What the workers emit."""

_OF_HOST, _OF_MODEL = ("Level", "Hostname"), ("model_name", "model_version", "hostname")
TORCHSERVE = (
    *(Metric(f"Requests{family}XX", "counter", "Count", _OF_HOST, f"replies with a status of {family}xx") for family in (2, 4, 5)),
    Metric("ts_inference_requests_total", "counter", "Count", _OF_MODEL, "requests that reached the model's queue"),
    Metric("ts_inference_latency_microseconds", "counter", "Microseconds", _OF_MODEL, "time of requests from queue to reply"),
    Metric("ts_queue_latency_microseconds", "counter", "Microseconds", _OF_MODEL, "time of requests in the queue"),
    Metric("QueueTime", "gauge", "Milliseconds", _OF_HOST, "time of the latest request in the queue"),
    Metric("WorkerThreadTime", "gauge", "Milliseconds", _OF_HOST, "time of the latest request between server and worker"),
    Metric("WorkerLoadTime", "gauge", "Milliseconds", ("WorkerName", *_OF_HOST), "time in which a worker became ready"),
)
"""What TorchServe's front end emits, of all that it could."""
_OF_WORKER = (Metric("PredictionTime", "gauge", "ms", ("ModelName", "Level"), "time of the latest call of the handler"),)
"""What TorchServe's part of a worker emits."""


def render_metrics_config() -> str:
    """TorchServe's metrics configuration (``metrics_config`` in config.properties), YAML."""
    tree = {"ts_metrics": _by_kind(TORCHSERVE), "model_metrics": _by_kind([*OWN, *_OF_WORKER])}
    return yaml.safe_dump(tree, sort_keys=False)


class Metrics:
    """Tells TorchServe what a worker did, by the cache of metrics that its context holds; without one it tells nobody."""

    def __init__(self, cache: Any, arguments: Sequence[str] | None = None) -> None:
        self._cache = cache
        self._worker = worker_name(sys.argv if arguments is None else arguments)

    def request(
        self, *, status: int, objects: int = 0, megapixels: float = 0.0, seconds: Mapping[str, float] | None = None
    ) -> None:
        """Count a request that was answered with ``status``; ``seconds`` are those of its stages, which add up to all of it."""
        self._emit(REQUESTS, 1, str(status))
        self._emit(OBJECTS, objects)
        self._emit(MEGAPIXELS, megapixels)
        for stage, duration in (seconds or {}).items():
            self._emit(STAGE_SECONDS, duration, stage)
        if seconds:
            self._emit(REQUEST_SECONDS, sum(seconds.values()))
        self._emit(RESIDENT, resident_bytes(), self._worker)

    def ready(self, *, version: str, package: str, members: int) -> None:
        """Tell that this worker became ready, with so many members."""
        self._emit(STARTS, 1, self._worker)
        self._emit(MODEL, 1, version, package)
        self.members(members, 0)

    def members(self, asked: int, left_out: int) -> None:
        """Tell how many members are asked and how many failed and are left out."""
        self._emit(MEMBERS, asked, self._worker)
        self._emit(MEMBERS_LEFT_OUT, left_out, self._worker)

    def _emit(self, metric: Metric, value: float, *dimensions: str) -> None:
        if self._cache is None:
            return
        from ts.metrics.metric_cache_errors import MetricsCacheKeyError
        from ts.metrics.metric_type_enum import MetricTypes

        kind = MetricTypes(metric.kind)
        try:
            series = self._cache.get_metric(metric.name, kind)
        except MetricsCacheKeyError:  # another configuration; TorchServe will not pass it on, but its log has it
            series = self._cache.add_metric_to_cache(metric.name, metric.unit, list(metric.dimensions), kind)
        series.add_or_update(_plain(value), [_label(text) for text in dimensions])


def worker_name(arguments: Sequence[str]) -> str:
    """What tells this worker from its neighbours, and is the same when it is started again: the number of its socket."""
    for option, value in pairwise(arguments):
        if option in ("--sock-name", "--port"):
            return value.rpartition(".")[2]
    return str(os.getpid())


def resident_bytes() -> int:
    """Memory of this process, or 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def names(metrics: Iterable[Metric] = (*OWN, *TORCHSERVE, *_OF_WORKER)) -> set[str]:
    """Names of all series in Prometheus."""
    return {name for metric in metrics for name in metric.series}


def _by_kind(metrics: Iterable[Metric]) -> dict[str, list[dict[str, Any]]]:
    tree: dict[str, list[dict[str, Any]]] = {}
    for metric in metrics:
        entry = {"name": metric.name, "unit": metric.unit, "dimensions": list(metric.dimensions)}
        tree.setdefault(metric.kind, []).append(entry)
    return tree


def _plain(value: float) -> float:
    """A value as TorchServe's pattern reads it, which knows no exponents with a sign above 0."""
    return value if isinstance(value, int) else round(float(value), 6)


def _label(text: str) -> str:
    """A value of a dimension without what separates them in TorchServe's lines."""
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", text) or "_"
