from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from deepdisc_ops.config import InferenceSettings, ModelSettings
from deepdisc_ops.errors import CheckpointError
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.model.pretrained import inflate, initialise, load_backbone, read_pickle, read_weights
from deepdisc_ops.model.weights import WEIGHTS, load_member, read_info

RESIDUAL = {"name": "resnet18", "fpn_channels": 8, "levels": 4, "stem_stride": 4, "stem_pool": True}


def settings(backbone: dict[str, object], **changes: object) -> ModelSettings:
    tree = {
        "input": {"scaling": "zscore", "mean_njy": [0.0] * 6, "std_njy": [1.0] * 6},
        "backbone": backbone,
        "anchor_sizes": [8, 16, 32, 64, 128, 256][: int(str(backbone.get("levels", 3)))],
        "box_head": {"hidden": [8]},
        "redshift_head": {"hidden": [8]},
    }
    return ModelSettings.model_validate(tree | changes)


def build(model: ModelSettings) -> DeepDisc:
    return DeepDisc(model, InferenceSettings()).eval()


def torchvision_resnet18() -> torch.nn.Module:
    """With batch statistics that are not those of a fresh network."""
    torch.manual_seed(5)
    net = torchvision.models.resnet18(weights=None)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                module.weight.uniform_(0.5, 2.0)
    return net.eval()


def test_a_backbone_gives_torchvisions_features(spaced: Path) -> None:
    """The second opinion: torchvision's own network, with 6 equal planes for its 3."""
    net = torchvision_resnet18()
    torch.save(net.state_dict(), spaced / "resnet18.pth")
    for norm in ("BN", "FrozenBN"):
        model = settings(RESIDUAL | {"norm": norm}, backbone_weights=spaced / "resnet18.pth", first_convolution="inflate")
        network = build(model)
        report = initialise(network, model)
        plane = torch.randn(1, 1, 64, 64)
        with torch.inference_mode():
            x = net.maxpool(net.relu(net.bn1(net.conv1(plane.expand(1, 3, 64, 64)))))
            theirs = net.layer4(net.layer3(net.layer2(net.layer1(x))))
            ours = network.backbone.bottom_up(plane.expand(1, 6, 64, 64))["res5"]
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        assert report is not None
        assert report.adapted == {"conv1.weight": "inflated from 3 bands to 6"}
        assert set(report.ignored) >= {"fc.weight", "fc.bias"}
        assert all(".fpn_" in key for key in report.left)
        told = {key for key, _, _ in report.rows()}
        assert told >= set(net.state_dict())
        assert "inflated from 3 bands to 6" in str(report)


def test_the_first_convolution_starts_anew_as_in_the_papers() -> None:
    model = settings(RESIDUAL)
    network = build(model)
    before = network.backbone.bottom_up.stem.conv1.weight.clone()
    report = load_backbone(network, torchvision_resnet18().state_dict(), model)
    assert torch.equal(network.backbone.bottom_up.stem.conv1.weight, before)
    assert report.adapted == {"conv1.weight": "re-initialised: 3 bands in the file, 6 here"}


def test_equal_bands_are_taken_as_they_are() -> None:
    model = settings(RESIDUAL, bands=("g", "r", "i"), input={"noise_njy": [1.0] * 3})
    network, net = build(model), torchvision_resnet18()
    report = load_backbone(network, net.state_dict(), model)
    assert torch.equal(network.backbone.bottom_up.stem.conv1.weight, net.conv1.weight)
    assert report.adapted == {}


def test_a_stem_of_another_kernel_starts_anew() -> None:
    model = settings({"name": "resnet18", "fpn_channels": 8, "stem_stride": 1}, first_convolution="inflate")
    report = load_backbone(build(model), torchvision_resnet18().state_dict(), model)
    assert report.adapted == {"conv1.weight": "re-initialised: (64, 3, 7, 7) in the file, (64, 6, 3, 3) here"}


@pytest.mark.parametrize("bands", [1, 3, 6, 9])
def test_inflated_weights_answer_equal_bands_as_equal_colours(bands: int) -> None:
    weight = torch.randn(4, 3, 7, 7)
    plane = torch.randn(1, 1, 16, 16)
    three = torch.nn.functional.conv2d(plane.expand(1, 3, 16, 16), weight)
    many = torch.nn.functional.conv2d(plane.expand(1, bands, 16, 16), inflate(weight, bands))
    torch.testing.assert_close(three, many, rtol=1e-4, atol=1e-4)


