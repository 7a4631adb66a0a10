from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdisc_ops.data import shards, store
from deepdisc_ops.data.pixels import close_files, read_pixels
from deepdisc_ops.data.records import COLUMNS, OPTIONAL, DatasetInfo, Objects, Packed, Record, Reference
from deepdisc_ops.data.store import Dataset, create_dataset, open_dataset, verify
from deepdisc_ops.data.writer import DatasetWriter
from deepdisc_ops.errors import CatalogError, ConfigError
from deepdisc_ops.sky.images import SkyImage
from deepdisc_ops.sky.tiling import Window

BANDS = ("g", "r")
INFO = DatasetInfo("lsst", BANDS, 0.2, "i", 7)


@pytest.fixture(autouse=True)
def _forget_files() -> Iterator[None]:
    yield
    close_files()


def make_objects(count: int, seed: int = 0, side: int = 16) -> Objects:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(-3, 50, (count, 2))
    return Objects(
        ids=rng.permutation(count).astype(np.int64),
        boxes=np.concatenate([corners, corners + rng.uniform(1, 9, (count, 2))], axis=1).astype(np.float32),
        classes=rng.integers(0, 2, count).astype(np.int32),
        redshift=np.where(rng.random(count) < 0.3, np.nan, rng.uniform(0, 3, count)).astype(np.float32),
        mag=rng.uniform(18, 27, count).astype(np.float32),
        x=rng.uniform(0, 64, count),
        y=rng.uniform(0, 64, count),
        ra=rng.uniform(10, 10.01, count),
        dec=rng.uniform(-30, -29.99, count),
        ebv=rng.uniform(0, 0.1, count).astype(np.float32),
        masks=tuple({"size": [side, side], "counts": f"<0{i}"} for i in range(count)),
    )


def make_record(key: str, count: int = 3, seed: int = 0, side: int = 16, **fields: Any) -> Record:
    return Record(key, Reference(()), BANDS, side, side, make_objects(count, seed, side), **fields)


def make_image(seed: int = 0, width: int = 16, height: int = 16, invalid: float = 0.1) -> SkyImage:
    rng = np.random.default_rng(seed)
    bad = rng.random((len(BANDS), height, width)) < invalid
    data = np.where(bad, 0, rng.normal(size=bad.shape)).astype(np.float32)
    return SkyImage(data, BANDS, None, 0.2, bad.any(axis=0), invalid=bad)


def write(path: Path, keys: list[str]) -> Dataset:
    with DatasetWriter(create_dataset(path, INFO), packed=True) as writer:
        for i, key in enumerate(keys):
            writer.add(make_record(key, i % 4, i), make_image(i))
    return open_dataset(path)


def assert_same_objects(one: Objects, other: Objects) -> None:
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), strict=True)
    assert one.masks == other.masks
    assert one.extra == other.extra


def assert_same_image(one: SkyImage, other: SkyImage) -> None:
    np.testing.assert_array_equal(one.data, other.data)
    np.testing.assert_array_equal(one.mask, other.mask)
    assert one.bands == other.bands
    whole = one.mask if one.invalid is None else one.invalid
    expected = other.mask if other.invalid is None else other.invalid
    np.testing.assert_array_equal(np.broadcast_to(whole, one.data.shape), np.broadcast_to(expected, one.data.shape))


numbers = st.floats(-(2.0**90), 2.0**90, width=32)
texts = st.text(max_size=12)


@st.composite
def objects(draw: st.DrawFn, width: int, height: int) -> Objects:
    count = draw(st.integers(0, 3))

    def column(name: str, length: int) -> np.ndarray:
        values = {"classes": st.integers(0, 1), "redshift": st.floats(0, 2.0**90, width=32)}.get(name, numbers)
        if name in OPTIONAL:
            values = values | st.just(np.nan)
        return np.array(draw(st.lists(values, min_size=length, max_size=length)), COLUMNS[name])

    columns = {name: column(name, count) for name in COLUMNS if name not in ("ids", "boxes")}
    columns["ids"] = np.array(
        draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=count, max_size=count, unique=True)), np.int64
    )
    corners = np.sort(column("boxes", 4 * count).reshape(count, 2, 2), axis=1)
    corners[:, 1] = np.maximum(corners[:, 1], np.nextafter(corners[:, 0], np.float32(np.inf)))
    columns["boxes"] = corners.reshape(count, 4)
    columns["dec"] = np.clip(columns["dec"], -90, 90)
    mask = st.fixed_dictionaries({"size": st.just([height, width]), "counts": texts})
    some = {
        name: st.none() | st.lists(kind, min_size=count, max_size=count).map(tuple)
        for name, kind in (("masks", mask), ("extra", texts))
    }
    return Objects(**columns, **{name: draw(strategy) for name, strategy in some.items()})


