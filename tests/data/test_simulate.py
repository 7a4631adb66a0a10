from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from deepdisc_ops.data import population, simulate, surveys, truth
from deepdisc_ops.data.records import SPLITS, open_dataset
from deepdisc_ops.errors import CatalogError, ConfigError

LSST = surveys.survey("lsst")
COUNTS = {"train": 2, "validation": 1}


@pytest.fixture(scope="module")
def scene() -> simulate.Scene:
    return simulate.simulate_scene(LSST, size=(200, 160), seed=4)


def pixels(folder: Path) -> dict[str, list[bytes]]:
    found = {}
    for path in sorted((folder / "images").glob("*.fits")):
        with fits.open(path) as hdus:
            found[path.name] = [hdu.data.tobytes() for hdu in hdus[1:]]
    return found


def test_the_same_seed_gives_the_same_bytes(scene: simulate.Scene) -> None:
    again = simulate.simulate_scene(LSST, size=(200, 160), seed=4)
    assert again.image.tobytes() == scene.image.tobytes()
    assert again.truth.to_pandas().equals(scene.truth.to_pandas())
    assert simulate.simulate_scene(LSST, size=(200, 160), seed=5).image.tobytes() != scene.image.tobytes()


def test_a_given_reddening_leaves_the_rest_of_the_scene_alone(scene: simulate.Scene) -> None:
    same = simulate.simulate_scene(LSST, size=(200, 160), seed=4, ebv=scene.ebv)
    assert same.image.tobytes() == scene.image.tobytes()
    redder = simulate.simulate_scene(LSST, size=(200, 160), seed=4, ebv=0.3)
    assert (redder.truth["ebv"] == np.float32(0.3)).all()
    assert redder.noiseless.sum() < scene.noiseless.sum()


def test_boxes_contain_their_centres(scene: simulate.Scene) -> None:
    rows = scene.truth
    assert len(rows) > 30
    assert ((rows["x0"] <= rows["x"] + 0.5) & (rows["x"] + 0.5 <= rows["x1"])).all()
    assert ((rows["y0"] <= rows["y"] + 0.5) & (rows["y"] + 0.5 <= rows["y1"])).all()
    assert (rows["x1"] <= 200).all()
    assert (rows["y1"] <= 160).all()
    assert (rows["snr"] > simulate.TRUTH_SNR).all()


def test_sky_positions_come_home(scene: simulate.Scene) -> None:
    x, y = scene.wcs.wcs_world2pix(scene.truth["ra"], scene.truth["dec"], 0)
    np.testing.assert_allclose(x, scene.truth["x"], atol=1e-6)
    np.testing.assert_allclose(y, scene.truth["y"], atol=1e-6)
    middle = scene.wcs.wcs_pix2world(99.5, 79.5, 0)
    np.testing.assert_allclose(middle, simulate.DEFAULT_CENTRE)


