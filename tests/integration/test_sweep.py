"""Sweeps on a real Ray and a real MLflow store: what is recorded, what survives, what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest

from deepdisc_ops.errors import ConfigError
from deepdisc_ops.sweeps import space
from deepdisc_ops.sweeps.record import TrialProgress
from deepdisc_ops.sweeps.run import run_sweep
from deepdisc_ops.sweeps.select import select_members
from deepdisc_ops.tracking import KIND_TAG, TRIAL_TAG, Tracker, default_uri

# A start that Ray does not finish within its 30 s, on a busy machine, is repeated; it leaves the objects of ended processes.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")]

ROOT = Path(__file__).parents[2]
CURVES = ROOT / "tests" / "sweeps"


@pytest.fixture(autouse=True)
def curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ray's workers, and this process, import the stand-in for training by name."""
    monkeypatch.syspath_prepend(CURVES)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(CURVES), os.environ.get("PYTHONPATH")])))


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No process that was started during the test may outlive it."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    after = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert [(child.pid, child.name()) for child in after] == []


def fake_spec(rates: list[float], **changes: Any) -> space.SweepSpec:
    tree = {
        "name": "fake",
        "base": {"train": {"steps": 80, "weight_decay": 0.01, "warmup_steps": 0}, "model": {"backbone": {"name": "tiny"}}},
        "space": {"train.lr": {"grid": rates}, "data.fraction": {"uniform": [0.5, 1.0]}} if rates else {},
        "scheduler": {"name": "fifo"},
    }
    return space.parse_spec(tree | changes, "spec")


def assert_one_run_per_trial(uri: str, parent: str, trials: int) -> Tracker:
    """One parent, one child per trial, every metric with strictly increasing steps."""
    tracker = Tracker(uri)
    assert [run.run_id for run in tracker.runs({KIND_TAG: "sweep"})] == [parent]
    children = tracker.children(parent)
    assert len(children) == len({child.tags[TRIAL_TAG] for child in children}) == trials
    for child in children:
        steps = [step for step, _ in tracker.history(child.run_id, "val_nll")]
        assert steps == list(range(10, max(steps, default=0) + 1, 10))
    return tracker


def test_asha_stops_the_worse_trials_and_all_are_recorded(spaced: Path) -> None:
    import learning_curves

    spec = fake_spec([0.1, 0.2, 0.4, 0.8], scheduler={"name": "asha", "grace_steps": 20}, concurrency=1)
    news: list[TrialProgress] = []
    handler = signal.getsignal(signal.SIGTERM)
    result = run_sweep(spec, spaced, train=learning_curves.train, progress=news.append)

    assert signal.getsignal(signal.SIGTERM) is handler
    assert [trial.state for trial in result.trials] == ["finished", "stopped_early", "stopped_early", "stopped_early"]
    assert [trial.step for trial in result.trials] == [80, 20, 20, 20]
    assert [trial.values["train.lr"] for trial in result.trials] == [0.1, 0.2, 0.4, 0.8]
    assert result.best.trial_id == result.trials[0].trial_id
    assert {(one.trial_id, one.state) for one in news} >= {(trial.trial_id, trial.state) for trial in result.trials}

    tracker = assert_one_run_per_trial(result.tracking_uri, result.parent_run_id, 4)
    parent = tracker.record(result.parent_run_id)
    assert (parent.status, parent.params["trials"], parent.tags["best_trial"]) == ("FINISHED", "4", result.best.trial_id)
    assert parent.metrics["best_val_nll"] == pytest.approx(0.1 + 1 / 80)
    assert tracker.artifacts(parent.run_id) == ["spec.yaml"]
    for trial in result.trials:
        child = tracker.record(trial.run_id)
        assert child.status == "FINISHED"
        assert child.tags["stopped_early"] == str(trial.step < 80).lower()
        assert child.tags["backbone"] == "tiny"
        assert float(child.params["data.fraction"]) == trial.values["data.fraction"]
        assert child.metrics["best_val_nll"] == trial.best["val_nll"]
        assert tracker.artifacts(child.run_id) == ["checkpoint", "config.yaml", "loss.png"]
        kept = {"best", "config.yaml", "drawn.json", "loss.png", "metrics.jsonl"}
        assert kept == {path.name for path in trial.folder.iterdir()}
        (cpu,) = {value > 0 for _, value in tracker.history(trial.run_id, "system/cpu_utilization_percentage")}
        assert cpu

    members = select_members(result.tracking_uri, "fake", 2, into=spaced / "copies")
    assert [member.run_id for member in members] == [trial.run_id for trial in result.trials[:2]]
    assert members[0].config.train.threads == 1
    # The same call again returns the finished sweep without starting anything.
    assert run_sweep(spec, spaced, train=learning_curves.train).trials == result.trials
    with pytest.raises(ConfigError, match="holds sweep 'fake' with another specification"):
        run_sweep(fake_spec([0.1]), spaced, train=learning_curves.train)


