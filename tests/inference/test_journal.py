"""What a run leaves behind when it is interrupted, its disk fills up or its pages are damaged, and what goes on from there."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.table import Table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.inference.journal import ABOUT, Found, Journal
from deepdisc_ops.inference.mosaic import Search, Survey, write_mosaic
from deepdisc_ops.sky.catalog import read_catalog, writer
from deepdisc_ops.sky.detections import Detections
from deepdisc_ops.sky.tiling import Window

SURVEY = Survey(320, 256, 96, 32)
WINDOWS = [tile.window for tile in SURVEY.tiles()]
WINDOW = Window(0, 0, 96, 96)
KIB = 1024


def objects(n: int, *, masks: bool = False, seed: int = 0) -> Detections:
    rng = np.random.default_rng(seed)
    column, mixture = rng.random(n).astype(np.float32), rng.random((n, 3)).astype(np.float32)
    index = rng.integers(0, 9, n).astype(np.int32)
    crops = rng.integers(0, 255, (n, 28, 28)).astype(np.uint8) if masks else None
    extra = {"flux": rng.random((n, 6)), "name": np.array(["a b"] * n, "U3")}
    boxes = rng.random((n, 4)).astype(np.float32)
    return Detections(boxes, column, index, mixture, mixture, mixture, column, index, index, crops, extra)


def seen(window: Window) -> Found:
    """Objects of 10 px on a lattice, those that are whole in the window."""
    y, x = (axis.ravel() for axis in np.mgrid[4:250:24, 4:310:24])
    boxes = np.stack([x, y, x + 10, y + 10], axis=1).astype(np.float32)
    low, high = np.array(window[:2]), np.array(window[2:])
    boxes = boxes[(boxes[:, :2] >= low).all(1) & (boxes[:, 2:] <= high).all(1)]
    n, index = len(boxes), np.zeros(len(boxes), np.int32)
    one = np.ones((n, 1), np.float32)
    found = Detections(boxes, one[:, 0], index, one, boxes[:, :1] / 320, one / 10, one[:, 0] / 50, index + 1, index)
    return Found(found, window.width * window.height)


class Looker:
    """Knows at which windows it has looked."""

    def __init__(self) -> None:
        self.looked: list[Window] = []

    def look(self, windows: Iterable[Window]) -> Generator[Found]:
        for window in windows:
            self.looked.append(window)
            yield seen(window)


def run(folder: Path, looker: Looker) -> Table:
    """A run as the command makes it, its journal and its catalogue in ``folder``."""
    journal, out = Journal(folder / "journal", {"images": "lattice"}), folder / "catalog.parquet"
    write_mosaic(Search(SURVEY, looker, journal), [out], bands=("g",))
    journal.remove()
    return read_catalog(out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return run(tmp_path_factory.mktemp("whole"), Looker())


def assert_same(one: Any, other: Any, names: Iterable[str]) -> None:
    for name in names:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize(
    "found",
    [
        Found(None, 0),
        Found(Detections.empty(4), 12),
        Found(objects(0, masks=True), 12, ("noise is 3 \u03c3",)),
        Found(objects(7), 2**40, ("one", "two, or more"), np.array([1, 2**60])),
        Found(objects(7, masks=True), 1),
    ],
    ids=["nothing valid", "no object", "no object with columns", "warnings and cells", "masks"],
)
def test_a_page_holds_what_a_window_gave(spaced: Path, found: Found) -> None:
    journal = Journal(spaced / "journal", {})
    assert not journal.has(WINDOW, "first")
    journal.put(WINDOW, "first", found)
    back = journal.get(WINDOW, "first")
    assert back is not None
    assert journal.has(WINDOW, "first")
    assert not journal.has(WINDOW, "second")
    assert (back.valid, back.warnings) == (found.valid, found.warnings)
    np.testing.assert_array_equal(back.cells, found.cells)
    assert (back.objects is None) == (found.objects is None)
    if found.objects is None or back.objects is None:
        return
    one, other = ({**vars(part), **part.extra} for part in (back.objects, found.objects))
    assert one.keys() == other.keys()
    assert_same(one, other, one.keys() - {"extra"})
    assert all(getattr(one[name], "dtype", None) == getattr(other[name], "dtype", None) for name in one)


@given(st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_page_is_no_page(spaced: Path, data: st.DataObject) -> None:
    journal = Journal(spaced / "journal", {})
    journal.put(WINDOW, "first", Found(objects(3), 9, ("a",)))
    (page,) = (spaced / "journal").glob("*.npz")
    content = bytearray(page.read_bytes())
    if data.draw(st.booleans(), "cut"):
        del content[data.draw(st.integers(0, len(content) - 1), "length") :]
    else:
        content[data.draw(st.integers(0, len(content) - 1), "byte")] ^= data.draw(st.integers(1, 255), "bits")
    page.write_bytes(bytes(content))
    assert journal.get(WINDOW, "first") is None
    assert not page.exists()


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A file system with so much room."""
    disk = folder / "small disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
