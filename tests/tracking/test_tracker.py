from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest

from deepdisc_ops.config import flatten
from deepdisc_ops.errors import TrainingError
from deepdisc_ops.tracking import TRIAL_TAG, Measurement, Tracker, default_uri


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("a store")


@pytest.fixture
def tracker(store: Path) -> Tracker:
    return Tracker(default_uri(store))


def rows(*steps: int) -> list[Measurement]:
    return [Measurement(step, 1.7e9 + step, {"val_nll": 1 / step, "lr": 1e-3}) for step in steps]


def test_a_run_is_found_again_by_its_tag(tracker: Tracker, store: Path) -> None:
    parent = tracker.find_or_create("sweep", ("deepdisc_ops.sweep", "found-again"))
    child = tracker.find_or_create("one", (TRIAL_TAG, "t_0"), parent=parent)
    tracker.end(child)
    again = Tracker(default_uri(store))
    assert again.find_or_create("one", (TRIAL_TAG, "t_0"), parent=parent) == child
    assert again.record(child).status == "RUNNING"
    assert [run.run_id for run in again.children(parent)] == [child]
    other_parent = tracker.find_or_create("sweep", ("deepdisc_ops.sweep", "another"))
    assert tracker.find_or_create("one", (TRIAL_TAG, "t_0"), parent=other_parent) != child


def test_steps_are_logged_once_and_increase(tracker: Tracker, store: Path) -> None:
    run = tracker.find_or_create("steps", (TRIAL_TAG, "steps"))
    assert tracker.log_measurements(run, rows(10, 20)) == 2
    assert tracker.log_measurements(run, rows(10, 20, 30)) == 1
    tracker.log_summary(run, 100, {"best_val_nll": 0.1, "parameters": 5})
    resumed = Tracker(default_uri(store))
    assert resumed.log_measurements(run, rows(20, 30, 40)) == 1
    assert resumed.history(run, "val_nll") == [(10, 0.1), (20, 0.05), (30, 1 / 30), (40, 0.025)]


def test_a_figure_of_the_whole_run_is_logged_once(tracker: Tracker) -> None:
    run = tracker.find_or_create("summary", (TRIAL_TAG, "summary"))
    for _ in range(2):
        tracker.log_summary(run, 7, {"best_val_nll": 0.25, "best_val_bias": math.nan, "best_val_outliers": math.inf})
    assert tracker.history(run, "best_val_nll") == [(7, 0.25)]
    assert len(tracker.history(run, "best_val_bias")) == 1
    assert tracker.history(run, "best_val_outliers") == [(7, math.inf)]
    assert tracker.record(run).metrics["best_val_outliers"] == math.inf


def test_parameters_metrics_files_dataset_and_provenance_come_back(tracker: Tracker, spaced: Path) -> None:
    run = tracker.find_or_create("whole", (TRIAL_TAG, "whole"), tags={"backbone": "tiny"})
    params = flatten({"train": {"lr": 0.5, "milestones": (0.3, 0.5)}, **{f"many{i}": i for i in range(150)}})
    tracker.log_params(run, params)
    tracker.log_params(run, params)
    tracker.log_dataset(run, "scenes", "abc", spaced, 0.5)
    (spaced / "best").mkdir()
    (spaced / "best" / "member.yaml").write_text("step: 1")
    tracker.log_artifact(run, spaced / "best", "checkpoint")
    tracker.log_measurements(run, [Measurement(1, 0.0, {"val_nll": math.nan})])
    tracker.end(run)

    record = tracker.record(run)
    assert record.status == "FINISHED"
    assert record.params["train.lr"] == "0.5"
    assert record.params["train.milestones"] == "[0.3, 0.5]"
    assert len(record.params) == 152
    assert math.isnan(record.metrics["val_nll"])
    assert record.tags["backbone"] == "tiny"
    assert {"deepdisc_ops.version", "mlflow.source.git.commit", "version.torch", "version.mlflow"} <= set(record.tags)
    assert tracker.artifacts(run) == ["checkpoint"]
    assert (tracker.fetch(run, "checkpoint", spaced / "unused") / "member.yaml").read_text() == "step: 1"
    assert not (spaced / "unused").exists()


def test_a_changed_parameter_is_refused_in_one_line(tracker: Tracker) -> None:
    run = tracker.find_or_create("fixed", (TRIAL_TAG, "fixed"))
    tracker.log_params(run, {"lr": "1"})
    with pytest.raises(TrainingError, match="tracking could not log parameters") as caught:
        tracker.log_params(run, {"lr": "2"})
    assert "\n" not in str(caught.value)


def test_steps_that_a_broken_call_has_not_written_are_written_later(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tracker.find_or_create("broken", (TRIAL_TAG, "broken"))
    many = [Measurement(step, 1.7e9 + step, {f"m{i}": float(step) for i in range(300)}) for step in range(1, 10)]
    log_batch, calls = tracker.client.log_batch, []

    def failing(*args: Any, **kwargs: Any) -> None:
        calls.append(len(kwargs["metrics"]))
        if len(calls) == 2:
            raise OSError("connection reset")
        log_batch(*args, **kwargs)

    monkeypatch.setattr(tracker.client, "log_batch", failing)
    with pytest.raises(TrainingError, match="connection reset"):
        tracker.log_measurements(run, many)
    assert tracker.log_measurements(run, many) == 6
    assert calls == [900, 900, 900, 900]
    assert tracker.history(run, "m0") == tracker.history(run, "m299") == [(step, float(step)) for step in range(1, 10)]


def test_tags_may_hold_quotes(tracker: Tracker) -> None:
    run = tracker.find_or_create("quoted", (TRIAL_TAG, "it's"))
    assert tracker.find_or_create("quoted", (TRIAL_TAG, "it's")) == run
    assert [one.run_id for one in tracker.runs({TRIAL_TAG: "it's"})] == [run]


def test_opening_a_fresh_store_says_nothing(
    spaced: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    handlers = list(logging.getLogger().handlers)
    Tracker(default_uri(spaced / "new"))
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().handlers == handlers
