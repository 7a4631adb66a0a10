"""A trained network on disk: safetensors weights and, beside them, a YAML of everything needed to use them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import deepdisc_ops
from deepdisc_ops.config import TrainingConfig, validate
from deepdisc_ops.errors import CheckpointError
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.resources import git_commit

WEIGHTS = "member.safetensors"
DESCRIPTION = "member.yaml"
OLD = "-old"


@dataclass(frozen=True)
class MemberInfo:
    """What a member is: its full config, validation metrics, step, and the code that made it."""

    config: TrainingConfig
    metrics: dict[str, float]
    step: int
    package_version: str
    git_commit: str | None


def save_member(folder: Path, network: DeepDisc, config: TrainingConfig, metrics: Mapping[str, float], step: int) -> None:
    """Write a checkpoint folder under a temporary name and put it in the place of the old one."""
    try:
        with staged(folder) as staging:
            save_file({key: value.contiguous() for key, value in network.state_dict().items()}, staging / WEIGHTS)
            info = MemberInfo(config, dict(metrics), step, deepdisc_ops.__version__, git_commit())
            write_info(staging / DESCRIPTION, info)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {folder} could not be written ({error}); the one before it is untouched") from None


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``folder`` when the block ends well, and vanishes when it does not.

    Between the two renames at the end ``folder`` is away for an instant; `recover` brings back what a kill left there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield staging
        staging.chmod(0o755)
        old = staging.with_name(f"{staging.name}{OLD}")
        if folder.exists():
            folder.replace(old)
        staging.replace(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def recover(folder: Path) -> None:
    """Put back a folder that a kill in the middle of `staged` moved aside, and remove what else it left."""
    left = sorted(folder.parent.glob(f".{folder.name}-*"), key=lambda path: path.stat().st_mtime)
    aside = [path for path in left if path.name.endswith(OLD)]
    if aside and not folder.exists():
        aside[-1].replace(folder)
    for path in left:
        shutil.rmtree(path, ignore_errors=True)


def write_info(path: Path, info: MemberInfo) -> None:
    """Write `MemberInfo` as YAML."""
    path.write_text(yaml.safe_dump(info_as_dict(info), sort_keys=False))


def info_as_dict(info: MemberInfo) -> dict[str, Any]:
    """`MemberInfo` in plain types."""
    return asdict(info) | {"config": info.config.model_dump(mode="json")}


def info_from_dict(tree: Mapping[str, Any], source: str) -> MemberInfo:
    """The inverse of `info_as_dict`."""
    try:
        config = validate(TrainingConfig, tree["config"], source)
        return MemberInfo(config, dict(tree["metrics"]), int(tree["step"]), tree["package_version"], tree["git_commit"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{source} is not a member description ({error!r}); train again or fetch the checkpoint anew"
        ) from None


def read_info(folder: Path) -> MemberInfo:
    """Read the description of a checkpoint folder."""
    path = folder / DESCRIPTION
    if not path.exists():
        raise CheckpointError(f"{folder} is no checkpoint: {DESCRIPTION} is missing; expected a folder like RUN/best")
    return info_from_dict(yaml.safe_load(path.read_text()), str(path))


def copy_weights(source: Path, target: Path, *, half: bool = False) -> None:
    """Copy a safetensors file, its floating-point tensors rounded to 16 bits if ``half``."""
    if not half:
        shutil.copyfile(source, target)
        return
    tensors = {name: t.half() if t.is_floating_point() else t for name, t in load_file(source).items()}
    overflown = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if overflown:
        raise CheckpointError(f"{source}: {', '.join(overflown)} do not fit into 16 bits; keep the full precision")
    save_file(tensors, target)


def load_network(weights: Path, config: TrainingConfig, device: str = "cpu") -> DeepDisc:
    """Build the network of ``config`` and fill it from a safetensors file, in evaluation mode."""
    network = DeepDisc(config.model, config.inference)
    try:
        network.load_state_dict(load_file(weights))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"weights {weights} cannot be read ({error}); fetch or train them again") from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"weights {weights} do not fit their config: {reason}") from None
    return network.eval().to(torch.device(device))


def load_member(folder: Path, device: str = "cpu") -> tuple[DeepDisc, MemberInfo]:
    """A checkpoint folder as a network ready for inference and its description."""
    info = read_info(folder)
    return load_network(folder / WEIGHTS, info.config, device), info
