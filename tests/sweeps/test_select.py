from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deepdisc_ops.config import TrainingConfig
from deepdisc_ops.errors import CheckpointError, ConfigError, TrainingError
from deepdisc_ops.sweeps import select
from deepdisc_ops.tracking import CHECKPOINT_FOLDER, KIND_TAG, SWEEP_NAME_TAG, SWEEP_TAG, TRIAL_TAG, RunRecord, Tracker

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


def test_the_error_says_how_many_were_lost_to_what(store: tuple[str, str, Path]) -> None:
    lost = (
        r"2 of 6 trials .* \(1 failed or not at their end; 1 without a finite val_nll; "
        r"1 with a completeness below 0.9; 1 beyond 1 of a backbone\)"
    )
    with pytest.raises(TrainingError, match=lost):
        chosen(store, 3, min_completeness=0.9, max_per_backbone=1)


def run_of(name: str, nll: float, backbone: str, fold: int | None, **params: str) -> RunRecord:
    own = {"data.partition": str(fold), **params}
    return RunRecord(name, name, "FINISHED", {"best_val_nll": nll, "best_val_completeness": 1.0}, own, {"backbone": backbone})


def test_conditions_combine_without_barring_better_company() -> None:
    """The best trial's fold and backbone would leave no place for the third: the best set is without it."""
    ranked = [run_of("best", 0.1, "a", 0), run_of("b0", 0.2, "b", 0), run_of("a1", 0.3, "a", 1), run_of("c0", 0.9, "c", 0)]
    names = lambda k, **limits: [run.run_id for run in select.best_set(ranked, k, select.Conditions(**limits))]  # noqa: E731  short, and used below alone
    assert names(3) == ["best", "b0", "a1"]
    assert names(2, max_per_backbone=1) == ["best", "b0"]
    assert names(2, one_per_fold=True) == ["best", "a1"]
    assert names(2, max_per_backbone=1, one_per_fold=True) == ["b0", "a1"]
    assert names(3, max_per_backbone=1, one_per_fold=True) == ["b0", "a1"]
    assert names(1, max_per_backbone=1, one_per_fold=True) == ["best"]


@given(st.lists(st.tuples(st.integers(0, 50), st.sampled_from("abc"), st.integers(0, 3)), max_size=7), st.integers(1, 4))
def test_the_best_set_is_the_best_of_all_that_go_together(trials: list[tuple[int, str, int]], k: int) -> None:
    runs = [run_of(str(i), value / 10, backbone, fold) for i, (value, backbone, fold) in enumerate(sorted(trials))]
    limits = select.Conditions(max_per_backbone=1, one_per_fold=True)
    found = select.best_set(runs, k, limits)
    allowed = [s for size in range(k + 1) for s in itertools.combinations(runs, size) if limits.go_together(s)]
    best = min(allowed, key=lambda s: (-len(s), sum(run.metrics["best_val_nll"] for run in s)))
    assert limits.go_together(found)
    assert len(found) == len(best)
    assert sum(run.metrics["best_val_nll"] for run in found) == pytest.approx(sum(run.metrics["best_val_nll"] for run in best))


def test_only_trials_that_can_share_an_ensemble_are_taken(store_uri: str, spaced: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(store_uri)
    parent = tracker.find_or_create("mixed", (SWEEP_TAG, "mixed-1"), tags={KIND_TAG: "sweep", SWEEP_NAME_TAG: "mixed"})
    for name, nll, bands, fold in [
        ("best", 0.1, "gri", 0),
        ("four", 0.2, "griz", 1),
        ("same", 0.3, "gri", 0),
        ("bare", 0.4, "gri", 1),
    ]:
        run = tracker.find_or_create(name, (TRIAL_TAG, f"mixed_{name}"), parent=parent, tags={"backbone": "tiny"})
        tracker.log_params(run, {"model.bands": bands, "data.partition": str(fold)})
        tracker.log_summary(run, 5, {"best_val_nll": nll})
        if name != "bare":
            checkpoint = spaced / name
            checkpoint.mkdir()
            (checkpoint / "member.yaml").write_text(yaml.safe_dump({"config": {}, "metrics": {"val_nll": nll}}))
            tracker.log_artifact(run, checkpoint, CHECKPOINT_FOLDER)
        tracker.end(run)
    members = select.select_members(store_uri, "mixed", 2, into=spaced)
    assert [member.metrics["val_nll"] for member in members] == [0.1, 0.3]
    assert "left out: 1 with another model.bands than that of the best, best: gri" in caplog.text
    lost = r"1 of 4 trials .* \(1 without a checkpoint; 1 with another model.bands .*; 1 of a fold that is taken\)"
    with pytest.raises(TrainingError, match=lost):
        select.select_members(store_uri, "mixed", 2, into=spaced, one_per_fold=True)


def test_a_store_that_is_not_there_is_not_made(spaced: Path) -> None:
    with pytest.raises(ConfigError, match=r"mlflow.db"):
        select.select_members(f"sqlite:///{spaced / 'mlflow.db'}", "quick", 1, into=spaced)
    assert not list(spaced.iterdir())


def test_a_sweep_is_named_or_given_by_its_run(store: tuple[str, str, Path]) -> None:
    uri, parent, folder = store
    by_id = select.select_members(uri, parent, 2, into=folder)
    assert by_id == select.select_members(uri, "quick", 2, into=folder)
    with pytest.raises(ConfigError, match="no sweep 'slow' in .*; it holds: .*quick"):
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
