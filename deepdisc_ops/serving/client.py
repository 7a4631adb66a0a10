"""The Python side of the endpoint: windows in, detections out, and every failure as one of our errors.

A `Client` may be shared by threads. Lost connections, full queues and dying workers are waited out with growing pauses;
what TorchServe's front end answers by itself (400 for a wrong token, an empty 413) becomes the error it means.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import httpx
import numpy as np
import tenacity
from numpy.typing import NDArray

from deepdisc_ops.errors import AccessDenied, RequestRejected, ServerError, ServerUnreachable
from deepdisc_ops.serving.wire import IMAGE_TYPE, PREDICT_PATH, decode_detections, decode_fault, encode_image
from deepdisc_ops.sky.detections import Detections
from deepdisc_ops.sky.dust import EbvPlane
from deepdisc_ops.sky.images import SkyImage

log = logging.getLogger(__name__)


class _Passing(Exception):
    """A failure that may pass: the endpoint is busy or restarting a worker."""


class Client:
    """Predicts windows through the endpoint at ``url``; close it, or use it as a context.

    ``patience_s``: for how long a failure that may pass is retried; an endpoint that has never answered and refuses the
    connection is reported at once. ``timeout_s``: for one window.
    """

    def __init__(self, url: str, token: str, *, timeout_s: float = 900.0, patience_s: float = 60.0) -> None:
        if not re.fullmatch(r"[!-~]+", token):
            raise AccessDenied(f"the token for {url} is empty or no plain text; read it from the server's server.json")
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(timeout_s, connect=10.0),
            limits=httpx.Limits(max_connections=64),
            trust_env=False,  # a proxy of the site must not see loopback addresses
        )
        self._patience_s = patience_s
        self._met = False

    @classmethod
    def from_discovery(cls, path: Path, *, timeout_s: float = 900.0, patience_s: float = 60.0) -> Client:
        """The client of the server that wrote ``path``: its run directory or the ``server.json`` in it."""
        file = path if path.suffix == ".json" else path / "server.json"
        try:
            tree = json.loads(file.read_text())
            url, token = str(tree["url"]), str(tree["token"])
        except FileNotFoundError:
            raise ServerUnreachable(
                f"no endpoint runs there: {file} does not exist; start one with deepdisc-ops serve start"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise ServerUnreachable(f"{file} is no discovery file; start the endpoint anew with deepdisc-ops serve start") from None
        return cls(url, token, timeout_s=timeout_s, patience_s=patience_s)

    def predict(self, image: SkyImage, ebv: EbvPlane) -> Detections:
        """Objects of one window, boxes in its pixels; the form that `predict_mosaic` takes as predictor."""
        return self.predict_array(image.data, image.bands, image.mask, ebv)

    def predict_array(
        self, data: NDArray[np.float32], bands: Sequence[str], mask: NDArray[np.bool_] | None, ebv: EbvPlane
    ) -> Detections:
        """Objects of ``data`` (C, H, W) in nJy with planes named ``bands``; ``mask`` (H, W) is True where invalid."""
        body, headers = encode_image(data, bands, mask, ebv)
        size = f"{data.shape[2]} x {data.shape[1]} pixels in {len(bands)} bands, {len(body) / 1e6:.0f} MB"
        return decode_detections(self._send(body, {**headers, "content-type": IMAGE_TYPE}, size))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, body: bytes, headers: dict[str, str], size: str) -> bytes:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Passing),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=8.0),
            stop=tenacity.stop_after_delay(self._patience_s),
            before_sleep=lambda state: log.warning("%s: %s; trying again", self.url, state.outcome and state.outcome.exception()),
            reraise=True,
        )
        try:
            return retrying(self._send_once, body, headers, size)
        except _Passing as failure:
            raise ServerUnreachable(
                f"the endpoint {self.url} failed for {self._patience_s:.0f} s ({failure}); see deepdisc-ops serve status"
            ) from None

    def _send_once(self, body: bytes, headers: dict[str, str], size: str) -> bytes:
        try:
            reply = self._http.post(PREDICT_PATH, content=body, headers=headers)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            if self._met:
                raise _Passing(f"no connection: {error}") from None
            raise ServerUnreachable(
                f"nothing answers at {self.url} ({error}); start an endpoint with deepdisc-ops serve start"
            ) from None
        except (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError) as error:
            raise _Passing(f"connection lost: {type(error).__name__} {error}".rstrip()) from None
        self._met = True
        if reply.status_code == httpx.codes.OK:
            return reply.content
        raise failure(self.url, reply.status_code, reply.content, size)


def failure(url: str, status: int, body: bytes, size: str) -> Exception:
    """The error that a reply other than 200 stands for; ``size`` describes the window that was sent."""
    if fault := decode_fault(body):
        if 400 <= status < 500 or status == httpx.codes.INSUFFICIENT_STORAGE:
            return RequestRejected(f"the endpoint refused the window of {size}: {fault}")
        return ServerError(f"the endpoint {url} failed: {fault}")
    message = _message(body)
    if status == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
        return RequestRejected(
            f"the window of {size} is larger than {url} accepts; use a smaller --window or start it with a larger --max-window"
        )
    if status in (400, 401, 403) and "token" in message.lower():
        return AccessDenied(f"{url} does not accept the token ({message}); read it anew from the server's server.json")
    if status in (502, 503, 504) or (status in (500, 507) and "worker" in message.lower()):
        return _Passing(f"{status} {message}".rstrip())
    if 400 <= status < 500:
        return RequestRejected(f"{url} answered {status} ({message}); is a deepdisc-ops endpoint serving there?")
    return ServerError(f"{url} answered {status} ({message}); see deepdisc-ops serve status and its logs")


def _message(body: bytes) -> str:
    """TorchServe's own explanation, or the start of the body."""
    try:
        tree = json.loads(body)
    except ValueError:
        tree = None
    message = tree.get("message") if isinstance(tree, dict) else None
    return " ".join(str(message or body[:200].decode("utf-8", "replace")).split())