@st.composite
def described_records(draw: st.DrawFn) -> list[Record]:
    keys = draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=3, unique=True))
    sizes = [(draw(st.integers(1, 9)), draw(st.integers(1, 9))) for _ in keys]
    return [
        Record(
            key,
            Reference(()),
            BANDS,
            width,
            height,
            draw(objects(width, height)),
            split=draw(st.sampled_from(["", "train", "test"])),
            origin=draw(texts),
            extra=draw(texts),
        )
        for key, (width, height) in zip(keys, sizes, strict=True)
    ]


@settings(max_examples=40)
@given(described_records(), st.integers(0, 9))
def test_packed_records_survive_a_round_trip(tmp_path_factory: pytest.TempPathFactory, written: list[Record], seed: int) -> None:
    folder = tmp_path_factory.mktemp("with space") / "set"
    images = {record.key: make_image(seed, record.width, record.height, 0.2) for record in written}
    with DatasetWriter(create_dataset(folder, INFO), packed=True) as writer:
        for record in written:
            writer.add(record, images[record.key])
    dataset = open_dataset(folder)
    assert dataset.records().keys.tolist() == sorted(record.key for record in written)
    for read, record in zip(dataset.records(), sorted(written, key=lambda record: record.key), strict=True):
        assert_same_objects(read.objects, record.objects)
        assert replace(read, objects=record.objects, pixels=record.pixels) == record
        assert_same_image(read_pixels(read), images[record.key])
    assert verify(dataset) == []


@settings(max_examples=25)
@given(
    window=st.none() | st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(4, 8), st.integers(4, 8)),
    zero_point=st.none() | st.floats(20, 32),
    plane_bands=st.none() | st.just(("g", "r", "i")),
    pixel_scale=st.none() | st.floats(0.01, 1),
    blank=st.none() | st.just(0.0),
    inside=st.booleans(),
    found=objects(8, 8),
)
def test_references_survive_a_round_trip_and_a_move(
    tmp_path_factory: pytest.TempPathFactory,
    window: tuple[int, int, int, int] | None,
    zero_point: float | None,
    plane_bands: tuple[str, ...] | None,
    pixel_scale: float | None,
    blank: float | None,
    inside: bool,
    found: Objects,
) -> None:
    top = tmp_path_factory.mktemp("with space")
    dataset = create_dataset(top / "set", INFO)
    paths = tuple((dataset.path if inside else top / "images") / f"{band} band.fits" for band in BANDS)
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(path.name.encode())
    corners = None if window is None else Window(*window)
    reference = Reference(paths, corners, zero_point, plane_bands, pixel_scale, blank)
    record = Record("one", reference, BANDS, 8, 8, found)
    with DatasetWriter(dataset) as writer:
        writer.add(record)
    (read,) = open_dataset(dataset.path).records()
    assert_same_objects(read.objects, found)
    assert isinstance(read.pixels, Reference)
    assert len(read.pixels.fingerprints) == len(BANDS)
    assert replace(read.pixels, fingerprints=()) == reference
    (top / "set").rename(top / "moved")
    (moved,) = open_dataset(top / "moved").records()
    expected = tuple(top / "moved" / path.name for path in paths) if inside else paths
    assert moved.pixels == replace(read.pixels, paths=expected)


