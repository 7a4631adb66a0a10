"""Checkpoints of DeepDISC itself: its networks imported with their weights, and ours exported under its names.

The published network is detectron2's Cascade R-CNN (common/models/cascade_rcnn.py, or the MViTv2 variant of it) with a head
``redshift_fc``: a linear layer, tanh, and so on, from 7x7 pooled features and E(B-V) to 3 K numbers, the K logits, K means and
K log sigmas of a mixture. It pools the predicted boxes by the FPN paper's rule and has no floor on sigma. A checkpoint tells
what a network looks like, but not its anchors, thresholds, bands or the unit of its pixels: detectron2's and DeepDISC's usual
values are taken for these, and every setting can be given.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepdisc_ops.config import ModelSettings, TrainingConfig, flatten, parse_override, set_by_path, validate
from deepdisc_ops.errors import CheckpointError
from deepdisc_ops.model.backbones.mvit import MVITS
from deepdisc_ops.model.backbones.residual import RESIDUAL_NETS
from deepdisc_ops.model.backbones.swin import SWINS
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.model.weights import KeyReport, fill, read_torch, shorten

Tree = dict[str, Any]
State = Mapping[str, Tensor]

NAMES = (
    ("backbone.", "backbone."),
    ("proposal_generator.", "proposals."),
    ("roi_heads.redshift_fc.", "redshift_head.mixture."),
    ("roi_heads.", "box_heads."),
)
"""Beginnings of keys, theirs and ours; the rest of a key is the same."""
STEM, PATCHES = "backbone.bottom_up.stem.conv1.weight", "backbone.bottom_up.patch_embed.proj.weight"
REDSHIFT = "roi_heads.redshift_fc."
USUAL_BANDS = {6: ("u", "g", "r", "i", "z", "y")}
USUAL_CLASSES = {1: ("object",), 2: ("galaxy", "star")}
USUAL_ANCHORS = (8.0, 16.0, 32.0, 64.0, 128.0)
USUAL_RATIOS = {1: (1.0,), 3: (0.5, 1.0, 2.0)}
USUAL_POOLER = {"canonical_size": 224.0, "canonical_level": 4, "samples": 0}
USUAL_INFERENCE = {"score_threshold": 0.05, "nms_threshold": 0.5, "fixed_proposals": (1000, 1000), "max_detections": 100}
BUFFERS_OF_OLD = re.compile(r"(pixel_mean|pixel_std|.*\.cell_anchors\.\d+)$")
"""Buffers that detectron2 kept in checkpoints before 2020 and sets from the config since."""
FREE = (
    *("bands", "classes", "pixel_scale", "anchor_sizes", "proposals.aspect_ratios"),
    *("input.mean_njy", "input.std_njy", "input.noise_njy", "input.softening"),
    *("backbone.drop_path", "backbone.recompute", "weights", "backbone_weights", "first_convolution", "redshift_head.sigma_floor"),
)
"""Settings that the published code has too, or that its answers hardly depend on: a floor far below every sigma."""
TRAINING_ONLY = (
    *("proposals.iou", "proposals.samples", "proposals.before_nms", "proposals_training"),
    *("box_head.samples", "box_head.positive_fraction"),
    *("redshift_head.gold_band", "redshift_head.gold_limit", "redshift_head.stars"),
    *("redshift_head.loss_weight", "redshift_head.max_boxes", "redshift_head.true_boxes"),
)


def import_checkpoint(
    path: Path, overrides: Iterable[str] = (), *, unit_njy: float = 1.0
) -> tuple[DeepDisc, TrainingConfig, KeyReport]:
    """A network with the weights of a DeepDISC checkpoint (.pth), its config, and what became of every key.

    ``overrides`` (``a.b=c``) state what the file cannot tell: model.bands (in the order of the channels), model.classes,
    model.anchor_sizes, model.pixel_scale, inference.score_threshold and the like. ``unit_njy`` is 1 of the network's pixels
    in nJy: 10^(0.4 (31.4 - zero point)).
    """
    tree = read_torch(path)
    held = tree.get("model", tree)
    state = {key: value for key, value in held.items() if isinstance(value, Tensor)}
    network, config, report = import_state(state, overrides, unit_njy=unit_njy, source=str(path))
    if held is not tree:
        report.ignored |= dict.fromkeys((key for key in tree if key != "model"), "not part of the network")
    return network, config, report


def import_state(
    state: State, overrides: Iterable[str] = (), *, unit_njy: float = 1.0, source: str = "the checkpoint"
) -> tuple[DeepDisc, TrainingConfig, KeyReport]:
    """As `import_checkpoint`, of a state dict."""
    state = {key.removeprefix("module."): value for key, value in state.items()}
    report = KeyReport()
    tree = published_settings(state, unit_njy=unit_njy, source=source)
    for text in overrides:
        keys, value = parse_override(text)
        set_by_path(tree, keys, value)
    count, names = _first_weight(state, source).shape[1], tree["model"].get("bands")
    if isinstance(names, list) and len(names) != count:
        raise CheckpointError(
            f"{source} is of {count} bands, model.bands names {len(names)} ({', '.join(map(str, names))}); name its own"
        )
    if names is None:
        raise CheckpointError(f"{source} is of {count} bands, without their names; give model.bands in the order of its channels")
    config = validate(TrainingConfig, tree, source)
    network = DeepDisc(config.model, config.inference)
    weights = {}
    for key, value in state.items():
        if BUFFERS_OF_OLD.fullmatch(key):
            _note_buffer(report, key)
            continue
        weights[_ours(key, source)] = value
        report.matched[key] = _ours(key, source)
    fill(network, weights, config.model.bands, source)
    return network.eval(), config, report


def _note_buffer(report: KeyReport, key: str) -> None:
    if key.startswith("pixel_"):
        report.adapted[key] = "became model.input"
    else:
        report.ignored[key] = "follows from model.anchor_sizes"


def export_state(network: DeepDisc) -> dict[str, Tensor]:
    """The weights of a network under DeepDISC's names, in its order."""
    return {_theirs(key): value.detach().cpu().clone() for key, value in network.state_dict().items()}


