from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances

from deepdisc_ops.config import InferenceSettings, ModelSettings, TrainingConfig
from deepdisc_ops.errors import ConfigError
from deepdisc_ops.model.backbones import RESIDUAL_NETS, build_backbone
from deepdisc_ops.model.build import DeepDisc


def settings(**changes: object) -> ModelSettings:
    tree = {
        "input": {"noise_njy": [1.0] * 6},
        "backbone": {"name": "tiny", "fpn_channels": 16},
        "box_head": {"hidden": [32]},
        "redshift_head": {"hidden": [32, 16]},
    }
    return ModelSettings.model_validate(tree | changes)


def build(**changes: object) -> DeepDisc:
    torch.manual_seed(0)
    return DeepDisc(settings(**changes), InferenceSettings())


def targets(labelled: bool, *, masks: bool = False, n: int = 5) -> Instances:
    truth = Instances((64, 64))
    centre = torch.rand(n, 2, generator=torch.Generator().manual_seed(n)) * 48 + 8
    truth.gt_boxes = Boxes(torch.cat([centre - 6, centre + 6], 1))
    truth.gt_classes = torch.zeros(n, dtype=torch.long)
    truth.gt_redshift = torch.linspace(0.2, 2, n) if labelled else torch.full((n,), torch.nan)
    truth.gt_ebv = torch.full((n,), 0.03)
    if masks:
        truth.gt_masks = BitMasks(torch.rand(n, 64, 64) > 0.5)
    return truth


IMAGES = torch.randn(2, 6, 64, 64, generator=torch.Generator().manual_seed(1)) * 3


def test_gradients_reach_every_parameter() -> None:
    network = build(mask_head=True).train()
    losses = network.losses(IMAGES, [targets(True, masks=True), targets(True, masks=True)])
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask", "loss_redshift"} == set(losses)
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert without == []


def test_a_cascade_has_three_stages() -> None:
    losses = build(box_head={"stages": 3, "hidden": [32]}).train().losses(IMAGES, [targets(True), targets(True)])
    assert {f"loss_cls_stage{i}" for i in range(3)} <= set(losses)


@pytest.mark.parametrize(
    "truth", [(targets(False), targets(False)), (targets(True, n=0), targets(True, n=0)), (targets(False), targets(True, n=0))]
)
def test_batches_without_a_labelled_redshift_train_the_rest(truth: tuple[Instances, Instances]) -> None:
    losses = build().train().losses(IMAGES, list(truth))
    total = torch.stack(list(losses.values())).sum()
    assert torch.isfinite(total)
    assert losses["loss_redshift"] == 0
    total.backward()


@pytest.mark.parametrize("bands", [1, 2, 9])
def test_any_number_of_bands(bands: int) -> None:
    names = tuple(f"b{i}" for i in range(bands))
    network = build(bands=names, input={"noise_njy": [1.0] * bands}).eval()
    with torch.inference_mode():
        features, found = network.detect(torch.randn(1, bands, 64, 64))
        mixture = network.redshift(features, [found[0].pred_boxes], torch.zeros(len(found[0])))
    assert mixture.means.shape == (len(found[0]), 5)


@pytest.mark.parametrize("name", RESIDUAL_NETS)
@pytest.mark.parametrize("stem_stride", [1, 4])
def test_backbones_give_levels_of_doubling_stride(name: str, stem_stride: int) -> None:
    model = settings(backbone={"name": name, "fpn_channels": 8, "stem_stride": stem_stride, "levels": 3})
    backbone = build_backbone(6, model.backbone)
    strides = [shape.stride for shape in backbone.output_shape().values()]
    assert strides == [stem_stride, 2 * stem_stride, 4 * stem_stride]
    if name in ("tiny", "resnet50"):
        with torch.inference_mode():
            maps = backbone(torch.zeros(1, 6, 32, 32))
        assert [m.shape[-1] for m in maps.values()] == [32 // stride for stride in strides]


def test_second_step_alone_gives_the_same_mixtures() -> None:
    network = build().eval()
    with torch.inference_mode():
        features, found = network.detect(IMAGES)
        boxes = [instances.pred_boxes for instances in found]
        ebv = torch.full((sum(map(len, boxes)),), 0.05)
        first = network.redshift(features, boxes, ebv)
        again = network.redshift(network.features(IMAGES), boxes, ebv)
    torch.testing.assert_close(first.means, again.means)
    assert (first.log_sigmas >= np.log(0.003) - 1e-6).all()


def test_means_start_where_they_are_told() -> None:
    network = build().eval()
    means = torch.tensor([0.3, 0.6, 0.9, 1.2, 1.8])
    network.redshift_head.start_at(means, 0.4)
    with torch.inference_mode():
        mixture = network.redshift(network.features(IMAGES[:1]), [Boxes(torch.tensor([[8.0, 8, 20, 20]]))], torch.zeros(1))
    assert (mixture.means - means).abs().max() < 0.2


def test_proposals_follow_the_area() -> None:
    network = build().eval()
    with torch.inference_mode():
        network.detect(torch.zeros(1, 6, 64, 64))
        small = network.proposals.post_nms_topk[False]
        network.detect(torch.zeros(1, 6, 512, 512))
    assert small == 100
    assert network.proposals.post_nms_topk[False] == pytest.approx(8000 * 512**2 / 1e6, abs=1)


def seen_by_the_network(images: torch.Tensor, **settings: object) -> torch.Tensor:
    """What reaches the backbone."""
    network = build(input=settings)
    network.backbone = torch.nn.Identity()
    return network.features(images)  # type: ignore[return-value]


def test_scalings_are_those_of_their_names() -> None:
    flux = torch.randn(2, 6, 8, 8) * 20 + 5
    noise, mean, std = ([s * (band + 1.0) for band in range(6)] for s in (2.0, 0.5, 30.0))
    column = torch.arange(1.0, 7).view(1, 6, 1, 1)
    seen = partial(seen_by_the_network, flux, noise_njy=noise, softening=3.0)
    torch.testing.assert_close(seen(scaling="arcsinh"), torch.arcsinh(flux / (6 * column)))
    torch.testing.assert_close(seen(scaling="linear"), flux / (6 * column))
    torch.testing.assert_close(seen(scaling="snr"), flux / (2 * column))
    zscore = seen_by_the_network(flux, scaling="zscore", mean_njy=mean, std_njy=std)
    torch.testing.assert_close(zscore, (flux - 0.5 * column) / (30 * column))


def test_what_a_scaling_needs_must_be_known() -> None:
    with pytest.raises(ConfigError, match="model.input.mean_njy and model.input.std_njy not set"):
        build(input={"scaling": "zscore", "noise_njy": [1.0] * 6})
    with pytest.raises(ConfigError, match="model.input.noise_njy not set"):
        build(input={"scaling": "snr"})
    for name in ("noise_njy", "mean_njy", "std_njy"):
        with pytest.raises(ValueError, match=f"input.{name} has 2 values for 6 bands"):
            settings(input={name: [1.0, 1.0]})


def test_noise_must_be_known() -> None:
    with pytest.raises(ConfigError, match="noise_njy"):
        DeepDisc(ModelSettings(), TrainingConfig().inference)
