"""One trained member on a device: tiles in, detections with redshift mixtures out.

Glossary: B tiles, C bands, H x W pixels, N objects of all tiles, K components.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from numpy.typing import NDArray
from torch import Tensor

from deepdisc_ops.config import InferenceSettings, TrainingConfig
from deepdisc_ops.errors import ConfigError, SetupError
from deepdisc_ops.model.build import DeepDisc, Features
from deepdisc_ops.model.detection import pick
from deepdisc_ops.model.precision import PRECISIONS, computes_bf16
from deepdisc_ops.model.weights import load_member
from deepdisc_ops.photoz.mixture import GaussianMixture
from deepdisc_ops.sky.detections import MASK_SIDE, Detections

EbvAt = Callable[[NDArray[np.floating], NDArray[np.floating]], NDArray[np.float32]]
"""E(B-V) in mag at pixel positions (x, y) of the tile."""
Pixels = NDArray[np.float32]


class Member:
    """A network in evaluation mode with the config it was trained with. Threads may share one."""

    def __init__(self, network: DeepDisc, config: TrainingConfig, device: str = "cpu") -> None:
        self.network = network.eval().to(torch.device(device)).to(memory_format=torch.channels_last)
        self.config = config
        self.device = torch.device(device)
        _check_precision(config.inference, self.device)

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Member:
        """From a checkpoint folder, `prepared`."""
        network, info = load_member(folder, device)
        return cls(network, info.config, device).prepared()

    def prepared(self) -> Member:
        """This member made fast, once and for inference alone: its network can neither be trained nor saved any more.

        Sets this process's threads and compiles the backbone if the config asks for it; raises `SetupError` where compilation
        is not possible.
        """
        settings = self.config.inference
        self.network.freeze()
        self.network.to(memory_format=torch.channels_last)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        if settings.compile:
            self._compile()
        return self

    @property
    def components(self) -> int:
        """K of this member's mixtures."""
        return self.config.model.redshift_head.components

    @property
    def stride(self) -> int:
        """Tile origins belong on multiples of this."""
        return self.network.stride

    def predict(self, tile: Pixels, ebv_at: EbvAt, masks: bool = False) -> Detections:
        """Detect, look up E(B-V) at the boxes, and give each box its redshift mixture; see `predict_batch`."""
        return self.predict_batch([tile], [ebv_at], masks)[0]

    @torch.inference_mode()
    def predict_batch(self, tiles: Sequence[Pixels], ebv_at: Sequence[EbvAt], masks: bool = False) -> list[Detections]:
        """Detections of each tile (C, H, W) nJy in the order of the model's bands, invalid pixels zero.

        Tiles of any sizes: those alike once padded to multiples of the stride go through the network together. They are not
        padded to one size, which would change what is seen at their edges. ``masks`` asks for `Detections.masks`.
        """
        found: dict[int, Detections] = {}
        for alike in _by_size([self._padded(tile.shape[1:]) for tile in tiles]):
            answers = self._predict_alike([tiles[i] for i in alike], [ebv_at[i] for i in alike], masks)
            found |= dict(zip(alike, answers, strict=True))
        return [found[i] for i in range(len(tiles))]

    @torch.inference_mode()
    def redshift(self, tile: Pixels, boxes: NDArray[np.float32], ebv: NDArray[np.float32]) -> GaussianMixture:
        """The second step alone: mixtures of given ``boxes`` (N, 4) of ``tile``."""
        given = Boxes(torch.as_tensor(boxes, dtype=torch.float32, device=self.device).reshape(-1, 4))
        with self._autocast():
            features = self.network.features(self._to_device([tile]))
            return self.network.redshift(features, [given], torch.as_tensor(ebv, dtype=torch.float32, device=self.device))

    @torch.inference_mode()
    def pooled(self, tile: Pixels, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the redshift head is shown of given ``boxes`` (N, 4) of ``tile``, E(B-V) aside: pooled features (N, D)."""
        given = Boxes(torch.as_tensor(boxes, dtype=torch.float32, device=self.device).reshape(-1, 4))
        with self._autocast():
            features = self.network.features(self._to_device([tile]))
            return np.asarray(self.network.redshift_head.pooled(features, [given]).float().cpu().numpy())

    @torch.inference_mode()
    def at_thresholds(self, tile: Pixels, score: float, overlaps: Sequence[float]) -> list[tuple[Pixels, Pixels]]:
        """Boxes (N, 4) px and scores (N,), the best first, with a score above ``score``: for each overlap that NMS may leave."""
        with self._autocast():
            _, candidates = self.network.candidates(self._to_device([tile]))
        found = [pick(candidates, score, overlap) for overlap in overlaps]
        return [(one.boxes.cpu().numpy(), one.scores.cpu().numpy()) for one in found]

    def _predict_alike(self, tiles: Sequence[Pixels], ebv_at: Sequence[EbvAt], masks: bool) -> list[Detections]:
        """`predict_batch` of tiles of one padded size; boxes and answers go to the host once for all of them."""
        with self._autocast():
            features, instances = self.network.detect(self._to_device(tiles))
            found = [_inside(one, tile.shape[1:]) for one, tile in zip(instances, tiles, strict=True)]
            boxes = [one.pred_boxes for one in found]
            host_boxes = Boxes.cat(boxes).tensor.cpu().numpy()
            parts = _slices([len(one) for one in found])
            ebv = np.concatenate([_ebv(at, host_boxes[part]) for at, part in zip(ebv_at, parts, strict=True)])
            mixture = self.network.redshift(features, boxes, torch.as_tensor(ebv, device=self.device))
            classes = torch.cat([one.pred_classes for one in found])
            crops = self._masks(features, boxes, classes) if masks else None
        every = _detections(host_boxes, torch.cat([one.scores for one in found]), classes, mixture, ebv, crops)
        return [every.select(np.arange(part.start, part.stop)) for part in parts]

    def _masks(self, features: Features, boxes: Sequence[Boxes], classes: Tensor) -> NDArray[np.uint8]:
        """Masks (N, 28, 28) in 1/255, on the host."""
        crops = self.network.masks(features, boxes, classes)
        return np.asarray((255 * crops).round().to(torch.uint8).cpu().numpy()).reshape(-1, MASK_SIDE, MASK_SIDE)

    def _autocast(self) -> AbstractContextManager[object]:
        settings = self.config.inference
        precision = settings.precision
        if precision == "auto":
            precision = "bf16" if settings.preset == "fast" and computes_bf16(self.device) else "float32"
        return nullcontext() if precision == "float32" else torch.autocast(self.device.type, PRECISIONS[precision])

    def _compile(self) -> None:
        """Compile the backbone where it is, on a small image of empty sky."""
        backbone, bands = self.network.backbone, len(self.config.model.bands)
        backbone.compile()
        try:
            with torch.inference_mode(), self._autocast():
                self.network.features(self._to_device([np.zeros((bands, 2 * self.stride, 2 * self.stride), np.float32)]))
        except RuntimeError as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise SetupError(
                f"inference.compile is on, but torch cannot compile the backbone here ({reason[:160]}); "
                "install what it misses, on a CPU a C++ compiler, or set inference.compile to false"
            ) from None

    def _padded(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of a tile of ``size`` padded to multiples of the stride."""
        return size[0] + -size[0] % self.stride, size[1] + -size[1] % self.stride

    def _to_device(self, tiles: Sequence[Pixels]) -> Tensor:
        """(B, C, H', W') on the device, padded once with empty sky to multiples of the stride; tiles of one padded size."""
        height, width = self._padded(tiles[0].shape[1:])
        pixels = torch.zeros((len(tiles), tiles[0].shape[0], height, width), dtype=torch.float32)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        for i, tile in enumerate(tiles):
            pixels[i, :, : tile.shape[1], : tile.shape[2]] = torch.as_tensor(tile)
        return pixels.to(self.device)


def _check_precision(settings: InferenceSettings, device: torch.device) -> None:
    if settings.precision == "fp16" and device.type == "cpu":
        raise ConfigError("inference.precision is fp16, which CPUs do not compute in; set it to bf16 or float32")


def _by_size(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Indices of equal sizes together."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, size in enumerate(sizes):
        groups.setdefault(size, []).append(i)
    return list(groups.values())


def _slices(counts: Sequence[int]) -> list[slice]:
    """Where the objects of each tile are in a list of all."""
    ends = np.cumsum(counts)
    return [slice(int(end) - count, int(end)) for end, count in zip(ends, counts, strict=True)]


def _inside(found: Instances, size: Sequence[int]) -> Instances:
    """The objects cut at the borders of the tile of ``size`` (rows, columns), those that lie in its padding left out."""
    inside = found[torch.arange(len(found), device=found.scores.device)]
    inside.pred_boxes.clip((size[0], size[1]))
    return inside[inside.pred_boxes.nonempty()]


def _ebv(ebv_at: EbvAt, boxes: Pixels) -> Pixels:
    """E(B-V) (N,) in mag at the centres of boxes."""
    x, y = (boxes[:, :2] + boxes[:, 2:]).T / 2 - 0.5
    return np.asarray(ebv_at(x, y), np.float32)


def _detections(
    boxes: Pixels, scores: Tensor, classes: Tensor, mixture: GaussianMixture, ebv: Pixels, masks: NDArray[np.uint8] | None
) -> Detections:
    n, k = mixture.means.shape
    columns = [scores[:, None].float(), classes[:, None].float(), mixture.weights, mixture.means, mixture.sigmas]
    host = torch.cat(columns, dim=1).cpu().numpy()
    weights, means, sigmas = (np.ascontiguousarray(host[:, 2 + i * k : 2 + (i + 1) * k]) for i in range(3))
    return Detections(
        boxes=boxes,
        scores=host[:, 0].copy(),
        classes=host[:, 1].astype(np.int32),
        weights=weights,
        means=means,
        sigmas=sigmas,
        ebv=ebv,
        n_members=np.ones(n, np.int32),
        flags=np.zeros(n, np.int32),
        masks=masks,
    )
