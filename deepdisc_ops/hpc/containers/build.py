"""Builds: to a temporary name beside the target, judged by exit code, file and labels, and only then renamed."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepdisc_ops.errors import ConfigError, SetupError
from deepdisc_ops.hpc.containers.binds import parse_bind
from deepdisc_ops.hpc.containers.definition import read_definition
from deepdisc_ops.hpc.containers.lint import lint
from deepdisc_ops.hpc.containers.runtime import FULL, NO_TEST, Mode, Runtime, build_mode, is_image, run_mode

COMPRESSION = ("--mksquashfs-args", "-comp zstd -Xcompression-level 1")
"""Squashing 7 GB takes 48 s on a core so, and minutes as gzip."""


@dataclass(frozen=True)
class Built:
    """An image that was built."""

    path: Path
    seconds: float
    size: int
    mode: Mode


def plan(runtime: Runtime, text: str, out: Path, definition: Path) -> tuple[list[str], Mode]:
    """Words of ``apptainer build`` for a definition's text kept at ``definition``, and why they are these.

    Without --force the labels of the base would stay in the place of the image's own.
    """
    mode = build_mode(runtime.machine, read_definition(text).last.header["bootstrap"].text)
    return [*mode.options, "--force", *COMPRESSION, str(out), str(definition)], mode


def build(
    runtime: Runtime,
    text: str,
    out: Path,
    *,
    binds: Sequence[str] = (),
    temporary: Path | None = None,
    tell: Callable[[str], None] = print,
) -> Built:
    """Build the rendered definition ``text`` into ``out``; what was at ``out`` stays until the new image is whole.

    ``binds`` are seen in ``%post``; ``temporary`` is where Apptainer unpacks, its own choice when not given. Raises `ConfigError`
    for a definition that the lint rejects, `SetupError` for a build that fails: then nothing half-made is left.
    """
    check_definition(text, str(out))
    if not out.parent.is_dir():
        raise ConfigError(f"{out.parent} does not exist; make the folder of the image first")
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; give the name of an image, such as {out / 'deepdisc-ops.sif'}")
    half, definition = (out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("sif", "def"))
    variables = {"APPTAINER_BINDPATH": ",".join(map(parse_bind, binds)), "SINGULARITY_BINDPATH": ",".join(map(parse_bind, binds))}
    if temporary is not None:
        variables |= {"APPTAINER_TMPDIR": str(temporary), "SINGULARITY_TMPDIR": str(temporary)}
    started = time.monotonic()
    try:
        definition.write_text(text)
        words, mode = plan(runtime, text, half, definition)
        tell(f"building {out.name}: {mode.why}")
        with _without("APPTAINER_USERNS", "SINGULARITY_USERNS"):
            answer = runtime.call(["build"], words, capture=False, environ=variables)
        if answer.code:
            raise SetupError(f"{out.name} was not built: {answer.fault}{_hint(answer.err)}{_kept(out)}")
        if not is_image(half):
            raise SetupError(
                f"{out.name} was not built: {runtime.program.name} reports success and left no image at {half}{_kept(out)}"
            )
        _check_labels(runtime, half, text, out)
        if NO_TEST in mode.options:
            tested = runtime.call(["test"], [*run_mode(runtime.machine).options, "--contain", "--no-home", str(half)])
            if tested.code:
                raise SetupError(f"{out.name} was not built: its %test failed: {tested.fault}{_kept(out)}")
        half.replace(out)
    except OSError as error:
        raise SetupError(f"{out.name} was not built: {error.strerror} at {error.filename}{_kept(out)}") from None
    finally:
        _remove(half, definition)
    return Built(out, time.monotonic() - started, out.stat().st_size, mode)


def check_definition(text: str, name: str) -> None:
    """Raise `ConfigError` with all findings of the lint."""
    if findings := lint(read_definition(text)):
        raise ConfigError(f"the definition of {name}: {'; '.join(map(str, findings))}")


def labels(runtime: Runtime, image: Path) -> dict[str, str]:
    """Labels of an image. Raises `SetupError` if it is none."""
    if not is_image(image):
        raise SetupError(f"{image} is no image; build it with `deepdisc-ops images build`")
    answer = runtime.call(["inspect"], ["--json", "--labels", str(image)])
    try:
        found: dict[str, str] = json.loads(answer.out)["data"]["attributes"]["labels"]
    except (ValueError, KeyError, TypeError):
        raise SetupError(f"{image} cannot be inspected: {answer.fault}") from None
    return found


def _check_labels(runtime: Runtime, image: Path, text: str, out: Path) -> None:
    """An image whose labels are not those of its definition is not what was asked for."""
    expected = {name: line.text for name, line in read_definition(text).last.labels.items()}
    found = labels(runtime, image)
    if wrong := [name for name, value in expected.items() if found.get(name) != value]:
        raise SetupError(
            f"{out.name} was not built: label {wrong[0]} is {found.get(wrong[0])!r}, expected {expected[wrong[0]]!r}{_kept(out)}"
        )


def _kept(out: Path) -> str:
    return f"; the image that was there before is as it was: {out}" if out.exists() else ""


def _hint(err: str) -> str:
    if FULL.search(err):
        return "; the disk is full: free it, or give another with --temporary and --out"
    if "do not match the hashes" in err or "HASHES" in err or "computed checksum did NOT match" in err:
        return "; the wheelhouse is not that of the lock, make it again with `deepdisc-ops images wheelhouse`"
    return ""


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class _without:  # noqa: N801  a context manager that reads as a word
    """Variables that change what ``build`` does, taken out of the environment for the time of a block."""

    def __init__(self, *names: str) -> None:
        self.names, self.kept = names, dict[str, str]()

    def __enter__(self) -> None:
        self.kept = {name: os.environ.pop(name) for name in self.names if name in os.environ}

    def __exit__(self, *_: object) -> None:
        os.environ.update(self.kept)
