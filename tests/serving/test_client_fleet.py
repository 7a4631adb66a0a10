"""Several endpoints, and endpoints that move: no window is lost, and none is answered by another model unseen."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from scripted import EMPTY, ScriptedEndpoint, answer, catalogue, hang_up

from deepdisc_ops.errors import AccessDenied, ConfigError, ServerError, ServerUnreachable
from deepdisc_ops.serving.endpoint import Endpoint, endpoint_at, read_address
from deepdisc_ops.serving.fleet import Fleet
from deepdisc_ops.sky.detections import Detections
from deepdisc_ops.sky.dust import EbvPlane
from deepdisc_ops.sky.images import SkyImage

PLANE = EbvPlane.constant(0.1)
IMAGE = SkyImage(np.ones((2, 3, 4), np.float32), ("g", "r"), None, 0.2, np.zeros((3, 4), bool))


def slow(_: object) -> object:
    def write(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.05)
        answer(200, EMPTY)(handler)

    return write


@pytest.fixture
def pair() -> Iterator[tuple[ScriptedEndpoint, ScriptedEndpoint]]:
    ends = ScriptedEndpoint(slow), ScriptedEndpoint(slow)
    yield ends
    for end in ends:
        end.stop()


def discovery(folder: Path, url: str, token: str = "secret", **more: object) -> Path:
    """A run directory with a discovery file, replaced as servers do it."""
    folder.mkdir(exist_ok=True)
    (folder / "new").write_text(json.dumps({"url": url, "token": token, "model_version": "1", "bands": ["g", "r"], **more}))
    (folder / "new").replace(folder / "server.json")
    return folder


def ask(fleet: Fleet, windows: int = 24) -> int:
    with ThreadPoolExecutor(12) as pool:
        return sum(1 for _ in pool.map(lambda _: fleet.predict(IMAGE, PLANE), range(windows)))


def test_all_endpoints_work_and_none_gets_more_than_it_has_room_for(pair: tuple[ScriptedEndpoint, ScriptedEndpoint]) -> None:
    with Fleet.open([end.url for end in pair], token="secret", most=3) as fleet:
        assert fleet.room == 6
        assert ask(fleet) == 24
    assert sorted(len(end.requests) for end in pair) == pytest.approx([12, 12], abs=6)
    assert [end.most_at_once for end in pair] == [3, 3]


def test_workers_that_a_discovery_file_tells_of_get_two_windows_each(spaced: Path, pair: tuple[ScriptedEndpoint, ...]) -> None:
    with Fleet.open([discovery(spaced / "a", pair[0].url, workers=2), discovery(spaced / "b", pair[1].url)]) as fleet:
        assert fleet.workers == 3
        assert fleet.bands == ("g", "r")
        assert ask(fleet) == 24
    assert [end.most_at_once for end in pair] == [4, 2]


def test_a_full_queue_is_met_by_sending_less_not_by_waiting() -> None:
    """An endpoint that takes three windows at once, 50 ms each, is kept at work, and few are sent in vain."""
    slots, taken = threading.Semaphore(3), list[float]()

    def queue(_: object) -> object:
        if not slots.acquire(blocking=False):
            return answer(503, b'{"code": 503, "message": "no room"}')

        def write(handler: BaseHTTPRequestHandler) -> None:
            time.sleep(0.05)
            taken.append(time.monotonic())
            slots.release()
            answer(200, EMPTY)(handler)

        return write

    end = ScriptedEndpoint(queue)
    try:
        with Fleet.open([end.url], token="secret", most=12) as fleet:
            assert ask(fleet, 60) == 60
            refused = sum(fleet.trouble.values())
    finally:
        end.stop()
    assert len(taken) == 60
    assert refused < 60
    assert np.diff(taken).max() < 3  # pauses of a line that failed grow to 8 s


def test_a_dead_endpoint_costs_no_window(pair: tuple[ScriptedEndpoint, ScriptedEndpoint]) -> None:
    pair[0].stop()
    with Fleet.open([end.url for end in pair], token="secret") as fleet:
        assert ask(fleet) == 24
        assert sum(fleet.trouble.values()) < 12
    assert len(pair[1].requests) == 24


def test_one_that_always_fails_does_not_swallow_the_windows(pair: tuple[ScriptedEndpoint, ScriptedEndpoint]) -> None:
    pair[0].script = [answer(500, b"broken")] * 100
    with Fleet.open([end.url for end in pair], token="secret") as fleet:
        assert ask(fleet) == 24
    assert len(pair[1].requests) == 24
    assert len(pair[0].requests) < 12


def test_connections_that_are_lost_are_made_again(pair: tuple[ScriptedEndpoint, ScriptedEndpoint]) -> None:
    for end in pair:
        end.script = [hang_up]  # one window may meet both, and is given up at the third
    with Fleet.open([end.url for end in pair], token="secret") as fleet:
        assert ask(fleet) == 24
        assert 0 < sum(fleet.trouble.values()) <= 2


def test_nobody_there_is_told_at_once(pair: tuple[ScriptedEndpoint, ScriptedEndpoint]) -> None:
    for end in pair:
        end.stop()
    with Fleet.open([end.url for end in pair], token="secret") as fleet, pytest.raises(ServerUnreachable, match="serve start"):
        fleet.predict(IMAGE, PLANE)


def test_models_are_not_mixed_unless_it_is_said(spaced: Path, pair: tuple[ScriptedEndpoint, ScriptedEndpoint]) -> None:
    ends = [discovery(spaced / "a", pair[0].url), discovery(spaced / "b", pair[1].url, model_version="2")]
    with pytest.raises(ConfigError, match="different models .*1 at .*2 at"):
        Fleet.open(ends)
    pair[0].script = [answer(200, catalogue(Detections.empty(5), "2"))] * 2
    with Fleet.open(ends[:1]) as fleet, pytest.raises(ServerError, match="answers with the model 2, the windows before are of 1"):
        fleet.predict(IMAGE, PLANE)
    with Fleet.open(ends[:1], mixed=True) as fleet:
        fleet.predict(IMAGE, PLANE)
        assert list(fleet.versions) == ["1", "2"]


def test_a_client_follows_its_server(spaced: Path, pair: tuple[ScriptedEndpoint, ScriptedEndpoint]) -> None:
    one, other = pair
    one.token, other.token = "secret", "renewed"
    with Fleet.open([discovery(spaced, one.url)], patience_s=20) as fleet:
        fleet.predict(IMAGE, PLANE)
        discovery(spaced, other.url, "renewed")
        fleet.predict(IMAGE, PLANE)
        assert (len(one.requests), len(other.requests)) == (1, 1)
        other.token = "again"  # renewed, and told a moment later
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(fleet.predict, IMAGE, PLANE)
            time.sleep(0.2)
            discovery(spaced, other.url, "again")
            assert len(waiting.result()) == 0
        (spaced / "server.json").unlink()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(fleet.predict, IMAGE, PLANE)
            time.sleep(0.2)
            assert not waiting.done()
            discovery(spaced, one.url)
            assert len(waiting.result()) == 0


def test_a_token_that_stays_wrong_is_told(
    spaced: Path, pair: tuple[ScriptedEndpoint, ScriptedEndpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepdisc_ops.serving.dispatch.DENIED_S", 0.2)
    pair[0].token = "other"
    with Fleet.open([discovery(spaced, pair[0].url)]) as fleet, pytest.raises(AccessDenied, match="does not accept the token"):
        fleet.predict(IMAGE, PLANE)


def test_one_that_drains_gets_nothing_new(spaced: Path, pair: tuple[ScriptedEndpoint, ScriptedEndpoint]) -> None:
    ends = [discovery(spaced / "a", pair[0].url), discovery(spaced / "b", pair[1].url)]
    with Fleet.open(ends) as fleet:
        ask(fleet, 4)
        before = len(pair[0].requests)
        discovery(spaced / "a", pair[0].url, draining=True)
        ask(fleet)
        assert len(pair[0].requests) == before


def test_servers_may_come_later(
    spaced: Path, pair: tuple[ScriptedEndpoint, ScriptedEndpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepdisc_ops.serving.dispatch.LONGEST_REST_S", 0.3)
    ends = [discovery(spaced / "a", pair[0].url), spaced / "b"]
    with Fleet.open(ends) as fleet:
        ask(fleet, 4)
        discovery(spaced / "b", pair[1].url)
        for _ in range(20):
            ask(fleet, 6)
            if pair[1].requests:
                break
    assert pair[1].requests
    with pytest.raises(ServerUnreachable, match="serve start"):
        Fleet.open([spaced / "c", spaced / "d"])


def test_awaited_windows_are_answered_together(pair: tuple[ScriptedEndpoint, ScriptedEndpoint]) -> None:
    async def every(fleet: Fleet) -> list[Detections]:
        return await asyncio.gather(*(fleet.predict_async(IMAGE, PLANE) for _ in range(8)))

    with Fleet.open([end.url for end in pair], token="secret") as fleet:
        assert [len(found) for found in asyncio.run(every(fleet))] == [0] * 8
    assert max(end.most_at_once for end in pair) == 2


def test_what_cannot_be_an_endpoint_is_told(spaced: Path) -> None:
    with pytest.raises(ConfigError, match="at least one"):
        Fleet([])
    with pytest.raises(ConfigError, match="needs a token"):
        endpoint_at("http://here:1")
    with pytest.raises(ConfigError, match=r"none\.pem.*give a PEM"):
        endpoint_at("https://here:1", "secret", spaced / "none.pem")
    (spaced / "server.json").write_text('{"url": "http://here:1", "token": 3}')
    with pytest.raises(ServerUnreachable, match="no discovery file"):
        read_address(spaced)
    assert str(Endpoint(spaced)).endswith("server.json")
