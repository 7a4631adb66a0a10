"""What a server leaves in its run directory, and what of it may be removed."""

from __future__ import annotations

import shutil
from pathlib import Path

from deepdisc_ops.errors import ServerError
from deepdisc_ops.serving import logs, processes, state
from deepdisc_ops.serving.discovery import DISCOVERY, TARGETS
from deepdisc_ops.serving.generation import STOP_GRACE_S, remove_folder

ARCHIVES = "archives"


def check_own(run_dir: Path) -> None:
    """Refuse a folder that holds other things than a server's."""
    others = sorted(path.name for path in run_dir.iterdir()) if run_dir.is_dir() else []
    if others and state.LOCK not in others:
        raise ServerError(f"{run_dir} holds other files ({others[0]}, ...); give the server a directory of its own")


def clean_up(run_dir: Path) -> None:
    """Remove what must not outlive a supervisor: keys, discovery file, archives, scratch space. The logs stay."""
    for name in (DISCOVERY, TARGETS, state.STATE, state.ORDER, state.ANSWER):
        (run_dir / name).unlink(missing_ok=True)
    for folder in run_dir.glob("g[0-9]*"):
        remove_folder(folder)
    shutil.rmtree(run_dir / ARCHIVES, ignore_errors=True)


def clear_remains(run_dir: Path) -> bool:
    """End and remove what a supervisor that was killed left behind; whether there was anything."""
    said = state.read_state(run_dir)
    found = said is not None or (run_dir / DISCOVERY).exists()
    if said is not None and said.jvm is not None:
        processes.end_group(said.jvm, run_dir, STOP_GRACE_S)
    clean_up(run_dir)
    return found


def prune_logs(run_dir: Path) -> None:
    """Forget the logs of all but the latest servers."""
    for number in logs.generations(run_dir)[: -logs.KEPT_GENERATIONS]:
        shutil.rmtree(logs.folder_of(run_dir, number), ignore_errors=True)
