"""Rendered scripts, run with a stand-in for SLURM: what they start, and what they do with signals and exit codes."""

from __future__ import annotations

import os
import re
import signal
import stat
from pathlib import Path
from typing import Any

import psutil
import pytest

from deepdisc_ops.config import validate
from deepdisc_ops.errors import Requeue
from deepdisc_ops.hpc.jobs import JobSettings

from .conftest import Cluster, wait_for

NOTES = '#!/bin/bash\nprintf "%s\\n" "$@" >said\n'
SAVES = """#!/bin/bash
trap 'echo told >>told; sleep 1; exit {code}' USR1 TERM
touch ready
for i in {{1..600}}; do sleep 0.1; done
"""
SWEEP = ["sweep", "run", "my spec.yaml", "--out", "a sweep"]


def job(**settings: Any) -> JobSettings:
    return validate(JobSettings, {"command": ["train", "small", "--out", 'it\'s "my" run']} | settings, "job")


def saving(cluster: Cluster, code: int = Requeue.exit_code) -> None:
    """A driver that ends with ``code`` a second after it was told to stop."""
    cluster.program("deepdisc-ops", SAVES.format(code=code))


def requeued(cluster: Cluster) -> list[list[str]]:
    return [words[2:] for words in cluster.log if words[:2] == ["scontrol", "requeue"]]


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_exit_code_is_that_of_the_driver(cluster: Cluster, code: int) -> None:
    cluster.program("deepdisc-ops", f"{NOTES}exit {code}\n")
    ended, output = cluster.run(job())
    assert ended == code
    assert f"ended with exit code {code}" in output
    assert (cluster.folder / "said").read_text().splitlines() == ["train", "small", "--out", 'it\'s "my" run']
    assert not requeued(cluster)


def test_the_signal_ahead_of_the_limit_queues_the_job_again_after_all_is_saved(cluster: Cluster) -> None:
    saving(cluster)
    ended, output = cluster.run(job(), signals=(signal.SIGUSR1,))
    assert (ended, requeued(cluster)) == (0, [[str(cluster.job_id)]])
    assert len((cluster.folder / "told").read_text().splitlines()) == 1
    assert "the job is in the queue again" in output


def test_signals_while_the_driver_saves_change_nothing(cluster: Cluster) -> None:
    cluster.program(
        "deepdisc-ops",
        SAVES.format(code=Requeue.exit_code).replace("USR1 TERM", "USR1").replace("sleep 1", "trap '' USR1; sleep 1"),
    )
    ended, _ = cluster.run(job(), signals=(signal.SIGUSR1, signal.SIGUSR1, signal.SIGUSR1))
    assert (ended, len(requeued(cluster))) == (0, 1)


def test_a_driver_that_does_not_listen_yet_loses_nothing_by_the_signal(cluster: Cluster) -> None:
    cluster.program("deepdisc-ops", "#!/bin/bash\ntouch ready\nexec sleep 60\n")
    ended, _ = cluster.run(job(), signals=(signal.SIGUSR1,))
    assert (ended, len(requeued(cluster))) == (0, 1)


def test_an_array_queues_only_its_own_task_again(cluster: Cluster) -> None:
    saving(cluster)
    cluster.variables |= {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}
    folds = job(kind="array", array="0-9", command=["train", "--out", "folds/{task}"])
    ended, _ = cluster.run(folds, signals=(signal.SIGUSR1,))
    assert (ended, requeued(cluster)) == (0, [["77_3"]])


def test_a_cancelled_job_saves_and_stays_away(cluster: Cluster) -> None:
    saving(cluster)
    ended, output = cluster.run(job(), signals=(signal.SIGTERM,))
    assert (ended, requeued(cluster)) == (Requeue.exit_code, [])
    assert (cluster.folder / "told").exists()
    assert "submit a cancelled one to go on" in output


@pytest.mark.parametrize(("restarts", "times"), [(1, 1), (2, 0)])
def test_the_number_of_requeues_is_limited(cluster: Cluster, restarts: int, times: int) -> None:
    saving(cluster)
    cluster.variables["SLURM_RESTART_COUNT"] = str(restarts)
    ended, output = cluster.run(job(requeues=2), signals=(signal.SIGUSR1,))
    assert (ended, len(requeued(cluster))) == (0 if times else Requeue.exit_code, times)
    assert ("again 2 times already" in output) == (times == 0)


def test_a_refused_requeue_is_told(cluster: Cluster) -> None:
    saving(cluster)
    cluster.variables["STAND_IN_REQUEUE"] = "1"
    ended, output = cluster.run(job(), signals=(signal.SIGUSR1,))
    assert ended == Requeue.exit_code
    assert "scontrol cannot queue the job again; submit the script to go on" in output


def test_a_driver_that_fails_after_the_signal_is_not_queued_again(cluster: Cluster) -> None:
    saving(cluster, code=1)
    ended, _ = cluster.run(job(), signals=(signal.SIGUSR1,))
    assert (ended, requeued(cluster)) == (1, [])


