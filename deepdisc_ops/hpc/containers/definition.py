"""A strict reader of Apptainer's definition files: headers, sections, and the template arguments in them.

It follows Apptainer's own rules (a stage begins at ``Bootstrap:``, a section at a ``%`` in the first column, ``{{ NAME }}`` is an
argument, ``%arguments`` holds defaults), keeps what it does not know with its line, and leaves the judgement to
`deepdisc_ops.hpc.containers.lint` and to the real build.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

PLAIN_SECTIONS = frozenset(
    {"pre", "setup", "post", "test", "environment", "runscript", "startscript", "labels", "help", "files", "arguments"}
)
APP_SECTIONS = frozenset({"appinstall", "appfiles", "apphelp", "appenv", "apprun", "apptest", "applabels", "appstart"})
HEADERS = frozenset(
    {
        "bootstrap",
        "from",
        "stage",
        "osversion",
        "mirrorurl",
        "updateurl",
        "include",
        "fingerprints",
        "registry",
        "namespace",
        "library",
    }
)
ARGUMENT = re.compile(r"\{\{\s*([^{}]*?)\s*\}\}")
NAME = re.compile(r"[A-Za-z_]\w*")
HEADER = re.compile(r"([A-Za-z]+)\s*:\s*(.*)")


@dataclass(frozen=True)
class Line:
    """A line and its number in the file, from 1."""

    number: int
    text: str


@dataclass(frozen=True)
class Section:
    """``%name words`` and the lines below it."""

    name: str
    words: tuple[str, ...]
    number: int
    lines: tuple[Line, ...] = ()

    @property
    def text(self) -> str:
        """The lines as they are."""
        return "\n".join(line.text for line in self.lines)

    @property
    def code(self) -> tuple[Line, ...]:
        """Lines that are neither empty nor comments."""
        return tuple(line for line in self.lines if line.text.strip() and not line.text.lstrip().startswith("#"))

    @property
    def commands(self) -> tuple[Line, ...]:
        """The code with continued lines joined."""
        joined: list[Line] = []
        open_line: Line | None = None
        for line in self.code:
            whole = line if open_line is None else Line(open_line.number, f"{open_line.text[:-1].rstrip()} {line.text.strip()}")
            open_line = whole if whole.text.endswith("\\") else None
            if open_line is None:
                joined.append(whole)
        return (*joined, *([open_line] if open_line else []))


@dataclass(frozen=True)
class Stage:
    """One ``Bootstrap:`` with its header and its sections."""

    header: dict[str, Line]
    sections: tuple[Section, ...]
    number: int
    unread: tuple[Line, ...] = field(default=(), metadata={"what": "lines before the first section that are no header"})

    def all(self, name: str) -> tuple[Section, ...]:
        """Every section of a name."""
        return tuple(section for section in self.sections if section.name == name)

    def text(self, name: str) -> str:
        """The lines of a plain section, of several of one name in their order."""
        return "\n".join(section.text for section in self.all(name))

    @property
    def apps(self) -> dict[str, dict[str, Section]]:
        """App name to its sections by their names."""
        found: dict[str, dict[str, Section]] = {}
        for section in self.sections:
            if section.name in APP_SECTIONS and section.words:
                found.setdefault(section.words[0], {})[section.name] = section
        return found

    @property
    def defaults(self) -> dict[str, Line]:
        """Arguments with a default in ``%arguments``; the line's text is the value."""
        pairs = [(line, *line.text.strip().partition("=")) for section in self.all("arguments") for line in section.code]
        return {name.strip(): Line(line.number, value.strip().strip("\"'")) for line, name, _, value in pairs}

    @property
    def labels(self) -> dict[str, Line]:
        """Label to its value."""
        pairs = [(line, line.text.split(maxsplit=1)) for section in self.all("labels") for line in section.code]
        return {words[0]: Line(line.number, words[1] if len(words) > 1 else "") for line, words in pairs}


@dataclass(frozen=True)
class Definition:
    """A definition file."""

    text: str
    stages: tuple[Stage, ...]

    @property
    def last(self) -> Stage:
        """The stage that becomes the image."""
        return self.stages[-1]

    @property
    def arguments(self) -> Iterator[tuple[str, int]]:
        """Every use of a template argument outside comments, with its line."""
        for number, line in enumerate(self.text.splitlines(), 1):
            if not line.lstrip().startswith("#"):
                yield from ((name, number) for name in ARGUMENT.findall(line))


def read_definition(text: str) -> Definition:
    """Split a definition into stages and sections; what is malformed stays in it for the lint."""
    lines = [Line(number, line) for number, line in enumerate(text.splitlines(), 1)]
    starts = [index for index, line in enumerate(lines) if re.match(r"(?i)bootstrap\s*:", line.text)]
    starts = [0, *starts[1:]]  # what stands before the first belongs to it
    return Definition(text, tuple(_stage(lines[start:end]) for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)))


def _stage(lines: list[Line]) -> Stage:
    header: dict[str, Line] = {}
    unread: list[Line] = []
    sections: list[Section] = []
    for line in lines:
        if line.text.startswith("%"):
            name, *words = line.text[1:].split() or [""]
            sections.append(Section(name, tuple(word for word in words if not word.startswith("#")), line.number))
        elif sections:
            last = sections[-1]
            sections[-1] = Section(last.name, last.words, last.number, (*last.lines, line))
        elif line.text.strip() and not line.text.startswith("#"):
            found = HEADER.fullmatch(line.text.strip())
            if found:
                header[found[1].lower()] = Line(line.number, found[2].strip())
            else:
                unread.append(line)
    return Stage(header, tuple(sections), lines[0].number if lines else 1, tuple(unread))
