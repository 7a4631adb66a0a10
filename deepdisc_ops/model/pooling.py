"""ROIAlign on a pyramid: features of boxes, pooled from the level that fits each box's size, as detectron2's `ROIPooler` does.

On a CPU they are made by gathering rows of channels, since torchvision's kernel walks the channels one by one: a cell is a weighted
sum of pixels, so all cells of all boxes of a level are one `embedding_bag`, and the gradient of its pixels is another.
Glossary: B images, N boxes of all images, C channels, h x w pixels of a level, S x S cells of a box, G samples of a cell along an
axis, T taps (pixels with their weights) of all cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes
from torch import Tensor
from torch.nn import functional

Taps = tuple[Tensor, Tensor, Tensor]
"""Pixels (T,) int32 and weights (T,) of all cells in turn, and where each cell's begin."""


class Pooler(ROIPooler):
    """detectron2's pooler, with a quick way on the CPU."""

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """Features (N, C, S, S), channels last, of the boxes of every image; x are the levels (B, C, h, w), finest first."""
        counts = torch.tensor([len(boxes) for boxes in box_lists], device=x[0].device)
        image = torch.arange(len(box_lists), device=x[0].device).repeat_interleave(counts)
        return self.pool(x, Boxes.cat(box_lists).tensor, image)

    def pool(self, levels: Sequence[Tensor], boxes: Tensor, image: Tensor) -> Tensor:
        """As `forward`, of boxes (N, 4) px in images ``image`` (N,); zeros for a box that is no number.

        What trains in half precision is summed in single.
        """
        boxes = torch.where(torch.isfinite(boxes).all(dim=1, keepdim=True), boxes, 0.0)
        if levels[0].device.type != "cpu":
            return self._by_kernel(levels, boxes, image)
        side, channels = self.output_size[0], levels[0].shape[1]
        dtype = torch.float32 if levels[0].requires_grad else levels[0].dtype
        order, parts = [], []
        level_of = assign_boxes_to_levels(
            [Boxes(boxes)], self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
        )
        for level, (features, align) in enumerate(zip(levels, self.level_poolers, strict=True)):
            here = torch.nonzero(level_of == level).flatten()
            scaled = boxes[here].detach().float() * align.spatial_scale - 0.5
            groups = _by_samples(scaled, side, align.sampling_ratio)
            order += [here[group] for _, group in groups]
            taps = [_taps(features.shape, scaled[group], image[here[group]], side, samples) for samples, group in groups]
            if taps:
                pixels = features.to(dtype).permute(0, 2, 3, 1).reshape(-1, channels)
                index, weights, starts = _joined(taps)
                parts.append(_WeightedSum.apply(pixels, index, weights.to(dtype), starts))
        if not parts:
            return levels[0].new_zeros((0, channels, side, side), dtype=dtype)
        cells = torch.cat(parts).view(-1, side, side, channels)
        return cells[torch.argsort(torch.cat(order))].permute(0, 3, 1, 2)

    def _by_kernel(self, levels: Sequence[Tensor], boxes: Tensor, image: Tensor) -> Tensor:
        """With torchvision's kernel, which is quick on a GPU; in single precision, since it rounds boxes to that of the pixels."""
        level_of = assign_boxes_to_levels(
            [Boxes(boxes)], self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
        )
        regions = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1)
        side = self.output_size[0]
        pooled = levels[0].new_zeros((len(boxes), levels[0].shape[1], side, side), dtype=torch.float32)
        for level, (features, align) in enumerate(zip(levels, self.level_poolers, strict=True)):
            here = torch.nonzero(level_of == level).flatten()
            pooled = pooled.index_put((here,), align(features.float(), regions[here]))
        return pooled


