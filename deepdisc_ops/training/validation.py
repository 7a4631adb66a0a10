"""Validation over a whole split: every loss term, and the redshift metrics of the objects detected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deepdisc_ops.config import TrainingConfig
from deepdisc_ops.data.loader import Labels, label, objects_inside, truth_in
from deepdisc_ops.data.pixels import read_pixels
from deepdisc_ops.data.records import DatasetInfo, Record
from deepdisc_ops.errors import TrainingError
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
from deepdisc_ops.training.distributed import World
from deepdisc_ops.training.targets import to_instances

MATCH_RADIUS_ARCSEC = 0.5


@dataclass(frozen=True)
class _Measured:
    """One image: its loss terms, the gold galaxies detected, their true redshifts, and how many gold galaxies there are."""

    losses: Mapping[str, float]
    found: Detections
    redshift: NDArray[np.float32]
    gold: int


def validate(
    network: DeepDisc,
    config: TrainingConfig,
    records: Sequence[Record],
    info: DatasetInfo,
    device: torch.device | None = None,
    world: World | None = None,
) -> dict[str, float]:
    """Loss terms averaged over images, and bias, sigma_IQR, outliers, NLL and completeness of gold galaxies.

    Each rank measures its share of the images, and all get the same figures, those of one rank alone. Always in single
    precision, as at inference. The network is left in training mode. Redshift metrics use the LSST convention and the PDF's
    mode; without a detected gold galaxy they are infinite, so that no checkpoint is chosen for it.
    """
    world, device = world or World(), device or torch.device(config.train.device)
    mine = [_measure(network, config, records[i], info, device) for i in range(world.rank, len(records), world.ranks)]
    network.train()
    shares = world.gather(mine)
    images = [shares[i % world.ranks][i // world.ranks] for i in range(len(records))]
    terms = {f"val_{name}": float(np.mean([image.losses[name] for image in images])) for name in images[0].losses}
    result = terms | {"val_loss": sum(terms.values())}
    found = Detections.concatenate([image.found for image in images])
    redshift = np.concatenate([image.redshift for image in images])
    return result | _redshift_metrics(found, redshift, sum(image.gold for image in images))


def _measure(network: DeepDisc, config: TrainingConfig, record: Record, info: DatasetInfo, device: torch.device) -> _Measured:
    image = read_pixels(record, config.model.bands, with_wcs=False)
    truth = label(record.objects, info, config.model, config.data)
    losses = _losses(network, config, record, truth, image, device)
    plane = EbvPlane.constant(float(np.median(truth.ebv)) if len(truth.ebv) else config.data.default_ebv)
    member = Member(network, config, str(device))
    found = member.predict(image.data, partial(plane.at, width=record.width, height=record.height))
    is_gold = np.isfinite(truth.redshift)
    there, here = _match(image, found, record)
    keep = is_gold[there]
    return _Measured(losses, found.select(here[keep]), truth.redshift[there[keep]], int(is_gold.sum()))


def _losses(
    network: DeepDisc, config: TrainingConfig, record: Record, labels: Labels, image: SkyImage, device: torch.device
) -> dict[str, float]:
    """Training losses of one whole image; batch statistics and generators untouched, no path of the backbone dropped."""
    network.train()
    network.backbone.eval()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    side = network.stride
    frame = Frame.of(Window(0, 0, record.width // side * side, record.height // side * side))
    truth = truth_in(labels, frame, objects_inside(labels, frame), record.objects if config.model.mask_head else None)
    pixels = torch.from_numpy(np.ascontiguousarray(frame.cut(image.data))).to(device)
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        try:
            losses = network.losses(pixels[None], [to_instances(truth, pixels)])
        except FloatingPointError as error:  # detectron2 looks at its proposals
            fault = str(error).splitlines()[0]
            raise TrainingError(f"validation of {record.key}: {fault}; lower train.lr or train.clip_norm") from None
    return {name: float(value) for name, value in losses.items()}


def _match(image: SkyImage, found: Detections, record: Record) -> tuple[np.ndarray, np.ndarray]:
    """True and found objects within `MATCH_RADIUS_ARCSEC`; on an image's own plane, as not every image knows its sky."""
    degrees = image.pixel_scale / 3600
    x, y = (degrees * axis for axis in found.centres.T)
    matches = match_on_sky(degrees * record.objects.x, degrees * record.objects.y, x, y, MATCH_RADIUS_ARCSEC)
    return matches.index1, matches.index2


def _redshift_metrics(found: Detections, z_true: np.ndarray, gold: int) -> dict[str, float]:
    """The metrics, and under NAME_error their standard errors over galaxies, of point metrics by bootstrap."""
    completeness = len(z_true) / gold if gold else 0.0
    complete = {
        "val_completeness": completeness,
        "val_completeness_error": math.sqrt(completeness * (1 - completeness) / gold) if gold else math.inf,
    }
    if len(z_true) < 2:
        return dict.fromkeys(("val_nll", "val_bias", "val_sigma_iqr", "val_outliers"), math.inf) | complete
    mixture = GaussianMixture.from_arrays(found.weights, found.means, found.sigmas)
    surprise = -mixture.log_prob(torch.from_numpy(z_true).double()).numpy()
    point = metrics.point_metrics(mixture.mode().numpy(), z_true, "lsst", np.random.default_rng(0))
    return {
        "val_nll": float(surprise.mean()),
        "val_nll_error": float(surprise.std(ddof=1) / math.sqrt(len(surprise))),
        "val_bias": point.bias,
        "val_bias_error": point.bias_error,
        "val_sigma_iqr": point.sigma_iqr,
        "val_sigma_iqr_error": point.sigma_iqr_error,
        "val_outliers": point.outlier_fraction,
        "val_outliers_error": point.outlier_fraction_error,
        **complete,
    }
