"""A window that does not fit is asked for in pieces, and the answer is that of the whole window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from scripted import WORKER_TEXT, Answer, Asked, ScriptedEndpoint, answer, catalogue, fault, objects

from deepdisc_ops.errors import RequestRejected, ServerError
from deepdisc_ops.serving import wire
from deepdisc_ops.serving.client import Client
from deepdisc_ops.serving.pieces import LEAST_SIDE, OVERLAP, pieces, plane_of
from deepdisc_ops.sky.detections import Detections, Flag, row_order
from deepdisc_ops.sky.dust import EbvPlane
from deepdisc_ops.sky.images import SkyImage
from deepdisc_ops.sky.tiling import Window

PLANE = EbvPlane((0.1, 0.3, 0.2, 0.6))
WIDTH, HEIGHT = 500, 420


def seen(data: np.ndarray, plane: EbvPlane) -> Detections:
    """Every blob of light, with E(B-V) at its centre, a mask that says which it is, and a flag where it touches the border."""
    labels, _ = ndimage.label(data[0] > 0)
    boxes = [(float(x.start), float(y.start), float(x.stop), float(y.stop)) for y, x in ndimage.find_objects(labels)]
    return told(objects(boxes), data, plane)


def told(found: Detections, data: np.ndarray, plane: EbvPlane) -> Detections:
    """What is known of objects that are found or given: their light as redshift, E(B-V) at their centres."""
    height, width = data.shape[1:]
    x, y = found.centres.T
    light = data[0, y.clip(0, height - 1).astype(int), x.clip(0, width - 1).astype(int)]
    edge = (found.boxes[:, :2] <= 0.5).any(1) | (found.boxes[:, 2:] >= np.array([width, height]) - 0.5).any(1)
    found = replace(found, means=light[:, None], ebv=plane.at(x, y, width, height))
    return found.flagged(edge, Flag.EDGE)


def endpoint_of(most: int, refusal: Answer) -> Callable[[Asked], Answer]:
    """Sees blobs in windows of at most ``most`` pixels, answers larger ones by ``refusal``."""

    def usual(asked: Asked) -> Answer:
        _, headers, body = asked
        if headers["content-type"] == wire.HDF5_TYPE:
            with h5py.File.in_memory(body) as file:
                data, given = np.asarray(file["data"][()]), np.asarray(file["boxes"][()])
            plane = wire.parse_options(headers).ebv
            found = told(objects(given.tolist()), data, plane)
        else:
            request = wire.decode_image(body, headers)
            data, found = request.data, seen(request.data, request.ebv)
        if headers.get(wire.MASKS_HEADER) == "1":
            found = replace(found, masks=np.broadcast_to(found.means[:, :, None], (len(found), 28, 28)).astype(np.uint8))
        return answer(200, catalogue(found)) if data[0].size <= most else refusal

    return usual


@pytest.fixture(scope="module")
def image() -> SkyImage:
    """Blobs, each with a light of its own, some of them at the border."""
    rng, data = np.random.default_rng(3), np.zeros((1, HEIGHT, WIDTH), np.float32)
    for number, (y, x) in enumerate(np.ndindex(HEIGHT // 20, WIDTH // 20)):
        side = rng.integers(4, 15, 2)
        data[0, 20 * y : 20 * y + side[0], 20 * x : 20 * x + side[1]] = 1 + number % 250
    return SkyImage(data, ("r",), None, 0.2, np.zeros((HEIGHT, WIDTH), bool))


REFUSALS = {
    "front end": answer(413, b""),
    "window": answer(413, fault("window_too_large", "too large", "smaller")),
    "reply": answer(413, fault("reply_too_large", "too many", "smaller")),
    "memory": answer(507, fault("out_of_memory", "no memory", "smaller")),
    "killed": answer(500, WORKER_TEXT),
}


@pytest.fixture(params=REFUSALS.values(), ids=REFUSALS.keys())
def endpoint(request: pytest.FixtureRequest) -> Iterator[ScriptedEndpoint]:
    deadly = request.param is REFUSALS["killed"]  # each death is waited out for a while
    end = ScriptedEndpoint(endpoint_of(300**2 if deadly else 160**2, request.param))
    yield end
    end.stop()


def assert_same(found: Detections, expected: Detections) -> None:
    for field in fields(Detections):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(other, np.ndarray):
            np.testing.assert_allclose(one, other, rtol=1e-5, err_msg=field.name)


def test_a_search_in_pieces_finds_what_the_whole_holds(endpoint: ScriptedEndpoint, image: SkyImage) -> None:
    with Client(endpoint.url, "secret") as client:
        found = client.predict(image, PLANE, masks=True)
    whole = seen(image.data, PLANE)
    whole = replace(whole, masks=np.broadcast_to(whole.means[:, :, None], (len(whole), 28, 28)))
    assert len(endpoint.requests) > 4
    assert_same(found.select(row_order(found.boxes)), whole.select(row_order(whole.boxes)))


def test_given_boxes_in_pieces_come_back_in_their_order(
    endpoint: ScriptedEndpoint, image: SkyImage, rng: np.random.Generator
) -> None:
    whole = seen(image.data, PLANE)
    boxes = whole.boxes[rng.permutation(len(whole))]
    with Client(endpoint.url, "secret") as client:
        found = client.redshift(image, boxes, PLANE)
        none = client.redshift(image, boxes[:0], PLANE)
    whole = whole.select([int(np.flatnonzero((whole.boxes == box).all(1))[0]) for box in boxes])
    cut = (found.flags & Flag.TRUNCATED) > 0
    assert cut.mean() < 0.2
    assert_same(replace(found, flags=found.flags & ~Flag.TRUNCATED), whole)
    assert len(none) == 0
    assert none.means.shape == (0, 1)


def test_what_a_server_never_takes_is_not_sent_again(image: SkyImage) -> None:
    end = ScriptedEndpoint(endpoint_of(300**2, answer(413, b"")))
    try:
        with Client(end.url, "secret") as client:
            client.predict(image, PLANE)
            first = len(end.requests)
            client.predict(image, PLANE)
        assert len(end.requests) == 2 * first - 1
    finally:
        end.stop()


def test_what_does_not_fit_in_the_smallest_piece_is_the_error(image: SkyImage) -> None:
    end = ScriptedEndpoint(lambda _: answer(413, fault("reply_too_large", "a reply of 9 MB", "ask for less")))
    dying = ScriptedEndpoint(lambda _: answer(500, WORKER_TEXT))
    try:
        with Client(end.url, "secret") as client, pytest.raises(RequestRejected, match="a reply of 9 MB; ask for less"):
            client.predict(image, PLANE)
        small = SkyImage(image.data[:, :128, :128], ("r",), None, 0.2, image.mask[:128, :128])
        with Client(dying.url, "secret") as client, pytest.raises(ServerError, match="lost 3 times .*Worker died"):
            client.predict(small, PLANE)
    finally:
        end.stop()
        dying.stop()


@given(st.integers(1, 3000), st.integers(1, 3000), st.none() | st.integers(64, 4000))
def test_pieces_are_smaller_than_the_window_and_cover_it(width: int, height: int, side: int | None) -> None:
    tiles = pieces(width, height, side)
    if not tiles:
        longest = max(width, height)
        assert longest <= LEAST_SIDE + OVERLAP or side is not None
        return
    assert sum(tile.core.width * tile.core.height for tile in tiles) == width * height
    longest = max(max(tile.window.width, tile.window.height) for tile in tiles)
    assert longest < max(width, height)
    assert side is None or longest <= side


@given(st.tuples(*[st.floats(0, 1)] * 4), st.floats(0, 200), st.floats(0, 200))
def test_reddening_of_a_piece_is_that_of_the_window(corners: tuple[float, float, float, float], x: float, y: float) -> None:
    whole, piece = EbvPlane(corners), Window(128, 64, 328, 264)
    part = plane_of(whole, piece, 700, 500)
    inside = part.at(np.array([x]), np.array([y]), piece.width, piece.height)
    np.testing.assert_allclose(inside, whole.at(np.array([x + piece.x0]), np.array([y + piece.y0]), 700, 500), atol=1e-5)
