"""Heads on the feature pyramid: proposals, boxes, masks, and the redshift density.

The heads take their features from the pyramid's levels; proposals may come from one level more (`BackboneSettings.top_level`).
Glossary: B images, N boxes of all images in their order, K mixture components, D = channels x pool x pool.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from detectron2.structures import Boxes
from torch import Tensor, nn

from deepdisc_ops.config import InferenceSettings, ModelSettings, PoolerSettings, RedshiftHeadSettings
from deepdisc_ops.model.backbones.layers import norm_layer
from deepdisc_ops.model.detection import CHUNK, Features, Kernels
from deepdisc_ops.model.pooling import Pooler
from deepdisc_ops.photoz.mixture import GaussianMixture

Shapes = dict[str, ShapeSpec]
CASCADE_IOU = (0.5, 0.6, 0.7)
CASCADE_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
MASK_POOL = 14
MASK_CHUNK = 64
"""Masks are computed for so many boxes at a time: 50 MB of features, however many boxes a tile has; faster than 256."""


def roi_pooler(shapes: Shapes, size: int, settings: PoolerSettings) -> Pooler:
    """Pool every box from the level that fits its size to a grid of ``size`` x ``size``."""
    strides = [shape.stride for shape in shapes.values()]
    return Pooler(
        output_size=size,
        scales=[1 / stride for stride in strides],
        sampling_ratio=settings.samples,
        pooler_type="ROIAlignV2",
        canonical_box_size=settings.canonical_size,
        canonical_level=settings.canonical_level,
    )


def build_proposals(shapes: Shapes, model: ModelSettings) -> RPN:
    """A region proposal network with anchors of every size and aspect ratio on each level."""
    channels, settings = next(iter(shapes.values())).channels, model.proposals
    sizes = [list(size) if isinstance(size, tuple) else [size] for size in model.anchor_sizes]
    return RPN(
        in_features=list(shapes),
        head=StandardRPNHead(
            in_channels=channels,
            num_anchors=len(sizes[0]) * len(settings.aspect_ratios),
            conv_dims=[channels] * settings.convolutions,
        ),
        anchor_generator=DefaultAnchorGenerator(
            sizes=sizes,
            aspect_ratios=list(settings.aspect_ratios),
            strides=[shape.stride for shape in shapes.values()],
            offset=settings.anchor_offset,
        ),
        anchor_matcher=Matcher(list(settings.iou), [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        batch_size_per_image=settings.samples,
        positive_fraction=0.5,
        pre_nms_topk=(settings.before_nms, settings.before_nms),
        post_nms_topk=(model.proposals_training, model.proposals_training),
        nms_thresh=settings.nms_threshold,
    )


def build_box_heads(shapes: Shapes, model: ModelSettings, inference: InferenceSettings) -> StandardROIHeads:
    """One box head, or a cascade of three with rising IoU, and a mask head if the model has one."""
    channels, classes = next(iter(shapes.values())).channels, len(model.classes)
    head, cascade = model.box_head, model.box_head.stages > 1

    def box_head() -> FastRCNNConvFCHead:
        return FastRCNNConvFCHead(
            ShapeSpec(channels=channels, height=head.pool, width=head.pool),
            conv_dims=list(head.convolutions),
            fc_dims=list(head.hidden),
            conv_norm=norm_layer(head.norm),
        )

    def predictor(weights: tuple[float, ...]) -> FastRCNNOutputLayers:
        return FastRCNNOutputLayers(
            ShapeSpec(channels=head.hidden[-1]),
            box2box_transform=Box2BoxTransform(weights),
            num_classes=classes,
            cls_agnostic_bbox_reg=cascade,
            test_score_thresh=inference.score_threshold,
            test_nms_thresh=inference.nms_threshold,
        )

    common = {
        "num_classes": classes,
        "batch_size_per_image": head.samples,
        "positive_fraction": head.positive_fraction,
        "box_in_features": list(shapes),
        "box_pooler": roi_pooler(shapes, head.pool, model.pooler),
    }
    if model.mask_head:
        common |= _mask_head(shapes, model)
    if cascade:
        return CascadeROIHeads(
            box_heads=[box_head() for _ in CASCADE_IOU],
            box_predictors=[predictor(weights) for weights in CASCADE_WEIGHTS],
            proposal_matchers=[Matcher([iou], [0, 1]) for iou in CASCADE_IOU],
            **common,
        )
    return StandardROIHeads(
        box_head=box_head(), box_predictor=predictor(CASCADE_WEIGHTS[0]), proposal_matcher=Matcher([0.5], [0, 1]), **common
    )


def _mask_head(shapes: Shapes, model: ModelSettings) -> dict[str, Any]:
    channels = next(iter(shapes.values())).channels
    return {
        "mask_in_features": list(shapes),
        "mask_pooler": roi_pooler(shapes, MASK_POOL, model.pooler),
        "mask_head": MaskRCNNConvUpsampleHead(
            ShapeSpec(channels=channels, height=MASK_POOL, width=MASK_POOL),
            num_classes=len(model.classes),
            conv_dims=[channels] * (model.mask.convolutions + 1),
            conv_norm=norm_layer(model.mask.norm),
        ),
    }


def mask_crops(heads: StandardROIHeads, features: dict[str, Tensor], boxes: Tensor, image: Tensor, classes: Tensor) -> Tensor:
    """Probability (N, 28, 28) that each part of a box belongs to its object; heads with a mask head.

    boxes (N, 4) px of ``classes`` (N,) in the images ``image`` (N,) of the batch. Row i of a mask covers the box from
    y0 + i h / 28 to y0 + (i + 1) h / 28; nothing is pasted into the image.
    """
    maps = [features[name] for name in heads.mask_in_features]
    logits = []
    for chunk in torch.arange(len(boxes), device=boxes.device).split(MASK_CHUNK):
        every_class = heads.mask_head.layers(heads.mask_pooler.pool(maps, boxes[chunk], image[chunk]))
        logits.append(every_class[torch.arange(len(chunk), device=boxes.device), classes[chunk]])
    return torch.cat(logits).float().sigmoid()


class RedshiftHead(nn.Module):
    """Pooled features and E(B-V) to a Gaussian mixture in redshift (LSST paper, Table 1).

    The same boxes-to-features step serves training and inference.
    """

    def __init__(self, shapes: Shapes, settings: RedshiftHeadSettings, pooler: PoolerSettings) -> None:
        super().__init__()
        channels = next(iter(shapes.values())).channels
        self.levels = list(shapes)
        self.components = settings.components
        self.takes_ebv = settings.ebv
        self.log_floor = math.log(settings.sigma_floor) if settings.sigma_floor > 0 else -math.inf
        self.pooler = roi_pooler(shapes, settings.pool, pooler)
        sizes = [channels * settings.pool**2 + settings.ebv, *settings.hidden]
        activation = nn.Tanh if settings.activation == "tanh" else nn.GELU
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), activation())]
        self.mixture = nn.Sequential(*layers, nn.Linear(sizes[-1], 3 * settings.components))

    def start_at(self, means: Tensor, sigma: float) -> None:
        """Begin with component means (K,) and width ``sigma`` whatever the features say: the training n(z)."""
        last, k = cast(nn.Linear, self.mixture[-1]), self.components
        with torch.no_grad():
            last.weight.mul_(0.1)
            last.bias.zero_()
            last.bias[k : 2 * k] = means
            last.bias[2 * k :] = math.log(sigma)

    def pooled(self, features: dict[str, Tensor], boxes: Sequence[Boxes]) -> Tensor:
        """What the images tell of N boxes (all images in order): channels and pooled cells in one (N, C pool^2)."""
        return self.pooler([features[name] for name in self.levels], list(boxes)).flatten(1)

    def forward(self, features: dict[str, Tensor], boxes: Sequence[Boxes], ebv: Tensor) -> GaussianMixture:
        """Mixtures of N boxes (all images in order) with E(B-V) (N,) in mag."""
        seen = self.pooled(features, boxes)
        if self.takes_ebv:
            seen = torch.cat([seen, ebv[:, None]], dim=1)
        with torch.autocast(seen.device.type, enabled=False):  # half precision would round redshifts to some 0.01
            return self._mixture_of(self.mixture(seen.float()))

    def answer(self, features: Features, boxes: Tensor, image: Tensor, ebv: Tensor, kernels: Kernels) -> GaussianMixture:
        """What `forward` answers, sooner and without gradients: of boxes (N, 4) px in the images ``image`` (N,) of the batch."""
        maps, first, rest = [features[name] for name in self.levels], cast(nn.Linear, self.mixture[0]), self.mixture[1:]
        parts = []
        for chunk in torch.arange(len(boxes), device=boxes.device).split(CHUNK):
            reddening = ebv[chunk, None] if self.takes_ebv else None
            hidden = kernels.apply(first, self.pooler.pool(maps, boxes[chunk], image[chunk]), reddening)
            with torch.autocast(hidden.device.type, enabled=False):
                parts.append(rest(hidden.float()))
        return self._mixture_of(torch.cat(parts))

    def _mixture_of(self, answers: Tensor) -> GaussianMixture:
        """Logits, means and logarithms of widths side by side (N, 3 K), as a mixture no component of which is below the floor."""
        logits, means, log_sigmas = answers.split(self.components, dim=1)
        floor = torch.full_like(log_sigmas, self.log_floor)
        return GaussianMixture(logits, means, torch.logaddexp(log_sigmas, floor))
