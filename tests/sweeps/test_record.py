from __future__ import annotations

import contextlib
import math
from pathlib import Path

import learning_curves
import pytest

from deepdisc_ops.errors import TrainingError
from deepdisc_ops.sweeps import trial
from deepdisc_ops.sweeps.record import Recorder, TrialProgress
from deepdisc_ops.sweeps.space import SweepSpec, parse_spec
from deepdisc_ops.tracking import Tracker


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
    ray_config = {"train.lr": rate, trial.PLAN: trial.plan_of(spec, out / "trials", learning_curves.train)}
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
    assert tracker.record(child.run_id).status == "RUNNING"
    result = again.close()
    assert [one.run_id for one in result.trials] == [child.run_id]
    assert [step for step, _ in tracker.history(child.run_id, "val_nll")] == [10, 20, 30, 40, 50]
