"""The informer: what it trains or takes becomes one file that the estimator reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rail.core.stage")

from deepdisc_ops.data.store import create_dataset, open_dataset
from deepdisc_ops.data.writer import DatasetWriter
from deepdisc_ops.errors import ArchiveError, CatalogError, ConfigError, ImageError
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.rail import DeepdiscInformer
from deepdisc_ops.rail.packed import PackedEnsemble
from deepdisc_ops.sky.images import open_mosaic

SMALLEST = {
    "data.crop": 64,
    "model": {
        "backbone": {"name": "tiny", "fpn_channels": 16, "stem_stride": 4, "levels": 4},
        "anchor_sizes": [8, 16, 32, 64],
        "box_head": {"hidden": [32]},
        "redshift_head": {"hidden": [16]},
    },
    "train": {"steps": 2, "batch_size": 2, "validate_every": 2, "warmup_steps": 1, "threads": 1},
}


def informer(**config: object) -> DeepdiscInformer:
    return DeepdiscInformer.make_stage(name="inform", **config)


def test_a_trained_ensemble_becomes_a_file_that_gives_the_same_members(
    tiny_ensemble: Path, tiny_checkpoints: list[Path], mini_dataset: Path
) -> None:
    stage = informer(ensemble=str(tiny_ensemble))
    model = stage.inform(open_dataset(mini_dataset))
    written = PackedEnsemble.read(Path(model.path))
    assert Path(model.path).suffix == ".zip"
    assert written == PackedEnsemble.read(tiny_ensemble)  # nothing of the day or the machine is in it
    ours, theirs = written.load(), Ensemble.load(tiny_ensemble)
    assert ours.bands == theirs.bands
    assert ours.weights == theirs.weights
    for mine, other in zip(ours.members, theirs.members, strict=True):
        for key, tensor in other.network.state_dict().items():
            assert mine.network.state_dict()[key].equal(tensor)
    alone = PackedEnsemble.read(tiny_checkpoints[0])
    assert [entry["name"] for entry in alone.description["members"]] == ["member-0"]


def test_members_are_trained_from_seeds_of_their_own_and_go_on_where_they_ended(mini_dataset: Path, tmp_path: Path) -> None:
    config = {"settings": "small", "overrides": SMALLEST, "members": 2, "runs": str(tmp_path / "the runs")}
    first = informer(**config).inform(open_dataset(mini_dataset))().description["members"]
    assert [entry["config"]["seed"] for entry in first] == [0, 1]
    assert [entry["step"] for entry in first] == [2, 2]
    assert first[0]["sha256"] != first[1]["sha256"]
    made = (tmp_path / "the runs" / "member-0" / "best" / "member.safetensors").stat().st_mtime_ns
    again = informer(**config).inform(open_dataset(mini_dataset))().description["members"]
    assert [entry["sha256"] for entry in again] == [entry["sha256"] for entry in first]
    assert (tmp_path / "the runs" / "member-0" / "best" / "member.safetensors").stat().st_mtime_ns == made


def test_bands_that_the_images_lack_are_named(tiny_ensemble: Path, mini_dataset: Path) -> None:
    wanted = "no band Y106: found u, g, r, i, z, y"
    bands = {"model.bands": ["g", "r", "Y106"], "model.input.noise_njy": None}
    with pytest.raises(ImageError, match=wanted):
        informer(overrides=SMALLEST | bands).inform(open_dataset(mini_dataset))
    info = replace(open_dataset(mini_dataset).info, bands=("g", "r", "i"))
    with pytest.raises(ImageError, match=r"no band u, z, y: found g, r, i, the model wants u, g, r, i, z, y"):
        informer(ensemble=str(tiny_ensemble)).inform(create_dataset(Path("three bands"), info))


def test_what_cannot_be_taken_or_trained_on_is_told_in_a_line(mini_dataset: Path, tmp_path: Path) -> None:
    dataset = open_dataset(mini_dataset)
    with pytest.raises(ArchiveError, match=r"^no model at nowhere; run DeepdiscInformer, or give [^\n]*$"):
        informer(ensemble="nowhere").inform(dataset)
    (tmp_path / "model.zip").write_bytes(b"PK of nothing")
    with pytest.raises(ArchiveError, match=r"^the model is no packed ensemble [^\n]*$"):
        informer(ensemble="model.zip").inform(dataset)
    with pytest.raises(ConfigError, match=r"train\.stepps"):
        informer(overrides={"train": {"stepps": 3}}).inform(dataset)
    with pytest.raises(ConfigError, match="members is 0"):
        informer(overrides=SMALLEST, members=0).inform(dataset)
    with pytest.raises(CatalogError, match="has no training truth"):
        informer().inform(open_mosaic(next(iter(sorted(_scenes(tmp_path))))))
    with pytest.raises(CatalogError, match="the images are a str"):
        informer().get_handle("input", allow_missing=True).set_data("scenes")


def _scenes(folder: Path) -> list[Path]:
    from deepdisc_ops.config import SkySettings
    from deepdisc_ops.data.simulate import simulate_scene, write_scene

    write_scene(simulate_scene(SkySettings(), size=64, seed=1), folder / "sky.fits")
    return [folder / "sky.fits"]


def test_a_data_set_without_redshifts_trains_nothing(mini_dataset: Path, tmp_path: Path) -> None:
    old = open_dataset(mini_dataset)
    blind = create_dataset(tmp_path / "blind", old.info)
    with DatasetWriter(blind) as writer:
        for record in old.records():
            nothing = np.full(len(record.objects), np.nan, np.float32)
            writer.add(replace(record, objects=replace(record.objects, redshift=nothing)))
    with pytest.raises(ConfigError, match=r"^no galaxy with a redshift and [^\n]* in .*blind; [^\n]*$"):
        informer(overrides=SMALLEST).inform(blind.refresh())


def test_an_empty_data_set_trains_nothing(mini_dataset: Path, tmp_path: Path) -> None:
    empty = create_dataset(tmp_path / "empty", open_dataset(mini_dataset).info)
    with pytest.raises(CatalogError, match="no record in split 'train'"):
        informer(overrides=SMALLEST).inform(empty)
