"""The whole state of a training run in one file, so that a run killed at any moment goes on where it was.

Random numbers are no part of it: every step is seeded by the run's seed, its own number and its rank.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from deepdisc_ops.config import Settings, flatten
from deepdisc_ops.errors import CheckpointError

STATE = "state.pt"


@dataclass
class TrainingState:
    """Steps done, the best validation so far, and every record of the curves.

    ``best`` is a score, lower is better; ``stale`` counts the validations since; ``loss_sum`` and ``loss_steps`` are of the
    steps since the latest validation.
    """

    step: int = 0
    best: float = float("inf")
    stale: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def add_loss(self, loss: float) -> None:
        """Count a step."""
        self.step += 1
        self.loss_sum += loss
        self.loss_steps += 1

    def take_mean_loss(self) -> float:
        """Mean loss since this was last asked."""
        mean = self.loss_sum / max(self.loss_steps, 1)
        self.loss_sum, self.loss_steps = 0.0, 0
        return mean


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` on a temporary name beside ``path``, then rename; a failed write leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(staging)
        with staging.open("rb") as written:  # some file systems tell only now that they are full
            os.fsync(written.fileno())
        staging.replace(path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} could not be written ({error}); the file before it is untouched") from None
    finally:
        staging.unlink(missing_ok=True)


def save_state(folder: Path, state: TrainingState, config: Settings, **parts: Any) -> None:
    """Write state, config and the state_dict of each of ``parts`` to ``folder``/state.pt."""
    for left in folder.glob(f".{STATE}.*"):  # by a run that was killed while it wrote
        left.unlink(missing_ok=True)
    tree = {name: part.state_dict() for name, part in parts.items()}
    tree |= asdict(state) | {"config": _identity(config)}
    write_atomically(folder / STATE, lambda path: torch.save(tree, path))


def load_state(folder: Path, config: Settings, **parts: Any) -> TrainingState:
    """Restore ``parts`` from ``folder``/state.pt; a fresh state where there is none.

    A run goes on only under the config it was started with (what `_FREE` names may differ).
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
    return TrainingState(**{entry.name: tree[entry.name] for entry in fields(TrainingState)})


def adopt_state(folder: Path, config: Settings, changeable: Collection[str]) -> None:
    """Let the run in ``folder`` go on under ``config``, which may differ in the ``changeable`` keys alone."""
    tree = _read(folder / STATE)
    if tree is None:
        return
    mine = _identity(config)
    fixed = [key for key, value in mine.items() if tree["config"].get(key) != value and not _covers(changeable, key)]
    if fixed:
        raise CheckpointError(f"{folder / STATE} cannot go on with another {', '.join(fixed)}; train into a new folder")
    write_atomically(folder / STATE, lambda path: torch.save(tree | {"config": mine}, path))


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
    missing = {*(entry.name for entry in fields(TrainingState)), "config", *parts} - set(tree)
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}; delete {path.parent} to start the run anew")
    return tree


def _covers(keys: Collection[str], key: str) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in keys)


_FREE = {
    *("train.device", "train.ranks", "train.threads", "train.save_every"),
    *("data.cache_gb", "data.workers", "data.path"),
    *("device", "threads", "workers", "cutouts"),  # of pretraining
}


def _identity(config: Settings) -> dict[str, str]:
    """The settings that decide what a run computes, by dotted key."""
    return {key: value for key, value in flatten(config.model_dump(mode="json")).items() if key not in _FREE}
