"""Sweeps whose processes are killed: ``python -m benchmarks.sweep_faults [--quick] [--case NAME] [--repeats N]``.

Real sweeps of small trainings, first in first out, through the command line. One is left alone; in the others the driver, the
process of a trial, one of its ranks or Ray's own node process gets a SIGKILL at a random moment, and the same command is given
again until it succeeds. Each time is looked at: that trials which had finished were not repeated; that the store holds one
parent and a child for each trial, whose metrics have the steps of the undisturbed sweep, each once; that the selection is the
undisturbed one; that no process of the sweep is left. A difference ends the program with exit code 1.
"""

from __future__ import annotations

import argparse
import logging
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks import record
from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.simulate import simulate_dataset
from deepdisc_ops.sweeps.select import select_members
from deepdisc_ops.sweeps.trial import read_journal
from deepdisc_ops.tracking import KIND_TAG, TRIAL_TAG, Tracker, default_uri

CASES = ("driver", "trial", "rank", "raylet")
STEPS, EVERY = 12, 3
LEARNS = ("train_loss", "val_loss", "val_nll", "val_sigma_iqr", "val_outliers", "val_completeness", "lr")
"""Metrics that the seed decides, and not the machine."""
PATIENCE_S = 600
STARTS = 4


@dataclass
class Outcome:
    """What is left of a sweep: steps and values of each trial's metrics by its drawn values, and the values of the selected."""

    curves: dict[str, dict[str, list[tuple[int, float]]]]
    selected: list[str]


@dataclass
class Fault:
    """One sweep in which a process was killed."""

    case: str
    after_s: float
    finished_before: int
    starts: int
    faults: list[str] = field(default_factory=list)


class Watched:
    """A driver and all processes it ever had, as far as a look every tenth of a second sees them."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log.open("ab")
        self.driver = psutil.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        self.family: dict[int, psutil.Process] = {}

    def look(self) -> None:
        """Note the processes there are."""
        with suppress(psutil.Error):
            self.family |= {child.pid: child for child in self.driver.children(recursive=True)}

    def wait(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the end of the driver, or for ``until``; whether the latter came."""
        deadline = time.monotonic() + PATIENCE_S
        while self.driver.poll() is None:
            if until():
                return True
            self.look()
            if time.monotonic() > deadline:
                self.driver.kill()
                raise TimeoutError(f"the driver did not end within {PATIENCE_S} s; see {self._log.name}")
            time.sleep(0.1)
        return False

    def left(self, within_s: float = 20) -> list[str]:
        """Processes that are still there after a while, which are then ended."""
        _, alive = psutil.wait_procs(list(self.family.values()), timeout=within_s)
        names = []
        for process in alive:
            with suppress(psutil.Error):
                names.append(f"{process.pid} {process.name()}")
                process.kill()
        return names

    def target(self, case: str) -> psutil.Process | None:
        """The process that the case kills, if it is there."""
        if case == "driver":
            return self.driver
        marks = {"raylet": "raylet", "trial": "ray::ImplicitFunc", "rank": "spawn_main"}  # as Tune names a function's process
        with suppress(psutil.Error):
            for process in self.driver.children(recursive=True):
                command = " ".join(process.cmdline())
                if marks[case] in (process.name() if case == "raylet" else command):
                    return process
        return None


def specification(scenes: Path, ranks: int) -> dict[str, Any]:
    """Four trials of the smallest network on scenes of 128 px."""
    return {
        "name": "faults",
        "base": {
            "data": {"path": str(scenes), "crop": 64, "cache_gb": 0},
            "model": {
                "backbone": {"name": "tiny", "fpn_channels": 16},
                "box_head": {"hidden": [32]},
                "redshift_head": {"hidden": [16]},
            },
            "train": {
                "steps": STEPS,
                "batch_size": 2,
                "validate_every": EVERY,
                "save_every": 1,
                "warmup_steps": 1,
                "ranks": ranks,
                "threads": 1,
                "monitor": "val_loss",
            },
            "inference": {"score_threshold": 0.0},
        },
        "space": {"train.lr": {"grid": [1e-3, 3e-3]}, "seed": {"grid": [0, 1]}},
        "metric": "val_loss",
        "scheduler": {"name": "fifo"},
        "resources": {"cpus": 2},
        "concurrency": 1,
    }


def command(spec: Path, out: Path) -> list[str]:
    """What a user types."""
    return [sys.executable, "-m", "deepdisc_ops", "sweep", "run", str(spec), "--out", str(out)]


def outcome(out: Path, trials: int) -> tuple[Outcome, list[str]]:
    """The sweep as its store tells it, and what is wrong with the store itself."""
    tracker, faults = Tracker(default_uri(out)), []
    parents = tracker.runs({KIND_TAG: "sweep"})
    if len(parents) != 1:
        faults.append(f"{len(parents)} parent runs, expected 1")
    children = tracker.children(parents[0].run_id)
    if len(children) != trials or len({child.tags[TRIAL_TAG] for child in children}) != trials:
        faults.append(f"{len(children)} child runs, expected {trials}")
    curves = {
        child.tags["drawn"]: {name: tracker.history(child.run_id, name) for name in LEARNS if name in child.metrics}
        for child in children
    }
    members = select_members(default_uri(out), "faults", 2, into=out / "copies", metric="val_loss")
    drawn = {child.run_id: child.tags["drawn"] for child in children}
    return Outcome(curves, [drawn[member.run_id] for member in members]), faults


