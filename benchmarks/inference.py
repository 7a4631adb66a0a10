"""Inference on one tile, side by side with detectron2's own: ``python -m benchmarks.inference [--quick]``.

A network of ResNet50 with a feature pyramid (and one of MViTv2-B), a cascade of three box heads of two layers of 1024, a mask
head and the papers' redshift head, in 6 bands, with random weights shaped so that about 500 or 2000 objects come out. The same
weights, the same caps and the same threads for all, which take turns in one process:

- stock: detectron2's `GeneralizedRCNN` and `CascadeROIHeads`, the redshift head after them, masks pasted into full images;
  with and without the loop over objects that collects their boxes, masks and redshifts one by one;
- masks: `Member.predict_batch` with masks; boxes: without; fast: the fast preset; fast float32: the fast preset without bf16.

Boxes and mixtures of masks and boxes are held against stock's. What fast costs is measured with the weights of models/lsst-small
on simulated skies: completeness of gold galaxies and sigma_IQR. The peak is the fastest matrix product of this process, by
NumPy, torch or oneDNN; operations are those of `torch.utils.flop_counter`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.structures import Instances
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import record
from deepdisc_ops.config import InferenceSettings, SkySettings, TrainingConfig, validate
from deepdisc_ops.data.loader import label
from deepdisc_ops.data.pixels import read_pixels
from deepdisc_ops.data.simulate import simulate_dataset
from deepdisc_ops.data.store import Dataset
from deepdisc_ops.inference.engine import Member
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.model.detection import Candidates, ask, classify, pick, propose
from deepdisc_ops.model.weights import info_from_dict, load_network
from deepdisc_ops.photoz import metrics
from deepdisc_ops.photoz.mixture import GaussianMixture
from deepdisc_ops.sky.detections import Detections
from deepdisc_ops.sky.matching import match_boxes, match_on_sky

EBV = 0.03
MODELS = Path(__file__).parents[1] / "models"
MATCH_RADIUS_ARCSEC = 0.5


@dataclass(frozen=True)
class Case:
    """A network on a tile of ``side`` px with about so many objects."""

    backbone: str
    side: int
    objects: int

    @property
    def name(self) -> str:
        """As shown in tables."""
        return f"{self.backbone}, {self.side} px, {self.objects} objects"


@dataclass(frozen=True)
class Effort:
    """How much is done: the cases, rounds of each, skies for the cost of fast."""

    cases: tuple[Case, ...]
    rounds: int
    skies: int


FULL = Effort((Case("resnet50", 512, 500), Case("resnet50", 1024, 2000), Case("mvitv2_b", 512, 500)), rounds=3, skies=24)
QUICK = Effort((Case("resnet50", 256, 100),), rounds=1, skies=2)


def build(case: Case) -> tuple[DeepDisc, TrainingConfig]:
    """The network with seeded weights; of its scores half are above the threshold, wherever the noise puts them."""
    torch.manual_seed(0)
    residual = case.backbone.startswith("resnet")
    tree = {
        "model": {
            "input": {"scaling": "zscore", "mean_njy": [0.0] * 6, "std_njy": [1.0] * 6},
            "backbone": {"name": case.backbone, "stem_stride": 4, "levels": 4, "fpn_channels": 256, "stem_pool": residual}
            | {"norm": "FrozenBN" if residual else "LN"},
            "anchor_sizes": [12, 24, 48, 96],
            "proposals": {"aspect_ratios": [0.5, 1.0, 2.0]},
            "pooler": {"canonical_size": 224, "canonical_level": 4},
            "box_head": {"stages": 3, "hidden": [1024, 1024], "pool": 7},
            "mask_head": True,
            "mask": {"convolutions": 4},
            "redshift_head": {"hidden": [1024, 64], "activation": "tanh", "pool": 7, "components": 5},
        },
        "inference": {"fixed_proposals": [2 * case.objects] * 2, "max_detections": case.objects, "nms_threshold": 0.65},
    }
    config = validate(TrainingConfig, tree, "benchmark")
    network = DeepDisc(config.model, config.inference).eval()
    shape(network, pixels(case))
    return network, config


def pixels(case: Case) -> NDArray[np.float32]:
    """A tile (6, side, side) of noise of unit variance."""
    return np.random.default_rng(1).standard_normal((6, case.side, case.side), np.float32)


@torch.inference_mode()
def shape(network: DeepDisc, tile: NDArray[np.float32]) -> None:
    """Spread the random answers: objectness over the anchors of this tile, scores over its proposals.

    An untrained network answers the same everywhere, and one object would suppress all others. The stages of the cascade get
    the same weights, so that they agree as trained ones do; 35 % of the proposals score below 0.05, and most others
    are objects, as many as the cap lets through.
    """
    network.scale.mul_(network.features(torch.as_tensor(tile)[None])["p2"].std())  # of features, which grow from block to block
    features = network.features(torch.as_tensor(tile)[None])
    head, heads = network.proposals.rpn_head.objectness_logits, network.box_heads
    spread(head, ask(network.proposals, features).logits[0], width=2.0, share=0.5, at=0.0)
    for parts in (heads.box_head, heads.box_predictor):
        for later in parts[1:]:
            later.load_state_dict(parts[0].state_dict())
    caps = network.inference.fixed_proposals or (1, 1)
    proposals = propose(network.proposals, ask(network.proposals, features), [0], tile.shape[1:], caps)
    seen: list[Tensor] = []
    hook = heads.box_predictor[0].cls_score.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits))
    classify(heads, network.kernels, features, proposals, tile.shape[1:], caps[1])
    hook.remove()
    logits = torch.cat(seen)
    for predictor in heads.box_predictor:
        spread(predictor.cls_score, logits[:, 0] - logits[:, 1], width=6.0, share=0.35, at=float(np.log(0.05 / 0.95)))


def spread(layer: nn.Linear | nn.Conv2d, answers: Tensor, *, width: float, share: float, at: float) -> None:
    """Scale a layer so that ``answers`` get this standard deviation, and move them so that this share of them is below ``at``.

    A layer of two outputs answers by their difference.
    """
    factor = width / float(answers.std())
    layer.weight.mul_(factor)
    bias = cast(Tensor, layer.bias)
    bias.mul_(factor)
    bias[0] += at - float(torch.quantile(answers.flatten()[:100_000] * factor, share))


class StockHeads(nn.Module):
    """detectron2's cascade with masks, and the redshift head after it as in the published code."""

    def __init__(self, network: DeepDisc) -> None:
        super().__init__()
        self.box_heads, self.redshift_head = network.box_heads, network.redshift_head
        for predictor in network.box_heads.box_predictor:
            predictor.test_topk_per_image = network.inference.max_detections

    def forward(self, images: Any, features: dict[str, Tensor], proposals: Any, targets: Any = None) -> Any:
        """Instances with redshift mixtures."""
        found, losses = self.box_heads(images, features, proposals, targets)
        mixture = self.redshift_head(
            features, [one.pred_boxes for one in found], torch.full((sum(map(len, found)),), EBV, device=features["p2"].device)
        )
        found[0].pred_redshift = torch.stack([mixture.weights, mixture.means, mixture.sigmas], dim=1)
        return found, losses


