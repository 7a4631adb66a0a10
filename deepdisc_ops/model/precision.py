"""Numbers of fewer bits in the products of a network, and processors that are made for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

PRECISIONS: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def computes_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies in bf16, rather than imitating it, which on a CPU is many times slower than float32."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    can = torch.cpu.get_capabilities()
    return any(can.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
