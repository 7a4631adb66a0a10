from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.wcs import WCS
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from deepdisc_ops.cli import app
from deepdisc_ops.data.footprints import overlapping, sky_cells, unit_vectors
from deepdisc_ops.data.records import DatasetInfo, Objects, Record, Reference
from deepdisc_ops.data.splits import make_splits, read_splits
from deepdisc_ops.data.store import Dataset, create_dataset, open_dataset
from deepdisc_ops.data.writer import DatasetWriter
from deepdisc_ops.errors import CatalogError, ConfigError

INFO = DatasetInfo("lsst", ("g",), 1.0, "g", 0)
FRACTIONS = {"train": 0.6, "validation": 0.1, "calibration": 0.1, "test": 0.2}
SIDE = 60


def galaxies(redshift: float, count: int = 4) -> Objects:
    zeros = np.zeros(count)
    return Objects(
        ids=np.arange(count),
        boxes=np.tile(np.array([0, 0, 9, 9], np.float32), (count, 1)),
        classes=zeros.astype(np.int32),
        redshift=np.full(count, redshift, np.float32),
        mag=zeros.astype(np.float32),
        x=zeros,
        y=zeros,
        ra=np.full(count, np.nan),
        dec=np.full(count, np.nan),
        ebv=zeros.astype(np.float32),
    )


def header(ra: float, dec: float) -> str:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [ra % 360, dec]
    wcs.wcs.crpix = [SIDE / 2 + 0.5] * 2
    wcs.wcs.cdelt = [-1 / 3600, 1 / 3600]
    return str(wcs.to_header().tostring())


def make_dataset(path: Path, columns: int = 24, rows: int = 18, step_arcmin: float = 1.0, seed: int = 0) -> Dataset:
    """Images of 1 arcmin on a grid about ra 0; the redshift rises across the field."""
    rng = np.random.default_rng(seed)
    dataset = create_dataset(path, INFO)
    image = path / "image.npz"
    np.savez(image, images=np.zeros((1, 2, 2)))
    with DatasetWriter(dataset) as writer:
        for i in range(columns):
            for j in range(rows):
                cards = header((i - columns / 2) * step_arcmin / 60, j * step_arcmin / 60)
                record = Record(
                    f"{i:02d} {j:02d}", Reference((image,)), ("g",), SIDE, SIDE, galaxies(0.1 * i + rng.uniform(0, 0.5)), cards
                )
                writer.add(record)
    return open_dataset(path)


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """432 images that do not overlap."""
    return make_dataset(tmp_path_factory.mktemp("apart") / "set", step_arcmin=1.1)


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """192 images, each overlapping its neighbours by half."""
    return make_dataset(tmp_path_factory.mktemp("crowded") / "set", 16, 12, step_arcmin=0.5)


def test_shares_cells_and_redshifts_come_out_as_asked(apart: Dataset) -> None:
    table = make_splits(apart, FRACTIONS, seed=1, cell_arcmin=2.2)
    for name, share in FRACTIONS.items():
        assert (table.split == name).mean() == pytest.approx(share, abs=0.02)
    cells = sky_cells(apart.records().centres, 2.2)
    for cell in np.unique(cells):
        assert len(set(table.split[cells == cell])) == 1
    dataset = apart.refresh()
    means = [dataset.records(name).column("redshift")[0].mean() for name in FRACTIONS]
    assert np.ptp(means) < 0.25  # the redshift spans 0 to 2.8
    everything = np.concatenate([dataset.records(name).keys for name in FRACTIONS])
    assert sorted(everything) == apart.records().keys.tolist()