def stock_model(network: DeepDisc) -> GeneralizedRCNN:
    """A copy of the network as detectron2 runs it."""
    network = copy.deepcopy(network)
    caps = network.inference.fixed_proposals
    assert caps is not None
    network.proposals.pre_nms_topk[False], network.proposals.post_nms_topk[False] = caps
    mean, std = network.offset.flatten().tolist(), network.scale.flatten().tolist()
    return GeneralizedRCNN(
        backbone=network.backbone,
        proposal_generator=network.proposals,
        roi_heads=StockHeads(network),
        pixel_mean=mean,
        pixel_std=std,
    ).eval()


@torch.no_grad()
def run_stock(model: GeneralizedRCNN, tile: NDArray[np.float32], *, loop: bool) -> Instances:
    """One tile through detectron2, with ``loop`` its objects collected one by one as users' scripts do."""
    found = model([{"image": torch.as_tensor(tile), "height": tile.shape[1], "width": tile.shape[2]}])[0]["instances"]
    if loop:
        collected = []
        for i in range(len(found)):
            one = found[i]
            box, mask = one.pred_boxes.tensor.cpu().numpy()[0], one.pred_masks.cpu().numpy()[0]
            collected.append((box, mask, float(one.scores[0]), int(one.pred_classes[0]), one.pred_redshift.cpu().numpy()[0]))
    return found


