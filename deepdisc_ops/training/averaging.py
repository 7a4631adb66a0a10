"""An exponential moving average of a network's weights, which is often the better member."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import nn

N = TypeVar("N", bound=nn.Module)


class AveragedWeights(Generic[N]):
    """A copy of ``network`` whose weights follow: average = decay x average + (1 - decay) x weights, once a step.

    The decay grows with the steps t as (1 + t) / (10 + t) until it reaches ``decay``, so that a short run does not keep its
    random start. Buffers (batch statistics) are those of the network.
    """

    def __init__(self, network: N, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self._decay, self._steps = decay, 0

    @torch.no_grad()
    def update(self, network: N) -> None:
        """Follow ``network`` by one step."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        for average, current in zip(self.network.parameters(), network.parameters(), strict=True):
            average.lerp_(current.to(average.dtype), 1 - decay)
        self.copy_buffers(network)

    @torch.no_grad()
    def copy_buffers(self, network: N) -> None:
        """Take over the buffers of ``network``."""
        for average, current in zip(self.network.buffers(), network.buffers(), strict=True):
            average.copy_(current)

    def state_dict(self) -> dict[str, Any]:
        """Weights and the number of steps followed."""
        return {"network": self.network.state_dict(), "steps": self._steps}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.network.load_state_dict(tree["network"])
        self._steps = tree["steps"]
