"""Run a sweep: Ray Tune trains the trials, `deepdisc_ops.sweeps.record` keeps their records in MLflow.

Results folder: sweep.yaml and spec.yaml (what was asked, how far it got), trials/<id>/, ray/ (Ray's own state), and mlflow.db
with artifacts/ unless another tracking store is named.
"""

from __future__ import annotations

import hashlib
import logging
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from ray import tune

from deepdisc_ops import config as settings
from deepdisc_ops.config import Settings
from deepdisc_ops.errors import ConfigError, Requeue
from deepdisc_ops.sweeps import search, space, trial
from deepdisc_ops.sweeps.record import Progress, Recorder, SweepResult
from deepdisc_ops.sweeps.session import NodeWatch, interruptible, ray_session
from deepdisc_ops.sweeps.space import SweepSpec
from deepdisc_ops.tracking import Tracker, default_uri

log = logging.getLogger(__name__)

RAY_STARTS = 3
"""Of this machine's own Ray, should it lose its node; each goes on where the last one ended."""


class Manifest(Settings):
    """``sweep.yaml``: what a results folder belongs to."""

    sweep_id: str
    name: str
    spec_digest: str
    tracking_uri: str
    finished: bool = False


def run_sweep(
    spec: SweepSpec,
    out: Path,
    *,
    tracking_uri: str | None = None,
    ray_address: str | None = None,
    progress: Progress | None = None,
    train: trial.Train | None = None,
) -> SweepResult:
    """Run all trials of ``spec``, or continue them if ``out`` holds this sweep unfinished; a finished one is returned as it is.

    Without ``ray_address`` Ray runs on this machine alone; a cluster's nodes must see ``out`` and the data under the same
    paths. ``train`` is an importable function with the signature of `deepdisc_ops.training.loop.train`, the default. SIGTERM,
    SIGUSR1 and SIGINT end the sweep in order: trials stop at their last checkpoint, runs are closed as KILLED, and `Requeue`
    is raised, or SystemExit for SIGINT; the same call then resumes, as it does after any crash. Raises ConfigError for a folder
    that holds another sweep, TrainingError if no trial is usable. This machine's own Ray is started again if it dies.
    """
    out = out.absolute()
    if train is None:
        train = _default_train(spec)
    manifest = _open_manifest(spec, out, tracking_uri)
    recorder = Recorder(Tracker(manifest.tracking_uri), spec, manifest.sweep_id, out, progress)
    if manifest.finished:
        log.info("sweep %s in %s is already finished", spec.name, out)
        return recorder.close()
    try:
        with interruptible() as signals:
            for _ in range(1 if ray_address else RAY_STARTS):
                with ray_session(spec.resources, ray_address), _listening(manifest.sweep_id, recorder) as nodes:
                    failed = _fit(spec, out, manifest.sweep_id, train, again=recorder.lost())
                if signals or not nodes.lost:
                    break
        if signal.SIGINT in signals:
            raise SystemExit(128 + signal.SIGINT)
        if nodes.lost and failed is None and not signals:
            raise Requeue(f"sweep {spec.name} has lost the nodes of Ray; everything is saved in {out}, the same command goes on")
        if signals or failed is None:
            raise Requeue(f"sweep {spec.name} was told to stop; everything is saved in {out}, the same command goes on from there")
    except BaseException:
        recorder.close_interrupted()
        raise
    result = recorder.close(failed)
    _write_manifest(out, manifest.model_copy(update={"finished": True}))
    return result