def without_masks(found: Instances | Detections) -> Instances | Detections:
    """What is kept of an answer: 2000 full images of masks are 2 GB."""
    if isinstance(found, Instances):
        found.remove("pred_masks")
    return found


def member_of(network: DeepDisc, config: TrainingConfig, **settings: Any) -> Member:
    """A prepared copy of the network with other inference settings."""
    inference = InferenceSettings.model_validate(config.inference.model_dump() | settings)
    network = copy.deepcopy(network)
    network.inference = inference
    return Member(network, config.model_copy(update={"inference": inference})).prepared()


def constant_ebv(x: NDArray[np.floating], _y: NDArray[np.floating]) -> NDArray[np.float32]:
    """The same everywhere."""
    return np.full(len(x), EBV, np.float32)


def run_member(member: Member, tile: NDArray[np.float32], *, masks: bool = False) -> Detections:
    """One tile through ours."""
    return member.predict_batch([tile], [constant_ebv], masks=masks)[0]


def equal(stock: Any, ours: Any) -> dict[str, float]:
    """Largest difference of boxes (px) and of mixtures over objects matched, and how many are not."""
    boxes = stock.pred_boxes.tensor.numpy()
    pairs = match_boxes(boxes, ours.boxes, 0.9)
    mixture = np.stack([ours.weights, ours.means, ours.sigmas], axis=1)
    return {
        "objects of stock": len(boxes),
        "objects of ours": len(ours),
        "unmatched": len(boxes) + len(ours) - 2 * len(pairs.index1),
        "boxes px": float(np.abs(boxes[pairs.index1] - ours.boxes[pairs.index2]).max()),
        "mixtures": float(np.abs(stock.pred_redshift.numpy()[pairs.index1] - mixture[pairs.index2]).max()),
    }


