from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deepdisc_ops.errors import ConfigError, TrainingError
from deepdisc_ops.tracking import CHECKPOINT_FOLDER, TRIAL_TAG, Tracker

MakeStore = Callable[[str], str]


@pytest.fixture
def tracker(make_store: MakeStore) -> Tracker:
    return Tracker(make_store("store"))


def trained(tracker: Tracker, folder: Path, name: str) -> str:
    run = tracker.find_or_create(name, (TRIAL_TAG, name))
    (folder / "best").mkdir(exist_ok=True)
    (folder / "best" / "member.yaml").write_text(name)
    tracker.log_artifact(run, folder / "best", CHECKPOINT_FOLDER)
    return run


def test_a_run_has_one_version_and_aliases_move(tracker: Tracker, spaced: Path) -> None:
    one, two = trained(tracker, spaced, "one"), trained(tracker, spaced, "two")
    assert tracker.registered("it's a sky") == []
    first = tracker.register("it's a sky", one, ("champion", "member-0"))
    assert (first.version, first.run_id, first.aliases) == (1, one, ("champion", "member-0"))
    assert tracker.register("it's a sky", one) == first
    second = tracker.register("it's a sky", two, ("champion", "member-1"))
    assert [(each.run_id, each.aliases) for each in tracker.registered("it's a sky")] == [
        (one, ("member-0",)),
        (two, ("champion", "member-1")),
    ]
    assert second.version == 2


def test_the_registered_checkpoint_is_found_by_mlflow_itself(
    tracker: Tracker, spaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.artifacts import download_artifacts

    run = trained(tracker, spaced, "by alias")
    tracker.register("lsst", run, ("champion",))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
    folder = download_artifacts("models:/lsst@champion", dst_path=str(spaced))
    assert (Path(folder) / "member.yaml").read_text() == "by alias"


@pytest.mark.parametrize("alias", ["v1", "V12", "latest", "Latest"])
def test_aliases_that_mlflow_reserves_are_refused(alias: str, tracker: Tracker, spaced: Path) -> None:
    run = trained(tracker, spaced, "reserved")
    with pytest.raises(ConfigError, match="is reserved by MLflow; take another, such as champion"):
        tracker.register("lsst", run, (alias,))
    assert tracker.registered("lsst") == []


@pytest.mark.parametrize(("name", "alias"), [("", "a"), ("a/b", "a"), ("a:b", "a"), ("a", ""), ("a", "best one")])
def test_names_that_mlflow_would_refuse_are_refused(name: str, alias: str, tracker: Tracker) -> None:
    with pytest.raises(ConfigError, match="is not allowed; expected"):
        tracker.register(name, "unread", (alias,))


def test_a_run_without_a_checkpoint_is_refused(tracker: Tracker) -> None:
    run = tracker.find_or_create("empty", (TRIAL_TAG, "empty"))
    with pytest.raises(TrainingError, match="has no checkpoint to register"):
        tracker.register("lsst", run)
