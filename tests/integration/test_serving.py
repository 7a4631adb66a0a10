"""A real TorchServe on free loopback ports: what it serves is what the engine computes, and it ends when told to."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
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
from deepdisc_ops.serving import archive, logs, plan, server, state
from deepdisc_ops.serving.client import Client
from deepdisc_ops.serving.fleet import Fleet
from deepdisc_ops.serving.generation import Generation
from deepdisc_ops.serving.service import VARIABLE, read_service
from deepdisc_ops.serving.wire import IMAGE_TYPE, PREDICT_PATH, decode_detections, encode_image
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
WAIT_S = 600.0
START = """
import sys
from pathlib import Path
from deepdisc_ops.serving import server
server.start(Path(sys.argv[1]), Path(sys.argv[2]), threads=1, restart=True, max_window=int(sys.argv[3]), wait_s=float(sys.argv[4]))
"""


def build(folder: Path, seeds: Sequence[int], name: str) -> Path:
    """An archive of untrained members."""
    config = validate(TrainingConfig, SETTINGS, "test")
    for seed in seeds:
        torch.manual_seed(seed)
        save_member(folder / str(seed), DeepDisc(config.model, config.inference), config, {"val_nll": 1.0 + seed}, 10)
    return archive.build_archive([folder / str(seed) for seed in seeds], folder / name)


@pytest.fixture(scope="module")
def mar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("ensemble"), (0, 1), "two.mar")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another version, with other members."""
    return build(tmp_path_factory.mktemp("another ensemble"), (2,), "one.mar")


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
    command = [sys.executable, "-c", START, str(mar), str(folder), str(MAX_WINDOW), str(WAIT_S)]
    subprocess.run(command, check=True, timeout=2 * WAIT_S)
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


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


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


def test_a_window_over_the_limit_is_told(run_dir: Path) -> None:
    info, side = server.discover(run_dir), MAX_WINDOW + 96
    body, headers = encode_image(np.zeros((3, side, side), np.float32), BANDS, None, EBV)
    headers |= {"authorization": f"Bearer {info.token}", "content-type": IMAGE_TYPE}
    reply = httpx.post(f"{info.url}{PREDICT_PATH}", content=body, headers=headers, trust_env=False, timeout=WAIT_S)
    assert (reply.status_code, reply.json()["code"]) == (413, "window_too_large")


def test_junk_is_answered_with_a_reason(run_dir: Path) -> None:
    info = server.discover(run_dir)
    headers = {"Authorization": f"Bearer {info.token}", "X-DeepDISC-Bands": "g,r,i", "X-DeepDISC-EBV": "0,0,0,0"}
    reply = httpx.post(f"{info.url}/predictions/{info.model}", content=b"junk", headers=headers, trust_env=False)
    assert reply.status_code == 400
    assert reply.json()["code"] == "not_npy"
    assert "numpy.save" in reply.json()["remedy"]


