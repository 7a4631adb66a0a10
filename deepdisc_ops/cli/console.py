"""How the commands speak: tables and lines on a console, JSON for programs, and the progress of long work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_WIDTH = 140
console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH, highlight=False)


def _aside(as_json: bool) -> bool:
    console.stderr = as_json
    return as_json


AsJson = Annotated[bool, typer.Option("--json", callback=_aside, help="Print JSON on stdout, no tables; all else goes to stderr.")]


def as_json_text(value: Any) -> str:
    """A value, dataclasses and paths among it, as JSON; numbers that are none are null."""
    from pydantic_core import to_json

    return to_json(value, indent=1, inf_nan_mode="null", fallback=str).decode()


def print_json(value: Any) -> None:
    """A value as JSON on stdout, see `as_json_text`."""
    print(as_json_text(value))


@contextmanager
def progress_bar(what: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal, lines in a log; yields advance(done, note, total, tell=always print a line)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, note="")
        told = 0.0

        def advance(done: int, note: str = "", of: int | None = None, *, tell: bool = False) -> None:
            nonlocal told
            everything = of or total
            bar.update(task, completed=done, total=everything, note=note)
            if not console.is_terminal and (tell or done / everything - told >= 0.1 or done == everything):
                told = done / everything
                console.print(f"{what}: {done}/{everything} {unit} {note}".rstrip())

        yield advance


def short(value: float | str | None) -> str:
    """A value in a table, four digits of a number."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
