"""Several endpoints as one predictor: no window is lost while one of them is there or comes back.

A window that is too large for them, or under which workers keep dying, is asked for in pieces. Glossary: C bands, H x W pixels,
N objects.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.errors import ConfigError, ServerError, ServerUnreachable
from deepdisc_ops.inference.window import given_boxes
from deepdisc_ops.serving.dispatch import PATIENCE_S, Dispatcher, Lost
from deepdisc_ops.serving.endpoint import TIMEOUT_S, Address, Endpoint, endpoint_at
from deepdisc_ops.serving.failures import TooLarge
from deepdisc_ops.serving.outgoing import Outgoing, boxes_request, image_request, reference_request
from deepdisc_ops.serving.pieces import cut, find_in, pieces, redshift_in
from deepdisc_ops.serving.wire import decode_detections, reply_versions
from deepdisc_ops.sky.detections import Array, Detections
from deepdisc_ops.sky.dust import EbvPlane
from deepdisc_ops.sky.images import SkyImage
from deepdisc_ops.sky.tiling import Tile, Window

log = logging.getLogger(__name__)

Pixels = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class _Task:
    """A window or a piece of one: its name, and the pixels that were too many before, shared by all pieces of the window."""

    name: str
    refused: list[float] = field(default_factory=lambda: [np.inf])
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def part(self) -> _Task:
        """The next piece of it."""
        return _Task(f"{self.name}.{next(self.numbers)}", self.refused)


class Fleet:
    """Predicts windows through ``endpoints``; close it, or use it as a context. Threads may share it.

    ``patience_s``: for how long a window that fails is tried again while no endpoint answers anything; endpoints that have never
    answered and refuse the connection are told at once. ``most`` windows are under way at each endpoint (default: two a worker);
    who asks for more waits. All endpoints must serve the same version of the model, also later, unless it is ``mixed``.
    A server whose discovery file is missing may come later, if another is there. Raises `ServerUnreachable` where none is,
    `ConfigError` where they serve different models.

    trouble: how often which failure was waited out; versions: of the models that answered, in their order.
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], *, patience_s: float = PATIENCE_S, most: int | None = None, mixed: bool = False
    ) -> None:
        if not endpoints:
            raise ConfigError("a fleet of no endpoints; name at least one")
        self.versions: dict[str, None] = {}
        self._endpoints, self._mixed = tuple(endpoints), mixed
        self._dispatcher = Dispatcher(endpoints, patience_s=patience_s, most=most)
        self.trouble = self._dispatcher.trouble
        self._lock = threading.Lock()
        self._refused_pixels: float = np.inf
        self._name, self._numbers = secrets.token_hex(4), itertools.count()
        self._threads = ThreadPoolExecutor(64, thread_name_prefix="predict")
        self._look()

    @staticmethod
    def open(
        sources: Sequence[str | Path],
        *,
        token: str | None = None,
        certificate: Path | None = None,
        timeout_s: float = TIMEOUT_S,
        patience_s: float = PATIENCE_S,
        most: int | None = None,
        mixed: bool = False,
    ) -> Fleet:
        """The fleet at ``sources``: run directories, discovery files, or URLs, which need a ``token``."""
        endpoints = [endpoint_at(source, token, certificate, timeout_s=timeout_s) for source in sources]
        return Fleet(endpoints, patience_s=patience_s, most=most, mixed=mixed)

    @property
    def addresses(self) -> list[Address]:
        """Of the endpoints that were found."""
        return [endpoint.known for endpoint in self._endpoints if endpoint.known is not None]

    @property
    def bands(self) -> tuple[str, ...] | None:
        """Order of the model's planes, None where only URLs are known."""
        return next((address.bands for address in self.addresses if address.bands), None)

    @property
    def workers(self) -> int:
        """Of all endpoints."""
        return self._dispatcher.workers

    @property
    def room(self) -> int:
        """Windows that may be under way at once, at all of them."""
        return self._dispatcher.room

    def predict(self, image: SkyImage, ebv: EbvPlane, *, masks: bool = False) -> Detections:
        """Objects of one window, boxes in its pixels; the form that `predict_mosaic` takes as predictor.

        ``masks``: with the objects' own.
        """
        return self.predict_array(image.data, image.bands, image.mask, ebv, masks=masks)

    def predict_array(
        self, data: Pixels, bands: Sequence[str], mask: Mask | None, ebv: EbvPlane, *, masks: bool = False
    ) -> Detections:
        """Objects of ``data`` (C, H, W) in nJy with planes named ``bands``; ``mask`` (H, W) is True where invalid."""
        return self._find(data, bands, mask, ebv, masks, _Task(self._next_name()))

    def redshift(self, image: SkyImage, boxes: Array, ebv: EbvPlane) -> Detections:
        """The mixtures of ``boxes`` (N, 4) px of one window, row for row."""
        return self._redshift(image.data, image.bands, image.mask, given_boxes(boxes), ebv, _Task(self._next_name()))

    def predict_files(
        self, paths: Sequence[Path], window: Window, ebv: EbvPlane, *, masks: bool = False, reading: Mapping[str, Any] | None = None
    ) -> Detections:
        """Objects of a window of files that the servers read, below their roots; ``reading``: how, as a `Reference` has it."""
        outgoing = reference_request(paths, window, ebv, masks=masks, reading=reading)
        return decode_detections(self._send(outgoing, self._next_name()))

    async def predict_async(self, image: SkyImage, ebv: EbvPlane, *, masks: bool = False) -> Detections:
        """`predict` of one window without blocking the event loop; cancelled, it gives up its turn if it still waits for one."""
        run = partial(self.predict, image, ebv, masks=masks)
        return await asyncio.get_running_loop().run_in_executor(self._threads, run)

    def close(self) -> None:
        """Close the connections."""
        self._threads.shutdown(cancel_futures=True)
        for endpoint in self._endpoints:
            endpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look(self) -> None:
        """Look for all endpoints once, and see that they belong together."""
        missing = []
        for endpoint in self._endpoints:
            try:
                endpoint.address()
            except ServerUnreachable as error:
                missing.append(error)
        if len(missing) == len(self._endpoints):
            raise missing[0]
        for reason in missing:
            log.warning("%s; the others go on without it", reason)
        told = {address.model_version: address.url for address in self.addresses if address.model_version is not None}
        if len(told) > 1 and not self._mixed:
            served = ", ".join(f"{version} at {url}" for version, url in told.items())
            raise ConfigError(f"the endpoints serve different models ({served}); name those of one, or upgrade the others")
        if len({address.bands for address in self.addresses if address.bands}) > 1:
            raise ConfigError("the endpoints serve models of different bands; name those of one model")
        self.versions |= dict.fromkeys(told)

    def _next_name(self) -> str:
        return f"{self._name}-{next(self._numbers)}"

    def _find(self, data: Pixels, bands: Sequence[str], mask: Mask | None, ebv: EbvPlane, masks: bool, task: _Task) -> Detections:
        """`predict_array`, in pieces where it has to be."""
        height, width = data.shape[-2:]

        def whole() -> Detections:
            return decode_detections(self._send(image_request(data, bands, mask, ebv, masks=masks), task.name))

        def divided(tiles: list[Tile]) -> Detections:
            def find(window: Window, plane: EbvPlane) -> Detections:
                part = None if mask is None else cut(mask, window)
                return self._find(cut(data, window), bands, part, plane, masks, task.part())

            return find_in(tiles, find, ebv, width, height)

        return self._fitting(task, width, height, whole, divided)

    def _redshift(self, data: Pixels, bands: Sequence[str], mask: Mask, boxes: Array, ebv: EbvPlane, task: _Task) -> Detections:
        """`redshift`, in pieces where it has to be."""
        height, width = data.shape[-2:]

        def whole() -> Detections:
            found = decode_detections(self._send(boxes_request(data, bands, mask, boxes, ebv), task.name))
            if len(found) != len(boxes):
                raise ServerError(f"the endpoint answered {len(found)} of {len(boxes)} given boxes; is it another version's?")
            return found

        def divided(tiles: list[Tile]) -> Detections:
            def redshift(window: Window, inside: Array, plane: EbvPlane) -> Detections:
                return self._redshift(cut(data, window), bands, cut(mask, window), inside, plane, task.part())

            return redshift_in(tiles, redshift, boxes, ebv, width, height)

        return self._fitting(task, width, height, whole, divided)

    def _fitting(
        self, task: _Task, width: int, height: int, whole: Callable[[], Detections], divided: Callable[[list[Tile]], Detections]
    ) -> Detections:
        """What ``whole`` gives, or ``divided`` where that is too large, now or as was learned before."""
        sides = [address.max_window for address in self.addresses if address.max_window is not None]
        if sides and max(width, height) > min(sides) and (tiles := pieces(width, height, min(sides))):
            return divided(tiles)
        tiles = pieces(width, height)
        if tiles and width * height >= min(self._refused_pixels, task.refused[0]):
            return divided(tiles)
        try:
            return whole()
        except (TooLarge, Lost) as error:
            if not tiles:
                raise
            task.refused[0] = min(task.refused[0], width * height)
            if isinstance(error, TooLarge) and error.lasting:
                self._refused_pixels = min(self._refused_pixels, width * height)
            log.warning("%s; asking for it in %d pieces", error, len(tiles))
            return divided(tiles)

    def _send(self, outgoing: Outgoing, name: str) -> bytes:
        body, endpoint = self._dispatcher.send(outgoing, name)
        version = reply_versions(body)["model_version"]
        with self._lock:
            self.versions.setdefault(version)
            first = next(iter(self.versions))
        if version != first and not self._mixed:
            raise ServerError(
                f"{endpoint} answers with the model {version}, the windows before are of {first}; "
                "roll it back, begin anew, or say that models may be mixed"
            )
        return body
