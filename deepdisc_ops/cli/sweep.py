"""``deepdisc-ops sweep``: trials over ranges of settings, and what came of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from deepdisc_ops.cli.console import AsJson, console, print_json, progress_bar, short

if TYPE_CHECKING:
    from deepdisc_ops.sweeps.record import TrialProgress
    from deepdisc_ops.sweeps.space import SweepSpec

sweep_app = typer.Typer(no_args_is_help=True, help="Ray Tune sweeps, tracked in MLflow.")

METRICS = ("val_nll", "val_sigma_iqr", "val_outliers", "val_completeness")
ROWS = 24
"""Trials of the live table: those that run, then the best of the others."""


@sweep_app.command("run")
def sweep_run(
    spec: Annotated[Path, typer.Argument(help="Sweep specification, such as tune/quick.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder of the sweep; an unfinished one there goes on.")] = Path("sweep"),
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow store; default sqlite in OUT.")] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster, HOST:PORT or auto; default: Ray on this machine alone.", envvar="RAY_ADDRESS")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print trials and cost, start nothing.")] = False,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override KEY=VALUE; may be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a Ray Tune sweep; every trial becomes a child run in MLflow. Told to stop, or killed, the same command goes on.

    Example: `deepdisc-ops sweep run tune/quick.yaml --out sweep --set base.data.path=scenes`
    """
    from deepdisc_ops.sweeps import space

    loaded = space.load_spec(spec, overrides or ())
    if dry_run:
        planned = plan(loaded)
        print_json(planned) if as_json else console.print(plan_table(loaded, planned))
        return
    from deepdisc_ops.sweeps import run

    with _shown(loaded, space.number_of_trials(loaded)) as progress:
        result = run.run_sweep(loaded, out, tracking_uri=tracking_uri, ray_address=ray_address, progress=progress)
    if as_json:
        print_json(asdict(result))
        return
    table = Table(title=f"sweep {result.name}: MLflow run {result.parent_run_id} in {result.tracking_uri}")
    for column in ("trial", "state", "step", "values", *METRICS):
        table.add_column(column)
    for trial in sorted(result.trials, key=lambda one: one.best.get("val_nll", float("inf"))):
        figures = [short(trial.best.get(key)) for key in METRICS]
        table.add_row(trial.trial_id, trial.state, str(trial.step), shown_values(trial.values), *figures)
    console.print(table)
    for trial in result.trials:
        if trial.error:
            console.print(f"{trial.trial_id} failed: {trial.error}", style="yellow")


@dataclass(frozen=True)
class Planned:
    """What the trials of one backbone would cost: most and expected steps, operations of backbone and pyramid in PFLOP."""

    backbone: str
    trials: int
    parameters: int
    most_steps: int
    steps: float
    petaflop: float


def plan(spec: SweepSpec) -> list[Planned]:
    """What a sweep would cost, by backbone where the grid names several."""
    from deepdisc_ops.model.table import cost
    from deepdisc_ops.sweeps import space

    points = space.points(spec) if spec.search == "random" else [{}] * space.number_of_trials(spec)
    groups: dict[str, list[Any]] = {}
    for point in points:
        config = space.trial_config(spec.base, point or _first_values(spec))
        groups.setdefault(config.model.backbone.name, []).append(config)
    planned = []
    for name, configs in groups.items():
        model = configs[0].model
        needs = cost(model.backbone, len(model.bands), configs[0].data.crop)
        most = sum(config.train.steps for config in configs)
        steps = most * space.expected_share(spec, len(points))
        # forward and backward together cost three times the forward pass
        petaflop = 3e-6 * needs.gflop * steps * sum(config.train.batch_size for config in configs) / len(configs)
        planned.append(Planned(name, len(configs), needs.parameters, most, steps, petaflop))
    return planned


def plan_table(spec: SweepSpec, planned: Sequence[Planned]) -> Table:
    """The plan of a sweep for people."""
    from deepdisc_ops.sweeps import space

    total = space.number_of_trials(spec)
    at_once = f"{spec.concurrency} at once" if spec.concurrency else "as many at once as the nodes hold"
    title = (
        f"sweep {spec.name}: {total} trials, {spec.resources.cpus:g} CPUs and {spec.resources.gpus:g} GPUs each, {at_once}; "
        f"{spec.scheduler.name}, {spec.metric} ({spec.direction})"
    )
    table = Table(title=title)
    for column in ("backbone", "trials", "parameters / M", "steps at most", "steps expected", "PFLOP expected"):
        table.add_column(column, justify="left" if column == "backbone" else "right")
    for one in planned:
        figures = (f"{one.parameters / 1e6:.1f}", f"{one.most_steps:,}", f"{one.steps:,.0f}", f"{one.petaflop:,.3g}")
        table.add_row(one.backbone, str(one.trials), *figures)
    steps, petaflop = sum(one.steps for one in planned), sum(one.petaflop for one in planned)
    table.caption = (
        f"{steps:,.0f} steps and {petaflop:,.3g} PFLOP of the backbones are expected in all; "
        "heads add about as much. A trial's seconds a step times the steps, over the trials at once, is the wall time."
    )
    return table


def shown_values(values: Mapping[str, Any]) -> str:
    """Drawn values in few words: the last part of each key, the one before it for a name."""
    from deepdisc_ops.sweeps.ranges import parts

    shown = []
    for key, value in values.items():
        names = parts(key)
        for name, one in zip(names, value if len(names) > 1 else [value], strict=True):
            last = name.rsplit(".", 2)[-2] if name.endswith(".name") else name.rsplit(".", 1)[-1]
            shown.append(f"{last} {short(one)}")
    return ", ".join(shown)


def _first_values(spec: SweepSpec) -> dict[str, Any]:
    return {key: axis.extremes[0] for key, axis in spec.space.items() if not axis.when}


@contextmanager
def _shown(spec: SweepSpec, total: int) -> Iterator[Callable[[TrialProgress], None]]:
    """News as a table that stays in its place on a terminal, and as lines in a log."""
    latest: dict[str, TrialProgress] = {}

    if console.is_terminal:
        with Live(console=console, refresh_per_second=2) as live:

            def renew(news: TrialProgress) -> None:
                latest[news.trial_id] = news
                live.update(_live_table(spec, total, latest))

            yield renew
        return
    with progress_bar(f"sweep of {total} trials", total, "trials") as advance:

        def tell(news: TrialProgress) -> None:
            latest[news.trial_id] = news
            ended = sum(one.state != "running" for one in latest.values())
            metric = news.metrics.get(spec.metric)
            figure = "" if metric is None else f", {spec.metric} {metric:.3f}"
            advance(ended, f"{news.trial_id} {news.state} at step {news.step} of {news.steps}{figure}", tell=True)

        yield tell


def _live_table(spec: SweepSpec, total: int, latest: Mapping[str, TrialProgress]) -> Table:
    sign = 1 if spec.direction == "min" else -1
    running = [one for one in latest.values() if one.state == "running"]
    ended = sorted(
        (one for one in latest.values() if one.state != "running"),
        key=lambda one: sign * one.metrics.get(spec.metric, sign * float("inf")),
    )
    table = Table(title=f"sweep {spec.name}: {len(ended)} of {total} trials ended, {len(running)} run")
    for column in ("trial", "state", "step", "values", *METRICS):
        table.add_column(column)
    for one in [*running, *ended][:ROWS]:
        figures = [short(one.metrics.get(key)) for key in METRICS]
        table.add_row(one.trial_id, one.state, f"{one.step}/{one.steps}", shown_values(one.values), *figures)
    return table
