"""How images are built and run is chosen by what a machine can do, with a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deepdisc_ops.errors import SetupError
from deepdisc_ops.hpc.containers.runtime import Answer, Machine, build_mode, find_runtime, look_around, run_mode

from .conftest import StandIn

ROOT = Machine(root=True, resources=True, namespaces=True, ranges=False, user="root")
BOUND = replace(ROOT, resources=False, ranges=True)
USER = Machine(root=False, resources=False, namespaces=True, ranges=True, user="me")


@pytest.mark.parametrize(
    ("machine", "bootstrap", "options"),
    [
        (ROOT, "debootstrap", ()),
        (BOUND, "debootstrap", ("--notest",)),
        (ROOT, "localimage", ()),
        (BOUND, "localimage", ("--fakeroot",)),
        (USER, "localimage", ("--fakeroot",)),
        (replace(USER, ranges=False), "docker", ("--fakeroot",)),
    ],
)
def test_builds_are_as_the_machine_allows(machine: Machine, bootstrap: str, options: tuple[str, ...]) -> None:
    mode = build_mode(machine, bootstrap)
    assert mode.options == options
    assert mode.why


@pytest.mark.parametrize(
    ("machine", "bootstrap", "told"),
    [
        (USER, "debootstrap", "as root only; build it where you are root, or take --base registry"),
        (replace(USER, namespaces=False), "localimage", "user namespaces are switched off"),
        (replace(BOUND, ranges=False), "localimage", "root:200000:65536"),
    ],
)
def test_what_cannot_be_built_here_says_what_would_help(machine: Machine, bootstrap: str, told: str) -> None:
    with pytest.raises(SetupError, match=told):
        build_mode(machine, bootstrap)


def test_images_run_as_the_machine_allows() -> None:
    assert run_mode(BOUND).options == ("--userns",)
    assert run_mode(ROOT).options == run_mode(USER).options == ()


def test_this_machine_can_be_looked_at() -> None:
    assert look_around().user


def test_apptainer_is_found_before_singularity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("singularity", "apptainer"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho {name} version 1.2.3-4\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        found = find_runtime()
        assert (found.program, found.version) == (program, "1.2.3-4")


def test_a_machine_without_either_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="neither apptainer nor singularity is on PATH"):
        find_runtime()
    with pytest.raises(SetupError, match="cannot be run"):
        find_runtime(tmp_path / "none")


def test_exit_code_and_both_outputs_are_told(stand_in: StandIn) -> None:
    assert stand_in.runtime.call(["exec"], ["a.sif"]) == Answer(0, "some output\n", "")
    stand_in.go_wrong("fails")
    answer = stand_in.runtime.call(["exec"], ["a.sif"])
    assert (answer.code, answer.out, answer.err) == (3, "some output\n", "some complaint\n")
    assert answer.fault == "some complaint"
