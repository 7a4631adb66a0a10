"""The specification of a sweep: constants, ranges, budget, scheduler, resources.

::

    name: quick
    base:                                  # nested TrainingConfig values, shared by all trials; preset: NAME for the rest
      train: {steps: 1000}
    space:                                 # dotted TrainingConfig keys, one range each
      model.backbone.name: {grid: [tiny, small]}
      train.lr: {loguniform: [1.0e-3, 4.0e-3]}
      train.momentum: {uniform: [0.8, 0.95], when: {train.optimizer: sgd}}
      train.schedule, train.milestones: {grid: [[cosine, [0.5]], [multistep, [0.3, 0.6]]]}   # keys that vary together
    metric: val_nll
    trials: 1                              # draws per point of the grid

`load_spec` reads one and checks all of it, ranges included, against `deepdisc_ops.config` before anything starts.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)

from deepdisc_ops import config as settings
from deepdisc_ops.config import Settings, TrainingConfig
from deepdisc_ops.errors import ConfigError, nearest
from deepdisc_ops.sweeps.ranges import Axis, combinations, order_faults, parts, when_faults

Mode = Literal["min", "max"]
Metric = Literal["train_loss", "val_loss", "val_nll", "val_sigma_iqr", "val_outliers", "val_completeness"]
DIRECTIONS: Mapping[str, Mode] = {
    "train_loss": "min",
    "val_loss": "min",
    "val_nll": "min",
    "val_sigma_iqr": "min",
    "val_outliers": "min",
    "val_completeness": "max",
}
CORNERS = 2048
"""At most so many combinations of extreme values are checked against each other."""
TUNABLE = frozenset(
    {
        *("train.lr", "train.weight_decay", "train.momentum", "train.clip_norm", "model.redshift_head.loss_weight"),
        *("data.augment.blur_px", "data.augment.noise_factor", "data.augment.band_dropout"),
    }
)
"""What may change while a network trains, and so what population based training can vary."""


class Scheduler(Settings):
    """Who decides that a trial ends early or changes: nobody (fifo), successive halving (asha), a population (pbt); in steps."""

    name: Literal["asha", "pbt", "fifo"] = "asha"
    grace_steps: PositiveInt = Field(500, description="asha: no trial is stopped before this step")
    reduction_factor: Annotated[float, Field(gt=1)] = Field(2.0, description="asha: one of so many trials passes each rung")
    interval_steps: PositiveInt = Field(500, description="pbt: steps after which the worst trials go on from the best ones")
    quantile: Annotated[float, Field(gt=0, le=0.5)] = Field(0.25, description="pbt: share of trials that are worst, and best")


class Resources(Settings):
    """What one trial occupies, shared by its ranks; a rank's torch threads are its whole CPUs."""

    cpus: PositiveFloat = 1.0
    gpus: NonNegativeFloat = 0.0


class Keep(Settings):
    """What stays on the disk of trials that have ended."""

    members: PositiveInt | None = Field(None, description="best checkpoints of so many trials; all of them when not given")
    states: bool = Field(False, description="the training states too, three times as large, with which a trial could go on")


