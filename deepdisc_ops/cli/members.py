"""``deepdisc-ops members``: which networks make an ensemble, and the thresholds of one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from deepdisc_ops.cli.console import AsJson, console, print_json, progress_bar, short
from deepdisc_ops.errors import ConfigError

if TYPE_CHECKING:
    from deepdisc_ops.inference.tuning import Trial, Tuning
    from deepdisc_ops.sweeps.greedy import GreedyChoice
    from deepdisc_ops.sweeps.select import Conditions, SelectedMember

members_app = typer.Typer(no_args_is_help=True, help="Ensemble members: their choice, their thresholds.")


@members_app.command("select")
def members_select(
    sweep: Annotated[str, typer.Argument(help="Name of the sweep, or the id of its parent run.")],
    tracking_uri: Annotated[str, typer.Option(help="MLflow store: sqlite:///sweep/mlflow.db, a server, or a sweep's folder.")],
    out: Annotated[Path, typer.Option(help="YAML file for the selection.")] = Path("members.yaml"),
    k: Annotated[int, typer.Option("-k", min=1, help="Members to choose.")] = 2,
    metric: Annotated[str, typer.Option(help="Metric that ranks the trials.")] = "val_nll",
    min_completeness: Annotated[float, typer.Option(min=0, max=1, help="Least completeness of gold galaxies.")] = 0.0,
    max_per_backbone: Annotated[int | None, typer.Option(min=1, help="At most so many members of one backbone.")] = None,
    one_per_fold: Annotated[
        bool, typer.Option("--one-per-fold", help="Each member of another partition of the data set (data.partition).")
    ] = False,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Add members one by one while the combined density of unseen objects gains; k at most.")
    ] = False,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Greedy: look at the best so many by the metric; 4 k without.")
    ] = None,
    replacement: Annotated[bool, typer.Option("--replacement", help="Greedy: a member may count several times.")] = False,
    weights: Annotated[str | None, typer.Option(help="Greedy: likelihood (default), log_likelihood or uniform.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Greedy: the data set, where it is not at the path it was trained from.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Greedy: a split that no member has seen; calibration without.")] = None,
    device: Annotated[str | None, typer.Option(help="Greedy: torch device, such as cuda:0; cpu without.")] = None,
    register: Annotated[
        str | None, typer.Option(help="Register the members as this model in MLflow, aliases champion and member-0, member-1 ...")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose trials of a sweep as ensemble members: the best, or with --greedy those that are worth most together.

    Example: `deepdisc-ops members select quick --tracking-uri sqlite:///sweep/mlflow.db -k 2 --out members.yaml`
    """
    from deepdisc_ops.sweeps import select
    from deepdisc_ops.tracking import Tracker, store_uri

    uri, into = store_uri(tracking_uri), out.parent / "members"
    of_greedy = {"candidates": candidates, "weights": weights, "data": data, "split": split, "device": device}
    given = {name: value for name, value in of_greedy.items() if value is not None} | ({"replacement": True} if replacement else {})
    choice = None
    if greedy:
        conditions = select.Conditions(metric, min_completeness, max_per_backbone, one_per_fold)
        choice = _select_greedily(uri, sweep, k, conditions, given, into)
        chosen = list(choice.members)
    elif given:
        raise ConfigError(f"--{', --'.join(given)} belong to greedy selection; add --greedy or leave them out")
    else:
        chosen = select.select_members(
            uri,
            sweep,
            k,
            into=into,
            metric=metric,
            min_completeness=min_completeness,
            max_per_backbone=max_per_backbone,
            one_per_fold=one_per_fold,
        )
    select.write_selection(chosen, out)
    if as_json:
        added = {"additions": choice.additions, "alone": choice.alone, "objects": choice.objects} if choice else {}
        print_json({"members": [_as_row(member) for member in chosen], **added})
    else:
        if choice:
            _tell_choice(choice, k)
        console.print(_table(chosen, list(dict.fromkeys((metric, "val_nll", "val_sigma_iqr", "val_completeness"))), str(out)))
    if register:
        tracker = Tracker(uri)
        for number, member in enumerate(chosen):
            tracker.register(register, member.run_id, [f"member-{number}", *(["champion"] if number == 0 else [])])
        console.print(f"registered as {register}, member-0 to member-{len(chosen) - 1}; champion is member-0")


