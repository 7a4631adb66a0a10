from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deepdisc_ops.config import EnsembleSettings, validate
from deepdisc_ops.errors import CheckpointError, ConfigError
from deepdisc_ops.inference.combine import DIVERGENCE, combine, combine_aligned, member_weights, same_objects
from deepdisc_ops.photoz.mixture import GaussianMixture
from deepdisc_ops.sky.detections import Detections, Flag

Match = ("intersection", "majority", "union")
GRID = torch.linspace(-1, 5, 200, dtype=torch.float64)[None]


def detections(boxes: object, rng: np.random.Generator | None = None, components: int = 3) -> Detections:
    """Objects with ``boxes`` and, given ``rng``, with scores and mixtures of their own."""
    array = np.array(boxes, np.float32).reshape(-1, 4)
    n = len(array)
    rng = rng or np.random.default_rng(0)
    return Detections(
        boxes=array,
        scores=rng.uniform(0.3, 1, n).astype(np.float32),
        classes=rng.integers(0, 2, n).astype(np.int32),
        weights=rng.dirichlet(np.ones(components), n).astype(np.float32).reshape(n, components),
        means=rng.uniform(0, 3, (n, components)).astype(np.float32),
        sigmas=rng.uniform(0.02, 0.4, (n, components)).astype(np.float32),
        ebv=rng.uniform(0, 0.1, n).astype(np.float32),
        n_members=np.ones(n, np.int32),
        flags=(rng.random(n) < 0.2).astype(np.int32) * np.int32(Flag.EDGE),
    )


