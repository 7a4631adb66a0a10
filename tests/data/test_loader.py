from __future__ import annotations

import multiprocessing
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS, Sip
from hypothesis import given
from hypothesis import strategies as st

from deepdisc_ops.config import AugmentSettings, DataSettings, ModelSettings, validate
from deepdisc_ops.data import cache, loader
from deepdisc_ops.data.cache import ImageCache
from deepdisc_ops.data.loader import Batch, CropDataset, label, measure_pixels, objects_inside, open_batches, sample_of, truth_in
from deepdisc_ops.data.masks import run_lengths
from deepdisc_ops.data.pixels import header_wcs
from deepdisc_ops.data.records import DatasetInfo, Objects, Packed, Record, Reference
from deepdisc_ops.data.sampling import Balance, BalancedOrder, ImageOrder, RunSampler, item_rngs
from deepdisc_ops.data.store import Records, create_dataset, open_dataset
from deepdisc_ops.data.writer import DatasetWriter
from deepdisc_ops.errors import CatalogError, ConfigError
from deepdisc_ops.sky.coordinates import icrs_positions
from deepdisc_ops.sky.frames import Frame
from deepdisc_ops.sky.images import SkyImage
from deepdisc_ops.sky.tiling import Window

INFO = DatasetInfo("lsst", ("g", "i"), 0.2, "i", 0)
MODEL = ModelSettings(bands=("g", "i"), mask_head=True)
WIDTH, HEIGHT, IMAGES, OBJECTS = 96, 80, 5, 12


def objects(x: list[float], y: list[float], **columns: object) -> Objects:
    n = len(x)
    centre = np.stack([x, y], 1) + 0.5
    given = {
        "ids": np.arange(n),
        "boxes": np.concatenate([centre - 3, centre + 3], 1).astype(np.float32),
        "classes": np.zeros(n, np.int32),
        "redshift": np.linspace(0.2, 1.5, n, dtype=np.float32),
        "mag": np.full(n, 24.0, np.float32),
        "x": np.array(x),
        "y": np.array(y),
        "ra": np.zeros(n),
        "dec": np.zeros(n),
        "ebv": np.full(n, 0.02, np.float32),
        "masks": None,
    }
    return Objects(**(given | columns))  # type: ignore[arg-type]


