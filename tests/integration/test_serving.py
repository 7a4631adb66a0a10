"""A real TorchServe on free loopback ports: what it serves is what the engine computes, and it ends when told to."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch

from deepdisc_ops.config import TrainingConfig, validate
from deepdisc_ops.errors import AccessDenied, ArchiveError, RequestRejected, ServerError, ServerUnreachable
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.model.weights import save_member
from deepdisc_ops.serving import archive, server
from deepdisc_ops.serving.client import Client
from deepdisc_ops.sky.detections import Detections
from deepdisc_ops.sky.dust import EbvPlane
from deepdisc_ops.sky.images import SkyImage

pytestmark = pytest.mark.integration

BANDS = ("g", "r", "i")
SETTINGS = {
    "model": {
        "bands": list(BANDS),
        "pixel_scale": 0.2,
        "input": {"noise_njy": [1.0] * len(BANDS)},
        "backbone": {"name": "tiny", "fpn_channels": 16},
        "box_head": {"hidden": [16]},
        "redshift_head": {"hidden": [16], "components": 3},
    },
    "inference": {"score_threshold": 0.0, "tile": 96, "overlap": 32},
}
MAX_WINDOW = 192
START = """
import sys
from pathlib import Path
from deepdisc_ops.serving import server
server.start(Path(sys.argv[1]), Path(sys.argv[2]), threads=1, max_window=int(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def mar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ensemble")
    config = validate(TrainingConfig, SETTINGS, "test")
    for seed in range(2):
        torch.manual_seed(seed)
        save_member(folder / str(seed), DeepDisc(config.model, config.inference), config, {"val_nll": 1.0 + seed}, 10)
    return archive.build_archive([folder / "0", folder / "1"], folder / "two.mar")


@pytest.fixture(scope="module")
def ensemble(mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ensemble]:
    """The same archive in process, on one thread as the server's worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Ensemble.load(archive.unpack_archive(mar, tmp_path_factory.mktemp("unpacked")))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run_dir(mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A server that a command started which has ended since."""
    folder = tmp_path_factory.mktemp("run of \u00fc")
    command = [sys.executable, "-c", START, str(mar), str(folder), str(MAX_WINDOW)]
    subprocess.run(command, check=True, timeout=300)
    yield folder
    server.stop(folder)


@pytest.fixture
def client(run_dir: Path) -> Iterator[Client]:
    with Client.from_discovery(run_dir, patience_s=120) as client:
        yield client


@pytest.fixture(scope="module")
def image() -> SkyImage:
    """Noise with some bright blobs and invalid pixels, larger than a tile and of odd size."""
    rng = np.random.default_rng(7)
    data = rng.normal(size=(len(BANDS), 131, 165)).astype(np.float32)
    for y, x in rng.integers(8, 120, (30, 2)):
        data[:, y - 3 : y + 4, x - 3 : x + 4] += 20
    mask = np.zeros(data.shape[1:], bool)
    mask[40:60, 50:70] = True
    data[0, mask] = 0
    return SkyImage(data, BANDS, None, 0.2, mask)


EBV = EbvPlane((0.01, 0.05, 0.1, 0.2))


def assert_same(served: Detections, expected: Detections) -> None:
    tolerance = {"boxes": 1e-3, "weights": 1e-4, "means": 1e-4, "sigmas": 1e-4, "scores": 1e-4, "ebv": 1e-6}
    for field in fields(Detections)[:-2]:  # masks and further columns do not travel yet
        one, other = getattr(served, field.name), getattr(expected, field.name)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance.get(field.name, 0), err_msg=field.name)


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Every process that carries the run directory's mark, in whatever group."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(server.MARK) == str(run_dir) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_served_detections_equal_those_in_process(client: Client, ensemble: Ensemble, image: SkyImage) -> None:
    expected = ensemble.predict(image.data, EBV, image.mask)
    assert len(expected) > 5
    assert expected.flags.any()
    assert_same(client.predict(image, EBV), expected)


def test_an_empty_sky_gives_the_same_columns(client: Client, ensemble: Ensemble) -> None:
    empty = np.zeros((len(BANDS), 64, 64), np.float32)
    assert_same(
        client.predict_array(empty, BANDS, np.ones((64, 64), bool), EBV), ensemble.predict(empty, EBV, np.ones((64, 64), bool))
    )


def test_bands_in_another_order_give_the_same_catalogue(client: Client, image: SkyImage) -> None:
    turned = client.predict_array(image.data[::-1], BANDS[::-1], image.mask, EBV)
    assert_same(turned, client.predict(image, EBV))


def test_threads_may_share_a_client(client: Client, image: SkyImage) -> None:
    first = client.predict(image, EBV)
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: client.predict(image, EBV), range(6)):
            assert_same(found, first)


