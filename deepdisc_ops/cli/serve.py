"""``deepdisc-ops serve``: the TorchServe endpoint of a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepdisc_ops.cli.console import console

serve_app = typer.Typer(no_args_is_help=True, help="The TorchServe endpoint.")

RunDir = Annotated[Path, typer.Option(help="The server's private folder, with its logs and its discovery file.")]


@serve_app.command("start")
def serve_start(
    mar: Annotated[Path, typer.Argument(help="The archive to serve.")],
    run_dir: RunDir = Path("server"),
    workers: Annotated[int, typer.Option(min=1, help="Worker processes, each with the whole ensemble.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads a worker.")] = None,
    wait: Annotated[float, typer.Option(min=1, help="Seconds to wait until the endpoint is ready.")] = 180.0,
    max_window: Annotated[int, typer.Option(min=128, help="Side in pixels of the largest window accepted.")] = 2048,
) -> None:
    """Serve an archive on a free loopback port; returns when a canary prediction has been answered.

    Example: `deepdisc-ops serve start ensemble.mar --run-dir server`
    """
    from deepdisc_ops.serving import server

    with console.status("starting TorchServe") as status:
        info = server.start(
            mar, run_dir, workers=workers, threads=threads, wait_s=wait, max_window=max_window, progress=status.update
        )
    console.print(f"{info.url} is ready; clients find it through {run_dir / 'server.json'}")


@serve_app.command("status")
def serve_status(run_dir: RunDir = Path("server")) -> None:
    """Tell whether the endpoint is ready; exit code 1 if it is not.

    Example: `deepdisc-ops serve status --run-dir server`
    """
    from deepdisc_ops.serving import server

    state = server.status(run_dir)
    console.print(f"{state.state}: {state.what}")
    raise typer.Exit(0 if state.state == "ready" else 1)


@serve_app.command("stop")
def serve_stop(run_dir: RunDir = Path("server")) -> None:
    """Stop the endpoint of a run directory, and nothing else.

    Example: `deepdisc-ops serve stop --run-dir server`
    """
    from deepdisc_ops.serving import server

    console.print("stopped" if server.stop(run_dir) else f"no endpoint runs in {run_dir}")
