"""Training one network, from a data set and a config to its best checkpoint.

Reads from top to bottom. Nothing here knows of sweeps or tracking: progress leaves through ``report(step, metrics)``.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from deepdisc_ops.config import DataSettings, InputSettings, ModelSettings, TrainingConfig
from deepdisc_ops.data.domain import training_domain
from deepdisc_ops.data.loader import Batch, CropDataset, measure_pixels, open_batches, training_redshifts
from deepdisc_ops.data.store import Dataset, Records, open_dataset
from deepdisc_ops.errors import ConfigError, Requeue, TrainingError
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.model.precision import computes_bf16
from deepdisc_ops.model.pretrained import initialise
from deepdisc_ops.model.weights import recover, save_member
from deepdisc_ops.photoz.figures import loss_curves, write_figure
from deepdisc_ops.sky.domain import Domain
from deepdisc_ops.training.checkpoint import STATE, TrainingState, load_state, save_state
from deepdisc_ops.training.distributed import Report, World, check_devices, spawn
from deepdisc_ops.training.meter import TIMINGS, Meter
from deepdisc_ops.training.sampling import seed_step
from deepdisc_ops.training.signals import StopRequest, stop_requests
from deepdisc_ops.training.step import FaultyLoss, Optimisation, Part
from deepdisc_ops.training.targets import to_instances
from deepdisc_ops.training.validation import validate

log = logging.getLogger(__name__)


def train(config: TrainingConfig, out: Path, *, report: Report | None = None, world: World | None = None) -> Path:
    """Train to the last step, or until ``train.patience`` is at its end, and return the folder of the best checkpoint.

    That is ``out``/best. Goes on from ``out``/last if it is there. At each validation writes ``last`` and, where
    ``train.monitor`` is better than before, ``best``, draws ``loss.png``, then calls ``report``; what ``report`` raises ends the
    run with all of that on disk. With ``train.ranks`` above 1 the work is done in processes started here, and ``report`` is
    still called in this one; ``world`` tells instead that this process is a rank which somebody else has started. SIGTERM and
    SIGUSR1 (in the main thread) end the run after the step in flight with `Requeue`, its state saved.
    """
    device = check_devices(config.train, world)
    if world is None and config.train.ranks > 1:
        spawn(train_rank, (config, out), config.train.ranks, report)
    else:
        world = world or World()
        with world.joined(device):
            _run(world, device, report if world.main else None, config, out)
    return out / "best"


def train_rank(world: World, report: Report | None, config: TrainingConfig, out: Path) -> None:
    """What a started rank does."""
    train(config, out, report=report, world=world)


def fair_threads(world: World) -> int:
    """CPUs of this process over the ranks that have the very same: srun binds each to its own, torchrun and we do not."""
    mine = (socket.gethostname(), sorted(os.sched_getaffinity(0)))
    return max(1, len(mine[1]) // world.gather(mine).count(mine))


def planned_steps(config: TrainingConfig) -> int:
    """Optimisation steps of a run, ``train.epochs`` counted in images of its data set."""
    return _steps(
        config, open_dataset(config.data.path).records("train", fraction=config.data.fraction, partition=config.data.partition)
    )


def _run(world: World, device: torch.device, report: Report | None, config: TrainingConfig, out: Path) -> None:
    dataset = open_dataset(config.data.path)
    records = dataset.records("train", fraction=config.data.fraction, partition=config.data.partition)
    held_out = dataset.records("validation", partition=config.data.partition)
    if len(held_out) == 0:
        raise ConfigError(f"no validation images in {dataset.path}; simulate some, or divide it with `deepdisc-ops data split`")
    config = complete(config, dataset, records)
    settings = config.train
    if settings.precision == "bf16" and not computes_bf16(device) and world.main:
        log.warning(
            "train.precision is bf16, which this processor only imitates, many times slower than float32; set it to float32"
        )
    if settings.threads or world.ranks > 1:
        torch.set_num_threads(settings.threads or fair_threads(world))

    torch.manual_seed(config.seed)
    network = DeepDisc(config.model, config.inference)
    if not (out / "last" / STATE).exists():
        initialise(network, config.model)
    start_at_redshifts(network, config, records, dataset)
    crops = CropDataset(records, dataset.info, config.data, config.model, config.seed)
    domain = training_domain(records, config.model.bands, config.data.augment) if world.main else None
    learner = Optimisation(network, settings, world, device, config.seed)
    if world.main:
        recover(out / "best")
    world.barrier()
    state = load_state(out / "last", config, **learner.parts())
    learner.renew_settings()
    if not world.gather((out / "best").exists())[0]:
        state.best = math.inf

    def save() -> None:
        if world.main:
            save_state(out / "last", state, config, **learner.parts())
        world.barrier()  # nobody goes on, or ends, before it is written

    meter = Meter()
    with stop_requests() as stop:
        for parts in steps_on_device(crops, config, state.step, world, device, meter, stop):
            if _told_to_stop(world, stop, parts):
                save()
                raise Requeue(f"told to stop; saved after step {state.step} in {out / 'last'}, the same call goes on from there")
            if _finished(state, config):
                break
            seed_step(config.seed, state.step, world.rank)
            try:
                loss = learner.step(parts)
            except FaultyLoss as fault:
                raise named(fault, learner, crops, records, state.step, world) from None
            state.add_loss(loss)
            meter.count(sum(len(part.items) for part in parts))

            if state.step % settings.validate_every == 0 or state.step == settings.steps:
                metrics = {"train_loss": state.take_mean_loss(), "lr": learner.lr} | meter.read(device, world)
                metrics |= _validate(learner, config, held_out, dataset, device, world)
                _keep(learner, config, state, metrics, domain, out if world.main else None)
                save()
                if world.main:
                    write_figure(loss_curves([_untimed(entry) for entry in state.history]), out / "loss.png")
                if report:
                    report(state.step, metrics)
                meter.restart()
            elif settings.save_every and state.step % settings.save_every == 0:
                save()


def steps_on_device(
    crops: CropDataset,
    config: TrainingConfig,
    first_step: int,
    world: World,
    device: torch.device,
    meter: Meter,
    stop: StopRequest,
) -> Iterator[list[Part]]:
    """The parts of every step's batch that this rank computes; ends with an empty list if a worker fell to a request to stop."""
    settings = config.train
    count = settings.accumulate
    size = settings.batch_size // count
    batches = open_batches(
        crops,
        first_step=first_step * count,
        steps=settings.steps * count,
        batch_size=size,
        workers=config.data.workers,
        rank=world.rank,
        ranks=world.ranks,
    )
    share, parts = size // world.ranks, []
    try:
        for number, batch in enumerate(meter.timed(batches), start=first_step * count):
            first = number * size + world.rank * share
            parts.append(_on_device(batch, range(first, first + share), device))
            if len(parts) == count:
                yield parts
                parts = []
    except RuntimeError:
        if not stop.came:
            raise
        yield []


