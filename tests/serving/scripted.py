"""Loopback servers that answer by a script, for tests of whoever asks them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from deepdisc_ops.serving import wire
from deepdisc_ops.sky.detections import Detections

TOKEN_TEXT = (
    b'{"code": 400, "type": "InvalidKeyException", "message": "Token Authorization failed. Token either incorrect, expired"}'
)
WORKER_TEXT = b'{"code": 500, "type": "InternalServerException", "message": "Worker died."}'

Answer = Callable[[BaseHTTPRequestHandler], None]
Asked = tuple[str, dict[str, str], bytes]


def fault(code: str, what: str, remedy: str = "") -> bytes:
    return wire.encode_fault(wire.Fault(code, what, remedy)).encode()


def answer(status: int, body: bytes) -> Answer:
    def write(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return write


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


def catalogue(found: Detections, version: str = "1") -> bytes:
    return wire.encode_detections(found, model_version=version, package_version="")


EMPTY = catalogue(Detections.empty(5))


def objects(boxes: list[tuple[float, float, float, float]]) -> Detections:
    """Objects whose redshifts say where they lie."""
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    n = len(corners)
    one, zero = np.ones(n, np.float32), np.zeros(n, np.int32)
    column = one[:, None]
    return Detections(corners, one, zero, column, column, column, one, zero + 1, zero)


class ScriptedEndpoint:
    """Answers by a script and then by ``usual``, and keeps what it was sent; a token other than ``token`` is refused."""

    def __init__(self, usual: Callable[[Asked], Answer] | None = None, token: str | None = None) -> None:
        self.script: list[Answer] = []
        self.requests: list[Asked] = []
        self.token = token
        self.most_at_once = self.at_once = 0
        endpoint, counting = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {key.lower(): value for key, value in self.headers.items()}
                with counting:
                    endpoint.requests.append((self.path, headers, body))
                    endpoint.at_once += 1
                    self.counted = 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
                    known = endpoint.token is None or headers["authorization"] == f"Bearer {endpoint.token}"
                    scripted = endpoint.script.pop(0) if known and endpoint.script else None
                try:
                    asked = (self.path, headers, body)
                    if not known:
                        answer(400, TOKEN_TEXT)(self)
                    else:
                        (scripted or (usual(asked) if usual else answer(200, EMPTY)))(self)
                finally:
                    self.done()

            def done(self) -> None:
                """Before the reply goes out, as its receiver may ask for more at once."""
                with counting:
                    endpoint.at_once -= self.counted
                    self.counted = 0

            def send_response(self, code: int, message: str | None = None) -> None:
                self.done()
                super().send_response(code, message)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def stop(self) -> None:
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
        self.server.server_close()
