"""A folder with every wheel of a lock, for building where there is no network.

::

    WHEELS/requirements.txt      every wheel with its own hash, ours among them: what is installed, and what an image's label names
    WHEELS/*.whl                 from the index by the lock's hashes; what the index has as source only is built here
    WHEELS/detectron2/*.whl      by the rule of `deepdisc_ops.installation`
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from deepdisc_ops import installation
from deepdisc_ops.errors import ConfigError, SetupError
from deepdisc_ops.hpc.containers.lock import Pin, canonical, last_error, read_lock
from deepdisc_ops.hpc.containers.targets import file_digest

REQUIREMENTS = "requirements.txt"
DETECTRON2 = "detectron2"
OURS = "deepdisc-ops"


class Wheelhouse(NamedTuple):
    """A wheelhouse that is whole."""

    folder: Path
    digest: str
    wheels: int
    size: int


def collect(lock: Path, out: Path, package: Path, *, index: str | None = None, tell: Callable[[str], None] = print) -> Wheelhouse:
    """Bring every wheel of ``lock`` into ``out``, and ours from ``package`` (a checkout or a wheel); what is there is kept.

    Raises `SetupError` with pip's words where a wheel cannot be had, or is another than the lock says.
    """
    pins = read_lock(lock)
    (out / DETECTRON2).mkdir(parents=True, exist_ok=True)
    source = [] if index is None else ["--extra-index-url", index]
    tell(f"{len(pins)} packages of {lock.name} into {out}")
    _pip(["--require-hashes", "--find-links", str(out), "--wheel-dir", str(out), *source, "-r", str(lock)])
    tell(f"our own wheel from {package}")
    for old in out.glob("deepdisc_ops-*.whl"):
        old.unlink()
    _pip(["--wheel-dir", str(out), str(package)])
    if not list((out / DETECTRON2).glob("*.whl")):
        tell("detectron2's wheel")
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            wheel = installation.download_wheel(Path(scratch))
            wheel.rename(out / DETECTRON2 / wheel.name)
    (out / REQUIREMENTS).write_text(requirements(pins, out))
    return check(out)


def check(folder: Path) -> Wheelhouse:
    """Compare every wheel with its hash. Raises `ConfigError` if this is no wheelhouse, `SetupError` naming what is wrong in it."""
    listed = folder / REQUIREMENTS
    if not listed.is_file():
        raise ConfigError(f"{folder} is no wheelhouse: no {REQUIREMENTS} in it; make one with `deepdisc-ops images wheelhouse`")
    wheels = wheels_by_name(folder)
    size = 0
    for pin in read_lock(listed):
        wheel = wheels.get((pin.name, pin.version))
        if wheel is None:
            raise SetupError(f"{folder} lacks the wheel of {pin.name} {pin.version}; run `deepdisc-ops images wheelhouse` again")
        if (digest := file_digest(wheel)) != pin.sha256:
            raise SetupError(
                f"{wheel} is not the wheel that {REQUIREMENTS} names: sha256 is {digest}, expected {pin.sha256}; remove it and run "
                "`deepdisc-ops images wheelhouse` again"
            )
        size += wheel.stat().st_size
    extra = list((folder / DETECTRON2).glob("*.whl"))
    if len(extra) != 1:
        raise SetupError(
            f"{folder / DETECTRON2} holds {len(extra)} wheels, expected one; run `deepdisc-ops images wheelhouse` again"
        )
    return Wheelhouse(folder, file_digest(listed), len(read_lock(listed)) + 1, size + extra[0].stat().st_size)


def requirements(pins: Sequence[Pin], folder: Path) -> str:
    """The text of requirements.txt: the lock's packages and ours, by the hashes of the wheels that lie in ``folder``."""
    wheels = wheels_by_name(folder)
    versions = [(pin.name, pin.version) for pin in pins]
    ours = [key for key in wheels if key[0] == OURS]
    if missing := [" ".join(key) for key in versions if key not in wheels]:
        raise SetupError(f"pip left no wheel of {', '.join(missing)} in {folder}; run `deepdisc-ops images wheelhouse` again")
    if len(ours) != 1:
        raise SetupError(f"{folder} holds {len(ours)} wheels of {OURS}, expected one")
    lines = [
        f"{name}=={version} --hash=sha256:{file_digest(wheels[name, version])}\n" for name, version in sorted([*versions, *ours])
    ]
    return "".join(lines)


def wheels_by_name(folder: Path) -> Mapping[tuple[str, str], Path]:
    """Wheels by name and version, as their file names say."""
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.glob("*.whl")):
        name, version, *_ = path.name.split("-")
        found[canonical(name), version.replace("_", "-")] = path
    return found


def _pip(words: Sequence[str]) -> None:
    """``pip wheel``, which fetches what is a wheel, checks it, and builds what is not."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        what = "a file does not match its hash in the lock: " if "DO NOT MATCH THE HASHES" in done.stderr else ""
        raise SetupError(f"pip could not make the wheelhouse: {what}{last_error(done.stderr)}")