class _WeightedSum(torch.autograd.Function):
    """Sums of rows of ``pixels`` (R, C): those of `Taps`, bag by bag, times their weights."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, index: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(index, weights, starts)
        ctx.rows = len(pixels)
        return functional.embedding_bag(index, pixels, starts, per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]  # torch's own takes anything
        """Each pixel's gradient is the weighted sum over the bags that it is in."""
        (gradient,) = gradients
        index, weights, starts = ctx.saved_tensors
        lengths = torch.diff(starts, append=starts.new_tensor([len(index)]))
        bags = torch.arange(len(starts), dtype=index.dtype).repeat_interleave(lengths)
        by_pixel = torch.argsort(index, stable=True)
        ends = torch.bincount(index, minlength=ctx.rows).cumsum(0)
        firsts = functional.pad(ends[:-1], (1, 0)).to(index.dtype)
        of_pixels = functional.embedding_bag(
            bags[by_pixel], gradient.contiguous(), firsts, per_sample_weights=weights[by_pixel], mode="sum"
        )
        return of_pixels, None, None, None


def _by_samples(boxes: Tensor, side: int, fixed: int) -> list[tuple[tuple[int, int], Tensor]]:
    """Samples of a cell along y and x, as ROIAlign counts them, with the indices of the boxes that take so many.

    Boxes without extent, which have no samples, are given one of weight zero.
    """
    if fixed > 0:
        return [((fixed, fixed), torch.arange(len(boxes)))] if len(boxes) else []
    extent = boxes[:, [3, 2]] - boxes[:, [1, 0]]
    counts = torch.ceil(extent / side).clamp_min(0).long()
    kinds, kind = torch.unique(counts, dim=0, return_inverse=True)
    return [((gy, gx), torch.nonzero(kind == i).flatten()) for i, (gy, gx) in enumerate(kinds.tolist())]


def _taps(shape: torch.Size, boxes: Tensor, image: Tensor, side: int, samples: tuple[int, int]) -> Taps:
    """Taps of the cells of boxes (n, 4) in pixels of a level of ``shape`` (B, C, h, w), with the same number of samples a cell."""
    height, width = shape[2:]
    rows, row_weights = _along(boxes[:, 1], boxes[:, 3], side, samples[0], height)
    columns, column_weights = _along(boxes[:, 0], boxes[:, 2], side, samples[1], width)
    rows = rows * width + (image.to(rows.dtype) * (height * width))[:, None, None]
    index = rows[:, :, None, :, None] + columns[:, None, :, None, :]
    weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    cells = len(boxes) * side * side
    starts = torch.arange(0, index.numel(), index.numel() // cells, dtype=index.dtype)
    return index.flatten(), weights.flatten(), starts


def _along(start: Tensor, end: Tensor, side: int, samples: int, size: int) -> tuple[Tensor, Tensor]:
    """Pixels along an axis of ``size`` that the cells of boxes see, and their weights, each (n, S, 2 G).

    A cell is the mean of its samples, each interpolated between two pixels; samples beyond the map count as zero.
    """
    cell = (end - start) / side
    offset = (torch.arange(max(samples, 1), dtype=start.dtype) + 0.5) / max(samples, 1)
    place = torch.arange(side, dtype=start.dtype)[:, None] + offset
    position = start[:, None, None] + cell[:, None, None] * place
    inside = ((position >= -1) & (position <= size)).to(start.dtype) / max(samples, 1) * (samples > 0)
    position = position.clamp(0, size - 1)
    low = position.floor()
    beyond = position - low
    index = torch.cat([low, (low + 1).clamp(max=size - 1)], dim=2).int()
    return index, torch.cat([(1 - beyond) * inside, beyond * inside], dim=2)


def _joined(taps: Sequence[Taps]) -> Taps:
    """The taps of several groups of cells as those of one."""
    index, weights, starts = zip(*taps, strict=True)
    shifts = [0, *torch.tensor([len(each) for each in index]).cumsum(0).tolist()[:-1]]
    return torch.cat(index), torch.cat(weights), torch.cat([each + shift for each, shift in zip(starts, shifts, strict=True)])