def test_its_secrets_are_private_and_workers_are_told_the_limits(run_dir: Path) -> None:
    info = server.discover(run_dir)
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    folder = run_dir / f"g{info.generation}"
    for path in (run_dir / "server.json", folder / "key_file.json", folder / "config.properties", folder / "service.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    told = read_service({VARIABLE: str(folder / "service.json")})
    assert (told.max_window, told.request_bytes, told.reply_bytes) == (MAX_WINDOW, info.request_bytes, info.reply_bytes)
    assert told.busy == folder / "busy"


def test_every_worker_has_answered_a_canary(run_dir: Path) -> None:
    info = server.discover(run_dir)
    proved = logs.answered(logs.folder_of(run_dir, info.generation) / "access_log.log")
    assert len(proved) == len(info.worker_pids) == info.workers


def test_a_second_server_does_not_start_in_its_place(run_dir: Path, mar: Path) -> None:
    with pytest.raises(ServerError, match="already serves"):
        server.start(mar, run_dir)
    assert server.status(run_dir).healthy
    assert server.status(run_dir).state == "ready"


def test_a_killed_worker_costs_no_window(run_dir: Path, client: Client, image: SkyImage) -> None:
    expected = client.predict(image, EBV)
    (worker,) = (worker.pid for worker in server.status(run_dir).workers)
    os.kill(worker, signal.SIGKILL)
    assert_same(client.predict(image, EBV), expected)
    assert server.status(run_dir).state == "ready"


def test_a_full_disk_costs_neither_window_nor_token(run_dir: Path, client: Client, image: SkyImage) -> None:
    """No file can grow for any of its processes: what cannot be written is not promised, what is served goes on."""
    info, expected = server.discover(run_dir), client.predict(image, EBV)
    everyone = [psutil.Process(pid) for pid in (info.supervisor_pid, info.pid)]
    before = [process.rlimit(psutil.RLIMIT_FSIZE) for process in everyone]
    try:
        for process, (_, most) in zip(everyone, before, strict=True):
            process.rlimit(psutil.RLIMIT_FSIZE, (0, most))
        order = state.place_order(run_dir, "renew")
        wait_for(lambda: not (run_dir / state.ORDER).exists())
        with Client(info.url, info.token) as stubborn:
            assert_same(stubborn.predict(image, EBV), expected)
        assert server.discover(run_dir) == info
    finally:
        for process, limits in zip(everyone, before, strict=True):
            process.rlimit(psutil.RLIMIT_FSIZE, limits)
    wait_for(lambda: state.read_answer(run_dir, order) is not None)
    assert state.read_answer(run_dir, order).error == "ServerError"  # type: ignore[union-attr]
    server.renew_tokens(run_dir)
    assert server.discover(run_dir).token != info.token
    with Client(info.url, info.token) as former, pytest.raises(AccessDenied):
        former.predict(image, EBV)
    assert_same(client.predict(image, EBV), expected)


@contextlib.contextmanager
def under_load(run_dir: Path, image: SkyImage) -> Iterator[Callable[[int], list[Detections]]]:
    """Two clients that send one window after the other, and how to wait for more answers; their failure is the test's."""
    answers: list[Detections] = []
    enough = threading.Event()

    def send() -> None:
        with Fleet.open([run_dir], patience_s=WAIT_S, mixed=True) as client:
            while not enough.is_set():
                answers.append(client.predict(image, EBV))

    with ThreadPoolExecutor(2) as pool:
        senders = [pool.submit(send) for _ in range(2)]

        def more(count: int) -> list[Detections]:
            wanted = len(answers) + count
            wait_for(lambda: len(answers) >= wanted or any(sender.done() for sender in senders))
            return answers

        try:
            more(2)
            yield more
        finally:
            enough.set()
        for sender in senders:
            sender.result()


def test_an_upgrade_loses_no_request_and_leaves_one_server(
    run_dir: Path, other: Path, image: SkyImage, ensemble: Ensemble, tmp_path_factory: pytest.TempPathFactory
) -> None:
    old = server.discover(run_dir)
    before = ensemble.predict(image.data, EBV, image.mask)
    after = Ensemble.load(archive.unpack_archive(other, tmp_path_factory.mktemp("other"))).predict(image.data, EBV, image.mask)
    with under_load(run_dir, image) as more:
        assert "serves" in server.upgrade(run_dir, other)
        wait_for(lambda: server.status(run_dir).supervisor.retiring == ())  # type: ignore[union-attr]
        answers = more(3)
    kinds = ["before" if found.means.shape == before.means.shape else "after" for found in answers]
    assert (kinds[0], kinds[-1]) == ("before", "after")
    for found, kind in zip(answers, kinds, strict=True):
        assert_same(found, before if kind == "before" else after)
    new = server.discover(run_dir)
    assert (new.generation, new.model_version) == (old.generation + 1, archive.inspect_archive(other)["version"])
    assert not psutil.pid_exists(old.pid)
    assert len(processes_of(run_dir)) == 2


def test_a_killed_server_is_started_anew_and_costs_no_window(run_dir: Path, image: SkyImage) -> None:
    old = server.discover(run_dir)
    with under_load(run_dir, image) as more:
        os.kill(old.pid, signal.SIGKILL)
        wait_for(lambda: (run_dir / "server.json").exists() and server.discover(run_dir).generation > old.generation)
        answers = more(3)
    for found in answers:
        assert_same(found, answers[0])
    assert server.status(run_dir).supervisor.restarts == 1  # type: ignore[union-attr]


def test_a_stop_answers_what_was_accepted_and_leaves_nothing(run_dir: Path, image: SkyImage) -> None:
    info = server.discover(run_dir)
    body, headers = encode_image(image.data, BANDS, image.mask, EBV)
    headers |= {"authorization": f"Bearer {info.token}", "content-type": IMAGE_TYPE}

    def send() -> httpx.Response:
        return httpx.post(f"{info.url}{PREDICT_PATH}", content=body, headers=headers, trust_env=False, timeout=WAIT_S)

    with ThreadPoolExecutor(6) as pool:
        sent = [pool.submit(send) for _ in range(6)]
        wait_for(lambda: server.status(run_dir).pending > 1 or all(one.done() for one in sent))
        assert server.stop(run_dir)
        answers = [one.result() for one in sent]
    refused = [answer for answer in answers if answer.status_code != httpx.codes.OK]
    assert all("token" in answer.text.lower() for answer in refused)  # came when the door was closed, and were told so
    assert len(answers) - len(refused) > 1
    first, *others = (decode_detections(answer.content) for answer in answers if answer not in refused)
    for found in others:
        assert_same(found, first)
    assert processes_of(run_dir) == []
    assert not psutil.pid_exists(info.supervisor_pid) or psutil.Process(info.supervisor_pid).status() == psutil.STATUS_ZOMBIE
    assert server.status(run_dir).state == "stopped"
    assert sorted(path.name for path in run_dir.iterdir()) == [state.LOCK, "logs"]
    with Client(info.url, info.token, patience_s=0) as late, pytest.raises(ServerUnreachable, match="serve start"):
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
    monkeypatch.setattr(plan, "verify_archive", archive.inspect_archive)
    settings = plan.ServerSettings(threads=1, wait_s=WAIT_S)
    (spaced / "run").mkdir()
    generation = Generation(1, plan.make_plan(damaged, settings), settings, spaced / "run")
    with pytest.raises(ServerError, match=r"could not be loaded: ArchiveError: .*member-1"):
        generation.start(lambda: None, lambda _: None)
    assert processes_of(spaced / "run") == []
    assert [path.name for path in (spaced / "run").iterdir()] == ["logs"]
