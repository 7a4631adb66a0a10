"""``deepdisc-ops evaluate``: a catalogue against truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deepdisc_ops.cli.console import console


def evaluate(
    catalog: Annotated[Path, typer.Argument(help="Catalogue made by `predict`.")],
    truth: Annotated[Path, typer.Option(help="Simulated mosaic (its TRUTH table and pixels), or a truth catalogue.")],
    out: Annotated[Path, typer.Option(help="Folder for index.html, metrics.json and figures.")] = Path("evaluation"),
    gold_band: Annotated[str, typer.Option(help="Band of the gold cut.")] = "i",
    gold_limit: Annotated[float, typer.Option(help="Faint limit of the gold sample, AB mag.")] = 25.3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    figure_format: Annotated[
        list[str] | None, typer.Option("--format", help="Of the figures besides png: svg or pdf; may be repeated.")
    ] = None,
    page_objects: Annotated[int, typer.Option(min=0, help="Objects of the page, worst outliers first.")] = 10_000,
) -> None:
    """Compare a catalogue with truth: completeness, purity, redshift metrics with errors, figures, a page of objects.

    Example: `deepdisc-ops evaluate catalog.parquet --truth mosaic.fits --out evaluation`
    """
    from deepdisc_ops import report

    formats = tuple(dict.fromkeys(("png", *(figure_format or ()))))
    result = report.evaluate_files(
        catalog, truth, out, gold_band=gold_band, gold_limit=gold_limit, seed=seed, formats=formats, page_objects=page_objects
    )
    table = Table("figure", "value", title=f"{catalog} against {truth}")
    for name, value in report.rows(result):
        table.add_row(name, value)
    console.print(table)
    console.print(f"index.html, metrics.json and figures in {out}")
