"""``deepdisc-ops track``: what MLflow holds, brought from one store to another."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from deepdisc_ops.cli.console import AsJson, console, print_json, progress_bar, short

if TYPE_CHECKING:
    from deepdisc_ops.tracking import RunRecord

app = typer.Typer(no_args_is_help=True, help="Records in MLflow: what is there, and bringing them from store to store.")

Store = Annotated[str, typer.Argument(help="A sweep's folder, an .db file, or the URI of a store, such as http://127.0.0.1:5000.")]


@app.command("sync")
def track_sync(
    source: Annotated[str, typer.Argument(metavar="FROM", help="The store to copy from: a sweep's folder, an .db file or a URI.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="The store to copy to, made if it is not there.")],
) -> None:
    """Bring all runs, artifacts and registered members of one store into another; again brings only what is new.

    What somebody else changed in TO is kept and told, with exit code 1.

    Example: `deepdisc-ops track sync sweep sqlite:////project/mlflow/mlflow.db`
    """
    from deepdisc_ops import tracking

    with progress_bar("syncing", 1, "runs") as advance:
        uris = tracking.store_uri(source), tracking.store_uri(target)
        report = tracking.sync(*uris, progress=lambda done, total: advance(done, "", total))
    console.print(
        f"{uris[1]}: {report.created} runs created, {report.updated} updated, {report.unchanged} as they were; "
        f"{report.values} metric values, {report.artifacts} artifacts, {report.versions} registered members copied"
    )
    for conflict in report.conflicts:
        console.print(f"kept: {conflict}", markup=False, soft_wrap=True)
    if report.conflicts:
        raise typer.Exit(1)


@app.command("list")
def track_list(
    store: Store,
    model: Annotated[str | None, typer.Option(help="Show the registered members of this model instead.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the sweeps of a store, newest first, or the members of a registered model.

    Example: `deepdisc-ops track list sweep`
    """
    from deepdisc_ops import tracking

    tracker = tracking.Tracker(tracking.store_uri(store), create=False)
    if model is not None:
        members = tracker.registered(model)
        table = Table("version", "run", "aliases", title=f"members of {model} in {tracker.uri}")
        for one in members:
            table.add_row(str(one.version), one.run_id, " ".join(one.aliases))
        print_json(members) if as_json else console.print(table)
        return
    sweeps = [(run, _states(tracker.children(run.run_id))) for run in tracker.runs({tracking.KIND_TAG: "sweep"})]
    if as_json:
        print_json([{**asdict(run), "trials": states} for run, states in sweeps])
        return
    table = Table("run", "sweep", "status", "trials", "best", title=f"sweeps in {tracker.uri}")
    for run, states in sweeps:
        told = ", ".join(f"{count} {state}" for state, count in states.items())
        table.add_row(run.run_id[:8], run.name, run.status, f"{sum(states.values())}" + (f" ({told})" if told else ""), _best(run))
    console.print(table)


@app.command("register")
def track_register(
    store: Store,
    run: Annotated[str, typer.Argument(help="Id of a trial's run.")],
    name: Annotated[str, typer.Option(help="Name of the registered model.")] = "deepdisc",
    alias: Annotated[list[str] | None, typer.Option(help="Such as champion or member-0; may be repeated.")] = None,
) -> None:
    """Register the checkpoint of a run as a version of a model, and point aliases at it.

    Example: `deepdisc-ops track register sweep 3f9c0e... --name lsst --alias champion --alias member-0`
    """
    from deepdisc_ops import tracking

    member = tracking.Tracker(tracking.store_uri(store), create=False).register(name, run, alias or ())
    console.print(f"{member.name} version {member.version}: {' '.join(member.aliases) or 'no alias'}; {member.source}")


@app.command("ui")
def track_ui(store: Store, port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000) -> None:
    """Open MLflow's web interface of a store on this machine's own address; Ctrl-C ends it.

    Example: `deepdisc-ops track ui sweep --port 5001`
    """
    from deepdisc_ops import tracking

    uri = tracking.Tracker(tracking.store_uri(store), create=False).uri
    if not uri.startswith("sqlite:"):
        console.print(f"{uri} has its own interface: open it in a browser")
        return
    raise typer.Exit(subprocess.run([sys.executable, "-m", *tracking.ui_command(uri, port)], check=False).returncode)


def _states(children: list[RunRecord]) -> dict[str, int]:
    """How many trials there are of each state."""
    from deepdisc_ops.tracking import STATE_TAG

    states = [child.tags.get(STATE_TAG, "unknown") for child in children]
    return {state: states.count(state) for state in sorted(set(states))}


def _best(sweep: RunRecord) -> str:
    metric = sweep.tags.get("metric", "")
    return f"{metric} {short(sweep.metrics.get(f'best_{metric}'))}"
