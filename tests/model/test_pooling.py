"""Our pooling against detectron2's."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor

from deepdisc_ops.model.pooling import Pooler

SETTINGS = {"scales": (1 / 2, 1 / 4, 1 / 8), "pooler_type": "ROIAlignV2", "canonical_box_size": 14, "canonical_level": 1}


def pyramid(channels: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, channels, 48 >> i, 64 >> i, requires_grad=True) for i in range(3)]


def boxes_of_all_kinds() -> list[Boxes]:
    torch.manual_seed(1)
    centres, sides = torch.rand(120, 2) * torch.tensor([128.0, 96.0]), 2 + 120 * torch.rand(120, 2) ** 3
    many = torch.cat([centres - sides / 2, centres + sides / 2], dim=1)
    odd = torch.tensor(
        [
            [0.0, 0, 128, 96],  # the whole image
            [-30, -30, -5, 12],  # outside of it, on one side
            [120, 90, 400, 300],  # mostly outside
            [10, 10, 10, 10],  # nothing
            [10, 10, 10, 30],  # a line
            [40, 40, 40.01, 40.01],
            [300.3, 5, 307.1, 12],  # not to be rounded to half precision
        ]
    )
    return [Boxes(many[:70]), Boxes(torch.cat([odd, many[70:]]))]


def gradients(pooled: Tensor, levels: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(2)
    return list(torch.autograd.grad((pooled * torch.randn(pooled.shape)).sum(), levels))


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("side", [5, 7])
def test_boxes_of_all_kinds_are_pooled_as_by_detectron2(samples: int, side: int) -> None:
    levels, boxes = pyramid(), boxes_of_all_kinds()
    theirs = ROIPooler(output_size=side, sampling_ratio=samples, **SETTINGS)(levels, boxes)
    ours = Pooler(output_size=side, sampling_ratio=samples, **SETTINGS)(levels, boxes)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for mine, other in zip(gradients(ours, levels), gradients(theirs, levels), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_the_gradient_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    levels = [torch.randn(1, 2, 8 >> i, 8 >> i, dtype=torch.float64, requires_grad=True) for i in range(3)]
    boxes = Boxes(torch.tensor([[1.3, 2.1, 12.7, 9.9], [0.0, 0.0, 16.0, 16.0]]))
    pooler = Pooler(output_size=3, sampling_ratio=0, **SETTINGS)
    shift = 1e-2

    def total(pixels: Tensor) -> Tensor:
        return pooler([pixels, *levels[1:]], [boxes]).double().square().sum()

    (gradient,) = torch.autograd.grad(total(levels[0]), levels[:1])
    for place in [(0, 0, 2, 3), (0, 1, 4, 4), (0, 0, 7, 7)]:
        moved = torch.zeros_like(levels[0])
        moved[place] = shift
        with torch.no_grad():
            difference = (total(levels[0] + moved) - total(levels[0] - moved)) / (2 * shift)
        assert float(difference) == pytest.approx(float(gradient[place]), rel=1e-3, abs=1e-4)


def test_no_box_gives_no_features_and_no_gradient() -> None:
    levels = pyramid()
    pooled = Pooler(output_size=5, sampling_ratio=0, **SETTINGS)(levels, [Boxes(torch.zeros(0, 4))] * 2)
    assert pooled.shape == (0, 8, 5, 5)


def test_what_trains_in_half_precision_is_summed_in_single() -> None:
    levels, boxes = pyramid(), boxes_of_all_kinds()
    halves = [level.detach().bfloat16().requires_grad_() for level in levels]
    pooler = Pooler(output_size=5, sampling_ratio=0, **SETTINGS)
    torch.testing.assert_close(pooler(halves, boxes), pooler([half.float() for half in halves], boxes))
    assert pooler([half.detach() for half in halves], boxes).dtype == torch.bfloat16


def test_the_order_of_boxes_is_free() -> None:
    levels, boxes = pyramid(), Boxes.cat(boxes_of_all_kinds()).tensor
    image, order = torch.arange(len(boxes)) % 2, torch.randperm(len(boxes), generator=torch.Generator().manual_seed(2))
    pooler = Pooler(output_size=3, sampling_ratio=0, **SETTINGS)
    torch.testing.assert_close(pooler.pool(levels, boxes, image)[order], pooler.pool(levels, boxes[order], image[order]))


def test_the_kernel_for_gpus_answers_the_same() -> None:
    levels, boxes = pyramid(), Boxes.cat(boxes_of_all_kinds()).tensor
    image, pooler = torch.arange(len(boxes)) % 2, Pooler(output_size=5, sampling_ratio=0, **SETTINGS)
    torch.testing.assert_close(pooler.pool(levels, boxes, image), pooler._by_kernel(levels, boxes, image), atol=1e-4, rtol=1e-4)
    halves = [level.detach().bfloat16().requires_grad_() for level in levels]
    torch.testing.assert_close(pooler.pool(halves, boxes, image), pooler._by_kernel(halves, boxes, image), atol=1e-4, rtol=1e-4)


def test_a_box_that_is_no_number_keeps_its_place() -> None:
    levels, boxes = pyramid(), Boxes.cat(boxes_of_all_kinds()).tensor
    pooler, image = Pooler(output_size=5, sampling_ratio=0, **SETTINGS), torch.arange(len(boxes)) % 2
    pooled = pooler.pool(levels, boxes, image)
    boxes[3, 2] = torch.nan
    broken = pooler.pool(levels, boxes, image)
    assert (broken[3] == 0).all()
    others = torch.arange(len(boxes)) != 3
    torch.testing.assert_close(broken[others], pooled[others])
