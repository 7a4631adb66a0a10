"""The script for several nodes, run for real: two network namespaces joined by a pair of virtual interfaces are its nodes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from deepdisc_ops.config import validate
from deepdisc_ops.hpc.jobs import JobSettings

from .conftest import Cluster, wait_for

TESTS = Path(__file__).parents[1]
ADDRESSES = ("10.213.77.1", "10.213.77.2")
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


@pytest.fixture
def two_nodes() -> Iterator[tuple[str, str]]:
    """Names of two network namespaces that reach each other and nothing else."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")
    nodes = (f"dd{os.getpid()}a", f"dd{os.getpid()}b")
    made = subprocess.run(["ip", "netns", "add", nodes[0]], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no network namespace may be made: {made.stderr.strip()}")
    try:
        ip("netns", "add", nodes[1])
        ip("link", "add", "veth0", "netns", nodes[0], "type", "veth", "peer", "name", "veth0", "netns", nodes[1])
        for node, own, other in zip(nodes, ADDRESSES, reversed(ADDRESSES), strict=True):
            ip("-n", node, "addr", "add", f"{own}/24", "dev", "veth0")
            ip("-n", node, "link", "set", "lo", "up")
            ip("-n", node, "link", "set", "veth0", "up")
            ip("-n", node, "route", "add", "default", "via", other)
        yield nodes
    finally:
        for node in nodes:
            subprocess.run(["ip", "netns", "del", node], capture_output=True, check=False)


def notes(out: Path) -> list[dict[str, object]]:
    """Steps of all trials so far, each with the node it was made on."""
    return [json.loads(line) for path in out.glob("trials/*/nodes.jsonl") for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.integration
def test_a_sweep_over_two_nodes_outlives_one_of_them(cluster: Cluster, two_nodes: tuple[str, str]) -> None:
    head, worker = two_nodes
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
            wait_for(lambda: process.poll() is not None or {note["node"] for note in notes(out)} == set(ADDRESSES), PATIENCE_S)
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