def test_a_missing_band_is_named(client: Client, image: SkyImage) -> None:
    with pytest.raises(RequestRejected, match="band r missing: found g, i; send all of g, r, i"):
        client.predict_array(image.data[[0, 2]], ("g", "i"), image.mask, EBV)


def test_a_window_over_the_limit_is_told(client: Client) -> None:
    side = MAX_WINDOW + 96
    with pytest.raises(RequestRejected, match=f"{side} x {side} pixels in 3 bands.*smaller --window"):
        client.predict_array(np.zeros((3, side, side), np.float32), BANDS, None, EBV)


def test_a_wrong_token_is_denied(run_dir: Path, image: SkyImage) -> None:
    info = server.discover(run_dir)
    for token in ("wrong", info.management_token):
        with Client(info.url, token) as stranger, pytest.raises(AccessDenied, match="token"):
            stranger.predict(image, EBV)


def test_models_cannot_be_listed_without_a_token_nor_registered_with_one(run_dir: Path, mar: Path) -> None:
    info = server.discover(run_dir)
    with httpx.Client(base_url=info.management_url, trust_env=False) as http:
        assert http.get("/models").is_client_error
        headers = {"Authorization": f"Bearer {info.management_token}"}
        assert http.get("/models", headers=headers).is_success
        assert http.post("/models", params={"url": mar.as_uri()}, headers=headers).is_client_error
        assert http.delete(f"/models/{info.model}", headers=headers).is_client_error
        assert [model["modelName"] for model in http.get("/models", headers=headers).json()["models"]] == [info.model]


def test_junk_is_answered_with_a_reason(run_dir: Path) -> None:
    info = server.discover(run_dir)
    headers = {"Authorization": f"Bearer {info.token}", "X-DeepDISC-Bands": "g,r,i", "X-DeepDISC-EBV": "0,0,0,0"}
    reply = httpx.post(f"{info.url}/predictions/{info.model}", content=b"junk", headers=headers, trust_env=False)
    assert reply.status_code == 400
    assert reply.json()["code"] == "not_npy"
    assert "numpy.save" in reply.json()["remedy"]


def test_it_listens_on_loopback_only_and_its_secrets_are_private(run_dir: Path) -> None:
    info = server.discover(run_dir)
    listening = [c.laddr.ip for c in psutil.Process(info.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert len(listening) == 5
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    for name in ("server.json", "key_file.json", "config.properties"):
        assert stat.S_IMODE((run_dir / name).stat().st_mode) == 0o600


def test_tokens_outlast_a_night(run_dir: Path) -> None:
    keys = json.loads((run_dir / "key_file.json").read_text())
    days = (np.datetime64(keys["inference"]["expiration time"].rstrip("Z")) - np.datetime64("now")) / np.timedelta64(1, "D")
    assert days == pytest.approx(server.TOKEN_DAYS, abs=0.1)


def test_a_second_server_does_not_start_in_its_place(run_dir: Path, mar: Path) -> None:
    with pytest.raises(ServerError, match="already serves"):
        server.start(mar, run_dir)
    assert server.status(run_dir).state == "ready"


def test_a_killed_worker_costs_no_window(run_dir: Path, client: Client, image: SkyImage) -> None:
    expected = client.predict(image, EBV)
    (worker,) = server.discover(run_dir).worker_pids
    os.kill(worker, signal.SIGKILL)
    assert_same(client.predict(image, EBV), expected)
    assert server.status(run_dir).state == "ready"


def test_nothing_is_left_when_it_is_stopped(run_dir: Path, image: SkyImage) -> None:
    info = server.discover(run_dir)
    assert len(processes_of(run_dir)) == 2
    assert server.stop(run_dir)
    assert processes_of(run_dir) == []
    assert server.status(run_dir).state == "stopped"
    assert sorted(path.name for path in run_dir.iterdir()) == [server.LOCK, "config.properties", "log4j2.xml", "logs"]
    with Client(info.url, info.token) as late, pytest.raises(ServerUnreachable, match="serve start"):
        late.predict(image, EBV)


def test_a_damaged_member_is_refused_by_the_command_and_by_the_worker(
    mar: Path, spaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = spaced / "damaged.mar"
    with zipfile.ZipFile(mar) as source, zipfile.ZipFile(damaged, "w") as target:
        for member in source.infolist():
            contents = bytearray(source.read(member))
            contents[-1] ^= member.filename == "member-1.safetensors"
            target.writestr(member.filename, bytes(contents))
    with pytest.raises(ArchiveError, match=r"member-1\.safetensors"):
        server.start(damaged, spaced / "run")
    monkeypatch.setattr(server, "verify_archive", archive.inspect_archive)
    with pytest.raises(ServerError, match=r"could not be loaded: ArchiveError: member member-1"):
        server.start(damaged, spaced / "run", threads=1)
    assert processes_of(spaced / "run") == []
    assert not (spaced / "run" / "server.json").exists()
