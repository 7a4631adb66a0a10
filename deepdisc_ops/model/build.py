"""The whole network: pixels to boxes, then boxes to redshift densities.

Inference runs in two steps, `detect` and `redshift`, so that E(B-V) can be looked up at the boxes in between and
boxes from a catalogue can take the place of detected ones; `masks` is a third, for who asks. The network sees tensors only.
Glossary: B images, C bands, H x W pixels (multiples of the stride), N boxes of all images, K components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

import torch
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads import select_foreground_proposals
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from deepdisc_ops.config import InferenceSettings, InputSettings, ModelSettings
from deepdisc_ops.errors import ConfigError
from deepdisc_ops.model.backbones import build_backbone
from deepdisc_ops.model.heads import RedshiftHead, build_box_heads, build_proposals, mask_crops
from deepdisc_ops.photoz.mixture import GaussianMixture

Features = dict[str, Tensor]


class DeepDisc(nn.Module):
    """Backbone, proposals, box heads, optional masks and the redshift head.

    Image sides must be multiples of ``stride`` pixels.
    """

    stride: int
    offset: Tensor
    scale: Tensor

    def __init__(self, model: ModelSettings, inference: InferenceSettings) -> None:
        super().__init__()
        self.backbone = build_backbone(len(model.bands), model.backbone)
        every_level = self.backbone.output_shape()
        shapes = dict(islice(every_level.items(), model.backbone.levels))  # a top level is for proposals alone
        self.proposals = build_proposals(every_level, model)
        self.box_heads = build_box_heads(shapes, model, inference)
        self.redshift_head = RedshiftHead(shapes, model.redshift_head, model.pooler)
        self.stride = max(self.backbone.size_divisibility, *(shape.stride for shape in shapes.values()))
        self.redshift_settings, self.inference = model.redshift_head, inference
        self.scaling = model.input.scaling
        offset, scale = input_scaling(model.input, len(model.bands))
        self.register_buffer("offset", offset.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("scale", scale.view(1, -1, 1, 1), persistent=False)

    def features(self, images: Tensor) -> Features:
        """Pyramid of images (B, C, H, W) in nJy."""
        scaled = (images - self.offset) / self.scale
        return self.backbone(torch.arcsinh(scaled) if self.scaling == "arcsinh" else scaled)

    def losses(self, images: Tensor, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Every term of the training loss, to be summed; that of the redshift is weighted by ``redshift_head.loss_weight``.

        Targets carry gt_boxes, gt_classes, gt_redshift (NaN: no label), gt_ebv and, for a mask head, gt_masks. Raises
        FloatingPointError where predicted boxes are no numbers.
        """
        features = self.features(images)
        image_list = ImageList(images, [(images.shape[2], images.shape[3])] * len(images))
        try:
            with EventStorage():  # detectron2's heads insist on a place for their own statistics
                proposals, losses = self.proposals(image_list, features, list(targets))
                sampled, head_losses = self.box_heads(image_list, features, proposals, list(targets))
        except AssertionError as error:  # of `Boxes.clip`, between the stages of a cascade
            raise FloatingPointError(str(error)) from error
        losses |= head_losses
        if self.redshift_settings.true_boxes:
            sampled = add_ground_truth_to_proposals(list(targets), sampled)
        losses["loss_redshift"] = self.redshift_settings.loss_weight * self._redshift_loss(features, sampled)
        return losses

    def _redshift_loss(self, features: Features, sampled: Sequence[Instances]) -> Tensor:
        foreground, _ = select_foreground_proposals(list(sampled), self.box_heads.num_classes)
        labelled = [self._some_labelled(instances) for instances in foreground]
        boxes = [instances.proposal_boxes for instances in labelled]
        z = torch.cat([instances.gt_redshift for instances in labelled])
        mixture = self.redshift_head(features, boxes, torch.cat([instances.gt_ebv for instances in labelled]))
        # without a labelled object the sum over nothing keeps the graph and adds zero
        return -mixture.log_prob(z).sum() / max(len(z), 1)

    def _some_labelled(self, instances: Instances) -> Instances:
        if not instances.has("gt_redshift"):  # an image without any object
            empty = instances.proposal_boxes.tensor.new_zeros(0)
            bare = Instances(instances.image_size, proposal_boxes=instances.proposal_boxes[:0])
            bare.gt_redshift, bare.gt_ebv = empty, empty
            return bare
        index = torch.nonzero(torch.isfinite(instances.gt_redshift)).flatten()
        chosen = index[torch.randperm(len(index), device=index.device)[: self.redshift_settings.max_boxes]]
        return instances[chosen]

    def detect(self, images: Tensor) -> tuple[Features, list[Instances]]:
        """First step: features and, per image, Instances with pred_boxes, scores, pred_classes."""
        features = self.features(images)
        height, width = images.shape[2], images.shape[3]
        self._cap(height * width)
        image_list = ImageList(images, [(height, width)] * len(images))
        proposals, _ = self.proposals(image_list, features, None)
        # the heads' own forward would go on to masks, the costliest part, which nothing here asks for
        return features, self.box_heads._forward_box(features, proposals)

    def redshift(self, features: Features, boxes: Sequence[Boxes], ebv: Tensor) -> GaussianMixture:
        """Second step: mixtures of given boxes (per image) with E(B-V) (N,)."""
        return self.redshift_head(features, boxes, ebv)

    def masks(self, features: Features, boxes: Sequence[Boxes], classes: Tensor) -> Tensor:
        """Third step, given a mask head: probabilities (N, 28, 28) inside of given boxes (per image) of ``classes`` (N,)."""
        if not self.box_heads.mask_on:
            raise ConfigError("this network has no mask head; train one with model.mask_head on to get masks")
        return mask_crops(self.box_heads, features, boxes, classes)

    def _cap(self, pixels: int) -> None:
        """Proposals by what the area can hold, not by a constant that truncates a crowded field, unless one is asked for."""
        cap = max(100, math.ceil(self.inference.proposals_per_megapixel * pixels / 1e6))
        before, after = self.inference.fixed_proposals or (2 * cap, cap)
        self.proposals.pre_nms_topk[False] = before
        self.proposals.post_nms_topk[False] = after
        predictors = self.box_heads.box_predictor
        for predictor in predictors if isinstance(predictors, nn.ModuleList) else [predictors]:
            predictor.test_topk_per_image = self.inference.max_detections or max(50, cap // 2)


def input_scaling(settings: InputSettings, bands: int) -> tuple[Tensor, Tensor]:
    """Offset and scale (C,) in nJy: the network sees (flux - offset) / scale, or arcsinh of it."""
    needed = ("mean_njy", "std_njy") if settings.scaling == "zscore" else ("noise_njy",)
    missing = [f"model.input.{name}" for name in needed if getattr(settings, name) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} not set; give one value in nJy for every band")
    if settings.scaling == "zscore":
        return torch.tensor(settings.mean_njy), torch.tensor(settings.std_njy)
    softening = 1.0 if settings.scaling == "snr" else settings.softening
    return torch.zeros(bands), softening * torch.tensor(settings.noise_njy)
