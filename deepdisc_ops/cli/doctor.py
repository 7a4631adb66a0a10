"""``deepdisc-ops doctor``: what is installed, and what each missing thing would enable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from deepdisc_ops.cli.console import AsJson, console, print_json


def doctor(
    folder: Annotated[Path, typer.Option(help="Where results would be written.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Tell what is there: extras, detectron2, Java, GPU, Apptainer, SLURM, dust maps, disk; and the remedy for what is not.

    Exit code 1 if something that is there is faulty.

    Example: `deepdisc-ops doctor`
    """
    from deepdisc_ops.doctor import examine

    findings = examine(folder)
    if as_json:
        print_json(findings)
    else:
        table = Table("", "state", *(Column(name, overflow="fold") for name in ("found", "for", "remedy")))
        colours = {"there": "green", "absent": "yellow", "faulty": "red"}
        for finding in findings:
            state = f"[{colours[finding.state]}]{finding.state}[/]"
            table.add_row(_plain(finding.name), state, *map(_plain, (finding.found, finding.enables, finding.remedy)))
        console.print(table)
    raise typer.Exit(int(any(finding.state == "faulty" for finding in findings)))


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
