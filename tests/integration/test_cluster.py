"""A mosaic over actors of a real Ray: the catalogue of a local run, whatever happens to them, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from threading import Thread

import numpy as np
import psutil
import pytest
from astropy.table import Table

from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.simulate import simulate_scene, write_scene
from deepdisc_ops.errors import ImageError, SetupError
from deepdisc_ops.inference.cluster import AHEAD, AT_ONCE, RayLooker
from deepdisc_ops.inference.journal import Found, Journal
from deepdisc_ops.inference.mosaic import Looker, Search, Survey, write_mosaic
from deepdisc_ops.inference.recipe import EbvRecipe, ImageRecipe, ModelRecipe, Recipe
from deepdisc_ops.ray_session import own_ray
from deepdisc_ops.sky.catalog import read_catalog
from deepdisc_ops.sky.tiling import Window, plan

# A start that Ray does not finish within its 30 s, on a busy machine, is repeated; it leaves the objects of ended processes.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")]

SKIES = Path(__file__).parents[1] / "inference"
WINDOWS = [tile.window for tile in plan(700, 560, 160, 64, 8)]
MIDDLE = (288, 192)
NUMBER_OF_MIDDLE = [window[:2] for window in WINDOWS].index(MIDDLE)


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """Ray for all tests, whose workers import `far_skies` by name, as this process does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SKIES)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(SKIES), os.environ.get("PYTHONPATH")])))
        patch.setenv("OMP_NUM_THREADS", "1")
        with own_ray():
            yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """The catalogue of a local run."""
    from far_skies import Accidents

    folder = tmp_path_factory.mktemp("local")
    return searched(Accidents(folder).looker(), folder)


def searched(looker: Looker, folder: Path, journal: Journal | None = None) -> Table:
    from far_skies import HEIGHT, WIDTH, sky

    search = Search(Survey(WIDTH, HEIGHT, 160, 64, 8), looker, journal)
    write_mosaic(search, [folder / "catalog.parquet"], bands=("g",), wcs=sky().wcs)
    return read_catalog(folder / "catalog.parquet")


def collect(looker: Looker, windows: Iterable[Window], found: list[Found]) -> None:
    """Fill ``found`` as far as it goes."""
    for one in looker.look(windows):
        found.append(one)  # noqa: PERF402  what came before an error stays


def looks(folder: Path) -> list[tuple[str, int]]:
    """Windows that were looked at, and by which process."""
    names = (path.name.split("-") for path in folder.glob("*-*-*-*"))
    return [(f"{x0}-{y0}", int(pid)) for x0, y0, pid, _ in names]


