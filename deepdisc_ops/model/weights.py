"""A trained network on disk: safetensors weights and, beside them, a YAML of everything needed to use them.

Weights of other programs are read here too, never by a pickle that may run code, and told key by key (`KeyReport`).
"""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deepdisc_ops
from deepdisc_ops.config import TrainingConfig, validate
from deepdisc_ops.errors import CheckpointError
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.resources import git_commit
from deepdisc_ops.sky.domain import Domain

WEIGHTS = "member.safetensors"
DESCRIPTION = "member.yaml"
OLD = "-old"


@dataclass(frozen=True)
class MemberInfo:
    """What a member is: its full config, validation metrics, step, the code that made it, and what its images were like."""

    config: TrainingConfig
    metrics: dict[str, float]
    step: int
    package_version: str
    git_commit: str | None
    domain: Domain | None = None


def save_member(
    folder: Path,
    network: DeepDisc,
    config: TrainingConfig,
    metrics: Mapping[str, float],
    step: int,
    domain: Domain | None = None,
) -> None:
    """Write a checkpoint folder under a temporary name and put it in the place of the old one."""
    try:
        with staged(folder) as staging:
            save_file({key: value.contiguous() for key, value in network.state_dict().items()}, staging / WEIGHTS)
            info = MemberInfo(config, dict(metrics), step, deepdisc_ops.__version__, git_commit(), domain)
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


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A file beside ``path``, with its permissions, that takes its place when the block ends well and vanishes otherwise."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    written = Path(name)
    try:
        yield written
        written.chmod(path.stat().st_mode)
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)


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
    """`MemberInfo` in plain types; without a domain, without that key."""
    tree = {entry.name: getattr(info, entry.name) for entry in fields(MemberInfo) if entry.name != "domain"}
    tree["config"] = info.config.model_dump(mode="json")
    return tree if info.domain is None else tree | {"domain": info.domain.as_dict()}


def info_from_dict(tree: Mapping[str, Any], source: str) -> MemberInfo:
    """The inverse of `info_as_dict`."""
    try:
        config = validate(TrainingConfig, tree["config"], source)
        domain = None if tree.get("domain") is None else Domain.from_dict(tree["domain"], source)
        made = tree["package_version"], tree["git_commit"]
        return MemberInfo(config, dict(tree["metrics"]), int(tree["step"]), *made, domain)
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
    fill(network, read_safetensors(weights), config.model.bands, str(weights))
    return network.eval().to(torch.device(device))


def load_member(folder: Path, device: str = "cpu") -> tuple[DeepDisc, MemberInfo]:
    """A checkpoint folder as a network ready for inference and its description."""
    info = read_info(folder)
    return load_network(folder / WEIGHTS, info.config, device), info


@dataclass
class KeyReport:
    """What became of every key: of a file (matched, adapted, ignored, each with a word on it), and of the network (left).

    Keys left are those the file does not have; they keep the values they had.
    """

    matched: dict[str, str] = field(default_factory=dict)
    adapted: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = f"{len(self.matched)} matched, {len(self.adapted)} adapted, {len(self.ignored)} ignored, {len(self.left)} left"
        parts = [f"{key}: {what}" for key, what in self.adapted.items()]
        parts += [f"{name} {shorten(keys)}" for name, keys in (("ignored", self.ignored), ("left", self.left)) if keys]
        return "; ".join([counts, *parts])

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Key, what became of it, and the word on it."""
        for what in ("matched", "adapted", "ignored"):
            for key, word in getattr(self, what).items():
                yield key, what, word
        for key in self.left:
            yield key, "left", "not in the file"


def shorten(keys: Iterable[str], groups: int = 4) -> str:
    """Keys by the module they belong to, with their number: ``box_heads.mask_head.deconv (2), backbone.bottom_up.res4 (30)``."""
    counts = Counter(".".join(key.split(".")[:-1][:3]) or key for key in keys)
    text = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.most_common(groups))
    return text + (f" and {len(counts) - groups} more" if len(counts) > groups else "")


def fill(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    bands: Iterable[str],
    source: str,
    remedy: str = "use the config they were made with",
) -> None:
    """Load all of a network of ``bands``, or say which keys are missing, unknown or of another shape."""
    have = network.state_dict()
    first = first_convolution(network)
    if first in tensors and tensors[first].dim() == have[first].dim() and tensors[first].shape[1] != have[first].shape[1]:
        names = tuple(bands)
        raise CheckpointError(
            f"weights {source} are of a network of {tensors[first].shape[1]} bands, the config names {len(names)} "
            f"({', '.join(names)}); give the bands it was trained with, in its order"
        )
    misshapen = [key for key in have if key in tensors and tensors[key].shape != have[key].shape]
    faults = [
        f"{what} {shorten(keys)}"
        for what, keys in (
            ("missing", [key for key in have if key not in tensors]),
            ("unknown", [key for key in tensors if key not in have]),
            ("of another shape", misshapen),
        )
        if keys
    ]
    if misshapen:
        key = misshapen[0]
        faults.append(f"as {key}, {tuple(tensors[key].shape)} instead of {tuple(have[key].shape)}")
    if faults:
        raise CheckpointError(f"weights {source} do not fit their config: {'; '.join(faults)}; {remedy}")
    network.load_state_dict(dict(tensors))


def first_convolution(network: nn.Module) -> str:
    """Key of the weights that meet the bands, in a whole network or a backbone; the pyramid over it comes before it in order."""
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    inside = [name for name in names if "fpn_" not in name and "simfp_" not in name]
    return f"{inside[0]}.weight"


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"weights {path} cannot be read ({error}); fetch or train them again") from None


def read_torch(path: Path) -> dict[str, Any]:
    """A mapping that torch.save wrote; tensors, NumPy values and plain containers, never other Python objects."""
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            tree = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        foreign = "Unsupported global" in str(error) or "Unsupported class" in str(error)
        reason = "it holds Python objects besides tensors" if foreign else " ".join(str(error).split())[:120]
        remedy = "save its weights alone where you trust it" if foreign else "fetch it again"
        raise CheckpointError(f"{path} is not read ({reason}); {remedy}") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({' '.join(str(error).split())[:120]}); fetch it again") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} holds a {type(tree).__name__}; expected a mapping of names to tensors")
    return tree


def numpy_makers() -> dict[tuple[str, str], Any]:
    """What a pickle needs to make NumPy arrays and scalars, by module and name as NumPy 1 and 2 write them."""
    makers: dict[tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    for name, value in (("_reconstruct", np.empty(0)), ("scalar", np.float64(0))):
        makers |= {(f"numpy.{room}.multiarray", name): value.__reduce__()[0] for room in ("core", "_core")}
    return makers


def _numpy_globals() -> list[Any]:
    named = [(maker, f"{module}.{name}") for (module, name), maker in numpy_makers().items()]
    return [*named, *{type(np.dtype(kind)) for kind in "fdeilqbB?"}]
