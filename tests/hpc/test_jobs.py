from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from deepdisc_ops.config import validate
from deepdisc_ops.errors import ConfigError
from deepdisc_ops.hpc.jobs import KINDS, JobSettings, SiteSettings, check, load_job, load_site, seconds, sites

SWEEP = ["sweep", "run", "spec.yaml", "--out", "sweeps/a"]
FOLDS = {"kind": "array", "command": ["train", "--out", "folds/{task}"], "array": "0-9"}
DDP = {"kind": "ddp", "command": ["train"], "tasks": 2}


def job(**settings: Any) -> JobSettings:
    return validate(JobSettings, {"command": SWEEP} | settings, "job")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("24:00:00", 86400),
        ("2-12", 216000),
        ("2-12:30", 217800),
        ("1-00:00:01", 86401),
    ],
)
def test_time_limits_are_read_as_slurm_does(text: str, expected: int) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"time": "1 day"}, "time: no time limit; expected minutes, H:MM:SS or D-HH:MM:SS"),
        ({"time": "0:00:00"}, "time: a job without time never runs"),
        ({"time": 86400}, "time: a number, which is what YAML makes of 24:00:00; put it in quotes"),
        ({"time": "10:00", "signal_s": 600}, "signal_s 600 is not before the time limit 10:00"),
        ({"signal_s": 5}, "signal_s: Input should be greater than or equal to 30 (found 5)"),
        ({"signal_s": 70000}, "signal_s: Input should be less than or equal to 65535 (found 70000)"),
        ({"memory": "200 GB"}, "memory: String should match"),
        ({"nodes": 0}, "nodes: Input should be greater than 0 (found 0)"),
        ({"gpus": -1}, "gpus: Input should be greater than or equal to 0 (found -1)"),
        ({"cpus": 0}, "cpus: Input should be greater than 0 (found 0)"),
        ({"nodes": 2}, "nodes is 2 for a job of kind node, which uses one; take kind nodes or ddp"),
        ({"tasks": 4}, "tasks is 4 for a job of kind node, which has one a node; take kind ddp"),
        ({"name": "two\nlines"}, "name: String should match"),
        ({"account": "me\n#SBATCH --exclusive"}, "account: String should match"),
        ({"folder": "relative"}, "folder: String should match"),
        ({"folder": "/a\nb"}, "folder: holds a line break"),
        ({"log": "a\tb"}, "log: holds a line break or another control character"),
        ({"constraint": "gpu;rm"}, "constraint: String should match"),
        ({"nodez": 2}, "unknown key 'nodez', did you mean 'nodes'?"),
        ({"environment": {"venv": "/a", "container": ["apptainer"]}}, "environment: names a venv and a container; give one"),
        ({"environment": {"venvs": "/a"}}, "unknown key 'environment.venvs', did you mean 'environment.venv'?"),
        ({"array": "0-9"}, "array 0-9 for a job of kind node; take kind array"),
        ({"command": []}, "command is empty; give the words after deepdisc-ops"),
        ({"command": ["train", "--out", "a/{task}"]}, "{task} means nothing for a job of kind node"),
        ({"kind": "nodes", "command": ["train"]}, "kind nodes runs sweeps, found train; begin with sweep run"),
        ({"kind": "nodes", "command": [*SWEEP, "--ray-address=auto"]}, "--ray-address=auto is what the script finds out"),
        ({"kind": "arrays"}, "kind: Input should be 'node', 'nodes', 'array' or 'ddp' (found 'arrays')"),
        (DDP | {"command": SWEEP}, "kind ddp trains one network, found sweep"),
        (DDP | {"tasks": 1}, "one rank; raise tasks or nodes, or take kind node"),
        (DDP | {"tasks": 4, "gpus": 2}, "tasks is 4 for 2 GPUs a node; each rank takes one"),
        (FOLDS | {"array": None}, "kind array without array; name its tasks, such as 0-9"),
        (FOLDS | {"array": "9-0"}, "array: the range 9-0 runs backwards; write 0-9"),
        (FOLDS | {"array": "0-9:0"}, "array: the range 0-9:0 has a step of 0"),
        (FOLDS | {"array": "0-9%0"}, "array: %0 lets no task run"),
        (FOLDS | {"array": "a-b"}, "array: no list of tasks; expected numbers and ranges such as 0-9"),
        (FOLDS | {"command": ["train", "--out", "folds"]}, "every task of an array needs a folder of its own"),
        ({"command": ["train"], "tracking": {"uri": "http://host"}}, "tracking is for sweeps, found train; leave it out"),
        ({"command": [*SWEEP, "--tracking-uri", "x"], "tracking": {"uri": "y"}}, "by tracking and by --tracking-uri; give one"),
    ],
)
def test_wrong_directives_are_rejected_with_the_reason(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)) as fault:
        job(**settings)
    assert "\n" not in str(fault.value)


def test_all_faults_come_at_once() -> None:
    with pytest.raises(ConfigError, match=r"nodes is 2 .*; tasks is 3 .*; array 1 "):
        job(nodes=2, tasks=3, array="1")


@pytest.mark.parametrize("array", ["3", "0-9", "0-9:2", "0,3,5-7", "0-9%4", 7])
def test_arrays_of_every_form_are_taken(array: str | int) -> None:
    assert job(**FOLDS | {"array": array}).array == str(array)


@pytest.mark.parametrize(
    ("asked", "site", "reason"),
    [
        ({}, {"account_form": "such as m1234_g"}, "jobs need an account, such as m1234_g; give account"),
        ({"gpus": 8}, {"gpus_per_node": 4}, "gpus is 8, a node has 4; take more nodes"),
        ({"cpus": 65}, {"cpus_per_node": 64}, "cpus times tasks is 65, a node has 64; lower cpus"),
        ({"time": "3-00"}, {"longest": "2-00:00:00"}, "time 3-00 is beyond the limit of 2-00:00:00"),
        ({"command": ["train", "--out", "{scratch}/a"]}, {}, "the command names {scratch}, which the site does not tell"),
    ],
)
def test_a_site_refuses_what_it_does_not_have(asked: dict[str, Any], site: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"generic: {reason}")):
        check(job(**asked), validate(SiteSettings, site, "site"))
    check(job(**asked), SiteSettings(scratch="/scratch", account="me"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", [None, *sites()])
def test_every_job_that_comes_along_suits_every_site(kind: str, site: str | None) -> None:
    loaded = load_job(Path(kind), ("account=m1234_g",))
    assert loaded.kind == kind
    check(loaded, load_site(site))


def test_profiles_that_come_along_say_that_they_are_untried() -> None:
    assert len(sites()) >= 2
    for name in sites():
        profile = load_site(name)
        assert (profile.name, profile.tried) == (name, False)
        assert profile.variables


def test_an_unknown_site_is_told_which_there_are() -> None:
    with pytest.raises(ConfigError, match="no site 'deltta' and no such file; there are delta, perlmutter"):
        load_site("deltta")


def test_files_and_overrides_make_a_job(spaced: Path) -> None:
    path = spaced / "my job.yaml"
    path.write_text("command: [train]\nmemory: 0\n")
    loaded = load_job(path, ("nodes=2", "kind=nodes"), ("sweep", "run", "spec.yaml"))
    assert (loaded.nodes, loaded.memory, loaded.command) == (2, "0", ("sweep", "run", "spec.yaml"))
    site = spaced / "here.yaml"
    site.write_text("name: here\nscratch: $WORK/me\n")
    assert load_site(str(site), ("qos=debug",)) == SiteSettings(name="here", scratch="$WORK/me", qos="debug")
