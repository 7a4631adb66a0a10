"""From the feature pyramid to detected boxes, for all images of a batch at once.

What detectron2's RPN and (cascade of) box heads answer at inference, without a loop over images around the costly parts: the
boxes of all images go through the heads together, anchors that are no proposals are never decoded, and the first hidden layer
is a convolution whose kernel is the whole pooled grid, which oneDNN computes faster than a matrix product and which takes
features as they are pooled.
Glossary: B images, L levels, P proposals and N boxes of all images, A anchors of a level, C channels, S x S cells of a box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import cast

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers, StandardROIHeads
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import batched_nms

Features = Mapping[str, Tensor]
CHUNK = 1024
"""Boxes go through the heads so many at a time: enough for the matrix products, and memory does not follow the crowd."""

PAIRS = 1 << 20
"""Pairs of boxes that are compared at a time."""


@dataclass(frozen=True)
class Boxed:
    """N boxes (N, 4) px of images ``image`` (N,), ordered by image and falling score (N,), of ``classes`` (N,)."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    image: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    def select(self, index: Tensor) -> Boxed:
        """The boxes at ``index``."""
        return Boxed(self.boxes[index], self.scores[index], self.classes[index], self.image[index])


@dataclass(frozen=True)
class Candidates:
    """What may be M objects: scores (M, classes), boxes (M, 1 or classes, 4) px, image (M,), and the most that an image may have.

    ``caps`` (M,) says that for the image of each.
    """

    scores: Tensor
    boxes: Tensor
    image: Tensor
    caps: Tensor

    def select(self, index: Tensor) -> Candidates:
        """Those at ``index``."""
        return Candidates(self.scores[index], self.boxes[index], self.image[index], self.caps[index])

    @classmethod
    def cat(cls, parts: Sequence[Candidates]) -> Candidates:
        """Those of all ``parts``, which have no image in common."""
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))


class Kernels:
    """First hidden layers as kernels of convolutions, made at first use; one that changed since is made again."""

    def __init__(self) -> None:
        self._made: dict[nn.Linear, tuple[int, torch.dtype, Tensor]] = {}

    def __reduce__(self) -> tuple[type[Kernels], tuple[()]]:
        return Kernels, ()  # copies of a network make their own

    def clear(self) -> None:
        """Forget all: weights may have changed without a trace."""
        self._made.clear()

    def of(self, layer: nn.Linear, channels: int, side: int, dtype: torch.dtype) -> Tensor:
        """Kernel (out, C, S, S), channels last, of a layer that takes C x S x S features, and maybe some more after these."""
        made = self._made.get(layer)
        version = -1 if layer.weight.is_inference() else layer.weight._version
        if made is None or made[:2] != (version, dtype):
            grid = layer.weight.detach()[:, : channels * side * side].reshape(-1, channels, side, side)
            kernel = grid.to(dtype, memory_format=torch.channels_last)
            made = self._made[layer] = (version, dtype, kernel)
        return made[2]

    def apply(self, layer: nn.Linear, pooled: Tensor, more: Tensor | None = None) -> Tensor:
        """The layer's answer (N, out) to features (N, C, S, S) and further inputs (N, m)."""
        _, channels, side, _ = pooled.shape
        dtype = torch.get_autocast_dtype(pooled.device.type) if torch.is_autocast_enabled(pooled.device.type) else pooled.dtype
        seen = functional.conv2d(pooled, self.of(layer, channels, side, dtype), layer.bias).flatten(1)
        if more is None:
            return seen
        return seen + functional.linear(more, layer.weight[:, channels * side * side :])


@dataclass(frozen=True)
class Answers:
    """What the RPN says of every anchor, per level: objectness logits (B, A) and offsets (B, A, 4), and the anchors (A, 4)."""

    logits: list[Tensor]
    offsets: list[Tensor]
    anchors: list[Tensor]


def ask(rpn: RPN, features: Features) -> Answers:
    """Objectness and offsets of all anchors."""
    maps = [features[name] for name in rpn.in_features]
    logits, offsets = rpn.rpn_head(maps)
    batch = len(maps[0])
    return Answers(
        [level.permute(0, 2, 3, 1).reshape(batch, -1).float() for level in logits],
        [level.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).reshape(batch, -1, 4).float() for level in offsets],
        [level.tensor for level in rpn.anchor_generator(maps)],
    )


