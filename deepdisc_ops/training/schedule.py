"""The optimiser and its learning rate over the steps of a run."""

from __future__ import annotations

import math

import torch
from torch import nn

from deepdisc_ops.config import PretrainSettings, TrainSettings

Optimised = TrainSettings | PretrainSettings


def build_optimizer(network: nn.Module, settings: Optimised) -> torch.optim.Optimizer:
    """AdamW or SGD over all parameters that are trained."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(trained, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)


def build_schedule(optimizer: torch.optim.Optimizer, settings: Optimised) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate, to be stepped once an optimisation step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings))


def learning_rate_factor(step: int, settings: Optimised) -> float:
    """Share of ``settings.lr`` at ``step``: linear warm-up, then the schedule."""
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    progress = step / settings.steps
    if settings.schedule == "cosine":
        return warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
    if settings.schedule == "multistep":
        return float(warmup * 0.1 ** sum(progress >= milestone for milestone in settings.milestones))
    return warmup
