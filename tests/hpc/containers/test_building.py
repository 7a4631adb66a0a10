"""A build ends in a whole image or in a clear error; nothing half-made is left, and what was there stays."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from deepdisc_ops.errors import ConfigError, SetupError
from deepdisc_ops.hpc.containers.build import build, labels
from deepdisc_ops.hpc.containers.render import PLACEHOLDERS, arguments, render
from deepdisc_ops.hpc.containers.runtime import Machine, is_image
from deepdisc_ops.hpc.containers.targets import load_target

from .conftest import ORIGIN, StandIn, environment


def quiet(_: str) -> None:
    pass


def test_an_image_is_built_under_another_name_and_renamed(stand_in: StandIn, spaced: Path) -> None:
    (spaced / "wheels").mkdir()
    built = build(stand_in.runtime, environment(), spaced / "a.sif", binds=[f"{spaced / 'wheels'}:/mnt/wheels:ro"], tell=quiet)
    assert built.path == spaced / "a.sif"
    assert labels(stand_in.runtime, built.path)["org.deepdisc-ops.version"] == "1.2.3"
    (called,) = [one for one in stand_in.log if one["words"][0] == "build"]
    assert Path(called["words"][-2]).name.startswith(".a.sif.")
    assert called["binds"] == f"{spaced / 'wheels'}:/mnt/wheels:ro"
    assert [path.name for path in spaced.glob("[.a]*")] == ["a.sif"]


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize(
    ("fault", "told"),
    {
        "test": "failed to execute %test script",
        "full": "No space left on device; the disk is full: free it, or give another",
        "silent": "reports success and left no image",
        "half": "reports success and left no image",
        "labels": "label org.deepdisc-ops.commit is 'other",
    }.items(),
)
def test_a_build_that_fails_says_so_and_leaves_nothing(stand_in: StandIn, spaced: Path, fault: str, told: str, stale: bool) -> None:
    out = spaced / "a.sif"
    if stale:
        stand_in.image(out)
    before = out.read_bytes() if stale else None
    stand_in.go_wrong(fault)
    with pytest.raises(SetupError) as caught:
        build(stand_in.runtime, environment(), out, tell=quiet)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert ("is as it was" in str(caught.value)) is stale
    assert (out.read_bytes() if out.exists() else None) == before
    assert {path.name for path in spaced.iterdir()} <= {"a.sif"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (environment().replace("%startscript", "%startscrpt"), "%startscrpt is no section"),
        (environment().replace("prefix=/opt", "prefix={{ OPT }}/opt"), "argument OPT has no value"),
    ],
)
def test_definitions_with_faults_are_not_begun(stand_in: StandIn, spaced: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build(stand_in.runtime, text, spaced / "a.sif", tell=quiet)
    assert not [one for one in stand_in.log if one["words"][0] == "build"]


def test_a_missing_bind_or_folder_is_told_before_the_build(stand_in: StandIn, spaced: Path) -> None:
    with pytest.raises(ConfigError, match="bind /no/wheels does not exist"):
        build(stand_in.runtime, environment(), spaced / "a.sif", binds=["/no/wheels:/mnt/wheels"], tell=quiet)
    with pytest.raises(ConfigError, match="make the folder of the image first"):
        build(stand_in.runtime, environment(), spaced / "none" / "a.sif", tell=quiet)
    with pytest.raises(ConfigError, match="is a folder; give the name of an image"):
        build(stand_in.runtime, environment(), spaced, tell=quiet)
    assert not list(spaced.iterdir())


def test_an_interrupted_build_leaves_nothing(stand_in: StandIn, spaced: Path) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(stand_in.runtime, environment(), spaced / "a.sif", tell=interrupt)
    assert not list(spaced.iterdir())


def test_the_callers_environment_is_left_as_it_is(stand_in: StandIn, spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPTAINER_USERNS", "1")
    before = dict(os.environ)
    build(stand_in.runtime, environment(), spaced / "a.sif", tell=quiet)
    assert dict(os.environ) == before


def test_what_is_no_image_is_none(stand_in: StandIn, spaced: Path) -> None:
    other = spaced / "other.sif"
    other.write_text("no image")
    assert not is_image(other)
    assert not is_image(spaced)
    assert not is_image(spaced / "none")
    with pytest.raises(SetupError, match="is no image; build it"):
        labels(stand_in.runtime, other)


@pytest.mark.parametrize("fault", ["", "fails"])
def test_a_test_that_cannot_run_while_building_runs_before_the_name_is_given(stand_in: StandIn, spaced: Path, fault: str) -> None:
    text = render("base-debootstrap", arguments(load_target("cpu"), ORIGIN, PLACEHOLDERS))
    bound = replace(stand_in.runtime, machine=Machine(root=True, resources=False, namespaces=True, ranges=False, user="root"))
    stand_in.go_wrong(fault)
    if fault:
        with pytest.raises(SetupError, match="its %test failed: some complaint"):
            build(bound, text, spaced / "a.sif", tell=quiet)
    else:
        build(bound, text, spaced / "a.sif", tell=quiet)
    (tested,) = [one["words"] for one in stand_in.log if one["words"][0] == "test"]
    assert "--userns" in tested
    assert {path.name for path in spaced.iterdir()} == (set() if fault else {"a.sif"})
