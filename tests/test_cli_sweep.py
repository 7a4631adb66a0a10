"""``deepdisc-ops sweep``: what a sweep would cost, and how its news are shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from deepdisc_ops.cli import sweep
from deepdisc_ops.resources import find
from deepdisc_ops.sweeps.record import TrialProgress
from deepdisc_ops.sweeps.space import load_spec, parse_spec


def told(table: object) -> str:
    console = Console(width=200, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as caught:
        console.print(table)
    return caught.get()


def test_a_dry_run_tells_trials_and_cost_by_backbone_and_starts_nothing(spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(spaced)
    sweep.sweep_run(find("tune/scaling.yaml"), spaced / "out", dry_run=True)
    assert list(spaced.iterdir()) == []
    spec = load_spec(find("tune/scaling.yaml"))
    text = told(sweep.plan_table(spec, sweep.plan(spec)))
    assert "12 trials, 1 CPUs and 0 GPUs each" in text
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in text.splitlines() if "│" in line}
    assert set(rows) == {"tiny", "small"}
    for cells in rows.values():
        trials, parameters, most, expected, _ = (cell.strip() for cell in cells)
        assert (trials, most, expected) == ("6", "4,800", "4,800")  # first in, first out: all go to their end
        assert 0 < float(parameters) < 3
    assert "9,600 steps" in text


def test_successive_halving_is_expected_to_cost_less() -> None:
    spec = load_spec(find("tune/quick.yaml"))
    row = next(line for line in told(sweep.plan_table(spec, sweep.plan(spec))).splitlines() if "│ tiny" in line)
    most, expected = (float(cell.replace(",", "")) for cell in row.split("│")[4:6])
    assert expected < most


def test_values_are_told_in_few_words() -> None:
    values = {"model.backbone.name": "tiny", "train.lr, train.steps": [1e-3, 500], "data.fraction": 0.5}
    assert sweep.shown_values(values) == "backbone tiny, lr 0.001, steps 500, fraction 0.5"


def test_the_live_table_holds_those_that_run_and_then_the_best() -> None:
    spec = parse_spec({"name": "s", "scheduler": {"name": "fifo"}}, "spec")

    def news(name: str, state: str, nll: float) -> TrialProgress:
        return TrialProgress(name, state, 10, 20, {"train.lr": 0.1}, {"val_nll": nll})  # type: ignore[arg-type]  # a word of State

    latest = {one.trial_id: one for one in (news("a", "finished", 0.5), news("b", "running", 0.9), news("c", "finished", 0.1))}
    text = told(sweep._live_table(spec, 5, latest))
    assert "2 of 5 trials ended, 1 run" in text
    assert [line.split("│")[1].strip() for line in text.splitlines() if "10/20" in line] == ["b", "c", "a"]
