"""Redshifts of given objects: row for row, the mixtures that detection gives, and a place for what is nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.table import Table
from astropy.wcs import WCS

from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.simulate import simulate_scene
from deepdisc_ops.inference.ensemble import Ensemble, write_ensemble
from deepdisc_ops.inference.examine import Photometer
from deepdisc_ops.inference.forced import CompletedSearch, ForcedLooker, ForcedSearch, GivenSearch
from deepdisc_ops.inference.journal import Journal
from deepdisc_ops.inference.mosaic import LocalLooker, Notes, Search, Survey, write_mosaic
from deepdisc_ops.inference.window import at_border
from deepdisc_ops.sky.catalog import read_catalog
from deepdisc_ops.sky.detections import Array, Detections, Flag
from deepdisc_ops.sky.dust import EbvPlane, ebv_source
from deepdisc_ops.sky.given import Given
from deepdisc_ops.sky.images import Mosaic, SkyImage
from deepdisc_ops.sky.photometry import PixelNoise
from deepdisc_ops.sky.planes import MemoryPixels, Plane
from deepdisc_ops.sky.tiling import Window

SIDE = 240
EBV = ebv_source("0.03")
NOISE = PixelNoise(np.full(6, 5.0), np.zeros(6))


@pytest.fixture(scope="module")
def mosaic() -> Mosaic:
    scene = simulate_scene(SkySettings(), size=SIDE, seed=21)
    image = np.array(scene.image, np.float32)
    image[:, 200:, :60] = np.nan
    planes = [
        Plane(band, Path("memory"), 0, 0, plane.shape, scene.wcs, 1.0, MemoryPixels(plane))
        for band, plane in zip(scene.survey.bands, image, strict=True)
    ]
    return Mosaic(planes, 0.2)


@pytest.fixture(scope="module")
def ensemble(tiny_checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Ensemble:
    folder = tmp_path_factory.mktemp("one")
    write_ensemble(folder, tiny_checkpoints[:1])
    return Ensemble.load(folder)


@pytest.fixture(scope="module")
def found(mosaic: Mosaic, ensemble: Ensemble) -> Detections:
    return Detections.concatenate(list(search(mosaic, ensemble)))


def search(mosaic: Mosaic, ensemble: Ensemble) -> Search:
    looker = LocalLooker(mosaic, lambda i, ebv: ensemble.predict(i.data, ebv, i.mask), EBV, examiners=[Photometer(noise=NOISE)])
    return Search(Survey(SIDE, SIDE, 192, 64), looker)


def looker(mosaic: Mosaic, ensemble: Ensemble) -> ForcedLooker:
    def redshift(image: SkyImage, boxes: Array, ebv: EbvPlane) -> Detections:
        return ensemble.redshift(image.data, boxes, ebv, image.mask)

    return ForcedLooker(mosaic, redshift, EBV, examiners=[Photometer(noise=NOISE)])


def forced(mosaic: Mosaic, ensemble: Ensemble, boxes: Array, window: int = 192, **options: object) -> Detections:
    search = ForcedSearch(Survey(SIDE, SIDE, window, 64), looker(mosaic, ensemble), boxes, **options)  # type: ignore[arg-type]
    return Detections.concatenate(list(search))


def test_detected_boxes_given_back_have_the_same_mixtures(mosaic: Mosaic, ensemble: Ensemble, found: Detections) -> None:
    """But where the copy that was kept at a seam is the neighbour's: the members' tiles (128 px, cores 96) have seams as well."""
    again = forced(mosaic, ensemble, found.boxes)
    assert len(again) == len(found) > 40
    np.testing.assert_array_equal(again.boxes, found.boxes)
    assert ((again.flags & Flag.FORCED) > 0).all()
    same = np.abs(again.means - found.means).max(axis=1) < 1e-5
    same &= np.abs(again.weights - found.weights).max(axis=1) < 1e-5
    same &= np.abs(again.sigmas - found.sigmas).max(axis=1) < 1e-5
    assert same.mean() > 0.9
    np.testing.assert_allclose(again.ebv, 0.03, rtol=1e-5)
    np.testing.assert_array_equal((again.flags & Flag.EDGE) > 0, at_border(found.boxes, SIDE, SIDE))


def test_in_one_tile_the_law_holds_for_every_object(mosaic: Mosaic, ensemble: Ensemble) -> None:
    corner = mosaic.read(Window(0, 0, 128, 128))
    planes = [
        Plane(band, Path("memory"), 0, 0, plane.shape, corner.wcs, 1.0, MemoryPixels(plane))
        for band, plane in zip(corner.bands, corner.data, strict=True)
    ]
    small = Mosaic(planes, 0.2)
    looked = LocalLooker(small, lambda i, ebv: ensemble.predict(i.data, ebv, i.mask), EBV, examiners=[Photometer(noise=NOISE)])
    found = Detections.concatenate(list(Search(Survey(128, 128), looked)))
    again = Detections.concatenate(list(ForcedSearch(Survey(128, 128), looker(small, ensemble), found.boxes)))
    assert len(found) > 10
    for name in ("weights", "means", "sigmas", "ebv"):
        np.testing.assert_allclose(getattr(again, name), getattr(found, name), atol=1e-5, err_msg=name)
    for name in found.extra:
        np.testing.assert_allclose(again.extra[name], found.extra[name], rtol=1e-4, err_msg=name)


def test_rows_come_in_their_order_whatever_the_order(
    mosaic: Mosaic, ensemble: Ensemble, found: Detections, rng: np.random.Generator
) -> None:
    order = rng.permutation(len(found))
    one, other = forced(mosaic, ensemble, found.boxes), forced(mosaic, ensemble, found.boxes[order])
    np.testing.assert_array_equal(other.boxes, found.boxes[order])
    np.testing.assert_allclose(other.means, one.means[order], atol=1e-5)
    np.testing.assert_allclose(other.extra["flux"], one.extra["flux"][order], rtol=1e-4)


def test_what_is_nowhere_keeps_its_row(mosaic: Mosaic, ensemble: Ensemble) -> None:
    nan = np.nan
    boxes = np.array(
        [[90, 90, 100, 100], [-50, 20, -30, 40], [10, 220, 20, 230], [nan, nan, nan, nan], [50, 195, 70, 215], [230, 10, 245, 25]]
    )
    seen = forced(mosaic, ensemble, boxes)
    np.testing.assert_array_equal((seen.flags & Flag.NO_DATA) > 0, [False, True, True, True, False, False])
    np.testing.assert_array_equal((seen.flags & Flag.MASKED) > 0, [False, False, False, False, True, False])
    np.testing.assert_array_equal(seen.n_members, [1, 0, 0, 0, 1, 1])
    np.testing.assert_allclose(seen.weights.sum(axis=1), [1, 0, 0, 0, 1, 1], atol=1e-5)
    assert seen.flags[5] & Flag.EDGE
    assert np.isfinite(seen.extra["flux"][0]).all()
    assert np.isnan(seen.extra["flux"][[1, 2, 3]]).all()


@pytest.mark.parametrize("boxes", [np.zeros((0, 4)), np.full((2, 4), np.nan)])
def test_a_list_of_nothing_has_the_columns_of_any(mosaic: Mosaic, ensemble: Ensemble, boxes: Array) -> None:
    seen = forced(mosaic, ensemble, boxes)
    assert len(seen) == len(boxes)
    assert seen.weights.shape[1] == ensemble.components
    assert set(seen.extra) == {"flux", "flux_err", "flux_iso", "flux_iso_err"}


def test_a_box_that_a_window_cuts_is_seen_whole_in_another() -> None:
    """Windows of 192 share 64 px, and some boxes are larger; a box larger than any window stays cut."""
    pixels = np.random.default_rng(1).random((600, 600), np.float32)
    mosaic = Mosaic([Plane("g", Path("memory"), 0, 0, pixels.shape, None, 1.0, MemoryPixels(pixels))], 0.2)
    boxes = np.array([[90, 20, 220, 60], [300, 300, 310, 310], [40, 250, 590, 330], [100, 100, 400, 500]], np.float32)

    def means(image: SkyImage, boxes: Array, _: EbvPlane) -> Detections:
        """The mean pixel of a box, as far as the window shows it, in the place of the redshift."""
        corners = boxes.clip(0).astype(int)
        mean = np.array([[image.data[0, y0:y1, x0:x1].mean()] for x0, y0, x1, y1 in corners], np.float32).reshape(-1, 1)
        ones, index = np.ones_like(mean), np.zeros(len(boxes), np.int32)
        return Detections(boxes, ones[:, 0], index, ones, mean, ones, ones[:, 0], index + 1, index + 8)

    seen = Detections.concatenate(list(ForcedSearch(Survey(600, 600, 192, 64), ForcedLooker(mosaic, means, EBV), boxes)))
    expected = [pixels[y0:y1, x0:x1].mean() for x0, y0, x1, y1 in boxes.astype(int)]
    whole = np.array([True, True, False, True])
    np.testing.assert_array_equal((seen.flags & Flag.TRUNCATED) == 0, whole)
    np.testing.assert_allclose(seen.means[whole, 0], np.array(expected)[whole], rtol=1e-5)


def test_the_photometry_does_not_depend_on_windows(mosaic: Mosaic, ensemble: Ensemble, found: Detections) -> None:
    one, other = (forced(mosaic, ensemble, found.boxes, window) for window in (192, 512))
    small = (found.boxes[:, 2:] - found.boxes[:, :2]).max(axis=1) < 30
    for name in ("flux", "flux_iso"):
        np.testing.assert_allclose(one.extra[name][small], other.extra[name][small], rtol=1e-4, atol=1e-2, err_msg=name)


def test_an_interrupted_list_goes_on(mosaic: Mosaic, ensemble: Ensemble, found: Detections, spaced: Path) -> None:
    whole, seen = forced(mosaic, ensemble, found.boxes), list[int]()

    def count(image: SkyImage, boxes: Array, ebv: EbvPlane) -> Detections:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(boxes))
        return looker(mosaic, ensemble).redshift(image, boxes, ebv)

    counted = replace(looker(mosaic, ensemble), redshift=count)
    journal = Journal(spaced / "journal", {})
    for _ in range(20):
        try:
            parts = list(ForcedSearch(Survey(SIDE, SIDE, 192, 64), counted, found.boxes, journal=journal, scratch=journal.folder))
            break
        except KeyboardInterrupt:
            seen.clear()
    np.testing.assert_array_equal(Detections.concatenate(parts).means, whole.means)
    assert all(path.suffix == ".npz" or path.name == "run.json" for path in journal.folder.iterdir())


class Some(Search):
    """A search that finds ``objects`` in two parts."""

    def __init__(self, objects: Detections) -> None:
        Notes.__init__(self)
        self._found = objects

    def __iter__(self) -> Iterator[Detections]:
        yield from (self._found.select(part) for part in np.array_split(np.arange(len(self._found)), 2))


def test_the_missing_are_appended_and_both_have_the_columns(
    mosaic: Mosaic, ensemble: Ensemble, found: Detections, spaced: Path
) -> None:
    """The untrained network finds something everywhere: an eighth of it leaves room for an object that is missing."""
    found = found.select(np.arange(0, len(found), 8))
    places = np.stack(np.meshgrid(np.arange(20, 220), np.arange(20, 180)), axis=-1).reshape(-1, 2)
    apart = np.sqrt(((places[:, None] - found.centres) ** 2).sum(axis=2)).min(axis=1)
    assert apart.max() > 6
    x, y = places[apart.argmax()]
    moved = found.boxes[::3] + np.float32(0.1)
    new = np.array([[x - 4, y - 4, x + 4, y + 4], [1000, 1000, 1010, 1010]], np.float32)
    boxes = np.concatenate([new[:1], moved, new[1:]])
    given = Given(boxes, {"given_id": np.arange(len(boxes)) + 100, "given_name": np.array([f"g{i}" for i in range(len(boxes))])})

    def missing(boxes: Array, others: Array) -> ForcedSearch:
        assert len(others) == len(found)
        return ForcedSearch(Survey(SIDE, SIDE, 192, 64), looker(mosaic, ensemble), boxes, neighbours=others)

    both = CompletedSearch(Some(found), given, 2.5, missing)
    path = spaced / "c.parquet"
    write_mosaic(both, [path], bands=mosaic.bands, wcs=mosaic.wcs)
    table = read_catalog(path)
    added = (np.asarray(table["flags"]) & Flag.FORCED) > 0
    np.testing.assert_array_equal(np.asarray(table["given_id"])[added], [100, 99 + len(boxes)])
    np.testing.assert_array_equal(np.flatnonzero(added), [len(found), len(found) + 1])
    rows = np.asarray(table["given_row"])
    assert sorted(rows[rows >= 0]) == list(range(len(boxes)))
    linked = np.flatnonzero((rows >= 0) & ~added)
    centres = np.stack([table[name][linked] for name in ("x", "y")], axis=1) + 0.5
    assert np.abs(centres - (boxes[rows[linked], :2] + boxes[rows[linked], 2:]) / 2).max() < 2.5
    assert (np.asarray(table["given_name"])[rows < 0] == "").all()
    assert np.isnan(table["z_mode"][-1])
    assert np.isfinite(table["z_mode"][-2])


def test_a_list_of_all_is_a_catalogue_row_for_row_in_every_format(
    mosaic: Mosaic, ensemble: Ensemble, found: Detections, spaced: Path, rng: np.random.Generator
) -> None:
    boxes = np.concatenate([found.boxes[rng.permutation(len(found))], np.full((1, 4), np.nan, np.float32)])
    ids = rng.permutation(len(boxes))
    given = Given(boxes, {"given_id": ids})
    objects = GivenSearch(ForcedSearch(Survey(SIDE, SIDE, 192, 64), looker(mosaic, ensemble), boxes), given)
    paths = [spaced / f"c{ending}" for ending in (".parquet", ".fits", ".hdf5", ".ecsv", ".reg")]
    assert write_mosaic(objects, paths, bands=mosaic.bands, wcs=mosaic.wcs) == len(boxes)
    for path in paths[:-1]:
        table = read_catalog(path)
        np.testing.assert_array_equal(table["given_id"], ids)
        np.testing.assert_array_equal(np.asarray(table["x0"], np.float32), boxes[:, 0])
        np.testing.assert_array_equal(np.isfinite(table["z_mode"]), np.arange(len(boxes)) < len(found))
        assert len(set(table["id"])) == len(boxes)
    assert paths[-1].read_text().count("polygon") == len(found)


def test_the_sky_list_of_a_wcs(spaced: Path) -> None:
    """Positions and sizes become squares of pixels; what is on the other side of the sky has none."""
    from deepdisc_ops.sky.given import read_given

    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.crpix = ["RA---TAN", "DEC--TAN"], [10.0, 20.0], [50.5, 50.5]
    wcs.wcs.cdelt = [-0.2 / 3600, 0.2 / 3600]
    plane = np.zeros((100, 100), np.float32)
    mosaic = Mosaic([Plane("g", Path("memory"), 0, 0, plane.shape, wcs, 1.0, MemoryPixels(plane))], 0.2)
    ra, dec = wcs.pixel_to_world_values([20.0, 70.0], [30.0, 40.0])
    table = Table({"ra": [*ra, 190.0], "dec": [*dec, -20.0], "size": [2.0, 4.0, 2.0], "name": ["a", "b", "c"]})
    table.write(spaced / "list.fits")
    for size, sides in ((2.0, [10, 10]), ("size", [10, 20])):
        given = read_given(spaced / "list.fits", mosaic, ["name"], size)
        half = np.array(sides) / 2
        expected = np.stack([20.5 - half[0], 30.5 - half[0], 20.5 + half[0], 30.5 + half[0]])
        np.testing.assert_allclose(given.boxes[0], expected, atol=1e-3)
        np.testing.assert_allclose(given.boxes[1, 2:] - given.boxes[1, :2], half[1] * 2, atol=1e-3)
        assert np.isnan(given.boxes[2]).all()
        assert list(given.columns["given_name"]) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("columns", "size", "message"),
    [
        ({"ra": [1.0], "dec": [2.0]}, None, "has positions and no boxes .* give the boxes' side"),
        ({"x": [1.0]}, None, "has no column x0, y0, x1, y1 in pixels of the mosaic; it has x"),
        ({"x0": [1.0], "y0": [1.0], "x1": [1.0], "y1": [3.0]}, None, "1 of 1 boxes .* have no extent, the first in row 0"),
        ({"ra": [1.0], "dec": [2.0]}, "size", "has no column size of the boxes' sides"),
        ({"ra": [1.0], "dec": [95.0]}, 2.0, "1 of 1 rows .* dec 95, size 2"),
        ({"x0": ["a"], "y0": [1.0], "x1": [1.0], "y1": [3.0]}, None, "column x0 holds no numbers"),
    ],
)
def test_lists_that_are_none(
    mosaic: Mosaic, spaced: Path, columns: dict[str, list[float]], size: str | float | None, message: str
) -> None:
    from deepdisc_ops.errors import CatalogError
    from deepdisc_ops.sky.given import read_given

    Table(columns).write(spaced / "list.ecsv")
    with pytest.raises(CatalogError, match=message):
        read_given(spaced / "list.ecsv", mosaic, (), size)