@pytest.mark.parametrize("name", ["lsst", "hsc"])
def test_noise_is_as_stated(name: str) -> None:
    scene = simulate.simulate_scene(surveys.survey(name), size=400, seed=2)
    sky = scene.image - scene.noiseless
    sky -= np.median(sky, axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(sky.std(axis=(1, 2)), scene.noise, rtol=0.12)
    along = (sky[:, :, 1:] * sky[:, :, :-1]).mean(axis=(1, 2)) / sky.var(axis=(1, 2))
    np.testing.assert_allclose(along, scene.survey.noise_correlation, atol=0.12)


def test_true_magnitudes_are_the_flux_in_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = population.draw_population(LSST, 2.0, np.random.default_rng(0))
    magnitude = surveys.to_magnitude(crowd.flux[:, LSST.gold_index])
    (source,) = np.flatnonzero((magnitude > 21) & ~crowd.is_star)[np.argsort(magnitude[(magnitude > 21) & ~crowd.is_star])][:1]
    monkeypatch.setattr(simulate, "draw_population", lambda *_: crowd.select(np.array([source])))
    scene = simulate.simulate_scene(LSST, size=256, seed=1)
    assert len(scene.truth) == 1
    measured = surveys.to_magnitude(scene.noiseless.sum(axis=(1, 2), dtype=float))
    stated = [scene.truth[f"mag_{band}"][0] for band in LSST.bands]
    np.testing.assert_allclose(measured, stated, atol=0.03)


@pytest.mark.parametrize("size", [1, (33, 7)])
def test_small_and_empty_scenes_are_ordinary(size: int | tuple[int, int], tmp_path: Path) -> None:
    scene = simulate.simulate_scene(LSST, size=size, seed=0, density=0.0)
    assert len(scene.truth) == 0
    assert not scene.noiseless.any()
    simulate.write_scene(scene, tmp_path / "empty.fits")
    assert len(simulate.scene_record(tmp_path / "empty.fits").objects) == 0


def test_a_size_without_pixels_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 x 5"):
        simulate.simulate_scene(LSST, size=(0, 5), seed=0)


def test_a_scene_file_holds_everything(scene: simulate.Scene, tmp_path: Path) -> None:
    path = tmp_path / "a scene.fits"
    simulate.write_scene(scene, path)
    assert list(tmp_path.iterdir()) == [path]
    with fits.open(path) as hdus:
        assert [hdu.name for hdu in hdus[1:]] == ["U", "G", "R", "I", "Z", "Y", "TRUTH"]
        assert hdus[0].header["SEED"] == 4
        plane = hdus["I"]
        assert plane.header["FILTER"] == "i"
        unit = 10 ** (0.4 * (31.4 - plane.header["MAGZERO"]))
        np.testing.assert_allclose(plane.data * unit, scene.image[3], rtol=1e-5)
        assert plane.header["SKYSIG"] * unit == pytest.approx(scene.noise[3])
        ra, dec = WCS(plane.header).wcs_pix2world(hdus["TRUTH"].data["x"], hdus["TRUTH"].data["y"], 0)
        np.testing.assert_allclose(ra, hdus["TRUTH"].data["ra"])
        np.testing.assert_allclose(dec, hdus["TRUTH"].data["dec"])


def test_records_list_the_objects_above_five_sigma(scene: simulate.Scene, tmp_path: Path) -> None:
    simulate.write_scene(scene, tmp_path / "s.fits")
    record = simulate.scene_record(tmp_path / "s.fits")
    bright = scene.truth[scene.truth["snr"] > 5]
    assert (record.width, record.height) == (200, 160)
    np.testing.assert_array_equal(record.objects.ids, bright["id"])
    np.testing.assert_array_equal(record.objects.mag, bright["mag_i"])
    for box, mask in zip(record.objects.boxes, record.objects.masks or (), strict=True):
        rows, columns = np.nonzero(truth.decode(mask))
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == tuple(box)


def test_no_two_scenes_share_a_seed() -> None:
    seeds = {simulate.scene_seed(base, split, index) for base in (0, 1) for split in SPLITS for index in range(300)}
    assert len(seeds) == 2 * len(SPLITS) * 300


def test_an_interrupted_run_goes_on_and_equals_one_that_was_not(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stopped

    arguments = {"counts": COUNTS, "size": 96, "seed": 3}
    with pytest.raises(Stopped):
        simulate.simulate_dataset(LSST, tmp_path / "one", **arguments, progress=stop)  # type: ignore[arg-type]
    with pytest.raises(CatalogError, match="no split 'train'"):
        open_dataset(tmp_path / "one").records("train")
    first = tmp_path / "one" / "images" / "train_00000.fits"
    made = first.stat().st_mtime_ns
    (first.parent / ".train_00001.fits.part").write_bytes(b"half")
    (first.parent / "validation_00000.fits").write_bytes(first.read_bytes()[:-6000])
    steps: list[tuple[int, int]] = []
    dataset = simulate.simulate_dataset(LSST, tmp_path / "one", **arguments, progress=lambda *step: steps.append(step))  # type: ignore[arg-type]
    assert first.stat().st_mtime_ns == made
    assert steps == [(1, 3), (2, 3), (3, 3)]
    simulate.simulate_dataset(LSST, tmp_path / "two", **arguments, processes=2)  # type: ignore[arg-type]
    assert pixels(tmp_path / "one") == pixels(tmp_path / "two")
    for name in ("train.jsonl", "validation.jsonl", "dataset.yaml"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    assert dataset.splits == ("train", "validation")
    assert dataset.info.bands == LSST.bands
    assert [record.image.name for record in dataset.records("train")] == ["train_00000.fits", "train_00001.fits"]


def test_a_folder_is_not_mixed_with_other_settings(tmp_path: Path) -> None:
    simulate.simulate_dataset(LSST, tmp_path, counts={"train": 1}, size=32)
    grown = simulate.simulate_dataset(LSST, tmp_path, counts={"train": 2, "test": 1}, size=32)
    assert (len(grown.records("train")), len(grown.records("test"))) == (2, 1)
    with pytest.raises(ConfigError, match="size 32 there, 64 asked"):
        simulate.simulate_dataset(LSST, tmp_path, counts={"train": 1}, size=64)


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown split 'training'"):
        simulate.simulate_dataset(LSST, tmp_path, counts={"training": 1})


def test_training_scenes_lie_at_different_places(tmp_path: Path) -> None:
    dataset = simulate.simulate_dataset(LSST, tmp_path, counts={"train": 2}, size=128, seed=1)
    one, other = (record.objects.ra.mean() for record in dataset.records("train"))
    assert abs(one - other) > 0.1
