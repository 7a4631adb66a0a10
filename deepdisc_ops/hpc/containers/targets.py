"""What images are made for, as ``containers/targets.toml`` says, and where an image comes from."""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

import deepdisc_ops
from deepdisc_ops.config import Settings, validate
from deepdisc_ops.errors import ConfigError, SetupError
from deepdisc_ops.resources import find, git_commit

TABLE = "containers/targets.toml"
Flag = Annotated[str, Field(pattern=r"^--[a-z]+$")]


class Target(Settings):
    """One table of targets.toml."""

    name: str
    summary: str
    device: Literal["cpu", "cuda", "rocm"]
    flags: tuple[Flag, ...] = Field(description="of apptainer exec, run and instance start")
    lock: str | None = Field(None, description="requirements with hashes, relative to containers/; made at the site when not given")
    requires: tuple[str, ...] = Field((), description="arguments that only a site can know")
    built: bool = Field(description="whether we have built and run it")
    note: str

    @property
    def lock_path(self) -> Path:
        """The lock that comes with the package. Raises `ConfigError` where the target has none."""
        if self.lock is None:
            raise ConfigError(f"target {self.name} has no lock of its own: {self.note}; then give the file with --lock")
        return find(f"containers/{self.lock}")


@dataclass(frozen=True)
class Provenance:
    """What a label says about the origin of an image."""

    version: str
    commit: str
    lock_digest: str


def load_targets() -> dict[str, Target]:
    """All targets by name."""
    tables = tomllib.loads(find(TABLE).read_text())
    return {name: validate(Target, {"name": name, **table}, f"{TABLE}, {name}") for name, table in tables.items()}


def load_target(name: str) -> Target:
    """One target. Raises `ConfigError` if there is none of that name."""
    targets = load_targets()
    if name not in targets:
        raise ConfigError(f"no target {name!r}; expected one of {', '.join(targets)}")
    return targets[name]


def provenance(lock: Path) -> Provenance:
    """Version and commit of this package, and the digest of a lock."""
    return Provenance(deepdisc_ops.__version__, git_commit() or "unknown", file_digest(lock))


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises `SetupError` if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SetupError(f"{path} cannot be read: {error.strerror}") from None
