"""What is wrong with a definition file before anything is built; the real build remains the judge.

Every rule yields its findings with a line. A definition of ours passes with none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from deepdisc_ops.hpc.containers.definition import APP_SECTIONS, HEADERS, NAME, PLAIN_SECTIONS, Definition, Section, Stage

LABELS = tuple(f"org.deepdisc-ops.{name}" for name in ("version", "commit", "lock", "target"))
REMOTE = ("docker", "oras", "library", "shub")
WRITERS = r"(?:>{1,2}\s*|\b(?:mkdir|touch|cp|mv|install|ln|tee|rsync)\b[^;&|]*?\s)"
FORBIDDEN = re.compile(WRITERS + r"[\"']?(~/|\$\{?HOME\b|/root\b|/home\b|/Users\b|/run\b|/var/tmp\b|/dev/shm\b|/proc\b|/sys\b)")
LEFTOVER = re.compile(WRITERS + r"[\"']?(/tmp\b|\$\{?TMPDIR\b)")
DOWNLOAD = re.compile(r"(?:^|[;&|]\s*|\b(?:then|do|sudo|exec)\s+)(curl|wget|git\s+clone|apt-get|apt|dnf|yum|conda|mamba|npm)\b")
PIP = re.compile(r"\bpip3?\s+install\b")


class Finding(NamedTuple):
    """One fault: its rule, its line, what was found and what to do."""

    rule: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.what} [{self.rule}]"


@dataclass(frozen=True)
class _Case:
    """What a rule looks at."""

    definition: Definition
    given: frozenset[str]

    @property
    def stage(self) -> Stage:
        return self.definition.last

    def sections(self, *names: str) -> Iterator[Section]:
        for stage in self.definition.stages:
            yield from (section for section in stage.sections if section.name in names)


def lint(definition: Definition, given: Collection[str] = ()) -> list[Finding]:
    """All findings, in the order of the lines; ``given`` are arguments that will have a value at rendering."""
    case = _Case(definition, frozenset(given))
    return sorted({finding for rule in RULES for finding in rule(case)}, key=lambda finding: (finding.line, finding.rule))


def _headers(case: _Case) -> Iterator[Finding]:
    for stage in case.definition.stages:
        for name, line in stage.header.items():
            if name not in HEADERS:
                yield Finding(
                    "unknown-header", line.number, f"header {name}: unknown; expected one of {', '.join(sorted(HEADERS))}"
                )
        for line in stage.unread:
            yield Finding("unknown-header", line.number, f"{line.text.strip()!r} is neither a header nor in a section")
        if "bootstrap" not in stage.header:
            yield Finding("no-base", stage.number, "no Bootstrap: header; say what the image is built on")
        elif "from" not in stage.header and stage.header["bootstrap"].text != "debootstrap":
            yield Finding("no-base", stage.header["bootstrap"].number, "Bootstrap: without From:; name the image it is built on")
    if len(names := [stage.header["stage"].text for stage in case.definition.stages if "stage" in stage.header]) != len(set(names)):
        yield Finding("unknown-header", case.stage.number, f"two stages of one name among {', '.join(names)}")


def _pinned(case: _Case) -> Iterator[Finding]:
    for stage in case.definition.stages:
        source, base = stage.header.get("bootstrap"), stage.header.get("from")
        if (
            source
            and base
            and source.text in REMOTE
            and "{{" not in base.text
            and not re.search(r"@sha256:[0-9a-f]{64}$", base.text)
        ):
            yield Finding("unpinned-base", base.number, f"{base.text} may change; pin it, as in NAME@sha256:DIGEST")


def _known_sections(case: _Case) -> Iterator[Finding]:
    for stage in case.definition.stages:
        seen: set[tuple[str, ...]] = set()
        for section in stage.sections:
            key = (section.name, *section.words[:1]) if section.name in APP_SECTIONS | {"files"} else (section.name,)
            if section.name not in PLAIN_SECTIONS | APP_SECTIONS:
                yield Finding(
                    "unknown-section", section.number, f"%{section.name} is no section of a definition; Apptainer would stop"
                )
            elif section.name in APP_SECTIONS and not section.words:
                yield Finding("app-without-name", section.number, f"%{section.name} names no app; write %{section.name} NAME")
            elif key in seen:
                yield Finding("repeated-section", section.number, f"%{' '.join(key)} is there already; join the two")
            if not section.code:
                yield Finding("empty-section", section.number, f"%{section.name} is empty; fill it or leave it out")
            seen.add(key)


def _arguments(case: _Case) -> Iterator[Finding]:
    used = set()
    defaults = {name: line for stage in case.definition.stages for name, line in stage.defaults.items()}
    for name, number in case.definition.arguments:
        used.add(name)
        if not NAME.fullmatch(name):
            yield Finding("undefined-argument", number, f"{{{{ {name} }}}} is no name of an argument")
        elif name not in defaults and name not in case.given:
            yield Finding("undefined-argument", number, f"argument {name} has no value; give it, or a default in %arguments")
    for name, line in defaults.items():
        if name not in used:
            yield Finding("unused-argument", line.number, f"argument {name} has a default and no use")


def _described(case: _Case) -> Iterator[Finding]:
    number = case.stage.number
    for name, why in {
        "help": "say what it is for",
        "test": "say how to know that it works",
        "labels": "say where it is from",
    }.items():
        if not case.stage.all(name):
            yield Finding(f"no-{name}", number, f"no %{name}; {why}")
    if case.stage.all("labels"):
        for name in LABELS:
            if not (line := case.stage.labels.get(name)) or not line.text:
                yield Finding("missing-label", case.stage.all("labels")[0].number, f"label {name} is missing or empty")


def _apps(case: _Case) -> Iterator[Finding]:
    for name, app in case.stage.apps.items():
        number = min(section.number for section in app.values())
        for needed in ("apprun", "apptest", "apphelp"):
            if needed not in app:
                yield Finding("incomplete-app", number, f"app {name} has no %{needed} {name}")


def _strict_shell(case: _Case) -> Iterator[Finding]:
    for section in case.sections("post", "pre"):
        if section.commands and not re.match(r"set -\w*e", section.commands[0].text.strip()):
            yield Finding("no-set-e", section.commands[0].number, f"%{section.name} goes on after a failure; begin it with set -eu")
    for section in case.sections("runscript", "apprun"):
        if section.commands and not section.commands[-1].text.strip().startswith("exec "):
            yield Finding(
                "no-exec", section.commands[-1].number, f"%{section.name} does not exec its program, which signals then miss"
            )


def _places(case: _Case) -> Iterator[Finding]:
    for section in case.sections("post", "appinstall"):
        for line in section.commands:
            if found := FORBIDDEN.search(line.text):
                yield Finding(
                    "forbidden-place", line.number, f"writes to {found[1]}, which is the user's or the host's at run time"
                )
            elif (found := LEFTOVER.search(line.text)) and "rm " not in section.text:
                yield Finding("forbidden-place", line.number, f"writes to {found[1]} and removes nothing; it stays in the image")
    for section in case.sections("setup"):
        for line in section.commands:
            if re.search(WRITERS, f"{line.text} ") and not re.search(r"\$\{?(APPTAINER|SINGULARITY)_ROOTFS", line.text):
                yield Finding("forbidden-place", line.number, "%setup writes on the host, outside ${APPTAINER_ROOTFS}")
            if re.search(r"\brm\b", line.text) and "ROOTFS:?}" not in line.text:
                yield Finding("forbidden-place", line.number, "%setup removes on the host; name it below ${APPTAINER_ROOTFS:?}")


def _offline(case: _Case) -> Iterator[Finding]:
    for section in case.sections("post", "appinstall"):
        for line in section.commands:
            if found := DOWNLOAD.search(line.text.strip()):
                yield Finding(
                    "network", line.number, f"{found[1]} needs a network in %{section.name}; put it into base or wheelhouse"
                )
            if PIP.search(line.text) and not {"--no-index", "--require-hashes"} <= set(line.text.split()):
                yield Finding("network", line.number, "pip install without --no-index --require-hashes takes what an index gives")


def _isolated(case: _Case) -> Iterator[Finding]:
    if not case.stage.all("runscript"):
        return
    if "export PYTHONNOUSERSITE=1" not in case.stage.text("environment"):
        yield Finding(
            "user-site", case.stage.number, "%environment does not export PYTHONNOUSERSITE=1: packages of the home leak in"
        )


def _privileges(case: _Case) -> Iterator[Finding]:
    for section in case.sections("post", "appinstall", "runscript", "startscript", "apprun", "appstart", "test", "apptest"):
        for line in section.commands:
            if re.search(r"\bsudo\b|chmod\s+(?:-R\s+)?(?:[ugoa]*\+\w*s|[2467]\d{3}\b)|chmod\s+(?:-R\s+)?0?777\b", line.text):
                yield Finding(
                    "privileges", line.number, f"{line.text.strip()!r} gives or takes privileges; images run as an ordinary user"
                )


def _secrets(case: _Case) -> Iterator[Finding]:
    for number, line in enumerate(case.definition.text.splitlines(), 1):
        if found := re.search(r"(?i)\b\w*(password|passwd|secret|token|api_key)\w*=(?!\s|\$|\"\$|\{\{)\S+", line):
            yield Finding(
                "secret", number, f"{found[0].partition('=')[0]} is set in the text; everyone who has the image can read it"
            )


RULES: tuple[Callable[[_Case], Iterator[Finding]], ...] = (
    _headers,
    _pinned,
    _known_sections,
    _arguments,
    _described,
    _apps,
    _strict_shell,
    _places,
    _offline,
    _isolated,
    _privileges,
    _secrets,
)
