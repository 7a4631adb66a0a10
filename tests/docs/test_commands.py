"""Commands of the documentation: all are understood by the program, and all but those marked are run."""

from __future__ import annotations

import shlex
import shutil
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pages
import pytest
import typer
from typer._click.exceptions import UsageError
from typer.testing import CliRunner

from deepdisc_ops.cli import app
from deepdisc_ops.cli.console import console

COMMAND: Any = typer.main.get_command(app)
RUN_ELSEWHERE = {
    "README.md": "scripts/demo runs this chain: tests/integration/test_demo.py",
    "CONTRIBUTING.md": "scripts/check, scripts/test and this folder are what it speaks of",
    "models/README.md": "trainings of an hour and more; tests/test_models.py looks at what they gave",
    "docs/evaluation.md": "tests/report, tests/photoz and tests/inference/test_features.py run it",
    "docs/studies.md": "programs of benchmarks/, trainings of an hour",
    "docs/rail.md": "tests/rail runs it",
}
"""Pages that are not marked in themselves, and who runs what they show."""


def name(page: Path) -> str:
    return str(page.relative_to(pages.ROOT))


def why_not(block: pages.Block) -> str:
    return block.not_run or RUN_ELSEWHERE.get(name(block.page), "")


def all_commands() -> list[Any]:
    found = [
        pytest.param(command, id=f"{name(page)}:{block.line}")
        for page in pages.pages()
        for block in pages.blocks(page)
        for command in block.commands()
        if command.startswith("deepdisc-ops ")
    ]
    found += [pytest.param(command, id=name(page)) for page in pages.pages() for command in pages.inline_commands(page)]
    return found


@pytest.mark.parametrize("command", all_commands())
def test_the_program_understands(command: str) -> None:
    """Verbs, options and their values, as its own parser reads them; an ellipsis stands for what is left out."""
    words, verb = pages.words(command), COMMAND
    while words and hasattr(verb, "commands") and not words[0].startswith("-"):
        word = words.pop(0)
        assert word in verb.commands, f"there is no verb {word}"
        verb = verb.commands[word]
    # an ellipsis is a value after an option, and stands for words left out elsewhere
    pairs = pairwise(["", *words])
    said = [word for before, word in pairs if word != "&" and (word != "..." or before.startswith("-"))]
    if hasattr(verb, "commands") or len(words) < 1:
        said.append("--help")  # a verb that is spoken of, without its arguments
    try:
        verb.make_context(command, said)
    except typer.Exit:
        return
    except UsageError as error:
        spoken_of = "..." in words or len(words) < 2
        if not (spoken_of and "Missing" in error.format_message()) and "requires an argument" not in error.format_message():
            raise


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("predit x", "there is no verb predit"),
        ("serve strt m.mar", "there is no verb strt"),
        ("predict x.fits --out c.fits --modle m", "No such option: --modle"),
        ("simulate --out x --train many", "should be a valid integer"),
        ("predict x.fits --model m", "Missing option"),
    ],
)
def test_what_no_page_could_say_is_not_understood(command: str, fault: str) -> None:
    with pytest.raises((AssertionError, UsageError)) as told:
        test_the_program_understands(f"deepdisc-ops {command}")
    error = told.value
    assert fault in (error.format_message() if isinstance(error, UsageError) else str(error))


RUN = [
    page
    for page in pages.pages()
    if any(not why_not(block) for block in pages.blocks(page) if block.language in ("console", "python"))
]


def test_pages_for_newcomers_are_run() -> None:
    assert {"docs/index.md", "docs/how-to/endpoint.md", "docs/how-to/lsst-coadds.md", "docs/explanation/ownership.md"} <= set(
        map(name, RUN)
    )


@pytest.mark.parametrize("page", pages.pages(), ids=name)
def test_every_command_is_run_or_says_why_not(page: Path) -> None:
    for block in pages.blocks(page):
        if any(True for _ in block.commands()) and not why_not(block):
            assert block.language == "console", f"line {block.line}: commands that are run stand in a ```console fence"


@pytest.mark.integration
@pytest.mark.parametrize("page", RUN, ids=name)
def test_what_a_page_shows_runs(page: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(files, tmp_path / "reader", symlinks=True)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    started: list[list[str]] = []
    try:
        for block in pages.blocks(page):
            if why_not(block):
                continue
            if block.language == "python":
                with warnings.catch_warnings(action="ignore"):
                    exec(compile(block.text, f"{page}:{block.line}", "exec"), names)  # noqa: S102  # what the page shows
            for command in block.commands():
                words = pages.words(command)
                if words[:2] == ["serve", "start"]:
                    started.append(["serve", "stop", "--run-dir", words[words.index("--run-dir") + 1]])
                run(words)
    finally:
        for words in started:
            run(words)


def run(words: list[str]) -> None:
    try:
        with warnings.catch_warnings(action="ignore"):
            result = CliRunner().invoke(app, words)
    finally:
        console.stderr = False
    assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}\n{result.exception!r}"