def export_checkpoint(network: DeepDisc, model: ModelSettings, path: Path) -> None:
    """Write a checkpoint that DeepDISC's configs load, if its network can be that of ``model``."""
    state = export_state(network)
    differing = unlike_published(model, state)
    if differing:
        raise CheckpointError(f"DeepDISC has no such network: {'; '.join(differing)}; train one with these settings to export it")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.save({"model": state}, path)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} could not be written ({reason}); free space and export again") from None


def unlike_published(model: ModelSettings, state: State) -> list[str]:
    """Settings with which the published code would not compute what ``model`` does, each with both values."""
    tree = published_settings(state)["model"] | {"bands": model.bands, "classes": model.classes}
    theirs = flatten(validate(ModelSettings, tree, "the published network").model_dump(mode="json"))
    norm = model.backbone.norm if model.backbone.fpn_norm is None else model.backbone.fpn_norm
    ours = flatten(model.model_dump(mode="json")) | {"backbone.fpn_norm": norm}
    names = [name for name in ours if not name.startswith(FREE) and name not in TRAINING_ONLY]
    return [f"{name} is {ours[name]}, there it is {theirs[name]}" for name in names if ours[name] != theirs[name]]


def published_settings(state: State, *, unit_njy: float = 1.0, source: str = "the checkpoint") -> Tree:
    """The settings of the published network with these weights, as a config tree; without bands if they have no usual names."""
    bands = _first_weight(state, source).shape[1]
    predictor = "roi_heads.box_predictor"
    classes = _rows(state, f"{predictor}.0.cls_score.weight", f"{predictor}.cls_score.weight", source=source) - 1
    anchors = _rows(state, "proposal_generator.rpn_head.objectness_logits.weight", source=source)
    convolutions = len(_indices(state, r"proposal_generator\.rpn_head\.conv\.conv(\d+)\.weight")) or 1
    channels = state["proposal_generator.rpn_head.objectness_logits.weight"].shape[1]
    backbone = _backbone(state, source)
    model: Tree = {
        "input": _input(state, bands, unit_njy),
        "backbone": backbone,
        "anchor_sizes": USUAL_ANCHORS[: backbone["levels"] + 1],
        "proposals": {
            "convolutions": convolutions,
            "anchor_offset": 0.0,
            "iou": (0.3, 0.7),
            "before_nms": 2000,
            "aspect_ratios": USUAL_RATIOS.get(anchors, (1.0,) * anchors),
        },
        "proposals_training": 1000,
        "pooler": USUAL_POOLER,
        "box_head": _box_head(state, channels),
        "redshift_head": _redshift_head(state, channels, source),
        "mask_head": "roi_heads.mask_head.predictor.weight" in state,
    }
    if model["mask_head"]:
        layers = len(_indices(state, r"roi_heads\.mask_head\.mask_fcn(\d+)\.weight"))
        model["mask"] = {"convolutions": layers, "norm": _norm(state, "roi_heads.mask_head.mask_fcn1")}
    if bands in USUAL_BANDS:
        model["bands"] = USUAL_BANDS[bands]
    if classes not in USUAL_CLASSES:
        raise CheckpointError(f"{source} tells {classes} classes apart; expected one, or galaxy and star")
    model["classes"] = USUAL_CLASSES[classes]
    return {"model": model, "inference": dict(USUAL_INFERENCE)}


