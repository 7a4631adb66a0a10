"""Definitions are those that were looked at, for every target; nothing is left open in them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepdisc_ops.errors import ConfigError
from deepdisc_ops.hpc.containers.definition import ARGUMENT, read_definition
from deepdisc_ops.hpc.containers.lint import lint
from deepdisc_ops.hpc.containers.lock import pinned_lines, read_lock
from deepdisc_ops.hpc.containers.render import KINDS, PLACEHOLDERS, arguments, constants, render, render_containerfile, substitute
from deepdisc_ops.hpc.containers.targets import load_target, load_targets

from .conftest import ORIGIN

GOLDEN = Path(__file__).with_name("golden")
ROOT = Path(__file__).parents[3]
TARGETS = ("cpu", "cuda", "rocm")


def rendered(target: str, what: str) -> str:
    values = arguments(load_target(target), ORIGIN, PLACEHOLDERS)
    return render_containerfile(values) if what == "Containerfile" else render(what, values)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", [*KINDS, "Containerfile"])
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_built_is_what_was_looked_at(target: str, what: str) -> None:
    path = GOLDEN / f"{target}-{what}"
    text = rendered(target, what)
    if os.environ.get("GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()
    assert not ARGUMENT.findall("\n".join(line for line in text.splitlines() if not line.startswith("#")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", TARGETS)
def test_ours_pass_the_lint(target: str, kind: str) -> None:
    assert lint(read_definition(rendered(target, kind))) == []


def test_golden_files_are_of_targets_that_there_are() -> None:
    assert tuple(load_targets()) == TARGETS
    assert {path.name for path in GOLDEN.iterdir()} == {
        f"{target}-{what}" for target in TARGETS for what in (*KINDS, "Containerfile")
    }


def test_every_role_has_all_of_an_app() -> None:
    apps = read_definition(rendered("cpu", "environment")).last.apps
    assert set(apps) == {"train", "tune", "serve", "mlflow"}
    assert all({"apprun", "apptest", "apphelp", "applabels"} <= set(app) for app in apps.values())
    assert {name for name, app in apps.items() if "appstart" in app} == {"serve", "mlflow"}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("section", ["post", "test", "environment", "runscript", "startscript"])
def test_sections_are_clean_to_shellcheck(section: str, tmp_path: Path) -> None:
    script = tmp_path / "section.sh"
    script.write_text(f"#!/bin/sh\n{read_definition(rendered('cpu', 'environment')).last.text(section)}\n")
    checked = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_the_containerfile_holds_what_the_definition_does() -> None:
    stage = read_definition(rendered("cpu", "environment")).last
    text = rendered("cpu", "Containerfile")
    for line in stage.all("post")[0].code:
        assert line.text.removeprefix("    ") in text
    for name, line in stage.labels.items():
        assert f'LABEL {name}="{line.text}"' in text
    assert constants(stage)["PYTHONNOUSERSITE"] == "1"
    assert all(f'ENV {name}="{value}"' in text for name, value in constants(stage).items())
    assert re.search(r"^USER [1-9]", text, re.MULTILINE)


def test_a_base_without_digest_is_no_base() -> None:
    values = arguments(load_target("cpu"), ORIGIN, {**PLACEHOLDERS, "BASE_IMAGE": "registry.example.org/python:3.11"})
    with pytest.raises(ConfigError, match="expected NAME@sha256"):
        render_containerfile(values)


def test_what_only_a_site_knows_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="needs WHEEL_INDEX, which only a site can know; run `deepdisc-ops images resolve rocm`"):
        arguments(load_target("rocm"), ORIGIN, {})
    with pytest.raises(ConfigError, match="argument MIRROR has no value; give --set MIRROR=VALUE"):
        render("base-debootstrap", arguments(load_target("cpu"), ORIGIN, {}))
    with pytest.raises(ConfigError, match="no target 'tpu'; expected one of cpu, cuda, rocm"):
        load_target("tpu")
    with pytest.raises(ConfigError, match="rocm has no lock"):
        _ = load_target("rocm").lock_path


def test_all_open_arguments_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"argument A has no value.*argument B has no value"):
        substitute("Bootstrap: docker\nFrom: {{ A }}\n\n%post\n    echo {{ B }}\n", {}, "x.def")


@given(st.text(st.characters(codec="ascii", exclude_characters="{}\n\r\x0b\x0c\x1c\x1d\x1e\0")))
def test_values_arrive_as_they_are(value: str) -> None:
    text = substitute("Bootstrap: docker\nFrom: {{ A }}\n\n%arguments\n    A=other\n\n%help\n    [{{A}}]\n", {"A": value}, "x")
    assert f"    [{value}]\n" in text
    assert "%arguments" not in text


@pytest.mark.parametrize("value", ["a\nb", "a {{ B }}"])
def test_values_that_would_be_more_than_a_value_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="the value of A holds"):
        substitute("%help\n    {{ A }}\n", {"A": value}, "x.def")


def test_the_lock_is_that_of_the_tested_environment() -> None:
    pins = read_lock(load_target("cpu").lock_path)
    assert {f"{pin.name}=={pin.version}" for pin in pins} == set(pinned_lines(ROOT / "constraints.txt")), (
        "constraints.txt has changed: run `deepdisc-ops images lock cpu`"
    )


def test_cuda_and_rocm_are_said_to_be_unbuilt() -> None:
    assert {name for name, one in load_targets().items() if one.built} == {"cpu"}