def test_failed_trials_are_recorded_and_the_others_count(spaced: Path) -> None:
    import learning_curves

    result = run_sweep(fake_spec([0.1, 1.5, 2.5]), spaced, train=learning_curves.train_or_fail)
    assert [trial.state for trial in result.trials] == ["finished", "failed", "failed"]
    assert [trial.error for trial in result.trials] == [
        None,
        "ValueError: lr 1.5 is too high",
        "its process died without a word; memory is the usual reason",
    ]
    tracker = assert_one_run_per_trial(result.tracking_uri, result.parent_run_id, 3)
    assert [tracker.record(trial.run_id).status for trial in result.trials] == ["FINISHED", "FAILED", "FAILED"]


DRIVER = """
import sys
from pathlib import Path
import learning_curves
from deepdisc_ops.errors import Requeue
from deepdisc_ops.sweeps import space
from deepdisc_ops.sweeps.run import run_sweep
out = Path(sys.argv[1])
try:
    run_sweep(space.load_spec(out / "asked.yaml"), out / "sweep", train=learning_curves.train)
except Requeue as told:
    sys.exit(told.exit_code)
"""


def test_a_sweep_goes_on_after_its_driver_was_killed_and_then_ended(spaced: Path) -> None:
    import learning_curves

    spec = fake_spec([0.1, 0.2, 0.3, 0.4], concurrency=1)
    spec = spec.model_copy(update={"base": {"train": {"steps": 80, "weight_decay": 0.15, "warmup_steps": 0}}})
    (spaced / "asked.yaml").write_text(space.dump(spec))
    out = spaced / "sweep"
    journals = []
    for number, code, trials in ((signal.SIGKILL, -signal.SIGKILL, 2), (signal.SIGTERM, 85, 3)):
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(spaced)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        family = wait_for_trial(trials, driver, out / "trials")
        driver.send_signal(number)
        output, _ = driver.communicate(timeout=60)
        assert driver.returncode == code, output.decode()
        assert psutil.wait_procs(family, timeout=30)[1] == []
        journals.append((out / "trials" / first_trial(out) / "metrics.jsonl").read_text())
    tracker = Tracker(default_uri(out))
    (parent,) = tracker.runs({KIND_TAG: "sweep"})
    assert parent.status == "KILLED"
    assert sorted(run.status for run in tracker.children(parent.run_id)) == ["FINISHED", "FINISHED", "KILLED"]

    result = run_sweep(space.load_spec(spaced / "asked.yaml"), out, train=learning_curves.train)
    assert [(trial.state, trial.step) for trial in result.trials] == [("finished", 80)] * 4
    assert [(result.trials[0].folder / "metrics.jsonl").read_text()] * 2 == journals
    tracker = assert_one_run_per_trial(result.tracking_uri, result.parent_run_id, 4)
    assert all(child.status == "FINISHED" for child in tracker.children(result.parent_run_id))


