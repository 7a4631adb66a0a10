from __future__ import annotations

import contextlib
import math
from pathlib import Path

import learning_curves
import pytest

from deepdisc_ops.errors import TrainingError
from deepdisc_ops.sweeps import trial
from deepdisc_ops.sweeps.record import DROPPED_TAG, Recorder, TrialProgress
from deepdisc_ops.sweeps.space import Keep, SweepSpec, parse_spec
from deepdisc_ops.tracking import CHECKPOINT_FOLDER, Tracker


class AwayTracker(Tracker):
    """A store that cannot be reached while ``away``."""

    away = False

    def log_measurements(self, run_id: str, rows: object) -> int:
        if self.away:
            raise TrainingError("tracking could not log metrics: connection refused")
        return super().log_measurements(run_id, rows)  # type: ignore[arg-type]


@pytest.fixture
def spec() -> SweepSpec:
    return parse_spec({"name": "s", "base": {"train": {"steps": 50, "weight_decay": 0}}, "scheduler": {"name": "fifo"}}, "spec")


def train(spec: SweepSpec, recorder: Recorder, out: Path, trial_id: str, rate: float, steps: int = 50) -> None:
    """What Ray does with one trial, in this process; it stops the trial after ``steps``."""
    ray_config = {trial.VALUES: {"train.lr": rate}, trial.PLAN: trial.plan_of(spec, out / "trials", learning_curves.train)}
    recorder.started(trial_id, ray_config)

    def tell(metrics: dict[str, float]) -> None:
        recorder.measured(trial_id)
        if metrics["step"] == steps:
            raise SystemExit(0)

    with contextlib.suppress(SystemExit):
        trial.train_in_folder(trial.planned_config(ray_config), out / "trials" / trial_id, learning_curves.train, tell)


def test_news_and_runs_agree(store_uri: str, spec: SweepSpec, spaced: Path) -> None:
    news: list[TrialProgress] = []
    recorder = Recorder(Tracker(store_uri, "records"), spec, "sweep-1", spaced, news.append)
    train(spec, recorder, spaced, "s_00000", 0.5)
    recorder.ended("s_00000", failed=False)
    train(spec, recorder, spaced, "s_00001", 0.25, steps=20)
    recorder.ended("s_00001", failed=False)
    result = recorder.close()
    assert [(one.state, one.step) for one in news[-5:]] == [
        ("finished", 50),
        ("running", 0),
        ("running", 10),
        ("running", 20),
        ("stopped_early", 20),
    ]
    assert [one.state for one in result.trials] == ["finished", "stopped_early"]
    assert result.best.values == {"train.lr": 0.25}
    assert Recorder(Tracker(store_uri, "records"), spec, "sweep-1", spaced, None).close() == result


def test_a_store_that_was_away_is_caught_up_with(store_uri: str, spec: SweepSpec, spaced: Path) -> None:
    tracker = AwayTracker(store_uri, "records")
    recorder = Recorder(tracker, spec, "sweep-2", spaced, None)
    tracker.away = True
    train(spec, recorder, spaced, "s_00000", 0.5)
    recorder.ended("s_00000", failed=False)
    with pytest.raises(TrainingError, match="connection refused"):
        recorder.close()
    tracker.away = False
    result = recorder.close()
    assert [step for step, _ in tracker.history(result.trials[0].run_id, "val_nll")] == [10, 20, 30, 40, 50]


def test_a_sweep_of_failures_is_an_error(store_uri: str, spec: SweepSpec, spaced: Path) -> None:
    recorder = Recorder(Tracker(store_uri, "records"), spec, "sweep-failed", spaced, None)
    train(spec, recorder, spaced, "s_00000", 0.5, steps=10)
    (spaced / "trials" / "s_00000" / "error.txt").write_text("ValueError: bad")
    with pytest.raises(
        TrainingError, match="none of 1 trials left a checkpoint with a finite val_nll; first fault: ValueError: bad"
    ):
        recorder.close(failed={"s_00000"})
    assert Tracker(store_uri, "records").record(recorder.parent).status == "FAILED"


