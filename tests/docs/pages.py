"""What the documentation shows: commands and Python, page by page, with what is said about running them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
NOT_RUN = re.compile(r"<!-- not run: (?P<why>.+?) -->", re.DOTALL)
"""Before a fence: why its commands are parsed and not run. Before a page's title: the same for all of the page."""


@dataclass(frozen=True)
class Block:
    """A block of code of a page; ``not_run`` says why its commands are not run, and is empty where they are."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str = ""

    def commands(self) -> Iterator[str]:
        """Commands of the shell, one a line: after "$ " in what shows a console, every line of ours elsewhere."""
        for line in re.sub(r"\\\n\s*", "", self.text).splitlines():
            if line.startswith("$ "):
                yield line.removeprefix("$ ")
            elif self.language != "console" and line.startswith("deepdisc-ops "):
                yield line


def pages() -> list[Path]:
    """All pages for people, but those that a program writes."""
    site = [path for path in (ROOT / "docs").rglob("*.md") if path != ROOT / "docs" / "reference" / "commands.md"]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "models" / "README.md", *sorted(site)]


def blocks(page: Path) -> list[Block]:
    """Fenced and indented blocks of a page in their order."""
    found: list[Block] = []
    whole = pending = ""
    for token in tokens(page):
        if token.type == "html_block":
            said = NOT_RUN.search(token.content)
            pending = " ".join(said["why"].split()) if said else ""
        elif token.type == "heading_open" and token.tag == "h1":
            whole, pending = pending, ""
        elif token.type in ("fence", "code_block"):
            line = token.map[0] + 1 if token.map else 0
            found.append(Block(page, line, token.info.strip(), token.content, pending or whole))
            pending = ""
        elif token.level == 0 and token.nesting >= 0:
            pending = ""
    return found


def inline_commands(page: Path) -> Iterator[str]:
    """Commands in running text and tables, between single backticks."""
    for token in tokens(page):
        for child in token.children or ():
            if child.type == "code_inline" and child.content.startswith("deepdisc-ops "):
                yield child.content


def links(page: Path) -> Iterator[str]:
    """Targets of links and pictures."""
    for token in tokens(page):
        for child in token.children or ():
            if child.type == "link_open":
                yield str(child.attrs["href"])
            elif child.type == "image":
                yield str(child.attrs["src"])


def tokens(page: Path) -> list[Token]:
    """A page as CommonMark with tables has it."""
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def words(command: str) -> list[str]:
    """The words of one of our commands, as a shell splits them; what follows a # is a remark."""
    first, *rest = shlex.split(re.sub(r"\$\((.*?)\)", "substituted", command), comments=True)
    if first != "deepdisc-ops":
        raise ValueError(f"{command!r} is none of deepdisc-ops")
    return rest
