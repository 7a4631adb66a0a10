"""Two instances as two nodes: the rendered script for several nodes starts Ray in both, and a small sweep runs on both.

Each instance is started in a network namespace of its own; a stand-in srun enters the namespace of a node and, as any word of the
job's container command, the instance that runs there.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deepdisc_ops.config import validate
from deepdisc_ops.hpc.containers import instances
from deepdisc_ops.hpc.containers.run import Place, options
from deepdisc_ops.hpc.containers.runtime import Runtime
from deepdisc_ops.hpc.jobs import JobSettings, SiteSettings
from deepdisc_ops.hpc.slurm import render

pytestmark = pytest.mark.containers
TESTS = Path(__file__).parents[1]
STAND_INS = TESTS / "hpc" / "stand_ins"
PATIENCE_S = 900
SPEC = {
    "name": "two-containers",
    "base": {"train": {"steps": 30, "weight_decay": 0.5}},  # short_trials sleeps so long for ten steps
    "space": {"train.lr": {"grid": [0.001, 0.002, 0.003, 0.004]}},
    "scheduler": {"name": "fifo"},
}
ENTER = """#!/bin/bash
exec {program} exec --pwd "$PWD" "instance://$SLURMD_NODENAME" "$@"
"""
VERB = """#!/bin/bash
exec python {program} "$@"
"""


@pytest.fixture
def machines(runtime: Runtime, image: Path, two_nodes: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """An instance in each namespace, of its name; both see the tests, the job's folder and the host's /tmp."""
    place = Place(tmp_path, (str(TESTS),), Path("/tmp"))
    try:
        for node in two_nodes:
            words = [str(runtime.program), "instance", "start", *options(runtime, image, place, instance=True), str(image), node]
            subprocess.run(["ip", "netns", "exec", node, *words], check=True, capture_output=True, timeout=PATIENCE_S)
        yield two_nodes
    finally:
        for node in two_nodes:
            instances.stop(runtime, node)


def program(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_a_sweep_runs_on_two_containers(runtime: Runtime, machines: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    enter = program(tmp_path / "enter", ENTER.format(program=shlex.quote(str(runtime.program))))
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "deepdisc-ops", VERB.format(program=shlex.quote(str(TESTS / "hpc" / "short_trials.py"))))
    settings = {
        "kind": "nodes",
        "nodes": 2,
        "command": ["sweep", "run", "spec.yaml", "--out", "sweep"],
        "environment": {"container": [enter]},
    }
    script = tmp_path / "job.sbatch"
    script.write_text(render(validate(JobSettings, settings, "job"), SiteSettings()))
    variables = {
        "PATH": f"{STAND_INS}:{os.environ['PATH']}",
        "STAND_IN_LOG": str(tmp_path / "stand-ins.log"),
        "STAND_IN_NAMESPACES": "1",
        "SLURM_JOB_ID": str(20_000_000 + os.getpid()),
        "SLURM_JOB_NODELIST": ",".join(machines),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_CPUS_ON_NODE": "1",
        "SLURMD_NODENAME": next(iter(machines)),
        "OMP_NUM_THREADS": "1",
        "APPTAINERENV_PYTHONPATH": f"{TESTS / 'hpc'}:{TESTS / 'sweeps'}",
        "APPTAINERENV_PREPEND_PATH": str(tmp_path / "bin"),
    }
    command = ["ip", "netns", "exec", next(iter(machines)), "bash", str(script)]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **variables}, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    assert "2 nodes have joined" in done.stderr
    notes = [json.loads(line) for path in tmp_path.glob("sweep/trials/*/nodes.jsonl") for line in path.read_text().splitlines()]
    assert {note["node"] for note in notes} == set(machines.values())
    assert json.loads((tmp_path / "sweep" / "result.json").read_text()) == [["finished", 30]] * 4
