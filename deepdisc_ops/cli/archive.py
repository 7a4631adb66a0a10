"""``deepdisc-ops archive``: an ensemble in one .mar file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from deepdisc_ops.cli.console import AsJson, console, print_json
from deepdisc_ops.errors import ConfigError

archive_app = typer.Typer(no_args_is_help=True, help="Model archives: an ensemble in one .mar file.")

Mar = Annotated[Path, typer.Argument(help="The archive.")]
MaxWindow = Annotated[int, typer.Option("--window", min=64, help="Side of the largest window that a worker is asked about, px.")]


@archive_app.command("build")
def archive_build(
    out: Annotated[Path, typer.Option(help="The archive to write, NAME.mar.")],
    checkpoints: Annotated[list[Path] | None, typer.Argument(help="Checkpoint folders (RUN/best), or one ensemble folder.")] = None,
    members: Annotated[Path | None, typer.Option(help="A selection written by `members select`.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Store weights in 16 bits: half the size; prints what it changes.")] = False,
    on_failure: Annotated[
        Literal["raise", "skip"] | None, typer.Option(help="When a member fails: refuse to answer, or go on without it.")
    ] = None,
    dust: Annotated[str | None, typer.Option(help="E(B-V) that the members were trained with: a map's name, or mag.")] = None,
    dust_scale: Annotated[float, typer.Option(min=1e-3, help="What its values were multiplied by.")] = 1.0,
) -> None:
    """Pack members into one TorchServe archive, with a canary: an image and what the members make of it.

    Example: `deepdisc-ops archive build --members members.yaml --out ensemble.mar`
    """
    from deepdisc_ops.serving import archive
    from deepdisc_ops.serving.contents import DustSource

    if bool(checkpoints) == bool(members):
        raise ConfigError("name either checkpoint folders or --members, one of the two")
    run_ids, weights = None, tuple[float, ...]()
    if members:
        from deepdisc_ops.sweeps import select

        selection = select.read_selection(members)
        checkpoints, run_ids = [m.checkpoint for m in selection], [m.run_id for m in selection]
        weights = tuple(m.weight for m in selection if m.weight is not None)
    source = None if dust is None else DustSource(source=dust, scale=dust_scale)
    archive.build_archive(checkpoints or [], out, run_ids, weights, half=half, on_failure=on_failure, dust=source)
    description = archive.inspect_archive(out)
    count = len(description["members"])
    console.print(f"{out}: {count} member{'s' if count > 1 else ''}, {out.stat().st_size / 1e6:.1f} MB")
    if description["half"]:
        console.print(_told_of_half(description["half"]))


@archive_app.command("inspect")
def archive_inspect(
    mar: Mar,
    window: MaxWindow = 2048,
    as_json: AsJson = False,
    measure: Annotated[bool, typer.Option("--measure", help="Also measure the memory, in a process of its own.")] = False,
) -> None:
    """Print what an archive holds and the memory that a worker will need; it is taken at its word, see `archive verify`.

    Example: `deepdisc-ops archive inspect ensemble.mar`
    """
    from dataclasses import asdict

    from deepdisc_ops.serving import archive, memory

    description = archive.inspect_archive(mar)
    needs = {name: memory.estimate(description, window, name) for name in memory.MODES}
    measured = memory.measure(mar, window) if measure else None
    if as_json:
        told = {name: {**asdict(need), "total": need.total} for name, need in needs.items()}
        print_json({**description, "memory": {"window": window, **told, "measured": measured}})
        return
    for line in _lines(description):
        console.print(line)
    for name, need in needs.items():
        console.print(f"memory of a worker for windows of {window} px, members {name}: {need}")
    if measured is not None:
        console.print(f"measured: {measured / 1e6:.0f} MB")


@archive_app.command("verify")
def archive_verify(
    mar: Mar,
    canary: Annotated[bool, typer.Option(help="Also read the members and ask the canary, as a worker does.")] = True,
    device: Annotated[str, typer.Option(help="Device that asks it: cpu, or cuda.")] = "cpu",
) -> None:
    """Check an archive's version and checksums, and that its ensemble answers here as where it was packed.

    Example: `deepdisc-ops archive verify ensemble.mar`
    """
    from deepdisc_ops.serving import archive

    description = archive.try_archive(mar, device) if canary else archive.verify_archive(mar)
    found = description["canary"]
    asked = f", the canary's {found['objects']} objects are found as they should be" if canary else ""
    console.print(f"{mar}: version {description['version']}, {len(description['members'])} members are whole{asked}")


def _lines(description: Mapping[str, Any]) -> list[str]:
    """An archive for people, line by line."""
    dust, half, canary = (description[name] for name in ("dust", "half", "canary"))
    size, package = f"{description['bytes'] / 1e6:.1f} MB", description["package_version"]
    bands, scale = ", ".join(description["bands"]), description["pixel_scale"]
    lines = [
        f"{description['file']}: version {description['version']}, {size}, made by deepdisc-ops {package}",
        f"bands {bands}, {scale} arcsec a pixel; when a member fails: {description['on_failure']}",
        f"E(B-V) of training: {dust['source']} x {dust['scale']:g}" if dust else "E(B-V) of training: not told",
        f"canary: {canary['objects']} objects found, {canary['given']} given"
        if canary
        else "canary: none, build the archive again",
    ]
    if half:
        lines.append(_told_of_half(half))
    for member in description["members"]:
        nll, domain = member.get("metrics", {}).get("val_nll"), member.get("domain")
        seen = f"domain of {domain['images']} images" if domain else "no domain"
        told = "-" if nll is None else f"{nll:.4g}"
        run = member.get("run_id") or "-"
        lines.append(
            f"{member['name']}: {member['bytes'] / 1e6:.1f} MB, weight {member['weight']:.3f}, val_nll {told}, {seen}, run {run}"
        )
    return lines


def _told_of_half(effect: Mapping[str, float]) -> str:
    found = f"boxes {effect['box_px']:.2g} px, scores {effect['score']:.2g}, {100 * effect['lost']:.0f} % of the objects"
    densities = f"cumulative densities {effect['density']:.2g}, redshifts {effect['redshift']:.2g} (1 + z)"
    return f"16 bits change on the canary, at most: {found}, {densities}"
