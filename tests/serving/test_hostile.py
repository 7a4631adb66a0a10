"""Hundreds of hostile requests to the decoder: each is read or refused with a 4xx and a reason, in bounded memory and time."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from astropy.io import fits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepdisc_ops.errors import ImageError
from deepdisc_ops.serving import wire
from deepdisc_ops.serving.service import ServiceSettings
from deepdisc_ops.serving.wire.reader import Reader
from deepdisc_ops.serving.wire.request import Model, decode_request, make_reader

MODEL = Model(("g", "r"), 0.2)
SIDE = 64
PIXELS = np.ones((2, 12, 16), np.float32)
HEADERS = {wire.BANDS_HEADER: "g,r", wire.EBV_HEADER: "0,0,0,0"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> ServiceSettings:
    """A server that reads one folder with a file, next to one that it must not read."""
    root = tmp_path_factory.mktemp("shared")
    np.save(root / "cube.npy", PIXELS)
    np.save(root.parent / "secret.npy", PIXELS)
    (root / "escape").symlink_to(root.parent)
    return ServiceSettings(max_window=SIDE, request_bytes=1 << 22, roots=(root,))


@pytest.fixture(scope="module")
def reader(service: ServiceSettings) -> Iterator[Reader]:
    with make_reader(MODEL, service) as reader:
        yield reader


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, PIXELS)
    return buffer.getvalue()


def fits_file(kind: type = fits.ImageHDU) -> bytes:
    planes = [kind(plane, fits.Header({"MAGZERO": 31.4, "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN"}), name=band)
              for band, plane in zip("gr", PIXELS, strict=True)]  # fmt: skip
    buffer = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(), *planes]).writeto(buffer)
    return buffer.getvalue()


def hdf5_file() -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["data"], file["mask"], file["boxes"] = PIXELS, np.zeros((12, 16), np.uint8), np.array([[1, 1, 5, 5]], np.float32)
        file["data"].attrs["bands"] = "g,r"
    return buffer.getvalue()


SEEDS = {
    "npy": (wire.IMAGE_TYPE, npy()),
    "fits": (wire.FITS_TYPE, fits_file()),
    "tiled fits": (wire.FITS_TYPE, fits_file(fits.CompImageHDU)),
    "hdf5": (wire.HDF5_TYPE, hdf5_file()),
}
CARDS = [
    b"NAXIS1  =",
    b"NAXIS2  =",
    b"NAXIS   =",
    b"BITPIX  =",
    b"ZNAXIS1 =",
    b"ZTILE1  =",
    b"PCOUNT  =",
    b"TFIELDS =",
    b"NAXIS3  =",
]
NUMBERS = [b"0", b"-1", b"1", b"64", b"65", b"99999", b"2147483647", b"9223372036854775807", b"1e300", b"NaN", b"'x'"]


@st.composite
def damaged(draw: st.DrawFn, form: str) -> bytes:
    """A body of that form with bytes changed, cut, doubled or a number of its header replaced."""
    body = bytearray(SEEDS[form][1])
    for _ in range(draw(st.integers(1, 6))):
        structure = draw(st.booleans())  # most of a file is pixels, which may hold anything
        at = draw(st.integers(0, min(len(body), 4096) - 1 if structure else len(body) - 1))
        body[at] = draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))
    if "fits" in form and draw(st.booleans()):
        at = body.find(draw(st.sampled_from(CARDS)), draw(st.sampled_from([0, 2880, 5760])))
        if at >= 0:
            body[at + 9 : at + 30] = draw(st.sampled_from(NUMBERS)).rjust(21)
    if draw(st.integers(0, 3)) == 0:
        body = body[: draw(st.integers(0, len(body)))]
    return bytes(body) + (draw(st.binary(max_size=64)) if draw(st.integers(0, 3)) == 0 else b"")


def attempt(body: object, headers: dict[str, str], service: ServiceSettings, reader: Reader) -> wire.Request | None:
    """The request as it is read, None where it is refused in the way that it should be."""
    refusal: wire.Refused | ImageError | None = None
    try:
        request = decode_request(body, headers, MODEL, service, reader)
    except (wire.Refused, ImageError) as error:
        refusal = error
    if refusal is not None:
        assert str(refusal)
        assert isinstance(refusal, ImageError) or 400 <= refusal.status < 500  # ImageError: 422
        assert len(str(refusal)) < 16_000
        return None
    assert np.isfinite(request.data).all()
    assert max(request.data.shape[1:]) <= SIDE
    assert request.mask.shape == request.data.shape[1:]
    return request


quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.mark.parametrize(("form", "cases"), [("npy", 200), ("fits", 120), ("tiled fits", 80), ("hdf5", 160)])
def test_damaged_bodies(form: str, cases: int, service: ServiceSettings, reader: Reader) -> None:
    kind, whole = SEEDS[form]
    assert attempt(whole, {**HEADERS, "content-type": kind}, service, reader) is not None
    pid, ended = reader.pid, 0

    @settings(quick, max_examples=cases)
    @given(damaged(form))
    def attack(body: bytes) -> None:
        nonlocal pid, ended
        attempt(body, {**HEADERS, "content-type": kind}, service, reader)
        ended += reader.pid != pid
        pid = reader.pid

    attack()
    assert ended < cases / 10  # each costs its sender a second, and nobody else anything
    assert attempt(whole, {**HEADERS, "content-type": kind}, service, reader) is not None


@settings(quick, max_examples=120)
@given(
    body=st.binary(max_size=4096),
    kind=st.sampled_from([*wire.BODY_TYPES, "", "text/plain", "application/zip"]) | st.text(max_size=40),
)
def test_random_bytes_of_any_type(body: bytes, kind: str, service: ServiceSettings, reader: Reader) -> None:
    assert attempt(body, {**HEADERS, "content-type": kind}, service, reader) is None


@settings(quick, max_examples=200)
@given(headers=st.dictionaries(st.sampled_from([*wire.HEADERS, "content-type", "content-encoding"]), st.text(max_size=60)))
def test_headers_of_any_text(headers: dict[str, str], service: ServiceSettings, reader: Reader) -> None:
    attempt(npy(), {**HEADERS, **headers}, service, reader)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20), lambda children: st.lists(children, max_size=3)
)
paths = st.sampled_from(["cube.npy", "../secret.npy", "escape/secret.npy", "/etc/passwd", "/proc/self/mem", "."]) | st.text(
    max_size=40
)


@settings(quick, max_examples=150)
@given(
    tree=st.fixed_dictionaries(
        {"paths": st.lists(paths, max_size=4) | json_values},
        optional={
            "window": st.lists(st.integers(-(2**70), 2**70) | st.integers(0, 20), max_size=5) | json_values,
            "plane_bands": st.just(["g", "r"]) | json_values,
            "zero_point": st.just(31.4) | json_values,
            "blank": json_values,
            "bad_bits": json_values,
            "other": json_values,
        },
    )
    | json_values
)
def test_references_of_any_json(tree: object, service: ServiceSettings, reader: Reader) -> None:
    request = attempt(tree, {**HEADERS, "content-type": wire.JSON_TYPE}, service, reader)
    if request is not None:
        assert isinstance(tree, dict)
        assert tree["paths"] == ["cube.npy"]


def test_json_that_torchserve_could_not_read_is_refused(service: ServiceSettings, reader: Reader) -> None:
    for body in (b"{", b"\xff\xfe", b"[" * 100_000):
        assert attempt(bytearray(body), {**HEADERS, "content-type": wire.JSON_TYPE}, service, reader) is None


def test_nothing_but_the_file_of_a_root_is_named(service: ServiceSettings, reader: Reader) -> None:
    outside = service.roots[0].parent / "secret.npy"
    for name in (str(outside), "../secret.npy", "escape/secret.npy"):
        with pytest.raises(wire.Refused) as refused:
            decode_request({"paths": [name]}, {**HEADERS, "content-type": wire.JSON_TYPE}, MODEL, service, reader)
        missing = name.replace("secret", "missing")
        with pytest.raises(wire.Refused) as other:
            decode_request({"paths": [missing]}, {**HEADERS, "content-type": wire.JSON_TYPE}, MODEL, service, reader)
        assert str(refused.value).replace(name, missing) == str(other.value), "it tells whether a file exists"


def test_the_reader_stays_small(service: ServiceSettings, reader: Reader) -> None:
    """After all that, its memory is what it was: this runs behind the others."""
    attempt(fits_file(), {**HEADERS, "content-type": wire.FITS_TYPE}, service, reader)
    peak = next(line for line in Path(f"/proc/{reader.pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    assert int(peak.split()[1]) < 700_000
