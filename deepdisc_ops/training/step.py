"""One optimisation step: losses of a batch that may come in parts and on several ranks, gradients, and everything that follows.

Glossary: B images of this rank in a part of the batch, C bands, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deepdisc_ops.config import TrainSettings
from deepdisc_ops.errors import TrainingError
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.model.precision import PRECISIONS
from deepdisc_ops.training.averaging import AveragedWeights
from deepdisc_ops.training.distributed import World
from deepdisc_ops.training.normalisers import TermCounts, over_ranks
from deepdisc_ops.training.sampling import item_seed, sampled_by_image
from deepdisc_ops.training.schedule import build_optimizer, build_schedule, learning_rate_factor


class Part(NamedTuple):
    """Images of this rank: pixels (B, C, H, W) nJy on the device, their truth, and the items of the run that they are."""

    pixels: Tensor
    targets: Sequence[Instances]
    items: Sequence[int]


class _Losses(nn.Module):
    """The network with its losses as its forward pass, which is what `DistributedDataParallel` wraps."""

    def __init__(self, network: DeepDisc) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor, targets: Sequence[Instances]) -> dict[str, Tensor]:
        return self.network.losses(pixels, targets)


class Optimisation:
    """A network in training on a device, with its optimiser, schedule, gradient scaler and averaged weights."""

    def __init__(self, network: DeepDisc, settings: TrainSettings, world: World, device: torch.device, seed: int) -> None:
        self.network = network.to(device).to(memory_format=torch.channels_last).train()
        self.averaged = AveragedWeights(network, settings.ema_decay) if settings.ema_decay else None
        self.optimizer = build_optimizer(network, settings)
        self.schedule = build_schedule(self.optimizer, settings)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self._counts = TermCounts(network)
        self._settings, self._world, self._device, self._seed = settings, world, device, seed
        self._model: nn.Module = _Losses(network)
        if world.ranks > 1:
            self._model = DistributedDataParallel(self._model, device_ids=[device] if device.type == "cuda" else None)

    @property
    def best_network(self) -> DeepDisc:
        """The network to validate and to keep: the averaged one, where weights are averaged."""
        return self.averaged.network if self.averaged else self.network

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def parts(self) -> dict[str, Any]:
        """Everything with a state that a resumed run needs."""
        parts = {"network": self.network, "optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}
        return parts | ({"averaged": self.averaged} if self.averaged else {})

    def renew_settings(self) -> None:
        """Let the config's own rates count where a loaded state brought those of the run it comes from."""
        settings, factor = self._settings, learning_rate_factor(self.schedule.last_epoch, self._settings)
        for group in self.optimizer.param_groups:
            group |= {"initial_lr": settings.lr, "lr": settings.lr * factor, "weight_decay": settings.weight_decay}
            if "momentum" in group:
                group["momentum"] = settings.momentum
        self.schedule.base_lrs = [settings.lr] * len(self.optimizer.param_groups)
        self.schedule._last_lr = [settings.lr * factor] * len(self.optimizer.param_groups)

    def step(self, parts: Sequence[Part]) -> float:
        """Train on one batch, all parts of it on this rank; gives the loss of the whole batch over all ranks.

        Raises `FaultyLoss` on every rank, before any weight has changed, if the loss of one image of any is no number.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            waiting = nullcontext() if last or self._world.ranks == 1 else self._model.no_sync()  # type: ignore[operator]
            with waiting:
                total, summed = self._losses(part)
                self.scaler.scale(total / len(parts)).backward()
            loss += summed / len(parts)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self._settings.clip_norm)
        if not self.scaler.is_enabled() and not torch.isfinite(norm):  # gradients are those of all ranks, and so is the fault
            raise FaultyLoss("the gradient is not finite", parts)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        if self.averaged:
            self.averaged.update(self.network)
        return loss

    def _losses(self, part: Part) -> tuple[Tensor, float]:
        """The loss to differentiate on this rank, and that of all ranks."""
        terms, fault = self._finite_terms(part)
        faults = [fault for fault in self._world.gather(fault) if fault] if self._world.any(bool(fault)) else []
        if faults:
            raise FaultyLoss("; ".join(faults), [part])
        names, images = sorted(terms), len(part.targets)
        values = torch.stack([terms[name].float() for name in names])
        counts = [self._counts.of(name, images) for name in names]
        losses, factors = over_ranks(self._world, values.tolist(), counts)
        return (values * values.new_tensor(factors)).sum(), sum(losses)

    def _finite_terms(self, part: Part) -> tuple[dict[str, Tensor], str]:
        """Loss terms of this rank, and what is wrong with them, if anything."""
        try:
            terms = self._terms(self._model, part)
        except FloatingPointError as error:  # detectron2 looks at its proposals first
            return {}, str(error).splitlines()[0]
        values = dict(zip(terms, torch.stack([term.detach().float() for term in terms.values()]).tolist(), strict=True))
        return terms, ", ".join(f"{name} {value:.3g}" for name, value in values.items() if not math.isfinite(value))

    def _terms(self, model: nn.Module, part: Part) -> dict[str, Tensor]:
        seeds = [item_seed(self._seed, k) for k in part.items]
        dtype = PRECISIONS.get(self._settings.precision)
        with sampled_by_image(self.network, seeds), torch.autocast(self._device.type, dtype, enabled=dtype is not None):
            return model(part.pixels, part.targets)

    @torch.no_grad()
    def faulty_items(self, parts: Sequence[Part]) -> list[int]:
        """Items whose own loss is no number; none if each is well by itself."""
        alone = _Losses(self.network)
        found = []
        for part in parts:
            for i, k in enumerate(part.items):
                single = Part(part.pixels[i : i + 1], part.targets[i : i + 1], [k])
                try:
                    terms = self._terms(alone, single)
                except FloatingPointError:
                    found.append(k)
                    continue
                if not all(bool(torch.isfinite(term)) for term in terms.values()):
                    found.append(k)
        return found


class FaultyLoss(TrainingError):
    """A loss or gradient that is no number: nothing after it would mean anything. ``parts`` are those of this rank."""

    def __init__(self, fault: str, parts: Sequence[Part] = ()) -> None:
        super().__init__(fault)
        self.parts = parts