def test_the_same_seed_gives_the_same_stored_splits(apart: Dataset) -> None:
    one = make_splits(apart, FRACTIONS, seed=1, cell_arcmin=3.0)
    content = (apart.path / "splits.parquet").read_bytes()
    stored = read_splits(apart.path)
    assert stored is not None
    for name in ("keys", "split", "rank", "partitions"):
        np.testing.assert_array_equal(getattr(stored, name), getattr(one, name))
    assert stored.settings == one.settings
    assert stored.settings["fractions"] == FRACTIONS
    make_splits(apart, FRACTIONS, seed=1, cell_arcmin=3.0)
    assert (apart.path / "splits.parquet").read_bytes() == content
    assert (make_splits(apart, FRACTIONS, seed=2, cell_arcmin=3.0).split != one.split).any()


@pytest.mark.parametrize("partition", [None, 0, 3])
def test_no_training_image_shows_sky_of_another_split(crowded: Dataset, partition: int | None) -> None:
    make_splits(crowded, FRACTIONS, seed=1, cell_arcmin=2.0, partitions=4)
    dataset = crowded.refresh()
    split = {name: dataset.records(name, partition=partition) for name in FRACTIONS}
    names = list(FRACTIONS)
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            assert not overlapping(split[name].corners, split[other].corners, margin_arcsec=-0.1).any(), (name, other)
    assert dataset.split_table is not None
    left_out = dataset.split_table.settings["left_out"]
    assert 0 < left_out == len(dataset) - sum(len(dataset.records(name)) for name in names)
    assert dataset.split_sizes[""] == left_out


def test_partitions_deal_train_and_validation_anew_and_nothing_else(apart: Dataset) -> None:
    make_splits(apart, FRACTIONS, seed=1, cell_arcmin=2.2, partitions=10)
    dataset = apart.refresh()
    pool = set(dataset.records("train").keys) | set(dataset.records("validation").keys)
    chosen = []
    for partition in range(10):
        train, validation = (set(dataset.records(name, partition=partition).keys) for name in ("train", "validation"))
        assert train | validation == pool
        assert not train & validation
        assert len(validation) / len(pool) == pytest.approx(1 / 7, abs=0.03)
        for name in ("calibration", "test"):
            assert dataset.records(name, partition=partition).keys.tolist() == dataset.records(name).keys.tolist()
        chosen.append(frozenset(validation))
    assert len(set(chosen)) == 10
    with pytest.raises(CatalogError, match="partition 10 is not there: the stored splits have 10"):
        dataset.records("train", partition=10)


@settings(max_examples=25)
@given(st.floats(0.001, 1), st.floats(0.001, 1))
def test_smaller_shares_lie_inside_larger_ones(apart: Dataset, one: float, other: float) -> None:
    if not (apart.path / "splits.parquet").exists():
        make_splits(apart, FRACTIONS, seed=1, cell_arcmin=2.2)
    dataset = apart.refresh()
    small, large = (dataset.records("train", fraction=share) for share in sorted((one, other)))
    assert set(small.keys) <= set(large.keys)
    assert len(large) == int(np.ceil(max(one, other) * len(dataset.records("train")) - 1e-9))
    assert small.keys.tolist() == sorted(small.keys)


def test_records_that_came_later_are_in_no_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = make_dataset(tmp_path / "set", 6, 5, 1.1)
    make_splits(dataset, {"train": 0.5, "test": 0.5}, seed=0, cell_arcmin=1.1)
    with DatasetWriter(dataset) as writer:
        writer.add(Record("late", Reference((tmp_path / "set" / "image.npz",)), ("g",), SIDE, SIDE, galaxies(1.0), header(9, 9)))
    grown = dataset.refresh()
    assert len(grown.records("train")) + len(grown.records("test")) == 30
    assert len(grown.records()) == 31
    assert "1 records came after the splits were made" in caplog.text


def test_records_without_a_position_are_an_error_that_says_so(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 3, 3)
    with DatasetWriter(dataset) as writer:
        writer.add(Record("lost", Reference((tmp_path / "set" / "image.npz",)), ("g",), SIDE, SIDE, galaxies(1.0)))
    with pytest.raises(CatalogError, match="1 of 10 records have no position .*'lost'.*neither a WCS nor"):
        make_splits(dataset, FRACTIONS, seed=0)
    with pytest.raises(CatalogError, match="no record"):
        make_splits(create_dataset(tmp_path / "empty", INFO), FRACTIONS, seed=0)


