"""Losses of a batch that several ranks share, normalised as if one rank had computed all of it.

detectron2 divides each loss by what its own rank has of boxes or masks, and the redshift loss is a mean over labelled objects.
These numbers differ between ranks, so that the mean of the ranks' losses is not the loss of the batch. With n_r things on rank
r, the loss of the batch is sum_r n_r loss_r / sum_r n_r, and since gradients are averaged over R ranks, a rank computes
R n_r loss_r / sum_r n_r. Proposal losses are per image, of which every rank has as many.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.training.distributed import World

BOX, MASK, REDSHIFT = "box", "mask", "redshift"


class TermCounts:
    """What each loss term of the latest forward pass of ``network`` is a mean over, counted as it goes through the heads."""

    def __init__(self, network: DeepDisc) -> None:
        self._counts: dict[str, int] = {}
        heads = network.box_heads
        predictors = heads.box_predictor
        if isinstance(predictors, nn.ModuleList):
            self._watch({f"{BOX}_stage{stage}": predictor for stage, predictor in enumerate(predictors)})
        else:
            self._watch({BOX: predictors})
        if heads.mask_on:
            self._watch({MASK: heads.mask_head})
        network.redshift_head.register_forward_hook(partial(self._count_output, REDSHIFT))

    def of(self, term: str, images: int) -> int:
        """Things on this rank that ``term`` is the mean over: sampled boxes, masks, labelled objects, or else ``images``."""
        box = re.fullmatch(r"loss_(?:cls|box_reg)((?:_stage\d+)?)", term)
        counted = f"{BOX}{box[1]}" if box else term.removeprefix("loss_")
        return self._counts.get(counted, images)

    def _watch(self, modules: Mapping[str, nn.Module]) -> None:
        for name, module in modules.items():
            module.register_forward_hook(partial(self._count_input, name))

    def _count_input(self, name: str, _module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        self._counts[name] = len(inputs[0])

    def _count_output(self, name: str, _module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        self._counts[name] = len(output)


def over_ranks(world: World, values: Sequence[float], counts: Sequence[int]) -> tuple[list[float], list[float]]:
    """Loss terms of the whole batch, and the factor of each with which this rank's is to be multiplied."""
    sums = world.sum([*counts, *(value * count for value, count in zip(values, counts, strict=True))])
    totals = [max(total, 1.0) for total in sums[: len(counts)]]
    losses = [product / total for product, total in zip(sums[len(counts) :], totals, strict=True)]
    return losses, [world.ranks * count / total for count, total in zip(counts, totals, strict=True)]
