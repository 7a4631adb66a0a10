"""Pretraining of a backbone on pictures of single galaxies (JADES paper, 4.1): two layers on its deepest features predict z.

What comes out is ``backbone.safetensors`` with the tensors of the network below the pyramid under the names they have in a
member (``backbone.bottom_up.*``, or ``backbone.net.*`` of a plain transformer), so that a detector of the same
``model.backbone`` and bands starts from it with one line: ``backbone_weights: PRETRAINED/backbone.safetensors`` under ``model``.

Glossary: B cutouts of a batch, C bands, S side of a cutout, D channels of the deepest features.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling.backbone import Backbone
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from deepdisc_ops.config import AugmentSettings, InferenceSettings, PretrainSettings
from deepdisc_ops.data.cutouts import CutoutDataset, Cutouts, open_cutouts
from deepdisc_ops.data.sampling import epoch_rng
from deepdisc_ops.errors import ConfigError, Requeue, TrainingError
from deepdisc_ops.model.build import DeepDisc, input_scaling
from deepdisc_ops.model.pretrained import initialise
from deepdisc_ops.photoz import metrics
from deepdisc_ops.photoz.figures import loss_curves, write_figure
from deepdisc_ops.training.checkpoint import TrainingState, load_state, save_state, write_atomically
from deepdisc_ops.training.distributed import Report
from deepdisc_ops.training.meter import TIMINGS, Meter
from deepdisc_ops.training.sampling import seed_step
from deepdisc_ops.training.schedule import build_optimizer, build_schedule
from deepdisc_ops.training.signals import stop_requests

BACKBONE = "backbone.safetensors"
MEASURED_CUTOUTS = 256
"""The noise is measured on this many cutouts, spread evenly over the file."""
log = logging.getLogger(__name__)


class RedshiftRegressor(nn.Module):
    """Backbone, mean of its deepest features, two layers, one redshift."""

    offset: Tensor
    scale: Tensor

    def __init__(self, settings: PretrainSettings, mean_redshift: float) -> None:
        super().__init__()
        network = DeepDisc(settings.model, InferenceSettings())
        initialise(network, settings.model)
        self.prefix, self.trunk = below_pyramid(network)
        shapes = self.trunk.output_shape()
        self.stride, self.scaling = network.stride, settings.model.input.scaling
        offset, scale = input_scaling(settings.model.input, len(settings.model.bands))
        self.register_buffer("offset", offset.view(1, -1, 1, 1))
        self.register_buffer("scale", scale.view(1, -1, 1, 1))
        deepest = max(shapes.values(), key=lambda shape: shape.stride)
        last = nn.Linear(settings.hidden, 1)
        nn.init.constant_(last.bias, mean_redshift)
        self.layers = nn.Sequential(nn.Linear(deepest.channels, settings.hidden), nn.ReLU(), last)

    def forward(self, pixels: Tensor) -> Tensor:
        """Redshifts (B,) of cutouts (B, C, S, S) in nJy, which are padded with empty sky to multiples of the stride."""
        scaled = (pixels - self.offset) / self.scale
        seen = torch.arcsinh(scaled) if self.scaling == "arcsinh" else scaled
        pad = -pixels.shape[-1] % self.stride
        features = self.trunk(functional.pad(seen, (pad // 2, pad - pad // 2) * 2))
        deepest = min(features.values(), key=lambda level: level.shape[-1])
        return self.layers(deepest.mean(dim=(2, 3)))[:, 0]

    def backbone_state(self) -> dict[str, Tensor]:
        """The backbone's tensors by the names they have in a `DeepDisc`."""
        return {f"{self.prefix}{key}": value.contiguous() for key, value in self.trunk.state_dict().items()}


def below_pyramid(network: DeepDisc) -> tuple[str, Backbone]:
    """The part of the backbone that the feature pyramid stands on, and the beginning of its keys."""
    for name in ("bottom_up", "net"):  # of detectron2's FPN and of its SimpleFeaturePyramid
        trunk = getattr(network.backbone, name, None)
        if trunk is not None:
            return f"backbone.{name}.", trunk
    return "backbone.", network.backbone


