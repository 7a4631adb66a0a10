"""``deepdisc-ops images``: the verbs that use an image."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from deepdisc_ops.cli.console import AsJson, console, print_json
from deepdisc_ops.cli.images import DryRun, Image, Program, images_app, the_runtime

if TYPE_CHECKING:
    from deepdisc_ops.hpc.containers.run import Place

__all__ = ["images_app"]

Binds = Annotated[
    list[str] | None,
    typer.Option("--bind", help="What is seen inside: SOURCE, SOURCE:INSIDE or SOURCE:INSIDE:ro; may be repeated."),
]
Folder = Annotated[Path, typer.Option(help="The working folder, seen inside under its own name.")]
Temporary = Annotated[Path | None, typer.Option(help="Folder seen as /tmp; without one a fresh one of this machine's.")]
Words = Annotated[list[str] | None, typer.Argument(help="After --, words for the program inside.")]
App = Annotated[str | None, typer.Option(help="A role: train, tune, serve or mlflow; else any verb.")]


@images_app.command("test")
def images_test(
    image: Image,
    roles: Annotated[list[str] | None, typer.Option("--app", help="A role; all four without one.")] = None,
    binds: Binds = None,
    folder: Folder = Path(),
    temporary: Temporary = None,
    program: Program = None,
) -> None:
    """Run the tests of an image's roles; exit code 1 if one fails.

    Example: `deepdisc-ops images test deepdisc-ops.sif`
    """
    from deepdisc_ops.hpc.containers import run

    failed = 0
    for one in run.try_roles(the_runtime(program), image, _place(folder, binds, temporary), roles or run.ROLES):
        failed += bool(one.answer.code)
        console.print(
            f"{one.role}: {'FAILED, ' + one.answer.fault if one.answer.code else 'well'} ({one.seconds:.0f} s)", soft_wrap=True
        )
    raise typer.Exit(1 if failed else 0)


@images_app.command("run")
def images_run(
    image: Image,
    words: Words = None,
    app: App = None,
    binds: Binds = None,
    folder: Folder = Path(),
    temporary: Temporary = None,
    program: Program = None,
    dry_run: DryRun = False,
) -> None:
    """Run a verb inside, or the app of a role; its exit code is ours.

    Example: `deepdisc-ops images run deepdisc-ops.sif --bind scenes --app train -- small --out run --set data.path=scenes`
    """
    from deepdisc_ops.hpc.containers import run

    runtime, place = the_runtime(program), _place(folder, binds, temporary)
    if dry_run:
        chosen = [*run.options(runtime, image, place), *(["--app", app] if app else [])]
        print(shlex.join(runtime.command(["run"], [*chosen, str(image), *(words or ())])))
        return
    raise typer.Exit(run.run(runtime, image, words or (), place, app=app))


@images_app.command("shell")
def images_shell(
    image: Image, binds: Binds = None, folder: Folder = Path(), temporary: Temporary = None, program: Program = None
) -> None:
    """Open a shell inside.

    Example: `deepdisc-ops images shell deepdisc-ops.sif`
    """
    from deepdisc_ops.hpc.containers import run

    raise typer.Exit(run.shell(the_runtime(program), image, _place(folder, binds, temporary)))


@images_app.command("words")
def images_words(image: Image, binds: Binds = None, folder: Folder = Path(), program: Program = None) -> None:
    """Print what runs a job's commands inside, for `slurm render --set environment.container=...`.

    Example: `deepdisc-ops slurm render --set environment.container="$(deepdisc-ops images words deepdisc-ops.sif)" -- train small`
    """
    from deepdisc_ops.hpc.containers import run

    print(json.dumps(run.job_words(the_runtime(program), image, _place(folder, binds, None))))


@images_app.command("start")
def images_start(
    image: Image,
    name: Annotated[str, typer.Argument(help="The instance's name.")],
    words: Words = None,
    app: App = None,
    binds: Binds = None,
    folder: Folder = Path(),
    temporary: Temporary = None,
    program: Program = None,
) -> None:
    """Start a service as an instance: --app serve or mlflow; without one, a machine to enter.

    Example: `deepdisc-ops images start deepdisc-ops.sif sky --app serve -- ensemble.mar --run-dir server`
    """
    from deepdisc_ops.hpc.containers import instances

    started = instances.start(the_runtime(program), image, name, words or (), _place(folder, binds, temporary), app=app)
    console.print(f"{started.name} runs, process {started.pid}; its words are in {started.err}", soft_wrap=True)


@images_app.command("stop")
def images_stop(
    name: Annotated[str, typer.Argument(help="The instance's name.")],
    timeout: Annotated[int, typer.Option(min=1, help="Seconds its service has to end.")] = 60,
    program: Program = None,
) -> None:
    """Stop one instance by its name, and nothing else.

    Example: `deepdisc-ops images stop sky`
    """
    from deepdisc_ops.hpc.containers import instances

    console.print(
        f"{name} stopped" if instances.stop(the_runtime(program), name, timeout_s=timeout) else f"no instance {name} runs"
    )


@images_app.command("list")
def images_list(program: Program = None, as_json: AsJson = False) -> None:
    """Show the instances that run here.

    Example: `deepdisc-ops images list`
    """
    from deepdisc_ops.hpc.containers import instances

    running = instances.running(the_runtime(program))
    if as_json:
        print_json(running)
        return
    table = Table("instance", "process", "image")
    for one in running:
        table.add_row(one.name, str(one.pid), one.image)
    console.print(table)


def _place(folder: Path, binds: list[str] | None, temporary: Path | None) -> Place:
    from deepdisc_ops.hpc.containers.run import Place

    return Place(folder.absolute(), tuple(binds or ()), temporary)
