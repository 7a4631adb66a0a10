"""The command line ended by SIGKILL: the same command goes on, and the catalogue is that of a run left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.simulate import simulate_scene, write_scene
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.inference.mosaic import LocalLooker, Search, Survey, write_mosaic
from deepdisc_ops.sky.catalog import read_catalog
from deepdisc_ops.sky.dust import ebv_source
from deepdisc_ops.sky.images import open_mosaic

pytestmark = pytest.mark.integration

MODEL = Path(__file__).parents[2] / "models" / "lsst-small"
SIZE, WINDOW, OVERLAP = (320, 300), 128, 64
KILLED_AT = (4, 9)
"""Pages of the journal."""
IN_FLIGHT = 2
WATCHED = """
import sys
from deepdisc_ops import cli
from deepdisc_ops.inference.mosaic import LocalLooker

log, sys.argv[1:] = sys.argv[1], sys.argv[2:]
look = LocalLooker._predict

def watched(self, window, image):
    with open(log, "a") as file:
        print(*window, sep="-", file=file)
    return look(self, window, image)

LocalLooker._predict = watched
cli.main()
"""


def pages(out: Path) -> set[str]:
    """Windows that the journal holds."""
    return {page.stem.partition("-")[2] for page in out.with_name(f"{out.name}.unfinished").glob("*.npz")}


def start(scene: Path, out: Path, log: Path, kill_at: int | None = None) -> list[str]:
    """Windows that the command looked at, until it ended or there were ``kill_at`` pages."""
    log.write_text("")
    words = ["predict", scene, "--model", MODEL, "--out", out, "--window", WINDOW, "--overlap", OVERLAP, "--no-photometry"]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WATCHED, log, *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    while kill_at is not None and len(pages(out)) < kill_at and process.poll() is None:
        time.sleep(0.005)
    if kill_at is not None:
        process.kill()
    told, _ = process.communicate()
    assert process.returncode == (0 if kill_at is None else -signal.SIGKILL), told
    return log.read_text().split()


def test_a_run_that_is_killed_again_and_again_ends_with_the_catalogue_of_one_left_alone(spaced: Path) -> None:
    scene, out, log = spaced / "sky.fits", spaced / "killed.parquet", spaced / "looked.txt"
    write_scene(simulate_scene(SkySettings(), size=SIZE, seed=4), scene)
    threads, survey = torch.get_num_threads(), Survey(*SIZE, WINDOW, OVERLAP)
    torch.set_num_threads(1)
    ensemble = Ensemble.load(MODEL)
    with open_mosaic(scene, ensemble.bands) as mosaic:
        looker = LocalLooker(mosaic, lambda image, ebv: ensemble.predict(image.data, ebv, image.mask), ebv_source("0.03"))
        write_mosaic(Search(survey, looker), [spaced / "whole.parquet"], bands=mosaic.bands, wcs=mosaic.wcs)
    torch.set_num_threads(threads)

    runs: list[tuple[set[str], list[str]]] = []
    for kill_at in (*KILLED_AT, None):
        kept = pages(out)
        runs.append((kept, start(scene, out, log, kill_at)))
    for kept, looked in runs:
        assert not kept & set(looked)
        assert len(looked) == len(set(looked))
    assert all(len(kept) >= pages for (kept, _), pages in zip(runs[1:], KILLED_AT, strict=True))
    every = [window for _, looked in runs for window in looked]
    assert {"-".join(map(str, tile.window)) for tile in survey.tiles()} <= set(every)
    assert len(every) - len(set(every)) <= len(KILLED_AT) * IN_FLIGHT

    table, whole = read_catalog(out), read_catalog(spaced / "whole.parquet")
    assert len(whole) > 50
    for name in whole.colnames:
        np.testing.assert_array_equal(table[name], whole[name], err_msg=name)
    assert not out.with_name(f"{out.name}.unfinished").exists()