def pretrain(settings: PretrainSettings, out: Path, *, report: Report | None = None) -> Path:
    """Train a backbone to predict redshifts and return ``out``/backbone.safetensors, the best by MSE on held-out cutouts.

    Goes on from ``out``/last if it is there; draws ``out``/loss.png. SIGTERM and SIGUSR1 end it as they end training.
    """
    cutouts = open_cutouts(settings.cutouts, zero_point=settings.zero_point)
    settings = complete(settings, cutouts)
    device = torch.device(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    data = CutoutDataset(_InBands(cutouts, settings.model.bands), settings.augment, settings.seed)
    training, held_out = divide(len(data), settings.held_out, settings.seed)
    torch.manual_seed(settings.seed)
    known = cutouts.redshift[np.isfinite(cutouts.redshift)]
    network = RedshiftRegressor(settings, float(known[training].mean())).to(device).train()
    optimizer = build_optimizer(network, settings)
    schedule = build_schedule(optimizer, settings)
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule}
    state, meter = load_state(out / "last", settings, **parts), Meter()

    with stop_requests() as stop:
        batches = DataLoader(
            data,
            batch_sampler=list(items(training, len(data), settings, state.step)),
            num_workers=settings.workers,
            generator=torch.Generator(),
        )
        for pixels, redshift in meter.timed(iter(batches)):
            if stop.came:
                save_state(out / "last", state, settings, **parts)
                raise Requeue(f"told to stop; saved after step {state.step} in {out / 'last'}, the same call goes on from there")
            seed_step(settings.seed, state.step, 0)
            loss = functional.mse_loss(network(pixels.to(device)), redshift.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
            if not (torch.isfinite(loss) and torch.isfinite(norm)):
                raise TrainingError(f"loss is not finite at step {state.step} of pretraining: {float(loss.detach()):.3g}; lower lr")
            optimizer.step()
            schedule.step()
            state.add_loss(float(loss.detach()))
            meter.count(len(redshift))
            if state.step % settings.validate_every == 0 or state.step == settings.steps:
                _validate(network, settings, cutouts, held_out, float(schedule.get_last_lr()[0]), state, meter, out)
                save_state(out / "last", state, settings, **parts)
                if report:
                    report(state.step, {name: value for name, value in state.history[-1].items() if name != "step"})
                meter.restart()
    return out / BACKBONE


def complete(settings: PretrainSettings, cutouts: Cutouts) -> PretrainSettings:
    """Fill in what the cutouts decide: steps, pixel scaling; check the bands against them."""
    model = settings.model
    missing = [band for band in model.bands if band not in cutouts.bands]
    if missing:
        raise ConfigError(
            f"model.bands has {', '.join(missing)}, {cutouts.path} holds {', '.join(cutouts.bands)}; pretrain on bands it has"
        )
    scaling = measured_scaling(_InBands(cutouts, model.bands))
    left = {name: value for name, value in scaling.items() if getattr(model.input, name) is None}
    scaled = model.model_copy(update={"input": model.input.model_copy(update=left)})
    return settings.model_copy(update={"model": scaled, "steps": _steps(settings, cutouts)})


def planned_steps(settings: PretrainSettings) -> int:
    """Optimisation steps, ``epochs`` counted in cutouts of the file."""
    return _steps(settings, open_cutouts(settings.cutouts, zero_point=settings.zero_point))


def _steps(settings: PretrainSettings, cutouts: Cutouts) -> int:
    if settings.epochs is None:
        return settings.steps
    training, _ = divide(int(np.isfinite(cutouts.redshift).sum()), settings.held_out, settings.seed)
    return max(1, math.ceil(settings.epochs * len(training) / settings.batch_size))


def measured_scaling(cutouts: Cutouts) -> dict[str, tuple[float, ...]]:
    """Noise per pixel (1.4826 x MAD), mean and standard deviation of every band in nJy, over cutouts spread over the file."""
    spread = np.unique(np.linspace(0, len(cutouts) - 1, min(MEASURED_CUTOUTS, len(cutouts))).round().astype(int))
    pixels = np.stack([cutouts[int(i)] for i in spread]).swapaxes(0, 1).reshape(len(cutouts.bands), -1)
    empty = [band for band, values in zip(cutouts.bands, pixels, strict=True) if not np.isfinite(values).any()]
    if empty:
        raise ConfigError(f"no valid pixel of {', '.join(empty)} in {len(spread)} cutouts; pretrain on bands the file has")
    noise = 1.4826 * np.nanmedian(np.abs(pixels - np.nanmedian(pixels, axis=1, keepdims=True)), axis=1)
    columns = {"noise_njy": noise, "mean_njy": np.nanmean(pixels, axis=1), "std_njy": np.nanstd(pixels, axis=1)}
    return {name: tuple(float(value) for value in values) for name, values in columns.items()}


def divide(count: int, held_out: float, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Numbers below ``count`` for training and for validation, drawn by the seed; at least one of each."""
    if count < 2:
        raise ConfigError(f"{count} cutout with a redshift; give a file with more of them")
    shuffled = epoch_rng(seed, 0).permutation(count)
    validating = min(max(1, round(held_out * count)), count - 1)
    return np.sort(shuffled[validating:]), np.sort(shuffled[:validating])


def items(training: NDArray[np.intp], count: int, settings: PretrainSettings, first_step: int) -> Iterator[list[int]]:
    """Items of a `CutoutDataset` of ``count`` for every step: each training cutout once an epoch, turned differently in each."""
    size, epoch, order = settings.batch_size, -1, training
    for step in range(first_step, settings.steps):
        batch = []
        for number in range(step * size, (step + 1) * size):
            if number // len(training) != epoch:
                epoch = number // len(training)
                order = epoch_rng(settings.seed, epoch + 1).permutation(training)  # 0 divided the file
            batch.append(epoch * count + int(order[number % len(training)]))
        yield batch


def _validate(
    network: RedshiftRegressor,
    settings: PretrainSettings,
    cutouts: Cutouts,
    held_out: NDArray[np.intp],
    lr: float,
    state: TrainingState,
    meter: Meter,
    out: Path,
) -> None:
    """Measure on the held-out cutouts as they are, add to the curves, and keep the backbone if it is the best so far."""
    device = next(network.parameters()).device
    speeds = meter.read(device)
    unturned = CutoutDataset(_InBands(cutouts, settings.model.bands), AugmentSettings(symmetries="none"), settings.seed)
    network.eval()
    with torch.no_grad():
        pairs = DataLoader(unturned, batch_size=settings.batch_size, sampler=held_out.tolist(), generator=torch.Generator())
        measured = [(network(pixels.to(device)).cpu(), redshift) for pixels, redshift in pairs]
    network.train()
    found, true = (torch.cat(column).double().numpy() for column in zip(*measured, strict=True))
    residuals = metrics.residual(found, true, "lsst")
    entry = {
        "train_loss": state.take_mean_loss(),
        "lr": lr,
        **speeds,
        "val_loss": float(np.mean((found - true) ** 2)),
        "val_bias": float(metrics.bias(residuals)),
        "val_sigma_iqr": float(metrics.sigma_iqr(residuals)),
        "val_outliers": float(metrics.outlier_fraction(residuals, "lsst")),
    }
    log.info("step %d: %s", state.step, ", ".join(f"{name} {value:.4g}" for name, value in entry.items()))
    state.history.append({"step": float(state.step), **entry})
    if entry["val_loss"] < state.best or not (out / BACKBONE).exists():
        state.best = entry["val_loss"]
        write_atomically(out / BACKBONE, lambda path: save_file(network.backbone_state(), path))
    curves = [{name: value for name, value in row.items() if name not in TIMINGS} for row in state.history]
    write_figure(loss_curves(curves), out / "loss.png")


class _InBands(Cutouts):
    """Cutouts with the bands of a model, in its order."""

    def __init__(self, cutouts: Cutouts, bands: tuple[str, ...]) -> None:
        self.__dict__.update(cutouts.__getstate__())
        self._places = [self.bands.index(band) for band in bands]
        self.bands = bands

    def __getitem__(self, i: Any) -> Any:
        return super().__getitem__(i)[self._places]
