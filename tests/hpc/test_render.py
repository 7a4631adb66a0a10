"""The text of the scripts. ``GOLDEN=write pytest tests/hpc/test_render.py`` writes the golden files anew; read the difference."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepdisc_ops.config import validate
from deepdisc_ops.errors import ConfigError, Requeue
from deepdisc_ops.hpc.jobs import KINDS, JobSettings, SiteSettings, load_job, load_site
from deepdisc_ops.hpc.slurm import directives, quote, render

GOLDEN = Path(__file__).with_name("golden")
ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "venv": {"venv": '/projects/my "sky"/it\'s a venv'},
    "container": {"container": ["apptainer", "exec", "--nv", "--bind", "/scratch/my sky", '/images/it\'s "train".sif']},
    "path": {},
}
KIND_SETTINGS: dict[str, dict[str, Any]] = {
    "node": {"command": ["train", "small", "--out", '{scratch}/it\'s "a" run', "--set", "model.bands=[g, r]"], "gpus": 1},
    "nodes": {
        "command": ["sweep", "run", "my $pec.yaml", "--out", "sweeps/a b"],
        "nodes": 128,
        "gpus": 4,
        "cpus": 64,
        "tracking": {"uri": "sqlite:////home/me/my runs.db", "node_local": "/local disk"},
    },
    "array": {"command": ["train", "--out", "{scratch}/fold's/{task}", "--set", "data.partition={task}"], "array": "0-9%4"},
    "ddp": {"command": ["train", "lsst", "--out", "a run"], "nodes": 2, "tasks": 4, "gpus": 4, "cpus": 16},
}
SITE = SiteSettings(
    name="golden",
    account="m1234_g",
    constraint="gpu&hbm80g",
    modules=("python/3.11", "cuda/12.4"),
    scratch="$PSCRATCH/my runs",
    variables={"NCCL_SOCKET_IFNAME": "hsn", "GREETING": 'it\'s a "name"'},
)
needs_shellcheck = pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
words = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=30)


def golden_job(kind: str, environment: str) -> JobSettings:
    settings = {
        "kind": kind,
        "name": f"golden-{kind}",
        "time": "1-00:00:00",
        "folder": '/scratch/my "sky"/it\'s \\ here',
        "environment": ENVIRONMENTS[environment],
    }
    return validate(JobSettings, settings | KIND_SETTINGS[kind], "job")


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_scripts_are_those_that_were_looked_at(kind: str, environment: str) -> None:
    path = GOLDEN / f"{kind}-{environment}.sbatch"
    text = render(golden_job(kind, environment), SITE)
    if os.environ.get("GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


@needs_shellcheck
@pytest.mark.parametrize("site", ["golden", "delta", "perlmutter"])
@pytest.mark.parametrize("kind", KINDS)
def test_scripts_are_clean_to_shellcheck(kind: str, site: str, tmp_path: Path) -> None:
    if site == "golden":
        paths = [str(GOLDEN / f"{kind}-{environment}.sbatch") for environment in ENVIRONMENTS]
    else:
        path = tmp_path / "job.sbatch"
        path.write_text(render(load_job(Path(kind), ("account=abc",)), load_site(site)))
        paths = [str(path)]
    checked = subprocess.run(["shellcheck", "--shell=bash", *paths], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_bash_reads_the_scripts(kind: str, environment: str) -> None:
    text = render(golden_job(kind, environment), SITE)
    read = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (read.returncode, read.stderr) == (0, "")


@given(st.lists(words, min_size=1, max_size=5))
def test_words_reach_the_driver_as_they_are(given_words: list[str]) -> None:
    plain = [word.replace("{task}", "").replace("{scratch}", "") for word in given_words]
    script = f"printf '%s\\0' {' '.join(quote(word) for word in plain)}"
    heard = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout.decode().split("\0")[:-1]
    assert heard == plain


def test_task_and_scratch_are_put_in_by_the_shell() -> None:
    folder, other = quote("{scratch}/it's/{task}"), quote("{other}")
    script = f"SLURM_ARRAY_TASK_ID=7 scratch='/a b'; printf '%s|' {folder} {other}"
    heard = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert heard == "/a b/it's/7|{other}|"


@given(words.filter(lambda word: word.strip()))
def test_directives_reach_slurm_as_they_are(folder: str) -> None:
    job = JobSettings(command=("train",), folder=f"/{folder}")
    (line,) = [line for line in directives(job, SiteSettings()) if line.startswith("--chdir=")]
    assert read_by_sbatch(line) == [f"--chdir=/{folder}"]


def read_by_sbatch(line: str) -> list[str]:
    """The arguments on a ``#SBATCH`` line, by the rules of sbatch's _get_argument: a backslash escapes in quotes of both kinds."""
    arguments: list[str] = []
    argument, quoted, escaped = "", "", False
    for character in [*line, " "]:
        if escaped:
            argument, escaped = argument + character, False
        elif character == "\\":
            escaped = True
        elif quoted:
            argument, quoted = (argument, "") if character == quoted else (argument + character, quoted)
        elif character in "\"'":
            quoted = character
        elif character == "#":
            return arguments
        elif character in " \t\n\v\f\r":
            arguments += [argument] if argument else []
            argument = ""
        else:
            argument += character
    return arguments


def test_a_job_says_so_where_the_site_is_untried() -> None:
    job = load_job(Path("node"), ("account=abc",))
    assert "# Untried by us there" in render(job, load_site("delta"))
    assert "Untried" not in render(job, SiteSettings(tried=True))


def test_the_job_overrules_the_site() -> None:
    job = JobSettings(command=("train",), account="mine", qos="debug", constraint="cpu")
    asked = directives(job, SITE)
    assert {"--account=mine", "--qos=debug", "--constraint=cpu"} <= set(asked)
    assert not any(line.startswith("--partition") for line in asked)


def test_scripts_know_the_exit_code_that_asks_for_the_queue() -> None:
    assert f"\nrequeue_code={Requeue.exit_code} " in render(JobSettings(command=("train",)), SiteSettings())


def test_golden_files_are_of_jobs_that_there_are() -> None:
    expected = {f"{kind}-{environment}.sbatch" for kind in KINDS for environment in ENVIRONMENTS}
    assert {path.name for path in GOLDEN.iterdir()} == expected


def test_what_the_site_lacks_is_not_rendered() -> None:
    with pytest.raises(ConfigError, match="gpus is 8, a node has 4"):
        render(JobSettings(command=("train",), gpus=8, account="abc"), load_site("delta"))