def test_images_outside_of_a_data_set_are_found_when_both_move_and_when_it_moves_alone(tmp_path: Path) -> None:
    image = tmp_path / "project" / "images" / "a.fits"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"pixels")
    with DatasetWriter(create_dataset(tmp_path / "project" / "set", INFO)) as writer:
        writer.add(replace(make_record("a"), pixels=Reference((image,))))
    shutil.copytree(tmp_path / "project" / "set", tmp_path / "far" / "away" / "set")
    (alone,) = open_dataset(tmp_path / "far" / "away" / "set").records()
    assert alone.pixels.paths == (image,)
    (tmp_path / "project").rename(tmp_path / "elsewhere")
    (together,) = open_dataset(tmp_path / "elsewhere" / "set").records()
    assert together.pixels.paths == (tmp_path / "elsewhere" / "images" / "a.fits",)


def test_records_are_a_lazy_sequence_in_order_of_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepdisc_ops.data.writer.RECORDS_PER_SHARD", 4)
    keys = [f"{i:02d}" for i in range(11)]
    shuffled = keys.copy()
    random.Random(1).shuffle(shuffled)
    dataset = write(tmp_path, shuffled)
    records = dataset.records()
    assert records.keys.tolist() == keys == [record.key for record in records]
    assert records[-1].key == "10"
    assert records[3:9:2].keys.tolist() == ["03", "05", "07"]
    assert [record.key for record in records[np.array([5, 1])]] == ["05", "01"]
    assert records[::-1][2].key == "08"
    again = pickle.loads(pickle.dumps(records[4:6]))  # noqa: S301
    assert [record.key for record in again] == ["04", "05"]
    with pytest.raises(IndexError):
        records[11]
    for name in COLUMNS:
        chosen = records[::-2]
        values, of = chosen.column(name)
        np.testing.assert_array_equal(values, np.concatenate([getattr(record.objects, name) for record in chosen]), strict=True)
        assert of.tolist() == [i for i, record in enumerate(chosen) for _ in range(len(record.objects))]
    with pytest.raises(CatalogError, match="no column 'flux'"):
        records.column("flux")


def test_opening_reads_no_shard_however_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ["a"])
    for i in range(500):  # nothing in them: whoever reads one fails
        (tmp_path / "shards" / f"{i:020d}-host-1-x-256.arrow").touch()

    def refuse(*_: object) -> None:
        raise AssertionError("a shard was opened")

    opened: list[str] = []
    monkeypatch.setattr(store, "open_sealed", refuse)
    monkeypatch.setattr(store, "read_journal", refuse)
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args, **kwargs: opened.append(self.name) or real(self, *args, **kwargs))
    dataset = open_dataset(tmp_path)
    assert dataset._shards.starts[-1] == 500 * 256 + 1
    assert opened == ["dataset.yaml"]


def test_the_hdf5_file_is_one_that_others_can_read(tmp_path: Path) -> None:
    dataset = write(tmp_path, ["a", "b", "c"])
    record = dataset.records()[1]
    assert isinstance(record.pixels, Packed)
    with h5py.File(record.pixels.path) as file:
        assert file["pixels"].shape == (3, 2, 16, 16)
        pixels = file["pixels"][record.pixels.row]
    image = make_image(1)
    np.testing.assert_array_equal(pixels, np.where(image.invalid, np.nan, image.data))


def test_images_of_many_sizes_share_a_few_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 33, (60, 2))
    with DatasetWriter(create_dataset(tmp_path, INFO), packed=True) as writer:
        for i, (width, height) in enumerate(sizes.tolist()):
            writer.add(Record(f"{i:02d}", Reference(()), BANDS, width, height, Objects.empty()), make_image(i, width, height))
    assert len(list(tmp_path.glob("shards/*.h5"))) <= 12
    dataset = open_dataset(tmp_path)
    assert dataset.records().sizes.tolist() == sizes.tolist()
    for i, record in enumerate(dataset.records()):
        assert_same_image(read_pixels(record), make_image(i, *sizes[i].tolist()))
    assert verify(dataset) == []


