"""What an archive says of itself beyond its ensemble: ``archive.yaml`` beside ``ensemble.yaml``, and whether it is whole.

A server unpacks an archive into a folder; the functions here look at such a folder. Archives made before there was an
archive.yaml have none, and are served without the checks that need it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from packaging.version import InvalidVersion, Version
from pydantic import Field, PositiveFloat

import deepdisc_ops
from deepdisc_ops.config import Settings, validate
from deepdisc_ops.errors import ArchiveError, ConfigError

CONTENTS = "archive.yaml"

Count = Annotated[int, Field(ge=0)]


class DustSource(Settings):
    """The E(B-V) that the members were trained with: a map or constant as `sky.dust.ebv_source` takes it, and its scale."""

    source: str
    scale: PositiveFloat = 1.0

    @property
    def number(self) -> float | None:
        """The constant in mag, None where the source is a map."""
        try:
            return float(self.source)
        except ValueError:
            return None


class CanarySummary(Settings):
    """The canary's file, how many objects the ensemble finds in it, and how many are given to each member."""

    file: str
    objects: Count
    given: Count


class HalfEffect(Settings):
    """What 16 bits of the weights change on the canary, at most.

    box_px: an edge of a box; score; density: a cumulative redshift density; redshift: a mean redshift over 1 + z; lost: share of
    the objects that only one of the two precisions finds.
    """

    box_px: float
    score: float
    density: float
    redshift: float
    lost: float


class Contents(Settings):
    """archive.yaml: who packed it, the sha256 of its files but the members (those are in ensemble.yaml), and what was asked for."""

    format: Annotated[int, Field(ge=1, le=1)] = 1
    package_version: str
    files: dict[str, str]
    canary: CanarySummary
    half: HalfEffect | None = None
    dust: DustSource | None = None


def parse_contents(text: str | bytes, source: str) -> Contents:
    """`Contents` from YAML; ``source`` is named in the `ArchiveError`."""
    try:
        tree = yaml.safe_load(text)
        return validate(Contents, tree if isinstance(tree, dict) else {}, source)
    except (yaml.YAMLError, ConfigError) as error:
        raise ArchiveError(f"{source} cannot be used ({' '.join(str(error).split())}); build the archive again") from None


def read_contents(folder: Path) -> Contents | None:
    """The contents of an unpacked archive; None where it was made before there were any, or is a plain ensemble folder."""
    path = folder / CONTENTS
    return parse_contents(path.read_bytes(), str(path)) if path.exists() else None


def check_version(description: Mapping[str, Any]) -> None:
    """Refuse an ensemble.yaml that another series of the package has written, with an `ArchiveError`.

    Within a series a number means the same: 0.3.x serves archives of 0.3, whatever x; from 1.0 on, 1.4 serves those of 1.0 to
    1.4 and none of 2. An archive of a newer series is never served, for it may mean what this package does not know.
    """
    found, own = str(description.get("package_version")), deepdisc_ops.__version__
    try:
        archive, package = Version(found).release, Version(own).release
    except InvalidVersion:
        raise ArchiveError(f"the archive names its package_version as {found!r}; expected one like {own}; build it again") from None
    series, minor = (*archive, 0)[:2], (*package, 0)[:2]
    same = series == minor if package[0] == 0 else series[0] == minor[0] and series[1] <= minor[1]
    if not same:
        raise ArchiveError(
            f"the archive was made by deepdisc-ops {found}, this is {own}, which does not serve it; build the archive again with "
            f"{own}, or install deepdisc-ops {series[0]}.{series[1]}"
        )


def check_files(folder: Path) -> None:
    """Refuse an unpacked archive whose handler, description or canary changed; the `ArchiveError` names the file.

    The members are compared where they are read, by `Ensemble.load`, which may go on without one.
    """
    contents = read_contents(folder)
    for name, expected in (contents.files if contents else {}).items():
        check_digest(name, _sha256(folder / name), expected)


def check_digest(name: str, found: str | None, expected: str) -> None:
    """Refuse a file of an archive whose sha256 is not the expected one, or that is missing (None)."""
    if found is None:
        raise ArchiveError(f"{name} is missing from the archive; copy the archive again or build it anew")
    if found != expected:
        raise ArchiveError(
            f"{name} is damaged, sha256 {found[:12]} instead of {expected[:12]}; copy the archive again or build it anew"
        )


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
