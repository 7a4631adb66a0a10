from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from deepdisc_ops.config import BACKBONES, BackboneSettings, TrainingConfig, validate
from deepdisc_ops.errors import ConfigError, ImageError
from deepdisc_ops.model.backbones import build_backbone
from deepdisc_ops.model.table import build_on_meta, on_meta

SHARED = Path(__file__).parents[3] / "shared" / "data"
TIMM = ("timm/convnext_atto", "timm/resnet18", "timm/tf_efficientnet_b0")


DEEP = ("resnet101", "resnet152", "mvitv2_b", "mvitv2_l", "mvitv2_h", "swin_s", "swin_b", "swin_l", "vitdet_l")


def _slow_if_deep(name: str) -> object:
    return pytest.param(name, marks=pytest.mark.slow) if name in DEEP else name


def settings(name: str, **changes: object) -> BackboneSettings:
    return BackboneSettings.model_validate({"name": name, "fpn_channels": 32, "norm": "LN"} | changes)


def shapes(maps: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(each.shape) for name, each in maps.items()}


def expected(stem_stride: int, levels: int, size: int, channels: int = 32) -> dict[str, tuple[int, ...]]:
    strides = [stem_stride * 2**level for level in range(levels)]
    return {f"p{int(math.log2(stride))}": (1, channels, size // stride, size // stride) for stride in strides}


def forward(backbone: Backbone, *shape: int) -> dict[str, Tensor]:
    with on_meta():
        return backbone(torch.empty(*shape))


def unreached(backbone: Backbone, maps: dict[str, Tensor]) -> list[str]:
    parameters = dict(backbone.named_parameters())
    gradients = torch.autograd.grad([each.sum() for each in maps.values()], list(parameters.values()), allow_unused=True)
    return [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]


@pytest.mark.parametrize("name", [*(_slow_if_deep(name) for name in BACKBONES), *TIMM])
def test_every_backbone_has_its_levels_and_gradients_reach_every_parameter(name: str) -> None:
    """Which parameters the pyramid depends on is known without their values."""
    backbone = build_on_meta(6, settings(name, stem_stride=4, levels=4))
    maps = forward(backbone, 1, 6, 64, 64)
    assert shapes(maps) == expected(4, 4, 64)
    assert unreached(backbone, maps) == []


@pytest.mark.parametrize("name", ["tiny", "resnet50", "mvitv2_t", "swin_t", "vitdet_b", *TIMM])
@pytest.mark.parametrize(("stem_stride", "levels", "bands"), [(2, 3, 9), (1, 1, 1)])
def test_levels_are_as_stated_for_odd_settings(name: str, stem_stride: int, levels: int, bands: int) -> None:
    backbone = build_on_meta(bands, settings(name, stem_stride=stem_stride, levels=levels))
    maps, levels_of_image = forward(backbone, 1, bands, 64, 64), expected(stem_stride, levels, 64)
    assert shapes(maps) == levels_of_image
    assert unreached(backbone, maps) == []
    stated = {level: (shape.channels, shape.stride) for level, shape in backbone.output_shape().items()}
    assert stated == {level: (32, 64 // shape[2]) for level, shape in levels_of_image.items()}


@pytest.mark.parametrize("name", ["tiny", "mvitv2_t", "swin_t", "timm/convnext_atto"])
def test_built_for_real_the_maps_are_finite_and_learn(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(2, settings(name, stem_stride=4, levels=2))
    maps = backbone(torch.randn(1, 2, 32, 64))
    assert [tuple(each.shape[2:]) for each in maps.values()] == [(8, 16), (4, 8)]
    torch.stack([each.square().mean() for each in maps.values()]).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in backbone.parameters())


@pytest.mark.parametrize("name", ["mvitv2_t", "swin_t", "vitdet_b", "timm/convnext_atto"])
def test_another_stem_stride_changes_no_shape_of_a_weight(name: str) -> None:
    """So that pretrained weights fit whatever the stride."""
    coarse, fine = (build_on_meta(3, settings(name, stem_stride=stride, levels=3)).state_dict() for stride in (4, 2))
    bottom_up = [key for key in coarse if "bottom_up" in key or key.startswith("net.")]
    assert len(bottom_up) > 50
    assert [key for key in bottom_up if coarse[key].shape != fine[key].shape] == []


PUBLISHED = {"levels": 4, "stem_stride": 4, "fpn_channels": 256, "top_level": True}
RESNET = {"norm": "FrozenBN", "fpn_norm": "", "stem_pool": True, "stride_in_1x1": True}


@pytest.mark.parametrize(("file", "name", "changes"), [("r50", "resnet50", RESNET), ("mvitv2_b", "mvitv2_b", {})])
def test_published_networks_have_their_keys_and_shapes(file: str, name: str, changes: dict[str, object]) -> None:
    path = SHARED / f"deepdisc_{file}_state_dict.txt"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    lines = (line.partition(" ") for line in path.read_text().splitlines() if line.startswith("backbone."))
    published = {key.removeprefix("backbone."): tuple(map(int, re.findall(r"\d+", shape))) for key, _, shape in lines}
    backbone = build_on_meta(6, settings(name, **PUBLISHED | changes))
    assert {key: tuple(value.shape) for key, value in backbone.state_dict().items()} == published
    assert list(backbone.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]


def test_a_pooled_stem_is_that_of_detectron2() -> None:
    from detectron2.modeling.backbone.resnet import BasicStem

    ours = build_backbone(2, settings("resnet18", stem_stride=4, levels=1, stem_pool=True, norm="BN")).bottom_up.stem.eval()
    theirs = BasicStem(2, 64).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 2, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize("name", ["tiny", "swin_t", "vitdet_b", "timm/convnext_atto"])
@pytest.mark.parametrize("stem_stride", [1, 4])
def test_the_top_level_is_every_other_pixel_of_the_last(name: str, stem_stride: int) -> None:
    levels = 3
    backbone = build_on_meta(2, settings(name, stem_stride=stem_stride, levels=levels, top_level=True))
    assert shapes(forward(backbone, 1, 2, 64, 64)) == expected(stem_stride, levels + 1, 64)
    maps = [torch.arange(16.0).view(1, 1, 4, 4)]
    torch.testing.assert_close(backbone.top_block(maps[0])[0], maps[0][..., ::2, ::2])


@pytest.mark.parametrize("name", ["tiny", "mvitv2_t", "vitdet_b"])
def test_group_norm_takes_any_number_of_channels(name: str) -> None:
    backbone = build_on_meta(1, settings(name, norm="GN", fpn_channels=20, stem_stride=4, levels=2))
    assert shapes(forward(backbone, 1, 1, 64, 64)) == expected(4, 2, 64, channels=20)


@pytest.mark.parametrize("name", ["mvitv2_t", "swin_t", pytest.param("vitdet_b", marks=pytest.mark.slow)])
def test_recomputed_activations_give_the_same_gradients_from_less_memory(name: str) -> None:
    chosen = settings(name, stem_stride=4, levels=1, drop_path=0.0, fpn_channels=8)
    torch.manual_seed(0)
    keeping = build_backbone(2, chosen)
    torch.manual_seed(0)
    recomputing = build_backbone(2, chosen.model_copy(update={"recompute": True}))
    images = torch.randn(1, 2, 64, 64)
    (kept, much), (again, little) = _gradients(keeping, images), _gradients(copy.deepcopy(recomputing), images)
    assert little < 0.6 * much
    assert kept.keys() == again.keys()
    for key, gradient in kept.items():
        torch.testing.assert_close(gradient, again[key], msg=key)


def _gradients(backbone: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], int]:
    """Of a loss, and the number of values kept from the forward pass for the backward pass, weights aside."""
    weights, values = {p.data_ptr() for p in backbone.parameters()}, 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal values
        values += tensor.numel() * (tensor.data_ptr() not in weights)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = torch.stack([each.square().sum() for each in backbone(images).values()]).sum()
    loss.backward()
    return {key: p.grad for key, p in backbone.named_parameters() if p.grad is not None}, values


@pytest.mark.parametrize("name", ["tiny", "mvitv2_t", "swin_t", "vitdet_b", "timm/convnext_atto"])
def test_images_that_cannot_be_halved_evenly_are_refused(name: str) -> None:
    backbone = build_on_meta(2, settings(name, stem_stride=4, levels=3))
    with pytest.raises(ImageError, match=r"image of 72x64 px; its sides must be multiples of 16"):
        forward(backbone, 1, 2, 64, 72)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet49", "resnet"),
        ("ResNet50", "resnet50"),
        ("mvit_b", "mvitv2_b"),
        ("swin_tiny", "swin_t"),
        ("convnext_tiny", "timm/convnext_tiny"),
        ("timm/convnext_tinny", "timm/convnext_tiny"),
    ],
)
def test_unknown_backbones_bring_up_the_nearest_name(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"model.backbone.name: no backbone has this name; did you mean '{nearest}"):
        validate(TrainingConfig, {"model": {"backbone": {"name": name}}}, "test")


def test_a_name_like_no_other_brings_up_all() -> None:
    with pytest.raises(ConfigError, match="there are tiny, small, resnet18"):
        validate(TrainingConfig, {"model": {"backbone": {"name": "qqqqqqqqqqqq"}}}, "test")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"name": "mvitv2_b", "stem_pool": True}, "stem_pool means nothing for mvitv2_b"),
        ({"name": "resnet18", "stem_pool": True, "stem_stride": 1}, "set stem_stride to 2 or 4"),
        ({"name": "resnet18", "stride_in_1x1": True}, "resnet50, resnet101 and resnet152"),
        ({"name": "resnet18", "recompute": True}, "MViTv2, Swin and ViTDet can"),
        ({"name": "small", "drop_path": 0.1}, "never skipped"),
        ({"name": "swin_t", "levels": 5}, "swin_t has 4 stages"),
    ],
)
def test_settings_a_family_cannot_have_are_refused(changes: dict[str, object], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        validate(BackboneSettings, changes, "test")


@pytest.mark.parametrize(
    ("name", "changes", "fault"),
    [
        ("timm/convnext_atto", {"levels": 5}, r"maps at strides 4, 8, 16, 32: .*levels 5 would need 4, 8, 16, 32, 64"),
        ("timm/mixer_b16_224", {}, r"cannot be used with stem_stride 4 and images of any size \(.*224"),
        ("vitdet_b", {"fpn_norm": ""}, "set fpn_norm to LN"),
    ],
)
def test_what_an_architecture_cannot_give_is_told(name: str, changes: dict[str, object], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        build_on_meta(3, settings(name, **{"stem_stride": 4} | changes))


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "timm/swin_tiny_patch4_window7_224", "timm/resnet18"])
def test_timm_models_of_other_kinds_make_pyramids_too(name: str) -> None:
    """Plain transformers, and models that were made for one size of image."""
    backbone = build_backbone(2, settings(name, stem_stride=4, levels=2)).eval()
    with torch.inference_mode():
        for size in (64, 96):
            assert shapes(backbone(torch.randn(1, 2, size, size))) == expected(4, 2, size)