def test_fractions_without_stored_splits_are_nested_and_stay_as_the_data_set_grows(tmp_path: Path) -> None:
    keys = [f"{i}" for i in range(40)]
    few = set(write(tmp_path, keys).records(fraction=0.3).keys)
    dataset = write(tmp_path, [f"new {i}" for i in range(2)])
    shares = [set(dataset.records(fraction=share).keys) for share in (0.01, 0.3, 0.7, 1)]
    assert shares[0] < shares[1] < shares[2] < shares[3]
    assert [len(share) for share in shares] == [1, 13, 30, 42]
    assert len(few & shares[1]) >= 11
    with pytest.raises(CatalogError, match="fraction is 0"):
        dataset.records(fraction=0)


def test_splits_of_the_records_count_where_none_are_stored(tmp_path: Path) -> None:
    with DatasetWriter(create_dataset(tmp_path, INFO), packed=True) as writer:
        for i, split in enumerate(["test", "train", "", "train"]):
            writer.add(make_record(f"{i}", split=split), make_image(i))
    dataset = open_dataset(tmp_path)
    assert dataset.splits == ("train", "test")
    assert dataset.records("train").keys.tolist() == ["1", "3"]
    with pytest.raises(CatalogError, match="no record in split 'validation' .*train, test"):
        dataset.records("validation")
    with pytest.raises(CatalogError, match="unknown split 'dev', expected one of train, validation, calibration, test"):
        dataset.records("dev")
    with pytest.raises(CatalogError, match="no partitions; make them with"):
        dataset.records("train", partition=0)


def test_an_empty_data_set_opens_and_says_that_it_has_no_record(tmp_path: Path) -> None:
    dataset = create_dataset(tmp_path / "new", INFO)
    assert len(dataset) == 0
    assert dataset.splits == ()
    assert verify(dataset) == []
    with pytest.raises(CatalogError, match="no record"):
        dataset.records()


def test_a_data_set_is_opened_again_only_as_what_it_is(tmp_path: Path) -> None:
    create_dataset(tmp_path, INFO, {"years": 5.0})
    assert create_dataset(tmp_path, INFO, {"years": 5.0}).settings == {"years": 5.0}
    with pytest.raises(ConfigError, match=r"years 5.0 there, 1.0 asked"):
        create_dataset(tmp_path, INFO, {"years": 1.0})
    with pytest.raises(ConfigError, match=r'bands \["g", "r"\] there, \["g", "i"\] asked'):
        create_dataset(tmp_path, replace(INFO, bands=("g", "i")))


def test_a_folder_without_a_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="is no data set"):
        open_dataset(tmp_path)
    (tmp_path / "dataset.yaml").write_text("survey: lsst\n")
    with pytest.raises(CatalogError, match="lacks bands, pixel_scale"):
        open_dataset(tmp_path)
    (tmp_path / "dataset.yaml").write_text("survey: [\n")
    with pytest.raises(CatalogError, match="not valid YAML"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (make_record("there"), "holds a record 'there' already"),
        (make_record(""), "empty key"),
        (replace(make_record("new"), bands=("r", "g")), "has the bands r, g, the data set g, r"),
        (replace(make_record("new", 0), width=17), "2 x 16 x 17 in g, r, its image 2 x 16 x 16"),
        (replace(make_record("new"), width=0), "has 0 x 16 pixels"),
        (replace(make_record("new"), objects=replace(make_objects(3), ids=np.array([4, 9, 4]))), "id 4 stands 2 times"),
        (replace(make_record("new"), objects=replace(make_objects(1), x=np.array([np.inf]))), "objects.x holds a value that is no"),
        (replace(make_record("new"), objects=replace(make_objects(1), y=np.array([np.nan]))), "objects.y holds a value that is no"),
        (
            replace(make_record("new"), objects=replace(make_objects(1), masks=({"size": [16, 16], "counts": [0, 256]},))),
            "counts are a list, expected COCO's compressed text",
        ),
        (
            replace(make_record("new"), objects=replace(make_objects(1), masks=({"size": [16, 17], "counts": "<0"},))),
            r"a mask has the size \[16, 17\], expected that of the image, \[16, 16\]",
        ),
        (replace(make_record("new"), objects=replace(make_objects(2), classes=np.array([0, 2]))), "classes is 2 for 1 objects"),
        (
            replace(make_record("new"), objects=replace(make_objects(1), redshift=np.array([-1.0]))),
            "redshift is -1.0 for 1 objects",
        ),
        (
            replace(make_record("new"), objects=replace(make_objects(1), boxes=np.array([[5, 1, 4, 2]]))),
            r"boxes is \[5 1 4 2\] for 1 objects, expected x0 < x1",
        ),
        (replace(make_record("new"), split="trian"), "unknown split 'trian'; expected one of train"),
    ],
)
def test_bad_records_are_refused_and_leave_nothing(tmp_path: Path, record: Record, message: str) -> None:
    dataset = write(tmp_path, ["there"])
    with DatasetWriter(dataset, packed=True) as writer:
        assert "there" in writer
        with pytest.raises(CatalogError, match=message):
            writer.add(record, make_image())
        writer.add(make_record("good"), make_image())
    assert open_dataset(tmp_path).records().keys.tolist() == ["good", "there"]
    assert verify(open_dataset(tmp_path)) == []


