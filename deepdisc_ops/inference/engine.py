"""One trained member on a device: tiles in, detections with redshift mixtures out.

Glossary: C bands, H x W pixels, N objects, K components.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Boxes
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from deepdisc_ops.config import TrainingConfig
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.model.weights import load_member
from deepdisc_ops.photoz.mixture import GaussianMixture
from deepdisc_ops.sky.detections import Detections

EbvAt = Callable[[NDArray[np.floating], NDArray[np.floating]], NDArray[np.float32]]
"""E(B-V) in mag at pixel positions (x, y) of the tile."""


class Member:
    """A network in evaluation mode with the config it was trained with."""

    def __init__(self, network: DeepDisc, config: TrainingConfig, device: str = "cpu") -> None:
        self.network = network.eval().to(torch.device(device)).to(memory_format=torch.channels_last)
        self.config = config
        self.device = torch.device(device)
        self._lock = threading.Lock()  # a network adapts its caps to the tile; threads take turns

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Member:
        """From a checkpoint folder."""
        network, info = load_member(folder, device)
        return cls(network, info.config, device)

    @property
    def components(self) -> int:
        """K of this member's mixtures."""
        return self.config.model.redshift_head.components

    @property
    def stride(self) -> int:
        """Tile origins belong on multiples of this."""
        return self.network.stride

    @torch.inference_mode()
    def predict(self, tile: NDArray[np.float32], ebv_at: EbvAt) -> Detections:
        """Detect, look up E(B-V) at the boxes, and give each box its redshift mixture.

        tile (C, H, W) nJy in the order of the model's bands, invalid pixels zero.
        """
        with self._lock:
            features, found = self.network.detect(self._to_device(tile))
        height, width = tile.shape[1:]
        boxes = found[0].pred_boxes.tensor
        boxes = torch.stack([boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)], dim=2).flatten(1)
        order = _stable_order(boxes, found[0].scores)
        boxes, scores, classes = boxes[order], found[0].scores[order], found[0].pred_classes[order]
        host_boxes = boxes.float().cpu().numpy()
        ebv = ebv_at((host_boxes[:, 0] + host_boxes[:, 2]) / 2 - 0.5, (host_boxes[:, 1] + host_boxes[:, 3]) / 2 - 0.5)
        mixture = self.network.redshift(features, [Boxes(boxes)], torch.as_tensor(ebv, device=self.device))
        return _detections(host_boxes, scores, classes, mixture, ebv)

    @torch.inference_mode()
    def redshift(self, tile: NDArray[np.float32], boxes: NDArray[np.float32], ebv: NDArray[np.float32]) -> GaussianMixture:
        """The second step alone: mixtures of given ``boxes`` (N, 4) of ``tile``."""
        features = self.network.features(self._to_device(tile))
        given = Boxes(torch.as_tensor(boxes, device=self.device))
        return self.network.redshift(features, [given], torch.as_tensor(ebv, device=self.device))

    def _to_device(self, tile: NDArray[np.float32]) -> Tensor:
        """(1, C, H', W') on the device, padded with empty sky to multiples of the stride."""
        pixels = torch.as_tensor(tile, device=self.device)[None]
        right, bottom = -tile.shape[2] % self.stride, -tile.shape[1] % self.stride
        return functional.pad(pixels, (0, right, 0, bottom)).contiguous(memory_format=torch.channels_last)


def _stable_order(boxes: Tensor, scores: Tensor) -> Tensor:
    """Brightest score first, boxes of no extent left out."""
    order = torch.argsort(scores, descending=True, stable=True)
    extent = boxes[order, 2:] - boxes[order, :2]
    return order[(extent > 0).all(dim=1)]


def _detections(
    boxes: NDArray[np.float32], scores: Tensor, classes: Tensor, mixture: GaussianMixture, ebv: NDArray[np.float32]
) -> Detections:
    n = len(boxes)
    return Detections(
        boxes=boxes,
        scores=scores.float().cpu().numpy(),
        classes=classes.int().cpu().numpy(),
        weights=mixture.weights.float().cpu().numpy(),
        means=mixture.means.float().cpu().numpy(),
        sigmas=mixture.sigmas.float().cpu().numpy(),
        ebv=np.asarray(ebv, np.float32),
        n_members=np.ones(n, np.int32),
        flags=np.zeros(n, np.int32),
    )
