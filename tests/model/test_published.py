"""Parity with the published network: weights and image by the rule of ../shared/data/README.md."""

from __future__ import annotations

import ast
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.layers import paste_masks_in_image
from typer.testing import CliRunner

from deepdisc_ops.cli.weights import weights_app
from deepdisc_ops.config import TrainingConfig, validate
from deepdisc_ops.errors import CheckpointError
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.model.published import export_checkpoint, export_state, import_checkpoint, import_state, unlike_published
from deepdisc_ops.model.weights import load_member, save_member

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_lists = pytest.mark.skipif(not SHARED.is_dir(), reason="the lists of the published network's keys are not here")
Shapes = dict[str, tuple[int, ...]]
RESNET18 = {"name": "resnet18", "stem_stride": 4, "stem_pool": True, "levels": 4, "top_level": True, "fpn_channels": 16}
RESNET18 |= {"norm": "FrozenBN", "fpn_norm": ""}


def listed(name: str) -> Shapes:
    """Key and shape of every tensor of a published network, in its order."""
    lines = (SHARED / f"deepdisc_{name}_state_dict.txt").read_text().splitlines()
    return {key: ast.literal_eval(shape) for key, shape in (line.split(" ", 1) for line in lines)}


def drawn(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) > 1:
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
    return torch.ones(shape) if key.endswith(("running_var", "norm.weight")) else torch.zeros(shape)


def small_published() -> tuple[DeepDisc, TrainingConfig]:
    """A network as DeepDISC has them, of the smallest ResNet and narrow heads."""
    tree = {
        "model": {
            "bands": ["g", "r", "i"],
            "classes": ["galaxy", "star"],
            "pixel_scale": 0.2,
            "input": {"scaling": "zscore", "mean_njy": [0.0] * 3, "std_njy": [57.5] * 3},
            "backbone": RESNET18,
            "anchor_sizes": [8, 16, 32, 64, 128],
            "proposals": {"aspect_ratios": [0.5, 1, 2], "anchor_offset": 0.0},
            "pooler": {"canonical_size": 224, "canonical_level": 4},
            "box_head": {"stages": 3, "hidden": [24, 24], "pool": 7},
            "mask_head": True,
            "redshift_head": {"hidden": [32, 16], "activation": "tanh", "pool": 7, "sigma_floor": 0, "components": 3},
        },
    }
    config = validate(TrainingConfig, tree, "test")
    torch.manual_seed(3)
    return DeepDisc(config.model, config.inference).eval(), config


@needs_lists
def test_the_published_resnet_answers_as_published() -> None:
    state = {key: drawn(key, shape) for key, shape in listed("r50").items()}
    network, config, report = import_state(state, ["inference.score_threshold=0.0"])
    assert (len(report.matched), report.adapted, report.ignored, report.left) == (len(state), {}, {}, ())
    pixels = np.random.default_rng(zlib.crc32(b"image")).standard_normal((6, 256, 256)).astype(np.float32)
    with torch.inference_mode():
        features, (found,) = network.detect(torch.from_numpy(pixels)[None])
        mixture = network.redshift(features, [found.pred_boxes], torch.full((len(found),), 0.03))
        masks = network.masks(features, [found.pred_boxes], found.pred_classes)
    with np.load(SHARED / "deepdisc_r50_parity.npz") as published:
        np.testing.assert_allclose(found.pred_boxes.tensor, published["boxes"], atol=1e-2, rtol=0)
        np.testing.assert_allclose(found.scores, published["scores"], atol=1e-4, rtol=0)
        np.testing.assert_array_equal(found.pred_classes, published["classes"])
        ours = torch.cat([mixture.logits, mixture.means, mixture.log_sigmas], 1)
        np.testing.assert_allclose(ours, published["mixture"], atol=1e-3, rtol=0)
        pasted = paste_masks_in_image(masks, found.pred_boxes, (256, 256), threshold=0.5)
        assert (np.abs(pasted.sum((1, 2)).numpy() - published["mask_area"]) <= 2).all()
    assert sum(p.numel() for p in network.redshift_head.parameters()) == 12_913_679
    assert_same(export_state(network), state)
    assert unlike_published(config.model, state) == []


@needs_lists
def test_the_published_mvit_comes_and_goes_bit_for_bit() -> None:
    shapes = listed("mvitv2_b")
    state = {key: torch.arange(math.prod(shape), dtype=torch.float32).view(shape) for key, shape in shapes.items()}
    network, config, report = import_state(state)
    assert len(report.matched) == len(state)
    assert (config.model.backbone.name, config.model.proposals.convolutions, config.model.box_head.norm) == ("mvitv2_b", 2, "LN")
    assert_same(export_state(network), state)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    for key, value in other.items():
        assert one[key].dtype == value.dtype, key
        assert torch.equal(one[key], value), key


