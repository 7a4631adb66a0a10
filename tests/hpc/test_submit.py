from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from deepdisc_ops.cli.slurm import app
from deepdisc_ops.errors import ConfigError, SetupError
from deepdisc_ops.hpc.jobs import JobSettings, SiteSettings
from deepdisc_ops.hpc.slurm import render, submit

ACCEPTS = 'case "$1" in --parsable) echo {answer} ;; esac\n'


@pytest.fixture
def script(spaced: Path) -> Path:
    path = spaced / "my job.sbatch"
    path.write_text(render(JobSettings(command=("train",), folder=str(spaced), log="log/%x-%j.log"), SiteSettings()))
    (spaced / "log").mkdir()
    return path


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Path:
    """An sbatch that notes its words, one a line, and then does as ``text`` says."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >>"{folder}/said"\n{text}')
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder / "said"


@pytest.mark.parametrize("answer", ["4711", "'4711;cluster'"])
def test_a_job_is_checked_and_then_submitted(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    said = stand_in(tmp_path, monkeypatch, ACCEPTS.format(answer=answer))
    assert submit(script) == "4711"
    assert said.read_text().splitlines() == ["--test-only", str(script), "--parsable", str(script)]


def test_a_refusal_is_told_in_the_words_of_sbatch(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = stand_in(tmp_path, monkeypatch, "echo 'sbatch: error: Invalid account\nor partition' >&2; exit 1\n")
    with pytest.raises(ConfigError, match="my job.sbatch: sbatch: error: Invalid account or partition$"):
        submit(script)
    assert "--parsable" not in said.read_text()


def test_an_answer_without_a_number_is_told(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "echo welcome\n")
    with pytest.raises(SetupError, match="sbatch answered 'welcome'; expected the id of a job"):
        submit(script)


def test_without_slurm_the_login_node_is_named(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SetupError, match="sbatch is not on PATH; submit from a login node"):
        submit(script)


@pytest.mark.parametrize("missing", ["log", "."])
def test_folders_that_slurm_would_miss_are_told_before(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    said = stand_in(tmp_path, monkeypatch, ACCEPTS.format(answer="1"))
    script = script.rename(tmp_path / "moved.sbatch")
    (tmp_path / "a folder" / "log").rmdir()
    if missing == ".":
        (tmp_path / "a folder").rmdir()
    with pytest.raises(ConfigError, match="does not exist; SLURM makes none, a job without it fails: mkdir -p it"):
        submit(script)
    assert not said.exists()


def test_a_script_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "")
    with pytest.raises(ConfigError, match="absent.sbatch does not exist; write one with"):
        submit(tmp_path / "absent.sbatch")


def test_the_command_renders_and_submits(spaced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = spaced / "sweep.sbatch"
    words = ["sweep", "run", "a spec.yaml", "--out", "a sweep"]
    options = ["--job", "nodes", "--site", "delta", "--set", "account=me", "--set", "nodes=3", "--site-set", "qos=debug"]
    done = CliRunner().invoke(app, ["render", *options, "--out", str(out), "--", *words])
    assert (done.exit_code, done.exception) == (0, None)
    assert "untried by us" in done.output
    text = out.read_text()
    assert "deepdisc-ops sweep run 'a spec.yaml' --out 'a sweep' --ray-address" in text
    assert "#SBATCH --nodes=3\n" in text
    assert "#SBATCH --qos=debug\n" in text
    assert CliRunner().invoke(app, ["render", *options, "--", *words]).output == text
    stand_in(tmp_path, monkeypatch, ACCEPTS.format(answer="4711"))
    monkeypatch.chdir(spaced)
    done = CliRunner().invoke(app, ["submit", str(out)])
    assert (done.exit_code, done.output) == (0, "4711\n")
