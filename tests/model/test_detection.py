"""Non-maximum suppression, caps and kernels of the engine, against torchvision and plain layers."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import nms

from deepdisc_ops.model.detection import Boxed, Candidates, Kernels, pick, place_in_image, without_overlaps


def crowd(n: int, seed: int, *, side: float = 60.0, largest: float = 30.0, images: int = 3, classes: int = 2) -> Boxed:
    """Boxes at random, some of them twice, some of no extent, many of equal score."""
    rng = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=rng) * side
    boxes = torch.cat([corner, corner + torch.rand(n, 2, generator=rng) * largest], 1)
    boxes[: n // 10] = boxes[n // 10 : n // 10 + n // 10]
    scores = (torch.rand(n, generator=rng) * 50).round() / 50
    classes_ = torch.randint(classes, (n,), generator=rng)
    return Boxed(boxes, scores, classes_, torch.randint(images, (n,), generator=rng).sort()[0])


@given(n=st.integers(0, 300), seed=st.integers(0, 1000), iou=st.sampled_from([0.1, 0.4, 0.5, 0.7, 0.95]))
def test_the_boxes_kept_are_torchvisions(n: int, seed: int, iou: float) -> None:
    every = crowd(n, seed)
    kept = without_overlaps(every, iou, 1000)
    expected = set()
    for image in range(3):
        for kind in range(2):
            own = torch.nonzero((every.image == image) & (every.classes == kind)).flatten()
            chosen = own[nms(every.boxes[own], every.scores[own], iou)]
            expected |= {(image, kind, *every.boxes[i].tolist(), float(every.scores[i])) for i in chosen.tolist()}
    rows = zip(kept.image.tolist(), kept.classes.tolist(), kept.boxes.tolist(), kept.scores.tolist(), strict=True)
    found = [(image, kind, *box, score) for image, kind, box, score in rows]
    assert len(found) == len(expected)
    assert set(found) == expected
    assert (kept.image.diff() >= 0).all()


def test_boxes_that_are_all_the_same_leave_one() -> None:
    n = 3000
    same = Boxed(torch.tensor([[3.0, 4, 9, 9]]).repeat(n, 1), torch.linspace(0, 1, n), torch.zeros(n).long(), torch.zeros(n).long())
    kept = without_overlaps(same, 0.5, 10)
    assert kept.scores.tolist() == [1.0]


@pytest.mark.parametrize("caps", [0, 3, torch.tensor([1, 5, 2])])
def test_the_best_of_each_image_stay_within_its_cap(caps: int | torch.Tensor) -> None:
    every = crowd(200, 4, largest=5.0)
    uncapped = without_overlaps(every, 0.3, 1000)
    kept = without_overlaps(every, 0.3, caps if isinstance(caps, int) else caps[every.image])
    for image in range(3):
        most = caps if isinstance(caps, int) else int(caps[image])
        assert kept.boxes[kept.image == image].tolist() == uncapped.boxes[uncapped.image == image][:most].tolist()
    assert (kept.scores.diff()[kept.image.diff() == 0] <= 0).all()


def test_a_place_counts_from_each_images_first() -> None:
    assert place_in_image(torch.tensor([0, 0, 0, 2, 2, 5])).tolist() == [0, 1, 2, 0, 1, 0]
    assert len(place_in_image(torch.zeros(0, dtype=torch.long))) == 0


def test_picking_keeps_what_is_above_the_threshold_finite_and_of_some_extent() -> None:
    boxes = torch.tensor([[[0.0, 0, 5, 5]], [[10, 10, 10, 15]], [[20, 20, 25, torch.nan]], [[30, 30, 35, 35]], [[40, 40, 45, 45]]])
    scores = torch.tensor([[0.9, 0.8], [0.9, 0.1], [0.9, 0.1], [0.5, 0.3], [torch.nan, 0.7]])
    image = torch.zeros(5, dtype=torch.long)
    found = pick(Candidates(scores, boxes, image, torch.full((5,), 100)), 0.5, 0.5)
    assert [(round(score, 1), kind) for score, kind in zip(found.scores.tolist(), found.classes.tolist(), strict=True)] == [
        (0.9, 0),
        (0.8, 1),
        (0.7, 1),
    ]


def test_each_class_may_have_a_box_of_its_own() -> None:
    boxes = torch.tensor([[[0.0, 0, 5, 5], [50, 50, 60, 60]]])
    found = pick(Candidates(torch.tensor([[0.4, 0.9]]), boxes, torch.tensor([0]), torch.tensor([9])), 0.3, 0.5)
    assert found.boxes.tolist() == [[50, 50, 60, 60], [0, 0, 5, 5]]


@torch.no_grad()
def test_a_kernel_answers_as_its_layer_and_follows_it() -> None:
    layer, kernels = torch.nn.Linear(4 * 9 + 2, 7), Kernels()
    pooled, more = torch.randn(5, 4, 3, 3), torch.randn(5, 2)

    def plain() -> torch.Tensor:
        return layer(torch.cat([pooled.flatten(1), more], 1))

    torch.testing.assert_close(kernels.apply(layer, pooled, more), plain())
    layer.weight.mul_(2.0)
    torch.testing.assert_close(kernels.apply(layer, pooled, more), plain())
    torch.testing.assert_close(copy.deepcopy(kernels).apply(layer, pooled, more), plain())
    assert kernels.apply(layer, pooled[:0], more[:0]).shape == (0, 7)