@pytest.mark.parametrize("stopped", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_trials_of_two_ranks_that_are_stopped_early_leave_their_cpus_free(spaced: Path, stopped: int) -> None:
    import learning_curves

    # in the order in which they are drawn, each rate is worse than the one before, until the last
    rates = [0.2, *(0.3 + 0.01 * i for i in range(stopped)), 0.1]
    spec = fake_spec(rates, scheduler={"name": "asha", "grace_steps": 20}, resources={"cpus": 2})
    result = run_sweep(spec, spaced, train=learning_curves.train_on_two_ranks)
    assert [trial.state for trial in result.trials] == ["finished", *["stopped_early"] * stopped, "finished"]
    assert result.best.values["train.lr"] == 0.1


def test_optuna_draws_what_counts(spaced: Path) -> None:
    import learning_curves

    ranges = {
        "train.lr": {"loguniform": [1e-3, 0.5]},
        "train.optimizer": {"choice": ["adamw", "sgd"]},
        "train.momentum": {"uniform": [0.8, 0.9], "when": {"train.optimizer": "sgd"}},
    }
    base = {"train": {"steps": 20, "weight_decay": 0.0, "warmup_steps": 0}}
    spec = fake_spec([], base=base, space=ranges, search="optuna", trials=6, seed=3)
    result = run_sweep(spec, spaced, train=learning_curves.train)
    assert [trial.state for trial in result.trials] == ["finished"] * 6
    drawn = [trial.values for trial in result.trials]
    assert len({values["train.lr"] for values in drawn}) == 6
    assert {values["train.optimizer"] for values in drawn} == {"adamw", "sgd"}
    assert all(("train.momentum" in values) == (values["train.optimizer"] == "sgd") for values in drawn)
    for trial in result.trials:
        assert float(Tracker(result.tracking_uri).record(trial.run_id).params["train.lr"]) == trial.values["train.lr"]


def test_in_a_population_the_worst_go_on_from_the_best(spaced: Path) -> None:
    import learning_curves

    base = {"train": {"steps": 120, "weight_decay": 0.1, "warmup_steps": 0}}
    ranges = {"train.lr": {"loguniform": [0.1, 10.0]}}
    scheduler = {"name": "pbt", "interval_steps": 20, "quantile": 0.5}
    spec = fake_spec([], base=base, space=ranges, scheduler=scheduler, trials=4, resources={"cpus": 0.5}, seed=2)
    result = run_sweep(spec, spaced, train=learning_curves.train)
    assert [(trial.state, trial.step) for trial in result.trials] == [("finished", 120)] * 4
    tracker = assert_one_run_per_trial(result.tracking_uri, result.parent_run_id, 4)
    rates = [[rate for _, rate in tracker.history(trial.run_id, "lr")] for trial in result.trials]
    assert any(len(set(each)) > 1 for each in rates)
    assert all(0.1 <= rate < 10 for each in rates for rate in each)
    # a new rate may be drawn afresh, but the best is never given up
    assert min(each[-1] for each in rates) <= min(each[0] for each in rates)


# drivers, raylets and ranks that are killed have quicker tests of their own: here, and in tests/training
@pytest.mark.parametrize("case", ["trial", *(pytest.param(case, marks=pytest.mark.slow) for case in ("driver", "rank", "raylet"))])
def test_a_killed_process_costs_nothing_but_time(case: str, spaced: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.sweep_faults", "--quick", "--case", case, "--work", str(spaced / "work")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "as undisturbed" in done.stdout


def test_a_sweep_whose_ray_has_lost_its_only_node_starts_it_anew(
    spaced: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import learning_curves

    quick = {"initial_delay_ms": 500, "period_ms": 500, "timeout_ms": 2000, "failure_threshold": 2}
    for name, value in quick.items():
        monkeypatch.setenv(f"RAY_health_check_{name}", str(value))
    killed: list[int] = []

    def kill_the_node() -> None:
        for process in wait_for_journal(spaced / "trials"):
            if process.name() == "raylet":
                process.kill()
                killed.append(process.pid)

    spec = fake_spec([0.1, 0.2, 0.4], base={"train": {"steps": 80, "weight_decay": 1.0, "warmup_steps": 0}}, concurrency=1)
    killer = Thread(target=kill_the_node)
    killer.start()
    result = run_sweep(spec, spaced, train=learning_curves.train)
    killer.join()
    assert len(killed) == 1
    assert "lost its last node" in caplog.text
    assert [(trial.state, trial.step) for trial in result.trials] == [("finished", 80)] * 3
    assert_one_run_per_trial(result.tracking_uri, result.parent_run_id, 3)
    assert not [child for child in psutil.Process().children(recursive=True) if child.pid in killed and child.status() != "zombie"]


def wait_for_journal(trials: Path) -> list[psutil.Process]:
    """Wait for two reports; returns the processes of this one."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(journal.read_text().count("\n") >= 2 for journal in trials.glob("*/metrics.jsonl")):
            return psutil.Process().children(recursive=True)
        time.sleep(0.1)
    return []


def first_trial(out: Path) -> str:
    return min(folder.name for folder in (out / "trials").iterdir())


def wait_for_trial(number: int, driver: subprocess.Popen[bytes], trials: Path) -> list[psutil.Process]:
    """Wait for two reports of trial ``number``; returns the sweep's processes, the guard among them."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and driver.poll() is None:
        journals = sorted(trials.glob("*/metrics.jsonl"))
        if len(journals) == number and journals[-1].read_text().count("\n") >= 2:
            return psutil.Process(driver.pid).children(recursive=True)
        time.sleep(0.05)
    driver.kill()
    raise AssertionError(driver.communicate()[0].decode())


def test_the_real_training_loop_in_a_sweep(spaced: Path) -> None:
    from deepdisc_ops.config import SkySettings
    from deepdisc_ops.data.simulate import simulate_dataset

    # dense scenes and steps enough that some of the 50 gold galaxies are surely matched
    counts = {"train": 6, "validation": 2}
    scenes = simulate_dataset(SkySettings(survey="hsc", density=3.0), spaced / "scenes", counts=counts, size=192, seed=5)
    tree = {
        "name": "real",
        "base": {
            "data": {"path": str(spaced / "scenes"), "crop": 64},
            "model": {"bands": list(scenes.info.bands)},
            "inference": {"score_threshold": 0.0},
            "train": {"steps": 40, "batch_size": 2, "warmup_steps": 4, "validate_every": 20},
        },
        "space": {"model.backbone.name": {"grid": ["tiny", "small"]}},
        "scheduler": {"name": "asha", "grace_steps": 40},
    }
    result = run_sweep(space.parse_spec(tree, "spec"), spaced / "out")
    assert [trial.state for trial in result.trials] == ["finished", "finished"]
    tracker = Tracker(result.tracking_uri)
    for trial in result.trials:
        assert [step for step, _ in tracker.history(trial.run_id, "val_nll")] == [20, 40]
        assert tracker.record(trial.run_id).tags["dataset"] == "scenes"
    (member,) = select_members(result.tracking_uri, "real", 1, into=spaced / "copies")
    assert (member.checkpoint / "member.safetensors").exists()
    assert member.config.model.pixel_scale == scenes.info.pixel_scale


def test_workers_start_from_an_environment_whose_path_has_a_space(spaced: Path) -> None:
    real = Path(sys.prefix)
    environment = spaced / "venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    (environment / "lib").symlink_to(real / "lib")
    (environment / "pyvenv.cfg").write_text((real / "pyvenv.cfg").read_text())
    program = (
        "import ray, sys\n"
        "from deepdisc_ops.sweeps.session import ray_session\n"
        "from deepdisc_ops.sweeps.space import Resources\n"
        "with ray_session(Resources()):\n"
        "    print(ray.get(ray.remote(lambda: sys.executable).remote(), timeout=60))\n"
    )
    command = [str(environment / "bin" / "python"), "-W", "ignore", "-c", program]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert str(environment) in answer.stdout, answer.stderr
