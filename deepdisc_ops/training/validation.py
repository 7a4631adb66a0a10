"""Validation over a whole split: every loss term, and the redshift metrics of the objects detected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from deepdisc_ops.config import TrainingConfig
from deepdisc_ops.data.loader import Labels, label, objects_inside, truth_in
from deepdisc_ops.data.pixels import read_pixels
from deepdisc_ops.data.records import DatasetInfo, Record
from deepdisc_ops.inference.engine import Member
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.photoz import metrics
from deepdisc_ops.photoz.mixture import GaussianMixture
from deepdisc_ops.sky.detections import Detections
from deepdisc_ops.sky.dust import EbvPlane
from deepdisc_ops.sky.frames import Frame
from deepdisc_ops.sky.images import SkyImage
from deepdisc_ops.sky.matching import match_on_sky
from deepdisc_ops.sky.tiling import Window
from deepdisc_ops.training.targets import to_instances

MATCH_RADIUS_ARCSEC = 0.5


def validate(network: DeepDisc, config: TrainingConfig, records: Sequence[Record], info: DatasetInfo) -> dict[str, float]:
    """Loss terms averaged over images, and bias, sigma_IQR, outliers, NLL and completeness of gold galaxies.

    The network is left in training mode. Redshift metrics use the LSST convention and the PDF's mode; without a
    detected gold galaxy they are infinite, so that no checkpoint is chosen for it.
    """
    losses: list[Mapping[str, float]] = []
    matched: list[Detections] = []
    redshifts: list[np.ndarray] = []
    gold = 0
    member = Member(network, config, config.train.device)
    for record in records:
        image = read_pixels(record, config.model.bands, with_wcs=False)
        truth = label(record.objects, info, config.model, config.data)
        losses.append(_losses(network, config, record, truth, image))
        network.eval()
        plane = EbvPlane.constant(float(np.median(truth.ebv)) if len(truth.ebv) else config.data.default_ebv)
        found = member.predict(image.data, partial(plane.at, width=record.width, height=record.height))
        is_gold = np.isfinite(truth.redshift)
        gold += int(is_gold.sum())
        there, here = _match(image, found, record)
        keep = is_gold[there]
        matched.append(found.select(here[keep]))
        redshifts.append(truth.redshift[there[keep]])
    network.train()
    terms = {f"val_{name}": float(np.mean([loss[name] for loss in losses])) for name in losses[0]}
    result = terms | {"val_loss": sum(terms.values())}
    return result | _redshift_metrics(Detections.concatenate(matched), np.concatenate(redshifts), gold)


def _losses(network: DeepDisc, config: TrainingConfig, record: Record, labels: Labels, image: SkyImage) -> dict[str, float]:
    """Training losses of one whole image, batch statistics and generators untouched."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    side = network.stride
    frame = Frame.of(Window(0, 0, record.width // side * side, record.height // side * side))
    truth = truth_in(labels, frame, objects_inside(labels, frame), record.objects if config.model.mask_head else None)
    device = torch.device(config.train.device)
    pixels = torch.from_numpy(np.ascontiguousarray(frame.cut(image.data))).to(device)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        losses = network.losses(pixels[None], [to_instances(truth, pixels)])
    return {name: float(value) for name, value in losses.items()}


def _match(image: SkyImage, found: Detections, record: Record) -> tuple[np.ndarray, np.ndarray]:
    """True and found objects within `MATCH_RADIUS_ARCSEC`; on an image's own plane, as not every image knows its sky."""
    degrees = image.pixel_scale / 3600
    x, y = (degrees * axis for axis in found.centres.T)
    matches = match_on_sky(degrees * record.objects.x, degrees * record.objects.y, x, y, MATCH_RADIUS_ARCSEC)
    return matches.index1, matches.index2


def _redshift_metrics(found: Detections, z_true: np.ndarray, gold: int) -> dict[str, float]:
    completeness = len(z_true) / gold if gold else 0.0
    if len(z_true) < 2:
        worst = dict.fromkeys(("val_nll", "val_bias", "val_sigma_iqr", "val_outliers"), float("inf"))
        return worst | {"val_completeness": completeness}
    mixture = GaussianMixture.from_arrays(found.weights, found.means, found.sigmas)
    residuals = metrics.residual(mixture.mode().numpy(), z_true, "lsst")
    return {
        "val_nll": float(-mixture.log_prob(torch.from_numpy(z_true).double()).mean()),
        "val_bias": float(metrics.bias(residuals)),
        "val_sigma_iqr": float(metrics.sigma_iqr(residuals)),
        "val_outliers": float(metrics.outlier_fraction(residuals, "lsst")),
        "val_completeness": completeness,
    }
