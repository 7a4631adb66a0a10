"""Which image, and which object of it, every item of a training run is about, and which process prepares which items.

Item k of a run is decided by the seed and k alone: any number of workers and ranks, and a run that is resumed, see the same.
Glossary: N objects of a data set.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from deepdisc_ops.errors import ConfigError

EPOCH_STREAM, ITEM_STREAM, CHOICE_STREAM = 0, 1, 2
BINS = 50
LARGEST_WEIGHT = 30.0
"""No object is drawn more often than this many times its share without balance: few objects teach little by repetition."""


class Choice(NamedTuple):
    """An image, by its place in the records, and the object to be in the crop, by its place in the image."""

    image: int
    target: int | None = None


class Order(Protocol):
    """Chooses for every item of a run."""

    def choose(self, k: int) -> Choice:
        """What item k is about."""


def epoch_rng(seed: int, epoch: int) -> np.random.Generator:
    """The random numbers of an epoch as a whole."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(EPOCH_STREAM, epoch)))


def item_rngs(seed: int, k: int, count: int) -> list[np.random.Generator]:
    """``count`` independent streams of item k, so that what one draws does not change the others."""
    return [np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(ITEM_STREAM, k, part))) for part in range(count)]


class ImageOrder:
    """Every image once an epoch, each epoch in an order of its own."""

    def __init__(self, images: int, seed: int) -> None:
        self._images, self._seed = images, seed
        self._epoch, self._order = -1, np.zeros(0, np.intp)

    def choose(self, k: int) -> Choice:
        """Image k of the run."""
        epoch, place = divmod(k, self._images)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_rng(self._seed, epoch).permutation(self._images)
        return Choice(int(self._order[place]))


class BalancedOrder:
    """Objects drawn with the given weights (N,), with replacement; images (N,) tells, ascending, where each object is."""

    def __init__(self, weights: NDArray[np.float64], images: NDArray[np.intp], seed: int) -> None:
        chosen = np.flatnonzero(weights > 0)
        self._cumulative = np.cumsum(weights[chosen])
        self._image = images[chosen]
        self._target = chosen - np.searchsorted(images, self._image)
        self._seed = seed

    def choose(self, k: int) -> Choice:
        """A drawn object and its image."""
        rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(CHOICE_STREAM, k)))  # not one of the item's
        i = int(np.searchsorted(self._cumulative, rng.random() * self._cumulative[-1], side="right"))
        return Choice(int(self._image[i]), int(self._target[i]))


class Balance:
    """Weights that flatten n(z): density of the labelled redshifts to the power ``-strength``, 1 for the average object."""

    def __init__(self, redshift: NDArray[np.floating], strength: float) -> None:
        labelled = redshift[np.isfinite(redshift)]
        if len(labelled) == 0:
            raise ConfigError("data.balance needs labelled redshifts and the training images have none; set it to 0")
        bins = int(np.clip(np.sqrt(len(labelled)), 1, BINS))
        counts, self._edges = np.histogram(labelled, bins=bins)
        weights = np.zeros(bins)
        weights[counts > 0] = counts[counts > 0] ** -float(strength)
        average = np.sum(weights * counts) / np.sum(counts)
        self._weights = np.minimum(weights / average, LARGEST_WEIGHT)

    def weight(self, redshift: NDArray[np.floating]) -> NDArray[np.float64]:
        """Weights (N,) of redshifts (N,); zero for NaN."""
        known = np.isfinite(redshift)
        bins = np.searchsorted(self._edges[1:-1], np.where(known, redshift, 0), side="right")
        return np.where(known, self._weights[bins], 0.0)

    def thin(self, redshift: NDArray[np.float32], is_target: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.float32]:
        """The target's label and those of its neighbours in a crop, these kept in proportion to their weights, else NaN.

        A crop holds far more neighbours than targets; with all of their labels n(z) would stay as it is on the sky.
        """
        kept = is_target | (rng.random(len(redshift)) < self.weight(redshift) / self._weights.max())
        return np.where(kept, redshift, np.float32(np.nan))


class RunSampler(Sampler[list[int]]):
    """The items of every optimisation step from ``first_step`` to ``steps``, ``batch_size`` a step over all ranks.

    Step s is made of the items s * batch_size to (s + 1) * batch_size; each rank takes its equal, contiguous part of them.
    """

    def __init__(self, first_step: int, steps: int, batch_size: int, *, rank: int = 0, ranks: int = 1) -> None:
        if batch_size % ranks:
            raise ConfigError(f"train.batch_size {batch_size} cannot be shared equally by {ranks} processes; make it a multiple")
        self._steps = range(first_step, steps)
        self._batch_size, self._share, self._rank = batch_size, batch_size // ranks, rank

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            start = step * self._batch_size + self._rank * self._share
            yield list(range(start, start + self._share))

    def __len__(self) -> int:
        return len(self._steps)
