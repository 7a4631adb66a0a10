"""``deepdisc-ops images``: Apptainer images of the whole environment, made; `image_use` has the verbs that use them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from deepdisc_ops.cli.console import AsJson, console, print_json
from deepdisc_ops.errors import ConfigError

if TYPE_CHECKING:
    from deepdisc_ops.hpc.containers.render import Kind
    from deepdisc_ops.hpc.containers.runtime import Runtime

images_app = typer.Typer(no_args_is_help=True, help="Container images for clusters: rendered, linted, built, tested, run.")

Base = Literal["debootstrap", "registry"]
TargetName = Annotated[str, typer.Argument(metavar="TARGET", help="cpu, cuda or rocm.")]
Image = Annotated[Path, typer.Argument(help="The image, NAME.sif.")]
Given = Annotated[list[str] | None, typer.Option("--set", help="An argument of the definition, NAME=VALUE; may be repeated.")]
GivenFile = Annotated[Path | None, typer.Option("--arguments", help="Arguments in YAML, as `images resolve` writes them.")]
Lock = Annotated[Path | None, typer.Option(help="The lock, where it is not the target's own.")]
Program = Annotated[Path | None, typer.Option(help="apptainer or singularity, where it is not on PATH.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the command and do nothing.")]


@images_app.command("targets")
def images_targets(as_json: AsJson = False) -> None:
    """Show what images can be made for.

    Example: `deepdisc-ops images targets`
    """
    from deepdisc_ops.hpc.containers.targets import load_targets

    targets = load_targets().values()
    if as_json:
        print_json(list(targets))
        return
    table = Table("target", "for", "options", "needs", "here", "mind")
    for one in targets:
        state = "built and run" if one.built else "rendered and linted, NOT built"
        table.add_row(one.name, one.summary, " ".join(one.flags) or "-", " ".join(one.requires) or "-", state, one.note)
    console.print(table)


@images_app.command("render")
def images_render(
    target: TargetName = "cpu",
    what: Annotated[
        Literal["environment", "base", "containerfile"], typer.Option(help="Which of the target's files.")
    ] = "environment",
    base: Annotated[Base, typer.Option(help="What the base is made from.")] = "debootstrap",
    given: Given = None,
    arguments: GivenFile = None,
    lock: Lock = None,
    out: Annotated[Path | None, typer.Option(help="File to write; printed without one.")] = None,
) -> None:
    """Write a definition with its arguments put in, or a Containerfile of the same content for podman-hpc and Shifter.

    Example: `deepdisc-ops images render cpu --what base --set MIRROR=MIRROR`
    """
    from deepdisc_ops.hpc.containers.render import render, render_containerfile

    values = _values(target, _given(given, arguments), lock)
    text = render_containerfile(values) if what == "containerfile" else render(_kind(what, base), values)
    if out is None:
        print(text, end="")
        return
    out.write_text(text)
    console.print(f"{out}: {what} for {target}")
    _say_unbuilt(target)


@images_app.command("lint")
def images_lint(
    files: Annotated[list[Path] | None, typer.Argument(help="Definition files; without any, those of every target.")] = None,
    given: Given = None,
) -> None:
    """Read definition files strictly; exit code 1 if something is wrong.

    Example: `deepdisc-ops images lint my.def`
    """
    from deepdisc_ops.hpc.containers.definition import read_definition
    from deepdisc_ops.hpc.containers.lint import lint
    from deepdisc_ops.hpc.containers.render import KINDS, PLACEHOLDERS, arguments, render
    from deepdisc_ops.hpc.containers.targets import load_targets

    faults = 0
    if files:
        for path in files:
            if not path.is_file():
                raise ConfigError(f"{path} does not exist; give definition files")
            findings = lint(read_definition(path.read_text()), _given(given, None))
            faults += _tell_findings(str(path), findings)
    else:
        from deepdisc_ops.hpc.containers.targets import Provenance

        for target in load_targets().values():
            values = arguments(target, Provenance("0", "0", "0"), PLACEHOLDERS)
            for kind in KINDS:
                faults += _tell_findings(f"{target.name}: {kind}", lint(read_definition(render(kind, values))))
            _say_unbuilt(target.name)
    raise typer.Exit(1 if faults else 0)


@images_app.command("resolve")
def images_resolve(
    target: TargetName = "cpu",
    image: Annotated[str | None, typer.Option(help="A base in the site's registry, HOST/REPOSITORY:TAG.")] = None,
    index: Annotated[str | None, typer.Option(help="Index of the target's wheels of torch (rocm).")] = None,
    out: Annotated[Path, typer.Option(help="YAML file for --arguments.")] = Path("arguments.yaml"),
) -> None:
    """Ask the site for what only it can know: the digest of a base, the mirror of its apt.

    Example: `deepdisc-ops images resolve cpu --image registry.example.org/python:3.11-slim-bookworm`
    """
    import yaml

    from deepdisc_ops.hpc.containers import resolve
    from deepdisc_ops.hpc.containers.targets import load_target

    found = {"BASE_IMAGE": resolve.base_image(image)} if image else {"MIRROR": resolve.debian_mirror()}
    if index:
        found["WHEEL_INDEX"] = index
    if missing := [name for name in load_target(target).requires if name not in found]:
        raise ConfigError(f"target {target} also needs {', '.join(missing)}; give --index URL")
    out.write_text(yaml.safe_dump(found))
    for name, value in found.items():
        console.print(f"{name}: {value}", soft_wrap=True)


@images_app.command("lock")
def images_lock(
    target: TargetName = "cpu",
    constraints: Annotated[Path, typer.Option(help="NAME==VERSION lines of everything.")] = Path("constraints.txt"),
    index: Annotated[str | None, typer.Option(help="Index of the target's wheels of torch (rocm).")] = None,
    out: Annotated[Path | None, typer.Option(help="The lock to write; without one the target's own in this checkout.")] = None,
) -> None:
    """Make a lock: every package with its version and hash, as pip resolves them here.

    Example: `deepdisc-ops images lock cpu --out lock.txt`
    """
    from deepdisc_ops.hpc.containers.lock import make_lock
    from deepdisc_ops.hpc.containers.targets import load_target

    chosen = load_target(target)
    if chosen.requires and index is None:
        raise ConfigError(f"target {target} takes torch from an index of its own; give --index URL")
    with console.status("asking the index"):
        count = make_lock(constraints, path := out or chosen.lock_path, torch_index=index)
    console.print(f"{path}: {count} packages")


@images_app.command("wheelhouse")
def images_wheelhouse(
    out: Annotated[Path, typer.Argument(help="Folder for the wheels; what is there is kept.")],
    target: Annotated[str, typer.Option(help="cpu, cuda or rocm.")] = "cpu",
    lock: Lock = None,
    package: Annotated[Path | None, typer.Option(help="deepdisc-ops itself: a checkout or a wheel; this checkout else.")] = None,
    index: Annotated[str | None, typer.Option(help="A further index, such as that of ROCm's wheels.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only compare what is there with its hashes.")] = False,
) -> None:
    """Collect every wheel of a lock with its hash, for building without a network.

    Example: `deepdisc-ops images wheelhouse wheels`
    """
    from deepdisc_ops.hpc.containers import wheelhouse
    from deepdisc_ops.hpc.containers.targets import load_target

    house = (
        wheelhouse.check(out)
        if check
        else wheelhouse.collect(lock or load_target(target).lock_path, out, package or _checkout(), index=index, tell=console.print)
    )
    console.print(f"{house.folder}: {house.wheels} wheels, {house.size / 1e9:.2f} GB, digest {house.digest[:12]}")


@images_app.command("build")
def images_build(
    out: Annotated[Path, typer.Argument(help="The image to write, NAME.sif.")],
    target: Annotated[str, typer.Option(help="cpu, cuda or rocm.")] = "cpu",
    on: Annotated[Path | None, typer.Option(help="Base image to build the environment on; without one the base is built.")] = None,
    wheels: Annotated[Path | None, typer.Option(help="Wheelhouse, for the environment.")] = None,
    base: Annotated[Base, typer.Option(help="What a base is made from.")] = "debootstrap",
    given: Given = None,
    arguments: GivenFile = None,
    lock: Lock = None,
    temporary: Annotated[Path | None, typer.Option(help="Folder to unpack in; some 10 GB for the environment.")] = None,
    program: Program = None,
    dry_run: DryRun = False,
) -> None:
    """Build a base, or with --on and --wheels the environment; the old image stays until the new one is whole.

    Example: `deepdisc-ops images build base.sif && deepdisc-ops images build deepdisc-ops.sif --on base.sif --wheels wheels`
    """
    from deepdisc_ops.hpc.containers import build, wheelhouse
    from deepdisc_ops.hpc.containers.render import render
    from deepdisc_ops.hpc.containers.resolve import debian_mirror
    from deepdisc_ops.hpc.containers.runtime import is_image

    runtime, known = the_runtime(program), _given(given, arguments)
    if (on is None) != (wheels is None):
        raise ConfigError("the environment is built with both --on BASE.sif and --wheels DIR, the base with neither")
    binds: list[str] = []
    if on is not None and wheels is not None:
        if not is_image(on):
            raise ConfigError(f"{on} is no image; build the base first: deepdisc-ops images build {on}")
        house = wheelhouse.check(wheels)
        known |= {"BASE": str(on.absolute()), "WHEELS_DIGEST": house.digest}
        binds = [f"{wheels.absolute()}:/mnt/wheels:ro"]
    elif base == "debootstrap" and "MIRROR" not in known:
        known["MIRROR"] = debian_mirror()
    text = render(_kind("environment" if on else "base", base), _values(target, known, lock))
    if dry_run:
        build.check_definition(text, str(out))
        words, mode = build.plan(runtime, text, out, Path("RENDERED.def"))
        console.print(mode.why, soft_wrap=True)
        prefix = [f"APPTAINER_BINDPATH={','.join(binds)}"] if binds else []
        print(shlex.join([*prefix, *runtime.command(["build"], words)]))
        return
    built = build.build(runtime, text, out, binds=binds, temporary=temporary, tell=console.print)
    console.print(f"{built.path}: {built.size / 1e6:.0f} MB in {built.seconds:.0f} s")


@images_app.command("labels")
def images_labels(
    image: Image, name: Annotated[str | None, typer.Argument(help="One label; all without it.")] = None, program: Program = None
) -> None:
    """Print what an image says of its origin; exit code 1 if it lacks the label asked for.

    Example: `deepdisc-ops images labels deepdisc-ops.sif org.deepdisc-ops.commit`
    """
    from deepdisc_ops.hpc.containers import build

    found = build.labels(the_runtime(program), image)
    if name is None:
        for key in sorted(found):
            print(f"{key}: {found[key]}")
        return
    if name not in found:
        raise typer.Exit(1)
    print(found[name])


@images_app.command("sbom")
def images_sbom(
    image: Image,
    out: Annotated[Path, typer.Option(help="CycloneDX file to write.")] = Path("sbom.json"),
    vulnerabilities: Annotated[bool, typer.Option("--audit", help="Also tell what is known against them.")] = False,
    program: Program = None,
    as_json: AsJson = False,
) -> None:
    """Write an image's bill of materials; exit code 1 if --audit knows something against it.

    Example: `deepdisc-ops images sbom deepdisc-ops.sif --out sbom.json --audit`
    """
    from deepdisc_ops.hpc.containers import sbom

    runtime = the_runtime(program)
    components = sbom.bill(runtime, image, out)
    audit = sbom.audit(runtime, image) if vulnerabilities else None
    if as_json:
        print_json({"file": out, "components": components, "audit": audit and audit._asdict()})
        raise typer.Exit(1 if audit and audit.known else 0)
    console.print(f"{out}: {components} components")
    if audit is None:
        return
    table = Table("package", "version", "known as", "mended in")
    for row in audit.known:
        table.add_row(row["package"], row["version"], row["id"], row["fixed"] or "-")
    console.print(table if audit.known else "nothing is known against the packages that were looked up")
    if audit.untold:
        console.print(f"the index tells nothing of {len(audit.untold)}: {', '.join(audit.untold)}", soft_wrap=True)
    raise typer.Exit(1 if audit.known else 0)


def the_runtime(program: Path | None) -> Runtime:
    """The program of that path, or what PATH has."""
    from deepdisc_ops.hpc.containers.runtime import find_runtime

    return find_runtime(program)


def _kind(what: str, base: Base) -> Kind:
    if what == "environment":
        return "environment"
    return "base-debootstrap" if base == "debootstrap" else "base-registry"


def _given(pairs: Iterable[str] | None, path: Path | None) -> dict[str, str]:
    """Arguments of a file, and over them those of --set."""
    from deepdisc_ops.config import read_yaml

    found = {name: str(value) for name, value in read_yaml(path).items()} if path else {}
    for pair in pairs or ():
        name, separator, value = pair.partition("=")
        if not name or not separator:
            raise ConfigError(f"--set {pair!r} is not of the form NAME=VALUE")
        found[name] = value
    return found


def _values(target: str, given: dict[str, str], lock: Path | None) -> dict[str, str]:
    from deepdisc_ops.hpc.containers.render import arguments
    from deepdisc_ops.hpc.containers.targets import load_target, provenance

    chosen = load_target(target)
    return arguments(chosen, provenance(lock or chosen.lock_path), given)


def _checkout() -> Path:
    from deepdisc_ops import resources

    root = resources.find("containers").parent
    if not (root / "pyproject.toml").is_file():
        raise ConfigError("this is no checkout; give deepdisc-ops itself with --package: a checkout or a wheel")
    return root


def _say_unbuilt(target: str) -> None:
    from deepdisc_ops.hpc.containers.targets import load_target

    if not load_target(target).built:
        console.print(f"{target} was NOT built by us: rendered and linted only")


def _tell_findings(name: str, findings: Iterable[object]) -> int:
    found = list(findings)
    for one in found:
        console.print(f"{name}: {one}", markup=False, soft_wrap=True)
    if not found:
        console.print(f"{name}: nothing found", markup=False)
    return len(found)