def test_a_checkpoint_file_comes_home(spaced: Path) -> None:
    network, config = small_published()
    state = export_state(network)
    assert any(key.startswith("roi_heads.redshift_fc.4.") for key in state)
    training = {"iteration": 7, "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(2)}}}, "best": np.float64(0.5)}
    torch.save({"model": state, **training}, spaced / "model_final.pth")
    overrides = ["model.bands=[g, r, i]", "model.pixel_scale=0.2", "inference.score_threshold=0.3"]
    imported, theirs, report = import_checkpoint(spaced / "model_final.pth", overrides, unit_njy=57.5)
    assert set(report.ignored) == {"iteration", "optimizer", "best"}
    assert theirs.model.input == config.model.input
    assert theirs.model.classes == ("galaxy", "star")
    save_member(spaced / "member", imported, theirs, {}, 0)
    again, info = load_member(spaced / "member")
    export_checkpoint(again, info.config.model, spaced / "out" / "model.pth")
    assert_same(torch.load(spaced / "out" / "model.pth", weights_only=True)["model"], state)


def test_the_commands_bring_a_checkpoint_in_and_out(spaced: Path) -> None:
    state = export_state(small_published()[0])
    torch.save({"model": state}, spaced / "in.pth")
    words = [
        "import-deepdisc",
        str(spaced / "in.pth"),
        str(spaced / "member"),
        "--zero-point",
        "27",
        "--set",
        "model.bands=[g,r,i]",
    ]
    told = CliRunner().invoke(weights_app, words)
    assert told.exit_code == 0
    assert f"{len(state)} matched, 0 adapted, 0 ignored, 0 left" in told.output
    _, info = load_member(spaced / "member")
    assert info.config.model.input.std_njy == pytest.approx((57.544,) * 3, rel=1e-4)
    assert CliRunner().invoke(weights_app, ["export-deepdisc", str(spaced / "member"), str(spaced / "out.pth")]).exit_code == 0
    assert_same(torch.load(spaced / "out.pth", weights_only=True)["model"], state)


def test_an_imported_network_computes_what_it_did(spaced: Path) -> None:
    network, _ = small_published()
    imported, _, _ = import_state(export_state(network), ["model.bands=[g, r, i]"])
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        for one, other in zip(network.features(images * 57.5).values(), imported.features(images).values(), strict=True):
            torch.testing.assert_close(one, other)


def test_buffers_of_old_checkpoints_set_the_input() -> None:
    state = export_state(small_published()[0])
    old = {"pixel_mean": torch.tensor([1.0, 2, 3]).view(3, 1, 1), "pixel_std": torch.full((3, 1, 1), 2.0)}
    old |= {"proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4)}
    _, config, report = import_state(state | old, ["model.bands=[g, r, i]"], unit_njy=10.0)
    assert config.model.input.mean_njy == (10.0, 20.0, 30.0)
    assert config.model.input.std_njy == (20.0, 20.0, 20.0)
    assert set(report.adapted) == {"pixel_mean", "pixel_std"}
    assert len(report.ignored) == 1


def test_what_cannot_be_imported_is_named(spaced: Path) -> None:
    state = export_state(small_published()[0])
    with pytest.raises(CheckpointError, match="of 3 bands, without their names; give model.bands"):
        import_state(state)
    with pytest.raises(CheckpointError, match=r"of 3 bands, model.bands names 2 \(g, r\); name its own"):
        import_state(state, ["model.bands=[g, r]"])
    lean = {key: value for key, value in state.items() if "redshift_fc" not in key}
    with pytest.raises(CheckpointError, match=r"gives no redshifts; its backbone can start a run as model\.backbone_weights"):
        import_state(lean, ["model.bands=[g, r, i]"])
    odd = {key: value for key, value in state.items() if "mask_fcn2" not in key} | {"roi_heads.box_head.0.fc9.x": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"unknown box_heads\.box_head"):
        import_state(odd, ["model.bands=[g, r, i]"])
    with pytest.raises(CheckpointError, match="expected a DeepDISC checkpoint"):
        import_state({"conv1.weight": torch.zeros(8, 3, 7, 7)})
    point = state | {"roi_heads.redshift_fc.4.weight": torch.zeros(1, 16)}
    with pytest.raises(CheckpointError, match="in 1 numbers; expected 3 for each Gaussian"):
        import_state(point, ["model.bands=[g, r, i]"])


class Foreign:
    """Stands for any class of a training program."""


def test_a_checkpoint_with_python_objects_or_damage_is_refused(spaced: Path) -> None:
    path = spaced / "model.pth"
    torch.save({"model": {}, "trainer": Foreign()}, path)
    with pytest.raises(CheckpointError, match="Python objects besides tensors.*save its weights alone"):
        import_checkpoint(path)
    torch.save({"model": export_state(small_published()[0])}, path)
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(CheckpointError, match=r"model\.pth cannot be read"):
        import_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"absent\.pth cannot be read"):
        import_checkpoint(spaced / "absent.pth")


def test_what_deepdisc_does_not_have_is_not_exported(spaced: Path) -> None:
    network, config = small_published()
    model = config.model
    changed = model.model_copy(update={"redshift_head": model.redshift_head.model_copy(update={"activation": "gelu"})})
    with pytest.raises(CheckpointError, match="redshift_head.activation is gelu, there it is tanh"):
        export_checkpoint(network, changed, spaced / "model.pth")
    assert not (spaced / "model.pth").exists()
    floored = model.model_copy(update={"redshift_head": model.redshift_head.model_copy(update={"sigma_floor": 0.003})})
    assert unlike_published(floored, export_state(network)) == []
