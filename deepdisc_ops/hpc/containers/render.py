"""Definitions with their arguments put in, and a Containerfile of the same content: pure functions over ``containers/``.

What is built is the rendered text, so that one line of output shows what was built and Apptainer's and Singularity's versions
that know no ``--build-arg`` build it, too. The files are Apptainer's own template language all the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Literal, get_args

from deepdisc_ops.errors import ConfigError
from deepdisc_ops.hpc.containers.definition import ARGUMENT, NAME, Stage, read_definition
from deepdisc_ops.hpc.containers.targets import Provenance, Target
from deepdisc_ops.resources import find

Kind = Literal["base-debootstrap", "base-registry", "environment"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CONTAINERFILE = "Containerfile"
PREFIX = "/opt/deepdisc-ops"
PLACEHOLDERS = {
    "BASE": "base.sif",
    "MIRROR": "http://mirror.example.org/debian",
    "BASE_IMAGE": f"registry.example.org/python@sha256:{'0' * 64}",
    "WHEELS_DIGEST": "0" * 64,
    "WHEEL_INDEX": "https://index.example.org/rocm",
}
"""Values to look at a definition with; nothing is built from them."""


def arguments(target: Target, origin: Provenance, given: Mapping[str, str]) -> dict[str, str]:
    """What a target's definitions are rendered with: what we know, and what was given.

    Raises `ConfigError` if the target requires an argument that was not given.
    """
    if missing := [name for name in target.requires if not given.get(name)]:
        raise ConfigError(
            f"target {target.name} needs {', '.join(missing)}, which only a site can know; "
            f"run `deepdisc-ops images resolve {target.name}` there, or give --set {missing[0]}=VALUE"
        )
    known = {
        "TARGET": target.name,
        "SUMMARY": target.summary,
        "NOTE": target.note,
        "VERSION": origin.version,
        "COMMIT": origin.commit,
        "LOCK_DIGEST": origin.lock_digest,
    }
    return known | dict(given)


def render(kind: Kind, values: Mapping[str, str]) -> str:
    """The text of a definition, complete: no argument is left in it."""
    return substitute(find(f"containers/{kind}.def").read_text(), values, f"containers/{kind}.def")


def substitute(text: str, values: Mapping[str, str], source: str) -> str:
    """Put arguments in, defaults of ``%arguments`` where none is given, and leave that section out.

    Raises `ConfigError` naming every argument that has no value, and every value that would break a line.
    """
    definition = read_definition(text)
    defaults = {name: line.text for stage in definition.stages for name, line in stage.defaults.items()}
    known = defaults | dict(values)
    wanted = dict.fromkeys(name for name, _ in definition.arguments)
    faults = [f"argument {name or 'without a name'} has no value; give --set {name}=VALUE" for name in wanted if name not in known]
    faults += [
        f"the value of {name} holds a line break or {{{{; expected one line" for name in wanted if _breaks(known.get(name, ""))
    ]
    if faults:
        raise ConfigError(f"{source}: {'; '.join(faults)}")
    lines = text.splitlines()
    for stage in definition.stages:
        for section in stage.all("arguments"):
            for number in range(section.number, section.number + len(section.lines) + 1):
                lines[number - 1] = "\0"
    kept = [line if line.lstrip().startswith("#") else _put(line, known) for line in lines if line != "\0"]
    return "\n".join(kept).rstrip() + "\n"


def render_containerfile(values: Mapping[str, str]) -> str:
    """A Containerfile whose image holds what environment.def makes, on a base from a registry."""
    if not re.search(r"@sha256:[0-9a-f]{64}$", values.get("BASE_IMAGE", "")):
        raise ConfigError(
            f"BASE_IMAGE is {values.get('BASE_IMAGE') or 'not given'}; expected NAME@sha256:DIGEST, as `images resolve` finds it"
        )
    stage = read_definition(render("environment", {"BASE": "unused", **values})).last
    template = find(f"containers/{CONTAINERFILE}").read_text()
    parts = {
        "POST": _dedented(stage.text("post")),
        "LABELS": "\n".join(f"LABEL {name}={json.dumps(line.text)}" for name, line in stage.labels.items()),
        "ENVIRONMENT": "\n".join(f"ENV {name}={json.dumps(value)}" for name, value in constants(stage).items()),
        "SCRIPTS": "\n\n".join(_scripts(stage)),
    }
    rendered = "\n".join(line if line.startswith("#") else _put(line, {**values, **parts}) for line in template.splitlines())
    return _put(rendered, values) + "\n"


def constants(stage: Stage) -> dict[str, str]:
    """Variables that ``%environment`` sets to what does not depend on where it runs."""
    found = [
        re.fullmatch(r"export (\w+)=([^\"'$`]*)", line.text.strip())
        for section in stage.all("environment")
        for line in section.code
    ]
    return {match[1]: match[2] for match in found if match}


def _scripts(stage: Stage) -> list[str]:
    """What apps and the environment are in an image that knows neither: programs of ``roles/``."""
    enter = f'{_dedented(stage.text("environment"))}\nexec "$@"'
    programs = {"enter": enter} | {name: _dedented(app["apprun"].text) for name, app in stage.apps.items()}
    return [f"COPY --chmod=755 <<'SCRIPT' {PREFIX}/roles/{name}\n#!/bin/sh\n{text}\nSCRIPT" for name, text in programs.items()]


def _dedented(text: str) -> str:
    return "\n".join(line.removeprefix("    ") for line in text.splitlines()).strip("\n")


def _put(line: str, values: Mapping[str, str]) -> str:
    return ARGUMENT.sub(lambda found: values.get(found[1], found[0]) if NAME.fullmatch(found[1]) else found[0], line)


def _breaks(value: str) -> bool:
    return any(character in value for character in "\n\r\0") or "{{" in value