def test_statistics_of_a_batch_mean_nothing_to_another_norm() -> None:
    model = settings(RESIDUAL | {"norm": "GN"})
    network = build(model)
    report = load_backbone(network, torchvision_resnet18().state_dict(), model)
    assert torch.equal(network.backbone.bottom_up.stem.conv1.norm.weight, torch.ones(64))
    assert report.ignored["bn1.weight"] == "of a batch normalisation, which this backbone does not have"


def caffe2(network: DeepDisc) -> dict[str, np.ndarray]:
    """Weights under the names that Detectron 1 gave them: no statistics, folded into weight and bias."""
    arrays = {}
    for key, value in network.backbone.bottom_up.state_dict().items():
        stage, *rest = key.split(".")
        if key.endswith(("running_mean", "running_var", "num_batches_tracked")):
            continue
        if stage == "stem":
            name = "res_conv1_bn" if "norm" in key else "conv1"
        else:
            branch = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}[rest[1]]
            name = f"{stage}_{rest[0]}_{branch}" + ("_bn" if "norm" in key else "")
        arrays[name + {"weight": "_s" if "norm" in key else "_w", "bias": "_b"}[rest[-1]]] = value.numpy()
    return arrays


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_of_both_detectrons_load(spaced: Path, protocol: int) -> None:
    torch.manual_seed(7)
    backbone = RESIDUAL | {"name": "resnet50", "levels": 2, "norm": "FrozenBN", "stride_in_1x1": True}
    model = settings(backbone)
    source = build(model)
    ours = source.backbone.bottom_up.state_dict()
    files: dict[str, Any] = {
        "R-50.pkl": {"model": {key: value.numpy() for key, value in ours.items()}, "__author__": "torchvision"},
        "MSRA.pkl": OrderedDict(caffe2(source) | {"fc1000_w": np.zeros((2, 2), np.float32), "conv1_w_momentum": np.zeros(1)}),
    }
    for name, tree in files.items():
        (spaced / name).write_bytes(pickle.dumps(tree, protocol=protocol))
        network = build(model)
        report = load_backbone(network, read_weights(spaced / name), model)
        assert report.adapted == {}
        for key, value in network.backbone.bottom_up.state_dict().items():
            if not key.endswith(("running_mean", "running_var")):
                assert torch.equal(value, ours[key]), key


class Dangerous:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("touched"),)  # type: ignore[return-value]


