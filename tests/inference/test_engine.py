"""A member's answers: those of detectron2, whatever the batch, the preset's promises, and what is asked for besides."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import ImageList
from numpy.typing import NDArray
from torch import nn

from deepdisc_ops.config import TrainingConfig, validate
from deepdisc_ops.errors import ConfigError, SetupError
from deepdisc_ops.inference.engine import Member
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.sky.detections import MASK_SIDE, Detections
from deepdisc_ops.sky.matching import match_boxes

SINGLE: dict[str, Any] = {"classes": ["galaxy", "star"], "box_head": {"hidden": [32], "convolutions": [8], "norm": "LN"}}
CASCADE: dict[str, Any] = {"box_head": {"stages": 3, "hidden": [32, 16]}, "mask_head": True, "mask": {"convolutions": 1}}
CAPS: dict[str, Any] = {"fixed_proposals": [300, 200], "max_detections": 60, "score_threshold": 0.4}


def member(model: Mapping[str, Any] = CASCADE, **inference: Any) -> Member:
    """An untrained network that finds much, since its objectness and scores are spread."""
    tree = {
        "model": {
            "input": {"noise_njy": [1.0] * 6},
            "backbone": {"name": "tiny", "fpn_channels": 16},
            "redshift_head": {"hidden": [32, 16]},
        }
        | model,
        "inference": inference or CAPS,
    }
    config = validate(TrainingConfig, tree, "test")
    torch.manual_seed(0)
    network = DeepDisc(config.model, config.inference)
    with torch.no_grad():
        for parameter in network.proposals.rpn_head.parameters():
            parameter.mul_(8)
        predictors = network.box_heads.box_predictor
        for predictor in predictors if isinstance(predictors, nn.ModuleList) else [predictors]:
            predictor.cls_score.weight.mul_(60)
            predictor.bbox_pred.weight.mul_(20)
    return Member(network, config)


def sky(height: int = 128, width: int = 128, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    pixels = rng.normal(0, 1, (6, height, width)).astype(np.float32)
    y, x = np.mgrid[:height, :width]
    for cx, cy in rng.uniform(0, (width, height), (height * width // 500, 2)):
        pixels += 30 * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 8).astype(np.float32)
    return pixels


def reddening(x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.float32]:
    return np.asarray(0.01 + 1e-4 * x + 2e-4 * y, np.float32)


def predict(one: Member, tiles: Sequence[NDArray[np.float32]], masks: bool = False) -> list[Detections]:
    return one.predict_batch(tiles, [reddening] * len(tiles), masks=masks)


def assert_alike(one: Detections, other: Detections, atol: float = 1e-4) -> None:
    """The same objects with the same columns, in whatever order where scores are the same."""
    assert len(one) == len(other)
    pairs = match_boxes(one.boxes, other.boxes, 0.98)
    assert len(pairs.index1) == len(one)
    for field in fields(Detections)[:-2]:
        ours, theirs = getattr(one, field.name)[pairs.index1], getattr(other, field.name)[pairs.index2]
        np.testing.assert_allclose(ours, theirs, atol=1e-3 if field.name == "boxes" else atol, err_msg=field.name)


@torch.inference_mode()
def detectron2s(one: Member, tile: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Boxes, scores, and means of the mixtures as detectron2's own code makes them from the same weights."""
    network, images = one.network, torch.as_tensor(tile)[None]
    network.proposals.pre_nms_topk[False], network.proposals.post_nms_topk[False] = CAPS["fixed_proposals"]
    predictors = network.box_heads.box_predictor
    for predictor in predictors if isinstance(predictors, nn.ModuleList) else [predictors]:
        predictor.test_topk_per_image = CAPS["max_detections"]
    features = network.features(images)
    proposals, _ = network.proposals(ImageList(images, [images.shape[2:]]), features, None)
    (found,) = network.box_heads._forward_box(features, proposals)
    x, y = (found.pred_boxes.get_centers() - 0.5).numpy().T
    mixture = network.redshift_head(features, [found.pred_boxes], torch.as_tensor(reddening(x, y)))
    return found.pred_boxes.tensor.numpy(), found.scores.numpy(), mixture.means.numpy()


@pytest.mark.parametrize("model", [SINGLE, CASCADE], ids=["single", "cascade"])
def test_answers_are_those_of_detectron2(model: dict[str, Any]) -> None:
    one = member(model)
    tile = sky()
    boxes, scores, means = detectron2s(one, tile)
    found = predict(one, [tile])[0]
    assert len(found) == len(boxes) > 20
    order = np.lexsort((boxes[:, 0], -scores.round(5)))
    mine = np.lexsort((found.boxes[:, 0], -found.scores.round(5)))
    np.testing.assert_allclose(found.boxes[mine], boxes[order], atol=1e-3)
    np.testing.assert_allclose(found.scores[mine], scores[order], atol=1e-5)
    np.testing.assert_allclose(found.means[mine], means[order], atol=1e-4)


def test_tiles_of_any_sizes_are_answered_as_each_alone() -> None:
    one = member()
    tiles = [sky(128, 128, 1), sky(61, 77, 2), sky(128, 128, 3), sky(64, 80, 4), sky(126, 121, 5)]
    together = predict(one, tiles, masks=True)
    for tile, found in zip(tiles, together, strict=True):
        alone = predict(one, [tile], masks=True)[0]
        assert_alike(found, alone)
        assert (found.boxes[:, 2:] <= np.array(tile.shape[:0:-1])).all()
        x, y = found.centres.T
        np.testing.assert_allclose(found.ebv, reddening(x, y))
        assert (np.diff(found.scores) <= 0).all()


