"""Truth of a crop as detectron2 sees it."""

from __future__ import annotations

import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor

from deepdisc_ops.data.loader import Truth


def to_instances(truth: Truth, pixels: Tensor) -> Instances:
    """Truth of an image in ``pixels`` (..., H, W), on their device, with the fields `DeepDisc.losses` reads."""
    device = pixels.device
    instances = Instances((pixels.shape[-2], pixels.shape[-1]))
    instances.gt_boxes = Boxes(torch.from_numpy(truth.boxes).to(device))
    instances.gt_classes = torch.from_numpy(truth.classes).to(device)
    instances.gt_redshift = torch.from_numpy(truth.redshift).to(device)
    instances.gt_ebv = torch.from_numpy(truth.ebv).to(device)
    if truth.masks is not None:
        instances.gt_masks = BitMasks(torch.from_numpy(truth.masks).to(device))
    return instances
