"""Proposals sampled with random numbers of their own image, so that neither the batch nor the number of ranks matters.

detectron2 draws anchors, then proposals, for one image after the other from torch's global generator; what an image gets would
depend on which images come before it on the same rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from deepdisc_ops.model.build import DeepDisc

SAMPLING_STREAM, STEP_STREAM = 3, 4  # after those of data.sampling


def item_seed(seed: int, k: int) -> int:
    """The seed of the samples drawn for item k of a run."""
    return _draw(seed, SAMPLING_STREAM, k)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's global generators for a step on a rank (dropped paths and the like), so that no state needs to be kept."""
    torch.manual_seed(_draw(seed, STEP_STREAM, step, rank))


@contextmanager
def sampled_by_image(network: DeepDisc, seeds: Sequence[int]) -> Iterator[None]:
    """Inside of the block a forward pass of images with these ``seeds``, one each, samples with them."""
    # each is called once an image, in the order of the images
    places: list[tuple[Any, str]] = [
        (network.proposals, "_subsample_labels"),
        (network.box_heads, "_sample_proposals"),
        (network, "_some_labelled"),
    ]
    for module, name in places:
        setattr(module, name, _seeded(getattr(module, name), seeds))
    try:
        yield
    finally:
        for module, name in places:
            delattr(module, name)  # the method of the class shows again


def _seeded(choose: Callable[..., Any], seeds: Sequence[int]) -> Callable[..., Any]:
    remaining = iter(seeds)

    def seeded(*arguments: Any) -> Any:
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(next(remaining))
            return choose(*arguments)

    return seeded


def _draw(seed: int, *key: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0])