@members_app.command("gather")
def members_gather(
    checkpoints: Annotated[list[Path], typer.Argument(help="Checkpoint folders (RUN/best).")],
    out: Annotated[Path, typer.Option(help="The ensemble folder to write.")],
    half: Annotated[bool, typer.Option("--half", help="Store weights in 16 bits: half the size.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="How members are combined, as in match=majority; may be repeated.")
    ] = None,
) -> None:
    """Gather checkpoints into an ensemble folder, which `predict` and `archive build` take.

    Example: `deepdisc-ops members gather runs/1/best runs/2/best --out ensemble --half --set match=union`
    """
    from deepdisc_ops.config import EnsembleSettings, load
    from deepdisc_ops.inference.ensemble import write_ensemble

    settings: EnsembleSettings = load(None, overrides or (), EnsembleSettings)
    write_ensemble(out, checkpoints, half=half, settings=settings)
    console.print(f"{out}: {len(checkpoints)} members, {sum(f.stat().st_size for f in out.iterdir()) / 1e6:.1f} MB")


@members_app.command("tune")
def members_tune(
    member: Annotated[Path, typer.Argument(help="A checkpoint folder (RUN/best); its member.yaml takes the choice.")],
    data: Annotated[Path, typer.Option(help="Data set to tune on, of images that the member was not trained on.")],
    split: Annotated[str, typer.Option(help="Split of the data set, such as validation or calibration.")] = "validation",
    min_completeness: Annotated[float, typer.Option(min=0, max=1, help="Least completeness of gold galaxies.")] = 0.0,
    min_purity: Annotated[float, typer.Option(min=0, max=1, help="Least purity of all detections.")] = 0.0,
    max_overlap: Annotated[float, typer.Option(min=0, max=1, help="Largest overlap that may be chosen.")] = 1.0,
    device: Annotated[str, typer.Option(help="torch device, such as cpu or cuda:0.")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell the best thresholds and leave the member as it is.")] = False,
    as_json: AsJson = False,
) -> None:
    """Choose the score and overlap thresholds of a member that find the most gold galaxies with the fewest false ones.

    Example: `deepdisc-ops members tune runs/1/best --data scenes --split calibration`
    """
    from deepdisc_ops.inference.tuning import store, tune_thresholds

    with progress_bar("tuning", 1, "images") as advance:
        tuning = tune_thresholds(
            member,
            data,
            split,
            min_completeness=min_completeness,
            min_purity=min_purity,
            max_overlap=max_overlap,
            device=device,
            progress=lambda done, total: advance(done, "", total),
        )
    if as_json:
        print_json(tuning)
    else:
        console.print(_trials(tuning))
        console.print(f"before: {_told(tuning.before)}")
        console.print(f"best:   {_told(tuning.best)}")
    if not dry_run:
        store(member, tuning.best)
        console.print(f"{member} has them from now on; weigh and pack ensembles of it again")


@members_app.command("calibrate")
def members_calibrate(
    ensemble: Annotated[Path, typer.Argument(help="An ensemble folder; its ensemble.yaml takes the calibration.")],
    data: Annotated[Path, typer.Option(help="Data set of images that no member was trained or chosen on.")],
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "calibration",
    device: Annotated[str, typer.Option(help="torch device, such as cpu or cuda:0.")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what it gives and leave the ensemble as it is.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take the calibration out again.")] = False,
) -> None:
    """Learn how an ensemble's redshift densities are off, and correct them from now on; `--set calibrated=false` leaves that out.

    Example: `deepdisc-ops members calibrate ensemble --data scenes --split calibration`
    """
    from deepdisc_ops.inference.calibrating import learn_calibration, store_calibration

    if undo:
        store_calibration(ensemble, None)
        console.print(f"{ensemble} is not calibrated any more")
        return
    with progress_bar("calibrating", 1, "images") as advance:
        learned = learn_calibration(ensemble, data, split, device=device, progress=lambda done, total: advance(done, "", total))
    found = learned.calibration
    console.print(
        f"{found.objects} gold galaxies: shift {found.shift[0]:+.4f} (1 + z), widths times {math.exp(found.log_width[0]):.3f}, "
        f"weights to the power of {math.exp(-found.log_temperature[0]):.3f}; NLL {found.nll_before:.4f} -> {found.nll_after:.4f}"
    )
    halves = ", ".join(f"{before:.4f} -> {after:.4f}" for before, after in learned.ks)
    console.print(f"PIT KS of either half of the images, calibrated on the other: {halves}")
    if not dry_run:
        store_calibration(ensemble, found)
        console.print(f"{ensemble} is calibrated from now on; archives of it are to be built again")


def _select_greedily(uri: str, sweep: str, k: int, conditions: Conditions, given: Mapping[str, Any], into: Path) -> GreedyChoice:
    from deepdisc_ops.sweeps.greedy import Greedy, select_greedily

    with progress_bar("judging candidates", 1, "images") as advance:
        return select_greedily(
            uri, sweep, k, conditions, Greedy(**given), into=into, progress=lambda done, total, run: advance(done, run, total)
        )


def _as_row(member: SelectedMember) -> dict[str, Any]:
    data = {"partition": member.config.data.partition, "fraction": member.config.data.fraction}
    told = {"run_id": member.run_id, "checkpoint": member.checkpoint, "backbone": member.config.model.backbone.name}
    return told | data | {"weight": member.weight, "metrics": member.metrics}


def _table(chosen: Sequence[SelectedMember], columns: Sequence[str], where: str) -> Table:
    table = Table("run", "backbone", "fold", "fraction", *columns, title=f"{len(chosen)} members in {where}")
    for member in chosen:
        row = _as_row(member)
        figures = [short(member.metrics.get(key)) for key in columns]
        table.add_row(member.run_id[:8], row["backbone"], short(row["partition"]), short(row["fraction"]), *figures)
    return table


def _tell_choice(choice: GreedyChoice, k: int) -> None:
    """Tell how a greedy selection went: a row for each addition."""
    title = f"additions from {choice.candidates} candidates, NLL of {choice.objects} gold objects"
    table = Table("run", "backbone", "alone", "combined", "weight", title=title)
    for number, nll in zip(choice.additions.order, choice.additions.nll, strict=True):
        member = choice.members[number]
        row = (member.run_id[:8], member.config.model.backbone.name, f"{choice.alone[number]:.4f}", f"{nll:.4f}")
        table.add_row(*row, short(member.weight))
    console.print(table)
    if len(choice.members) < k:
        console.print(f"{len(choice.members)} members are best: none of the other candidates improves them")


def _trials(tuning: Tuning) -> Table:
    """All trials, a row a score threshold, a column an overlap."""
    overlaps = sorted({trial.nms_threshold for trial in tuning.trials})
    title = f"F1 (completeness of {tuning.gold} gold galaxies / purity), by score and overlap"
    table = Table("score", *(f"overlap {overlap:g}" for overlap in overlaps), title=title)
    for score in sorted({trial.score_threshold for trial in tuning.trials}):
        row = {trial.nms_threshold: trial for trial in tuning.trials if trial.score_threshold == score}
        cells = (f"{row[o].f1:.3f} ({row[o].completeness:.3f}/{row[o].purity:.3f})" for o in overlaps)
        table.add_row(f"{score:g}", *cells)
    return table


def _told(trial: Trial) -> str:
    return (
        f"score {trial.score_threshold:g}, overlap {trial.nms_threshold:g}: F1 {trial.f1:.3f}, "
        f"completeness {trial.completeness:.3f}, purity {trial.purity:.3f}"
    )
