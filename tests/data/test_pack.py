from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from deepdisc_ops.cli import app
from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.pack import merge_datasets
from deepdisc_ops.data.pixels import read_pixels
from deepdisc_ops.data.simulate import simulate_dataset
from deepdisc_ops.data.splits import make_splits
from deepdisc_ops.data.store import Dataset, open_dataset, verify
from deepdisc_ops.errors import ConfigError


@pytest.fixture(scope="module")
def tracts(tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    folder = tmp_path_factory.mktemp("two tracts")
    one = simulate_dataset(SkySettings(), folder / "one", counts={"train": 3, "test": 1}, size=64, seed=1)
    other = simulate_dataset(SkySettings(), folder / "the other", counts={"train": 4}, size=80, seed=2)
    make_splits(other, {"train": 0.5, "validation": 0.5}, seed=3, cell_arcmin=10.0)
    return [one, open_dataset(other.path)]


@pytest.mark.parametrize("packed", [False, True])
def test_several_data_sets_become_one(tracts: list[Dataset], tmp_path: Path, packed: bool) -> None:
    merged = merge_datasets(tracts, tmp_path / "all", packed=packed)
    assert len(merged) == 8
    assert verify(merged) == []
    assert merged.split_sizes == {"train": 5, "test": 1, "validation": 2}
    for dataset in tracts:
        for record in dataset.records():
            (copy,) = (r for r in merged.records() if r.key == f"{dataset.path.name}/{record.key}")
            np.testing.assert_array_equal(copy.objects.boxes, record.objects.boxes)
            np.testing.assert_array_equal(read_pixels(copy).data, read_pixels(record).data)
            assert copy.origin == record.origin


def test_an_interrupted_merge_goes_on(tracts: list[Dataset], tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise Stopped

    with pytest.raises(Stopped):
        merge_datasets(tracts, tmp_path / "all", progress=stop)
    assert len(open_dataset(tmp_path / "all")) == 5
    assert merge_datasets(tracts, tmp_path / "all").records().keys.tolist() == sorted(
        f"{dataset.path.name}/{key}" for dataset in tracts for key in dataset.records().keys
    )


def test_data_sets_of_other_bands_or_pixels_are_not_merged(tracts: list[Dataset], tmp_path: Path) -> None:
    hsc = simulate_dataset(SkySettings(survey="hsc"), tmp_path / "hsc", counts={"train": 1}, size=64)
    with pytest.raises(ConfigError, match=r"differ in bands .*, pixel scale 0.2 and 0.168 arcsec"):
        merge_datasets([tracts[0], hsc], tmp_path / "all")
    with pytest.raises(ConfigError, match="have one name"):
        merge_datasets([tracts[0], tracts[0]], tmp_path / "all")
    with pytest.raises(ConfigError, match="is the data set itself"):
        merge_datasets(tracts, tracts[0].path)
    assert not (tmp_path / "all").exists()


def test_the_commands(tracts: list[Dataset], tmp_path: Path) -> None:
    folders = [str(dataset.path) for dataset in tracts]
    answer = CliRunner().invoke(app, ["data", "merge", *folders, "--out", str(tmp_path / "all"), "--packed"])
    assert answer.exit_code == 0, answer.output
    assert "8 records" in answer.output
    cutouts = ["data", "cutouts", str(tmp_path / "all"), "--out", str(tmp_path / "cutouts.h5"), "--side", "21", "--faintest", "24"]
    answer = CliRunner().invoke(app, cutouts)
    assert answer.exit_code == 0, answer.output
    with h5py.File(tmp_path / "cutouts.h5") as file:
        assert file["image"].shape[1:] == (6, 21, 21)
        assert (file["specz_redshift"][:] >= 0).all()