def distorted_wcs(number: int) -> WCS:
    """Rotated by another angle in every image, mirrored in every second one, with SIP terms."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN-SIP", "DEC--TAN-SIP"]
    wcs.wcs.crpix, wcs.wcs.crval = [30.5, 70.25], [150 + number, 2.2]
    angle = 0.7 * number
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    wcs.wcs.cd = 0.2 / 3600 * turn @ np.diag([(-1.0) ** number, 1.0])
    a, b = np.zeros((3, 3)), np.zeros((3, 3))
    a[2, 0], b[1, 1] = 4e-5, -3e-5
    wcs.sip = Sip(a, b, None, None, wcs.wcs.crpix)
    wcs.wcs.set()
    return wcs


def field(number: int) -> tuple[Record, SkyImage]:
    """A picture whose object i is a cross of pixels of value i + 1 in g and -(i + 1) in i, the rest NaN-free noise below 0.5."""
    rng = np.random.default_rng(number)
    x, y = rng.integers(0, WIDTH, OBJECTS), rng.integers(0, HEIGHT, OBJECTS)
    reach = rng.integers(1, 6, (OBJECTS, 2, 2))
    pixels = rng.uniform(0, 0.4, (2, HEIGHT, WIDTH)).astype(np.float32)
    boxes, masks = [], []
    for i in range(OBJECTS):
        cross = np.zeros((HEIGHT, WIDTH), bool)
        cross[y[i], max(x[i] - reach[i, 0, 0], 0) : x[i] + reach[i, 0, 1] + 1] = True
        cross[max(y[i] - reach[i, 1, 0], 0) : y[i] + reach[i, 1, 1] + 1, x[i]] = True
        rows, columns = np.nonzero(cross)
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        masks.append(run_lengths(cross, 0, 0, WIDTH, HEIGHT))
        pixels[0, y[i], x[i]], pixels[1, y[i], x[i]] = i + 1, -(i + 1)
    wcs = distorted_wcs(number)
    ra, dec = icrs_positions(wcs, x, y)
    ebv = np.where(np.arange(OBJECTS) % 2, 0.1, np.nan).astype(np.float32)
    truth = objects(list(map(float, x)), list(map(float, y)), boxes=np.array(boxes, np.float32), ra=ra, dec=dec, ebv=ebv)
    redshift = np.abs(rng.normal(0.8, 0.3, OBJECTS)).astype(np.float32)
    cards = wcs.to_header(relax=True).tostring(sep="\n")
    record = Record(
        f"field {number}",
        Reference(()),
        INFO.bands,
        WIDTH,
        HEIGHT,
        replace(truth, masks=tuple(masks), redshift=redshift),
        cards,
        "train",
    )
    return record, SkyImage(pixels, INFO.bands, wcs, 0.2, np.zeros((HEIGHT, WIDTH), bool))


def write_fits(path: Path, image: SkyImage) -> Reference:
    assert image.wcs is not None
    header = image.wcs.to_header(relax=True)
    header["BUNIT"] = "nJy"
    planes = [fits.ImageHDU(plane, header, name=band) for plane, band in zip(image.data, image.bands, strict=True)]
    fits.HDUList([fits.PrimaryHDU(), *planes]).writeto(path)
    return Reference((path,))


@pytest.fixture(scope="module", params=["packed", "by reference"])
def records(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Records:
    folder = tmp_path_factory.mktemp("fields of view")
    packed = request.param == "packed"
    with DatasetWriter(create_dataset(folder, INFO), packed=packed) as writer:
        for number in range(IMAGES):
            record, image = field(number)
            writer.add(record if packed else replace(record, pixels=write_fits(folder / f"{number}.fits", image)), image)
    return open_dataset(folder).records("train")


def settings(**tree: object) -> DataSettings:
    return validate(DataSettings, {"crop": 40, "min_box": 0.5, **tree}, "test")


def crops(records: Records, seed: int = 3, model: ModelSettings = MODEL, **tree: object) -> CropDataset:
    return CropDataset(records, INFO, settings(**tree), model, seed)


# --- pixels, boxes, masks and the sky stay together -------------------------------------------------------------------


@pytest.mark.parametrize("augment", [{}, {"blur_px": [0.5, 1.0], "noise_factor": [1.5, 3.0], "band_dropout": 0.4}])
def test_no_object_moves_on_the_sky_under_any_augmentation(records: Records, augment: dict[str, object]) -> None:
    model = ModelSettings.model_validate({"bands": ("g", "i"), "mask_head": True, "input": {"noise_njy": [0.01, 0.01]}})
    dataset = crops(records, model=model, augment=augment)
    seen = set()
    for k in range(40):
        sample = dataset[k]
        record = records[sample.image]
        labels = label(record.objects, INFO, model, settings())
        inside = objects_inside(labels, sample.frame)
        wcs = sample.frame.wcs(header_wcs(record.wcs))
        x, y = sample.frame.from_source(record.objects.x[inside], record.objects.y[inside])
        ra, dec = icrs_positions(wcs, x, y)
        np.testing.assert_allclose(ra, record.objects.ra[inside], rtol=0, atol=1e-6)
        np.testing.assert_allclose(dec, record.objects.dec[inside], rtol=0, atol=1e-6)
        np.testing.assert_allclose(wcs.world_to_pixel_values(ra, dec), (x, y), rtol=0, atol=1e-3)
        assert (x > 0.4).all()
        assert (x < 38.6).all()
        assert sample.truth.masks is not None
        for i, box, mask in zip(range(len(inside)), sample.truth.boxes, sample.truth.masks, strict=True):
            column, row = int(x[i]), int(y[i])
            assert mask[row, column]
            rows, columns = np.nonzero(mask)
            np.testing.assert_array_equal(box, [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            if not augment:
                own = [j for j in inside if record.objects.x[j] == record.objects.x[inside[i]]]
                assert abs(sample.pixels[0, row, column]) - 1 in own
        seen.add((sample.image, (sample.frame.step_x, sample.frame.step_y)))
    assert len({image for image, _ in seen}) == IMAGES
    assert len({steps for _, steps in seen}) == 8


def test_pixels_are_those_of_the_record_where_the_frame_says(records: Records) -> None:
    for k in range(10):
        sample = crops(records)[k]
        whole = field(int(records[sample.image].key.split()[1]))[1].data
        np.testing.assert_array_equal(sample.pixels, sample.frame.cut(whole))


@given(st.integers(0, 7), st.integers(0, 20), st.integers(0, 10))
def test_the_symmetries_of_a_crop_show_the_same_objects(number: int, x0: int, y0: int) -> None:
    record, image = field(1)
    labels = label(record.objects, INFO, MODEL, settings())
    upright = Frame.of(Window(x0, y0, x0 + 60, y0 + 64))
    turned = upright.symmetric(number)
    inside = objects_inside(labels, turned)
    np.testing.assert_array_equal(inside, objects_inside(labels, upright))
    truth, first = truth_in(labels, turned, inside, record.objects), truth_in(labels, upright, inside, record.objects)
    relative = Frame(60, 64).symmetric(number)
    np.testing.assert_array_equal(truth.boxes, relative.boxes_from_source(first.boxes))
    assert truth.masks is not None
    assert first.masks is not None
    np.testing.assert_array_equal(truth.masks, relative.cut(first.masks))
    np.testing.assert_array_equal(sample_of(turned.cut(image.data), truth, turned).pixels, relative.cut(upright.cut(image.data)))


def test_an_object_half_outside_counts_and_its_box_is_clipped() -> None:
    labels = label(objects([10, 30.6, 30.4, 60], [10, 30, 30, 60]), INFO, MODEL, settings(min_box=11))
    frame = Frame.of(Window(0, 0, 32, 32))
    inside = objects_inside(labels, frame)
    assert inside.tolist() == [0, 2]
    assert truth_in(labels, frame, inside).boxes.max() <= 32
    nothing = Frame.of(Window(40, 40, 48, 48))
    empty = truth_in(labels, nothing, objects_inside(labels, nothing))
    assert empty.boxes.shape == (0, 4)


def test_a_mask_head_needs_masks() -> None:
    truth = objects([10], [10])
    labels = label(truth, INFO, MODEL, settings())
    frame = Frame(32, 32)
    with pytest.raises(ConfigError, match="the data set holds no masks"):
        truth_in(labels, frame, objects_inside(labels, frame), truth)


# --- labels -----------------------------------------------------------------------------------------------------------


def test_redshift_labels_are_left_to_gold_galaxies() -> None:
    truth = objects(
        [10, 20, 30, 40],
        [10, 20, 30, 40],
        classes=np.array([0, 1, 0, 0], np.int32),
        mag=np.array([24.0, 20.0, 25.4, np.nan], np.float32),
    )
    labels = label(truth, INFO, MODEL, settings())
    assert np.isfinite(labels.redshift).tolist() == [True, False, False, False]
    assert labels.classes.tolist() == [0, 0, 0, 0]
    two = label(truth, INFO, ModelSettings(classes=("galaxy", "star")), settings())
    assert two.classes.tolist() == [0, 1, 0, 0]
    turned = label(truth, INFO, ModelSettings(classes=("star", "galaxy")), settings())
    assert turned.classes.tolist() == [1, 0, 1, 1]


def test_small_boxes_are_widened_about_the_centre() -> None:
    labels = label(objects([10.0], [20.0]), INFO, MODEL, settings(min_box=11))
    np.testing.assert_allclose(labels.boxes, [[5, 15, 16, 26]])


def test_boxes_are_centred_on_their_objects_where_that_is_asked() -> None:
    truth = replace(objects([10.0, 50.0], [20.0, 50.0]), boxes=np.array([[4.5, 14.5, 40.5, 30.5], [49, 49, 52, 52]], np.float32))
    labels = label(truth, INFO, MODEL, settings(min_box=11, centred_boxes=True))
    np.testing.assert_allclose((labels.boxes[:, :2] + labels.boxes[:, 2:]) / 2, labels.centres)
    np.testing.assert_allclose(labels.boxes, [[-19.5, 10.5, 40.5, 30.5], [45, 45, 56, 56]])


def test_a_box_cut_by_the_edge_of_the_image_keeps_its_other_side() -> None:
    truth = objects([2.0], [20.0], boxes=np.array([[0, 8, 22, 33]], np.float32))
    np.testing.assert_allclose(label(truth, INFO, MODEL, settings(min_box=11)).boxes, [[-3, 8, 22, 33]])


def test_an_unknown_reddening_becomes_the_default() -> None:
    truth = objects([1, 2], [1, 2], ebv=np.array([0.2, np.nan], np.float32))
    np.testing.assert_allclose(label(truth, INFO, MODEL, settings(default_ebv=0.05)).ebv, [0.2, 0.05])


def test_a_band_of_magnitudes_the_model_does_not_know_is_refused() -> None:
    other = ModelSettings.model_validate({"redshift_head": {"gold_band": "r"}})
    with pytest.raises(ConfigError, match="'r', the data's magnitudes are 'i'"):
        label(objects([10], [10]), INFO, other, settings())


# --- the same samples, however they are made --------------------------------------------------------------------------


def content(batches: Iterator[Batch]) -> list[tuple[np.ndarray, ...]]:
    return [
        (
            pixels.numpy().copy(),
            *(np.concatenate([getattr(truth, name) for truth in truths]) for name in ("boxes", "redshift", "ebv", "masks")),
        )
        for pixels, truths in batches
    ]


def assert_same(one: list[tuple[np.ndarray, ...]], other: list[tuple[np.ndarray, ...]]) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        for a, b in zip(left, right, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("balance", [0.0, 0.7])
def test_any_number_of_workers_gives_the_same_batches(records: Records, balance: float) -> None:
    def run(workers: int) -> list[tuple[np.ndarray, ...]]:
        return content(open_batches(crops(records, balance=balance), first_step=0, steps=5, batch_size=4, workers=workers))

    alone = run(0)
    assert_same(alone, run(1))
    assert_same(alone, run(2))


def test_ranks_share_every_step_and_make_it_whole(records: Records) -> None:
    whole = content(open_batches(crops(records), first_step=0, steps=4, batch_size=6))
    ranks = [content(open_batches(crops(records), first_step=0, steps=4, batch_size=6, rank=r, ranks=3)) for r in range(3)]
    for step, expected in enumerate(whole):
        for column, array in enumerate(expected):
            np.testing.assert_array_equal(array, np.concatenate([rank[step][column] for rank in ranks]))
    with pytest.raises(ConfigError, match="batch_size 6 cannot be shared equally by 4"):
        RunSampler(0, 1, 6, ranks=4)


def test_a_run_taken_up_at_any_step_goes_on_as_if_uninterrupted(records: Records) -> None:
    whole = content(open_batches(crops(records), first_step=0, steps=6, batch_size=2))
    assert_same(whole[4:], content(open_batches(crops(records), first_step=4, steps=6, batch_size=2, workers=1)))
    assert list(open_batches(crops(records), first_step=6, steps=6, batch_size=2)) == []


def test_every_image_is_seen_once_an_epoch_in_changing_order(records: Records) -> None:
    epochs = [[crops(records)[k].image for k in range(e * IMAGES, (e + 1) * IMAGES)] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(IMAGES))] * 3
    assert len(crops(records)) == IMAGES
    orders = {tuple(ImageOrder(50, 1).choose(k).image for k in range(e * 50, (e + 1) * 50)) for e in range(3)}
    assert len(orders) == 3
    assert crops(records, seed=4)[0].frame != crops(records, seed=3)[0].frame


def test_one_augmentation_does_not_change_what_the_others_draw(records: Records) -> None:
    plain, dropped = crops(records), crops(records, augment={"band_dropout": 0.5})
    for k in range(8):
        one, other = plain[k], dropped[k]
        assert one.frame == other.frame
        np.testing.assert_array_equal(one.pixels[~other.missing], other.pixels[~other.missing])
        assert not other.pixels[other.missing].any()


def test_a_handed_over_data_set_reads_the_same(records: Records) -> None:
    dataset = crops(records)
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    np.testing.assert_array_equal(copy[2].pixels, dataset[2].pixels)
    del copy
    np.testing.assert_array_equal(dataset[2].pixels, crops(records, cache_gb=0.0)[2].pixels)


def test_errors_in_a_worker_are_told_in_their_own_words(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: object, **__: object) -> SkyImage:
        raise CatalogError("pixels.h5 is damaged; restore it")

    monkeypatch.setattr(loader, "read_pixels", damaged)
    with pytest.raises(CatalogError, match=r"^pixels.h5 is damaged; restore it$"):
        next(open_batches(crops(records), first_step=0, steps=1, batch_size=2, workers=1))


def test_invalid_pixels_are_zero_and_bands_without_any_are_told(tmp_path: Path) -> None:
    record, image = field(0)
    invalid = np.zeros((2, HEIGHT, WIDTH), bool)
    invalid[0], invalid[1, 30:50, 30:60] = True, True
    image = replace(image, data=np.where(invalid, 0, image.data), mask=invalid.any(axis=0), invalid=invalid)
    with DatasetWriter(create_dataset(tmp_path, INFO), packed=True) as writer:
        writer.add(record, image)
    sample = crops(open_dataset(tmp_path).records("train"), augment={"blur_px": [1, 1]})[0]
    assert sample.missing.tolist() == [True, False]
    assert not sample.pixels[0].any()
    assert not sample.pixels[1][sample.frame.cut(invalid)[1]].any()
    assert np.isfinite(sample.pixels).all()


def test_crops_larger_than_the_images_are_refused(records: Records) -> None:
    with pytest.raises(
        ConfigError, match=re.escape("data.crop 90 is larger than 5 of 5 training images, field 0 (96x80) among them")
    ):
        crops(records, crop=90)
    with pytest.raises(ConfigError, match="no training images"):
        crops(records[:0])


# --- balance ----------------------------------------------------------------------------------------------------------


def counts(z: np.ndarray, edges: np.ndarray) -> np.ndarray:
    found, _ = np.histogram(z[np.isfinite(z)], edges)
    return found / found.sum()


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_balanced_objects_follow_the_density_to_the_power_that_is_left(strength: float) -> None:
    rng = np.random.default_rng(2)
    z = np.concatenate([rng.uniform(0, 1, 9000), rng.uniform(1, 2, 1000), [np.nan] * 500]).astype(np.float32)
    images = np.sort(rng.integers(0, 40, len(z)))
    order = BalancedOrder(Balance(z, strength).weight(z), images, seed=1)
    first = np.searchsorted(images, np.arange(40))
    drawn = [order.choose(k) for k in range(4000)]
    redshift = np.array([z[first[choice.image] + choice.target] for choice in drawn])
    expected = np.array([9.0, 1.0]) ** (1 - strength)
    np.testing.assert_allclose(counts(redshift, np.array([0, 1, 2])), expected / expected.sum(), atol=0.03)


def test_a_lonely_object_is_not_drawn_without_end() -> None:
    z = np.append(np.full(10_000, 0.5, np.float32) + np.linspace(0, 0.1, 10_000, dtype=np.float32), np.float32(6.0))
    assert Balance(z, 1.0).weight(z).max() <= 30


def test_balanced_crops_flatten_the_redshifts_that_train(records: Records) -> None:
    plain, flat = crops(records), crops(records, balance=1.0)
    z, _ = records.column("redshift")
    edges = np.quantile(z, [0, 0.25, 0.75, 1])  # a half of the objects in the middle
    width = np.diff(edges) / (edges[-1] - edges[0])
    seen = [np.concatenate([dataset[k].truth.redshift for k in range(400)]) for dataset in (plain, flat)]
    uneven = [np.abs(counts(redshift, edges) / width - 1).max() for redshift in seen]
    assert uneven[1] < uneven[0] / 2
    assert uneven[1] < 0.35


def test_the_chosen_object_lies_in_its_crop(records: Records) -> None:
    dataset = crops(records, balance=1.0, crop=20)
    for k in range(60):
        sample = dataset[k]
        image, target = dataset._order.choose(k)
        truth = records[image].objects
        x, y = truth.x[target], truth.y[target]  # type: ignore[index]
        if min(x, y, WIDTH - 1 - x, HEIGHT - 1 - y) > 1:
            assert np.isclose(sample.truth.redshift, truth.redshift[target]).any()  # type: ignore[index]


def test_a_chosen_object_is_shown_at_every_height() -> None:
    order = BalancedOrder(np.ones(50), np.arange(50), seed=1)
    corners = []
    for k in range(2000):
        if order.choose(k).image == 25:
            (place, *_) = item_rngs(1, k, 3)
            corners.append(place.integers(0, 1000, 2))
    assert len(corners) > 20
    assert (np.ptp(corners, axis=0) > 700).all()


def test_balance_needs_redshifts(tmp_path: Path) -> None:
    record, image = field(0)
    bare = replace(record, objects=replace(record.objects, redshift=np.full(OBJECTS, np.nan, np.float32)))
    with DatasetWriter(create_dataset(tmp_path, INFO), packed=True) as writer:
        writer.add(bare, image)
    with pytest.raises(ConfigError, match="data.balance needs labelled redshifts"):
        crops(open_dataset(tmp_path).records("train"), balance=0.5)


# --- workers, memory, cache -------------------------------------------------------------------------------------------


def test_the_cache_keeps_to_its_size_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    images = ImageCache(2.5 * 400)
    reads = []

    def read(number: int) -> np.ndarray:
        reads.append(number)
        return np.full((1, 10, 10), number, np.float32)

    for number in (0, 1, 2, 1, 0, 2):
        found = images.image(number, 400, lambda n=number: read(n))  # type: ignore[misc]
        assert (found is None) == (number == 2)
        assert found is None or (found == number).all()
    assert reads == [0, 1]
    abandoned = tmp_path / f"{cache.PREFIX}dead"
    abandoned.mkdir()
    monkeypatch.setattr(cache, "YOUNG_S", -1.0)
    other = ImageCache(10.0)
    assert sorted(tmp_path.iterdir()) == sorted([images._folder, other._folder])
    images.close()
    other.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_only_ends_the_caching(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    images = ImageCache(1e6)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.np, "save", full)
    assert images.image(0, 400, lambda: np.zeros((1, 10, 10), np.float32)) is None
    assert "No space left on device; set TMPDIR" in caplog.text
    images.close()


def private_bytes_of_workers(folder: Path, images: int, *, packed: bool) -> int:
    """What two workers own for themselves (Private_Dirty) after each has seen most images of a data set three times."""
    side = 512
    truth = objects([250.0], [250.0])
    folder.mkdir()
    with DatasetWriter(create_dataset(folder, INFO), packed=packed) as writer:
        for number in range(images):
            pixels = np.random.default_rng(number).standard_normal((2, side, side), np.float32)
            image = SkyImage(pixels, INFO.bands, distorted_wcs(number), 0.2, np.zeros((side, side), bool))
            place = Reference(()) if packed else write_fits(folder / f"{number}.fits", image)
            writer.add(Record(f"{number:04}", place, INFO.bands, side, side, truth, split="train"), image)
    dataset = crops(open_dataset(folder).records("train"), crop=side, model=ModelSettings(bands=("g", "i")))
    batches = open_batches(dataset, first_step=0, steps=6 * images + 20, batch_size=1, workers=2)
    for _ in range(6 * images):
        next(batches)
    rollups = [Path(f"/proc/{child.pid}/smaps_rollup").read_text() for child in multiprocessing.active_children()]
    owned = [int(line.split()[1]) for rollup in rollups for line in rollup.splitlines() if line.startswith("Private_Dirty")]
    assert len(owned) == 2
    return 1024 * sum(owned)


@pytest.mark.parametrize("packed", [True, False])
def test_workers_hold_no_copy_of_the_data(tmp_path: Path, packed: bool) -> None:
    # in a process of its own: workers forked from one that has run other tests come to own pages of its heap
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_loader as here
for name, images in (("small", 4), ("large", 40)):
    print(here.private_bytes_of_workers(Path({str(tmp_path)!r}) / name, images, packed={packed}))
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    small, large = map(int, answer.stdout.split())
    added = 36 * 2 * 512 * 512 * 4
    assert large - small < 0.2 * added  # a copy in each worker would be 2


# --- statistics -------------------------------------------------------------------------------------------------------


def test_pixel_statistics_are_those_of_the_valid_pixels(records: Records) -> None:
    measured = measure_pixels(records, ("i", "g"))
    pixels = np.stack([field(number)[1].data[::-1] for number in range(IMAGES)], axis=1).reshape(2, -1)
    np.testing.assert_allclose(measured.mean_njy, pixels.mean(axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(measured.std_njy, pixels.std(axis=1), rtol=1e-4)
    np.testing.assert_allclose(measured.noise_njy, 1.4826 * 0.1, rtol=0.05)  # median |x - 0.2| of a uniform 0..0.4


def test_noise_is_measured_in_nanojansky(mini_dataset: Path) -> None:
    from deepdisc_ops.data.surveys import noise, survey

    dataset = open_dataset(mini_dataset)
    measured = measure_pixels(dataset.records("train"), dataset.info.bands)
    np.testing.assert_allclose(measured.noise_njy, noise(survey("lsst"), 5.0), rtol=0.25)


def test_packed_images_are_not_cached_again(records: Records) -> None:
    dataset = crops(records)
    for k in range(IMAGES):
        dataset[k]
    assert dataset._cache is not None
    kept = list(dataset._cache._folder.glob("*.npy"))
    assert len(kept) == (0 if isinstance(records[0].pixels, Packed) else IMAGES)


def test_augmentations_are_off_but_for_the_symmetries() -> None:
    assert AugmentSettings() == AugmentSettings(symmetries="all", blur_px=(0, 0), noise_factor=(1, 1), band_dropout=0)
