from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from deepdisc_ops.config import InferenceSettings, ModelSettings, PoolerSettings, RedshiftHeadSettings, validate
from deepdisc_ops.data.loader import gold_redshift
from deepdisc_ops.errors import ConfigError
from deepdisc_ops.model.backbones import build_backbone
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.model.heads import RedshiftHead

TABLE_1 = {"hidden": [1024, 64], "activation": "tanh", "pool": 7}
IMAGES = torch.randn(2, 6, 64, 64, generator=torch.Generator().manual_seed(1)) * 3


def settings(**changes: object) -> ModelSettings:
    tree = {
        "input": {"noise_njy": [1.0] * 6},
        "backbone": {"name": "tiny", "fpn_channels": 16},
        "box_head": {"hidden": [32]},
        "redshift_head": {"hidden": [32, 16]},
    }
    return ModelSettings.model_validate(tree | changes)


def build(inference: InferenceSettings | None = None, **changes: object) -> DeepDisc:
    torch.manual_seed(0)
    return DeepDisc(settings(**changes), inference or InferenceSettings())


def truth(n: int = 4) -> Instances:
    centre = torch.rand(n, 2, generator=torch.Generator().manual_seed(n)) * 40 + 12
    found = Instances((64, 64))
    found.gt_boxes = Boxes(torch.cat([centre - 6, centre + 6], 1))
    found.gt_classes = torch.zeros(n, dtype=torch.long)
    found.gt_redshift = torch.linspace(0.2, 2, n)
    found.gt_ebv = torch.full((n,), 0.03)
    return found


def mixture_of(network: DeepDisc, boxes: torch.Tensor, ebv: float = 0.05) -> torch.Tensor:
    with torch.inference_mode():
        mixture = network.redshift(network.features(IMAGES[:1]), [Boxes(boxes)], torch.full((len(boxes),), ebv))
    return torch.cat([mixture.logits, mixture.means, mixture.log_sigmas], 1)


@pytest.mark.parametrize(("components", "parameters"), [(5, 12_913_679), (3, 12_913_289), (1, 12_912_899)])
def test_the_papers_redshift_head_has_its_number_of_parameters(components: int, parameters: int) -> None:
    """LSST paper, Table 1: 12544 features and E(B-V) -> 1024 -> 64 -> 3 K."""
    shapes = build_backbone(6, settings(backbone={"name": "tiny", "fpn_channels": 256}).backbone).output_shape()
    head = RedshiftHead(shapes, RedshiftHeadSettings.model_validate(TABLE_1 | {"components": components}), PoolerSettings())
    assert sum(p.numel() for p in head.parameters()) == parameters
    assert [type(layer).__name__ for layer in head.mixture] == ["Linear", "Tanh", "Linear", "Tanh", "Linear"]


def test_no_component_is_narrower_than_the_floor() -> None:
    boxes = torch.tensor([[4.0, 4, 20, 20], [10, 10, 13, 13]])
    free = mixture_of(build(redshift_head={"hidden": [16], "sigma_floor": 0.0}).eval(), boxes)
    floored = mixture_of(build(redshift_head={"hidden": [16], "sigma_floor": 0.5}).eval(), boxes)
    torch.testing.assert_close(free[:, :10], floored[:, :10])
    torch.testing.assert_close(floored[:, 10:].exp(), free[:, 10:].exp() + 0.5)


def test_reddening_is_an_input_unless_the_head_is_told_to_do_without() -> None:
    boxes = torch.tensor([[4.0, 4, 20, 20]])
    for takes in (True, False):
        network = build(redshift_head={"hidden": [16], "ebv": takes}).eval()
        assert torch.equal(mixture_of(network, boxes, 0.0), mixture_of(network, boxes, 1.0)) != takes


def test_true_boxes_train_every_labelled_object() -> None:
    seen = []
    for true_boxes in (True, False):
        head = {"hidden": [16], "true_boxes": true_boxes, "max_boxes": 500}
        network = build(redshift_head=head, box_head={"hidden": [32], "samples": 2}).train()
        network.redshift_head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[1]))
        torch.manual_seed(0)
        loss = network.losses(IMAGES, [truth(), truth(0)])["loss_redshift"]
        assert torch.isfinite(loss)
    with_truth, without = (sum(map(len, boxes)) for boxes in seen)
    assert with_truth == without + 4
    trained = {tuple(box.tolist()) for box in seen[0][0].tensor}
    assert {tuple(box.tolist()) for box in truth().gt_boxes.tensor} <= trained


def test_masks_are_crops_of_the_boxes_whose_class_they_are_asked_for() -> None:
    network = build(mask_head=True, classes=("galaxy", "star"), mask={"convolutions": 1, "norm": "GN"}).eval()
    with torch.inference_mode():
        features = network.features(IMAGES)
        boxes = [Boxes(torch.rand(300, 4) * 20 + torch.tensor([0.0, 0, 25, 25])), Boxes(torch.zeros(0, 4))]
        galaxies = network.masks(features, boxes, torch.zeros(300, dtype=torch.long))
        stars = network.masks(features, boxes, torch.ones(300, dtype=torch.long))
        reversed_order = network.masks(
            features, [boxes[0][torch.arange(299, -1, -1)], boxes[1]], torch.zeros(300, dtype=torch.long)
        )
        none = network.masks(features, [boxes[1], boxes[1]], torch.zeros(0, dtype=torch.long))
    assert galaxies.shape == (300, 28, 28)
    assert none.shape == (0, 28, 28)
    assert ((galaxies > 0) & (galaxies < 1)).all()
    assert not torch.equal(galaxies, stars)
    torch.testing.assert_close(reversed_order.flip(0), galaxies)


