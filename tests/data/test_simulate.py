from __future__ import annotations

from pathlib import Path

import pytest
from astropy.io import fits

from deepdisc_ops.config import SkySettings
from deepdisc_ops.data import simulate
from deepdisc_ops.data.pixels import close_files, read_pixels
from deepdisc_ops.data.records import SPLITS, Record, Reference
from deepdisc_ops.data.store import Dataset, open_dataset
from deepdisc_ops.errors import CatalogError, ConfigError

COUNTS = {"train": 2, "validation": 1}
ARGUMENTS = {"counts": COUNTS, "size": 96, "seed": 3}


def contents(dataset: Dataset) -> list[tuple[object, ...]]:
    """All that records hold, but for where their pixels lie."""
    found: list[tuple[object, ...]] = []
    for record in dataset.records():
        objects = record.objects
        columns = [getattr(objects, name).tobytes() for name in ("ids", "boxes", "classes", "redshift", "mag", "ra", "dec", "ebv")]
        image = read_pixels(record)
        found.append(
            (record.key, record.split, record.wcs, *columns, str(objects.masks), image.data.tobytes(), image.mask.tobytes())
        )
    return found


def pixels(folder: Path) -> dict[str, list[bytes]]:
    found = {}
    for path in sorted((folder / "images").glob("*.fits")):
        with fits.open(path) as hdus:
            found[path.name] = [hdu.data.tobytes() for hdu in hdus[1:]]
    return found


def test_no_two_scenes_share_a_seed() -> None:
    seeds = {simulate.scene_seed(base, split, index) for base in (0, 1) for split in SPLITS for index in range(300)}
    assert len(seeds) == 2 * len(SPLITS) * 300


def test_an_interrupted_run_goes_on_and_equals_one_that_was_not(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        simulate.simulate_dataset(SkySettings(), tmp_path / "one", **ARGUMENTS, progress=stop)  # type: ignore[arg-type]
    assert len(open_dataset(tmp_path / "one")) == 1
    first = tmp_path / "one" / "images" / "train_00000.fits"
    made = first.stat().st_mtime_ns
    (first.parent / ".train_00001.fits.part").write_bytes(b"half")
    (first.parent / "validation_00000.fits").write_bytes(first.read_bytes()[:-6000])
    steps: list[tuple[int, int]] = []
    dataset = simulate.simulate_dataset(
        SkySettings(),
        tmp_path / "one",
        **ARGUMENTS,
        progress=lambda *step: steps.append(step),  # type: ignore[arg-type]
    )
    assert first.stat().st_mtime_ns == made
    assert steps == [(1, 3), (2, 3), (3, 3)]
    whole = simulate.simulate_dataset(SkySettings(), tmp_path / "two", **ARGUMENTS, processes=2)  # type: ignore[arg-type]
    assert pixels(tmp_path / "one") == pixels(tmp_path / "two")
    assert contents(dataset) == contents(whole)
    assert (tmp_path / "one" / "dataset.yaml").read_text() == (tmp_path / "two" / "dataset.yaml").read_text()
    assert dataset.splits == ("train", "validation")
    assert [file_of(record) for record in dataset.records("train")] == ["train_00000.fits", "train_00001.fits"]


def file_of(record: Record) -> str:
    assert isinstance(record.pixels, Reference)
    return record.pixels.paths[0].name


def test_a_scene_whose_file_is_gone_is_made_again(tmp_path: Path) -> None:
    dataset = simulate.simulate_dataset(SkySettings(), tmp_path, **ARGUMENTS)  # type: ignore[arg-type]
    before = contents(dataset)
    (tmp_path / "images" / "train_00001.fits").unlink()
    close_files()
    assert contents(simulate.simulate_dataset(SkySettings(), tmp_path, **ARGUMENTS)) == before  # type: ignore[arg-type]


def test_packed_pixels_are_those_of_the_files(tmp_path: Path) -> None:
    sky = SkySettings(survey="hsc", artifacts=("trail", "missing_band", "spikes"))
    files = simulate.simulate_dataset(sky, tmp_path / "files", **ARGUMENTS)  # type: ignore[arg-type]
    packed = simulate.simulate_dataset(sky, tmp_path / "packed", **ARGUMENTS, packed=True)  # type: ignore[arg-type]
    assert contents(files) == contents(packed)
    assert not list((tmp_path / "packed" / "images").iterdir())
    again = simulate.simulate_dataset(sky, tmp_path / "packed", **ARGUMENTS, packed=True)  # type: ignore[arg-type]
    assert contents(again) == contents(packed)


def test_a_folder_is_not_mixed_with_other_settings(tmp_path: Path) -> None:
    simulate.simulate_dataset(SkySettings(), tmp_path, counts={"train": 1}, size=32)
    grown = simulate.simulate_dataset(SkySettings(), tmp_path, counts={"train": 2, "test": 1}, size=32)
    assert (len(grown.records("train")), len(grown.records("test"))) == (2, 1)
    with pytest.raises(ConfigError, match="size 32 there, 64 asked"):
        simulate.simulate_dataset(SkySettings(), tmp_path, counts={"train": 1}, size=64)
    with pytest.raises(ConfigError, match="clustering"):
        simulate.simulate_dataset(SkySettings(clustering=0.9), tmp_path, counts={"train": 1}, size=32)
    with pytest.raises(ConfigError, match="packed False there, True asked"):
        simulate.simulate_dataset(SkySettings(), tmp_path, counts={"train": 1}, size=32, packed=True)


def test_splits_may_have_settings_of_their_own(tmp_path: Path) -> None:
    settings = {"train": SkySettings(years=1.0), "test": SkySettings(years=5.0)}
    dataset = simulate.simulate_dataset(settings, tmp_path / "own", counts={"train": 1}, size=64)
    dataset = simulate.simulate_dataset(settings, tmp_path / "own", counts={"test": 1}, size=64)
    one, other = (read_pixels(dataset.records(split)[0]).data for split in ("train", "test"))
    assert one[3].std() > 1.2 * other[3].std()
    with pytest.raises(ConfigError, match="no settings for split validation"):
        simulate.simulate_dataset(settings, tmp_path / "own", counts={"validation": 1}, size=64)
    with pytest.raises(ConfigError, match="surveys hsc, lsst, expected one"):
        simulate.simulate_dataset({"train": SkySettings(), "test": SkySettings(survey="hsc")}, tmp_path / "two", counts={})


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown split 'training'"):
        simulate.simulate_dataset(SkySettings(), tmp_path, counts={"training": 1})


def test_training_scenes_lie_at_different_places(tmp_path: Path) -> None:
    dataset = simulate.simulate_dataset(SkySettings(), tmp_path, counts={"train": 2}, size=128, seed=1)
    one, other = (record.objects.ra.mean() for record in dataset.records("train"))
    assert abs(one - other) > 0.1


def test_a_file_changed_since_is_noticed(tmp_path: Path) -> None:
    dataset = simulate.simulate_dataset(SkySettings(), tmp_path, counts={"train": 1}, size=32)
    with (tmp_path / "images" / "train_00000.fits").open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"x" * 50)
    with pytest.raises(CatalogError, match="was changed since"):
        read_pixels(dataset.records("train")[0])