def propose(
    rpn: RPN, answers: Answers, images: Sequence[int], size: tuple[int, int], caps: tuple[int, int], least: float = 0.0
) -> Boxed:
    """Proposals of some ``images`` of the batch, the best by objectness first.

    size (rows, columns) px; caps on proposals of an image, per level before NMS and in all after it; below a probability of
    ``least`` an anchor is hopeless.
    """
    chosen = torch.as_tensor(images, device=answers.logits[0].device)
    parts = []
    for level, (logits, offsets, anchors) in enumerate(zip(answers.logits, answers.offsets, answers.anchors, strict=True)):
        best, index = logits[chosen].topk(min(caps[0], logits.shape[1]), dim=1)
        anchored, offset = anchors[index].flatten(0, 1), offsets[chosen[:, None], index].flatten(0, 1)
        boxes = clip(rpn.box2box_transform.apply_deltas(offset, anchored), size)
        parts.append((boxes, best.flatten(), chosen.repeat_interleave(best.shape[1]), torch.full_like(index, level).flatten()))
    boxes, scores, image, level_of = (torch.cat(columns) for columns in zip(*parts, strict=True))
    keep = _usable(boxes) & torch.isfinite(scores)
    if least > 0:
        keep &= scores.sigmoid() >= least
    every = Boxed(boxes[keep], scores[keep], level_of[keep], image[keep])
    return without_overlaps(every, rpn.nms_thresh, caps[1])


def classify(
    heads: StandardROIHeads,
    kernels: Kernels,
    features: Features,
    proposals: Boxed,
    size: tuple[int, int],
    cap: int,
    least: float = 0.0,
) -> tuple[Candidates, Tensor]:
    """What the box heads make of proposals, and which proposals (M,) these M candidates are of.

    size (rows, columns) px; at most ``cap`` objects in an image. With ``least`` above 0 a proposal whose best mean score so far
    is below it goes no further between stages and is not among the M, which are all P otherwise.
    """
    maps = [features[name] for name in heads.box_in_features]
    chunks = torch.arange(len(proposals), device=proposals.boxes.device).split(CHUNK)
    parts = [_through_stages(heads, kernels, maps, proposals, chunk, size, least) for chunk in chunks]
    scores, boxes, index = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return Candidates(scores, boxes, proposals.image[index], torch.full_like(index, cap)), index


