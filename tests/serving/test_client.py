"""Every way an endpoint can fail becomes the error it means; what passes is waited out."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from deepdisc_ops.errors import AccessDenied, RequestRejected, ServerError, ServerUnreachable
from deepdisc_ops.serving import client as room
from deepdisc_ops.serving import server, wire
from deepdisc_ops.sky.detections import Detections
from deepdisc_ops.sky.dust import EbvPlane
from deepdisc_ops.sky.images import SkyImage

TOKEN_TEXT = (
    b'{"code": 400, "type": "InvalidKeyException", "message": "Token Authorization failed. Token either incorrect, expired"}'
)
WORKER_TEXT = b'{"code": 500, "type": "InternalServerException", "message": "Worker died."}'
MISSING = wire.encode_fault(wire.Fault("missing_band", "band g missing", "send all of g, r")).encode()
EMPTY = wire.encode_detections(Detections.empty(5), model_version="", package_version="")

FAILURES = {
    "wrong token": (400, TOKEN_TEXT, AccessDenied, "does not accept the token"),
    "too large": (413, b"", RequestRejected, "128 x 64 pixels.*smaller --window"),
    "refused": (422, MISSING, RequestRejected, "band g missing; send all of g, r"),
    "memory": (507, wire.encode_fault(wire.Fault("out_of_memory", "no memory", "smaller")).encode(), RequestRejected, "no memory"),
    "internal": (500, wire.encode_fault(wire.Fault("internal", "boom", "see the log")).encode(), ServerError, "boom"),
    "other server": (404, b"<html>Not Found</html>", RequestRejected, "404"),
    "unknown": (500, b"", ServerError, "500"),
}


@pytest.mark.parametrize(("status", "body", "kind", "text"), FAILURES.values(), ids=FAILURES.keys())
def test_a_reply_becomes_the_error_it_means(status: int, body: bytes, kind: type[Exception], text: str) -> None:
    error = room.failure("http://here", status, body, "128 x 64 pixels in 2 bands, 0 MB")
    assert type(error) is kind
    with pytest.raises(kind, match=text):
        raise error
    assert "\n" not in str(error)


@pytest.mark.parametrize(("status", "body"), [(503, b""), (500, WORKER_TEXT), (507, WORKER_TEXT), (502, b""), (504, b"")])
def test_a_busy_endpoint_or_a_dying_worker_may_pass(status: int, body: bytes) -> None:
    assert isinstance(room.failure("http://here", status, body, ""), room._Passing)


Script = list[Callable[[BaseHTTPRequestHandler], None]]


def answer(status: int, body: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    def write(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return write


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


class Endpoint:
    """A loopback server that answers by a script and then with an empty catalogue, and keeps what it was sent."""

    def __init__(self) -> None:
        self.script: Script = []
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                endpoint.requests.append((self.path, {key.lower(): value for key, value in self.headers.items()}, body))
                (endpoint.script.pop(0) if endpoint.script else answer(200, EMPTY))(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.stop()


PLANE = EbvPlane((0.1, 0.2, 0.3, 0.4))
IMAGE = SkyImage(np.ones((2, 3, 4), np.float32), ("g", "r"), None, 0.2, np.zeros((3, 4), bool))


def test_a_window_is_sent_with_token_bands_and_reddening(endpoint: Endpoint) -> None:
    with room.Client(endpoint.url + "/", "secret") as client:
        assert len(client.predict(IMAGE, PLANE)) == 0
    path, headers, body = endpoint.requests[0]
    assert path == "/predictions/deepdisc"
    assert headers["authorization"] == "Bearer secret"
    request = wire.decode_image(body, headers)
    assert request.bands == ("g", "r")
    assert request.ebv == PLANE
    np.testing.assert_array_equal(request.data, IMAGE.data)


def test_passing_failures_are_retried(endpoint: Endpoint) -> None:
    endpoint.script = [answer(503, b""), hang_up, answer(500, WORKER_TEXT)]
    with room.Client(endpoint.url, "secret", patience_s=30) as client:
        assert len(client.predict(IMAGE, PLANE)) == 0
    assert len(endpoint.requests) == 4


def test_a_refusal_is_not_retried(endpoint: Endpoint) -> None:
    endpoint.script = [answer(422, MISSING)]
    with room.Client(endpoint.url, "secret") as client, pytest.raises(RequestRejected, match="band g missing"):
        client.predict(IMAGE, PLANE)
    assert len(endpoint.requests) == 1


def test_patience_ends(endpoint: Endpoint) -> None:
    endpoint.script = [answer(503, b"")] * 50
    with room.Client(endpoint.url, "secret", patience_s=0.5) as client, pytest.raises(ServerUnreachable, match="503"):
        client.predict(IMAGE, PLANE)


def test_an_endpoint_that_never_answered_is_reported_at_once() -> None:
    url = f"http://127.0.0.1:{server.free_ports(1)[0]}"
    with room.Client(url, "secret") as client, pytest.raises(ServerUnreachable, match=rf"{url}.*serve start"):
        client.predict(IMAGE, PLANE)


def test_an_endpoint_that_went_away_is_waited_for(endpoint: Endpoint) -> None:
    with room.Client(endpoint.url, "secret", patience_s=0.5) as client:
        client.predict(IMAGE, PLANE)
        endpoint.stop()
        with pytest.raises(ServerUnreachable, match="failed for"):
            client.predict(IMAGE, PLANE)


def test_threads_share_a_client(endpoint: Endpoint) -> None:
    endpoint.script = [answer(503, b"")] * 3
    with room.Client(endpoint.url, "secret") as client, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: client.predict(IMAGE, PLANE), range(12)))
    assert [len(part) for part in found] == [0] * 12


@pytest.mark.parametrize("token", ["", "with space", "line\nfeed", "gr\u00fcn"])
def test_a_token_that_cannot_be_sent_is_denied(token: str) -> None:
    with pytest.raises(AccessDenied, match="token"):
        room.Client("http://127.0.0.1:1", token)


def test_a_client_finds_its_server_by_the_run_directory(spaced: Path, endpoint: Endpoint) -> None:
    (spaced / "server.json").write_text(json.dumps({"url": endpoint.url, "token": "secret", "more": 1}))
    for path in (spaced, spaced / "server.json"):
        with room.Client.from_discovery(path) as client:
            assert len(client.predict(IMAGE, PLANE)) == 0


def test_a_run_directory_without_a_server_is_told(spaced: Path) -> None:
    with pytest.raises(ServerUnreachable, match="serve start"):
        room.Client.from_discovery(spaced)
    (spaced / "server.json").write_text("[]")
    with pytest.raises(ServerUnreachable, match="no discovery file"):
        room.Client.from_discovery(spaced)
