"""The memory that a worker needs: estimated from what an archive says, and measured in a process of its own.

The estimate runs no network: the backbone is built without data (torch's meta device), and the sizes of what passes between its
layers are added up. It is meant for choosing how many workers fit on a node, and holds to about a third.

Glossary: C bands, W pixels of a window's side, T of a tile's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deepdisc_ops.config import TrainingConfig, validate
from deepdisc_ops.errors import ArchiveError

if TYPE_CHECKING:
    from torch import Tensor, nn

Mode = Literal["keep", "swap"]
"""Whether members stay in memory or are read one after the other, as of `Ensemble`."""
MODES: tuple[Mode, ...] = ("keep", "swap")
PROCESS_BYTES = 840 << 20
"""A worker without a model: interpreter, torch, detectron2, astropy; half of it are libraries that workers share."""
PLANES = 3
"""Copies of a window: as it came, as an array, and without its invalid pixels."""
LIVE = 1.5
"""Tensors alive at the widest layer, in units of its input and output: a block also keeps its shortcut."""
TAPS = 16
"""Pixels that a cell of ROIAlign sees, about: 2 x 2 samples of 4."""

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(512 << 20)}
"""The environment by which glibc's allocator keeps a window's memory for the next instead of asking the kernel for it again, which
took a tenth of a worker's time; it costs a fifth more resident memory."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a worker needs at most.

    process: without a model; weights: of the members kept at a time; network: what the largest member needs for its tiles, or
    while it is read; window: the pixels asked about.
    """

    process: int
    weights: int
    network: int
    window: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.process + self.weights + self.network + self.window

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {getattr(self, name) / 1e6:.0f}" for name in ("process", "weights", "network", "window"))
        return f"{self.total / 1e6:.0f} MB ({parts})"


def estimate(description: Mapping[str, Any], max_window: int = 2048, memory: Mode = "keep") -> Memory:
    """What a worker needs that serves the archive of ``description`` (`archive.inspect_archive`), on a CPU.

    ``max_window`` is the side in pixels of the largest window; ``memory`` is that of `Ensemble`.
    """
    configs = [validate(TrainingConfig, member["config"], str(member["name"])) for member in description["members"]]
    needs = [_of_member(config, max_window) for config in configs]
    kept = sum if memory == "keep" else max
    pixels = 4 * len(description["bands"]) * max_window**2
    return Memory(PROCESS_BYTES, kept([weights for weights, _ in needs]), max(network for _, network in needs), PLANES * pixels)


def measure(mar: Path, max_window: int = 2048, memory: Mode = "keep", timeout_s: float = 3600.0) -> int:
    """Bytes resident at most in a process that reads the archive and looks at one window of ``max_window`` pixels of sources."""
    command = [sys.executable, "-m", __name__, str(mar), str(max_window), memory]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s, env=ALLOCATOR | os.environ)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["no message"]
        raise ArchiveError(f"{mar} could not be tried ({lines[-1].strip()}); see deepdisc-ops archive verify")
    return int(result.stdout.split()[-1])


def _of_member(config: TrainingConfig, max_window: int) -> tuple[int, int]:
    """Bytes of a member's weights, and of what else it needs at most at a time."""
    import torch

    from deepdisc_ops.model.build import DeepDisc
    from deepdisc_ops.model.detection import CHUNK

    settings = config.inference
    with torch.device("meta"):
        network = DeepDisc(config.model, settings).eval()
        side = min(settings.tile, max_window)
        side += -side % network.stride
        tiles = torch.empty(settings.batch, len(config.model.bands), side, side)
        widest, features = _trace(network.backbone, tiles)
    weights = _bytes([*network.parameters(), *network.buffers()])
    heads = [(head.pool, head.hidden) for head in (config.model.redshift_head, config.model.box_head)]
    channels = config.model.backbone.fpn_channels
    # `Kernels` keeps the first layer of each head once more, in another order
    kernels = [4 * channels * pool**2 * next(iter(hidden), 0) for pool, hidden in heads]
    pooled = max(CHUNK * pool**2 * (2 * 4 * channels + 2 * 8 * TAPS) for pool, _ in heads)
    working = int(max(LIVE * widest, pooled)) + features + _bytes([tiles])
    return weights + kernels[0] + config.model.box_head.stages * kernels[1], max(working, 2 * weights)


def _trace(backbone: nn.Module, tiles: Tensor) -> tuple[int, int]:
    """Bytes that go into and come out of the layer with the most of both, and those of all feature maps."""
    import torch

    widest = 0

    def look(_: nn.Module, into: tuple[Any, ...], out: Any) -> None:
        nonlocal widest
        widest = max(widest, _bytes(_tensors(into)) + _bytes(_tensors(out)))

    hooks = [module.register_forward_hook(look) for module in backbone.modules() if not any(module.children())]
    with torch.inference_mode():
        features = backbone(tiles)
    for hook in hooks:
        hook.remove()
    return widest, _bytes(features.values())


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        return [tensor for part in tree for tensor in _tensors(part)]
    return [tree] if hasattr(tree, "nbytes") else []


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _try(mar: Path, max_window: int, memory: Mode) -> int:
    """The peak of this process after one window."""
    import re
    import tempfile

    import numpy as np

    from deepdisc_ops.inference.ensemble import Ensemble
    from deepdisc_ops.serving import canary, packing
    from deepdisc_ops.sky.detections import Array

    with tempfile.TemporaryDirectory(prefix="deepdisc-archive-") as folder:
        ensemble = Ensemble.load(packing.unpack_archive(mar, Path(folder)), memory=memory)
        image, _ = canary.draw(len(ensemble.bands), canary.noise(ensemble))
        repeats = -(-max_window // canary.SIDE)
        body = bytes(np.tile(image, (1, repeats, repeats))[:, :max_window, :max_window].tobytes())
        window: Array = np.frombuffer(body, np.float32).reshape(len(image), max_window, max_window).copy()
        ensemble.predict(window, canary.EBV, np.zeros(window.shape[1:], bool))
    status = Path("/proc/self/status").read_text()  # getrusage tells the peak of whoever started this process, if it was higher
    return 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0])


def _main(arguments: Sequence[str]) -> None:
    mar, max_window, memory = arguments
    sys.stdout.write(f"{_try(Path(mar), int(max_window), 'swap' if memory == 'swap' else 'keep')}\n")


if __name__ == "__main__":
    _main(sys.argv[1:])
