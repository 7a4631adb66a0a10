from __future__ import annotations

import math

import pytest
import torch
from typer.testing import CliRunner

from deepdisc_ops.cli import app
from deepdisc_ops.config import BACKBONES, BackboneSettings
from deepdisc_ops.errors import ConfigError
from deepdisc_ops.model.table import cost, learn

PUBLISHED = {"stem_stride": 4, "levels": 4, "fpn_channels": 256, "norm": "LN"}
SMALL = ("tiny", "small", "resnet18", "timm/convnext_atto")


def settings(name: str, **changes: object) -> BackboneSettings:
    return BackboneSettings.model_validate({"name": name} | PUBLISHED | changes)


def test_the_operations_are_those_of_the_field() -> None:
    """ResNet50 with a pyramid at 6x512x512: 71 GFLOP, counted by hand from the published network's layers."""
    published = settings("resnet50", norm="FrozenBN", fpn_norm="", stem_pool=True, stride_in_1x1=True)
    assert cost(published, 6, 512).gflop == pytest.approx(71.2, abs=0.1)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["resnet18", "swin_t", "mvitv2_t"])
def test_fvcore_counts_the_same(name: str) -> None:
    """It traces real tensors and counts a multiplication and addition as one."""
    from fvcore.nn import FlopCountAnalysis

    from deepdisc_ops.model.backbones import build_backbone

    chosen = settings(name, fpn_channels=32, levels=3)
    needs = cost(chosen, 2, 64)
    backbone = build_backbone(2, chosen).eval()
    assert needs.parameters == sum(p.numel() for p in backbone.parameters())
    count = FlopCountAnalysis(backbone, torch.zeros(1, 2, 64, 64)).unsupported_ops_warnings(False)
    by_operator = count.uncalled_modules_warnings(False).by_operator()
    products = sum(value for operator, value in by_operator.items() if operator in ("conv", "linear", "matmul", "einsum", "bmm"))
    assert needs.gflop == pytest.approx(2 * products / 1e9, rel=0.01)


def test_the_largest_is_counted_without_its_memory() -> None:
    assert cost(settings("mvitv2_h"), 6, 512).parameters == pytest.approx(668.5e6, rel=0.01)


@pytest.mark.parametrize("name", SMALL)
def test_the_whole_network_learns_with_the_light_ones(name: str) -> None:
    step = learn(settings(name, fpn_channels=32), 6, 64)
    assert math.isfinite(step.loss)
    assert step.without_gradient == 0
    assert not step.unsound


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BACKBONES if name not in SMALL])
def test_the_whole_network_learns_with_the_heavy_ones(name: str) -> None:
    assert not learn(settings(name), 6, 128).unsound


def test_the_table_has_a_row_for_each_asked() -> None:
    names = ["tiny", "timm/convnext_atto", "vitdet_b"]
    options = ["--bands", "2", "--size", "64", "--set", "fpn_channels=16"]
    result = CliRunner().invoke(app, ["model", "table", *names, *options], catch_exceptions=False)
    assert result.exit_code == 0
    rows = {line.split()[1]: line for line in result.output.splitlines() if line.startswith("│")}
    assert list(rows) == names
    assert "with --all" in rows["vitdet_b"]
    assert "GFLOP at 2x64x64" in result.output


def test_what_the_table_cannot_do_is_told() -> None:
    for arguments, fault in (
        (["resnet49"], "did you mean"),
        (["tiny", "--size", "100"], "--size 100 is no multiple of 32, the coarsest stride; take 128"),
    ):
        result = CliRunner().invoke(app, ["model", "table", *arguments])
        assert isinstance(result.exception, ConfigError)
        assert fault in str(result.exception)
