"""``deepdisc-ops serve``: the TorchServe endpoint of a run directory."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deepdisc_ops.cli.console import AsJson, console, print_json

serve_app = typer.Typer(no_args_is_help=True, help="The TorchServe endpoint.")

RunDir = Annotated[Path, typer.Option(help="The server's private folder, with its logs and its discovery file.")]


class Memory(StrEnum):
    """Whether the members of an ensemble stay in a worker's memory."""

    keep = "keep"
    swap = "swap"


@serve_app.command("start")
def serve_start(
    mar: Annotated[Path, typer.Argument(help="The archive to serve.")],
    run_dir: RunDir = Path("server"),
    workers: Annotated[int, typer.Option(min=1, help="Worker processes, each with the whole ensemble.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads a worker.")] = None,
    wait: Annotated[float, typer.Option(min=1, help="Seconds to wait until the endpoint is ready.")] = 180.0,
    max_window: Annotated[int, typer.Option(min=128, help="Side in pixels of the largest window accepted.")] = 2048,
    foreground: Annotated[bool, typer.Option("--foreground", help="Serve in this process, for SLURM and containers.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Start the server anew when it dies.")] = False,
    host: Annotated[str, typer.Option(help="Address for clients; one that others can reach needs a certificate.")] = "127.0.0.1",
    certificate: Annotated[Path | None, typer.Option(help="PEM certificate, which clients trust.")] = None,
    private_key: Annotated[Path | None, typer.Option(help="Its RSA key, PEM in PKCS #8.")] = None,
    root: Annotated[list[Path] | None, typer.Option(help="Folder below which requests may name files; repeatable.")] = None,
    memory: Annotated[Memory, typer.Option(help="Keep the members in memory, or read one after the other.")] = Memory.keep,
    dust_map: Annotated[str | None, typer.Option(help="Map of the server's E(B-V), or mag; default the archive's.")] = None,
    dust_maps: Annotated[Path | None, typer.Option(help="Folder of the dust maps.")] = None,
    dust_scale: Annotated[float, typer.Option(help="Factor on the dust map; 0.86 turns SFD into SF11.")] = 1.0,
    token_minutes: Annotated[float, typer.Option(help="Life of a token; it is renewed after two thirds of it.")] = 1440.0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that requests in flight are waited for at the end.")] = 60.0,
    response_timeout: Annotated[int, typer.Option(min=1, help="Seconds for one request; then its worker is replaced.")] = 1800,
) -> None:
    """Serve an archive on a free port; returns when every worker has answered a canary, or with the server's own exit code.

    Example: `deepdisc-ops serve start ensemble.mar --run-dir server`
    """
    from deepdisc_ops.serving import server

    settings = {
        "workers": workers,
        "threads": threads,
        "wait_s": wait,
        "max_window": max_window,
        "host": host,
        "certificate": certificate,
        "private_key": private_key,
        "roots": tuple(root or ()),
        "memory": memory.value,
        "dust_map": dust_map,
        "dust_folder": dust_maps,
        "dust_scale": dust_scale,
        "token_minutes": token_minutes,
        "drain_s": drain,
        "restart": restart,
        "response_timeout_s": response_timeout,
    }
    if foreground:
        raise typer.Exit(server.run_foreground(mar, run_dir, progress=console.print, **settings))
    with console.status("starting TorchServe") as status:
        info = server.start(mar, run_dir, progress=status.update, **settings)
    console.print(f"{info.url} is ready; clients find it through {run_dir / server.DISCOVERY}")


@serve_app.command("status")
def serve_status(
    run_dir: RunDir = Path("server"),
    health: Annotated[bool, typer.Option("--health", help="Ask whether it lives, not whether it can predict.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell whether the endpoint is ready; exit code 1 if it is not.

    Ready: every worker can predict and clients can find it. Healthy: it lives and answers, or is being started; while it is,
    there is nothing to repair.

    Example: `deepdisc-ops serve status --run-dir server`
    """
    from deepdisc_ops.serving import server

    state = server.status(run_dir)
    if as_json:
        print_json(state.public())
    else:
        console.print(f"{state.state}: {state.what}")
        if state.workers:
            table = Table("worker", "process", "state", "MB")
            for worker in state.workers:
                table.add_row(worker.number, str(worker.pid), worker.state, f"{worker.memory_bytes / 1e6:.0f}")
            console.print(table)
    raise typer.Exit(0 if (state.healthy if health else state.state == "ready") else 1)


@serve_app.command("stop")
def serve_stop(run_dir: RunDir = Path("server")) -> None:
    """Stop the endpoint of a run directory, and nothing else, when what it has accepted is answered.

    Example: `deepdisc-ops serve stop --run-dir server`
    """
    from deepdisc_ops.serving import server

    console.print("stopped" if server.stop(run_dir) else f"no endpoint runs in {run_dir}")


@serve_app.command("logs")
def serve_logs(
    run_dir: RunDir = Path("server"),
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    request: Annotated[str | None, typer.Option(help="One request alone, by its id.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Latest entries to begin with.")] = 100,
) -> None:
    """Show the logs of supervisor, server and workers in order of time.

    Example: `deepdisc-ops serve logs --run-dir server --request 7f3a`
    """
    from deepdisc_ops.serving import logs

    found = logs.entries(run_dir)
    for entry in logs.of_request(found, request) if request else found[max(0, len(found) - lines) :]:
        typer.echo(f"{entry.file}: {entry.text}")
    if follow:
        for entry in logs.follow(run_dir):
            if not request or logs.of_request([entry], request):
                typer.echo(f"{entry.file}: {entry.text}")


@serve_app.command("upgrade")
def serve_upgrade(
    mar: Annotated[Path, typer.Argument(help="The archive to serve from now on.")], run_dir: RunDir = Path("server")
) -> None:
    """Put another archive into service without losing a request; if it cannot be served, the present one goes on.

    Both run for a moment: there must be memory for two. What was accepted is answered by the archive that accepted it.

    Example: `deepdisc-ops serve upgrade better.mar --run-dir server`
    """
    from deepdisc_ops.serving import server

    with console.status("starting the new archive beside the present one"):
        what = server.upgrade(run_dir, mar)
    console.print(what)


@serve_app.command("rollback")
def serve_rollback(run_dir: RunDir = Path("server")) -> None:
    """Go back to the archive that was served before, in the same way.

    Example: `deepdisc-ops serve rollback --run-dir server`
    """
    from deepdisc_ops.serving import server

    with console.status("starting the former archive beside the present one"):
        what = server.rollback(run_dir)
    console.print(what)


@serve_app.command("renew")
def serve_renew(run_dir: RunDir = Path("server")) -> None:
    """Make the present tokens worthless, as when one has leaked; clients that follow the discovery file notice nothing.

    Example: `deepdisc-ops serve renew --run-dir server`
    """
    from deepdisc_ops.serving import server

    console.print(server.renew_tokens(run_dir))
