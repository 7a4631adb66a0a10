"""The specification of a sweep: constants, ranges, budget, scheduler, resources.

::

    name: quick
    base:                                  # nested TrainingConfig values, shared by all trials; preset: NAME for the rest
      train: {steps: 1000}
    space:                                 # dotted TrainingConfig keys, one range each
      model.backbone.name: {grid: [tiny, small]}
      train.lr: {loguniform: [1.0e-3, 4.0e-3]}
    metric: val_nll
    trials: 1                              # draws per point of the grid

`load_spec` reads one and checks all of it, ranges included, against `deepdisc_ops.config` before anything starts.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
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
    model_validator,
)

from deepdisc_ops import config as settings
from deepdisc_ops.config import Settings, TrainingConfig
from deepdisc_ops.errors import ConfigError

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


class Axis(Settings):
    """One range: ``{grid: [a, b]}`` tries every value, the others are drawn from at random.

    uniform, loguniform: [low, high) of real numbers; randint: [low, high) of whole numbers; choice: a list.
    """

    grid: tuple[Any, ...] | None = None
    choice: tuple[Any, ...] | None = None
    uniform: tuple[float, float] | None = None
    loguniform: tuple[PositiveFloat, PositiveFloat] | None = None
    randint: tuple[int, int] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_kind(cls, found: Any) -> Any:
        kinds = tuple(cls.model_fields)
        if not isinstance(found, dict) or len(found) != 1:
            shown = sorted(found) if isinstance(found, dict) else repr(found)
            raise ValueError(f"found {shown}; expected one range such as {{grid: [a, b]}}, of the kinds {', '.join(kinds)}")
        (kind,) = found
        if kind not in kinds:
            near = difflib.get_close_matches(str(kind), kinds, n=1)
            raise ValueError(
                f"unknown kind of range {kind!r}, " + (f"did you mean {near[0]!r}?" if near else f"expected one of {kinds}")
            )
        return found

    @model_validator(mode="after")
    def _ordered(self) -> Axis:
        if self.kind in ("grid", "choice"):
            if not self.values:
                raise ValueError(f"{self.kind} is empty; list at least one value")
            if any(value in self.values[:i] for i, value in enumerate(self.values)):
                raise ValueError(f"{self.kind} {list(self.values)} names a value twice")
        elif not self.values[0] < self.values[1] or not all(math.isfinite(value) for value in self.values):
            raise ValueError(f"{self.kind} {list(self.values)} is no range; expected [low, high] with low < high")
        return self

    @property
    def kind(self) -> str:
        """The name of the one range that is given."""
        return next(kind for kind in type(self).model_fields if getattr(self, kind) is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        """The list of values, or low and high."""
        values: tuple[Any, ...] = getattr(self, self.kind)
        return values

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values that bound what can be drawn: all of a list, both ends of a range."""
        return (self.values[0], self.values[1] - 1) if self.kind == "randint" else self.values


class Scheduler(Settings):
    """Who decides that a trial ends early: nobody (fifo) or successive halving (asha), in training steps."""

    name: Literal["asha", "fifo"] = "asha"
    grace_steps: PositiveInt = Field(500, description="no trial is stopped before this step")
    reduction_factor: Annotated[float, Field(gt=1)] = Field(2.0, description="one of so many trials passes each rung")


class Resources(Settings):
    """What one trial occupies; its torch threads are its whole CPUs."""

    cpus: PositiveFloat = 1.0
    gpus: NonNegativeFloat = 0.0


