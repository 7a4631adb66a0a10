"""What of the host is seen inside, and under which name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from deepdisc_ops.errors import ConfigError

SHM = Path("/dev/shm")
LONGEST_TEMPORARY = 24
"""Ray's sockets lie below the folder that is bound at /tmp; the path on the host does not count, only that inside."""


def bind_options(binds: Sequence[str], *, folder: Path, temporary: Path | None, enter: bool = True) -> list[str]:
    """Options that contain the process and show it ``binds``, the working folder, /dev/shm, and ``temporary`` as /tmp.

    Each of ``binds`` is SOURCE, SOURCE:INSIDE or SOURCE:INSIDE:ro. The home is not shown unless it is asked for.
    Instances cannot ``enter`` a folder: Apptainer has no option for it there, their apps do.
    """
    shown = [*binds, f"{folder}", *([str(SHM)] if SHM.is_dir() else []), *([f"{temporary}:/tmp"] if temporary else [])]
    options = ["--contain", "--no-home", *(["--pwd", str(folder)] if enter else [])]
    for text in dict.fromkeys(map(parse_bind, shown)):
        options += ["--bind", text]
    return options


def parse_bind(text: str) -> str:
    """A bind as Apptainer takes it. Raises `ConfigError` if its source is missing or it cannot be said to Apptainer."""
    source, *rest = text.split(":")
    if not source or len(rest) > 2 or (len(rest) == 2 and rest[1] not in ("ro", "rw")):
        raise ConfigError(
            f"bind {text!r} is not of the form SOURCE, SOURCE:INSIDE or SOURCE:INSIDE:ro (a path with a colon cannot be)"
        )
    if "," in text:
        raise ConfigError(
            f"bind {text!r} holds a comma, which Apptainer takes for the end of it; bind a folder above, or rename it"
        )
    path = Path(source).expanduser()
    if not path.exists():
        raise ConfigError(f"bind {source} does not exist on this machine; make it first, or leave it out")
    if not os.access(path, os.R_OK):
        raise ConfigError(f"bind {source} cannot be read by you; ask its owner, or bind a folder of your own")
    if rest and not rest[0].startswith("/"):
        raise ConfigError(f"bind {text!r}: inside it must have an absolute path, found {rest[0]!r}")
    return ":".join([str(path.absolute()), *rest])
