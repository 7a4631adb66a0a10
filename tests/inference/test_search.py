"""Laws of the search of a mosaic, with a detector whose answer depends on what is near an object alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import sep
from astropy.table import Table
from astropy.wcs import WCS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.inference import mosaic as mosaic_room
from deepdisc_ops.inference.journal import Found, Journal
from deepdisc_ops.inference.mosaic import LocalLooker, Notes, Search, Survey, predict_mosaic, write_mosaic
from deepdisc_ops.sky.catalog import read_catalog
from deepdisc_ops.sky.detections import Detections, Flag
from deepdisc_ops.sky.dust import EbvPlane, ebv_source
from deepdisc_ops.sky.images import Mosaic, SkyImage
from deepdisc_ops.sky.planes import MemoryPixels, Plane
from deepdisc_ops.sky.tiling import Window

WIDTH, HEIGHT = 700, 560


def sky(seed: int = 1, objects: int = 160) -> Mosaic:
    """Noise and Gaussian sources; blends are smaller than the overlaps of the tests."""
    rng = np.random.default_rng(seed)
    pixels = rng.standard_normal((HEIGHT, WIDTH)).astype(np.float32)
    y, x = np.mgrid[-20:21, -20:21]
    padded = np.pad(pixels, 20)
    places = zip(rng.integers(0, WIDTH, objects), rng.integers(0, HEIGHT, objects), strict=True)
    for (cx, cy), size, flux in zip(places, rng.uniform(1, 3, objects), rng.pareto(1.5, objects), strict=True):
        light = min(20 + 200 * flux, 2000) / size**2
        padded[cy : cy + 41, cx : cx + 41] += light * np.exp(-(x**2 + y**2) / (2 * size**2))
    pixels = np.ascontiguousarray(padded[20:-20, 20:-20], np.float32)
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.crpix = ["RA---TAN", "DEC--TAN"], [10.0, 20.0], [WIDTH / 2, HEIGHT / 2]
    wcs.wcs.cdelt = [-5e-5, 5e-5]
    return Mosaic([Plane("g", Path("memory"), 0, 0, pixels.shape, wcs, 1.0, MemoryPixels(pixels))], 0.18)


def local(image: SkyImage, ebv: EbvPlane) -> Detections:
    """sep's objects, with their fluxes in the place of redshifts."""
    found = sep.extract(np.ascontiguousarray(image.data[0]), 4.0, clean=False, deblend_cont=1.0)  # its deblending draws lots
    boxes = np.stack([found["xmin"], found["ymin"], found["xmax"] + 1, found["ymax"] + 1], axis=1).astype(np.float32)
    n = len(found)
    ones = np.ones((n, 1), np.float32)
    means = np.log10(found["flux"].clip(1e-3))[:, None].astype(np.float32)
    index = np.zeros(n, np.int32)
    reddening = ebv.at(found["x"], found["y"], *image.data.shape[:0:-1])
    scores = np.clip(found["peak"] / 100, 0, 1).astype(np.float32)
    return Detections(boxes, scores, index, ones, means, ones / 10, reddening, index + 1, index, extra={"npix": found["npix"]})


def catalog(mosaic: Mosaic, **options: int) -> Table:
    return predict_mosaic(mosaic, local, ebv_source("0.03"), stride=8, **options)


def assert_same(one: Table, other: Table) -> None:
    assert one.colnames == other.colnames
    for name in one.colnames:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.fixture(scope="module")
def whole() -> Table:
    return catalog(sky(), window=1024)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(160, 400), st.integers(64, 80), st.integers(1, 3))
def test_the_catalogue_does_not_depend_on_windows_overlap_or_workers(whole: Table, window: int, overlap: int, workers: int) -> None:
    assert len(whole) > 100
    assert (np.diff(np.asarray(whole["y"])) >= 0).all()
    assert_same(catalog(sky(), window=window, overlap=overlap, workers=workers), whole)


class Counted:
    """A looker that fails, as if the process were killed, after so many windows, and knows which it has looked at."""

    def __init__(self, mosaic: Mosaic, limit: int, seen: list[Window]) -> None:
        self._looker, self._limit, self._seen = LocalLooker(mosaic, local, ebv_source("0.03")), limit, seen

    def look(self, windows: Iterable[Window]) -> Generator[Found]:
        """As `LocalLooker`."""
        for window in windows:
            if self._limit == 0:
                raise KeyboardInterrupt
            self._limit -= 1
            self._seen.append(window)
            yield from self._looker.look([window])


def searched(mosaic: Mosaic, folder: Path, limit: int, seen: list[Window], out: Path) -> None:
    journal = Journal(folder, {"images": "sky", "window": 160})
    search = Search(Survey(WIDTH, HEIGHT, 160, 64, 8), Counted(mosaic, limit, seen), journal)
    write_mosaic(search, [out], bands=("g",), wcs=mosaic.wcs)
    journal.remove()