@pytest.mark.parametrize(
    ("blocks", "message"),
    [(len(WINDOWS) // 2, r"journal cannot be written \(No space"), (len(WINDOWS) + 2, r"catalog\.parquet could not .*No space")],
    ids=["half of the pages", "the pages, not the catalogue"],
)
def test_a_disk_that_fills_up_midway_is_gone_on_from_when_there_is_room(
    spaced: Path, whole: Table, blocks: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PART_ROWS", 16)
    looker = Looker()
    with small_disk(spaced, 4 * KIB) as disk:
        filler = disk / "filler"
        filler.write_bytes(bytes((4 * KIB - 4 * blocks) * KIB))
        with pytest.raises(CatalogError, match=message) as failure:
            run(disk, looker)
        assert "\n" not in str(failure.value)
        assert {path.name for path in disk.iterdir()} == {"filler", "journal"}
        pages = sorted((disk / "journal").glob("*.npz"))
        assert 0 < len(pages) <= len(WINDOWS)
        assert {path.name for path in (disk / "journal").iterdir()} == {ABOUT, *(page.name for page in pages)}
        filler.unlink()
        table = run(disk, looker)
        assert [path.name for path in disk.iterdir()] == ["catalog.parquet"]
    assert_same(table, whole, whole.colnames)
    assert set(looker.looked) == set(WINDOWS)
    assert len(looker.looked) <= len(WINDOWS) + 1  # the window whose page found no room


@pytest.mark.parametrize("failing", [0, 3, len(WINDOWS) - 1])
def test_a_page_without_room_is_found_again(spaced: Path, whole: Table, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, calls = os.fsync, iter(range(10**6))

    def full(file: int) -> None:
        if next(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    looker = Looker()
    with pytest.raises(CatalogError, match="No space left on device"):
        run(spaced, looker)
    assert len(list((spaced / "journal").glob("*.npz"))) == failing
    assert_same(run(spaced, looker), whole, whole.colnames)
    assert sorted(looker.looked) == sorted([*WINDOWS, WINDOWS[failing]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.parent.write_text("a file"), "cannot be written .*make room and run the same again"),
        (lambda folder: folder.joinpath(ABOUT).write_text('{"images": '), "is damaged; remove .* to begin anew"),
        (lambda folder: folder.joinpath("first-0-0-96-96.npz").touch(), "holds 1 windows and no run.json that says of what"),
        (lambda folder: folder.joinpath(ABOUT).write_text('{"model": "x"}'), "images was None, is lattice; model was x, is None"),
    ],
    ids=["no folder", "damaged", "of nobody", "of another"],
)
def test_a_folder_that_is_no_journal_of_this_run_is_refused(spaced: Path, make: Callable[[Path], object], message: str) -> None:
    folder = spaced / "place" / "journal"
    if message.startswith("cannot"):
        make(folder)
    else:
        folder.mkdir(parents=True)
        make(folder)
    before = sorted(spaced.rglob("*"))
    with pytest.raises(CatalogError, match=message) as failure:
        Journal(folder, {"images": "lattice"})
    assert "\n" not in str(failure.value)
    assert sorted(spaced.rglob("*")) == before


def test_a_journal_that_is_killed_while_it_is_removed_gives_its_pages_to_nobody_else(
    spaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(spaced / "journal", {"model": "one"})
    for window in WINDOWS[:3]:
        journal.put(window, "first", seen(window))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    journal.remove()
    assert [path.name for path in (spaced / "journal").iterdir()] == [ABOUT]
    with pytest.raises(CatalogError, match="model was one, is two"):
        Journal(spaced / "journal", {"model": "two"})
    assert len(Journal(spaced / "journal", {"model": "one"})) == 0
