"""The script for several nodes, run for real: two network namespaces joined by a pair of virtual interfaces are its nodes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from deepdisc_ops.config import validate
from deepdisc_ops.hpc.jobs import JobSettings

from .conftest import Cluster, wait_for

TESTS = Path(__file__).parents[1]
PATIENCE_S = 600  # for a machine with much else to do
TRIALS, STEPS = 6, 100
SPEC = {
    "name": "two-nodes",
    "base": {"train": {"steps": STEPS, "weight_decay": 0.5}},  # short_trials sleeps so long for ten steps
    "space": {"train.lr": {"grid": [0.001 * number for number in range(1, TRIALS + 1)]}},
    "scheduler": {"name": "fifo"},
    "retries": 3,
}


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


def pids(node: str) -> list[int]:
    return [int(word) for word in ip("netns", "pids", node).split()]


def notes(out: Path) -> list[dict[str, object]]:
    """Steps of all trials so far, each with the node it was made on."""
    return [json.loads(line) for path in out.glob("trials/*/nodes.jsonl") for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.integration
def test_a_sweep_over_two_nodes_outlives_one_of_them(cluster: Cluster, two_nodes: dict[str, str]) -> None:
    head, worker = two_nodes
    addresses = set(two_nodes.values())
    cluster.folder = cluster.folder.parent / "a job"  # without a quote, which MLflow's SQL does not bear in the current folder
    cluster.folder.mkdir()
    programs = Path(sys.executable).parent
    for name, words in {
        "python": ["python"],
        "ray": ["ray"],
        "deepdisc-ops": ["python", str(TESTS / "hpc" / "short_trials.py")],
    }.items():
        program = shlex.join([str(programs / words[0]), *words[1:]])
        cluster.program(name, f'#!/bin/bash\nexec {program} "$@"\n')
    modules = f"{TESTS / 'hpc'}:{TESTS / 'sweeps'}"
    cluster.variables |= {"STAND_IN_NAMESPACES": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": modules}
    (cluster.folder / "my spec.yaml").write_text(yaml.safe_dump(SPEC))
    command = ["sweep", "run", "my spec.yaml", "--out", "a sweep"]
    job = validate(JobSettings, {"kind": "nodes", "nodes": 2, "command": command}, "job")
    out = cluster.folder / "a sweep"
    with cluster.start(job, nodes=f"{head},{worker}", prefix=("ip", "netns", "exec", head)) as process:
        try:
            wait_for(lambda: process.poll() is not None or {note["node"] for note in notes(out)} == addresses, PATIENCE_S)
            assert process.poll() is None, cluster.output
            before = len(notes(out))
            for pid in pids(worker):
                os.kill(pid, signal.SIGKILL)
            process.wait(PATIENCE_S)
        finally:
            process.terminate()
            process.wait(60)
            left = [(node, psutil.Process(pid).cmdline()) for node in two_nodes for pid in pids(node)]
    output = cluster.output
    assert process.returncode == 0, output
    assert "2 nodes have joined" in output
    assert before < TRIALS * STEPS / 10
    assert json.loads((out / "result.json").read_text()) == [["finished", STEPS]] * TRIALS
    for journal in out.glob("trials/*/metrics.jsonl"):
        assert [json.loads(line)["step"] for line in journal.read_text().splitlines()] == list(range(10, STEPS + 1, 10))
    assert not left
    assert not cluster.temporary.exists()
    assert not list(cluster.folder.glob(".ray-token*"))
