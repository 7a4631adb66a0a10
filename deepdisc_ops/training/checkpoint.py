"""The whole state of a training run in one file, so that a run killed at any moment goes on where it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deepdisc_ops.errors import CheckpointError

STATE = "state.pt"


@dataclass
class TrainingState:
    """Steps done, the best validation so far, and every record of the curves."""

    step: int = 0
    best: float = float("inf")
    history: list[dict[str, float]] = field(default_factory=list)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` on a temporary name beside ``path``, then rename; a failed write leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(staging)
        staging.replace(path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} could not be written ({error}); the file before it is untouched") from None
    finally:
        staging.unlink(missing_ok=True)


def save_state(folder: Path, state: TrainingState, **parts: Any) -> None:
    """Write state, the generator's state and the state_dict of each of ``parts`` to ``folder``/state.pt."""
    tree = {name: part.state_dict() for name, part in parts.items()}
    tree |= {"step": state.step, "best": state.best, "history": state.history, "rng": torch.get_rng_state()}
    write_atomically(folder / STATE, lambda path: torch.save(tree, path))


def load_state(folder: Path, **parts: Any) -> TrainingState:
    """Restore ``parts`` and the generator from ``folder``/state.pt; a fresh state where there is none."""
    path = folder / STATE
    if not path.exists():
        return TrainingState()
    try:
        tree = torch.load(path, weights_only=True, map_location="cpu")
        for name, part in parts.items():
            part.load_state_dict(tree[name])
    except (RuntimeError, KeyError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} does not fit this run ({reason}); train into a new folder or delete {folder}") from None
    torch.set_rng_state(tree["rng"])
    return TrainingState(tree["step"], tree["best"], tree["history"])
