"""Ranges of a sweep: what can be drawn for a setting, and how ranges that depend on each other combine."""

from __future__ import annotations

import graphlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field, PositiveFloat, model_validator

from deepdisc_ops.config import Settings
from deepdisc_ops.errors import did_you_mean

KINDS = ("grid", "choice", "uniform", "loguniform", "randint")


class Axis(Settings):
    """One range: ``{grid: [a, b]}`` tries every value, the others are drawn from at random.

    uniform, loguniform: [low, high) of real numbers; randint: [low, high) of whole numbers; choice: a list. With ``when``, a
    range counts in those trials alone in which other keys of the space have one of the values named.
    """

    grid: tuple[Any, ...] | None = None
    choice: tuple[Any, ...] | None = None
    uniform: tuple[float, float] | None = None
    loguniform: tuple[PositiveFloat, PositiveFloat] | None = None
    randint: tuple[int, int] | None = None
    when: dict[str, Any] = Field(default_factory=dict, description="value, or list of values, by dotted key of the space")

    @model_validator(mode="before")
    @classmethod
    def _one_kind(cls, found: Any) -> Any:
        kinds = [str(key) for key in found if key != "when"] if isinstance(found, dict) else []
        if len(kinds) != 1:
            shown = sorted(found) if isinstance(found, dict) else repr(found)
            raise ValueError(f"found {shown}; expected one range such as {{grid: [a, b]}}, of the kinds {', '.join(KINDS)}")
        (kind,) = kinds
        if kind not in KINDS:
            raise ValueError(f"unknown kind of range {kind!r}, {did_you_mean(kind, KINDS)}")
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
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        """The list of values, or low and high."""
        values: tuple[Any, ...] = getattr(self, self.kind)
        return values

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values that bound what can be drawn: all of a list, both ends of a range."""
        return (self.values[0], self.values[1] - 1) if self.kind == "randint" else self.values

    def wanted(self, key: str) -> list[Any]:
        """The values of ``key`` with which this range counts."""
        named = self.when[key]
        return named if isinstance(named, list) else [named]

    def counts(self, chosen: Mapping[str, Any]) -> bool:
        """Whether the values chosen so far let this range count."""
        return all(key in chosen and chosen[key] in self.wanted(key) for key in self.when)

    def draw(self, source: random.Random) -> Any:
        """One value at random."""
        if self.kind in ("grid", "choice"):
            return source.choice(self.values)
        low, high = self.values
        if self.kind == "randint":
            return source.randrange(low, high)
        if self.kind == "uniform":
            return source.uniform(low, high)
        return math.exp(source.uniform(math.log(low), math.log(high)))


def parts(key: str) -> list[str]:
    """The dotted keys of a range: one, or several with commas between, which vary together."""
    return [part.strip() for part in key.split(",")]


def combinations(
    axes: Mapping[str, Axis], options: Callable[[str, Axis, Mapping[str, Any]], Sequence[Any]]
) -> Iterator[dict[str, Any]]:
    """Every combination of the ``options`` of each range, those left out that do not count beside the values before them."""
    order = ordered(axes)

    def extend(chosen: dict[str, Any], rest: Sequence[str]) -> Iterator[dict[str, Any]]:
        if not rest:
            yield chosen
            return
        key, axis = rest[0], axes[rest[0]]
        if not axis.counts(chosen):
            yield from extend(chosen, rest[1:])
            return
        for value in options(key, axis, chosen):
            yield from extend({**chosen, key: value}, rest[1:])

    return extend({}, order)


def ordered(axes: Mapping[str, Axis]) -> list[str]:
    """The keys of the space, each after those that its condition names, and grids first: every point draws for itself."""
    grids_first = sorted(axes, key=lambda key: axes[key].kind != "grid")
    return list(graphlib.TopologicalSorter({key: list(axes[key].when) for key in grids_first}).static_order())


def when_faults(axes: Mapping[str, Axis], key: str) -> Iterator[str]:
    """Faults of the condition of one range."""
    axis = axes[key]
    for other in axis.when:
        if other not in axes:
            yield f"space.{key}.when: {other!r} is no key of the space, {did_you_mean(other, axes)}"
            continue
        values = axes[other]
        if values.kind in ("grid", "choice"):
            never = [value for value in axis.wanted(other) if value not in values.values]
            if never:
                yield f"space.{key}.when: {other} is never {never[0]!r}; it is one of {list(values.values)}"
        else:
            yield f"space.{key}.when: {other} is a {values.kind} range; a condition needs the values of a grid or a choice"


def order_faults(axes: Mapping[str, Axis]) -> Iterator[str]:
    """The fault of conditions that wait for each other."""
    try:
        ordered(axes)
    except graphlib.CycleError as error:
        yield f"space: the conditions of {', '.join(dict.fromkeys(error.args[1]))} wait for each other; drop one `when`"