def test_no_tiles_and_no_objects_are_ordinary() -> None:
    assert predict(member(), []) == []
    none = predict(member(score_threshold=0.999, preset="fast", precision="float32"), [sky()] * 2, masks=True)
    for found in none:
        assert len(found) == 0
        assert found.weights.shape == (0, 5)
        assert found.masks is not None
        assert found.masks.shape == (0, MASK_SIDE, MASK_SIDE)
    again = Detections.concatenate([*none, Detections.empty(5)])
    assert again.boxes.shape == (0, 4)


@torch.inference_mode()
def test_masks_are_made_when_asked_for() -> None:
    one, tile = member(), sky()
    assert predict(one, [tile])[0].masks is None
    found = predict(one, [tile, sky(seed=9)], masks=True)[0]
    features, (instances,) = one.network.detect(torch.as_tensor(tile)[None])
    crops = one.network.masks(features, [instances.pred_boxes], instances.pred_classes)
    assert found.masks is not None
    assert found.masks.dtype == np.uint8
    pairs = match_boxes(found.boxes, instances.pred_boxes.tensor.numpy(), 0.98)
    assert len(pairs.index1) == len(found) > 20
    assert np.abs(found.masks[pairs.index1] / 255 - crops.numpy()[pairs.index2]).max() < 0.6 / 255
    with pytest.raises(ConfigError, match="no mask head"):
        predict(member(SINGLE), [tile], masks=True)


def test_a_prepared_member_answers_as_before() -> None:
    one, tile = member(), sky()
    for module in one.network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2.0)
    before = predict(one, [tile], masks=True)[0]
    after = predict(Member(copy.deepcopy(one.network), one.config).prepared(), [tile], masks=True)[0]
    assert_alike(before, after)
    norms = [m for m in Member(one.network, one.config).prepared().network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == []


def test_given_boxes_have_the_mixtures_of_detected_ones() -> None:
    one, tile = member(), sky(61, 77)
    found = predict(one, [tile])[0]
    again = one.redshift(tile, found.boxes, found.ebv)
    np.testing.assert_allclose(again.means.numpy(), found.means, atol=1e-5)
    np.testing.assert_allclose(again.weights.numpy(), found.weights, atol=1e-5)
    assert len(one.redshift(tile, np.zeros((0, 4), np.float32), np.zeros(0, np.float32))) == 0


def test_caps_grow_until_a_crowd_is_found(caplog: pytest.LogCaptureFixture) -> None:
    tiles = [sky(seed=1), np.zeros((6, 128, 128), np.float32)]
    few = {"score_threshold": 0.4, "nms_threshold": 0.4, "proposals_per_megapixel": 6000}
    cut = predict(member(**few, crowding=1), tiles)
    assert "holds more objects than 100 proposals" in caplog.text
    grown = predict(member(**few, crowding=8), tiles)
    assert len(grown[0]) > len(cut[0])
    plenty = predict(member(**few | {"proposals_per_megapixel": 8 * 6000}, crowding=1), tiles)
    assert len(grown[0]) >= 0.95 * len(plenty[0])
    fixed = predict(member(**few, fixed_proposals=[200, 100], crowding=8), tiles)
    assert_alike(fixed[0], cut[0])


def test_the_fast_preset_without_early_rejection_is_exact() -> None:
    tile = sky()
    exact = predict(member(**CAPS), [tile])[0]
    same = predict(member(**CAPS, preset="fast", precision="float32", least_objectness=0.0, least_score=0.0), [tile])[0]
    assert_alike(exact, same)


def test_early_rejection_loses_only_what_is_hopeless() -> None:
    tile, sure = sky(), 0.6
    exact = predict(member(**CAPS | {"max_detections": 1000}), [tile])[0]
    fast = predict(member(**CAPS | {"max_detections": 1000}, preset="fast", precision="float32", least_score=0.2), [tile])[0]
    pairs = match_boxes(exact.boxes, fast.boxes, 0.95)
    assert set(np.flatnonzero(exact.scores > sure)) <= set(pairs.index1)
    assert len(fast) <= len(exact)


def test_half_precision_is_near_and_says_where_it_cannot_be() -> None:
    tile = sky()
    exact, near = (predict(member(**CAPS | {"precision": p}), [tile])[0] for p in ("float32", "bf16"))
    pairs = match_boxes(exact.boxes, near.boxes, 0.7)
    assert len(pairs.index1) > 0.6 * len(exact)
    assert np.abs(exact.scores[pairs.index1] - near.scores[pairs.index2]).mean() < 0.05
    assert near.means.dtype == np.float32
    with pytest.raises(ConfigError, match="fp16, which CPUs do not compute in; set it to bf16 or float32"):
        member(precision="fp16")


def test_threads_share_a_member() -> None:
    one = member()
    tiles = [sky(128, 128, 1), sky(64, 64, 2), sky(96, 128, 3), sky(128, 128, 4)] * 2
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda tile: predict(one, [tile])[0], tiles))
    for tile, there in zip(tiles, found, strict=True):
        assert_alike(there, predict(one, [tile])[0])


def test_threads_are_set_when_a_member_is_loaded(tiny_checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    Member.load(tiny_checkpoints[0])
    member(threads=3).prepared()
    assert asked == [3]


def test_compilation_that_is_not_possible_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_args: object, **_options: object) -> None:
        raise RuntimeError("\nNo working C++ compiler found in config.cpp.cxx\nlong traceback")

    one = member(compile=True)
    monkeypatch.setattr(one.network.backbone, "compile", lambda: None)
    monkeypatch.setattr(one.network, "features", fails)
    with pytest.raises(
        SetupError, match=r"cannot compile the backbone here \(No working C\+\+ compiler .*inference\.compile to false"
    ):
        one.prepared()