def _first_weight(state: State, source: str) -> Tensor:
    for key in (STEM, PATCHES):
        if key in state:
            return state[key]
    raise CheckpointError(
        f"{source} has neither {STEM} nor {PATCHES} but {shorten(state) or 'no tensors'}; expected a DeepDISC checkpoint (.pth)"
    )


def _backbone(state: State, source: str) -> Tree:
    first = _first_weight(state, source)
    laterals = _indices(state, r"backbone\.fpn_lateral(\d+)\.weight")
    if not laterals:
        raise CheckpointError(f"{source} has no backbone.fpn_lateral; expected a network with a feature pyramid")
    common = {
        "stem_stride": 2 ** min(laterals),
        "levels": len(laterals),
        "fpn_channels": state[f"backbone.fpn_lateral{laterals[0]}.weight"].shape[0],
        "fpn_norm": _norm(state, f"backbone.fpn_lateral{laterals[0]}"),
        "top_level": True,
    }
    if STEM in state:
        return common | _residual(state, source) | {"stem_pool": True}
    channels = first.shape[0]
    stages = [len(_indices(state, rf"backbone\.bottom_up\.layers\.{i}\.blocks\.(\d+)\.norm1\.weight")) for i in range(4)]
    blocks = len(_indices(state, r"backbone\.bottom_up\.blocks\.(\d+)\.norm1\.weight"))
    known: dict[str, tuple[int, Any]] = {name: (size.channels, size.last_blocks[-1] + 1) for name, size in MVITS.items()}
    known |= {name: (size.channels, list(size.blocks)) for name, size in SWINS.items()}
    found = (channels, stages if any(stages) else blocks)
    names = [name for name, size in known.items() if size == found]
    if not names:
        raise CheckpointError(
            f"{source} has a transformer of width {found[0]} and {found[1]} blocks; expected MViTv2 T to H or Swin T to L"
        )
    return common | {"name": names[0], "norm": "LN"}


def _residual(state: State, source: str) -> Tree:
    body = "backbone.bottom_up.res"
    blocks = tuple(len(_indices(state, rf"backbone\.bottom_up\.res{stage}\.(\d+)\.conv1\.weight")) for stage in range(2, 6))
    deep = f"{body}2.0.conv3.weight" in state
    names = [
        name
        for name, net in RESIDUAL_NETS.items()
        if name.startswith("resnet") and net.blocks == blocks and (net.channels[0] > 64) == deep
    ]
    if not names:
        raise CheckpointError(f"{source} has a residual network of {blocks} blocks; expected ResNet 18, 34, 50, 101 or 152")
    norm = _norm(state, f"{body}2.0.conv1")
    return {"name": names[0], "norm": "GN" if norm == "LN" else norm} | ({"stride_in_1x1": True} if deep else {})


