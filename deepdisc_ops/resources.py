"""What surrounds the package: the files that foreign programs open by path, and the commit of the checkout.

Handlers, sweep specifications and job scripts are no Python packages. A wheel carries them inside the package, a checkout
beside it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path, PurePosixPath

from deepdisc_ops.errors import SetupError

_PACKAGE = Path(__file__).resolve().parent


def find(name: str) -> Path:
    """Absolute path of a shipped file or folder, such as ``handlers/ensemble_handler.py``.

    Raises `SetupError` when the installation does not hold it.
    """
    relative = PurePosixPath(name)
    if relative.is_absolute() or not relative.parts or ".." in relative.parts:
        raise ValueError(f"{name!r} is not the relative name of a shipped file")
    root = _root(_PACKAGE)
    path = root / relative
    if not path.exists():
        raise SetupError(f"{name} is not in {root}; this installation is incomplete, install deepdisc-ops anew")
    return path


def git_commit() -> str | None:
    """Commit of the checkout this package belongs to; a copy installed inside somebody's repository has none."""
    command = ["git", "-C", str(_PACKAGE), "rev-parse", "HEAD", "--show-prefix"]
    try:
        commit, prefix, *_ = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit if prefix == "deepdisc_ops/" else None


def _root(package: Path) -> Path:
    """Folder that holds the shipped folders: inside an installed package, beside the package of a checkout."""
    installed = package / "_resources"
    return installed if installed.is_dir() else package.parent
