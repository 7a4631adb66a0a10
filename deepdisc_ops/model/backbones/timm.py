"""Any model of timm that gives feature maps, by its name there: ``timm/convnext_tiny``.

A model is tried out on the meta device first, where tensors have a shape and no content: which strides it has, whether
it takes images of any size, and which of its weights its maps do not depend on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from deepdisc_ops.config import TIMM, BackboneSettings
from deepdisc_ops.errors import ConfigError, SetupError
from deepdisc_ops.model.backbones.layers import padding
from deepdisc_ops.model.backbones.vit import FINEST

PROBE_PX = 128
# With the getter weights keep the names of timm's own files; the rest lets models of one image size take others.
GETTER: dict[str, Any] = {"feature_cls": "getter"}
WAYS: tuple[dict[str, Any], ...] = (GETTER, GETTER | {"strict_img_size": False}, GETTER | {"dynamic_img_size": True}, {})
REFUSALS = (AssertionError, AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Plan:
    """How a model is made: its maps (by index), their strides and channels, and by what its first stride is divided."""

    options: Mapping[str, Any]
    indices: tuple[int, ...]
    strides: tuple[int, ...]
    channels: tuple[int, ...]
    divisor: int
    idle: tuple[str, ...]  # weights that no map depends on


class TimmMaps(Backbone):
    """Feature maps of a timm model as stage0, stage1, ... in order of their stride."""

    def __init__(self, net: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.net = net
        self._out_features = [f"stage{level}" for level in range(len(plan.indices))]
        self._out_feature_channels = dict(zip(self._out_features, plan.channels, strict=True))
        self._out_feature_strides = dict(zip(self._out_features, plan.strides, strict=True))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) to the maps."""
        return dict(zip(self._out_features, self.net(x), strict=True))


def build_timm(bands: int, settings: BackboneSettings) -> Backbone:
    """The maps at ``settings.stem_stride`` and its doubles; of a plain transformer (ViT) the last map alone."""
    plan = _plan(bands, settings)
    net = _make(bands, settings, plan.options, plan.indices, plan.divisor)
    for name in plan.idle:  # else ranks would wait for gradients that never come
        net.get_parameter(name).requires_grad_(False)
    return TimmMaps(net, plan)


def _plan(bands: int, settings: BackboneSettings) -> Plan:
    faults: list[str] = []
    for options in WAYS:
        try:
            with torch.device("meta"):
                whole: Any = _make(bands, settings, options)
                indices, strides, divisor = _choose(whole.feature_info.info, settings)
                net = _make(bands, settings, options, indices, divisor)
                channels, idle = _try_out(net, bands, strides)
            return Plan(MappingProxyType(options), indices, strides, channels, divisor, idle)
        except REFUSALS as error:
            faults.append(" ".join(str(error).split())[:200])
    raise ConfigError(
        f"{settings.name} cannot be used with stem_stride {settings.stem_stride} and images of any size ({faults[0]}); "
        f"try another stem_stride, or another model such as {TIMM}convnext_tiny"
    )


def _make(
    bands: int, settings: BackboneSettings, options: Mapping[str, Any], indices: Sequence[int] | None = None, divisor: int = 1
) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise SetupError(f"{settings.name} needs timm, which is not installed; pip install 'deepdisc-ops[train]'") from None
    asked: dict[str, Any] = dict(options)
    if indices is not None:
        asked["out_indices"] = tuple(indices)
    if settings.drop_path is not None:
        asked["drop_path_rate"] = settings.drop_path
    net = timm.create_model(settings.name.removeprefix(TIMM), features_only=True, in_chans=bands, **asked)
    if divisor > 1:
        _refine(net, divisor)
    return net


def _choose(maps: Sequence[Mapping[str, Any]], settings: BackboneSettings) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Indices and strides of the maps that make the pyramid, and the divisor of the first stride that takes."""
    have = [int(entry["reduction"]) for entry in maps]
    first, wanted = settings.stem_stride, [settings.stem_stride * 2**level for level in range(settings.levels)]
    if set(have) == {FINEST * first} and settings.levels <= 4:
        return (len(have) - 1,), (have[-1],), 1
    divisor = 1 if first in have else max(1, min(have) // first)
    last_at = {stride // divisor: index for index, stride in enumerate(have)}
    if set(wanted) - set(last_at):
        raise ConfigError(
            f"{settings.name} has maps at strides {', '.join(map(str, sorted(set(have))))}: stem_stride {first} and levels "
            f"{settings.levels} would need {', '.join(map(str, wanted))}; change them, or take another model"
        )
    return tuple(last_at[stride] for stride in wanted), tuple(wanted), divisor


def _refine(net: nn.Module, divisor: int) -> None:
    """Divide the stride of the first convolution that has one, and pad so that H pixels still become H / stride."""
    conv = next((m for m in net.modules() if isinstance(m, nn.Conv2d) and m.stride[0] > 1), None)
    if conv is None or conv.stride[0] % divisor:
        found = "no convolution with a stride" if conv is None else f"a first stride of {conv.stride[0]}"
        raise ValueError(f"it has {found}, which cannot be divided by {divisor}")
    stride = conv.stride[0] // divisor
    conv.stride = (stride, stride)
    pad = padding(conv.kernel_size[0], stride)
    conv.padding = pad if isinstance(pad, str) else (pad, pad)


def _try_out(net: nn.Module, bands: int, strides: Sequence[int]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Channels of the maps of an image of an unusual size, and the names of the weights that have no part in them."""
    maps = net(torch.empty(2, bands, PROBE_PX, PROBE_PX))
    sides, expected = [tuple(each.shape[2:]) for each in maps], [(PROBE_PX // stride,) * 2 for stride in strides]
    if sides != expected:
        raise ValueError(f"{PROBE_PX} px become maps of {sides}, not {expected}")
    weights = dict(net.named_parameters())
    gradients = torch.autograd.grad([each.sum() for each in maps], list(weights.values()), allow_unused=True)
    idle = tuple(name for name, gradient in zip(weights, gradients, strict=True) if gradient is None)
    return tuple(each.shape[1] for each in maps), idle
