"""The main job inside: train, tune, MLflow and endpoint as instances; the catalogue equals that made outside."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from deepdisc_ops.hpc.containers import instances
from deepdisc_ops.hpc.containers.run import Place
from deepdisc_ops.hpc.containers.runtime import Runtime
from deepdisc_ops.sky.catalog import read_catalog
from deepdisc_ops.tracking import EXPERIMENT

from .conftest import TINY, verb

pytestmark = pytest.mark.containers
PATIENCE_S = 300


@pytest.fixture(scope="module")
def folder(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes, a sweep, its archive and a mosaic, all made inside."""
    made = tmp_path_factory.mktemp("main job")
    shutil.copy(TINY, made / "tiny.yaml")
    sky = ("simulate", "--survey", "lsst", "--out")
    verb(*sky, "scenes", "--train", "6", "--validation", "2", "--size", "128", "--seed", "1", folder=made, inside=image)
    verb(*sky, "mosaic.fits", "--mosaic", "512", "--seed", "7", folder=made, inside=image)
    verb("small", "--out", "run", "--set", "data.path=scenes", "--set", "train.steps=5", folder=made, inside=image, app="train")
    verb("tiny.yaml", "--out", "sweep", folder=made, inside=image, app="tune")
    store = f"sqlite:///{made / 'sweep' / 'mlflow.db'}"
    verb("members", "select", "tiny", "--tracking-uri", store, "-k", "2", "--out", "members.yaml", folder=made, inside=image)
    verb("archive", "build", "--members", "members.yaml", "--out", "ensemble.mar", folder=made, inside=image)
    return made


@pytest.fixture
def name(runtime: Runtime) -> Iterator[str]:
    taken = f"dd-chain-{os.getpid()}"
    yield taken
    instances.stop(runtime, taken)


def until(condition: object) -> None:
    assert callable(condition)
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.5)


def test_the_train_app_leaves_a_member(folder: Path) -> None:
    assert (folder / "run" / "best" / "member.safetensors").is_file()


def test_mlflow_shows_the_sweep_from_an_instance(runtime: Runtime, image: Path, folder: Path, name: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--backend-store-uri", f"sqlite:///{folder / 'sweep' / 'mlflow.db'}", "--port", str(port)]
    instances.start(runtime, image, name, words, Place(folder), app="mlflow")
    url = f"http://127.0.0.1:{port}"

    def well() -> bool:
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.HTTPError:
            return False

    until(well)
    api = f"{url}/api/2.0/mlflow"
    found = httpx.get(f"{api}/experiments/get-by-name", params={"experiment_name": EXPERIMENT})
    assert found.status_code == 200, found.text
    wanted = {"experiment_ids": [found.json()["experiment"]["experiment_id"]]}
    runs = httpx.post(f"{api}/runs/search", json=wanted).json()["runs"]
    assert [run["info"]["status"] for run in runs] == ["FINISHED"] * 3  # the sweep and its two trials


def test_a_catalogue_served_from_inside_equals_that_made_outside(runtime: Runtime, image: Path, folder: Path, name: str) -> None:
    instances.start(runtime, image, name, ["ensemble.mar", "--run-dir", "server"], Place(folder), app="serve", settle_s=10)
    until((folder / "server" / "server.json").is_file)
    verb("predict", "mosaic.fits", "--server", "server", "--out", "served.parquet", folder=folder)
    verb("predict", "mosaic.fits", "--model", "ensemble.mar", "--out", "outside.parquet", folder=folder)
    served, outside = (read_catalog(folder / f"{which}.parquet") for which in ("served", "outside"))
    assert len(served) == len(outside) > 0
    for column in ("ra", "dec"):
        np.testing.assert_allclose(np.asarray(served[column]), np.asarray(outside[column]), rtol=0, atol=1e-6)
    for column in ("mix_weights", "mix_means", "mix_sigmas"):
        ours, theirs = (np.concatenate([np.asarray(row) for row in table[column]]) for table in (served, outside))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
