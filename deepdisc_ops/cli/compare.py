"""``deepdisc-ops sweep compare``: trials side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from deepdisc_ops.cli.console import AsJson, console, print_json

if TYPE_CHECKING:
    from deepdisc_ops.sweeps.compare import Comparison


def compare(
    sweeps: Annotated[list[str], typer.Argument(help="Names of sweeps, or the ids of their parent runs.")],
    tracking_uri: Annotated[
        str, typer.Option(help="MLflow store, such as sqlite:///sweep/mlflow.db, a server, or a sweep's folder.")
    ],
    metric: Annotated[str | None, typer.Option(help="Metric that sorts the trials; that of the sweep without one.")] = None,
    by: Annotated[
        list[str] | None, typer.Option(help="Setting that tells lines of the figures apart, as data.balance; may be repeated.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the table with all columns to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table as shown to this file.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for the figures.")] = None,
    log: Annotated[bool, typer.Option("--log/--no-log", help="Store table and figures in the sweeps' own runs.")] = True,
    as_json: AsJson = False,
) -> None:
    """Compare the trials of sweeps: a table, and metrics against the sizes of the training set and of the network.

    Example: `deepdisc-ops sweep compare quick --tracking-uri sqlite:///sweep/mlflow.db --markdown quick.md --figures figures`
    """
    from deepdisc_ops.sweeps import compare as room
    from deepdisc_ops.tracking import Tracker, store_uri

    tracker = Tracker(store_uri(tracking_uri), create=False)
    found = room.compare(tracker, sweeps, metric)
    if as_json:
        print_json(room.full_table(found).to_dict("records"))
    else:
        console.print(_table(found))
    if csv is not None:
        room.write_csv(found, csv)
        console.print(f"all columns in {csv}")
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(room.markdown(found))
        console.print(f"Markdown in {markdown}")
    if figures is not None:
        paths = room.write_figures(found, figures, by or ())
        console.print(f"figures: {', '.join(map(str, paths))}" if paths else "no figures: the trials are all of one size")
    if log:
        folder = room.log_back(tracker, found, by or ())
        console.print(f"stored as {folder}/ with {', '.join(parent.name for parent in found.parents)} in {tracker.uri}")


def _table(found: Comparison) -> Table:
    from deepdisc_ops.sweeps import compare as room

    shown = room.short_table(found)
    names = ", ".join(dict.fromkeys(parent.name for parent in found.parents))
    caption = "metrics of the best checkpoint; 0.0365(11) is 0.0365 ± 0.0011, by bootstrap over objects"
    table = Table(title=f"{len(found.trials)} trials of {names}, best {found.metric} first", caption=caption)
    for column in shown.columns:
        table.add_column(column, overflow="fold", no_wrap=column in (name.removeprefix("val_") for name in room.SHOWN))
    for row in shown.itertuples(index=False):
        table.add_row(*row)
    return table