@pytest.mark.parametrize("where", ["array", "beside", "instead"])
def test_a_pickle_that_would_run_code_is_refused(spaced: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(spaced)
    array = np.array([Dangerous()], object) if where == "array" else np.zeros(3)
    tree: Any = Dangerous() if where == "instead" else {"conv1_w": array} | ({"x": Dangerous()} if where == "beside" else {})
    Path("bad.pkl").write_bytes(pickle.dumps(tree))
    with pytest.raises(CheckpointError, match=r"bad\.pkl is not read .*which may run code"):
        read_pickle(Path("bad.pkl"))
    assert not Path("touched").exists()


def test_damaged_and_absent_files_are_named(spaced: Path) -> None:
    (spaced / "cut.pkl").write_bytes(pickle.dumps({"conv1_w": np.zeros(1000)})[:900])
    (spaced / "list.pkl").write_bytes(pickle.dumps([1, 2]))
    (spaced / "text.pth").write_text("not weights")
    torch.save({"epoch": 3}, spaced / "nothing.pth")
    for name, message in (
        ("cut.pkl", "cut.pkl cannot be read"),
        ("list.pkl", "holds a list; expected a mapping"),
        ("text.pth", "text.pth .*; fetch it again"),
        ("nothing.pth", "holds no tensors but epoch"),
        ("absent.pkl", "do not exist"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_weights(spaced / name)


def test_weights_of_another_network_are_refused() -> None:
    model = settings(RESIDUAL | {"name": "resnet34"})
    with pytest.raises(
        CheckpointError, match=r"'resnet34': missing backbone\.bottom_up\.res4 \(8\), .*\(20 of 36 fit\); give weights"
    ):
        load_backbone(build(model), torchvision_resnet18().state_dict(), model)
    narrow = settings({"name": "small", "fpn_channels": 8})
    with pytest.raises(CheckpointError, match="of another shape"):
        load_backbone(build(narrow), torchvision_resnet18().state_dict(), narrow)


def test_timms_mvit_becomes_detectron2s() -> None:
    torch.manual_seed(2)
    theirs = timm.create_model("mvitv2_tiny", pretrained=False).eval()
    model = settings(
        {"name": "mvitv2_t", "fpn_channels": 8, "levels": 4, "stem_stride": 4, "norm": "LN"}, first_convolution="inflate"
    )
    network = build(model)
    report = load_backbone(network, theirs.state_dict(), model)
    ours = dict(network.backbone.bottom_up.named_parameters())
    for key, value in theirs.state_dict().items():
        if key.startswith("stages.3.blocks.1."):
            assert torch.equal(ours[key.replace("stages.3.blocks.1.", "blocks.9.")], value)
    assert set(report.ignored) == {"norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"}
    assert set(report.left) == {key for key in report.left if "fpn_" in key or "scale" in key}


def test_timms_swin_becomes_detectron2s() -> None:
    theirs = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False).state_dict()
    model = settings({"name": "swin_t", "fpn_channels": 8, "levels": 4, "stem_stride": 4, "norm": "LN"})
    network = build(model)
    report = load_backbone(network, theirs, model)
    ours = network.backbone.bottom_up.state_dict()
    assert torch.equal(ours["layers.0.downsample.reduction.weight"], theirs["layers.1.downsample.reduction.weight"])
    assert set(report.adapted) == {"patch_embed.proj.weight"}


def test_timms_own_files_start_its_models() -> None:
    torch.manual_seed(2)
    theirs = timm.create_model("convnext_atto", pretrained=False).state_dict()
    model = settings({"name": "timm/convnext_atto", "fpn_channels": 8, "levels": 3, "stem_stride": 4}, first_convolution="inflate")
    network = build(model)
    report = load_backbone(network, theirs, model)
    assert set(report.adapted) == {"stem.0.weight"}
    assert all(key.startswith(("head", "stages.3")) for key in report.ignored)


def test_tables_of_positions_are_interpolated() -> None:
    backbone = {"name": "mvitv2_t", "fpn_channels": 8, "levels": 1, "stem_stride": 4, "norm": "LN"}
    model = settings(backbone, anchor_sizes=[16])
    network = build(model)
    file = dict(network.backbone.bottom_up.state_dict())
    key = "blocks.0.attn.rel_pos_h"
    file[key] = torch.linspace(0, 1, 31)[:, None].expand(31, file[key].shape[1])
    report = load_backbone(network, file, model)
    table = network.backbone.bottom_up.state_dict()[key]
    assert report.adapted == {key: f"interpolated from 31 to {len(table)} positions"}
    assert (table.diff(dim=0) >= 0).all()
    assert 0 <= float(table.min()) < float(table.max()) <= 1


def test_a_member_and_a_bare_backbone_start_another_run(tiny_checkpoints: list[Path], spaced: Path) -> None:
    source, info = load_member(tiny_checkpoints[0])
    save_file({key: value.contiguous() for key, value in source.backbone.state_dict().items()}, spaced / "backbone.safetensors")
    torch.save({"model": {f"module.{key}": value for key, value in source.state_dict().items()}}, spaced / "parallel.pth")
    for path in (tiny_checkpoints[0], spaced / "backbone.safetensors", spaced / "parallel.pth"):
        model = read_info(tiny_checkpoints[0]).config.model.model_copy(update={"backbone_weights": path})
        network = DeepDisc(model, info.config.inference)
        report = initialise(network, model)
        assert report is not None
        assert report.left == ()
        assert report.adapted == {}
        for key, value in source.backbone.state_dict().items():
            assert torch.equal(network.backbone.state_dict()[key], value), key


def test_a_member_starts_a_whole_network(tiny_checkpoints: list[Path]) -> None:
    source, info = load_member(tiny_checkpoints[0])
    for path in (tiny_checkpoints[0], tiny_checkpoints[0] / WEIGHTS):
        model = info.config.model.model_copy(update={"weights": path})
        network = DeepDisc(model, info.config.inference)
        report = initialise(network, model)
        assert report is not None
        assert (report.left, report.adapted, report.ignored) == ((), {}, {})
        for key, value in source.state_dict().items():
            assert torch.equal(network.state_dict()[key], value), key


def test_a_member_of_another_shape_starts_nothing(tiny_checkpoints: list[Path]) -> None:
    info = read_info(tiny_checkpoints[0])
    wider = info.config.model.redshift_head.model_copy(update={"components": 9})
    model = info.config.model.model_copy(update={"weights": tiny_checkpoints[0], "redshift_head": wider})
    with pytest.raises(CheckpointError, match=r"of another shape redshift_head.*a run starts from a member of its own shape alone"):
        initialise(DeepDisc(model, info.config.inference), model)


def test_a_network_has_one_start() -> None:
    with pytest.raises(ValueError, match="weights gives the whole network its start.*leave one out"):
        settings(RESIDUAL, weights="member", backbone_weights="R-50.pkl")


def test_without_a_file_nothing_happens() -> None:
    model = settings(RESIDUAL)
    assert initialise(build(model), model) is None
