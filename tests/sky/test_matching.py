from __future__ import annotations

import math
import time
from itertools import product

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.sky.matching import (
    centre_separation_arcsec,
    chance_matches,
    match_boxes,
    match_on_sky,
    pairwise_iou_candidates,
    same_place,
)

ARCSEC = 1 / 3600

# positions within a few arcsec, on a coarse lattice, so that ties and competition for partners are common
positions = st.integers(0, 8).flatmap(lambda n: arrays(np.int64, (n, 2), elements=st.integers(0, 8)))
boxes = st.integers(0, 8).flatmap(
    lambda n: arrays(np.int64, (n, 4), elements=st.integers(0, 12)).map(lambda b: np.c_[b[:, :2], b[:, :2] + 1 + b[:, 2:]] / 2)
)


def sky(lattice: np.ndarray, dec: float = -30.0) -> tuple[np.ndarray, np.ndarray]:
    """Positions half an arcsec apart across the meridian ra = 0."""
    return (lattice[:, 0] - 4) * 0.5 * ARCSEC / math.cos(math.radians(dec)) % 360, dec + lattice[:, 1] * 0.5 * ARCSEC


def greedy(cost: np.ndarray, limit: float) -> set[tuple[int, int]]:
    """The definition, without any index structure."""
    pairs = sorted((cost[i, j], min(i, j), max(i, j), i, j) for i, j in product(*map(range, cost.shape)) if cost[i, j] <= limit)
    chosen: set[tuple[int, int]] = set()
    for *_, i, j in pairs:
        if all(i != a and j != b for a, b in chosen):
            chosen.add((i, j))
    return chosen


