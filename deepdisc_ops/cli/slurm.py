"""``deepdisc-ops slurm``: job scripts for a cluster, and their submission."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepdisc_ops.cli.console import console

app = typer.Typer(no_args_is_help=True, help="Job scripts for SLURM.")


@app.command("render")
def slurm_render(
    command: Annotated[
        list[str] | None, typer.Argument(help="After --, the words after deepdisc-ops that the job runs; else those of the job.")
    ] = None,
    job: Annotated[str | None, typer.Option(help="A job's YAML file, or one that comes along: node, nodes, array, ddp.")] = None,
    site: Annotated[str | None, typer.Option(help="A site's YAML file, or one that comes along: delta, perlmutter.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the script; without one it is printed.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override the job, as in nodes=2; may be repeated.")] = None,
    site_overrides: Annotated[
        list[str] | None, typer.Option("--site-set", help="Override the site, as in qos=preempt; may be repeated.")
    ] = None,
) -> None:
    """Write the script of a job.

    Example: `deepdisc-ops slurm render --job nodes --site delta --set account=ACCOUNT --out sweep.sbatch`
    """
    from deepdisc_ops.hpc import jobs, slurm

    loaded = jobs.load_job(Path(job) if job else None, tuple(overrides or ()), tuple(command or ()))
    profile = jobs.load_site(site, tuple(site_overrides or ()))
    script = slurm.render(loaded, profile)
    if out is None:
        print(script, end="")
        return
    out.write_text(script)
    console.print(
        f"{out}: kind {loaded.kind}, {loaded.nodes} nodes, {loaded.time}; submit it with `deepdisc-ops slurm submit {out}`"
    )
    if not profile.tried:
        console.print(f"the profile of {profile.name} is untried by us; `slurm submit` asks sbatch to check the job first")


@app.command("submit")
def slurm_submit(script: Annotated[Path, typer.Argument(help="A script made by `slurm render`.")]) -> None:
    """Submit a script, after sbatch has checked it; prints the job's number.

    Example: `deepdisc-ops slurm submit sweep.sbatch`
    """
    from deepdisc_ops.hpc import slurm

    print(slurm.submit(script))
