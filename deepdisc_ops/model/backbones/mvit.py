"""MViTv2 (Li et al. 2022), detectron2's module with the sizes of its MViTv2 project."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from detectron2.modeling.backbone import Backbone, MViT
from torch import nn

from deepdisc_ops.config import BackboneSettings
from deepdisc_ops.model.backbones.layers import padding, recompute

KERNEL = 7
PRETRAINED_TOKENS = 56  # side of the first stage's map in the pretraining on 224 px, which sizes the tables of positions


@dataclass(frozen=True)
class MViTSize:
    """Width, heads of the first stage, the last block of each stage, and the published rate of skipped blocks."""

    channels: int
    heads: int
    last_blocks: tuple[int, int, int, int]
    drop_path: float


MVITS = {
    "mvitv2_t": MViTSize(96, 1, (0, 2, 7, 9), 0.2),
    "mvitv2_s": MViTSize(96, 1, (0, 2, 13, 15), 0.2),
    "mvitv2_b": MViTSize(96, 1, (1, 4, 20, 23), 0.4),
    "mvitv2_l": MViTSize(144, 2, (1, 7, 43, 47), 0.5),
    "mvitv2_h": MViTSize(192, 3, (3, 11, 71, 79), 0.6),
}


def build_mvit(bands: int, settings: BackboneSettings) -> Backbone:
    """The first ``settings.levels`` stages, scale2 on; blocks after them, which would never learn, are not made."""
    size, stride = MVITS[settings.name], settings.stem_stride
    net = MViT(
        img_size=PRETRAINED_TOKENS * stride,
        patch_kernel=(KERNEL, KERNEL),
        patch_stride=(stride, stride),
        patch_padding=(padding(KERNEL, 2), padding(KERNEL, 2)),
        in_chans=bands,
        embed_dim=size.channels,
        depth=size.last_blocks[settings.levels - 1] + 1,
        num_heads=size.heads,
        last_block_indexes=size.last_blocks,
        drop_path_rate=size.drop_path if settings.drop_path is None else settings.drop_path,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        out_features=tuple(f"scale{level + 2}" for level in range(settings.levels)),
    )
    if settings.recompute:
        recompute(net.blocks)
    return net