def assert_gone(folder: Path) -> None:
    """The actors that looked have ended."""
    processes = [psutil.Process(pid) for pid in {pid for _, pid in looks(folder)} if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive


def assert_same(one: Table, other: Table) -> None:
    assert one.colnames == other.colnames
    for name in one.colnames:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_an_actor_killed_midway_changes_nothing(spaced: Path, whole: Table) -> None:
    from far_skies import Accidents

    with RayLooker(Accidents(spaced, {MIDDLE: "once"}).looker, actors=2, cpus=0.5) as looker:
        table = searched(looker, spaced)
    assert len(whole) > 100
    assert_same(table, whole)
    assert (spaced / "killed").exists()
    seen = [window for window, _ in looks(spaced)]
    assert len(set(seen)) < len(seen) <= len(set(seen)) + AT_ONCE
    assert len({pid for _, pid in looks(spaced)}) >= 2
    assert_gone(spaced)
    assert looker.failures == {"member-1": "it is a test"}


def test_a_window_that_kills_every_actor_fails_the_run_and_keeps_what_was_found(spaced: Path, whole: Table) -> None:
    from far_skies import Accidents

    journal = Journal(spaced / "journal", {})
    with (
        RayLooker(Accidents(spaced, {MIDDLE: "kill"}).looker, actors=1, retries=1) as looker,
        pytest.raises(SetupError, match=r"2 actors were lost with window \(288, 192, 448, 352\) \(.*\); give them") as failure,
    ):
        searched(looker, spaced, journal)
    assert "\n" not in str(failure.value)
    assert len(journal) == NUMBER_OF_MIDDLE
    assert [window for window, _ in looks(spaced)].count("288-192") == 2
    assert_gone(spaced)
    assert_same(searched(Accidents(spaced).looker(), spaced, journal), whole)


def test_an_error_in_a_window_comes_out_as_it_is_when_its_turn_comes(spaced: Path) -> None:
    from far_skies import Accidents

    found: list[Found] = []
    with RayLooker(Accidents(spaced, {MIDDLE: "fail", (384, 192): "bug"}).looker, actors=1) as looker:
        with pytest.raises(ImageError) as failure:
            collect(looker, WINDOWS, found)
        with pytest.raises(KeyError) as bug:
            collect(looker, WINDOWS[NUMBER_OF_MIDDLE + 1 :], found)
    assert (type(failure.value), str(failure.value)) == (ImageError, "the window was cut")
    assert (type(bug.value), str(bug.value)) == (KeyError, "'bug'")
    assert "in _happen" in str(bug.value.__cause__)
    assert len(found) == NUMBER_OF_MIDDLE


def test_actors_that_cannot_be_built_fail_the_run_in_one_line(spaced: Path) -> None:
    from far_skies import Accidents

    with RayLooker(Accidents(spaced).unbuildable, actors=1) as looker, pytest.raises(ImageError) as failure:
        searched(looker, spaced)
    assert type(failure.value) is ImageError
    assert str(failure.value) == "band u is missing: found g, expected u, g; add the file"
    with (
        RayLooker(Accidents(spaced).deadly, actors=1, retries=1) as looker,
        pytest.raises(SetupError, match="2 actors in a row were lost before they were ready"),
    ):
        searched(looker, spaced)
    assert not (spaced / "catalog.parquet").exists()


def test_windows_wait_until_the_first_is_taken_and_closing_ends_the_work(spaced: Path) -> None:
    from far_skies import Accidents

    asked = 0

    def counted() -> Iterator[Window]:
        nonlocal asked
        for window in WINDOWS:
            asked += 1
            yield window

    with RayLooker(Accidents(spaced).looker, actors=1) as looker:
        answers = looker.look(counted())
        assert len(list(islice(answers, 3))) == 3
        (again,) = looker.look([WINDOWS[30]])
        assert again.objects is not None
        assert asked <= 3 + AHEAD
        answers.close()
        (last,) = looker.look([WINDOWS[41]])
        assert last.valid == WINDOWS[41].width * WINDOWS[41].height
        assert len(looks(spaced)) <= 3 + AHEAD + 2
    assert_gone(spaced)


def test_a_second_look_between_windows_loses_none_of_them(spaced: Path) -> None:
    from far_skies import Accidents

    found: list[Found] = []

    def all_of_them() -> None:
        with RayLooker(Accidents(spaced).looker, actors=1) as looker:
            for one in looker.look(WINDOWS):
                found.append(one)
                if len(found) == 3:  # by the last of these, all windows that were asked for are handed out
                    for window in WINDOWS[30:36]:
                        (again,) = looker.look([window])
                        assert again.valid

    work = Thread(target=all_of_them, daemon=True)
    work.start()
    work.join(60)
    assert len(found) == len(WINDOWS)


def test_a_recipe_gives_the_same_objects_here_and_there(spaced: Path, tiny_ensemble: Path) -> None:
    import torch

    write_scene(simulate_scene(SkySettings(), size=(300, 280), seed=5), spaced / "sky.fits")
    recipe = Recipe(ImageRecipe((spaced / "sky.fits",)), ModelRecipe(tiny_ensemble), EbvRecipe("0.05"), diameter=1.5, order=14)
    torch.set_num_threads(1)
    here = recipe.looker()
    windows = [tile.window for tile in Survey(300, 280, 160, 64).tiles()]
    with RayLooker(recipe.looker, actors=1, cpus=1) as there, here.mosaic:
        objects = 0
        for one, other in zip(here.look(windows), there.look(windows), strict=True):
            assert (one.valid, one.warnings) == (other.valid, other.warnings)
            np.testing.assert_array_equal(one.cells, other.cells)
            assert one.objects is not None
            assert other.objects is not None
            objects += len(one.objects)
            for name, value in {**vars(one.objects), **one.objects.extra}.items():
                if isinstance(value, np.ndarray):
                    same = {**vars(other.objects), **other.objects.extra}[name]
                    np.testing.assert_array_equal(value, same, err_msg=name)
            assert one.objects.extra.keys() >= {"flux", "flux_err"}
    assert objects > 50


def test_a_ray_of_its_own_ends_with_the_block_and_a_cluster_that_is_not_there_is_told(spaced: Path) -> None:
    program = f"""
import os, psutil, sys
sys.path.insert(0, {str(SKIES)!r})
from pathlib import Path
from far_skies import Accidents, sky
from deepdisc_ops.errors import SetupError
from deepdisc_ops.inference.cluster import RayLooker
from deepdisc_ops.sky.tiling import Window, plan
with RayLooker(Accidents(Path({str(spaced)!r})).looker, actors=1) as looker:
    (found,) = looker.look([Window(0, 0, 200, 200)])
    print(len(found.objects), len(psutil.Process().children(recursive=True)))
print(len(psutil.Process().children(recursive=True)))
try:
    RayLooker(Accidents(Path({str(spaced)!r})).looker, address="auto").__enter__()
except SetupError as error:
    print(error)
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    lines = answer.stdout.splitlines()
    assert len(lines) == 3, answer.stderr
    assert int(lines[0].split()[0]) > 5
    assert int(lines[0].split()[1]) > 2
    assert lines[1] == "0"
    assert lines[2].startswith("no Ray cluster can be joined at auto (")
    assert_gone(spaced)


@pytest.mark.slow
def test_a_node_that_goes_leaves_its_windows_to_the_others(spaced: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(SKIES)!r})
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from far_skies import Accidents
from deepdisc_ops.inference.cluster import RayLooker
from deepdisc_ops.sky.tiling import plan
windows = [tile.window for tile in plan(700, 560, 160, 64, 8)]
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
node = cluster.add_node(num_cpus=1)
try:
    with RayLooker(Accidents(Path({str(spaced)!r}), pause_s=0.2).looker, actors=2, address=cluster.address) as looker:
        for number, found in enumerate(looker.look(windows)):
            if number == 6:
                cluster.remove_node(node, allow_graceful=False)
        print(number + 1, len(windows))
finally:
    cluster.shutdown()
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert answer.stdout.split() == ["42", "42"], answer.stderr
    assert "an actor was lost" in answer.stderr
    assert len({pid for _, pid in looks(spaced)}) == 2
    assert_gone(spaced)
