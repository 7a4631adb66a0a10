"""Residual networks with a feature pyramid, for any number of bands.

Survey objects are small (5-pixel boxes are normal), so the stem's stride and the number of levels are settings and
the stem never pools. Glossary: B images, C bands, H x W pixels; level p_n has stride 2^n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from detectron2.modeling.backbone import FPN, Backbone, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import Tensor, nn

from deepdisc_ops.config import BackboneName, BackboneSettings


@dataclass(frozen=True)
class ResidualNet:
    """Blocks and output channels of each stage."""

    block: type[BasicBlock | BottleneckBlock]
    blocks: tuple[int, ...]
    channels: tuple[int, ...]
    stem_channels: int


WIDE = (256, 512, 1024, 2048)
RESIDUAL_NETS: dict[BackboneName, ResidualNet] = {
    "tiny": ResidualNet(BasicBlock, (1, 1, 1, 1), (32, 64, 96, 128), 24),
    "small": ResidualNet(BasicBlock, (2, 2, 2, 2), (48, 96, 128, 192), 32),
    "resnet18": ResidualNet(BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), 64),
    "resnet34": ResidualNet(BasicBlock, (3, 4, 6, 3), (64, 128, 256, 512), 64),
    "resnet50": ResidualNet(BottleneckBlock, (3, 4, 6, 3), WIDE, 64),
    "resnet101": ResidualNet(BottleneckBlock, (3, 4, 23, 3), WIDE, 64),
}


class Stem(CNNBlockBase):
    """First convolution, from C bands to features at 1/stride: (B, C, H, W) -> (B, out, H/stride, W/stride)."""

    def __init__(self, bands: int, out_channels: int, stride: int, norm: str) -> None:
        super().__init__(bands, out_channels, stride)
        size = 3 if stride == 1 else 7
        self.conv1 = Conv2d(
            bands, out_channels, size, stride=stride, padding=size // 2, bias=False, norm=get_norm(norm, out_channels)
        )
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, rectify."""
        return torch.relu_(self.conv1(x))


def build_backbone(bands: int, settings: BackboneSettings) -> Backbone:
    """A feature pyramid over ``bands`` input planes with ``settings.levels`` levels of ``fpn_channels``."""
    net = RESIDUAL_NETS[settings.name]
    stages, channels = [], net.stem_channels
    for level in range(settings.levels):
        out, count = net.channels[level], net.blocks[level]
        strides = [1 if level == 0 else 2] + [1] * (count - 1)
        extra = {"bottleneck_channels": out // 4} if net.block is BottleneckBlock else {}
        stages.append(
            ResNet.make_stage(
                net.block, count, stride_per_block=strides, in_channels=channels, out_channels=out, norm=settings.norm, **extra
            )
        )
        channels = out
    features = [f"res{level + 2}" for level in range(settings.levels)]
    bottom_up = ResNet(Stem(bands, net.stem_channels, settings.stem_stride, settings.norm), stages, out_features=features)
    return FPN(bottom_up, features, settings.fpn_channels, norm=settings.norm)