def test_a_sweep_without_a_finite_metric_is_an_error(store_uri: str, spec: SweepSpec, spaced: Path) -> None:
    recorder = Recorder(Tracker(store_uri, "records"), spec, "sweep-infinite", spaced, None)
    train(spec, recorder, spaced, "s_00000", math.inf)
    with pytest.raises(TrainingError, match="none of 1 trials .* finite val_nll; see .*trials"):
        recorder.close()


def test_an_interrupted_sweep_is_killed_and_opened_again(store_uri: str, spec: SweepSpec, spaced: Path) -> None:
    tracker = Tracker(store_uri, "records")
    recorder = Recorder(tracker, spec, "sweep-3", spaced, None)
    train(spec, recorder, spaced, "s_00000", 0.5, steps=20)
    recorder.close_interrupted()
    (child,) = tracker.children(recorder.parent)
    assert (child.status, tracker.record(recorder.parent).status) == ("KILLED", "KILLED")

    again = Recorder(Tracker(store_uri, "records"), spec, "sweep-3", spaced, None)
    train(spec, again, spaced, "s_00000", 0.5)
    again.catch_up()
    assert tracker.record(child.run_id).status == "RUNNING"
    result = again.close()
    assert [one.run_id for one in result.trials] == [child.run_id]
    assert [step for step, _ in tracker.history(child.run_id, "val_nll")] == [10, 20, 30, 40, 50]


def test_of_ended_trials_the_best_checkpoints_alone_are_kept(store_uri: str, spec: SweepSpec, spaced: Path) -> None:
    spec = spec.model_copy(update={"keep": Keep(members=2)})
    tracker = Tracker(store_uri, "records")
    recorder = Recorder(tracker, spec, "sweep-keep", spaced, None)
    for number, rate in enumerate([0.3, 0.1, 0.4, 0.2]):
        train(spec, recorder, spaced, f"s_{number}", rate)
        recorder.ended(f"s_{number}", failed=False)
    result = recorder.close()
    assert [(one.folder / "best").exists() for one in result.trials] == [False, True, False, True]
    assert [(one.folder / "last").exists() for one in result.trials] == [False] * 4
    assert result.best.trial_id == "s_1"
    assert [CHECKPOINT_FOLDER in tracker.artifacts(one.run_id) for one in result.trials] == [False, True, False, True]
    assert [tracker.record(one.run_id).tags.get(DROPPED_TAG) for one in result.trials] == ["true", None, "true", None]


def test_a_trial_that_a_population_changed_keeps_its_first_settings(store_uri: str, spec: SweepSpec, spaced: Path) -> None:
    tracker = Tracker(store_uri, "records")
    recorder = Recorder(tracker, spec, "sweep-population", spaced, None)
    train(spec, recorder, spaced, "s_0", 0.5, steps=20)
    plan = trial.plan_of(spec, spaced / "trials", learning_curves.train)
    recorder.started("s_0", {trial.VALUES: {"train.lr": 0.25}, trial.PLAN: plan})
    recorder.catch_up()
    (child,) = tracker.children(recorder.parent)
    assert (child.params["train.lr"], child.tags["drawn"]) == ("0.5", '{"train.lr": 0.25}')


def test_a_trial_that_died_without_a_word_is_worth_another_try(store_uri: str, spec: SweepSpec, spaced: Path) -> None:
    for name, fault in (("own", "ValueError: bad"), ("died", None)):
        (spaced / name).mkdir()
        recorder = Recorder(Tracker(store_uri, "records"), spec, f"sweep-{name}", spaced / name, None)
        train(spec, recorder, spaced / name, "s_0", 0.5, steps=10)
        if fault:
            (spaced / name / "trials" / "s_0" / "error.txt").write_text(fault)
        recorder.ended("s_0", failed=True)
        recorder.catch_up()
        assert recorder.lost() is (fault is None)
