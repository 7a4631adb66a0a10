"""Plain transformers as in ViTDet (Li et al. 2022), detectron2's module: one map, from which the pyramid is drawn up and down."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from detectron2.modeling.backbone import Backbone, ViT
from torch import nn

from deepdisc_ops.config import BackboneSettings
from deepdisc_ops.model.backbones.layers import patch_projection, recompute

KERNEL = 16
FINEST = 4  # the pyramid's first level has this many times the resolution of the map
POSITIONS = 14  # side of the map in the pretraining on 224 px
DETECTION_POSITIONS = 64  # and in ViTDet's training on 1024 px, which sizes the tables of relative positions


@dataclass(frozen=True)
class ViTSize:
    """Width, heads, blocks (the last of every quarter sees the whole image), and the published rate of skipped blocks."""

    channels: int
    heads: int
    blocks: int
    drop_path: float


VITS = {"vitdet_b": ViTSize(768, 12, 12, 0.1), "vitdet_l": ViTSize(1024, 16, 24, 0.4)}


def build_vit(bands: int, settings: BackboneSettings) -> Backbone:
    """A plain transformer with patches at 4 x ``settings.stem_stride``; patches of a smaller stride overlap."""
    size, stride = VITS[settings.name], FINEST * settings.stem_stride
    net = ViT(
        img_size=DETECTION_POSITIONS * stride,
        patch_size=stride,
        in_chans=bands,
        embed_dim=size.channels,
        depth=size.blocks,
        num_heads=size.heads,
        drop_path_rate=size.drop_path if settings.drop_path is None else settings.drop_path,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        window_size=14,
        window_block_indexes=[block for block in range(size.blocks) if (block + 1) % (size.blocks // 4)],
        use_rel_pos=True,
        pretrain_img_size=POSITIONS * stride,
    )
    net.patch_embed.proj = patch_projection(bands, size.channels, KERNEL, stride)
    if settings.recompute:
        recompute(net.blocks)
    return net