def differences(found: Outcome, expected: Outcome) -> list[str]:
    """Where a sweep differs from the undisturbed one."""
    faults = []
    if found.selected != expected.selected:
        faults.append(f"selected {found.selected}, expected {expected.selected}")
    for drawn, curves in expected.curves.items():
        for name, points in curves.items():
            mine = found.curves.get(drawn, {}).get(name, [])
            if [step for step, _ in mine] != [step for step, _ in points]:
                faults.append(f"{drawn}: {name} at steps {[step for step, _ in mine]}, expected {[step for step, _ in points]}")
            elif not all(same(a, b) for (_, a), (_, b) in zip(mine, points, strict=True)):
                faults.append(f"{drawn}: {name} is {mine}, expected {points}")
    return faults


def same(one: float, other: float) -> bool:
    """Equal to 1e-6, or both no number or infinite."""
    return one == other or (one != one and other != other) or abs(one - other) <= 1e-6 * max(1.0, abs(other))


def finished(out: Path) -> Mapping[str, str]:
    """Journals of the trials that have come to their end, by their names."""
    journals = {}
    for folder in (out / "trials").glob("*/"):
        rows = read_journal(folder)
        if rows and rows[-1].step == STEPS:
            journals[folder.name] = (folder / "metrics.jsonl").read_text()
    return journals


def disturb(case: str, spec: Path, out: Path, delay_s: float, expected: Outcome) -> Fault:
    """One sweep with a kill ``delay_s`` after its first report, and the starts that it needs then."""
    log = out.with_suffix(".log")
    run = Watched(command(spec, out), log)
    run.wait(lambda: any((out / "trials").glob("*/metrics.jsonl")))
    moment = time.monotonic() + delay_s
    run.wait(lambda: time.monotonic() >= moment and run.target(case) is not None)
    run.look()
    before, target = finished(out), run.target(case)
    if target is None:
        raise RuntimeError(f"the sweep was over before its {case} could be killed; see {log}")
    target.kill()
    fault = Fault(case, delay_s, len(before), 1)
    run.wait()
    fault.faults += [f"left behind: {one}" for one in run.left()]
    while run.driver.returncode != 0:
        if fault.starts == STARTS:
            fault.faults.append(f"not finished after {STARTS} starts, exit code {run.driver.returncode}; see {log}")
            return fault
        fault.starts += 1
        run = Watched(command(spec, out), log)
        run.wait()
        fault.faults += [f"left behind: {one}" for one in run.left()]
    after = finished(out)
    fault.faults += [f"trial {name} was repeated" for name, journal in before.items() if after.get(name) != journal]
    found, faults = outcome(out, len(expected.curves))
    fault.faults += faults + differences(found, expected)
    return fault


def main() -> None:
    """Disturb, look, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="kill this alone; may be repeated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--quick", action="store_true", help="each once; nothing is kept")
    parser.add_argument("--work", type=Path, help="folder for the sweeps; a temporary one when not given")
    arguments = parser.parse_args()
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="sweep-faults-") as made:
        faults, seconds = campaign(arguments, arguments.work or Path(made))
    table = Table("killed", "after / s", "finished before", "starts", "found")
    for fault in faults:
        found = "; ".join(fault.faults) or "as undisturbed"
        table.add_row(fault.case, f"{fault.after_s:.1f}", str(fault.finished_before), str(fault.starts), found)
    console = Console(width=140, record=True)
    console.print(table)
    wrong = sum(bool(fault.faults) for fault in faults)
    if not arguments.quick:
        rows = [{key: getattr(fault, key) for key in Fault.__dataclass_fields__} for fault in faults]
        log = console.export_text().splitlines()
        ratios = {"undisturbed_outcomes": 1 - wrong / len(faults)}
        print(record.write("sweep_faults", ratios=ratios, figures={"seconds_undisturbed": seconds, "cases": rows}, log=log))
    sys.exit(1 if wrong else 0)


def campaign(arguments: argparse.Namespace, work: Path) -> tuple[list[Fault], dict[int, float]]:
    """All cases, one after the other; also the seconds of the undisturbed sweeps, from first report to end, by ranks."""
    work.mkdir(parents=True, exist_ok=True)
    draw = random.Random(arguments.seed)
    simulate_dataset(SkySettings(), work / "scenes", counts={"train": 4, "validation": 2}, size=128, seed=11)
    faults: list[Fault] = []
    undisturbed: dict[int, Outcome] = {}
    seconds: dict[int, float] = {}
    for case in arguments.case or CASES:
        ranks = 2 if case == "rank" else 1
        spec = work / f"ranks-{ranks}.yaml"
        if ranks not in undisturbed:
            spec.write_text(yaml.safe_dump(specification(work / "scenes", ranks)))
            out = work / f"undisturbed-{ranks}"
            run = Watched(command(spec, out), out.with_suffix(".log"))
            run.wait(lambda out=out: any((out / "trials").glob("*/metrics.jsonl")))  # type: ignore[misc]  # a lambda with a default
            started = time.monotonic()
            run.wait()
            seconds[ranks] = time.monotonic() - started
            if run.driver.returncode:
                raise RuntimeError(f"the undisturbed sweep failed; see {out.with_suffix('.log')}")
            undisturbed[ranks], wrong = outcome(out, 4)
            if wrong or run.left():
                raise RuntimeError(f"the undisturbed sweep is not sound: {wrong}")
        for i in range(1 if arguments.quick else arguments.repeats):
            delay = draw.uniform(0, 0.7 * seconds[ranks])
            fault = disturb(case, spec, work / f"{case}-{i}", delay, undisturbed[ranks])
            print(f"{case} killed {delay:.1f} s after the first report: {'; '.join(fault.faults) or 'as undisturbed'}", flush=True)
            faults.append(fault)
    return faults, seconds


if __name__ == "__main__":
    main()
