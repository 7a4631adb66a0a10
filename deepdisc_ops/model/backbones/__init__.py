"""Backbones by name, each with a feature pyramid, for any number of bands.

Survey objects are small (5-pixel boxes are normal), so the stem's stride and the number of levels are settings of every
family; another stride changes no shape of a weight, but for a plain residual stem of stride 1, which is 3x3. Glossary:
B images, C bands, H x W pixels (multiples of the coarsest stride); level p_n has stride 2^n.
"""

from __future__ import annotations

import math

from detectron2.modeling.backbone import FPN, Backbone, SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor

from deepdisc_ops.config import TIMM, BackboneSettings
from deepdisc_ops.errors import ConfigError, ImageError
from deepdisc_ops.model.backbones.layers import norm_layer
from deepdisc_ops.model.backbones.mvit import MVITS, build_mvit
from deepdisc_ops.model.backbones.residual import RESIDUAL_NETS, build_residual
from deepdisc_ops.model.backbones.swin import SWINS, build_swin
from deepdisc_ops.model.backbones.timm import build_timm
from deepdisc_ops.model.backbones.vit import VITS, build_vit

__all__ = ["RESIDUAL_NETS", "build_backbone"]

VIT_SCALES = (4.0, 2.0, 1.0, 0.5)  # of the one map of a plain transformer, for the levels of its pyramid (ViTDet)


def build_backbone(bands: int, settings: BackboneSettings) -> Backbone:
    """A feature pyramid over ``bands`` input planes with ``settings.levels`` levels of ``fpn_channels``, and a top level if asked.

    Its forward takes (B, bands, H, W) and gives each level by name; an `ImageError` says when H or W does not fit.
    """
    backbone = _build_pyramid(bands, settings)
    backbone.register_forward_pre_hook(_check_sides)
    return backbone


def _build_pyramid(bands: int, settings: BackboneSettings) -> Backbone:
    bottom_up = _build_bottom_up(bands, settings)
    shapes = bottom_up.output_shape()
    norm = norm_layer(settings.norm if settings.fpn_norm is None else settings.fpn_norm)
    top = _top_level(settings) if settings.top_level else None
    first, shape = next(iter(shapes.items()))
    if shape.stride == settings.stem_stride:
        return FPN(bottom_up, list(shapes), settings.fpn_channels, norm=norm, top_block=top)
    if norm == "":
        raise ConfigError(f"fpn_norm '' is not possible with {settings.name}, whose pyramid upsamples; set fpn_norm to LN")
    scales = VIT_SCALES[: settings.levels]
    return SimpleFeaturePyramid(bottom_up, first, settings.fpn_channels, scales, norm=norm, top_block=top)


def _build_bottom_up(bands: int, settings: BackboneSettings) -> Backbone:
    if settings.name.startswith(TIMM):
        return build_timm(bands, settings)
    if settings.name in MVITS:
        return build_mvit(bands, settings)
    if settings.name in SWINS:
        return build_swin(bands, settings)
    if settings.name in VITS:
        return build_vit(bands, settings)
    return build_residual(bands, settings)


def _check_sides(backbone: Backbone, images: tuple[Tensor]) -> None:
    """Refuse what the pyramid cannot halve evenly, instead of a failure deep inside or a map of a part of the image."""
    height, width = images[0].shape[-2:]
    stride = backbone.size_divisibility or backbone.padding_constraints["size_divisiblity"]  # so spelt in detectron2
    if height % stride or width % stride:
        raise ImageError(f"the network got an image of {width}x{height} px; its sides must be multiples of {stride}: pad or cut it")


def _top_level(settings: BackboneSettings) -> LastLevelMaxPool:
    """Every other pixel of the last level, whichever that is."""
    top = LastLevelMaxPool()
    top.in_feature = f"p{int(math.log2(settings.stem_stride)) + settings.levels - 1}"
    return top
