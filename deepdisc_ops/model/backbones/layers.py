"""What the families of backbones share: norms of any width, padding for any stride, blocks that forget their activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal

from torch import nn
from torch.utils.checkpoint import checkpoint


def norm_layer(name: str) -> str | Callable[[int], nn.Module]:
    """The norm as detectron2 takes it; group norm with 32 groups, or as many as divide both 32 and the channels."""
    return (lambda channels: nn.GroupNorm(math.gcd(32, channels), channels)) if name == "GN" else name


def padding(kernel: int, stride: int) -> int | Literal["same"]:
    """Padding with which a convolution of this kernel turns H pixels, a multiple of the stride, into H / stride."""
    return "same" if stride == 1 else (kernel - stride + 1) // 2


def patch_projection(bands: int, channels: int, kernel: int, stride: int) -> nn.Conv2d:
    """The first convolution of a transformer: (B, bands, H, W) -> (B, channels, H / stride, W / stride)."""
    return nn.Conv2d(bands, channels, kernel, stride=stride, padding=padding(kernel, stride))


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Let blocks compute their activations again in the backward pass instead of keeping them; names of weights stay."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
