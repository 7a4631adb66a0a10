"""What Ray is told of a specification: which values come next, and which trials end early or change."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining
from ray.tune.search import BasicVariantGenerator

from deepdisc_ops.sweeps import space
from deepdisc_ops.sweeps.ranges import Axis, ordered
from deepdisc_ops.sweeps.space import SweepSpec
from deepdisc_ops.sweeps.trial import VALUES


def space_of(spec: SweepSpec) -> dict[str, Any]:
    """The drawn part of Ray's parameter space: a list of all points, drawn beforehand, or nothing where Optuna asks."""
    return {} if spec.search == "optuna" else {VALUES: tune.grid_search(space.points(spec))}


def algorithm_of(spec: SweepSpec) -> Any:
    """Ray's search algorithm."""
    if spec.search == "random":
        return BasicVariantGenerator(max_concurrent=spec.concurrency or 0)
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    searcher = OptunaSearch(space=partial(_suggest, spec), metric=spec.metric, mode=spec.direction, seed=spec.seed)
    return ConcurrencyLimiter(searcher, spec.concurrency) if spec.concurrency else searcher


def scheduler_of(spec: SweepSpec) -> Any:
    """Ray's scheduler."""
    settings = spec.scheduler
    if settings.name == "asha":
        # One step beyond the longest training: the last report then returns, and training ends by itself.
        return ASHAScheduler(
            time_attr="step",
            max_t=space.longest_training(spec) + 1,
            grace_period=settings.grace_steps,
            reduction_factor=settings.reduction_factor,
        )
    if settings.name == "pbt":
        drawn = {key: axis for key, axis in spec.space.items() if axis.kind != "grid"}
        return PopulationBasedTraining(
            time_attr="step",
            perturbation_interval=settings.interval_steps,
            burn_in_period=settings.interval_steps,
            quantile_fraction=settings.quantile,
            hyperparam_mutations={VALUES: {key: _domain(axis) for key, axis in drawn.items()}},
            custom_explore_fn=partial(_inside, drawn),
        )
    return FIFOScheduler()


def _suggest(spec: SweepSpec, trial: Any) -> None:
    """Ask an Optuna trial for the value of every range that counts."""
    chosen: dict[str, Any] = {}
    for key in ordered(spec.space):
        axis = spec.space[key]
        if axis.counts(chosen):
            chosen[key] = _asked(axis, f"{VALUES}/{key}", trial)


def _asked(axis: Axis, name: str, trial: Any) -> Any:
    if axis.kind == "choice":
        return trial.suggest_categorical(name, list(axis.values))
    if axis.kind == "randint":
        return trial.suggest_int(name, axis.values[0], axis.values[1] - 1)
    return trial.suggest_float(name, *axis.values, log=axis.kind == "loguniform")


def _domain(axis: Axis) -> Any:
    makers = {"uniform": tune.uniform, "loguniform": tune.loguniform, "randint": tune.randint}
    return tune.choice(list(axis.values)) if axis.kind == "choice" else makers[axis.kind](*axis.values)


def _inside(drawn: Mapping[str, Axis], config: dict[str, Any]) -> dict[str, Any]:
    """A changed config with numbers put back into their ranges: a population perturbs them by a fifth, whatever the range."""
    values = dict(config[VALUES])
    for key, axis in drawn.items():
        if key in values and axis.kind != "choice":
            low, high = min(axis.extremes), max(axis.extremes)
            values[key] = min(max(values[key], low), high)
    return {**config, VALUES: values}