@pytest.mark.parametrize(
    ("fractions", "options", "message"),
    [
        ({"train": 0.5, "dev": 0.5}, {}, "unknown split 'dev'"),
        ({"train": 0.5, "test": 0.4}, {}, "fractions sum to 0.9, expected 1"),
        ({"train": 1.5, "test": -0.5}, {}, "fraction of train is 1.5"),
        (FRACTIONS, {"cell_arcmin": 0.0}, "cell_arcmin is 0.0"),
        (FRACTIONS, {"redshift_bins": 0}, "redshift_bins is 0"),
        (FRACTIONS, {"cell_arcmin": 600.0}, "no record for validation, calibration: the 432 records lie in 2 cells of 600 arcmin"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(apart: Dataset, fractions: dict, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_splits(apart, fractions, seed=0, **options)


def test_a_damaged_split_table_is_named(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 2, 2)
    (dataset.path / "splits.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(CatalogError, match=r"splits.parquet cannot be read .*make the splits again"):
        dataset.records("train")


positions = st.tuples(st.floats(0, 359.999), st.floats(-89, 89))


@given(st.lists(positions, min_size=1, max_size=20), st.floats(0.5, 600))
def test_cells_are_as_small_as_asked(centres: list[tuple[float, float]], side: float) -> None:
    found = np.array(centres)
    cells = sky_cells(found, side)
    vectors = unit_vectors(found[:, 0], found[:, 1])
    for cell in np.unique(cells):
        chord = np.linalg.norm(vectors[cells == cell] - vectors[cells == cell][:1], axis=1).max()
        # wide rings about the poles hold few cells, each up to half as wide again as asked
        assert np.degrees(chord) * 60 < 3.5 * side


@settings(max_examples=60)
@given(positions, st.floats(0, 360), st.floats(0.2, 3), st.floats(0, 90), st.floats(0.3, 1))
def test_overlap_of_squares_agrees_with_sampling(
    centre: tuple[float, float], bearing: float, distance: float, turn: float, scale: float
) -> None:
    def square(x: float, y: float, angle: float, side: float) -> np.ndarray:
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * side / 2
        c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        return corners @ np.array([[c, s], [-s, c]]) + [x, y]

    def on_sky(points: np.ndarray) -> np.ndarray:  # arcmin about the centre
        wcs = WCS(naxis=2)
        wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.cdelt = ["RA---TAN", "DEC--TAN"], list(centre), [-1 / 60, 1 / 60]
        return np.stack(wcs.wcs_pix2world(points[..., 0], points[..., 1], 1), axis=-1)

    one = square(0, 0, 0, 1)
    other = square(distance * np.cos(np.radians(bearing)), distance * np.sin(np.radians(bearing)), turn, scale)
    inside = np.stack(np.meshgrid(*[np.linspace(-0.4999, 0.4999, 201)] * 2), axis=-1).reshape(-1, 2)
    c, s = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    local = (inside - other.mean(axis=0)) @ np.array([[c, -s], [s, c]])
    depth = (scale / 2 - np.abs(local).max(axis=1)).max()
    if abs(depth) > 0.01:
        assert overlapping(on_sky(one)[None], on_sky(other)[None]).tolist() == [depth > 0]


def test_the_command_prints_what_each_split_got(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "a set", 10, 6, 1.1)
    options = ["--train", "0.5", "--validation", "0", "--test", "0.5", "--cell-arcmin", "1.1", "--seed", "3"]
    result = CliRunner().invoke(app, ["data", "split", str(dataset.path), *options], catch_exceptions=False)
    assert result.exit_code == 0
    assert dataset.refresh().split_sizes == {"train": 30, "test": 30}
    assert "50.0%" in result.output