class Forwarder(tune.Callback):  # type: ignore[misc]  # ray is untyped
    """Hands Ray's events to the recorder of a sweep.

    Ray pickles its callbacks into the sweep's state, so this one holds the sweep's id and not the recorder.
    """

    def __init__(self, sweep_id: str) -> None:
        """Events of the sweep ``sweep_id`` only."""
        self._sweep_id = sweep_id

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Once more around the loop."""
        _NODES[self._sweep_id].look()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial begins or continues."""
        _RECORDERS[self._sweep_id].started(trial.trial_id, trial.config)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """A trial has reported."""
        _RECORDERS[self._sweep_id].measured(trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has come to its end or was stopped by the scheduler."""
        _RECORDERS[self._sweep_id].ended(trial.trial_id, failed=False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed for good."""
        _RECORDERS[self._sweep_id].ended(trial.trial_id, failed=True)


_RECORDERS: dict[str, Recorder] = {}
"""Recorders of the running sweeps, by sweep id."""
_NODES: dict[str, NodeWatch] = {}
"""Who looks whether they still have nodes."""


@contextmanager
def _listening(sweep_id: str, recorder: Recorder) -> Iterator[NodeWatch]:
    _RECORDERS[sweep_id], _NODES[sweep_id] = recorder, NodeWatch()
    try:
        yield _NODES[sweep_id]
    finally:
        del _RECORDERS[sweep_id], _NODES[sweep_id]


def _fit(spec: SweepSpec, out: Path, sweep_id: str, train: trial.Train, *, again: bool) -> set[str] | None:
    """Let Ray run the trials that are not finished; the ids of those that failed, or None if it was told to stop.

    With ``again``, trials that failed are tried once more.
    """
    trainable = tune.with_resources(trial.run_trial, {"cpu": spec.resources.cpus, "gpu": spec.resources.gpus})
    state = str(out / "ray")
    if tune.Tuner.can_restore(state):
        log.info("continuing the sweep in %s", out)
        tuner = tune.Tuner.restore(state, trainable, resume_unfinished=True, resume_errored=again)
    else:
        plan = trial.plan_of(spec, out / "trials", train)
        tuner = tune.Tuner(
            trainable,
            param_space={trial.PLAN: plan} | search.space_of(spec),
            tune_config=_tune_config(spec),
            run_config=tune.RunConfig(
                name="ray",
                storage_path=str(out),
                verbose=0,
                callbacks=[Forwarder(sweep_id)],
                failure_config=tune.FailureConfig(max_failures=spec.retries),
                stop={"time_total_s": spec.trial_time_limit_s} if spec.trial_time_limit_s else None,
            ),
        )
    results = tuner.fit()
    if results.num_errors + results.num_terminated < len(results):
        return None
    return {Path(results[i].path).name for i in range(len(results)) if results[i].error}


def _tune_config(spec: SweepSpec) -> tune.TuneConfig:
    return tune.TuneConfig(
        metric=spec.metric,
        mode=spec.direction,
        num_samples=spec.trials if spec.search == "optuna" else 1,
        search_alg=search.algorithm_of(spec),
        scheduler=search.scheduler_of(spec),
        time_budget_s=spec.time_limit_s,
        trial_name_creator=_trial_id,
        trial_dirname_creator=_trial_id,
        reuse_actors=True,
    )


def _trial_id(ray_trial: Any) -> str:
    return str(ray_trial.trial_id)


def _default_train(spec: SweepSpec) -> trial.Train:
    """The real training loop, once every dataset that the sweep names could be opened."""
    from deepdisc_ops.data.store import open_dataset
    from deepdisc_ops.training.loop import train

    for path in {config.data.path for config in space.corner_configs(spec)}:
        open_dataset(path)
    return train


def _open_manifest(spec: SweepSpec, out: Path, tracking_uri: str | None) -> Manifest:
    """The manifest of a new or a continued sweep; a folder belongs to one specification for good."""
    path = out / "sweep.yaml"
    digest = hashlib.sha256(space.dump(spec).encode()).hexdigest()
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        sweep_id = f"{spec.name}-{uuid.uuid4().hex[:8]}"
        manifest = Manifest(sweep_id=sweep_id, name=spec.name, spec_digest=digest, tracking_uri=tracking_uri or default_uri(out))
        _write_manifest(out, manifest)
        return manifest
    manifest = settings.load(path, schema=Manifest)
    if manifest.spec_digest != digest:
        raise ConfigError(
            f"{out} holds sweep {manifest.name!r} with another specification; choose another folder, or run {out / 'spec.yaml'}"
        )
    if tracking_uri not in (None, manifest.tracking_uri):
        raise ConfigError(
            f"the sweep in {out} is recorded in {manifest.tracking_uri}, not {tracking_uri}; continue with the former"
        )
    return manifest


def _write_manifest(out: Path, manifest: Manifest) -> None:
    trial.write_atomically(out / "sweep.yaml", yaml.safe_dump(manifest.model_dump(), sort_keys=False))
