"""Thresholds chosen on a validation set and kept in the member."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from deepdisc_ops.config import TrainingConfig, validate
from deepdisc_ops.data.pixels import read_pixels
from deepdisc_ops.data.records import Record
from deepdisc_ops.data.store import Dataset, open_dataset
from deepdisc_ops.errors import CatalogError, CheckpointError, ConfigError
from deepdisc_ops.inference.engine import Member
from deepdisc_ops.inference.tuning import OVERLAPS, SCORES, Trial, Tuning, choose, count, store, tune_thresholds
from deepdisc_ops.model.weights import load_network, read_info

TRIALS = [Trial(0.3, 0.4, 0.9, 0.6), Trial(0.5, 0.4, 0.8, 0.8), Trial(0.7, 0.4, 0.6, 0.9), Trial(0.5, 0.6, 0.8, 0.8)]


@pytest.fixture
def folder(tiny_checkpoints: list[Path], spaced: Path) -> Path:
    """An untrained member of this test's own."""
    return Path(shutil.copytree(tiny_checkpoints[0], spaced / "member"))


@pytest.fixture(scope="module")
def tuned(tiny_checkpoints: list[Path], mini_dataset: Path) -> Tuning:
    return tune_thresholds(tiny_checkpoints[0], mini_dataset)


def test_the_highest_f1_wins_and_of_equals_the_least_overlap() -> None:
    assert choose(TRIALS) == TRIALS[1]
    assert choose(TRIALS[::-1]) == TRIALS[1]
    assert Trial(0.5, 0.4, 0.8, 0.8).f1 == pytest.approx(0.8)
    assert Trial(0.5, 0.4, 0.0, 0.0).f1 == 0


def test_constraints_come_first() -> None:
    assert choose(TRIALS, min_completeness=0.85) == TRIALS[0]
    assert choose(TRIALS, min_purity=0.85) == TRIALS[2]
    with pytest.raises(ConfigError, match=r"completeness 0\.95 and purity 0\.95 at once; the nearest, score 0\.5 and overlap 0\.4"):
        choose(TRIALS, 0.95, 0.95)


def test_larger_overlaps_than_wanted_are_not_chosen(tiny_checkpoints: list[Path], mini_dataset: Path) -> None:
    assert tune_thresholds(tiny_checkpoints[0], mini_dataset, max_overlap=0.3).best.nms_threshold == 0.3
    with pytest.raises(ConfigError, match=r"no overlap up to 0\.1 is tried; the least is 0\.3"):
        tune_thresholds(tiny_checkpoints[0], mini_dataset, max_overlap=0.1)


def test_every_pair_of_thresholds_is_tried_and_the_best_is_no_worse_than_before(tuned: Tuning) -> None:
    assert {(t.score_threshold, t.nms_threshold) for t in tuned.trials} >= {(s, o) for s in SCORES for o in OVERLAPS}
    assert (tuned.before.score_threshold, tuned.before.nms_threshold) == (0.3, 0.4)
    assert tuned.best.f1 >= tuned.before.f1
    assert tuned.gold > 0
    assert all(0 <= t.completeness <= 1 and 0 <= t.purity <= 1 for t in tuned.trials)


def with_thresholds(folder: Path, score: float, overlap: float) -> Member:
    config = read_info(folder).config
    inference = config.inference.model_copy(update={"score_threshold": score, "nms_threshold": overlap})
    config = config.model_copy(update={"inference": inference})
    return Member(load_network(folder / "member.safetensors", config), config)


def validation(path: Path) -> tuple[Dataset, Record]:
    dataset = open_dataset(path)
    return dataset, dataset.records("validation")[0]


def test_one_pass_counts_what_every_pair_of_thresholds_would_find(tiny_checkpoints: list[Path], mini_dataset: Path) -> None:
    dataset, record = validation(mini_dataset)
    overlaps, scores = np.array([0.3, 0.6]), np.array([0.2, 0.4, 0.45, 0.5])
    folder = tiny_checkpoints[0]
    counts = count(with_thresholds(folder, 0.3, 0.4), record, dataset.info, overlaps, scores)
    image = read_pixels(record, dataset.info.bands, with_wcs=False).data
    for i, overlap in enumerate(overlaps):
        for s, score in enumerate(scores):
            member = with_thresholds(folder, float(score), float(overlap))
            found = member.predict(image, lambda x, _y: np.zeros(len(x), np.float32))
            assert counts[i, s, 2] == len(found)
    assert (counts[..., 1] <= counts[..., 0]).all()
    assert (counts[..., 3] <= counts[..., 2]).all()
    assert (np.diff(counts[..., 2], axis=1) <= 0).all()


def test_the_choice_is_kept_in_the_member_and_nothing_else_changes(folder: Path) -> None:
    before, weights = read_info(folder), (folder / "member.safetensors").read_bytes()
    store(folder, Trial(0.55, 0.6, 0.75, 0.5))
    after = read_info(folder)
    expected = before.config.model_dump()
    expected["inference"] |= {"score_threshold": 0.55, "nms_threshold": 0.6}
    assert after.config == validate(TrainingConfig, expected, "test")
    assert after.metrics == before.metrics | {"tuned_completeness": 0.75, "tuned_purity": 0.5, "tuned_f1": 0.6}
    assert (folder / "member.safetensors").read_bytes() == weights
    assert sorted(path.name for path in folder.iterdir()) == ["member.safetensors", "member.yaml"]
    assert Member.load(folder).network.inference.score_threshold == 0.55


def test_a_description_that_cannot_be_written_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (folder / "member.yaml").read_text()

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deepdisc_ops.inference.tuning.write_info", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*the thresholds are what they were"):
        store(folder, TRIALS[0])
    assert (folder / "member.yaml").read_text() == text
    assert sorted(path.name for path in folder.iterdir()) == ["member.safetensors", "member.yaml"]


def test_a_split_without_gold_galaxies_is_an_error(folder: Path, mini_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepdisc_ops.inference.tuning.count", lambda *_: 0)
    with pytest.raises(CatalogError, match=r"2 images in split 'validation' and no gold galaxy there; name another split"):
        tune_thresholds(folder, mini_dataset)
