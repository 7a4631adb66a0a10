"""Errors of statistics: by bootstrap over objects, and from the members of an ensemble. Glossary: N objects, B samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepdisc_ops.errors import CatalogError

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

BOOTSTRAP_VALUES = 4_000_000  # values held at once


class Estimate(NamedTuple):
    """A figure and its standard error."""

    value: float
    error: float


def bootstrap_error(statistic: Callable[[Floats], Floats], values: Floats, rng: np.random.Generator, samples: int = 200) -> Floats:
    """Standard error of ``statistic`` of values (N,): its standard deviation over samples drawn with replacement.

    ``statistic`` maps (B, N) to (B, ...), the result is (...). One object has error 0: nothing can vary.
    """
    if not values.size:
        raise CatalogError("no objects to resample; expected at least one")
    batch = max(1, BOOTSTRAP_VALUES // values.size)
    sizes = [min(batch, samples - start) for start in range(0, samples, batch)]
    drawn = [statistic(values[rng.integers(values.size, size=(size, values.size))]) for size in sizes]
    return np.asarray(np.std(np.concatenate(drawn), axis=0))


def resample_counts(size: int, rng: np.random.Generator, samples: int) -> Iterator[Indices]:
    """Bootstrap samples of ``size`` objects, each as the number of times (N,) that every object was drawn.

    Statistics of sorted values take them as they are; drawing and counting is many times faster than sorting each sample.
    """
    if not size:
        raise CatalogError("no objects to resample; expected at least one")
    for _ in range(samples):
        yield np.bincount(rng.integers(size, size=size), minlength=size)


def mean_with_error(values: ArrayLike) -> Estimate:
    """Mean of values (N,) and its standard error, which the bootstrap of a mean tends to; 0 for one object."""
    each = np.asarray(values, np.float64)
    if not each.size:
        raise CatalogError("no objects to take the mean of; expected at least one")
    return Estimate(float(each.mean()), float(each.std() / math.sqrt(each.size)))
