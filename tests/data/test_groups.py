from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepdisc_ops.data import groups


@given(st.integers(0, 300), st.floats(0, 100), st.integers(0, 99))
def test_groups_are_disjoint_runs_of_neighbours_in_redshift(size: int, expected: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    redshift = rng.gamma(4.0, 0.25, size)
    members, number = groups.draw_groups(redshift, expected, rng)
    assert len(members) == len(number) == len(np.unique(members))
    rank = np.argsort(np.argsort(redshift))
    for group in np.unique(number):
        ranks = np.sort(rank[members[number == group]])
        assert len(ranks) in groups.SIZES
        assert (np.diff(ranks) == 1).all()


def test_the_expected_number_of_members_is_drawn() -> None:
    rng = np.random.default_rng(0)
    counts = [len(groups.draw_groups(rng.uniform(size=groups.pool_size(500)), 500, rng)[0]) for _ in range(200)]
    assert np.mean(counts) == pytest.approx(500, abs=4 * np.std(counts) / np.sqrt(200))


def test_members_lie_within_a_megaparsec_round_their_centre() -> None:
    offsets = groups.draw_offsets(np.full(20000, 8.0), np.random.default_rng(1)) * 8.0
    radius = np.hypot(*offsets.T)
    assert radius.max() < 750
    assert 60 < np.median(radius) < 160
    np.testing.assert_allclose(offsets.mean(axis=0), 0, atol=6)
    assert offsets[:, 0].std() == pytest.approx(offsets[:, 1].std(), rel=0.03)
