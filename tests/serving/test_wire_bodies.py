"""FITS and HDF5 arrive with units, masks, boxes and positions; what is damaged or leads elsewhere is refused with a reason."""

from __future__ import annotations

import gzip
import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS, Sip

from deepdisc_ops.errors import ImageError
from deepdisc_ops.serving import wire
from deepdisc_ops.serving.service import ServiceSettings
from deepdisc_ops.serving.wire.protocol import FITS_TYPE, HDF5_TYPE, MAX_BOXES, MAX_NJY
from deepdisc_ops.serving.wire.reader import Reader
from deepdisc_ops.serving.wire.request import Model, decode_request, make_reader
from deepdisc_ops.sky.coordinates import icrs_positions
from deepdisc_ops.sky.dust import EbvPlane

MODEL = Model(("g", "r"), 0.2)
SERVICE = ServiceSettings(max_window=128, request_bytes=1 << 24)
EBV = EbvPlane((0.01, 0.02, 0.03, 0.04))
HEADERS = {"x-deepdisc-ebv": "0.01,0.02,0.03,0.04"}


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    with make_reader(MODEL, SERVICE) as reader:
        yield reader


def sky() -> WCS:
    """A rotated, distorted WCS."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.crpix = ["RA---TAN-SIP", "DEC--TAN-SIP"], [150.1, 2.2], [30, 20]
    wcs.wcs.cd = 5.6e-5 * np.array([[-0.8, 0.6], [0.6, 0.8]])
    bend = np.zeros((3, 3))
    bend[2, 0] = 1e-4
    wcs.sip = Sip(bend, bend, None, None, [30, 20])
    return wcs


def fits_body(*, zero_point: float = 31.4, compressed: bool = False, **planes: np.ndarray) -> bytes:
    kind = fits.CompImageHDU if compressed else fits.ImageHDU
    made = [fits.PrimaryHDU()]
    for name, pixels in planes.items():
        header = sky().to_header(relax=True)
        header["MAGZERO"] = zero_point
        made.append(kind(pixels, header, name=name))
    buffer = io.BytesIO()
    fits.HDUList(made).writeto(buffer)
    return buffer.getvalue()


def hdf5_body(**datasets: Any) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs["bands"] = "g,r"
        for name, value in datasets.items():
            if isinstance(value, dict):
                file.create_dataset(name, **value)
            else:
                file[name] = value
    return buffer.getvalue()


def decode(reader: Reader, body: bytes, kind: str, **headers: str) -> wire.Request:
    return decode_request(body, {**HEADERS, "content-type": kind, **headers}, MODEL, SERVICE, reader)


def test_fits_arrives_in_njy_by_band_with_its_mask_and_positions(reader: Reader, rng: np.random.Generator) -> None:
    g, r = rng.normal(size=(2, 40, 60)).astype(np.float32)
    g[3, 4] = np.nan
    r[5, 6] = 10 * MAX_NJY
    request = decode(reader, fits_body(R=r, G=g, zero_point=28.9), FITS_TYPE)
    known = ~request.mask
    assert np.argwhere(request.mask).tolist() == [[3, 4], [5, 6]]
    assert request.bands == ("g", "r")
    np.testing.assert_allclose(request.data[:, known], 10 * np.stack([g, r])[:, known], rtol=1e-5)
    assert request.data[1, 5, 6] == 0
    assert request.ebv == EBV
    assert request.wcs is not None
    x, y = [0.0, 59.0, 20.5], [0.0, 39.0, 7.0]
    np.testing.assert_allclose(icrs_positions(request.wcs, x, y), icrs_positions(sky(), x, y), rtol=0, atol=1e-10)


def test_tiles_of_compressed_fits_are_read(reader: Reader, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 99, (2, 40, 60)).astype(np.int32)
    request = decode(reader, fits_body(G=pixels[0], R=pixels[1], compressed=True), FITS_TYPE)
    np.testing.assert_allclose(request.data, pixels, rtol=1e-6)


def test_the_header_names_planes_that_fits_does_not(reader: Reader) -> None:
    buffer = io.BytesIO()
    hdu = fits.PrimaryHDU(np.stack([np.full((8, 9), value, np.float32) for value in (1, 2, 3)]))
    hdu.header["MAGZERO"] = 31.4
    hdu.writeto(buffer)
    request = decode(reader, buffer.getvalue(), FITS_TYPE, **{"x-deepdisc-bands": "r,i,g"})
    assert request.wcs is None
    np.testing.assert_allclose(request.data[:, 0, 0], [3, 1])


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "bad_fits"),
        (gzip.compress(bytes(1 << 24)), "bad_fits"),
        (b"PK\x03\x04", "bad_fits"),
        (fits_body(G=np.zeros((200, 8), np.float32), R=np.zeros((200, 8), np.float32)), "window_too_large"),
    ],
    ids=["empty", "gzip", "zip", "large"],
)
def test_fits_that_is_refused_by_code(reader: Reader, body: bytes, code: str) -> None:
    with pytest.raises(wire.Refused) as refused:
        decode(reader, body, FITS_TYPE)
    assert refused.value.fault.code == code


def test_fits_without_a_band_a_unit_or_an_end_says_so(reader: Reader) -> None:
    plane = np.zeros((8, 8), np.float32)
    with pytest.raises(ImageError, match="band r missing: found g"):
        decode(reader, fits_body(G=plane), FITS_TYPE)
    with pytest.raises(ImageError, match=r"^body\.fits is truncated"):
        decode(reader, fits_body(G=plane, R=plane)[:-2880], FITS_TYPE)
    with pytest.raises(ImageError, match="no zero point"):
        decode(reader, fits_body(G=plane, R=plane).replace(b"MAGZERO ", b"MAGZER0 "), FITS_TYPE)


def test_a_large_declared_tile_takes_no_memory(reader: Reader) -> None:
    body = fits_body(G=np.zeros((64, 64), np.int32), R=np.zeros((64, 64), np.int32), compressed=True)
    bomb = body.replace(b"ZTILE1  =                   64", b"ZTILE1  =           2000000000")
    bomb = bomb.replace(b"ZNAXIS1 =                   64", b"ZNAXIS1 =           2000000000")
    assert bomb != body
    with pytest.raises((wire.Refused, ImageError)) as refused:
        decode(reader, bomb, FITS_TYPE)
    if isinstance(refused.value, wire.Refused):
        assert refused.value.status in (400, 413)


@pytest.mark.parametrize("count", [None, 0, 3])
def test_hdf5_comes_home(reader: Reader, rng: np.random.Generator, count: int | None) -> None:
    data = rng.normal(size=(3, 21, 34)).astype(np.float32)
    mask = rng.random((21, 34)) > 0.9
    boxes = None if count is None else np.tile(np.array([1, 2, 10.5, 20], np.float32), (count, 1))
    cards = sky().to_header(relax=True).tostring(sep="\n")
    options = wire.Options(EBV, masks=True, members=("member-0",), pdf=wire.Grid(0.0, 2.0, 5), reply="json")
    body, headers = wire.encode_hdf5(data, "rgi", mask, EBV, boxes, wcs=cards, options=options)
    request = decode(reader, body, HDF5_TYPE, **headers)
    np.testing.assert_array_equal(request.data, data)
    np.testing.assert_array_equal(request.mask, mask)
    assert request.bands == ("r", "g", "i")
    assert (request.boxes is None) == (boxes is None)
    if boxes is not None:
        np.testing.assert_array_equal(request.boxes, boxes)
    assert (request.options.masks, request.options.members, request.options.reply) == (True, ("member-0",), "json")
    assert request.options.pdf == wire.Grid(0.0, 2.0, 5)
    assert request.wcs is not None
    np.testing.assert_allclose(icrs_positions(request.wcs, [3.0], [4.0]), icrs_positions(sky(), [3.0], [4.0]), atol=1e-10)


DATA = np.zeros((2, 16, 16), np.float32)
BOXES = np.array([[1, 1, 5, 5]], np.float32)
BROKEN = {
    "nothing": (hdf5_body(), "bad_hdf5"),
    "compressed": (hdf5_body(data={"data": DATA, "compression": "gzip"}), "bad_hdf5"),
    "soft link": (hdf5_body(real=DATA, data=h5py.SoftLink("/real")), "bad_hdf5"),
    "external link": (hdf5_body(data=h5py.ExternalLink("/etc/passwd", "/data")), "bad_hdf5"),
    "group": (hdf5_body(**{"data/data": DATA}), "bad_hdf5"),
    "declared only": (hdf5_body(data={"shape": (2, 128, 128), "dtype": "<f4"}), "bad_size"),
    "huge": (hdf5_body(data={"shape": (2, 10**9, 10**9), "dtype": "<f4", "chunks": (1, 16, 16)}), "bad_size"),
    "double": (hdf5_body(data=DATA.astype(float)), "bad_dtype"),
    "flat": (hdf5_body(data=DATA[0]), "bad_dtype"),
    "planes": (hdf5_body(data=DATA[:1]), "bad_shape"),
    "large": (hdf5_body(data=np.zeros((2, 8, 200), np.float32)), "window_too_large"),
    "mask of another shape": (hdf5_body(data=DATA, mask=np.zeros((4, 4), np.uint8)), "bad_shape"),
    "mask of texts": (hdf5_body(data=DATA, mask=np.full((16, 16), b"a")), "bad_dtype"),
    "boxes of three": (hdf5_body(data=DATA, boxes=BOXES[:, :3]), "bad_boxes"),
    "boxes of NaN": (hdf5_body(data=DATA, boxes=BOXES * np.float32(np.nan)), "bad_boxes"),
    "boxes of no size": (hdf5_body(data=DATA, boxes=BOXES * 0), "bad_boxes"),
    "boxes elsewhere": (hdf5_body(data=DATA, boxes=BOXES * 1e30), "bad_boxes"),
    "many boxes": (hdf5_body(data=DATA, boxes=np.tile(BOXES, (MAX_BOXES + 1, 1))), "too_many_boxes"),
    "boxes upon boxes": (hdf5_body(data=DATA, boxes=np.tile(BOXES, (10_000, 1))), "too_many_boxes"),
}


@pytest.mark.parametrize(("body", "code"), BROKEN.values(), ids=BROKEN.keys())
def test_hdf5_that_is_refused_by_code(reader: Reader, body: bytes, code: str) -> None:
    with pytest.raises(wire.Refused) as refused:
        decode(reader, body, HDF5_TYPE)
    assert refused.value.fault.code == code


def test_hdf5_of_other_files_is_refused(reader: Reader, spaced: Path) -> None:
    secret = spaced / "secret.bin"
    secret.write_bytes(DATA.tobytes())
    external = hdf5_body(data={"shape": DATA.shape, "dtype": "<f4", "external": [(str(secret), 0, DATA.nbytes)]})
    layout = h5py.VirtualLayout(DATA.shape, "<f4")
    layout[:] = h5py.VirtualSource(str(spaced / "other.h5"), "data", DATA.shape)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_virtual_dataset("data", layout)
        file.attrs["bands"] = "g,r"
    for body in (external, buffer.getvalue()):
        with pytest.raises(wire.Refused, match="in other files"):
            decode(reader, body, HDF5_TYPE)


def test_boxes_come_once(reader: Reader) -> None:
    with pytest.raises(wire.Refused, match="give them once"):
        decode(reader, hdf5_body(data=DATA, boxes=BOXES), HDF5_TYPE, **{"x-deepdisc-boxes": "1,1,2,2"})
    with pytest.raises(wire.Refused, match="beside given boxes"):
        decode(reader, hdf5_body(data=DATA, boxes=BOXES), HDF5_TYPE, **{"x-deepdisc-core": "1,1,2,2"})


def test_a_body_that_ends_its_reader_is_refused_and_the_next_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fits_body(G=DATA[0], R=DATA[1])
    with make_reader(MODEL, SERVICE) as reader:
        process, connection = reader._running()
        os.kill(process.pid, signal.SIGSEGV)
        process.wait(10)
        with monkeypatch.context() as patch:  # as if it had ended under this very request
            patch.setattr(reader, "_running", lambda: (process, connection))
            with pytest.raises(wire.Refused, match="ended the reader by SIGSEGV"):
                decode(reader, whole, FITS_TYPE)
        assert decode(reader, whole, FITS_TYPE).data.shape == DATA.shape


def test_a_body_that_takes_too_long_is_refused() -> None:
    with Reader(1 << 29, timeout_s=0.0001) as hasty:
        hasty._running()
        with pytest.raises(wire.Refused, match="took over"):
            decode(hasty, fits_body(G=DATA[0], R=DATA[1]), FITS_TYPE)
        assert hasty.pid is None


def test_memory_is_bounded_whatever_the_body_wants() -> None:
    with Reader(1 << 20) as narrow, pytest.raises(wire.Refused, match="more memory than a window"):
        decode_request(
            fits_body(G=np.zeros((700, 700), np.float32), R=np.zeros((700, 700), np.float32)),
            {**HEADERS, "content-type": FITS_TYPE},
            MODEL,
            ServiceSettings(max_window=1024),
            narrow,
        )