def test_references_to_nothing_and_packed_pixels_are_refused_by_a_writer_of_references(tmp_path: Path) -> None:
    packed = write(tmp_path / "packed", ["a"]).records()[0]
    with DatasetWriter(create_dataset(tmp_path / "other", INFO)) as writer:
        with pytest.raises(CatalogError, match="open the writer with packed=True to copy"):
            writer.add(packed)
        with pytest.raises(CatalogError, match="names no image file"):
            writer.add(make_record("b"))
        with pytest.raises(CatalogError, match="gone.fits cannot be read: No such file"):
            writer.add(replace(make_record("b"), pixels=Reference((tmp_path / "gone.fits",))))


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    dataset = write(tmp_path, ["a", "b", "c"])
    record = dataset.records()[1]
    content = record.pixels.path.read_bytes()
    (sealed,) = tmp_path.glob("shards/*.arrow")
    rows = sealed.read_bytes()

    record.pixels.path.write_bytes(content[:-2060] + b"\x01\x02\x03\x04" + content[-2056:])
    close_files()
    assert [fault.split(":")[0] for fault in verify(dataset.refresh())] == ["record 'b'"]
    record.pixels.path.write_bytes(content[:-2000])
    close_files()
    assert any("restore it from a copy" in fault for fault in verify(dataset.refresh()))
    record.pixels.path.write_bytes(content)
    close_files()

    place = rows.index(make_objects(2, 2).x.tobytes())
    sealed.write_bytes(rows[:place] + b"\xff" + rows[place + 1 :])
    assert [fault.split(";")[0] for fault in verify(dataset.refresh())] == [
        f"row 2 of {tmp_path}/shards/{sealed.stem[:-2]} is damaged"
    ]

    sealed.write_bytes(rows[: len(rows) // 2])
    with pytest.raises(CatalogError, match=f"{sealed.name} is no whole shard"):
        dataset.refresh().records()
    assert len(verify(dataset.refresh())) == 1
    sealed.unlink()
    assert len(dataset.refresh()) == 0


def test_a_shard_of_another_version_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    dataset = write(tmp_path, ["a"])
    (sealed,) = tmp_path.glob("shards/*.arrow")
    with pa.ipc.new_file(str(sealed), pa.schema([("key", pa.string())])) as writer:
        writer.write_batch(pa.record_batch({"key": ["a"]}))
    with pytest.raises(CatalogError, match="lacks split, origin, .*written by another version"):
        len(dataset.refresh())


def test_a_journal_torn_anywhere_gives_its_whole_records(tmp_path: Path) -> None:
    dataset = create_dataset(tmp_path, INFO)
    writer = DatasetWriter(dataset, packed=True)
    sizes = []
    for i in range(3):
        writer.add(make_record(f"{i}", 2, i), make_image(i))
        (journal,) = tmp_path.glob("shards/*.arrows")
        sizes.append(journal.stat().st_size)
    content = journal.read_bytes()
    writer.close()
    assert not journal.exists()
    torn = tmp_path / "shards" / "00000000000000000000-elsewhere-1-x.arrows"
    for size in [*range(0, len(content), 97), *sizes, *(size - 1 for size in sizes)]:
        torn.write_bytes(content[:size])
        assert len(shards.read_journal(torn.parent, torn.stem)) == sum(size >= whole for whole in sizes)
    torn.write_bytes(content[: sizes[1]] + bytes(sizes[2] - sizes[1]))  # as a file system may leave it after a power cut
    assert len(shards.read_journal(torn.parent, torn.stem)) == 2


@pytest.mark.parametrize("where", ["in the middle", "at the end"])
def test_a_damaged_journal_of_a_dead_writer_is_sealed_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    dataset = create_dataset(tmp_path, INFO)
    writer = DatasetWriter(dataset, packed=True)
    sizes = []
    for i in range(4):
        writer.add(make_record(f"{i}", 2, i), make_image(i))
        (journal,) = (tmp_path / "shards").glob("*.arrows")
        sizes.append(journal.stat().st_size)
    content = bytearray(journal.read_bytes())
    pixels = journal.with_suffix(".h5").stat().st_size
    for shard in writer._open.values():  # as the kernel does with a process that is killed
        os.close(shard.journal._file)
    spot = (sizes[0] + sizes[1]) // 2 if where == "in the middle" else sizes[3] - 9
    content[spot : spot + 8] = bytes(255 - byte for byte in content[spot : spot + 8])
    journal.write_bytes(content)
    assert shards.seal_abandoned(journal.parent) == 1
    whole = 1 if where == "in the middle" else 3
    assert open_dataset(tmp_path).records().keys.tolist() == [f"{i}" for i in range(whole)]
    assert "torn or damaged and left out" in caplog.text
    assert journal.with_suffix(".damaged").read_bytes() == content
    assert journal.with_suffix(".h5").stat().st_size == pixels


def test_a_full_disk_leaves_no_half_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = DatasetWriter(create_dataset(tmp_path, INFO), packed=True)
    writer.add(make_record("a"), make_image())
    real = os.write

    def fails(file: int, content: Any) -> int:
        real(file, bytes(content)[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fails)
        with pytest.raises(OSError, match="No space left"):
            writer.add(make_record("b"), make_image(1))
    assert "b" not in writer
    writer.add(make_record("b"), make_image(2))
    writer.close()
    dataset = open_dataset(tmp_path)
    assert dataset.records().keys.tolist() == ["a", "b"]
    assert_same_image(read_pixels(dataset.records()[1]), make_image(2))


SERVER = f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import pandas  # which pyarrow imports at the first record
import test_store as here
from deepdisc_ops.data import writer as room
room.RECORDS_PER_SHARD = 8

def work(path, tag, count, pause):
    acknowledged = os.open(path + "/finished " + tag, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with room.DatasetWriter(here.Path(path), packed=True) as writer:
        for i in range(int(count)):
            key = f"{{tag}} {{i:04d}}"
            if key not in writer:
                writer.add(here.make_record(key, i % 4, i), here.make_image(i))
                os.write(acknowledged, (key + "\\n").encode())
                os.fsync(acknowledged)
                time.sleep(float(pause))
        writer.add(here.make_record("shared", 1, os.getpid()), here.make_image()) if tag != "killed" else None

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            work(*line.rstrip("\\n").split("\\t"))
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
"""


class Writers:
    """Processes that write: forked by one that has imported everything, so that twenty of them start quickly."""

    def __init__(self) -> None:
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, path: Path, tag: str, count: int, pause: float = 0.0) -> int:
        self.server.stdin.write(f"{path}\t{tag}\t{count}\t{pause}\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    @staticmethod
    def wait(pid: int) -> None:
        """Until the process has ended; it stays a zombie of the server's."""
        deadline = time.monotonic() + 60
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline, "a writer hangs"
            time.sleep(0.002)


@pytest.fixture(scope="module")
def writers() -> Iterator[Writers]:
    started = Writers()
    yield started
    started.server.communicate(timeout=60)
    assert started.server.returncode == 0


def finished(path: Path, tag: str) -> list[str]:
    file = path / f"finished {tag}"
    return file.read_text().split("\n")[:-1] if file.exists() else []


def test_a_writer_killed_twenty_times_loses_nothing_it_finished(tmp_path: Path, writers: Writers) -> None:
    create_dataset(tmp_path, INFO)
    chance = random.Random(3)
    total = 300
    for _ in range(20):
        before = len(finished(tmp_path, "killed"))
        pid = writers.start(tmp_path, "killed", total)
        while len(finished(tmp_path, "killed")) == before and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        writers.wait(pid)
        there = open_dataset(tmp_path)
        assert set(finished(tmp_path, "killed")) <= set(there.records().keys.tolist())
        assert verify(there) == []
    assert 0 < len(there) < total
    writers.wait(writers.start(tmp_path, "killed", total))
    dataset = open_dataset(tmp_path)
    assert len(dataset) == total
    assert not list(tmp_path.glob("shards/*.arrows"))
    for path in tmp_path.glob("shards/*.h5"):
        with h5py.File(path) as file:  # those of the killed ones have been cut to size too
            assert list(path.parent.glob(f"{path.stem}-{len(file['pixels'])}.arrow"))
    assert verify(dataset) == []
    for i, record in enumerate(dataset.records()):
        assert record.key == f"killed {i:04d}"
        assert_same_objects(record.objects, make_objects(i % 4, i))
        assert_same_image(read_pixels(record), make_image(i))


def test_several_writers_at_once(tmp_path: Path, writers: Writers) -> None:
    create_dataset(tmp_path, INFO)
    pids = [writers.start(tmp_path, f"writer {i}", 60, 0.001) for i in range(3)]
    for pid in pids:
        writers.wait(pid)
    dataset = open_dataset(tmp_path)
    assert len(dataset) == 181
    assert {key.rpartition(" ")[0] for key in dataset.records().keys} == {"writer 0", "writer 1", "writer 2", ""}
    faults = verify(dataset)
    assert [fault.split(";")[0] for fault in faults] in ([], ["record 'shared' stands more than once"])
    assert_same_objects(dataset.records()[0].objects, open_dataset(tmp_path).records()[0].objects)


def test_of_two_records_with_one_key_the_older_shard_holds(tmp_path: Path) -> None:
    create_dataset(tmp_path, INFO)
    first, second = DatasetWriter(tmp_path, packed=True), DatasetWriter(tmp_path, packed=True)
    first.add(make_record("x", 1), make_image(1))
    second.add(make_record("x", 2), make_image(2))
    second.close()
    first.close()
    dataset = open_dataset(tmp_path)
    assert len(dataset) == 1
    assert len(dataset.records()[0].objects) == 1
    assert verify(dataset) == ["record 'x' stands more than once; the shard made first holds"]


def test_readers_see_what_was_finished_when_they_opened(tmp_path: Path, writers: Writers) -> None:
    create_dataset(tmp_path, INFO)
    pid = writers.start(tmp_path, "steady", 120, 0.004)
    seen: list[int] = []
    early = travelled = None
    while not seen or seen[-1] < 121:
        acknowledged = finished(tmp_path, "steady")
        dataset = open_dataset(tmp_path)
        assert set(acknowledged) <= set(dataset._index.keys.tolist())
        if len(dataset):
            for record in dataset.records()[-3:]:
                read_pixels(record)
            if early is None:
                early, travelled = dataset, pickle.dumps(dataset.records())
        seen.append(len(dataset))
        time.sleep(0.01)
    writers.wait(pid)
    assert len(set(seen)) > 5
    assert seen == sorted(seen)
    assert early is not None
    assert len(early) < 121
    assert len(early.refresh()) == 121
    again = pickle.loads(travelled)  # noqa: S301 its journal has been sealed since
    assert [record.key for record in again] == [record.key for record in early.records()]


def test_a_writer_leaves_the_journals_of_the_living_alone(tmp_path: Path) -> None:
    create_dataset(tmp_path, INFO)
    living = DatasetWriter(tmp_path, packed=True)
    living.add(make_record("a"), make_image())
    with DatasetWriter(tmp_path, packed=True) as other:
        assert "a" in other
        assert len(list(tmp_path.glob("shards/*.arrows"))) == 1
        with pytest.raises(CatalogError, match="holds a record 'a' already"):
            other.add(make_record("a"), make_image())
    living.add(make_record("b"), make_image())
    living.close()
    assert open_dataset(tmp_path).records().keys.tolist() == ["a", "b"]