def in_turn(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each; a round makes all of them, so that a disturbance does not hit one alone."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def peak_gflops() -> dict[str, float]:
    """1e9 operations a second of matrix products of 2048 and of the convolutions that are as large, each the best of five."""
    side, boxes = 2048, 1000
    one, other = torch.randn(2, side, side)
    features = torch.randn(boxes, 256, 7, 7).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(1024, 256, 7, 7).contiguous(memory_format=torch.channels_last)
    products = {
        "torch": (2 * side**3, partial(torch.mm, one, other)),
        "oneDNN": (2 * boxes * 12544 * 1024, partial(functional.conv2d, features, kernel)),
    }
    found = {"numpy": record.gemm_gflops()}
    for name, (operations, run) in products.items():
        taken = [in_turn({name: run}, 1)[name] for _ in range(6)][1:]
        found[name] = operations / min(taken) / 1e9
    return found


@torch.inference_mode()
def where_time_goes(member: Member, tile: NDArray[np.float32], rounds: int) -> dict[str, float]:
    """Median seconds of every step, each alone on the answers of the one before."""
    network, size = member.network, (tile.shape[1], tile.shape[2])
    images = torch.as_tensor(tile)[None].contiguous(memory_format=torch.channels_last)
    caps, settings = network.inference.fixed_proposals or (1, 1), network.inference
    features = network.features(images)
    answers = ask(network.proposals, features)
    proposals = propose(network.proposals, answers, [0], size, caps)
    heads = partial(classify, network.box_heads, network.kernels, features, proposals, size, settings.max_detections or 1)
    candidates: Candidates = heads()[0]
    choose = partial(pick, candidates, settings.score_threshold, settings.nms_threshold)
    found = choose()
    head = network.redshift_head
    redshift = partial(head.answer, features, found.boxes, found.image, torch.full((len(found),), EBV), network.kernels)
    boxes = [Instances(size, pred_boxes=network.detect(images)[1][0].pred_boxes).pred_boxes]
    steps: dict[str, Callable[[], Any]] = {
        "backbone": partial(network.features, images),
        "anchors": partial(ask, network.proposals, features),
        "proposals": partial(propose, network.proposals, answers, [0], size, caps),
        "box heads": heads,
        "thresholds": choose,
        "redshifts": redshift,
        "masks": partial(network.masks, features, boxes, torch.zeros(len(boxes[0]), dtype=torch.long)),
    }
    return in_turn(steps, rounds)


def gflop(run: Callable[[], Any]) -> float:
    """1e9 operations of a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops()) / 1e9


def measure(case: Case, rounds: int, peak: float) -> dict[str, Any]:
    """All figures of one case."""
    network, config = build(case)
    tile, stock = pixels(case), stock_model(network)
    exact = member_of(network, config)
    members = {"fast": member_of(network, config, preset="fast")}
    members["fast float32"] = member_of(network, config, preset="fast", precision="float32")
    runs: dict[str, Callable[[], Any]] = {
        "stock": partial(run_stock, stock, tile, loop=False),
        "stock, loop": partial(run_stock, stock, tile, loop=True),
        "masks": partial(run_member, exact, tile, masks=True),
        "boxes": partial(run_member, exact, tile),
    }
    runs |= {name: partial(run_member, member, tile) for name, member in members.items()}
    answers = {name: without_masks(run()) for name, run in runs.items()}  # and everything is warm
    seconds = in_turn(runs, rounds)
    operations = {name: gflop(runs[name]) for name in ("stock", "masks", "boxes")}
    megapixels = case.side**2 / 1e6
    return {
        "seconds": seconds,
        "objects_per_s": {name: len(answers[name]) / seconds[name] for name in runs},
        "megapixels_per_s": {name: megapixels / seconds[name] for name in runs},
        "gflop": operations,
        "share_of_peak": {name: operations[name] / seconds[name] / peak for name in operations},
        "step_seconds": where_time_goes(exact, tile, rounds),
        "against_stock": {name: equal(answers["stock"], answers[name]) for name in ("masks", "boxes")},
        "objects": {name: len(found) for name, found in answers.items()},
    }


def committed_member(**settings: Any) -> Member:
    """The first member of models/lsst-small with other inference settings."""
    folder = MODELS / "lsst-small"
    entry = yaml.safe_load((folder / "ensemble.yaml").read_text())["members"][0]
    keys = ("config", "metrics", "step", "package_version", "git_commit")
    config = info_from_dict({key: entry[key] for key in keys}, "models/lsst-small").config
    inference = InferenceSettings.model_validate(config.inference.model_dump() | settings)
    config = config.model_copy(update={"inference": inference})
    return Member(load_network(folder / entry["file"], config), config).prepared()


def quality(member: Member, skies: Dataset) -> dict[str, float]:
    """Completeness of gold galaxies, sigma_IQR of those found (LSST convention), and seconds a sky."""
    gold_in_all, z_true, found, seconds = 0, [], [], 0.0
    for one in skies.records():
        image = read_pixels(one, member.config.model.bands, with_wcs=False)
        started = time.perf_counter()
        detections = run_member(member, image.data)
        seconds += time.perf_counter() - started
        redshift = label(one.objects, skies.info, member.config.model, member.config.data).redshift
        degrees = image.pixel_scale / 3600
        x, y = degrees * detections.centres.T
        pairs = match_on_sky(degrees * one.objects.x, degrees * one.objects.y, x, y, MATCH_RADIUS_ARCSEC)
        gold = np.isfinite(redshift[pairs.index1])
        gold_in_all += int(np.isfinite(redshift).sum())
        z_true.append(redshift[pairs.index1][gold])
        found.append(detections.select(pairs.index2[gold]))
    every, z = Detections.concatenate(found), np.concatenate(z_true)
    mixture = GaussianMixture.from_arrays(every.weights, every.means, every.sigmas)
    residuals = metrics.residual(mixture.mode().numpy(), z, "lsst")
    return {
        "completeness": len(z) / gold_in_all,
        "sigma_iqr": float(metrics.sigma_iqr(residuals)),
        "gold": gold_in_all,
        "seconds": seconds / len(skies.records()),
    }


def cost_of_fast(skies: int) -> dict[str, dict[str, float]]:
    """`quality` of the exact preset and of both kinds of fast, on the same skies."""
    presets: dict[str, dict[str, Any]] = {
        "exact": {},
        "fast": {"preset": "fast"},
        "fast float32": {"preset": "fast", "precision": "float32"},
    }
    with tempfile.TemporaryDirectory(prefix="inference-benchmark-") as work:
        dataset = simulate_dataset(SkySettings(), Path(work), counts={"test": skies}, size=512, seed=515)
        return {name: quality(committed_member(**settings), dataset) for name, settings in presets.items()}


def ratios(figures: Mapping[str, Any]) -> dict[str, float]:
    """What does not depend on the machine's speed; those without a name of a case are of the first."""
    found: dict[str, float] = {}
    for number, (name, case) in enumerate(figures["cases"].items()):
        seconds, suffix = case["seconds"], "" if number == 0 else f"_{name.replace(',', '').replace(' ', '_')}"
        found |= {
            f"masks_over_stock{suffix}": seconds["stock"] / seconds["masks"],
            f"z_only_over_stock{suffix}": seconds["stock"] / seconds["boxes"],
            f"z_only_over_stock_with_loop{suffix}": seconds["stock, loop"] / seconds["boxes"],
            f"fast_over_z_only{suffix}": seconds["boxes"] / seconds["fast"],
            f"fast_float32_over_z_only{suffix}": seconds["boxes"] / seconds["fast float32"],
            f"engine_over_gemm_peak{suffix}": case["share_of_peak"]["boxes"],
            f"stock_over_gemm_peak{suffix}": case["share_of_peak"]["stock"],
        }
    cost = figures["cost_of_fast"]
    for kind in ("fast", "fast float32"):
        name = kind.replace(" ", "_")
        found[f"{name}_completeness_lost"] = cost["exact"]["completeness"] - cost[kind]["completeness"]
        found[f"{name}_sigma_iqr_over_exact"] = cost[kind]["sigma_iqr"] / cost["exact"]["sigma_iqr"]
    return {name: round(value, 4) for name, value in found.items()}


def tables(figures: Mapping[str, Any], found: Mapping[str, float]) -> list[Table]:
    """Every subject as a table, and the ratios."""
    subjects: dict[str, Mapping[str, Any]] = {"GFLOP/s of products": {"": figures["peak_gflops"]}}
    for name, case in figures["cases"].items():
        by_run = {key: row for key, row in case.items() if key not in ("step_seconds", "against_stock")}
        subjects |= {name: by_run, f"{name}: seconds of steps": {"": case["step_seconds"]}}
        subjects[f"{name}: against stock"] = case["against_stock"]
    subjects |= {"what fast costs": figures["cost_of_fast"], "ratios": {name: {"": value} for name, value in found.items()}}
    shown = []
    for subject, rows in subjects.items():
        table = Table(title=subject)
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        table.add_column("")
        for column in columns:
            table.add_column(column, justify="right")
        for name, row in rows.items():
            table.add_row(name.replace("_", " "), *(f"{row[column]:.4g}" if column in row else "" for column in columns))
        shown.append(table)
    return shown


def main() -> None:
    """Measure, print, and keep the figures unless the run is quick."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small tile, one round and two skies; nothing is kept")
    quick = parser.parse_args().quick
    effort = QUICK if quick else FULL
    peaks = peak_gflops()
    cases = {case.name: measure(case, effort.rounds, max(peaks.values())) for case in effort.cases}
    figures = {
        "threads": torch.get_num_threads(),
        "peak_gflops": peaks,
        "cases": cases,
        "cost_of_fast": cost_of_fast(effort.skies),
    }
    found = ratios(figures)
    console = Console(record=True, width=130)
    for table in tables(figures, found):
        console.print(table)
    if not quick:
        record.write("inference", ratios=found, figures=figures, log=console.export_text().splitlines())


if __name__ == "__main__":
    main()