class SweepSpec(Settings):
    """A sweep, complete."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=60)]
    base: dict[str, Any] = Field(default_factory=dict)
    space: dict[str, Axis] = Field(default_factory=dict)
    metric: Metric = "val_nll"
    mode: Mode | None = Field(None, description="follows from the metric when not given")
    search: Literal["random", "optuna"] = Field("random", description="random: with grids; optuna: learns from earlier trials")
    trials: PositiveInt = Field(1, description="draws of the random ranges for each point of the grid; optuna: trials in all")
    scheduler: Scheduler = Scheduler()
    resources: Resources = Resources()
    keep: Keep = Keep()
    concurrency: PositiveInt | None = Field(None, description="trials at once; as many as the resources hold when not given")
    time_limit_s: PositiveFloat | None = Field(None, description="the sweep stops its trials after so many seconds")
    trial_time_limit_s: PositiveFloat | None = Field(None, description="each trial is stopped after so many seconds of its own")
    retries: NonNegativeInt = Field(2, description="times a failed trial continues from its last checkpoint; then it is skipped")
    seed: NonNegativeInt = 0

    @field_validator("base", mode="before")
    @classmethod
    def _whole(cls, base: Any) -> Any:
        return settings.with_preset(base) if isinstance(base, dict) else base

    @field_validator("mode")
    @classmethod
    def _right_way(cls, mode: Mode | None, info: Any) -> Mode | None:
        metric = info.data.get("metric")
        if mode and metric and mode != DIRECTIONS[metric]:
            raise ValueError(f"{mode} does not suit {metric}, which is better when {'smaller' if mode == 'max' else 'larger'}")
        return mode

    @property
    def direction(self) -> Mode:
        """Whether a small or a large metric is good."""
        return DIRECTIONS[self.metric]


def load_spec(path: Path, overrides: Iterable[str] = ()) -> SweepSpec:
    """Read a specification from YAML, apply ``a.b=c`` overrides and check it; all faults come in one `ConfigError`."""
    tree = settings.read_yaml(path)
    for text in overrides:
        keys, value = settings.parse_override(text)
        settings.set_by_path(tree, keys, value)
    return parse_spec(tree, str(path))


def parse_spec(tree: Mapping[str, Any], source: str) -> SweepSpec:
    """Build and check a specification from a mapping."""
    faults = []
    try:
        spec = settings.validate(SweepSpec, tree, source)
    except ConfigError as error:
        faults.append(str(error).removeprefix(f"{source}: "))
        spec = _readable_part(tree)
    faults += check(spec)
    if faults:
        raise ConfigError(f"{source}: {'; '.join(faults)}")
    return spec


def dump(spec: SweepSpec) -> str:
    """The specification as YAML that `load_spec` reads back to the same."""
    return yaml.safe_dump(spec.model_dump(mode="json", exclude_none=True), sort_keys=False)


def check(spec: SweepSpec) -> list[str]:
    """Faults of base, ranges and budget against the config models, one line each; an empty list is good."""
    faults = []
    base = spec.base
    try:
        settings.validate(TrainingConfig, base, "base")
    except ConfigError as error:
        if not _complete(spec):
            faults.append(str(error))
            base = {}
    faults += [
        fault for key, axis in spec.space.items() for fault in (*_axis_faults(base, key, axis), *when_faults(spec.space, key))
    ]
    train = base.get("train")
    if any("train.epochs" in parts(key) for key in spec.space) or (isinstance(train, Mapping) and train.get("epochs") is not None):
        faults.append("train.epochs: the scheduler of a sweep counts steps; set train.steps in its place")
    return faults or [*order_faults(spec.space)] or [*_search_faults(spec), *_corner_faults(spec)]


def number_of_trials(spec: SweepSpec) -> int:
    """How many trials the sweep has."""
    return spec.trials if spec.search == "optuna" else len(points(spec))


def points(spec: SweepSpec) -> list[dict[str, Any]]:
    """The values of every trial by dotted key, in the order in which trials start: all points of the grid, then again.

    A draw depends on the seed, its number, its key and the values before it alone; that of a resumed sweep is the same.
    """
    return [
        point
        for number in range(spec.trials)
        for point in combinations(spec.space, lambda key, axis, chosen: _options(spec, number, key, axis, chosen))  # noqa: B023  used at once
    ]


def trial_config(base: Mapping[str, Any], values: Mapping[str, Any]) -> TrainingConfig:
    """The config of one trial: ``base`` with the drawn values set at their dotted keys."""
    return settings.validate(TrainingConfig, _merged(base, values), "trial")


def longest_training(spec: SweepSpec) -> int:
    """The largest number of steps a trial can be asked for."""
    return max(config.train.steps for config in corner_configs(spec))


def corner_configs(spec: SweepSpec) -> Iterator[TrainingConfig]:
    """The configs at combinations of extreme values, at most `CORNERS` of them; among lists of values that is all."""
    return (trial_config(spec.base, values) for values in itertools.islice(_corners(spec), CORNERS))


def expected_share(spec: SweepSpec, trials: int) -> float:
    """The share of its trials' steps that a sweep is expected to take: below one with asha, which stops most of them early.

    Of n trials that reach a rung, n / reduction_factor go on to the next, each rung that factor of steps further; asynchronous
    decisions let some more through.
    """
    if spec.scheduler.name != "asha":
        return 1.0
    steps, eta = longest_training(spec), spec.scheduler.reduction_factor
    rung, left, taken = float(spec.scheduler.grace_steps), float(trials), 0.0
    before = 0.0
    while left > 0:
        here = min(rung, steps)
        taken += left * (here - before)
        if rung >= steps:
            break
        before, rung, left = here, rung * eta, max(left / eta, 1.0)
    return taken / (trials * steps)


def _corners(spec: SweepSpec) -> Iterator[dict[str, Any]]:
    return combinations(spec.space, lambda _key, axis, _chosen: axis.extremes)


def _merged(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    tree = copy.deepcopy(dict(base))
    for key, value in values.items():
        names = parts(key)
        for name, one in zip(names, value if len(names) > 1 else [value], strict=True):
            settings.set_by_path(tree, name.split("."), list(one) if isinstance(one, tuple) else one)
    return tree


def _readable_part(tree: Mapping[str, Any]) -> SweepSpec:
    """What can be read of a faulty specification, so that faults of its ranges are told in the same breath."""
    base, space = tree.get("base"), tree.get("space")
    axes = {}
    for key, axis in space.items() if isinstance(space, dict) else ():
        try:
            axes[str(key)] = Axis.model_validate(axis)
        except ValidationError:
            continue
    return SweepSpec(name="faulty", base=base if isinstance(base, dict) else {}, space=axes, scheduler=Scheduler(name="fifo"))


def _complete(spec: SweepSpec) -> bool:
    """Whether the base, if not good on its own, becomes so with values of the space."""
    try:
        trial_config(spec.base, {key: axis.extremes[0] for key, axis in spec.space.items()})
    except ConfigError:
        return False
    return True


def _options(spec: SweepSpec, number: int, key: str, axis: Axis, chosen: Mapping[str, Any]) -> Sequence[Any]:
    if axis.kind == "grid":
        return axis.values
    return [axis.draw(random.Random(f"{spec.seed} {number} {key} {sorted(chosen.items())}"))]


def _search_faults(spec: SweepSpec) -> Iterator[str]:
    """What the search or the scheduler cannot do with these ranges, and resources that the ranks of a trial exceed."""
    grids = [key for key, axis in spec.space.items() if axis.kind == "grid"]
    if spec.search == "optuna":
        if grids:
            yield f"space: optuna chooses its points itself, and {', '.join(grids)} is a grid; make it a choice, or search: random"
        for key, axis in spec.space.items():
            if axis.kind == "choice" and not all(isinstance(value, str | int | float | bool) for value in axis.values):
                yield f"space.{key}: optuna chooses among numbers and words, not {axis.values[0]!r}; set search: random"
    if not spec.space and spec.search == "optuna":
        yield "space: optuna has nothing to choose; name ranges"
    if spec.scheduler.name == "pbt":
        yield from _population_faults(spec)


def _population_faults(spec: SweepSpec) -> Iterator[str]:
    fixed = [key for key, axis in spec.space.items() if axis.kind != "grid" and key not in TUNABLE]
    drawn = [key for key, axis in spec.space.items() if axis.kind != "grid" and key in TUNABLE]
    if spec.search == "optuna":
        yield "scheduler: pbt changes what optuna chose; set search: random"
    if fixed:
        yield f"space.{fixed[0]}: cannot change while a network trains, as pbt would have it; expected {', '.join(sorted(TUNABLE))}"
    if not drawn:
        yield "scheduler: pbt has nothing to vary; give a range that is no grid, such as train.lr: {loguniform: [1.0e-4, 1.0e-2]}"
    if any(axis.kind == "grid" for axis in spec.space.values()):
        yield "scheduler: pbt copies weights between trials, which a grid makes unlike; set scheduler.name: asha, or drop the grid"
    if number_of_trials(spec) < 2:
        yield "scheduler: pbt needs a population; set trials to 4 or more"


def _axis_faults(base: Mapping[str, Any], key: str, axis: Axis) -> Iterator[str]:
    """Faults that values of one axis have on their own; contradictions between keys are left to the corners."""
    names, known = parts(key), set(_dotted_keys(TrainingConfig))
    unknown = [name for name in names if name not in known]
    for name in unknown:
        yield f"space: unknown key {name!r}{_suggestion(name)}"
    if unknown:
        return
    if len(names) > 1:
        for value in axis.values:
            if axis.kind not in ("grid", "choice") or not isinstance(value, list) or len(value) != len(names):
                yield f"space.{key}: found {value!r}; expected a grid or choice of lists of {len(names)} values, one for each key"
                return
    for value in axis.extremes:
        try:
            TrainingConfig.model_validate(_merged(base, {key: value}))
        except ValidationError as error:
            for fault in error.errors():
                where = ".".join(str(part) for part in fault["loc"])
                if any(where == name or where.startswith(f"{name}.") for name in names):
                    yield f"space.{key}: {fault['msg'].removeprefix('Value error, ')} (found {value!r})"


def _suggestion(key: str) -> str:
    near = nearest(key, _dotted_keys(TrainingConfig))
    return f", did you mean {near!r}?" if near else "; expected a dotted key of the training settings such as train.lr"


def _dotted_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _dotted_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _corner_faults(spec: SweepSpec) -> list[str]:
    """The first contradiction among combinations of extreme values, and between them and scheduler and resources."""
    for values in itertools.islice(_corners(spec), CORNERS):
        shown = ", ".join(f"{key}={value!r}" for key, value in values.items())
        try:
            train = trial_config(spec.base, values).train
        except ConfigError as error:
            return [f"space: {shown} do not go together: {str(error).removeprefix('trial: ')}"]
        if spec.scheduler.name == "asha" and spec.scheduler.grace_steps > train.steps:
            grace = spec.scheduler.grace_steps
            return [f"scheduler.grace_steps {grace} exceeds the {train.steps} training steps; lower it or use fifo"]
        if train.ranks > max(spec.resources.cpus, 1):
            return [f"resources.cpus {spec.resources.cpus:g} are less than train.ranks {train.ranks}; give each rank one"]
        if train.device == "cuda" and train.ranks > max(spec.resources.gpus, 1):
            return [f"resources.gpus {spec.resources.gpus:g} are less than train.ranks {train.ranks}; each rank takes a GPU"]
        if train.device == "cuda" and spec.resources.gpus == 0:
            return ["resources.gpus is 0 and train.device cuda; set resources.gpus, 0.5 for two trials on a GPU"]
    return []
