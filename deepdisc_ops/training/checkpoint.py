"""The whole state of a training run in one file, so that a run killed at any moment goes on where it was."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deepdisc_ops.config import TrainingConfig, flatten
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


def save_state(folder: Path, state: TrainingState, config: TrainingConfig, **parts: Any) -> None:
    """Write state, config, the generators' states and the state_dict of each of ``parts`` to ``folder``/state.pt."""
    tree = {name: part.state_dict() for name, part in parts.items()}
    tree |= {"step": state.step, "best": state.best, "history": state.history, "config": _identity(config)}
    tree |= {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}
    write_atomically(folder / STATE, lambda path: torch.save(tree, path))


def load_state(folder: Path, config: TrainingConfig, **parts: Any) -> TrainingState:
    """Restore ``parts`` and the generators from ``folder``/state.pt; a fresh state where there is none.

    A run goes on only under the config it was started with (device, threads, workers and cache may differ).
    """
    tree = _read(folder / STATE, *parts)
    if tree is None:
        return TrainingState()
    differing = [key for key, value in _identity(config).items() if tree["config"].get(key) != value]
    if differing:
        raise CheckpointError(
            f"{folder / STATE} belongs to a run with other {', '.join(differing)}; train into a new folder, "
            "or give the same config to go on"
        )
    for name, part in parts.items():
        part.load_state_dict(tree[name])
    torch.set_rng_state(tree["rng"])
    if len(tree["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(tree["cuda_rng"])
    return TrainingState(tree["step"], tree["best"], tree["history"])


def read_history(folder: Path) -> list[dict[str, float]]:
    """The curves in ``folder``/state.pt so far; none where there is no such file."""
    tree = _read(folder / STATE)
    return [] if tree is None else list(tree["history"])


def _read(path: Path, *parts: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        tree: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} cannot be read ({reason}); delete {path.parent} to start the run anew") from None
    missing = {"step", "best", "history", "config", "rng", "cuda_rng", *parts} - set(tree)
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}; delete {path.parent} to start the run anew")
    return tree


def _identity(config: TrainingConfig) -> dict[str, str]:
    """The settings that decide what a run computes, by dotted key."""
    free = {"train.device", "train.threads", "data.cache_gb", "data.workers", "data.path"}
    return {key: value for key, value in flatten(config.model_dump(mode="json")).items() if key not in free}