def _on_device(batch: Batch, items: Sequence[int], device: torch.device) -> Part:
    pixels = batch.pixels.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    return Part(pixels, [to_instances(truth, pixels) for truth in batch.truths], items)


def _told_to_stop(world: World, stop: StopRequest, parts: Sequence[Part]) -> bool:
    """Whether a rank was told to stop: all of them then do, at the same step."""
    return world.any(stop.came or not parts)


def _finished(state: TrainingState, config: TrainingConfig) -> bool:
    """Whether ``train.patience`` is at its end."""
    return 0 < config.train.patience <= state.stale


def _validate(
    learner: Optimisation, config: TrainingConfig, held_out: Records, dataset: Dataset, device: torch.device, world: World
) -> dict[str, float]:
    world.share_buffers(learner.network)
    if learner.averaged:
        learner.averaged.copy_buffers(learner.network)
    return validate(learner.best_network, config, held_out, dataset.info, device, world)


def _keep(
    learner: Optimisation,
    config: TrainingConfig,
    state: TrainingState,
    metrics: Mapping[str, float],
    domain: Domain | None,
    out: Path | None,
) -> None:
    """Add a validation to the state and, if it is the best, write the member (``out`` is None on all ranks but one)."""
    log.info("step %d: %s", state.step, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    state.history.append({"step": float(state.step), **metrics})
    score = config.train.score(metrics)
    if score < state.best or len(state.history) == 1:
        state.best, state.stale = (math.inf if math.isnan(score) else score), 0
    else:
        state.stale += 1
    if out and (state.stale == 0 or not (out / "best").exists()):
        save_member(out / "best", learner.best_network, config, metrics, state.step, domain)


def _untimed(entry: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name not in TIMINGS}


def named(fault: FaultyLoss, learner: Optimisation, crops: CropDataset, records: Records, step: int, world: World) -> TrainingError:
    """The error of a loss that is no number, with the images it comes from; the same on every rank."""
    faulty = world.gather(learner.faulty_items(fault.parts))
    items = [k for rank in faulty for k in rank]
    where = "at" if items else "though each image is well by itself; batch of"
    if not items:
        items = [k for rank in world.gather([k for part in fault.parts for k in part.items]) for k in rank]
    keys = dict.fromkeys(str(records.keys[crops[k].image]) for k in items)
    return TrainingError(
        f"loss is not finite at step {step}: {fault} {where} {', '.join(keys)}; lower train.lr or train.clip_norm, "
        "or look at these images; the checkpoint before is untouched"
    )


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
    train = config.train.model_copy(update={"steps": _steps(config, records)})
    return config.model_copy(update={"model": scaled, "data": data, "train": train})


def _steps(config: TrainingConfig, records: Records) -> int:
    settings = config.train
    if settings.epochs is None:
        return settings.steps
    return max(1, math.ceil(settings.epochs * len(records) / settings.batch_size))


def measured_input(model: ModelSettings, records: Records) -> InputSettings:
    """The scaling of the pixels with what the settings leave to the training images."""
    needed = ("noise_njy", "mean_njy", "std_njy") if model.input.scaling == "zscore" else ("noise_njy",)
    missing = [name for name in needed if getattr(model.input, name) is None]
    if not missing:
        return model.input
    measured = measure_pixels(records, model.bands)
    return model.input.model_copy(update={name: getattr(measured, name) for name in missing})


def start_at_redshifts(network: DeepDisc, config: TrainingConfig, records: Records, dataset: Dataset) -> None:
    """Start the mixture's means at quantiles of the training n(z), unless they come from a member."""
    z, _ = training_redshifts(records, config.model)
    z = z[np.isfinite(z)]
    if len(z) == 0:
        head = config.model.redshift_head
        raise ConfigError(f"no galaxy with a redshift and {head.gold_band} < {head.gold_limit} in {dataset.path}; raise gold_limit")
    if config.model.weights is not None:
        return
    k = network.redshift_head.components
    means = np.quantile(z, (np.arange(k) + 0.5) / k)
    network.redshift_head.start_at(torch.as_tensor(means, dtype=torch.float32), sigma=max(float(np.std(z)) / 2, 0.05))
