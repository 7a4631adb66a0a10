"""How much of a cluster an actor gets; what needs a real Ray is in tests/integration."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepdisc_ops.errors import ConfigError
from deepdisc_ops.inference.cluster import check_room, places, share

NODES = st.lists(st.fixed_dictionaries({"CPU": st.integers(0, 20), "GPU": st.integers(0, 4)}), min_size=1, max_size=4)


@given(NODES, st.integers(1, 9), st.integers(0, 1))
def test_a_share_has_room_for_all_actors_and_no_larger_one_has(nodes: list[dict[str, int]], actors: int, gpus: int) -> None:
    cpus = share(nodes, actors, {"GPU": gpus})
    assert places(nodes, {"GPU": gpus, "CPU": cpus}) >= actors or cpus == 1
    assert places(nodes, {"GPU": gpus, "CPU": cpus + 1}) < actors


def test_an_actor_stays_on_one_node() -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 3.0, "GPU": 1.0}, {"CPU": 64.0}]
    assert places(nodes, {"CPU": 4.0, "GPU": 1.0}) == 2
    assert places(nodes, {"CPU": 1.0, "GPU": 0.5, "highmem": 0.0}) == 6
    assert places(nodes, {"CPU": 1.0, "highmem": 1.0}) == 0
    assert share(nodes, 3, {"GPU": 1.0}) == 3
    assert places([{"CPU": 0.3}], {"CPU": 0.1}) == 3


def test_actors_that_would_wait_for_ever_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    nodes = [{"CPU": 2.0, "memory": 1e9}]
    check_room(nodes, 2, {"CPU": 1.0, "GPU": 0.0}, joined=False)
    with pytest.raises(ConfigError, match="3 actors of 1 CPU do not fit on nodes of 2 CPU; ask for fewer actors"):
        check_room(nodes, 3, {"CPU": 1.0, "GPU": 0.0}, joined=False)
    with pytest.raises(ConfigError, match="1 actors of 1 GPU, 1 CPU do not fit"):
        check_room(nodes, 1, {"GPU": 1.0, "CPU": 1.0}, joined=True)
    assert not caplog.records
    check_room(nodes, 3, {"CPU": 1.0}, joined=True)
    assert "2 of them work, the others wait for room" in caplog.text