def test_a_missing_venv_is_told(cluster: Cluster) -> None:
    ended, output = cluster.run(job())
    assert ended == 1
    assert f"{cluster.venv}/bin/deepdisc-ops is not there" in output


def test_ranks_are_started_by_srun(cluster: Cluster) -> None:
    cluster.program("deepdisc-ops", NOTES)
    ended, _ = cluster.run(job(kind="ddp", tasks=2, gpus=2))
    assert ended == 0
    (words,) = cluster.log
    assert words[:4] == ["srun", "--kill-on-bad-exit=0", "--wait=60", "--gpu-bind=none"]
    assert words[-4:] == ["train", "small", "--out", 'it\'s "my" run']


RECORDS = """#!/bin/bash
printf '%s\n' "$*" >>said
if [[ $1 == track ]]; then exit {synced}; fi
for word in "$@"; do [[ $word != sqlite:///* ]] || store=${{word#sqlite:///}}; done
echo run >>"$store"
touch "$(dirname "$store")/artifacts/$(wc -l <"$store")"
"""


def tracked(cluster: Cluster, name: str = "mine") -> JobSettings:
    tracking = {"uri": "sqlite:////home/me/my runs.db", "node_local": str(cluster.folder / "it's local")}
    return job(command=SWEEP, name=name, tracking=tracking)


def test_runs_are_kept_and_synced_and_nothing_stays_on_the_node(cluster: Cluster) -> None:
    cluster.program("deepdisc-ops", RECORDS.format(synced=0))
    for attempt in (1, 2):
        assert cluster.run(tracked(cluster))[0] == 0
        records = cluster.folder / "mine-records"
        assert (records / "mlflow.db").read_text() == attempt * "run\n"
        assert len(list((records / "artifacts").iterdir())) == attempt
        assert list((cluster.folder / "it's local").iterdir()) == []
    drive, sync = (cluster.folder / "said").read_text().splitlines()[:2]
    words, _, store = drive.removesuffix("/mlflow.db").partition(" sqlite:///")
    assert words == "sweep run my spec.yaml --out a sweep --tracking-uri"
    assert re.fullmatch(r".*/it's local/\w+-mine", store)
    assert sync == f"track sync {store}/mlflow.db sqlite:////home/me/my runs.db"


def test_runs_that_cannot_be_synced_are_kept_all_the_same(cluster: Cluster) -> None:
    cluster.program("deepdisc-ops", RECORDS.format(synced=1))
    ended, output = cluster.run(tracked(cluster))
    assert ended == 0
    assert f"the runs are not synced; they are in {cluster.folder}/mine-records" in output
    assert (cluster.folder / "mine-records" / "mlflow.db").read_text() == "run\n"


def test_newer_runs_of_a_killed_job_on_the_same_node_are_taken_up(cluster: Cluster) -> None:
    cluster.program("deepdisc-ops", RECORDS.format(synced=0))
    assert cluster.run(tracked(cluster))[0] == 0
    cluster.program("deepdisc-ops", RECORDS.format(synced=0) + "touch ready; exec sleep 60\n")
    with cluster.start(tracked(cluster)) as process:
        wait_for((cluster.folder / "ready").exists)
        for one in [*psutil.Process(process.pid).children(), process]:
            one.kill()
    cluster.program("deepdisc-ops", RECORDS.format(synced=0))
    assert cluster.run(tracked(cluster))[0] == 0
    assert (cluster.folder / "mine-records" / "mlflow.db").read_text() == 3 * "run\n"


@pytest.mark.parametrize(
    ("names", "count"), [("nid001", 1), ("a-head,b-worker", 2), ("nid[001-128]", 128)], ids=["one", "two", "128"]
)
def test_ray_is_started_once_on_every_node(cluster: Cluster, names: str, count: int) -> None:
    cluster.program("ray", (Path(__file__).parent / "stand_ins" / "ray").read_text())
    cluster.program("deepdisc-ops", f'{NOTES}stat -c %a "$RAY_AUTH_TOKEN_PATH" >mode; stat -c %s "$RAY_AUTH_TOKEN_PATH" >>mode\n')
    ended, output = cluster.run(job(kind="nodes", nodes=count, cpus=3, command=SWEEP), nodes=names)
    assert ended == 0, output
    started = [words for words in cluster.log if words[0] == "ray"]
    on = sorted(word.partition("=")[2] for words in cluster.log for word in words if word.startswith("--nodelist="))
    expected = {1: ["nid001"], 2: ["a-head", "b-worker"], 128: [f"nid{number:03}" for number in range(1, 129)]}[count]
    assert on == expected
    assert len(started) == count
    assert ["--head" in words for words in started] == [True] + [False] * (count - 1)
    assert all("--num-cpus=3" in words and "--num-gpus=0" in words for words in started)
    assert all("--address=10.0.0.1:6379" in words for words in started[1:])
    said = (cluster.folder / "said").read_text().splitlines()
    assert said == [*SWEEP, "--ray-address", "10.0.0.1:6379"]
    assert (cluster.folder / "mode").read_text().split() == ["600", "64"]


