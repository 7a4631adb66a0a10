"""The whole network: pixels to boxes, then boxes to redshift densities.

Inference runs in two steps, `detect` and `redshift`, so that E(B-V) can be looked up at the boxes in between and
boxes from a catalogue can take the place of detected ones; `masks` is a third, for who asks. The network sees tensors only.
Glossary: B images, C bands, H x W pixels (multiples of the stride), N boxes of all images, K components.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Literal, cast

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads import select_foreground_proposals
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from deepdisc_ops.config import InferenceSettings, InputSettings, ModelSettings
from deepdisc_ops.errors import ConfigError
from deepdisc_ops.model.backbones import build_backbone
from deepdisc_ops.model.detection import Boxed, Candidates, Kernels, ask, classify, pick, place_in_image, propose
from deepdisc_ops.model.heads import RedshiftHead, build_box_heads, build_proposals, mask_crops
from deepdisc_ops.photoz.mixture import GaussianMixture

Features = dict[str, Tensor]
logger = logging.getLogger(__name__)

LAST_SHARE = 0.25
"""Where the last quarter of the proposals still finds new objects, there are more to be found:"""
NEW_OBJECTS, NEW_SHARE = 2, 0.02
"""more than two of them and more than 2 % of all. A box that only is better than that of an earlier proposal is not new."""
CROWDED = (
    "an image of %d x %d px holds more objects than %d proposals and %d detections can tell; "
    "raise inference.proposals_per_megapixel or inference.crowding"
)


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
        self.kernels = Kernels()
        self._told = False
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
        """First step: features and, per image, Instances with pred_boxes, scores, pred_classes, the best score first."""
        features, candidates = self.candidates(images)
        found = pick(candidates, self.inference.score_threshold, self.inference.nms_threshold)
        size = images.shape[2], images.shape[3]
        of_each = (found.select(found.image == image) for image in range(len(images)))
        return features, [Instances(size, pred_boxes=Boxes(o.boxes), scores=o.scores, pred_classes=o.classes) for o in of_each]

    def candidates(self, images: Tensor) -> tuple[Features, Candidates]:
        """Features, and what may be an object, before thresholds.

        An image with more objects than its share of proposals can find is looked at again with twice as many, and so on.
        """
        features, size = self.features(images), (images.shape[2], images.shape[3])
        answers = ask(self.proposals, features)
        parts, left, growth = [], list(range(len(images))), 1
        while left:
            caps = self._cap(size[0] * size[1], growth)
            proposals = propose(self.proposals, answers, left, size, caps[:2], self._least("objectness"))
            part, index = classify(self.box_heads, self.kernels, features, proposals, size, caps[2], self._least("score"))
            crowded = self._crowded(part, index, proposals, caps)
            growth *= 2
            if crowded and growth > self.inference.crowding:
                if not self._told:  # once, not for every tile of a mosaic
                    logger.warning(CROWDED, *size, caps[1], caps[2])
                self._told, crowded = True, []
            parts.append(part.select(~torch.isin(part.image, torch.tensor(crowded, device=part.image.device))))
            left = crowded
        return features, Candidates.cat(parts)

    def _least(self, what: Literal["objectness", "score"]) -> float:
        """Below this the fast preset gives a proposal up, the exact one none."""
        settings = self.inference
        return 0.0 if settings.preset == "exact" else {"objectness": settings.least_objectness, "score": settings.least_score}[what]

    def _crowded(self, candidates: Candidates, index: Tensor, proposals: Boxed, caps: tuple[int, int, int]) -> list[int]:
        """Images in which more proposals would find more objects: those whose caps cut some off.

        The proposals reach their cap there, and so do the objects, or the last proposals still find new ones. ``index`` says
        which proposals the candidates are of.
        """
        settings = self.inference
        full = torch.nonzero(torch.bincount(proposals.image) >= caps[1]).flatten()
        if settings.fixed_proposals or settings.max_detections or not len(full):
            return []
        sooner = place_in_image(proposals.image)[index] < (1 - LAST_SHARE) * caps[1]
        every, before = (
            torch.bincount(pick(some, settings.score_threshold, settings.nms_threshold).image, minlength=int(full.max()) + 1)[full]
            for some in (candidates, candidates.select(sooner))
        )
        crowded = (every >= caps[2]) | (every - before > (NEW_SHARE * every).clamp(min=NEW_OBJECTS))
        return [int(image) for image in full[crowded]]

    def freeze(self) -> None:
        """Make ready for inference alone: norms that do not depend on the image become part of the convolution before them.

        Convolutions of 1x1 are told to be dilated, which means nothing for them: torch computes dilated ones with oneDNN,
        others not if there is one thread. The network answers as before, and can neither be trained nor saved any more.
        """
        for module in self.eval().modules():
            if isinstance(module, Conv2d) and isinstance(module.norm, nn.modules.batchnorm._BatchNorm | FrozenBatchNorm2d):
                _fold(module)
            if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
                module.dilation = (2, 2)
        for module in self.box_heads.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = True
        self.requires_grad_(False)

    def redshift(self, features: Features, boxes: Sequence[Boxes], ebv: Tensor) -> GaussianMixture:
        """Second step: mixtures of given boxes (per image) with E(B-V) (N,)."""
        return self.redshift_head.answer(features, *_together(boxes), ebv, self.kernels)

    def masks(self, features: Features, boxes: Sequence[Boxes], classes: Tensor) -> Tensor:
        """Third step, given a mask head: probabilities (N, 28, 28) inside of given boxes (per image) of ``classes`` (N,)."""
        if not self.box_heads.mask_on:
            raise ConfigError("this network has no mask head; train one with model.mask_head on to get masks")
        return mask_crops(self.box_heads, features, *_together(boxes), classes)

    def _cap(self, pixels: int, growth: int) -> tuple[int, int, int]:
        """Caps of an image on proposals, per level before NMS and in all after it, and on detections.

        By what the area can hold, not by a constant that truncates a crowded field, unless one is asked for. detectron2's own
        heads are told the same.
        """
        cap = growth * max(100, math.ceil(self.inference.proposals_per_megapixel * pixels / 1e6))
        before, after = self.inference.fixed_proposals or (2 * cap, cap)
        detections = self.inference.max_detections or max(50, cap // 2)
        if growth == 1:
            self.proposals.pre_nms_topk[False], self.proposals.post_nms_topk[False] = before, after
        return before, after, detections

    def train(self, mode: bool = True) -> DeepDisc:
        """As of every module; in training no kernels are kept."""
        self.kernels.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeepDisc:
        self.kernels.clear()  # moved or converted weights
        return super()._apply(fn, recurse)


def _fold(conv: Conv2d) -> None:
    """Let a convolution do what the norm after it does."""
    norm = conv.norm
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale = (variance + norm.eps).rsqrt() * norm.weight
    bias = norm.bias - mean * scale
    if conv.bias is not None:
        bias = bias + conv.bias * scale
    conv.weight = nn.Parameter((conv.weight * scale[:, None, None, None]).detach())
    conv.bias, conv.norm = nn.Parameter(bias.detach()), None


def _together(boxes: Sequence[Boxes]) -> tuple[Tensor, Tensor]:
    """Boxes (N, 4) of all images and the image (N,) that each is in."""
    every = Boxes.cat(list(boxes)).tensor
    counts = torch.tensor([len(of_image) for of_image in boxes], device=every.device)
    return every, torch.arange(len(boxes), device=every.device).repeat_interleave(counts)


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
