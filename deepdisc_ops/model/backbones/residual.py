"""Residual networks: ResNet 18 to 152 (He et al. 2016) and two smaller ones for few cores.

Glossary: B images, C bands, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from detectron2.modeling.backbone import Backbone, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import Tensor, nn

from deepdisc_ops.config import BackboneSettings
from deepdisc_ops.model.backbones.layers import norm_layer


@dataclass(frozen=True)
class ResidualNet:
    """Blocks and output channels of each stage."""

    block: type[BasicBlock | BottleneckBlock]
    blocks: tuple[int, ...]
    channels: tuple[int, ...]
    stem_channels: int


NARROW = (64, 128, 256, 512)
WIDE = (256, 512, 1024, 2048)
RESIDUAL_NETS = {
    "tiny": ResidualNet(BasicBlock, (1, 1, 1, 1), (32, 64, 96, 128), 24),
    "small": ResidualNet(BasicBlock, (2, 2, 2, 2), (48, 96, 128, 192), 32),
    "resnet18": ResidualNet(BasicBlock, (2, 2, 2, 2), NARROW, 64),
    "resnet34": ResidualNet(BasicBlock, (3, 4, 6, 3), NARROW, 64),
    "resnet50": ResidualNet(BottleneckBlock, (3, 4, 6, 3), WIDE, 64),
    "resnet101": ResidualNet(BottleneckBlock, (3, 4, 23, 3), WIDE, 64),
    "resnet152": ResidualNet(BottleneckBlock, (3, 8, 36, 3), WIDE, 64),
}


class Stem(CNNBlockBase):
    """First convolution, from C bands to features at 1/stride: (B, C, H, W) -> (B, out, H/stride, W/stride).

    With ``pool`` a max pooling does the last halving, as in He et al.; with stride 4 that is detectron2's BasicStem.
    """

    def __init__(self, bands: int, out_channels: int, stride: int, norm: str, *, pool: bool = False) -> None:
        super().__init__(bands, out_channels, stride)
        size = 3 if stride == 1 else 7
        self.pool = pool
        self.conv1 = Conv2d(
            bands,
            out_channels,
            size,
            stride=stride // 2 if pool else stride,
            padding=size // 2,
            bias=False,
            norm=get_norm(norm_layer(norm), out_channels),
        )
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, rectify, and pool if told to."""
        x = torch.relu_(self.conv1(x))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1) if self.pool else x


def build_residual(bands: int, settings: BackboneSettings) -> Backbone:
    """The first ``settings.levels`` stages of a residual network, res2 on."""
    net = RESIDUAL_NETS[settings.name]
    stages, channels = [], net.stem_channels
    for level in range(settings.levels):
        out, count = net.channels[level], net.blocks[level]
        bottleneck = {"bottleneck_channels": out // 4, "stride_in_1x1": settings.stride_in_1x1}
        stages.append(
            ResNet.make_stage(
                net.block,
                count,
                stride_per_block=[1 if level == 0 else 2] + [1] * (count - 1),
                in_channels=channels,
                out_channels=out,
                norm=norm_layer(settings.norm),
                **(bottleneck if net.block is BottleneckBlock else {}),
            )
        )
        channels = out
    stem = Stem(bands, net.stem_channels, settings.stem_stride, settings.norm, pool=settings.stem_pool)
    return ResNet(stem, stages, out_features=[f"res{level + 2}" for level in range(settings.levels)])
