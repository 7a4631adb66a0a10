"""Jobs whose paths have spaces and quotes, and a stand-in for SLURM on PATH."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from deepdisc_ops.hpc.jobs import JobSettings, SiteSettings
from deepdisc_ops.hpc.slurm import render

STAND_INS = Path(__file__).with_name("stand_ins")


@dataclass
class Cluster:
    """Runs rendered scripts as SLURM would, in a folder with a space and a quote, and remembers what they asked for."""

    folder: Path
    job_id: int
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def venv(self) -> Path:
        return self.folder / "it's a venv"

    @property
    def temporary(self) -> Path:
        return Path(f"/tmp/r-{self.job_id}.{self.variables.get('SLURM_RESTART_COUNT', 0)}")

    @property
    def log(self) -> list[list[str]]:
        """The commands given to stand-ins, word by word."""
        path = self.folder / "stand-ins.log"
        return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def output(self) -> str:
        """What the jobs have printed so far."""
        return (self.folder / "job.log").read_text()

    def program(self, name: str, text: str) -> None:
        """Put a program into the venv."""
        path = self.venv / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def start(self, job: JobSettings, *, nodes: str = "nid001", prefix: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        """Begin a job on a list of nodes."""
        job = job.model_copy(update={"environment": job.environment.model_copy(update={"venv": str(self.venv)})})
        script = self.folder / "job.sbatch"
        script.write_text(render(job, SiteSettings()))
        slurm = {
            "PATH": f"{STAND_INS}:{os.environ['PATH']}",
            "STAND_IN_LOG": str(self.folder / "stand-ins.log"),
            "SLURM_JOB_ID": str(self.job_id),
            "SLURM_JOB_NODELIST": nodes,
            "SLURM_JOB_NUM_NODES": str(job.nodes),
            "SLURM_CPUS_PER_TASK": str(job.cpus),
            "SLURM_CPUS_ON_NODE": str(job.cpus),
            "SLURMD_NODENAME": nodes.partition(",")[0].replace("[001-128]", "001"),
        }
        environment = {**os.environ, **slurm, **self.variables}
        with (self.folder / "job.log").open("a") as log:
            command = [*prefix, "/bin/bash", str(script)]
            return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def run(self, job: JobSettings, *, nodes: str = "nid001", signals: tuple[signal.Signals, ...] = ()) -> tuple[int, str]:
        """Run a job to its end, with signals once its driver writes the file ``ready``; exit code and output."""
        with self.start(job, nodes=nodes) as process:
            for number in signals:
                wait_for(lambda: (self.folder / "ready").exists() or process.poll() is not None)
                process.send_signal(number)
            try:
                process.wait(60)
            finally:
                process.kill()
        return process.returncode, self.output


def wait_for(condition: object, limit_s: float = 30.0) -> None:
    """Wait until ``condition()`` holds."""
    assert callable(condition)
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    folder = tmp_path / 'a "job\'s" folder'
    folder.mkdir()
    made = Cluster(folder, job_id=10_000_000 + os.getpid())
    made.program("python", "#!/bin/bash\nexit 0\n")
    return made