def test_an_interrupted_search_goes_on_and_looks_nowhere_twice(spaced: Path, whole: Table) -> None:
    mosaic, seen, rng = sky(), list[Window](), np.random.default_rng(3)
    tiles = len(Survey(WIDTH, HEIGHT, 160, 64, 8).tiles())
    interruptions = 0
    while not (spaced / "catalog.parquet").exists():
        try:
            searched(mosaic, spaced / "journal", int(rng.integers(1, 8)), seen, spaced / "catalog.parquet")
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions >= 5
    assert len(seen) == len(set(seen)) >= tiles
    assert_same(read_catalog(spaced / "catalog.parquet"), whole)
    assert not (spaced / "journal").exists()


def test_rows_that_are_made_in_slices_are_those_made_at_once(spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mosaic = sky()

    class Doubled(Notes):
        """A list that holds each object twice, as no search does, so that ids have to be counted upwards."""

        def __iter__(self) -> Iterator[Detections]:
            for part in Search(Survey(WIDTH, HEIGHT, 300, 64, 8), LocalLooker(mosaic, local, ebv_source("0.03"))):
                yield part.select(np.repeat(np.arange(len(part)), 2))

    tables = []
    for rows in (mosaic_room.ROWS_AT_ONCE, 7):
        monkeypatch.setattr(mosaic_room, "ROWS_AT_ONCE", rows)
        write_mosaic(Doubled(), [out := spaced / f"{rows}.parquet"], bands=("g",), wcs=mosaic.wcs)
        tables.append(read_catalog(out))
    assert len(tables[0]) > 200
    assert len(set(tables[0]["id"])) == len(tables[0])
    assert_same(*tables)


def test_a_looker_keeps_its_threads() -> None:
    mosaic, threads = sky(), set[int]()

    def noting(image: SkyImage, ebv: EbvPlane) -> Detections:
        threads.add(threading.get_ident())
        return local(image, ebv)

    looker = LocalLooker(mosaic, noting, ebv_source("0.03"), workers=2)
    for window in [tile.window for tile in Survey(WIDTH, HEIGHT, 160, 64, 8).tiles()]:
        list(looker.look([window]))
    assert len(threads) <= 2


def test_windows_that_are_begun_end_before_a_closed_looker_lets_go() -> None:
    mosaic, begun, ended = sky(), list[int](), list[int]()

    def slow(image: SkyImage, ebv: EbvPlane) -> Detections:
        begun.append(0)
        time.sleep(0.2)
        ended.append(0)
        return local(image, ebv)

    answers = LocalLooker(mosaic, slow, ebv_source("0.03"), workers=2).look([Window(0, 0, 160, 160)] * 9)
    next(answers)
    answers.close()
    assert len(begun) == len(ended) < 9


def test_a_window_that_failed_lets_those_beside_it_end() -> None:
    mosaic, begun, ended, numbers = sky(), list[int](), list[int](), count()

    def failing(image: SkyImage, ebv: EbvPlane) -> Detections:
        begun.append(number := next(numbers))
        if number == 0:
            raise CatalogError("the first fails")
        time.sleep(0.2)
        ended.append(0)
        return local(image, ebv)

    looker = LocalLooker(mosaic, failing, ebv_source("0.03"), workers=2)
    with pytest.raises(CatalogError, match="the first fails"):
        list(looker.look([Window(0, 0, 160, 160)] * 9))
    assert len(begun) == len(ended) + 1 < 9
    assert len(list(looker.look([Window(0, 0, 160, 160)]))) == 1


def test_a_damaged_page_is_looked_at_again(spaced: Path, whole: Table) -> None:
    mosaic, seen = sky(), list[Window]()
    with pytest.raises(KeyboardInterrupt):
        searched(mosaic, spaced / "journal", 5, seen, spaced / "catalog.parquet")
    page = sorted((spaced / "journal").glob("*.npz"))[2]
    page.write_bytes(page.read_bytes()[:100])
    searched(mosaic, spaced / "journal", 1000, seen, spaced / "catalog.parquet")
    assert len(seen) == len(set(seen)) + 1
    assert_same(read_catalog(spaced / "catalog.parquet"), whole)


def test_a_run_of_something_else_is_not_continued(spaced: Path) -> None:
    Journal(spaced / "journal", {"images": "sky", "window": 160})
    Journal(spaced / "journal", {"images": "sky", "window": 160})
    with pytest.raises(CatalogError, match="window was 160, is 200"):
        Journal(spaced / "journal", {"images": "sky", "window": 200})


def test_a_mosaic_without_an_object_gives_a_catalogue_without_a_row(spaced: Path) -> None:
    table = catalog(sky(objects=0), window=256)
    assert len(table) == 0
    assert "z_mode" in table.colnames


def test_objects_at_the_border_are_flagged_and_none_is_cut(whole: Table) -> None:
    edge = (np.asarray(whole["flags"]) & Flag.EDGE) > 0
    at_border = (np.asarray(whole["x0"]) <= 0.5) | (np.asarray(whole["y0"]) <= 0.5)
    assert edge.any()
    assert (edge >= at_border).all()
    assert not (np.asarray(whole["flags"]) & Flag.TRUNCATED).any()
