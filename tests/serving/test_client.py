"""Every way an endpoint can fail becomes the error it means; what passes is waited out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from scripted import TOKEN_TEXT, WORKER_TEXT, ScriptedEndpoint, answer, fault, hang_up

from deepdisc_ops.errors import AccessDenied, RequestRejected, ServerError, ServerUnreachable
from deepdisc_ops.serving import wire
from deepdisc_ops.serving.client import Client
from deepdisc_ops.serving.failures import Passing, TooLarge, failure
from deepdisc_ops.sky.dust import EbvPlane
from deepdisc_ops.sky.images import SkyImage

MISSING = fault("missing_band", "band g missing", "send all of g, r")

FAILURES = {
    "refused": (422, MISSING, RequestRejected, "band g missing; send all of g, r"),
    "other server": (404, b"<html>Not Found</html>", RequestRejected, "404"),
    "too large": (413, b"", TooLarge, "128 x 64 pixels.*smaller --window"),
    "reply": (413, fault("reply_too_large", "a reply of 9 MB"), TooLarge, "9 MB"),
    "memory": (507, fault("out_of_memory", "no memory"), TooLarge, "no memory"),
}


@pytest.mark.parametrize(("status", "body", "kind", "text"), FAILURES.values(), ids=FAILURES.keys())
def test_a_reply_becomes_the_error_it_means(status: int, body: bytes, kind: type[Exception], text: str) -> None:
    error = failure("http://here", status, body, "128 x 64 pixels in 2 bands, 0 MB")
    assert type(error) is kind
    with pytest.raises(kind, match=text):
        raise error
    assert "\n" not in str(error)


PASSING = {
    "full queue": (503, b"", "busy"),
    "front of a proxy": (502, b"", "busy"),
    "worker died": (500, WORKER_TEXT, "lost"),
    "worker died of memory": (507, WORKER_TEXT, "lost"),
    "wrong token": (400, TOKEN_TEXT, "denied"),
    "internal": (500, fault("internal", "boom"), "failed"),
    "unknown": (500, b"", "failed"),
}


@pytest.mark.parametrize(("status", "body", "kind"), PASSING.values(), ids=PASSING.keys())
def test_what_may_pass_is_told_apart(status: int, body: bytes, kind: str) -> None:
    error = failure("http://here", status, body, "")
    assert isinstance(error, Passing)
    assert error.kind == kind
    assert (error.error is None) == (kind in ("busy", "lost"))


@pytest.mark.parametrize(
    ("body", "lasting"),
    [
        (b"", True),
        (fault("window_too_large", ""), True),
        (fault("reply_too_large", ""), False),
        (fault("too_many_boxes", ""), False),
    ],
)
def test_only_a_limit_on_the_size_is_learned(body: bytes, lasting: bool) -> None:
    error = failure("", 413, body, "")
    assert isinstance(error, TooLarge)
    assert error.lasting == lasting


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    endpoint = ScriptedEndpoint()
    yield endpoint
    endpoint.stop()


PLANE = EbvPlane((0.1, 0.2, 0.3, 0.4))
IMAGE = SkyImage(np.ones((2, 3, 4), np.float32), ("g", "r"), None, 0.2, np.zeros((3, 4), bool))


def test_a_window_is_sent_with_token_bands_and_reddening(endpoint: ScriptedEndpoint) -> None:
    with Client(endpoint.url + "/", "secret") as client:
        assert len(client.predict(IMAGE, PLANE)) == 0
    path, headers, body = endpoint.requests[0]
    assert path == "/predictions/deepdisc"
    assert headers["authorization"] == "Bearer secret"
    request = wire.decode_image(body, headers)
    assert request.bands == ("g", "r")
    assert request.ebv == PLANE
    np.testing.assert_array_equal(request.data, IMAGE.data)


def test_passing_failures_are_retried(endpoint: ScriptedEndpoint) -> None:
    endpoint.script = [answer(503, b""), hang_up, answer(500, WORKER_TEXT)]
    with Client(endpoint.url, "secret", patience_s=30) as client:
        assert len(client.predict(IMAGE, PLANE)) == 0
    assert len(endpoint.requests) == 4


def test_a_refusal_is_not_retried(endpoint: ScriptedEndpoint) -> None:
    endpoint.script = [answer(422, MISSING)]
    with Client(endpoint.url, "secret") as client, pytest.raises(RequestRejected, match="band g missing"):
        client.predict(IMAGE, PLANE)
    assert len(endpoint.requests) == 1


def test_patience_ends(endpoint: ScriptedEndpoint) -> None:
    endpoint.script = [answer(503, b"")] * 50
    with Client(endpoint.url, "secret", patience_s=0.5) as client, pytest.raises(ServerUnreachable, match="503"):
        client.predict(IMAGE, PLANE)


def test_an_endpoint_that_never_answered_is_reported_at_once() -> None:
    gone = ScriptedEndpoint()
    gone.stop()
    with Client(gone.url, "secret") as client, pytest.raises(ServerUnreachable, match=rf"{gone.url}.*serve start"):
        client.predict(IMAGE, PLANE)


def test_an_endpoint_that_went_away_is_waited_for(endpoint: ScriptedEndpoint) -> None:
    with Client(endpoint.url, "secret", patience_s=0.5) as client:
        client.predict(IMAGE, PLANE)
        endpoint.stop()
        with pytest.raises(ServerUnreachable, match="failed for"):
            client.predict(IMAGE, PLANE)


def test_what_an_endpoint_fails_at_three_times_is_its_error(endpoint: ScriptedEndpoint) -> None:
    endpoint.script = [answer(500, fault("internal", "boom", "see the log"))] * 4
    with Client(endpoint.url, "secret") as client, pytest.raises(ServerError, match="boom; see the log"):
        client.predict(IMAGE, PLANE)
    assert len(endpoint.requests) == 3


def test_a_wrong_token_at_a_url_is_told_at_once(endpoint: ScriptedEndpoint) -> None:
    endpoint.token = "other"
    with Client(endpoint.url, "secret") as client, pytest.raises(AccessDenied, match="does not accept the token"):
        client.predict(IMAGE, PLANE)
    assert len(endpoint.requests) == 1


def test_the_request_keeps_its_name_however_often_it_is_sent(endpoint: ScriptedEndpoint) -> None:
    endpoint.script = [answer(503, b"")]
    with Client(endpoint.url, "secret") as client:
        client.predict(IMAGE, PLANE)
        client.predict(IMAGE, PLANE)
    first, again, second = (headers[wire.REQUEST_HEADER] for _, headers, _ in endpoint.requests)
    assert first == again != second
    assert wire.request_name({wire.REQUEST_HEADER: first}) == first


def test_threads_share_a_client(endpoint: ScriptedEndpoint) -> None:
    endpoint.script = [answer(503, b"")] * 3
    with Client(endpoint.url, "secret") as client, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: client.predict(IMAGE, PLANE), range(12)))
    assert [len(part) for part in found] == [0] * 12


@pytest.mark.parametrize("token", ["", "with space", "line\nfeed", "gr\u00fcn"])
def test_a_token_that_cannot_be_sent_is_denied(token: str) -> None:
    with pytest.raises(AccessDenied, match="token"):
        Client("http://127.0.0.1:1", token)


def test_a_client_finds_its_server_by_the_run_directory(spaced: Path, endpoint: ScriptedEndpoint) -> None:
    (spaced / "server.json").write_text(json.dumps({"url": endpoint.url, "token": "secret", "more": 1}))
    for path in (spaced, spaced / "server.json"):
        with Client.from_discovery(path) as client:
            assert len(client.predict(IMAGE, PLANE)) == 0


def test_a_run_directory_without_a_server_is_told(spaced: Path) -> None:
    with pytest.raises(ServerUnreachable, match="serve start"):
        Client.from_discovery(spaced)
    (spaced / "server.json").write_text("[]")
    with pytest.raises(ServerUnreachable, match="no discovery file"):
        Client.from_discovery(spaced)
