"""One engine, two doors: the catalogue of the endpoint is the catalogue of the process, row for row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.table import Table

from deepdisc_ops import cli
from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.simulate import simulate_scene, write_scene
from deepdisc_ops.errors import AccessDenied, ServerUnreachable
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.inference.mosaic import predict_mosaic
from deepdisc_ops.serving import archive, server
from deepdisc_ops.serving.client import Client
from deepdisc_ops.sky.catalog import read_catalog
from deepdisc_ops.sky.images import open_mosaic

pytestmark = pytest.mark.integration

MODEL = Path(__file__).parents[2] / "models" / "lsst-small"
ACCURACY = {"ra": 1e-6, "dec": 1e-6, "mix_weights": 1e-4, "mix_means": 1e-4, "mix_sigmas": 1e-4}
"""Degrees, and redshift."""


@pytest.fixture(scope="module")
def sky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("a sky") / "sky.fits"
    write_scene(simulate_scene(SkySettings(), size=(420, 370), seed=5), path)
    return path


@pytest.fixture(scope="module")
def mar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archive.build_archive([MODEL], tmp_path_factory.mktemp("archive") / "ensemble.mar")


@pytest.fixture(scope="module")
def run(mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A server of one thread, beside a process of one."""
    folder, threads = tmp_path_factory.mktemp("run"), torch.get_num_threads()
    torch.set_num_threads(1)
    server.start(mar, folder, threads=1, wait_s=600)
    yield folder
    server.stop(folder)
    torch.set_num_threads(threads)


def catalogue(sky: Path, out: Path, *words: object) -> Table:
    """What the command writes."""
    cli.app(["predict", str(sky), "--out", str(out), "--window", "256", *map(str, words)], standalone_mode=False)
    return read_catalog(out)


def assert_same_rows(served: Table, local: Table) -> None:
    assert served.colnames == local.colnames
    assert len(served) == len(local)
    for name in local.colnames:
        one, other = np.asarray(served[name]), np.asarray(local[name])
        if one.dtype.kind == "f":
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=ACCURACY.get(name, 1e-3), err_msg=name)
        else:
            np.testing.assert_array_equal(one, other, err_msg=name)


def test_a_search_with_photometry(sky: Path, mar: Path, run: Path, spaced: Path) -> None:
    served = catalogue(sky, spaced / "served.parquet", "--server", run)
    local = catalogue(sky, spaced / "local.parquet", "--model", mar)
    assert len(local) > 100
    assert_same_rows(served, local)
    assert served.meta["model"] == server.discover(run).model_version
    assert not (spaced / "served.parquet.unfinished").exists()


def test_a_given_list(sky: Path, mar: Path, run: Path, spaced: Path) -> None:
    found = catalogue(sky, spaced / "found.parquet", "--server", run, "--no-photometry")[::3]
    Table({name: np.asarray(found[name]) for name in ("x0", "y0", "x1", "y1")}).write(spaced / "given.fits")
    words = ("--forced", spaced / "given.fits")
    served = catalogue(sky, spaced / "served.fits", "--server", run, *words)
    assert len(served) == len(found)
    assert_same_rows(served, catalogue(sky, spaced / "local.fits", "--model", mar, *words))


def test_reddening_that_varies(sky: Path, mar: Path, run: Path, tmp_path: Path) -> None:
    ensemble = Ensemble.load(archive.unpack_archive(mar, tmp_path / "ensemble"))
    with open_mosaic(sky, ensemble.bands) as mosaic, Client.from_discovery(run) as client:
        dust = lambda ra, dec: 0.03 + 0.5 * (np.asarray(dec) + 32.0)  # noqa: E731 - an EbvSource
        served = predict_mosaic(mosaic, client.predict, dust, window=320, workers=2)
        local = predict_mosaic(mosaic, lambda i, ebv: ensemble.predict(i.data, ebv, i.mask), dust, window=320)
    assert np.ptp(local["ebv"]) > 0.001
    assert_same_rows(served, local)


def test_a_run_goes_on_where_another_endpoint_left_it(sky: Path, run: Path, spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, windows = spaced / "c.parquet", 2
    predict = Client.predict

    def until_gone(client: Client, *arguments: object, **options: object) -> object:
        nonlocal windows
        windows -= 1
        if windows < 0:
            raise ServerUnreachable("gone")
        return predict(client, *arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr("deepdisc_ops.serving.fleet.Fleet.predict", until_gone)
        with pytest.raises(ServerUnreachable, match="gone"):
            catalogue(sky, out, "--server", run, "--workers", 1)
    kept = len(list((spaced / "c.parquet.unfinished").glob("*.npz")))
    assert kept >= 1
    copy = spaced / "elsewhere"
    copy.mkdir()
    (copy / "server.json").write_text((run / "server.json").read_text())
    assert len(catalogue(sky, out, "--server", copy)) > 100


def test_refusals_are_told_and_nothing_is_written(sky: Path, run: Path, spaced: Path) -> None:
    info, forged = server.discover(run), spaced / "forged"
    forged.mkdir()
    text = (run / "server.json").read_text()
    (forged / "server.json").write_text(text.replace(info.token, f"x{info.token[1:]}"))
    with pytest.raises(AccessDenied, match="does not accept the token"):
        catalogue(sky, spaced / "refused.parquet", "--server", forged)
    gone = replace(info, url=f"http://127.0.0.1:{server.free_ports(1)[0]}")
    (forged / "server.json").write_text(text.replace(info.url, gone.url))
    with pytest.raises(ServerUnreachable, match=f"nothing answers at {gone.url}"):
        catalogue(sky, spaced / "refused.parquet", "--server", forged)
    assert not list(spaced.glob("refused*"))
