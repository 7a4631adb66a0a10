"""Two servers as one: killed, stopped and upgraded under a mosaic, whose catalogue is that of the process all the same."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.table import Table

from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.simulate import simulate_scene, write_scene
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.inference.mosaic import predict_mosaic
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.model.weights import read_info, save_member
from deepdisc_ops.serving import archive, server
from deepdisc_ops.serving.fleet import Fleet
from deepdisc_ops.sky.detections import Detections
from deepdisc_ops.sky.dust import EbvPlane, ebv_source
from deepdisc_ops.sky.images import Mosaic, SkyImage, open_mosaic
from deepdisc_ops.sky.tiling import Window

pytestmark = pytest.mark.integration

WINDOW = 192


@pytest.fixture(scope="module")
def mar(tiny_checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One member with a mask head."""
    folder, config = tmp_path_factory.mktemp("member"), read_info(tiny_checkpoints[0]).config
    config = config.model_copy(update={"model": config.model.model_copy(update={"mask_head": True})})
    torch.manual_seed(2)
    save_member(folder / "masks", DeepDisc(config.model, config.inference), config, {"val_nll": 0.1}, step=1)
    return archive.build_archive([folder / "masks"], folder / "masks.mar")


@pytest.fixture(scope="module")
def runs(mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Two servers that are restarted when they die."""
    folders, threads = [tmp_path_factory.mktemp(name) for name in ("one", "other")], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda folder: server.start(mar, folder, threads=1, restart=True, wait_s=600), folders))
        yield folders
    finally:
        for folder in folders:
            server.stop(folder)
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def mosaic(ensemble: Ensemble, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosaic]:
    path = tmp_path_factory.mktemp("sky") / "sky.fits"
    write_scene(simulate_scene(SkySettings(), size=(640, 520), seed=6), path)
    with open_mosaic(path, ensemble.bands) as mosaic:
        yield mosaic


@pytest.fixture(scope="module")
def ensemble(mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Ensemble:
    return Ensemble.load(archive.unpack_archive(mar, tmp_path_factory.mktemp("unpacked") / "ensemble"))


@pytest.fixture(scope="module")
def expected(ensemble: Ensemble, mosaic: Mosaic) -> Table:
    return predict_mosaic(mosaic, lambda i, ebv: ensemble.predict(i.data, ebv, i.mask), ebv_source("0.03"), window=WINDOW)


def served(mosaic: Mosaic, fleet: Fleet, disturb: Callable[[], object]) -> Table:
    """The mosaic's catalogue through the fleet, which is disturbed when two windows were answered."""
    answered = threading.Semaphore(0)

    def predict(image: SkyImage, ebv: EbvPlane) -> Detections:
        found = fleet.predict(image, ebv)
        answered.release()
        return found

    with ThreadPoolExecutor(1) as pool:
        table = pool.submit(predict_mosaic, mosaic, predict, ebv_source("0.03"), window=WINDOW, workers=fleet.room)
        for _ in range(2):
            answered.acquire(timeout=120)
        disturb()
        return table.result()


def assert_same(found: Table, expected: Table) -> None:
    assert len(found) == len(expected) > 50
    for name in ("x0", "y0", "x1", "y1", "score", "mix_weights", "mix_means", "mix_sigmas"):
        np.testing.assert_allclose(
            np.asarray(found[name]), np.asarray(expected[name]), atol=1e-3 if name in ("x0", "y0", "x1", "y1") else 1e-4
        )
    np.testing.assert_array_equal(found["flags"], expected["flags"])


def kill(pids: tuple[int, ...]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_two_servers_make_the_catalogue_of_one_process(runs: list[Path], mosaic: Mosaic, expected: Table) -> None:
    with Fleet.open(runs) as fleet:
        assert fleet.workers == 2
        assert_same(served(mosaic, fleet, lambda: None), expected)
        assert not fleet.trouble


def test_masks_travel(runs: list[Path], mosaic: Mosaic, ensemble: Ensemble) -> None:
    image, plane = mosaic.read(Window(0, 0, WINDOW, WINDOW)), EbvPlane.constant(0.03)
    local = ensemble.predict(image.data, plane, image.mask, masks=True)
    with Fleet.open(runs) as fleet:
        found = fleet.predict(image, plane, masks=True)
    assert found.masks is not None
    assert local.masks is not None
    assert found.masks.any()
    assert np.abs(found.masks.astype(int) - local.masks.astype(int)).max() <= 1


def test_a_worker_and_another_servers_jvm_are_killed(runs: list[Path], mosaic: Mosaic, expected: Table) -> None:
    one, other = (server.discover(run) for run in runs)
    with Fleet.open(runs) as fleet:
        assert_same(served(mosaic, fleet, lambda: (kill(one.worker_pids), kill((other.pid,)))), expected)
        assert sum(fleet.trouble.values()) >= 2


def test_tokens_end_and_archives_change(runs: list[Path], mar: Path, mosaic: Mosaic, expected: Table, spaced: Path) -> None:
    same_members = archive.build_archive([mar.parent / "masks"], spaced / "next.mar", on_failure="skip")

    def disturb() -> None:
        server.renew_tokens(runs[0])
        server.upgrade(runs[0], same_members)
        server.rollback(runs[0])

    with Fleet.open(runs[:1], patience_s=120, mixed=True) as fleet:
        assert_same(served(mosaic, fleet, disturb), expected)
    assert server.discover(runs[0]).generation > 2


def test_one_is_stopped_and_the_other_does_the_rest(runs: list[Path], mosaic: Mosaic, expected: Table) -> None:
    with Fleet.open(runs) as fleet:
        assert_same(served(mosaic, fleet, lambda: server.stop(runs[1])), expected)
    assert server.status(runs[1]).state == "stopped"
