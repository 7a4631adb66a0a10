"""Hostile requests to a running server: a valid reply or a 4xx with a reason, the same worker at the end, no file read outside."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import h5py
import httpx
import numpy as np
import psutil
import pytest
import torch
from astropy.io import fits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepdisc_ops.config import TrainingConfig, validate
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.model.weights import save_member
from deepdisc_ops.serving import archive, server, wire
from deepdisc_ops.serving.discovery import ServerInfo, discover
from deepdisc_ops.sky.dust import EbvPlane

pytestmark = pytest.mark.integration

BANDS = ("g", "r")
TREE = {
    "model": {
        "bands": list(BANDS),
        "pixel_scale": 0.2,
        "input": {"noise_njy": [1.0] * len(BANDS)},
        "backbone": {"name": "tiny", "fpn_channels": 16},
        "box_head": {"hidden": [16]},
        "redshift_head": {"hidden": [16], "components": 3},
    },
    "inference": {"tile": 96, "overlap": 32},
}
SECRET = b"what nobody may read"
PIXELS = np.random.default_rng(3).normal(size=(2, 64, 64)).astype(np.float32)
HEADERS = {wire.BANDS_HEADER: "g,r", wire.EBV_HEADER: "0,0,0,0"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the server reads, beside a secret that a link in it leads to."""
    root = tmp_path_factory.mktemp("shared by all") / "data"
    root.mkdir()
    with h5py.File(root / "cube.h5", "w") as file:
        file["images"] = PIXELS
        file.attrs["bands"], file.attrs["zero_point"] = list(BANDS), 31.4
    (root.parent / "secret.h5").write_bytes(SECRET)
    (root / "link.h5").symlink_to(root.parent / "secret.h5")
    return root


@pytest.fixture(scope="module")
def info(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerInfo]:
    folder = tmp_path_factory.mktemp("hostile")
    config = validate(TrainingConfig, TREE, "test")
    torch.manual_seed(0)
    save_member(folder / "member", DeepDisc(config.model, config.inference), config, {"val_nll": 1.0}, 10)
    mar = archive.build_archive([folder / "member"], folder / "one.mar")
    server.start(mar, folder / "run", threads=1, max_window=192, roots=[str(shared)], wait_s=600)
    try:
        yield discover(folder / "run")
    finally:
        server.stop(folder / "run")


@pytest.fixture(scope="module")
def http(info: ServerInfo) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {info.token}"}
    with httpx.Client(base_url=info.url, headers=headers, timeout=300, trust_env=False) as client:
        yield client


def whole() -> bytes:
    return wire.encode_image(PIXELS, BANDS, None, EbvPlane.constant(0.0))[0]


def fits_body() -> bytes:
    planes = [fits.ImageHDU(plane, fits.Header({"BUNIT": "nJy"}), name=band) for band, plane in zip(BANDS, PIXELS, strict=True)]
    buffer = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(), *planes]).writeto(buffer)
    return buffer.getvalue()


def hdf5_body(boxes: np.ndarray | None = None) -> bytes:
    return wire.encode_hdf5(PIXELS, BANDS, None, EbvPlane.constant(0.0), boxes)[0]


def ask(http: httpx.Client, body: bytes, headers: dict[str, str]) -> httpx.Response:
    """The reply, which must be a valid one or a refusal with a reason."""
    raw = [(name.encode(), value.encode("utf-8", "surrogatepass")) for name, value in {**HEADERS, **headers}.items()]
    reply = http.post(wire.PREDICT_PATH, content=body, headers=raw)
    if reply.status_code == 200:
        if reply.headers["content-type"] == wire.REPLY_TYPE:
            wire.decode_detections(reply.content)
        return reply
    assert 400 <= reply.status_code < 500, (reply.status_code, reply.content[:500])
    fault = wire.decode_fault(reply.content)
    assert fault is not None, reply.content[:500]
    assert fault.what
    assert fault.request == reply.headers[wire.REQUEST_HEADER]
    assert wire.REASONS[fault.code].status == reply.status_code
    assert SECRET not in reply.content
    return reply


SEEDS = {wire.IMAGE_TYPE: whole(), wire.FITS_TYPE: fits_body(), wire.HDF5_TYPE: hdf5_body()}


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, dict[str, str]]:
    kind = draw(st.sampled_from([*SEEDS, wire.JSON_TYPE]))
    if kind == wire.JSON_TYPE:
        names = st.sampled_from(["cube.h5", "link.h5", "../secret.h5", "/etc/passwd"]) | st.text(max_size=30)
        tree = {"paths": draw(st.lists(names, max_size=3)), "window": draw(st.none() | st.lists(st.integers(-5, 70), max_size=5))}
        return json.dumps(tree).encode() + draw(st.binary(max_size=2)), {"content-type": kind}
    body = bytearray(SEEDS[kind])
    for _ in range(draw(st.integers(0, 6))):
        body[draw(st.integers(0, min(len(body), 6000) - 1))] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        body = body[: draw(st.integers(0, len(body)))]
    visible = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)
    headers = draw(st.dictionaries(st.sampled_from(list(wire.HEADERS)), visible, max_size=1))
    return bytes(body), {**headers, "content-type": kind}


