"""The lint finds what was planted, at its line, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepdisc_ops.hpc.containers.definition import APP_SECTIONS, PLAIN_SECTIONS, read_definition
from deepdisc_ops.hpc.containers.lint import lint

from .conftest import environment

SOUND = environment()
LINES = SOUND.splitlines()


def at(text: str) -> int:
    """The number of the first line that begins with a text."""
    return next(number for number, line in enumerate(LINES, 1) if line.strip().startswith(text))


def replaced(old: str, new: str) -> str:
    assert old in SOUND
    return SOUND.replace(old, new, 1)


PLANTED = {
    "unknown-section": (replaced("%startscript", "%startscrpt"), at("%startscript")),
    "undefined-argument": (replaced("prefix=/opt/deepdisc-ops", "prefix={{ PREFIX }}"), at("prefix=")),
    "unknown-header": (replaced("From: base.sif", "From: base.sif\nFrmo: x"), at("From:") + 1),
    "no-base": (replaced("From: base.sif\n", ""), at("Bootstrap:")),
    "unpinned-base": (replaced("Bootstrap: localimage\nFrom: base.sif", "Bootstrap: docker\nFrom: python:3.11"), at("From:")),
    "repeated-section": (SOUND + "\n%runscript\n    exec deepdisc-ops\n", len(LINES) + 2),
    "empty-section": (replaced('    exec deepdisc-ops "$@"\n\n%startscript', "\n%startscript"), at("%runscript")),
    "missing-label": (replaced("    org.deepdisc-ops.commit cc", "    org.deepdisc-ops.comit cc"), at("%labels")),
    "no-test": (SOUND[: SOUND.index("%test")] + SOUND[SOUND.index("%runscript") :], at("Bootstrap:") - 2),
    "no-help": (SOUND[: SOUND.index("%help")] + SOUND[SOUND.index("%test") :], at("Bootstrap:") - 2),
    "no-labels": (SOUND[: SOUND.index("%labels")] + SOUND[SOUND.index("%help") :], at("Bootstrap:") - 2),
    "forbidden-place": (replaced("    prefix=", "    mkdir -p $HOME/.config\n    prefix="), at("prefix=")),
    "network": (replaced("    prefix=", "    curl -O https://example.org/x\n    prefix="), at("prefix=")),
    "no-set-e": (replaced("%post\n    set -eu\n", "%post\n"), at("%post") + 1),
    "no-exec": (replaced("    exec deepdisc-ops train", "    deepdisc-ops train"), at("%apprun train") + 1),
    "user-site": (replaced("    export PYTHONNOUSERSITE=1\n", ""), at("Bootstrap:") - 2),
    "privileges": (replaced('    chmod -R a+rX "$prefix"', '    chmod -R 777 "$prefix"'), at("chmod")),
    "secret": (replaced("    prefix=", "    export API_TOKEN=abc123\n    prefix="), at("prefix=")),
    "incomplete-app": (SOUND[: SOUND.index("%apptest mlflow")] + SOUND[SOUND.index("%appstart mlflow") :], at("%apphelp mlflow")),
    "app-without-name": (SOUND + "\n%appenv\n    export X=1\n", len(LINES) + 2),
    "unused-argument": (replaced("%post", "%arguments\n    SPARE=1\n\n%post"), at("%post") + 1),
}


@pytest.mark.parametrize("rule", PLANTED)
def test_a_planted_fault_is_found_and_nothing_else(rule: str) -> None:
    text, line = PLANTED[rule]
    assert [(finding.rule, finding.line) for finding in lint(read_definition(text))] == [(rule, line)]


@pytest.mark.parametrize(
    "command",
    [
        "echo x > /root/x",
        "cp a ~/b",
        "mkdir -p /home/me",
        "ln -s a /dev/shm/b",
        "echo x >> ${HOME}/.bashrc",
        "mv a /tmp/b",
        "tar c . | tee /run/x",
    ],
)
def test_writing_to_what_is_not_the_images_is_found(command: str) -> None:
    text = SOUND.replace("    rm -rf /root/.cache /root/.config /root/.dustmapsrc\n", "").replace(
        "    prefix=", f"    {command}\n    prefix=", 1
    )
    assert [finding.rule for finding in lint(read_definition(text))] == ["forbidden-place"]


@pytest.mark.parametrize("command", ["mkdir -p /etc/ours", "rm -rf $APPTAINER_ROOTFS/tmp", "touch x"])
def test_setup_may_not_touch_the_host(command: str) -> None:
    text = SOUND.replace("%post", f"%setup\n    {command}\n\n%post", 1)
    assert {finding.rule for finding in lint(read_definition(text))} == {"forbidden-place"}


@pytest.mark.parametrize(
    "command", ["apt-get install -y x", "git clone https://x", "true && wget x", "pip install x", "if a; then curl x; fi"]
)
def test_what_needs_a_network_is_found(command: str) -> None:
    text = SOUND.replace("    prefix=", f"    {command}\n    prefix=", 1)
    assert [finding.rule for finding in lint(read_definition(text))] == ["network"]


def test_given_arguments_are_not_undefined() -> None:
    text = PLANTED["undefined-argument"][0]
    assert lint(read_definition(text), {"PREFIX"}) == []


def test_every_stage_is_read() -> None:
    text = f"Bootstrap: docker\nFrom: a:1\nStage: build\n\n%pots\n    set -e\n\n{SOUND}"
    assert {finding.rule for finding in lint(read_definition(text))} == {"unpinned-base", "unknown-section"}
    assert len(read_definition(text).stages) == 2


@given(st.text(), st.sampled_from(sorted(PLAIN_SECTIONS | APP_SECTIONS)))
def test_any_text_is_read_and_no_line_is_lost(text: str, name: str) -> None:
    whole = f"{text}\n%{name} word\n{text}"
    definition = read_definition(whole)
    lint(definition)
    lines = [line for stage in definition.stages for section in stage.sections for line in section.lines]
    assert all(whole.splitlines()[line.number - 1] == line.text for line in lines)
