"""Locks: pinned requirements with the hash of the one file of each that this platform takes, as pip resolves them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deepdisc_ops.errors import ConfigError, SetupError


class Pin(NamedTuple):
    """One line of a lock."""

    name: str
    version: str
    sha256: str


def make_lock(constraints: Path, out: Path, index: str | None = None, torch_index: str | None = None) -> int:
    """Write the lock of all packages in ``constraints``, which names each with its version; returns how many there are.

    Pins that ``out`` has already are kept, as an index changes no file; only new ones are asked for.
    ``torch_index`` is one from which torch and torchvision are taken, with whatever their wheels there require (ROCm's).
    Raises `SetupError` with pip's words where a package is not to be had.
    """
    wanted = pinned_lines(constraints)
    kept: list[Pin] = []
    if torch_index is None:
        kept = [pin for pin in (read_lock(out) if out.is_file() else []) if f"{pin.name}=={pin.version}" in wanted]
        missing = sorted(set(wanted) - {f"{pin.name}=={pin.version}" for pin in kept})
        reports = [_resolve(missing, _index(index))] if missing else []
    else:
        torch, rest = _split_torch(wanted)
        reports = [_resolve(rest, _index(index)), _resolve(torch, ["--index-url", torch_index], dependencies=True)]
    pins = {pin.name: pin for pin in (*kept, *(pin for report in reports for pin in read_report(report)))}
    out.write_text(render_lock(list(pins.values()), constraints.name))
    return len(pins)


def pinned_lines(constraints: Path) -> list[str]:
    """``name==version`` lines of a constraints file. Raises `ConfigError` for any other."""
    lines = [line.split("#")[0].strip() for line in constraints.read_text().splitlines()]
    lines = [line for line in lines if line]
    if loose := [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.+!]+", line)]:
        raise ConfigError(f"{constraints}: {loose[0]!r} is no pin; expected NAME==VERSION")
    return lines


def read_report(report: Mapping[str, Any]) -> list[Pin]:
    """Pins from what ``pip install --report`` writes."""
    return [
        Pin(
            canonical(item["metadata"]["name"]),
            item["metadata"]["version"],
            item["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for item in report["install"]
    ]


def render_lock(pins: Sequence[Pin], source: str) -> str:
    """The text of a lock, sorted by name."""
    head = f"# Made by `deepdisc-ops images lock` from {source}, for Python 3.11 on x86-64 Linux; do not edit.\n"
    return head + "".join(f"{pin.name}=={pin.version} --hash=sha256:{pin.sha256}\n" for pin in sorted(pins))


def read_lock(path: Path) -> list[Pin]:
    """Pins of a lock. Raises `ConfigError` for a line that is none."""
    pins = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = re.fullmatch(r"([\w.-]+)==(\S+) --hash=sha256:([0-9a-f]{64})", line.strip())
        if found is None:
            raise ConfigError(f"{path}, line {number}: expected NAME==VERSION --hash=sha256:DIGEST, found {line.strip()[:60]!r}")
        pins.append(Pin(canonical(found[1]), found[2], found[3]))
    return pins


def canonical(name: str) -> str:
    """A distribution's name in the index's normal form (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _index(url: str | None) -> list[str]:
    return [] if url is None else ["--index-url", url]


def _split_torch(lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """Lines of torch itself, and the rest without what only torch for CUDA requires."""
    ours = ("torch==", "torchvision==")
    return (
        [line for line in lines if line.startswith(ours)],
        [line for line in lines if not line.startswith((*ours, "nvidia-", "cuda-", "triton=="))],
    )


def _resolve(lines: Sequence[str], index: Sequence[str], *, dependencies: bool = False) -> dict[str, Any]:
    """What pip would install for these lines, without installing anything."""
    with tempfile.TemporaryDirectory() as folder:
        requirements, report = Path(folder, "requirements.txt"), Path(folder, "report.json")
        requirements.write_text("\n".join(lines))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "--dry-run"]
        command += ["--ignore-installed", *([] if dependencies else ["--no-deps"]), *index]
        command += ["--report", str(report), "-r", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SetupError(f"pip cannot resolve the lock: {last_error(done.stderr)}")
        found: dict[str, Any] = json.loads(report.read_text())
        return found


def last_error(text: str) -> str:
    """The last line of pip's complaint that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("WARNING")]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["pip said nothing"])[-1]
