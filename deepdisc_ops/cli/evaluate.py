"""``deepdisc-ops evaluate``: a catalogue against truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deepdisc_ops.cli.console import AsJson, console, print_json


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
    against: Annotated[
        list[Path] | None, typer.Option(help="Another catalogue of the field, such as one member's; may be repeated.")
    ] = None,
    track: Annotated[
        str | None, typer.Option(help="Log figures and page to this tracking store: a folder, an .db file, a URI.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a catalogue with truth: completeness, purity, redshift metrics with errors, figures, a page of objects.

    With --against, catalogues stand side by side on the galaxies that all of them found; the last column is the mean and
    scatter over those held against the first.

    Example: `deepdisc-ops evaluate catalog.parquet --truth mosaic.fits --out evaluation`
    """
    from deepdisc_ops import report

    formats = tuple(dict.fromkeys(("png", *(figure_format or ()))))
    result = report.evaluate_files(
        catalog, truth, out, gold_band=gold_band, gold_limit=gold_limit, seed=seed, formats=formats, page_objects=page_objects
    )
    comparison = None
    if against:
        paths = [catalog, *against]
        comparison = report.compare_files(paths, truth, out, gold_band=gold_band, gold_limit=gold_limit, seed=seed, formats=formats)
    run = None if track is None else _log(track, catalog, truth, out, f"{gold_band} < {gold_limit:g}", report.tracked(result))
    if as_json:
        print_json(result.as_dict() | {"against": comparison and comparison.as_dict(), "run": run})
        return
    table = Table("figure", "value", title=f"{catalog} against {truth}")
    for name, value in report.rows(result):
        table.add_row(name, value)
    console.print(table)
    if comparison:
        spread = [] if comparison.scatter is None else ["mean ± scatter of the others"]
        beside = Table(
            "figure", *(one.name for one in comparison.catalogs), *spread, title=f"{comparison.common} galaxies all found"
        )
        for row in report.comparison_rows(comparison):
            beside.add_row(*row)
        console.print(beside)
    console.print(f"{out / 'index.html'}, metrics.json and figures beside it")
    if run:
        console.print(f"logged as run {run} in {track}")


def _log(store: str, catalog: Path, truth: Path, out: Path, cut: str, figures: dict[str, float]) -> str:
    """Write an evaluation to a tracking store; the same catalogue against the same truth and cut is one run. Gives its id."""
    import hashlib

    from deepdisc_ops import tracking

    digests = []
    for path in (catalog, truth):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest()[:16])
    tracker = tracking.Tracker(tracking.store_uri(store))
    name = f"{catalog.stem} against {truth.stem}"
    run = tracker.find_or_create(
        name, ("deepdisc_ops.evaluation", "/".join([*digests, cut])), tags={tracking.KIND_TAG: "evaluation"}
    )
    tracker.log_params(run, {"catalog": catalog.name, "truth": truth.name, "gold": cut})
    tracker.log_summary(run, 0, figures)
    tracker.log_artifact(run, out, "evaluation")
    tracker.end(run)
    return run