def test_nothing_of_ray_stays_behind(cluster: Cluster) -> None:
    cluster.program("ray", (Path(__file__).parent / "stand_ins" / "ray").read_text())
    cluster.program("deepdisc-ops", "#!/bin/bash\ntouch ready\nsleep 1\n")
    with cluster.start(job(kind="nodes", nodes=2, command=SWEEP), nodes="a,b") as process:
        wait_for((cluster.folder / "ready").exists)
        started = psutil.Process(process.pid).children(recursive=True)
        assert cluster.temporary.is_dir()
        assert stat.S_IMODE(cluster.temporary.stat().st_mode) == 0o700
        assert process.wait(30) == 0
    assert len(started) >= 3
    assert not [one for one in started if one.is_running()]
    assert not cluster.temporary.exists()
    assert not list(cluster.folder.glob(".ray-token*"))


@pytest.mark.parametrize("broken", ["a", "b"])
def test_a_node_whose_ray_does_not_start_fails_the_job(cluster: Cluster, broken: str) -> None:
    cluster.program("ray", (Path(__file__).parent / "stand_ins" / "ray").read_text())
    cluster.program("python", "#!/bin/bash\nexec sleep 60\n")
    cluster.program("deepdisc-ops", NOTES)
    cluster.variables["STAND_IN_FAILS"] = broken
    ended, output = cluster.run(job(kind="nodes", nodes=2, command=SWEEP), nodes="a,b")
    assert ended == 1
    assert f"Ray on {broken} ended with exit code 3 while it was started, attempt 3 of 3" in output
    assert f"Ray cannot be started on {broken}" in output
    assert not (cluster.folder / "said").exists()
    assert not cluster.temporary.exists()


@pytest.mark.parametrize("slow", ["a", "b"])
def test_a_node_that_stumbles_is_started_again(cluster: Cluster, slow: str) -> None:
    cluster.program("ray", (Path(__file__).parent / "stand_ins" / "ray").read_text())
    cluster.program("python", "#!/bin/bash\nexec sleep 3\n")
    cluster.program("deepdisc-ops", NOTES)
    cluster.variables["STAND_IN_STUMBLES"] = slow
    ended, output = cluster.run(job(kind="nodes", nodes=2, command=SWEEP), nodes="a,b")
    assert ended == 0, output
    assert output.count("while it was started, attempt 1 of 3") == 1
    assert len([words for words in cluster.log if words[0] == "ray"]) == 3


def test_nodes_that_do_not_join_fail_the_job(cluster: Cluster) -> None:
    cluster.program("ray", (Path(__file__).parent / "stand_ins" / "ray").read_text())
    cluster.program("python", "#!/bin/bash\necho 1 of 2 nodes have joined; exit 1\n")
    cluster.program("deepdisc-ops", NOTES)
    ended, output = cluster.run(job(kind="nodes", nodes=2, command=SWEEP), nodes="a,b")
    assert ended == 1
    assert "Ray has not come up on all nodes" in output
    assert not (cluster.folder / "said").exists()


def test_a_signal_before_the_driver_begins_queues_the_job_again(cluster: Cluster) -> None:
    cluster.program("ray", (Path(__file__).parent / "stand_ins" / "ray").read_text())
    cluster.program("python", "#!/bin/bash\ntouch ready\nexec sleep 60\n")
    cluster.program("deepdisc-ops", NOTES)
    ended, output = cluster.run(job(kind="nodes", nodes=2, command=SWEEP), nodes="a,b", signals=(signal.SIGUSR1,))
    assert (ended, len(requeued(cluster))) == (0, 1), output
    assert not (cluster.folder / "said").exists()
    assert not cluster.temporary.exists()


def test_a_node_list_of_another_length_is_refused(cluster: Cluster) -> None:
    cluster.program("deepdisc-ops", NOTES)
    ended, output = cluster.run(job(kind="nodes", nodes=3, command=SWEEP), nodes="a,b")
    assert ended == 1
    assert "a,b names 2 nodes, expected 3" in output


def test_a_script_outside_of_a_job_says_so(cluster: Cluster) -> None:
    cluster.variables["SLURM_JOB_ID"] = ""
    ended, output = cluster.run(job())
    assert ended == 1
    assert "submit it with sbatch" in output


def test_processors_and_variables_reach_the_driver(cluster: Cluster) -> None:
    cluster.program("deepdisc-ops", '#!/bin/bash\necho "$SRUN_CPUS_PER_TASK $PYTHONNOUSERSITE $VIRTUAL_ENV" >said\n')
    assert cluster.run(job(cpus=5))[0] == 0
    assert (cluster.folder / "said").read_text() == f"5 1 {cluster.venv}\n"
    assert os.environ.get("VIRTUAL_ENV") != str(cluster.venv)