def members(count: int, seed: int, objects: int = 40) -> list[Detections]:
    """Views of one crowded sky: each member misses some objects, jitters the others and differs in redshift and K."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 150, (objects, 2))
    truth = np.hstack([corners, corners + rng.uniform(6, 30, (objects, 2))])
    views = []
    for m in range(count):
        seen = rng.permutation(np.flatnonzero(rng.random(objects) < 0.8))
        views.append(detections(truth[seen] + rng.normal(0, 0.8, (len(seen), 4)), rng, components=2 + m % 2))
    return views


def densities(found: Detections) -> NDArray[np.float64]:
    mixture = GaussianMixture.from_arrays(found.weights, found.means, found.sigmas)
    return np.asarray(mixture.log_prob(GRID).exp())


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(2, 5), st.sampled_from(Match), st.sampled_from([None, 3]))
def test_the_order_of_members_does_not_matter(seed: int, count: int, match: str, components: int | None) -> None:
    wanted = EnsembleSettings(match=match, components=components)
    views = members(count, seed)
    weights = np.random.default_rng(seed).uniform(0.1, 1, count).tolist()
    first = combine(views, weights, wanted)
    order = np.random.default_rng(seed + 1).permutation(count)
    second = combine([views[m] for m in order], [weights[m] for m in order], wanted)
    assert len(first) == len(second)
    for name in ("boxes", "scores", "ebv"):
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), rtol=1e-5, atol=1e-6)
    for name in ("classes", "n_members", "flags"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    np.testing.assert_allclose(densities(first), densities(second), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("match", Match)
@pytest.mark.parametrize("components", [None, 2])
def test_equal_members_are_the_member(match: str, components: int | None) -> None:
    one = members(1, seed=5)[0]
    # what one member found does not overlap so much that it would be told apart by chance
    common = combine([one] * 3, [0.2, 0.5, 0.3], EnsembleSettings(match=match, components=components))
    order = np.argsort(-one.scores, kind="stable")
    assert len(common) == len(one)
    for name in ("boxes", "scores", "classes", "ebv", "flags"):
        np.testing.assert_allclose(getattr(common, name), getattr(one, name)[order], rtol=1e-6)
    np.testing.assert_allclose(densities(common), densities(one.select(order)), rtol=1e-4, atol=1e-5)
    assert (common.n_members == 3).all()


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_every_detection_belongs_to_one_object_and_every_object_to_a_member_once(seed: int, count: int) -> None:
    views = members(count, seed)
    rows = same_objects(views, 0.3)
    owner = np.repeat(np.arange(count), [len(view) for view in views])
    np.testing.assert_array_equal(np.sort(rows[rows >= 0]), np.arange(len(owner)))
    for m in range(count):
        assert (owner[rows[:, m][rows[:, m] >= 0]] == m).all()


def test_intersection_majority_and_union_nest() -> None:
    views = members(5, seed=1)
    found = {match: combine(views, [1] * 5, EnsembleSettings(match=match)) for match in Match}
    counts = found["union"].n_members
    assert len(found["union"]) > len(found["majority"]) > len(found["intersection"]) > 0
    assert len(found["majority"]) == (counts > 2.5).sum()
    assert len(found["intersection"]) == (counts == 5).sum()
    assert counts.sum() == sum(map(len, views))


def test_who_did_not_find_an_object_has_no_weight_in_it() -> None:
    first = detections([[0, 0, 10, 10], [50, 50, 60, 60]])
    second = detections([[0, 1, 10, 11]], components=2)
    both = combine([first, second], [0.25, 0.75], EnsembleSettings(match="union"))
    assert both.weights.shape == (2, 5)
    for name in ("weights", "means", "sigmas"):
        assert np.isfinite(getattr(both, name)).all()
    assert (both.sigmas > 0).all()
    np.testing.assert_allclose(both.weights.sum(1), 1, rtol=1e-6)
    alone = both.select(both.n_members == 1)
    np.testing.assert_array_equal(alone.weights[:, 3:], 0)
    np.testing.assert_allclose(densities(alone), densities(first.select(np.array([1]))), rtol=1e-5)
    shared = both.select(both.n_members == 2)
    np.testing.assert_allclose(shared.boxes, [[0, 0.5, 10, 10.5]])
    expected = 0.25 * densities(first.select(np.array([0]))) + 0.75 * densities(second)
    np.testing.assert_allclose(densities(shared), expected, rtol=1e-5, atol=1e-9)


def test_neighbours_stay_two_where_one_member_saw_them_as_one() -> None:
    left, both, right = ([[0, 0, 10, 10]], [[0, 0, 20, 10]], [[10, 0, 20, 10]])
    views = [detections(left), detections(both), detections(right)]
    for order in itertools.permutations(views):
        assert sorted(combine(order, [1, 1, 1], EnsembleSettings(match="union")).n_members.tolist()) == [1, 2]
        assert len(combine(order, [1, 1, 1], EnsembleSettings())) == 0


def test_the_class_is_voted_for_and_flags_add_up() -> None:
    box = [[0, 0, 10, 10]]
    views = [replace(detections(box), classes=np.array([c], np.int32), scores=np.float32([0.9])) for c in (1, 0, 1)]
    views[1] = views[1].flagged(np.array([True]), Flag.TRUNCATED)
    views[2] = views[2].flagged(np.array([True]), Flag.EDGE)
    heavy_second = combine(views, [0.2, 0.6, 0.2], EnsembleSettings())
    even = combine(views, [1, 1, 1], EnsembleSettings())
    assert heavy_second.classes.tolist() == [0]
    assert even.classes.tolist() == [1]
    assert even.flags[0] & (Flag.TRUNCATED | Flag.EDGE) == Flag.TRUNCATED | Flag.EDGE


def with_masks(found: Detections, rng: np.random.Generator) -> Detections:
    return replace(found, masks=rng.integers(0, 256, (len(found), 28, 28), np.uint8))


def test_masks_of_equal_boxes_are_averaged(rng: np.random.Generator) -> None:
    views = [with_masks(detections([[3, 4, 17, 40]]), rng) for _ in range(2)]
    both = combine(views, [1, 1], EnsembleSettings())
    assert both.masks is not None
    expected = (views[0].masks.astype(float) + views[1].masks) / 2
    assert np.abs(both.masks - expected).max() <= 0.51


def test_masks_follow_their_pixels_into_the_common_box() -> None:
    """Two members cut one round object differently; the common mask is that object again."""

    def disc(box: Sequence[float]) -> NDArray[np.uint8]:
        x, y = (box[k] + (np.arange(28) + 0.5) / 28 * (box[k + 2] - box[k]) for k in (0, 1))
        return (255 / (1 + np.exp(2 * (np.hypot(x - 20, y[:, None] - 20) - 6)))).astype(np.uint8)

    boxes = [[10.0, 10, 30, 30], [12, 8, 32, 29], [8, 9, 29, 33]]
    views = [replace(detections([box]), masks=disc(box)[None]) for box in boxes]
    common = combine(views, [1, 1, 1], EnsembleSettings())
    assert common.masks is not None
    assert np.abs(common.masks[0].astype(int) - disc(common.boxes[0])).max() < 16


def test_further_columns_come_from_the_best_score() -> None:
    box = [[0, 0, 10, 10]]
    low, high = (replace(detections(box), scores=np.float32([s]), extra={"flux": np.full((1, 3), s)}) for s in (0.4, 0.8))
    for views in ([low, high], [high, low]):
        assert (combine(views, [1, 1], EnsembleSettings()).extra["flux"] == 0.8).all()


@pytest.mark.parametrize("match", Match)
def test_no_objects_are_an_ordinary_answer(match: str) -> None:
    wanted = EnsembleSettings(match=match)
    some, none = detections([[0, 0, 10, 10]]), Detections.empty(2)
    for reduced in (wanted, EnsembleSettings(match=match, components=2)):
        width = reduced.components or 5
        assert combine([none, none], [1, 1], reduced).weights.shape[0] == 0
        found = combine([some, none], [1, 1], reduced)
        assert found.weights.shape == ((1 if match == "union" else 0), width)
        assert set(found.extra) == ({DIVERGENCE} if reduced.components else set())
    assert combine_aligned([none, none], [1, 1], wanted).boxes.shape == (0, 4)


def test_reduced_mixtures_keep_mean_and_variance() -> None:
    views = members(4, seed=8)
    whole, reduced, bounded = (
        combine(views, [4, 3, 2, 1], EnsembleSettings(match="majority", components=k, max_divergence=limit))
        for k, limit in ((None, None), (3, None), (3, 0.01))
    )
    assert (whole.weights.shape[1], reduced.weights.shape[1], bounded.weights.shape[1]) == (10, 3, 10)

    def moments(found: Detections) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        w, m, s = (np.asarray(column, np.float64) for column in (found.weights, found.means, found.sigmas))
        mean = (w * m).sum(1)
        return mean, (w * (s**2 + (m - mean[:, None]) ** 2)).sum(1)

    for few in (reduced, bounded):
        np.testing.assert_array_equal(few.boxes, whole.boxes)
        np.testing.assert_allclose(moments(few), moments(whole), rtol=1e-5)
    assert reduced.extra[DIVERGENCE].min() >= 0
    assert bounded.extra[DIVERGENCE].max() <= 0.01 < reduced.extra[DIVERGENCE].max()


def test_aligned_objects_keep_their_order(rng: np.random.Generator) -> None:
    boxes = rng.uniform(0, 5, (20, 4)) + np.array([0, 0, 10, 10])  # all overlap: only the order tells which is which
    views = [detections(boxes, rng), detections(boxes, rng)]
    both = combine_aligned(views, [0.5, 0.5], EnsembleSettings())
    np.testing.assert_array_equal(both.boxes, views[0].boxes)
    np.testing.assert_allclose(densities(both), (densities(views[0]) + densities(views[1])) / 2, rtol=1e-4, atol=1e-6)


def test_a_member_without_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(1, 0\) are not all positive"):
        combine([detections([[0, 0, 1, 1]])] * 2, [1, 0], EnsembleSettings())


def test_weights_follow_the_validation_likelihood() -> None:
    np.testing.assert_allclose(member_weights([0.0, np.log(3.0)]), [0.75, 0.25])
    np.testing.assert_allclose(member_weights([-5000.0, -5000.0]), [0.5, 0.5])
    assert min(member_weights([0.0, 5000.0])) > 0
    np.testing.assert_allclose(member_weights([-1.0, -3.0], "log_likelihood"), [0.25, 0.75])
    assert member_weights([1.0, 2.0, math.inf], "uniform") == [1 / 3] * 3
    assert member_weights([math.nan]) == [1.0]
    np.testing.assert_allclose(member_weights([1.0, 2.0], [1, 3]), [0.25, 0.75])


def test_weights_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"b has a log likelihood of -0\.5"):
        member_weights([-1.0, 0.5], "log_likelihood", ["a", "b"])
    with pytest.raises(CheckpointError, match="member 1 has no finite val_nll"):
        member_weights([-1.0, math.nan])
    with pytest.raises(ConfigError, match="3 values for 2 members"):
        member_weights([-1.0, 1.0], [1, 2, 3])
    with pytest.raises(ConfigError, match="max_divergence bounds the merging"):
        validate(EnsembleSettings, {"max_divergence": 0.1}, "test")
    with pytest.raises(ConfigError, match="weights"):
        validate(EnsembleSettings, {"weights": [1.0, 0.0]}, "test")


def test_settings_survive_a_round_trip() -> None:
    for wanted in (EnsembleSettings(), EnsembleSettings(weights=(1.0, 2.0), components=5, max_divergence=0.1, match="union")):
        assert validate(EnsembleSettings, wanted.model_dump(mode="json"), "test") == wanted
    assert {field.name for field in fields(Detections)} >= {"masks", "extra"}
