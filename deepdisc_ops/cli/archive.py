"""``deepdisc-ops archive``: an ensemble in one .mar file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepdisc_ops.cli.console import console
from deepdisc_ops.errors import ConfigError

archive_app = typer.Typer(no_args_is_help=True, help="Model archives: an ensemble in one .mar file.")


@archive_app.command("build")
def archive_build(
    out: Annotated[Path, typer.Option(help="The archive to write, NAME.mar.")],
    checkpoints: Annotated[list[Path] | None, typer.Argument(help="Checkpoint folders (RUN/best), or one ensemble folder.")] = None,
    members: Annotated[Path | None, typer.Option(help="A selection written by `members select`.")] = None,
) -> None:
    """Pack members into one TorchServe archive.

    Example: `deepdisc-ops archive build --members members.yaml --out ensemble.mar`
    """
    from deepdisc_ops.serving import archive

    if bool(checkpoints) == bool(members):
        raise ConfigError("name either checkpoint folders or --members, one of the two")
    run_ids, weights = None, tuple[float, ...]()
    if members:
        from deepdisc_ops.sweeps import select

        selection = select.read_selection(members)
        checkpoints, run_ids = [m.checkpoint for m in selection], [m.run_id for m in selection]
        weights = tuple(m.weight for m in selection if m.weight is not None)
    archive.build_archive(checkpoints or [], out, run_ids, weights)
    description = archive.inspect_archive(out)
    console.print(f"{out}: {len(description['members'])} members, {out.stat().st_size / 1e6:.1f} MB")


@archive_app.command("inspect")
def archive_inspect(mar: Annotated[Path, typer.Argument(help="The archive.")]) -> None:
    """Print what an archive holds, after checking every member's checksum.

    Example: `deepdisc-ops archive inspect ensemble.mar`
    """
    from deepdisc_ops.serving import archive

    console.print_json(data=archive.verify_archive(mar), default=str)
