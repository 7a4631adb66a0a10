from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdisc_ops.data import records
from deepdisc_ops.data.truth import run_lengths
from deepdisc_ops.errors import CatalogError


def make_objects(count: int, seed: int = 0, masks: bool = True) -> records.Objects:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 50, (count, 2))
    redshift, mag = rng.uniform(0, 3, count), rng.uniform(18, 27, count)
    redshift[::3], mag[1::4] = math.nan, math.nan
    return records.Objects(
        ids=np.arange(count, dtype=np.int64),
        boxes=np.concatenate([corners, corners + rng.uniform(1, 9, (count, 2))], axis=1).astype(np.float32),
        classes=rng.integers(0, 2, count).astype(np.int32),
        redshift=redshift.astype(np.float32),
        mag=mag.astype(np.float32),
        x=rng.uniform(0, 64, count),
        y=rng.uniform(0, 64, count),
        ra=rng.uniform(0, 360, count),
        dec=rng.uniform(-90, 90, count),
        ebv=rng.uniform(0, 0.1, count).astype(np.float32),
        masks=tuple(run_lengths(rng.uniform(size=(3, 3)) > 0.3, 5, 6, 64, 64) for _ in range(count)) if masks else None,
    )


def make_record(folder: Path, count: int, index: int = 0) -> records.Record:
    return records.Record(folder / "images" / f"one {index}.fits", ("g", "r"), 64, 64, make_objects(count, index))


def assert_same(one: records.Objects, other: records.Objects) -> None:
    for name in records._TYPES:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype
    assert one.masks == other.masks


@settings(max_examples=20)
@given(counts=st.lists(st.integers(0, 6), max_size=4), masks=st.booleans())
def test_records_survive_a_round_trip(tmp_path_factory: pytest.TempPathFactory, counts: list[int], masks: bool) -> None:
    folder = tmp_path_factory.mktemp("with space")
    written = [
        records.Record(folder / "images" / f"{i}.fits", ("u", "g"), 64, 32, make_objects(count, i, masks))
        for i, count in enumerate(counts)
    ]
    records.write_records(folder / "train.jsonl", written)
    read = records.read_records(folder / "train.jsonl")
    assert [(r.image, r.bands, r.width, r.height) for r in read] == [(r.image, r.bands, r.width, r.height) for r in written]
    for one, other in zip(read, written, strict=True):
        assert_same(one.objects, other.objects)


def test_a_dataset_may_be_moved(tmp_path: Path) -> None:
    records.write_records(tmp_path / "train.jsonl", [make_record(tmp_path, 2)])
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    (tmp_path / "train.jsonl").rename(elsewhere / "train.jsonl")
    (record,) = records.read_records(elsewhere / "train.jsonl")
    assert record.image == elsewhere / "images" / "one 0.fits"


def test_no_objects_is_an_ordinary_value() -> None:
    empty = records.Objects.empty()
    assert len(empty) == 0
    assert empty.boxes.shape == (0, 4)
    assert len(make_objects(4).select(np.zeros(4, bool))) == 0


def test_selection_keeps_columns_together() -> None:
    objects = make_objects(8)
    chosen = objects.select(np.array([6, 1]))
    assert chosen.ids.tolist() == [6, 1]
    assert chosen.masks == (objects.masks[6], objects.masks[1])
    assert_same(objects.select(np.isin(objects.ids, [1, 6])), objects.select(np.array([1, 6])))


def test_unequal_columns_are_refused() -> None:
    columns = {name: getattr(make_objects(3), name) for name in records._TYPES}
    with pytest.raises(CatalogError, match="ids has 3 objects, but x has 2"):
        records.Objects(**columns | {"x": np.zeros(2)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda text: text.replace('"boxes"', '"boxen"'), "'boxes' is missing"),
        (lambda text: text.replace('"ids":[0,1]', '"ids":[0]'), "unequal length"),
        (lambda text: text.replace('"ids":[0,1]', '"ids":["a","b"]'), "not a record"),
        (lambda text: "[1, 2]", "not a record"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, damage: object, message: str) -> None:
    path = tmp_path / "train.jsonl"
    records.write_records(path, [make_record(tmp_path, 1), make_record(tmp_path, 2, 1)])
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{damage(second)}\n")  # type: ignore[operator]
    with pytest.raises(CatalogError, match=f"train.jsonl, line 2: .*{message}"):
        records.read_records(path)


def test_infinite_values_are_refused(tmp_path: Path) -> None:
    objects = make_objects(2)
    objects.ra[0] = math.inf
    record = records.Record(tmp_path / "a.fits", ("g",), 64, 64, objects)
    with pytest.raises(CatalogError, match="objects.ra"):
        records.write_records(tmp_path / "train.jsonl", [record])
    assert not (tmp_path / "train.jsonl").exists()


def test_a_folder_without_a_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="is no dataset"):
        records.open_dataset(tmp_path)
    (tmp_path / "dataset.yaml").write_text("survey: lsst\n")
    with pytest.raises(CatalogError, match="lacks bands, pixel_scale"):
        records.open_dataset(tmp_path)
    (tmp_path / "dataset.yaml").write_text("survey: [\n")
    with pytest.raises(CatalogError, match="not valid YAML"):
        records.open_dataset(tmp_path)


@given(st.integers(1, 60), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 5))
def test_smaller_shares_lie_inside_larger_ones(count: int, one: float, other: float, seed: int) -> None:
    made = [records.Record(Path(f"/{i}"), ("g",), 1, 1, records.Objects.empty()) for i in range(count)]
    small, large = (records.subset(made, share, seed) for share in sorted((one, other)))
    names = [record.image for record in large]
    assert {record.image for record in small} <= set(names)
    assert names == [record.image for record in made if record.image in set(names)]
    assert len(records.subset(made, 1.0, seed)) == count


def test_a_share_is_rounded_up_and_checked() -> None:
    made = [make_record(Path("/a"), 0, i) for i in range(10)]
    assert [len(records.subset(made, share, 1)) for share in (0.01, 0.1, 0.11, 0.7)] == [1, 1, 2, 7]
    with pytest.raises(CatalogError, match="fraction is 0"):
        records.subset(made, 0, 1)
