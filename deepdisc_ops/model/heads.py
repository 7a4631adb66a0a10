"""Heads on the feature pyramid: proposals, boxes, masks, and the redshift density.

Glossary: B images, N boxes of all images in their order, K mixture components, D = channels x pool x pool.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
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

from deepdisc_ops.config import InferenceSettings, ModelSettings, RedshiftHeadSettings
from deepdisc_ops.photoz.mixture import GaussianMixture

Shapes = dict[str, ShapeSpec]
CASCADE_IOU = (0.5, 0.6, 0.7)
CASCADE_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
MASK_POOL = 14


def roi_pooler(shapes: Shapes, size: int) -> ROIPooler:
    """Pool boxes from the level on which they are about 7 feature pixels wide."""
    strides = [shape.stride for shape in shapes.values()]
    return ROIPooler(
        output_size=size,
        scales=[1 / stride for stride in strides],
        sampling_ratio=0,
        pooler_type="ROIAlignV2",
        canonical_box_size=14,
        canonical_level=1,
    )


def build_proposals(shapes: Shapes, model: ModelSettings) -> RPN:
    """A region proposal network with one square anchor size a level."""
    channels = next(iter(shapes.values())).channels
    return RPN(
        in_features=list(shapes),
        head=StandardRPNHead(in_channels=channels, num_anchors=1),
        anchor_generator=DefaultAnchorGenerator(
            sizes=[[size] for size in model.anchor_sizes],
            aspect_ratios=[1.0],
            strides=[shape.stride for shape in shapes.values()],
            offset=0.5,
        ),
        anchor_matcher=Matcher([0.3, 0.6], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=(1000, 1000),
        post_nms_topk=(model.proposals_training, model.proposals_training),
        nms_thresh=0.7,
    )


def build_box_heads(shapes: Shapes, model: ModelSettings, inference: InferenceSettings) -> StandardROIHeads:
    """One box head, or a cascade of three with rising IoU, and a mask head if the model has one."""
    channels, classes = next(iter(shapes.values())).channels, len(model.classes)
    head, cascade = model.box_head, model.box_head.stages > 1

    def box_head() -> FastRCNNConvFCHead:
        return FastRCNNConvFCHead(
            ShapeSpec(channels=channels, height=head.pool, width=head.pool), conv_dims=[], fc_dims=list(head.hidden)
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
        "batch_size_per_image": 128,
        "positive_fraction": 0.5,
        "box_in_features": list(shapes),
        "box_pooler": roi_pooler(shapes, head.pool),
    }
    if model.mask_head:
        common |= {
            "mask_in_features": list(shapes),
            "mask_pooler": roi_pooler(shapes, MASK_POOL),
            "mask_head": MaskRCNNConvUpsampleHead(
                ShapeSpec(channels=channels, height=MASK_POOL, width=MASK_POOL), num_classes=classes, conv_dims=[channels] * 3
            ),
        }
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


class RedshiftHead(nn.Module):
    """Pooled features and E(B-V) to a Gaussian mixture in redshift (LSST paper, Table 1).

    The same boxes-to-features step serves training and inference.
    """

    def __init__(self, shapes: Shapes, settings: RedshiftHeadSettings) -> None:
        super().__init__()
        channels = next(iter(shapes.values())).channels
        self.levels = list(shapes)
        self.components = settings.components
        self.log_floor = math.log(settings.sigma_floor)
        self.pooler = roi_pooler(shapes, settings.pool)
        sizes = [channels * settings.pool**2 + 1, *settings.hidden]
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

    def forward(self, features: dict[str, Tensor], boxes: Sequence[Boxes], ebv: Tensor) -> GaussianMixture:
        """Mixtures of N boxes (all images in order) with E(B-V) (N,) in mag."""
        pooled = self.pooler([features[name] for name in self.levels], list(boxes)).flatten(1)
        logits, means, log_sigmas = self.mixture(torch.cat([pooled, ebv[:, None]], dim=1)).float().split(self.components, dim=1)
        floor = torch.full_like(log_sigmas, self.log_floor)
        return GaussianMixture(logits, means, torch.logaddexp(log_sigmas, floor))
