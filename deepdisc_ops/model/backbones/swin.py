"""Swin transformers (Liu et al. 2021), detectron2's module."""

from __future__ import annotations

from dataclasses import dataclass

from detectron2.modeling.backbone import Backbone, SwinTransformer
from torch import Tensor

from deepdisc_ops.config import BackboneSettings
from deepdisc_ops.model.backbones.layers import patch_projection, recompute

KERNEL = 4


@dataclass(frozen=True)
class SwinSize:
    """Width and heads of the first stage, which double with every stage, blocks a stage, and the rate of skipped blocks."""

    channels: int
    heads: int
    blocks: tuple[int, int, int, int]
    drop_path: float


SWINS = {
    "swin_t": SwinSize(96, 3, (2, 2, 6, 2), 0.2),
    "swin_s": SwinSize(96, 3, (2, 2, 18, 2), 0.2),
    "swin_b": SwinSize(128, 4, (2, 2, 18, 2), 0.4),
    "swin_l": SwinSize(192, 6, (2, 2, 18, 2), 0.4),
}


class Swin(SwinTransformer):
    """Swin with any stride of the patches; its maps are named so that they cannot be taken for those of the pyramid."""

    def __init__(self, bands: int, size: SwinSize, *, levels: int, stride: int, drop_path: float) -> None:
        super().__init__(
            in_chans=bands,
            embed_dim=size.channels,
            depths=size.blocks[:levels],
            num_heads=tuple(size.heads * 2**level for level in range(levels)),
            drop_path_rate=drop_path,
            out_indices=tuple(range(levels)),
        )
        self.patch_embed.patch_size = (stride, stride)
        self.patch_embed.proj = patch_projection(bands, size.channels, KERNEL, stride)
        self._out_features = [f"stage{level}" for level in range(levels)]
        self._out_feature_channels = {f"stage{level}": size.channels * 2**level for level in range(levels)}
        self._out_feature_strides = {f"stage{level}": stride * 2**level for level in range(levels)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) to the maps stage0, stage1, ..."""
        return dict(zip(self._out_features, super().forward(x).values(), strict=True))


def build_swin(bands: int, settings: BackboneSettings) -> Backbone:
    """The first ``settings.levels`` stages."""
    size = SWINS[settings.name]
    drop_path = size.drop_path if settings.drop_path is None else settings.drop_path
    net = Swin(bands, size, levels=settings.levels, stride=settings.stem_stride, drop_path=drop_path)
    if settings.recompute:
        for layer in net.layers:
            recompute(layer.blocks)
    return net