class SweepSpec(Settings):
    """A sweep, complete."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=60)]
    base: dict[str, Any] = Field(default_factory=dict)
    space: dict[str, Axis] = Field(default_factory=dict)
    metric: Metric = "val_nll"
    mode: Mode | None = Field(None, description="follows from the metric when not given")
    trials: PositiveInt = Field(1, description="draws of the random ranges for each point of the grid")
    scheduler: Scheduler = Scheduler()
    resources: Resources = Resources()
    concurrency: PositiveInt | None = Field(None, description="trials at once; as many as the resources hold when not given")
    time_limit_s: PositiveFloat | None = Field(None, description="the sweep stops its trials after so many seconds")
    retries: NonNegativeInt = Field(0, description="times a failed trial continues from its last checkpoint")
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
    faults += [fault for key, axis in spec.space.items() for fault in _axis_faults(base, key, axis)]
    train = base.get("train")
    if "train.epochs" in spec.space or (isinstance(train, Mapping) and train.get("epochs") is not None):
        faults.append("train.epochs: the scheduler of a sweep counts steps; set train.steps in its place")
    return faults or _corner_faults(spec)


def number_of_trials(spec: SweepSpec) -> int:
    """Points of the grid times the draws for each."""
    return spec.trials * math.prod(len(axis.values) for axis in spec.space.values() if axis.kind == "grid")


def trial_config(base: Mapping[str, Any], values: Mapping[str, Any]) -> TrainingConfig:
    """The config of one trial: ``base`` with the drawn values set at their dotted keys."""
    return settings.validate(TrainingConfig, _merged(base, values), "trial")


def to_ray(spec: SweepSpec) -> dict[str, Any]:
    """The space as Ray Tune's domains, by dotted key."""
    from ray import tune

    makers = {
        "grid": lambda values: tune.grid_search(list(values)),
        "choice": lambda values: tune.choice(list(values)),
        "uniform": lambda values: tune.uniform(*values),
        "loguniform": lambda values: tune.loguniform(*values),
        "randint": lambda values: tune.randint(*values),
    }
    return {key: makers[axis.kind](axis.values) for key, axis in spec.space.items()}


def longest_training(spec: SweepSpec) -> int:
    """The largest number of steps a trial can be asked for."""
    axis = spec.space.get("train.steps")
    return max(axis.extremes) if axis else trial_config(spec.base, {}).train.steps


def _merged(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    tree = copy.deepcopy(dict(base))
    for key, value in values.items():
        settings.set_by_path(tree, key.split("."), list(value) if isinstance(value, tuple) else value)
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


def _axis_faults(base: Mapping[str, Any], key: str, axis: Axis) -> Iterator[str]:
    """Faults that values of one axis have on their own; contradictions between keys are left to the corners."""
    if key not in set(_dotted_keys(TrainingConfig)):
        yield f"space: unknown key {key!r}{_suggestion(key)}"
        return
    for value in axis.extremes:
        try:
            TrainingConfig.model_validate(_merged(base, {key: value}))
        except ValidationError as error:
            for fault in error.errors():
                where = ".".join(str(part) for part in fault["loc"])
                if where == key or where.startswith(f"{key}."):
                    yield f"space.{key}: {fault['msg'].removeprefix('Value error, ')} (found {value!r})"


def _suggestion(key: str) -> str:
    near = difflib.get_close_matches(key, list(_dotted_keys(TrainingConfig)), n=1)
    return f", did you mean {near[0]!r}?" if near else "; expected a dotted key of the training settings such as train.lr"


def _dotted_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _dotted_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _corner_faults(spec: SweepSpec) -> list[str]:
    """The first contradiction among combinations of extreme values, and between scheduler and budget."""
    corners = itertools.product(*(axis.extremes for axis in spec.space.values()))
    for corner in itertools.islice(corners, CORNERS):
        values = dict(zip(spec.space, corner, strict=True))
        try:
            steps = trial_config(spec.base, values).train.steps
        except ConfigError as error:
            shown = ", ".join(f"{key}={value!r}" for key, value in values.items())
            return [f"space: {shown} do not go together: {str(error).removeprefix('trial: ')}"]
        if spec.scheduler.name == "asha" and spec.scheduler.grace_steps > steps:
            return [f"scheduler.grace_steps {spec.scheduler.grace_steps} exceeds the {steps} training steps; lower it or use fifo"]
    return []