def _through_stages(
    heads: StandardROIHeads,
    kernels: Kernels,
    maps: Sequence[Tensor],
    proposals: Boxed,
    index: Tensor,
    size: tuple[int, int],
    least: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, boxes and indices of the proposals at ``index`` that reach the last stage."""
    stages, boxes, image = _stages(heads), proposals.boxes[index], proposals.image[index]
    total, regressed = boxes.new_zeros(()), boxes[:, None]
    for number, (head, predictor) in enumerate(stages, start=1):
        logits, offsets = predictor(_hidden(head, kernels, heads.box_pooler.pool(maps, boxes, image)))
        total = total + functional.softmax(logits.float(), dim=1)[:, :-1]
        regressed = clip(_regress(predictor.box2box_transform, offsets.float(), boxes), size)
        if number == len(stages):
            break
        boxes = regressed[:, 0]
        if least > 0:
            hopeful = (total >= least * number).any(dim=1)
            boxes, image, index, total = boxes[hopeful], image[hopeful], index[hopeful], total[hopeful]
    return total * (1.0 / len(stages)), regressed, index


def _stages(heads: StandardROIHeads) -> list[tuple[FastRCNNConvFCHead, FastRCNNOutputLayers]]:
    """Box head and predictor of every stage."""
    if isinstance(heads.box_head, nn.ModuleList):
        return list(zip(heads.box_head, cast(nn.ModuleList, heads.box_predictor), strict=True))
    return [(heads.box_head, heads.box_predictor)]


def _hidden(head: FastRCNNConvFCHead, kernels: Kernels, pooled: Tensor) -> Tensor:
    """Last hidden layer (N, D) of a box head on pooled features (N, C, S, S)."""
    for layer in head.conv_norm_relus:
        pooled = layer(pooled)
    seen = functional.relu_(kernels.apply(head.fcs[0], pooled))
    for layer in head.fcs[1:]:
        seen = functional.relu_(layer(seen))
    return seen


def _regress(transform: Box2BoxTransform, offsets: Tensor, boxes: Tensor) -> Tensor:
    """Boxes (N, 1 or classes, 4) that lie by ``offsets`` (N, 4 or 4 classes) from ``boxes`` (N, 4)."""
    return transform.apply_deltas(offsets, boxes).view(len(boxes), -1, 4) if len(boxes) else offsets.view(0, 1, 4)


def pick(candidates: Candidates, least_score: float, iou: float) -> Boxed:
    """Objects: boxes whose score for a class is above ``least_score``, none of which a better one overlaps by more than ``iou``."""
    scores, boxes = candidates.scores, candidates.boxes
    index, classes = torch.nonzero((scores > least_score) & torch.isfinite(scores), as_tuple=True)
    own = boxes[index, 0] if boxes.shape[1] == 1 else boxes[index, classes]
    keep = _usable(own)
    own, index, classes = own[keep], index[keep], classes[keep]
    return without_overlaps(Boxed(own, scores[index, classes], classes, candidates.image[index]), iou, candidates.caps[index])


def without_overlaps(found: Boxed, iou: float, caps: Tensor | int) -> Boxed:
    """Of boxes of one image and class that overlap by more than ``iou`` the best alone, and of an image the best up to its cap.

    caps: one, or (N,) those of the boxes' images.
    """
    groups = found.image * (int(found.classes.max()) + 1 if len(found) else 1) + found.classes
    if found.boxes.device.type == "cpu":
        order = torch.argsort(found.scores, descending=True, stable=True)
        keep = order[_best_of_overlapping(found.boxes[order], groups[order], iou)]
    else:
        keep = batched_nms(found.boxes, found.scores, groups, iou)
    keep = keep[torch.argsort(found.image[keep], stable=True)]
    return found.select(keep[place_in_image(found.image[keep]) < (caps if isinstance(caps, int) else caps[keep])])


def _best_of_overlapping(boxes: Tensor, groups: Tensor, iou: float) -> Tensor:
    """Whether each box (N, 4), best first, is kept by non-maximum suppression among those of its group (N,).

    torchvision compares every box with every other; survey objects are small, and few pairs of boxes come close. What a box
    suppresses is found from these pairs, all of them at once: the answer is the one set of boxes in which a box is missing
    if and only if a better one that is there overlaps it.
    """
    better, worse = _overlapping(boxes, groups, iou)
    keep = torch.ones(len(boxes), dtype=torch.bool)
    while True:
        now = torch.ones_like(keep)
        now[worse[keep[better]]] = False
        if torch.equal(now, keep):
            return keep
        keep = now


def _overlapping(boxes: Tensor, groups: Tensor, iou: float) -> tuple[Tensor, Tensor]:
    """All pairs (better, worse) of boxes of a group, best first, that overlap by more than ``iou``.

    Two boxes can only do so if the right one's left edge is within 1 - iou widths of the left one's: sorted by left edges, a
    box's candidates are the next few.
    """
    left = boxes[:, 0].double()
    span = left.max() - left.min() + 2 * (boxes[:, 2] - boxes[:, 0]).max().double() + 1 if len(boxes) else left.sum()
    left = left + groups * span
    left, order = left.sort()
    reach = left + (1 - iou) * (boxes[:, 2] - boxes[:, 0])[order].double() * (1 + 1e-6)
    counts = torch.searchsorted(left, reach, right=True) - torch.arange(1, len(left) + 1)
    pairs = []
    for chunk in _chunks(counts):
        first = torch.arange(chunk.start, chunk.stop).repeat_interleave(counts[chunk])
        starts = counts[chunk].cumsum(0) - counts[chunk]
        step = torch.arange(len(first)) - starts.repeat_interleave(counts[chunk])
        one, other = order[first], order[first + step + 1]
        pairs.append(torch.stack([torch.minimum(one, other), torch.maximum(one, other)])[:, _iou(boxes, one, other) > iou])
    better, worse = torch.cat(pairs, dim=1) if pairs else torch.zeros((2, 0), dtype=torch.long)
    return better, worse


def _chunks(counts: Tensor) -> list[slice]:
    """Runs of boxes with at most `PAIRS` candidates in all, or one box."""
    block = counts.cumsum(0) // PAIRS
    ends = torch.nonzero(block[1:] != block[:-1]).flatten() + 1
    edges = [0, *ends.tolist(), len(counts)]
    return [slice(start, stop) for start, stop in pairwise(edges) if stop > start]


def _iou(boxes: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of boxes at ``one`` and at ``other``."""
    a, b = boxes[one], boxes[other]
    inter = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    return inter / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inter)


def place_in_image(image: Tensor) -> Tensor:
    """0, 1, 2... for the boxes (N,) of each image, which are in its order."""
    places = torch.arange(len(image), device=image.device)
    return places - torch.searchsorted(image, image)


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) cut at the borders of an image of ``size`` (rows, columns)."""
    x, y = boxes[..., 0::2].clamp(0, size[1]), boxes[..., 1::2].clamp(0, size[0])
    return torch.stack([x, y], dim=-1).flatten(-2)


def _usable(boxes: Tensor) -> Tensor:
    """Whether each box (..., 4) is finite and has an extent."""
    return torch.isfinite(boxes).all(dim=-1) & (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