def test_generated_requests_never_cost_the_worker(http: httpx.Client, info: ServerInfo) -> None:
    ask(http, fits_body(), {"content-type": wire.FITS_TYPE})
    (pid,) = info.worker_pids
    worker = psutil.Process(pid)
    before = worker.memory_info().rss

    @settings(max_examples=120, suppress_health_check=list(HealthCheck))
    @given(requests())
    def attack(request: tuple[bytes, dict[str, str]]) -> None:
        ask(http, *request)

    attack()
    assert discover(Path(info.run_dir)).worker_pids == info.worker_pids
    assert worker.is_running()
    assert worker.memory_info().rss < before + (256 << 20)
    assert ask(http, whole(), {"content-type": wire.IMAGE_TYPE}).status_code == 200


BOX = np.array([[4, 4, 20, 20]], np.float32)
NAMED = {
    "no boxes": (hdf5_body(BOX[:0]), {"content-type": wire.HDF5_TYPE}, 200),
    "overflow": (wire.encode_image(np.sign(PIXELS) * np.float32(1e38), BANDS, None, EbvPlane.constant(0.0))[0], {}, 200),
    "nothing valid": (wire.encode_image(PIXELS * np.float32(np.nan), BANDS, None, EbvPlane.constant(0.0))[0], {}, 200),
    "pickle": (b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(128), {}, 400),
    "form": (b"body=x", {"content-type": "application/x-www-form-urlencoded"}, 415),
    "text": (b"body", {"content-type": "text/plain; charset=utf-8"}, 415),
    "bad text": (b"\xff\xfe", {"content-type": "text/plain"}, 415),
    "bad json": (b"{" * 1000, {"content-type": wire.JSON_TYPE}, 400),
    "gzip": (whole(), {"content-encoding": "gzip"}, 415),
    "accents": (whole(), {wire.MEMBERS_HEADER: "m\u00e9mber"}, 422),
    "long name": (whole(), {wire.REQUEST_HEADER: "a" * 65}, 400),
    "secret": (b'{"paths": ["link.h5"]}', {"content-type": wire.JSON_TYPE}, 404),
    "file": (b'{"paths": ["cube.h5"]}', {"content-type": wire.JSON_TYPE}, 200),
}


@pytest.mark.parametrize(("body", "headers", "status"), NAMED.values(), ids=NAMED.keys())
def test_named_requests_get_the_answer_they_deserve(
    http: httpx.Client, info: ServerInfo, body: bytes, headers: dict[str, str], status: int
) -> None:
    assert ask(http, body, {"content-type": wire.IMAGE_TYPE, **headers}).status_code == status
    assert psutil.pid_exists(info.worker_pids[0])


def test_a_million_boxes_are_refused(http: httpx.Client, info: ServerInfo) -> None:
    """16 MB of them are over the limit of the front end, whose answer is empty."""
    body = hdf5_body(np.tile(BOX, (1_000_000, 1)))
    assert http.post(wire.PREDICT_PATH, content=body, headers={**HEADERS, "content-type": wire.HDF5_TYPE}).status_code == 413
    assert psutil.pid_exists(info.worker_pids[0])


def test_headers_of_raw_bytes_do_not_reach_replies_or_logs(info: ServerInfo) -> None:
    """Sent by hand, as no library would: names and values with bytes beyond ASCII, bare line feeds, a forged metric."""
    address = urlsplit(info.url)
    for name, value in (
        (b"x-deepdisc-bands", b"g,\xff\xfe"),
        (b"x-deepdisc-request", b"a\n[METRICS]Forged.Count:1|#Level:Host"),
        (b"x-deepdisc-request", b"a\x0b\x0c\x85b"),
        (b"x-deepdisc-core", b"0,0,\x00,1"),
    ):
        body = whole()
        lines = [
            b"POST /predictions/deepdisc HTTP/1.1",
            f"Host: {address.netloc}".encode(),
            f"Authorization: Bearer {info.token}".encode(),
            f"Content-Length: {len(body)}".encode(),
            b"x-deepdisc-ebv: 0,0,0,0",
            b"Connection: close",
            name + b": " + value,
        ]
        reply = b""
        with socket.create_connection((address.hostname, address.port), timeout=300) as link:
            link.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + body)
            with contextlib.suppress(ConnectionResetError):  # the front end hangs up on some of these
                while part := link.recv(65536):
                    reply += part
        assert not reply or reply.startswith(b"HTTP/1.1 4"), reply[:200]
    assert psutil.pid_exists(info.worker_pids[0])
    logs = "".join(path.read_text(errors="replace") for path in Path(info.run_dir).glob("**/*.log"))
    assert "Forged" not in logs


def test_nothing_is_left_behind(http: httpx.Client, info: ServerInfo) -> None:
    """Neither scratch files nor the mark of a worker at work."""
    ask(http, fits_body(), {"content-type": wire.FITS_TYPE, wire.REPLY_HEADER: "parquet"})
    names = [name for _, folders, files in os.walk(info.run_dir) for name in (*folders, *files)]
    assert not [name for name in names if name.startswith(("read-", "reply-"))]
