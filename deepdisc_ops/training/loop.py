"""Training one network, from a data set and a config to its best checkpoint.

Reads from top to bottom. Nothing here knows of sweeps or tracking: progress leaves through ``report(step, metrics)``.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from deepdisc_ops.config import DataSettings, InputSettings, ModelSettings, TrainingConfig, TrainSettings
from deepdisc_ops.data.loader import CropDataset, measure_pixels, open_batches, training_redshifts
from deepdisc_ops.data.store import Dataset, Records, open_dataset
from deepdisc_ops.errors import ConfigError, TrainingError
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.model.weights import recover, save_member
from deepdisc_ops.photoz.figures import loss_curves, write_figure
from deepdisc_ops.training.checkpoint import load_state, save_state
from deepdisc_ops.training.targets import to_instances
from deepdisc_ops.training.validation import validate

Report = Callable[[int, Mapping[str, float]], None]
log = logging.getLogger(__name__)


def train(config: TrainingConfig, out: Path, *, report: Report | None = None) -> Path:
    """Train to ``config.train.steps`` and return the folder of the best checkpoint, ``out``/best.

    Goes on from ``out``/last if it is there. At each validation writes ``last`` and, at a lower validation NLL, ``best``,
    draws ``loss.png``, then calls ``report``; what ``report`` raises ends the run with all of that on disk.
    """
    dataset = open_dataset(config.data.path)
    records = dataset.records("train", fraction=config.data.fraction, partition=config.data.partition)
    held_out = dataset.records("validation", partition=config.data.partition)
    config = complete(config, dataset, records)
    device, settings = torch.device(config.train.device), config.train
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(config.seed)

    network = DeepDisc(config.model, config.inference)
    start_at_redshifts(network, config, records, dataset)
    network.to(device).to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(network, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings))
    crops = CropDataset(records, dataset.info, config.data, config.model, config.seed)

    parts = {"network": network, "optimizer": optimizer, "schedule": schedule}
    recover(out / "best")
    state = load_state(out / "last", config, **parts)
    if not (out / "best").exists():
        state.best = math.inf
    started, seen, losses_seen = time.monotonic(), 0, []
    batches = open_batches(
        crops, first_step=state.step, steps=settings.steps, batch_size=settings.batch_size, workers=config.data.workers
    )
    for step, (crop_pixels, truths) in enumerate(batches, start=state.step):
        pixels = crop_pixels.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        targets = [to_instances(truth, pixels) for truth in truths]
        losses = finite_losses(network, pixels, targets, step)
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
        optimizer.step()
        schedule.step()
        losses_seen.append(total.detach())
        seen += len(truths)

        done = step + 1
        if done % settings.validate_every == 0 or done == settings.steps:
            rate = seen / (time.monotonic() - started)
            metrics = {
                "train_loss": float(torch.stack(losses_seen).mean()),
                "lr": float(schedule.get_last_lr()[0]),
                "images_per_s": rate,
            }
            metrics |= validate(network, config, held_out, dataset.info)
            log.info("step %d: %s", done, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
            state.step = done
            state.history.append({"step": float(done), **metrics})
            if metrics["val_nll"] < state.best or not (out / "best").exists():
                state.best = metrics["val_nll"]
                save_member(out / "best", network, config, metrics, done)
            save_state(out / "last", state, config, **parts)
            write_figure(loss_curves(state.history), out / "loss.png")
            if report:
                report(done, metrics)
            started, seen, losses_seen = time.monotonic(), 0, []
    return out / "best"


def finite_losses(network: DeepDisc, pixels: Tensor, targets: Sequence[Instances], step: int) -> dict[str, Tensor]:
    """The loss terms; a term that is no number ends training, for nothing after it would mean anything."""
    try:
        losses = network.losses(pixels, targets)
        fault = ", ".join(f"{name} {float(value.detach()):.3g}" for name, value in losses.items() if not torch.isfinite(value))
    except FloatingPointError as error:  # detectron2 looks at its proposals first
        fault = str(error).splitlines()[0]
    if fault:
        raise TrainingError(f"loss is not finite at step {step}: {fault}; lower train.lr or train.clip_norm")
    return losses


def complete(config: TrainingConfig, dataset: Dataset, records: Records) -> TrainingConfig:
    """Fill in what the data set decides: pixel scale, noise and scaling of every band; check the bands against it."""
    model, info = config.model, dataset.info
    missing = [band for band in model.bands if band not in info.bands]
    if missing:
        raise ConfigError(
            f"model.bands has {', '.join(missing)}, {dataset.path} holds {', '.join(info.bands)}; train on bands the data have"
        )
    if model.pixel_scale is not None and abs(model.pixel_scale / info.pixel_scale - 1) > 0.01:
        raise ConfigError(
            f"model.pixel_scale is {model.pixel_scale} arcsec, that of {dataset.path} {info.pixel_scale}; leave it out"
        )
    scaled = model.model_copy(update={"pixel_scale": info.pixel_scale, "input": measured_input(model, records)})
    data = DataSettings(**(config.data.model_dump() | {"path": dataset.path}))
    return config.model_copy(update={"model": scaled, "data": data})


def measured_input(model: ModelSettings, records: Records) -> InputSettings:
    """The scaling of the pixels with what the settings leave to the training images."""
    needed = ("noise_njy", "mean_njy", "std_njy") if model.input.scaling == "zscore" else ("noise_njy",)
    missing = [name for name in needed if getattr(model.input, name) is None]
    if not missing:
        return model.input
    measured = measure_pixels(records, model.bands)
    return model.input.model_copy(update={name: getattr(measured, name) for name in missing})


def start_at_redshifts(network: DeepDisc, config: TrainingConfig, records: Records, dataset: Dataset) -> None:
    """Start the mixture's means at quantiles of the training n(z)."""
    z, _ = training_redshifts(records, config.model)
    z = z[np.isfinite(z)]
    if len(z) == 0:
        head = config.model.redshift_head
        raise ConfigError(f"no galaxy with a redshift and {head.gold_band} < {head.gold_limit} in {dataset.path}; raise gold_limit")
    k = network.redshift_head.components
    means = np.quantile(z, (np.arange(k) + 0.5) / k)
    network.redshift_head.start_at(torch.as_tensor(means, dtype=torch.float32), sigma=max(float(np.std(z)) / 2, 0.05))


def build_optimizer(network: DeepDisc, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW or SGD over all parameters."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(network.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)


def learning_rate_factor(step: int, settings: TrainSettings) -> float:
    """Share of ``settings.lr`` at ``step``: linear warm-up, then the schedule."""
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    progress = step / settings.steps
    if settings.schedule == "cosine":
        return warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
    if settings.schedule == "multistep":
        return float(warmup * 0.1 ** sum(progress >= milestone for milestone in settings.milestones))
    return warmup