def test_a_mask_covers_its_box_from_edge_to_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    """With masks that show the pooled column itself: each column of a crop is the column of the image that it covers."""
    network = build(mask_head=True).eval()
    upsample = partial(torch.nn.functional.interpolate, scale_factor=2)
    monkeypatch.setattr(network.box_heads.mask_head, "layers", lambda pooled: upsample(pooled[:, :1]))
    columns = ((torch.arange(32) * 2 + 1.0 - 17) / 10).expand(1, 1, 32, 32)  # of the centres of features of stride 2
    features = {name: columns.repeat(1, 16, 1, 1)[..., ::step, ::step] for name, step in (("p1", 1), ("p2", 2), ("p3", 4))}
    crop = network.masks(features, [Boxes(torch.tensor([[10.0, 20, 24, 34]]))], torch.zeros(1, dtype=torch.long))[0]
    cells = (10 + torch.arange(14) + 0.5 - 17) / 10  # of 14 cells, each 1 px wide
    torch.testing.assert_close(crop.logit(), cells.repeat_interleave(2).expand(28, 28), atol=1e-3, rtol=0)


def test_a_network_without_a_mask_head_says_so() -> None:
    network = build().eval()
    with torch.inference_mode(), pytest.raises(ConfigError, match=r"no mask head; train one with model\.mask_head"):
        network.masks(network.features(IMAGES), [Boxes(torch.zeros(0, 4))] * 2, torch.zeros(0, dtype=torch.long))


def test_a_top_level_serves_proposals_alone() -> None:
    network = build(backbone={"name": "tiny", "fpn_channels": 16, "top_level": True}, anchor_sizes=[8, [12, 16], 30, 60][:1] * 4)
    assert len(network.proposals.in_features) == 4
    assert len(network.box_heads.box_in_features) == len(network.redshift_head.levels) == 3
    assert network.stride == 8
    losses = network.train().losses(IMAGES, [truth(), truth(0)])
    assert torch.isfinite(torch.stack(list(losses.values()))).all()


def test_several_anchors_a_place() -> None:
    network = build(
        anchor_sizes=[[8, 12], [16, 24], [32, 48]],
        proposals={"aspect_ratios": [0.5, 1, 2], "convolutions": 2, "anchor_offset": 0.0},
    )
    assert network.proposals.anchor_generator.num_anchors == [6, 6, 6]
    assert [name for name, _ in network.proposals.rpn_head.conv.named_children()] == ["conv0", "conv1"]
    with torch.inference_mode():
        anchors = network.proposals.anchor_generator([torch.zeros(1, 16, 2, 2)] * 3)
    sides = anchors[0].tensor[:6, 2:] - anchors[0].tensor[:6, :2]
    np.testing.assert_allclose(sides.prod(1).sqrt(), [8] * 3 + [12] * 3, rtol=1e-5)
    np.testing.assert_allclose(sides[:, 1] / sides[:, 0], [0.5, 1, 2] * 2, rtol=1e-5)
    assert torch.isfinite(torch.stack(list(network.train().losses(IMAGES, [truth(), truth()]).values()))).all()
    with pytest.raises(ConfigError, match="anchor_sizes has 1 and 2 sizes a level; give each level as many"):
        validate(ModelSettings, {"anchor_sizes": [8, [16, 24], 32]}, "test")


def test_convolutions_in_the_box_head_are_normalised() -> None:
    network = build(box_head={"hidden": [32], "convolutions": [8, 8], "norm": "LN", "stages": 3}).train()
    assert network.box_heads.box_head[2].conv2.norm.weight.shape == (8,)
    assert torch.isfinite(torch.stack(list(network.losses(IMAGES, [truth(), truth(0)]).values()))).all()


def test_fixed_caps_hold_whatever_the_area() -> None:
    network = build(InferenceSettings(score_threshold=0.0, fixed_proposals=(40, 30), max_detections=7)).eval()
    with torch.inference_mode():
        for side in (64, 128):
            _, found = network.detect(torch.randn(1, 6, side, side))
            assert len(found[0]) == 7
    assert (network.proposals.pre_nms_topk[False], network.proposals.post_nms_topk[False]) == (40, 30)


def test_the_gold_cut_and_the_stars() -> None:
    classes, mag = np.array([0, 1, 0, 1, 0]), np.array([24.0, 20.0, 25.4, 26.0, np.nan])
    z = np.array([0.5, 0.0, 1.0, 0.0, 2.0])
    nan = np.nan

    def labels(**head: object) -> list[float]:
        return gold_redshift(classes, mag, z, settings(redshift_head=head)).tolist()

    np.testing.assert_equal(labels(), [0.5, nan, nan, nan, nan])
    np.testing.assert_equal(labels(stars="z_all"), [0.5, 0.0, nan, nan, nan])
    np.testing.assert_equal(labels(gold_limit=25.5), [0.5, nan, 1.0, nan, nan])
    np.testing.assert_equal(labels(gold_limit=None, stars="z_all"), [0.5, 0.0, 1.0, 0.0, 2.0])
