from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepdisc_ops.config import TrainingConfig
from deepdisc_ops.errors import CheckpointError, ConfigError, TrainingError
from deepdisc_ops.sweeps import select
from deepdisc_ops.tracking import CHECKPOINT_FOLDER, KIND_TAG, SWEEP_NAME_TAG, SWEEP_TAG, TRIAL_TAG, Tracker

TRIALS = [
    # name, backbone, val_nll, completeness, status
    ("a", "tiny", 0.1, 0.95, "FINISHED"),
    ("b", "tiny", 0.2, 0.99, "FINISHED"),
    ("c", "tiny", 0.3, 0.70, "FINISHED"),
    ("d", "small", 0.4, 0.97, "FINISHED"),
    ("failed", "small", 0.0, 1.0, "FAILED"),
    ("no number", "small", math.nan, 1.0, "FINISHED"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, store_uri: str) -> tuple[str, str, Path]:
    """(tracking URI, parent run id, folder) of a sweep called quick with the trials above."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tracker = Tracker(store_uri)
    tags = {KIND_TAG: "sweep", SWEEP_NAME_TAG: "quick"}
    parent = tracker.find_or_create("quick", (SWEEP_TAG, "quick-1"), tags=tags)
    for name, backbone, nll, completeness, status in TRIALS:
        metrics = {"val_nll": nll, "val_completeness": completeness}
        config = TrainingConfig.model_validate({"model": {"backbone": {"name": backbone}}})
        checkpoint = folder / name
        checkpoint.mkdir()
        description = {"config": config.model_dump(mode="json"), "metrics": metrics, "step": 5}
        (checkpoint / "member.yaml").write_text(yaml.safe_dump(description))
        run = tracker.find_or_create(name, (TRIAL_TAG, name), parent=parent, tags={"backbone": backbone})
        tracker.log_artifact(run, checkpoint, CHECKPOINT_FOLDER)
        tracker.log_summary(run, 5, {f"best_{key}": value for key, value in metrics.items()})
        tracker.end(run, status)
    return tracker.uri, parent, folder


def chosen(store: tuple[str, str, Path], k: int, **conditions: Any) -> list[str]:
    uri, _, folder = store
    members = select.select_members(uri, "quick", k, into=folder / "copies", **conditions)
    return [Tracker(uri).record(member.run_id).name for member in members]


@pytest.mark.parametrize(
    ("k", "conditions", "names"),
    [
        (1, {}, ["a"]),
        (4, {}, ["a", "b", "c", "d"]),
        (2, {"max_per_backbone": 1}, ["a", "d"]),
        (3, {"min_completeness": 0.9}, ["a", "b", "d"]),
        (2, {"metric": "val_completeness"}, ["no number", "b"]),
    ],
)
def test_the_best_that_meet_the_conditions_are_taken(
    store: tuple[str, str, Path], k: int, conditions: dict[str, Any], names: list[str]
) -> None:
    assert chosen(store, k, **conditions) == names


def test_too_few_are_an_error_with_the_number_found(store: tuple[str, str, Path]) -> None:
    with pytest.raises(TrainingError, match=r"3 of 6 trials of sweep 'quick' qualify, 4 members asked for"):
        chosen(store, 4, min_completeness=0.9)


def test_a_sweep_is_named_or_given_by_its_run(store: tuple[str, str, Path]) -> None:
    uri, parent, folder = store
    by_id = select.select_members(uri, parent, 2, into=folder)
    assert by_id == select.select_members(uri, "quick", 2, into=folder)
    with pytest.raises(ConfigError, match="no sweep 'slow' in .*; it holds: quick"):
        select.select_members(uri, "slow", 2, into=folder)


def test_metrics_that_cannot_rank_are_refused(store: tuple[str, str, Path]) -> None:
    with pytest.raises(ConfigError, match="metric 'val_bias' cannot rank members; expected one of train_loss"):
        chosen(store, 1, metric="val_bias")
    with pytest.raises(ConfigError, match="0 members asked for"):
        chosen(store, 0)


def test_a_selection_survives_the_round_trip(store: tuple[str, str, Path], spaced: Path) -> None:
    uri, _, folder = store
    members = select.select_members(uri, "quick", 2, into=folder)
    assert all((member.checkpoint / "member.yaml").exists() for member in members)
    assert members[0].config.model.backbone.name == "tiny"
    path = spaced / "deep" / "members.yaml"
    select.write_selection(members, path)
    assert select.read_selection(path) == members


@pytest.mark.parametrize(
    ("text", "error", "found"),
    [
        ("members: []", ConfigError, "lists no members"),
        ("member: []", ConfigError, "unknown key 'member', did you mean 'members'"),
        ("members: [{run_id: r, checkpoint: gone, metrics: {}, config: {}}]", CheckpointError, "checkpoint .*gone, which does not"),
    ],
)
def test_a_faulty_selection_is_one_line(spaced: Path, text: str, error: type[Exception], found: str) -> None:
    path = spaced / "members.yaml"
    path.write_text(text)
    with pytest.raises(error, match=found):
        select.read_selection(path)
