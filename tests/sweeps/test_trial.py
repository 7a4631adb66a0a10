from __future__ import annotations

import math
import shutil
from pathlib import Path

import learning_curves
import pytest

from deepdisc_ops.config import TrainingConfig, TrainSettings
from deepdisc_ops.errors import CheckpointError
from deepdisc_ops.sweeps import trial
from deepdisc_ops.sweeps.space import Resources, SweepSpec


class Stop(Exception):
    """What the scheduler's side of a report may raise."""


def config(steps: int = 50) -> TrainingConfig:
    return TrainingConfig(train=TrainSettings(steps=steps, weight_decay=0))


def journal_steps(folder: Path) -> list[int]:
    return [row.step for row in trial.read_journal(folder)]


def test_every_report_reaches_the_journal_and_the_scheduler(spaced: Path) -> None:
    told: list[dict[str, float]] = []
    trial.train_in_folder(config(), spaced, learning_curves.train, told.append)
    assert [entry["step"] for entry in told] == journal_steps(spaced) == [10, 20, 30, 40, 50]
    assert trial.read_checkpoint(spaced / "best").step == 50
    assert told[-1]["val_nll"] == trial.read_journal(spaced)[-1].metrics["val_nll"]


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_a_trial_that_was_stopped_anywhere_goes_on_without_gap_or_repetition(spaced: Path, lost: int) -> None:
    def stop_at_30(metrics: dict[str, float]) -> None:
        if metrics["step"] == 30:
            raise Stop

    with pytest.raises(Stop):
        trial.train_in_folder(config(), spaced, learning_curves.train, stop_at_30)
    lines = (spaced / "metrics.jsonl").read_text().splitlines(keepends=True)
    torn = "".join(lines[: len(lines) - lost]) + ('{"step": 3' if lost else "")
    (spaced / "metrics.jsonl").write_text(torn)

    told: list[float] = []
    trial.train_in_folder(config(), spaced, learning_curves.train, lambda metrics: told.append(metrics["step"]))
    assert told == [40, 50]
    assert journal_steps(spaced) == [10, 20, 30, 40, 50]


def test_a_complete_trial_tells_its_last_metrics_once(spaced: Path) -> None:
    trial.train_in_folder(config(), spaced, learning_curves.train, lambda _: None)
    told: list[float] = []
    trial.train_in_folder(config(), spaced, learning_curves.train, lambda metrics: told.append(metrics["step"]))
    assert told == [50]
    assert journal_steps(spaced) == [10, 20, 30, 40, 50]


def test_the_folder_of_a_trial_says_what_it_trains(spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(spaced)
    base = {"train": {"steps": 30}, "data": {"path": "scenes"}}
    spec = SweepSpec(name="s", base=base, resources=Resources(cpus=2.5))
    plan = trial.plan_of(spec, spaced, learning_curves.train)
    assert plan["train"] == "learning_curves:train"
    trial.prepare(spaced / "t_1", {trial.VALUES: {"train.lr": 0.25}, trial.PLAN: plan})
    found, drawn = trial.read_prepared(spaced / "t_1")
    assert drawn == {"train.lr": 0.25}
    assert (found.train.lr, found.train.steps, found.train.threads) == (0.25, 30, 2)
    assert found.data.path == spaced / "scenes"
    assert trial.read_checkpoint(spaced / "t_1" / "best") is None
    assert journal_steps(spaced / "t_1") == []


@pytest.mark.parametrize(("value", "told"), [(0.5, 0.5), (math.inf, 1e30), (-math.inf, 1e30), (math.nan, 1e30)])
def test_a_metric_that_is_no_number_ranks_last(value: float, told: float) -> None:
    assert trial.rankable({"val_nll": value, "lr": math.nan}, "val_nll", 1e30)["val_nll"] == told


def test_ranks_share_the_cpus_of_their_trial(spaced: Path) -> None:
    base = {"train": {"ranks": 2}, "model": {"weights": "start"}}
    plan = trial.plan_of(SweepSpec(name="s", base=base, resources=Resources(cpus=6)), spaced, learning_curves.train)
    found = trial.planned_config({trial.VALUES: {}, trial.PLAN: plan})
    assert found.train.threads == 3
    assert found.model.weights == Path.cwd() / "start"
    base["model"] = {"backbone_weights": "start.pth"}
    plan = trial.plan_of(SweepSpec(name="s", base=base), spaced, learning_curves.train)
    assert trial.planned_config({trial.VALUES: {}, trial.PLAN: plan}).model.backbone_weights == Path.cwd() / "start.pth"


def test_a_trial_whose_state_was_cleared_has_ended(spaced: Path) -> None:
    trial.train_in_folder(config(30), spaced, learning_curves.train, lambda _: None)
    shutil.rmtree(spaced / "last")
    told: list[float] = []
    trial.train_in_folder(config(), spaced, learning_curves.train, lambda metrics: told.append(metrics["step"]))
    assert told == [30]
    assert journal_steps(spaced) == [10, 20, 30]


def test_measurements_of_the_machine_are_in_the_journal(spaced: Path) -> None:
    trial.train_in_folder(config(20), spaced, learning_curves.train, lambda _: None, lambda: {"system/cpu": 50.0})
    assert [row.metrics["system/cpu"] for row in trial.read_journal(spaced)] == [50.0, 50.0]


def test_a_state_of_another_kind_of_run_is_not_taken_over(spaced: Path) -> None:
    donor, heir = spaced / "donor", spaced / "heir"
    trial.train_in_folder(config(40), donor, learning_curves.train, lambda _: None)
    with pytest.raises(CheckpointError, match=r"cannot go on with another train\.steps"):
        trial.inherit(trial.take_snapshot(donor, 40), heir, config(50))


def test_the_latest_snapshots_are_kept_and_the_next_one_serves_for_one_that_has_gone(spaced: Path) -> None:
    donor, heir = spaced / "donor", spaced / "heir"
    taken = []
    trial.train_in_folder(
        config(70), donor, learning_curves.train, lambda told: taken.append(trial.take_snapshot(donor, int(told["step"])))
    )
    assert [path.exists() for path in taken] == [False] * 3 + [True] * 4
    trial.inherit(taken[0], heir, config(70))
    assert trial.read_checkpoint(heir / "best").step == 40
    trial.inherit(taken[5], heir, config(70))
    assert trial.read_checkpoint(heir / "best").step == 60
    with pytest.raises(CheckpointError, match="is gone, and nothing came after it"):
        trial.inherit(donor / "population" / "000000080", heir, config(70))


def test_a_population_shares_states_under_changed_rates(spaced: Path) -> None:
    donor, heir = spaced / "donor", spaced / "heir"

    def until_30(metrics: dict[str, float]) -> None:
        if metrics["step"] == 30:
            raise Stop

    for folder in (donor, heir):
        with pytest.raises(Stop):
            trial.train_in_folder(config(), folder, learning_curves.train, until_30)
    snapshot = trial.take_snapshot(donor, 30)
    before = (snapshot / "last" / "state.pt").read_bytes()
    changed = TrainingConfig(train=TrainSettings(steps=50, weight_decay=0, lr=0.5))
    trial.inherit(snapshot, heir, changed)
    told: list[tuple[float, float]] = []
    trial.train_in_folder(changed, heir, learning_curves.train, lambda metrics: told.append((metrics["step"], metrics["lr"])))
    assert told == [(40, 0.5), (50, 0.5)]
    assert journal_steps(heir) == [10, 20, 30, 40, 50]
    assert (snapshot / "last" / "state.pt").read_bytes() == before
