"""Loader samples as detectron2 sees them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor

from deepdisc_ops.data.loader import Sample


def stack(samples: Sequence[Sample], device: torch.device) -> Tensor:
    """Pixels (B, C, S, S) of samples of one size."""
    return torch.from_numpy(np.stack([sample.pixels for sample in samples])).to(device)


def to_instances(sample: Sample, device: torch.device) -> Instances:
    """Truth of one image with the fields `DeepDisc.losses` reads."""
    instances = Instances(sample.pixels.shape[-2:])
    instances.gt_boxes = Boxes(torch.from_numpy(sample.boxes).to(device))
    instances.gt_classes = torch.from_numpy(sample.classes).to(device)
    instances.gt_redshift = torch.from_numpy(sample.redshift).to(device)
    instances.gt_ebv = torch.from_numpy(sample.ebv).to(device)
    if sample.masks is not None:
        instances.gt_masks = BitMasks(torch.from_numpy(sample.masks).to(device))
    return instances
