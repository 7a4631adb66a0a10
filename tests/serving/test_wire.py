"""What is sent arrives as it was; what breaks the protocol is refused with a reason, whatever it is."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from deepdisc_ops.errors import RequestRejected, ServerError
from deepdisc_ops.serving import wire
from deepdisc_ops.sky.detections import Detections, Flag
from deepdisc_ops.sky.dust import EbvPlane

PLANE = EbvPlane((0.01, 0.02, 0.03, 0.04))
HEADERS = {"x-deepdisc-bands": "g,r", "x-deepdisc-ebv": "0,0,0,0"}


def npy(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def detections(n: int, k: int, rng: np.random.Generator) -> Detections:
    mixture = rng.random((3, n, k)).astype(np.float32)
    numbers = rng.random((2, n)).astype(np.float32)
    index = rng.integers(0, 3, (3, n)).astype(np.int32)
    return Detections(rng.random((n, 4)).astype(np.float32), numbers[0], index[0], *mixture, numbers[1], index[1], index[2])


finite = st.floats(-1e6, 1e6, width=32)
images = arrays.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)), elements=finite)


@given(images, st.data())
def test_an_image_with_zeros_where_it_is_invalid_comes_home(image: np.ndarray, data: st.DataObject) -> None:
    invalid = data.draw(arrays.arrays(bool, image.shape))
    image = np.where(invalid, np.float32(0), image)
    mask = invalid.any(axis=0)
    bands = "ugrizy"[: len(image)]
    body, headers = wire.encode_image(image, bands, mask, PLANE)
    request = wire.decode_image(bytearray(body), headers)
    np.testing.assert_array_equal(request.data, image)
    np.testing.assert_array_equal(request.mask, mask)
    assert request.bands == tuple(bands)
    assert request.ebv == PLANE
    assert request.data.flags.writeable
    assert request.data.dtype == np.float32


def test_a_masked_pixel_without_a_zero_arrives_masked_in_all_bands() -> None:
    mask = np.array([[True, False]])
    request = wire.decode_image(*wire.encode_image(np.ones((2, 1, 2), np.float32), "gr", mask, PLANE))
    np.testing.assert_array_equal(request.mask, mask)
    np.testing.assert_array_equal(request.data[:, 0, 0], 0)


@given(images, st.randoms(use_true_random=False))
def test_planes_are_found_by_name_in_any_order(image: np.ndarray, random: object) -> None:
    bands = list("ugrizy"[: len(image)])
    order = random.sample(range(len(bands)), len(bands))
    body, headers = wire.encode_image(image[order], [bands[i] for i in order], None, PLANE)
    request = wire.decode_image(body, headers)
    np.testing.assert_array_equal(wire.order_planes(request.data, request.bands, bands), image)


def test_bands_the_model_does_not_know_are_left_out() -> None:
    image = np.arange(6, dtype=np.float32).reshape(3, 1, 2)
    np.testing.assert_array_equal(wire.order_planes(image, ("g", "r", "i"), ("i", "g")), image[[2, 0]])


def test_a_missing_band_is_named() -> None:
    with pytest.raises(wire.Refused, match="bands i, z missing: found g, r; send all of g, i, z") as refused:
        wire.order_planes(np.zeros((2, 1, 1), np.float32), ("g", "r"), ("g", "i", "z"))
    assert refused.value.status == 422
    assert isinstance(refused.value, RequestRejected)


def test_what_numpy_saves_is_accepted() -> None:
    image = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.testing.assert_array_equal(wire.decode_image(npy(image), HEADERS).data, image)


def test_pixels_that_are_no_numbers_are_invalid() -> None:
    image = np.array([[[1, np.nan, np.inf, -np.inf]], [[1, 1, 1, 1]]], np.float32)
    request = wire.decode_image(npy(image), HEADERS)
    np.testing.assert_array_equal(request.mask, [[False, True, True, True]])
    np.testing.assert_array_equal(request.data, [[[1, 0, 0, 0]], [[1, 1, 1, 1]]])


IMAGE = np.zeros((2, 3, 4), np.float32)
HUGE = (
    b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 9999999999, 9999999999), }".ljust(117)
    + b"\n"
)
REFUSED = {
    "empty": (b"", {}, "not_npy"),
    "no npy": (b"SIMPLE  = T" * 10, {}, "not_npy"),
    "cut header": (npy(IMAGE)[:40], {}, "not_npy"),
    "cut pixels": (npy(IMAGE)[:-1], {}, "bad_size"),
    "longer": (npy(IMAGE) + b"0", {}, "bad_size"),
    "double": (npy(IMAGE.astype(float)), {}, "bad_dtype"),
    "big-endian": (npy(IMAGE.astype(">f4")), {}, "bad_dtype"),
    "Fortran order": (npy(np.asfortranarray(IMAGE)), {}, "bad_dtype"),
    "pickled": (npy(np.array([{}, []], object), allow_pickle=True), {}, "bad_dtype"),
    "structured": (npy(np.zeros(2, [("a", "<f4")])), {}, "not_npy"),
    "huge": (HUGE, {}, "bad_shape"),
    "flat": (npy(IMAGE.ravel()), {}, "bad_shape"),
    "no rows": (npy(np.zeros((2, 0, 4), np.float32)), {}, "bad_shape"),
    "planes": (npy(IMAGE[:1]), {}, "bad_shape"),
    "no bands": (npy(IMAGE), {"x-deepdisc-bands": None}, "no_bands"),
    "band twice": (npy(IMAGE), {"x-deepdisc-bands": "g,g"}, "bad_bands"),
    "band without name": (npy(IMAGE), {"x-deepdisc-bands": "g,"}, "bad_bands"),
    "line feed": (npy(IMAGE), {"x-deepdisc-bands": "g,r\r\nx: y"}, "bad_bands"),
    "no ebv": (npy(IMAGE), {"x-deepdisc-ebv": None}, "no_ebv"),
    "three ebv": (npy(IMAGE), {"x-deepdisc-ebv": "0,0,0"}, "bad_ebv"),
    "ebv no number": (npy(IMAGE), {"x-deepdisc-ebv": "0,0,0,nan"}, "bad_ebv"),
}


@pytest.mark.parametrize(("body", "changes", "code"), REFUSED.values(), ids=REFUSED.keys())
def test_a_broken_request_is_refused_by_code(body: bytes, changes: dict[str, str | None], code: str) -> None:
    headers = {key: value for key, value in (HEADERS | changes).items() if value is not None}
    with pytest.raises(wire.Refused) as refused:
        wire.decode_image(body, headers)
    assert refused.value.fault.code == code
    assert refused.value.fault.remedy
    assert 400 <= refused.value.status < 500


@settings(max_examples=400)
@given(st.data())
def test_hostile_bytes_are_refused_or_read_but_never_fail_otherwise(data: st.DataObject) -> None:
    body = bytearray(npy(IMAGE))
    for _ in range(data.draw(st.integers(1, 8))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    body = body[: data.draw(st.integers(0, len(body)))] + data.draw(st.binary(max_size=8))
    headers = {"x-deepdisc-bands": data.draw(st.sampled_from(["g,r", "g", "", ","]) | st.text()), "x-deepdisc-ebv": "0,0,0,0"}
    try:
        request = wire.decode_image(bytes(body), headers)
    except wire.Refused:
        return
    assert np.isfinite(request.data).all()


@pytest.mark.parametrize("n", [0, 1, 7])
def test_detections_come_home(n: int, rng: np.random.Generator) -> None:
    sent = detections(n, 10, rng).flagged(np.arange(n) == 0, Flag.MASKED)
    body = wire.encode_detections(sent, model_version="abc", package_version="1.2")
    received = wire.decode_detections(body)
    for name in ("boxes", "scores", "classes", "weights", "means", "sigmas", "ebv", "n_members", "flags"):
        one, other = getattr(sent, name), getattr(received, name)
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
        assert one.shape == other.shape
    assert wire.reply_versions(body) == {"model_version": "abc", "package_version": "1.2"}


def test_masks_and_further_columns_come_home(rng: np.random.Generator) -> None:
    masks = rng.integers(0, 256, (4, 28, 28), np.uint8)
    sent = replace(detections(4, 2, rng), masks=masks, extra={"flux": rng.random((4, 3)), "name_of_ours": np.arange(4)})
    body = wire.encode_detections(
        sent, model_version="a", package_version="b", request="tile-1", seconds={"read": 0.5}, notes={"pdf_grid": "grid:0,1,2"}
    )
    received = wire.decode_detections(body)
    np.testing.assert_array_equal(received.masks, masks)
    assert received.extra.keys() == sent.extra.keys()
    for name, column in sent.extra.items():
        np.testing.assert_array_equal(received.extra[name], column)
    assert wire.reply_origin(body) == wire.Origin("tile-1", "a", "b", {"read": 0.5}, {"pdf_grid": "grid:0,1,2"})


def test_a_reply_that_is_none_of_ours_is_an_error(rng: np.random.Generator) -> None:
    body = wire.encode_detections(detections(3, 2, rng), model_version="", package_version="")
    for broken in (b"", b"<html>", body[: len(body) // 2]):
        with pytest.raises(ServerError, match="reply"):
            wire.decode_detections(broken)


def test_faults_come_home_and_other_json_is_none() -> None:
    fault = wire.Fault("missing_band", "band 'g' missing", "send it")
    assert wire.decode_fault(wire.encode_fault(fault).encode()) == fault
    for other in (b"", b"\xff", b"[1]", b'{"code": 400, "type": "x", "message": "y"}', json.dumps("x").encode(), b"[" * 100_000):
        assert wire.decode_fault(other) is None


def test_a_plane_for_every_band_is_asked_for_before_sending() -> None:
    with pytest.raises(RequestRejected, match="one plane"):
        wire.encode_image(IMAGE, ("g",), None, PLANE)