def _box_head(state: State, channels: int) -> Tree:
    stages = len(_indices(state, r"roi_heads\.box_head\.(\d+)\.fc1\.weight"))
    head = "roi_heads.box_head.0." if stages else "roi_heads.box_head."
    convolutions = [state[f"{head}conv{i}.weight"].shape[0] for i in _indices(state, re.escape(head) + r"conv(\d+)\.weight")]
    hidden = [state[f"{head}fc{i}.weight"].shape[0] for i in _indices(state, re.escape(head) + r"fc(\d+)\.weight")]
    pooled = state[f"{head}fc1.weight"].shape[1] // (convolutions[-1] if convolutions else channels)
    return {
        "stages": stages or 1,
        "convolutions": convolutions,
        "norm": _norm(state, f"{head}conv1") if convolutions else "",
        "hidden": hidden,
        "pool": round(pooled**0.5),
        "samples": 512,
        "positive_fraction": 0.25,
    }


def _redshift_head(state: State, channels: int, source: str) -> Tree:
    layers = _indices(state, re.escape(REDSHIFT) + r"(\d+)\.weight")
    if not layers:
        raise CheckpointError(
            f"{source} has no {REDSHIFT}: it gives no redshifts; its backbone can start a run as model.backbone_weights"
        )
    shapes = [state[f"{REDSHIFT}{i}.weight"].shape for i in layers]
    outputs, inputs = shapes[-1][0], shapes[0][1]
    if outputs % 3:
        raise CheckpointError(f"{source} ends its {REDSHIFT} in {outputs} numbers; expected 3 for each Gaussian of a mixture")
    return {
        "components": outputs // 3,
        "hidden": [shape[0] for shape in shapes[:-1]],
        "activation": "tanh",
        "pool": round((inputs // channels) ** 0.5),
        "ebv": bool(inputs % channels),
        "sigma_floor": 0.0,
        "true_boxes": True,
    }


def _input(state: State, bands: int, unit_njy: float) -> Tree:
    """(pixel - mean) / std with both in nJy; a published network has mean 0 and std 1 if the checkpoint does not say otherwise."""
    mean = state["pixel_mean"].flatten().tolist() if "pixel_mean" in state else [0.0] * bands
    std = state["pixel_std"].flatten().tolist() if "pixel_std" in state else [1.0] * bands
    return {"scaling": "zscore", "mean_njy": [unit_njy * each for each in mean], "std_njy": [unit_njy * each for each in std]}


def _norm(state: State, layer: str) -> str:
    """Layer and group norm have the same weights; the published networks have the former."""
    if f"{layer}.norm.weight" not in state:
        return ""
    if f"{layer}.norm.running_var" not in state:
        return "LN"
    return "BN" if f"{layer}.norm.num_batches_tracked" in state else "FrozenBN"


def _indices(state: State, pattern: str) -> list[int]:
    """Numbers that stand at the group of ``pattern`` in a key, in order."""
    return sorted({int(found[1]) for key in state if (found := re.fullmatch(pattern, key))})


def _rows(state: State, *keys: str, source: str) -> int:
    for key in keys:
        if key in state:
            return state[key].shape[0]
    raise CheckpointError(f"{source} has no {keys[0]}; expected a DeepDISC checkpoint (.pth)")


def _ours(key: str, source: str) -> str:
    for theirs, ours in NAMES:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    raise CheckpointError(f"{source} has a key {key!r}; expected {', '.join(theirs for theirs, _ in NAMES)} at its beginning")


def _theirs(key: str) -> str:
    theirs, ours = next(pair for pair in NAMES if key.startswith(pair[1]))
    return theirs + key.removeprefix(ours)