def iou_matrix(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    low, high = np.maximum(first[:, None, :2], second[None, :, :2]), np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = (high - low).clip(0).prod(-1)
    area = [(b[:, 2:] - b[:, :2]).prod(-1) for b in (first, second)]
    return shared / (area[0][:, None] + area[1][None] - shared)


@given(positions, positions)
def test_each_object_is_matched_at_most_once_and_within_the_radius(first: np.ndarray, second: np.ndarray) -> None:
    matches = match_on_sky(*sky(first), *sky(second), 1.2)
    assert len(set(matches.index1.tolist())) == len(set(matches.index2.tolist())) == len(matches)
    assert np.all(matches.separation_arcsec <= 1.2)
    assert np.all(np.diff(matches.index1) > 0)


@given(positions, positions)
def test_exchanging_the_lists_exchanges_the_indices(first: np.ndarray, second: np.ndarray) -> None:
    there, back = match_on_sky(*sky(first), *sky(second), 1.2), match_on_sky(*sky(second), *sky(first), 1.2)
    assert set(zip(there.index1, there.index2, strict=True)) == set(zip(back.index2, back.index1, strict=True))


@settings(max_examples=60)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 2**32 - 1))
def test_sky_matches_are_the_greedy_choice(n1: int, n2: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = ((rng.uniform(-2, 2, n) * ARCSEC % 360, 60 + rng.uniform(-2, 2, n) * ARCSEC) for n in (n1, n2))
    matches = match_on_sky(*first, *second, 1.0)
    cost = SkyCoord(*first, unit="deg")[:, None].separation(SkyCoord(*second, unit="deg")[None]).to_value(u.arcsec)
    assert set(zip(matches.index1.tolist(), matches.index2.tolist(), strict=True)) == greedy(cost, 1.0)
    np.testing.assert_allclose(matches.separation_arcsec, cost[matches.index1, matches.index2], atol=1e-6)


def test_the_closest_pair_wins_over_the_first() -> None:
    matches = match_on_sky([10.0, 10.0 + 0.4 * ARCSEC], [0.0, 0.0], [10.0 + 0.5 * ARCSEC], [0.0], 1.0)
    assert matches.index1.tolist() == [1]


@pytest.mark.parametrize(("dec", "wanted"), [(0.0, 1), (80.0, 1), (90.0, 1), (-90.0, 1)])
def test_poles_and_the_meridian_are_ordinary_places(dec: float, wanted: int) -> None:
    assert len(match_on_sky([359.99999], [dec], [0.00001], [dec], 0.1)) == wanted


@pytest.mark.parametrize(("n1", "n2"), [(0, 0), (0, 3), (3, 0)])
def test_nothing_matches_nothing(n1: int, n2: int) -> None:
    matches = match_on_sky(np.zeros(n1), np.zeros(n1), np.zeros(n2), np.zeros(n2), 1.0)
    assert len(matches) == 0
    assert matches.index1.dtype == np.int64
    assert len(match_boxes(np.zeros((n1, 4)), np.zeros((n2, 4)), 0.5)) == 0


def test_a_list_matches_itself() -> None:
    rng = np.random.default_rng(0)
    ra, dec = rng.uniform(50, 50.1, 500), rng.uniform(-30, -29.9, 500)
    matches = match_on_sky(ra, dec, ra, dec, 1.0)
    np.testing.assert_array_equal(matches.index1, np.arange(500))
    np.testing.assert_array_equal(matches.index2, np.arange(500))


def test_a_hundred_thousand_positions_and_boxes_take_seconds() -> None:
    rng = np.random.default_rng(1)
    n = 100_000
    ra, dec = rng.uniform(10, 10.5, n), rng.uniform(-0.25, 0.25, n)
    centre, size = rng.uniform(0, 20_000, (n, 2)), rng.lognormal(2.3, 0.5, (n, 2))
    found = np.c_[centre - size / 2, centre + size / 2]
    found[0] = (0, 0, 20_000, 20_000)
    start = time.process_time()
    matches = match_on_sky(ra, dec, ra + 0.05 * ARCSEC, dec, 1.0)
    overlaps = match_boxes(found, found + 0.1, 0.5)
    assert time.process_time() - start < 30
    assert (matches.index1 == matches.index2).mean() > 0.99
    assert (overlaps.index1 == overlaps.index2).mean() > 0.99


@given(boxes, boxes, st.sampled_from([0.01, 0.2, 0.5, 0.9, 1.0]))
def test_iou_candidates_are_all_pairs_above_the_limit(first: np.ndarray, second: np.ndarray, limit: float) -> None:
    i, j, iou = pairwise_iou_candidates(first, second, limit)
    expected = iou_matrix(first, second)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [tuple(pair) for pair in np.argwhere(expected >= limit).tolist()]
    np.testing.assert_allclose(iou, expected[i, j])


@settings(max_examples=50)
@given(st.integers(1, 25), st.integers(1, 25), st.floats(0.05, 1), st.integers(0, 2**32 - 1))
def test_boxes_of_very_different_sizes_are_paired_as_by_brute_force(n1: int, n2: int, limit: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    corners = [rng.uniform(0, 20, (n, 2)) for n in (n1, n2)]
    first, second = (np.c_[corner, corner + rng.lognormal(1, 1.5, corner.shape)] for corner in corners)
    i, j, _ = pairwise_iou_candidates(first, second, limit)
    expected = iou_matrix(first, second)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [tuple(pair) for pair in np.argwhere(expected >= limit).tolist()]
    matches = match_boxes(first, second, limit)
    assert set(zip(matches.index1.tolist(), matches.index2.tolist(), strict=True)) == greedy(-expected, -limit)


@given(boxes, boxes)
def test_box_matches_are_one_to_one_and_symmetric(first: np.ndarray, second: np.ndarray) -> None:
    there, back = match_boxes(first, second, 0.3), match_boxes(second, first, 0.3)
    assert len(set(there.index1.tolist())) == len(set(there.index2.tolist())) == len(there)
    assert set(zip(there.index1, there.index2, strict=True)) == set(zip(back.index2, back.index1, strict=True))
    assert np.all(there.iou >= 0.3)


def test_boxes_without_area_match_nothing() -> None:
    assert len(match_boxes([[1, 1, 1, 5], [0, 0, 4, 4]], [[1, 1, 1, 5], [0, 0, 4, 4]], 0.5)) == 1


def test_single_precision_boxes_are_welcome() -> None:
    one = np.array([[0, 0, 4, 4]], np.float32)
    assert match_boxes(one, one + np.float32(1), 0.3).iou == pytest.approx(9 / 23)


def test_unrelated_lists_match_at_the_chance_rate() -> None:
    rng = np.random.default_rng(2)
    ra1, dec1, ra2, dec2 = (rng.uniform(low, low + 0.1, 4000) for low in (150, 0, 150, 0))
    expected = len(match_on_sky(ra1, dec1, ra2, dec2, 1.0)) / 4000
    assert chance_matches(ra1, dec1, ra2, dec2, 1.0) == pytest.approx(expected, rel=0.1)
    # the same objects again: nearly all match, but by chance as few as before
    assert chance_matches(ra2, dec2, ra2, dec2, 1.0) == pytest.approx(expected, rel=0.15)


def test_the_field_edge_does_not_dilute_the_chance_rate() -> None:
    rng = np.random.default_rng(3)
    ra1, dec1, ra2, dec2 = (rng.uniform(0, 60 * ARCSEC, 3600) for _ in range(4))
    expected = len(match_on_sky(ra1, dec1, ra2, dec2, 0.5)) / 3600
    assert chance_matches(ra1, dec1, ra2, dec2, 0.5) == pytest.approx(expected, rel=0.15)


def test_chance_matches_of_few_objects() -> None:
    assert math.isnan(chance_matches([], [], [1.0], [1.0], 1.0))
    assert chance_matches([1.0], [1.0], [], [], 1.0) == 0
    assert math.isnan(chance_matches([1.0], [1.0], [1.0], [1.0], 1.0))


def test_the_distance_between_fields() -> None:
    assert centre_separation_arcsec([359.5, 0.5], [0, 0], [10.0], [0.0]) == pytest.approx(36000)
    assert centre_separation_arcsec([5.0], [5.0], [5.0], [5.0]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: match_on_sky([1.0, np.nan], [1.0, 1.0], [1.0], [1.0], 1.0), "1 of 2 positions in the first list"),
        (lambda: match_on_sky([1.0], [1.0], [1.0, 2.0], [1.0], 1.0), "second list has ra of shape"),
        (lambda: match_boxes([[0, 0, 1]], [[0, 0, 1, 1]], 0.5), r"first boxes have shape \(1, 3\)"),
        (lambda: match_boxes([[0, 0, 1, 1]], [[0, 0, 1, np.inf]], 0.5), "1 of 1 of the second boxes"),
    ],
)
def test_bad_lists_are_named(call: object, message: str) -> None:
    with pytest.raises(CatalogError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("limit", [0.0, 1.5, math.nan])
def test_a_senseless_limit_is_rejected(limit: float) -> None:
    with pytest.raises(ValueError, match="min_iou"):
        match_boxes([[0, 0, 1, 1]], [[0, 0, 1, 1]], limit)
    with pytest.raises(ValueError, match="radius_arcsec"):
        match_on_sky([1.0], [1.0], [1.0], [1.0], -1.0)


def test_positions_of_one_list_at_the_same_place() -> None:
    first, second = same_place([10.0, 20.0, 10.0, 10.0 + 2 * ARCSEC], [5.0, 5.0, 5.0, 5.0], 1.0)
    assert (first.tolist(), second.tolist()) == ([0], [2])
    assert [len(part) for part in same_place([], [], 1.0)] == [0, 0]
