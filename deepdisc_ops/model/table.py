"""What each backbone costs: parameters, operations of a forward pass, and whether the whole network learns with it.

Sizes are counted on the meta device, where tensors have a shape and no content, so that the largest need no memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.modeling.backbone import Backbone
from detectron2.structures import Boxes, Instances
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from deepdisc_ops.config import BackboneSettings, InferenceSettings, ModelSettings
from deepdisc_ops.model.backbones import build_backbone
from deepdisc_ops.model.build import DeepDisc

OBJECTS, BOX_PX = 4, 12.0  # in the crop that is learned


@dataclass(frozen=True)
class Cost:
    """Of a backbone with its pyramid: parameters, GFLOP (two a multiplication and addition), strides of the levels."""

    parameters: int
    gflop: float
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Learning:
    """One step of the whole network: the summed loss, how many tensors of weights got no gradient, and how long it took."""

    loss: float
    without_gradient: int
    seconds: float

    @property
    def unsound(self) -> bool:
        """Whether the loss is no number or a parameter cannot learn."""
        return not math.isfinite(self.loss) or self.without_gradient > 0


class _ReadableSequences(TorchFunctionMode):
    """Keeps linspace on the CPU: constructors read its values, and tensors on the meta device have none."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Add the device to calls of linspace."""
        return func(*args, **(kwargs or {}) | ({"device": "cpu"} if func is torch.linspace else {}))


@contextmanager
def on_meta() -> Iterator[None]:
    """Networks built in this block have shapes and no content."""
    with torch.device("meta"), _ReadableSequences():
        yield


def build_on_meta(bands: int, settings: BackboneSettings) -> Backbone:
    """The backbone and its pyramid without memory for its weights."""
    with on_meta():
        return build_backbone(bands, settings)


def cost(settings: BackboneSettings, bands: int, size: int) -> Cost:
    """Parameters, and operations for one image of ``bands`` x ``size`` x ``size``."""
    net = build_on_meta(bands, settings).eval()
    with on_meta(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.empty(1, bands, size, size))
    strides = tuple(shape.stride for shape in net.output_shape().values())
    return Cost(sum(p.numel() for p in net.parameters()), counter.get_total_flops() / 1e9, strides)


def learn(settings: BackboneSettings, bands: int, crop: int) -> Learning:
    """Forward and backward of the whole network on two random crops of ``bands`` x ``crop`` x ``crop`` with labelled objects."""
    levels = settings.levels + settings.top_level
    model = ModelSettings.model_validate(
        {
            "bands": [f"band{number}" for number in range(bands)],
            "input": {"noise_njy": [1.0] * bands},
            "backbone": settings.model_dump(),
            "anchor_sizes": [8.0 * 2**level for level in range(levels)],
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DeepDisc(model, InferenceSettings()).train()
        images, truth = torch.randn(2, bands, crop, crop), [_truth(crop), _truth(crop)]
        start = time.perf_counter()
        loss = torch.stack(list(network.losses(images, truth).values())).sum()
        loss.backward()
    seconds = time.perf_counter() - start
    without = sum(p.grad is None for p in network.parameters() if p.requires_grad)
    return Learning(loss.item(), without, seconds)


def _truth(crop: int) -> Instances:
    """Objects at random places with redshifts."""
    corner = torch.rand(OBJECTS, 2) * (crop - BOX_PX)
    truth = Instances((crop, crop))
    truth.gt_boxes = Boxes(torch.cat([corner, corner + BOX_PX], dim=1))
    truth.gt_classes = torch.zeros(OBJECTS, dtype=torch.long)
    truth.gt_redshift = torch.linspace(0.2, 2.0, OBJECTS)
    truth.gt_ebv = torch.full((OBJECTS,), 0.03)
    return truth
