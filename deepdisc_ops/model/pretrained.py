"""What a network starts from: a member; or its backbone alone: ImageNet weights as others publish them, a pretrained backbone.

Files: detectron2 .pkl (its own and Caffe2's), .pth/.pyth/.pt of torchvision, timm, MViT, Swin and detectron2, and safetensors.
Which of the known namings a file has is found by trying: the one under which most of its keys are keys of the backbone.
Glossary: C bands, h x w the kernel of the first convolution.
"""

from __future__ import annotations

import codecs
import io
import logging
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from torch import Tensor
from torch.nn import functional

from deepdisc_ops.config import ModelSettings
from deepdisc_ops.errors import CheckpointError
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.model.weights import (
    WEIGHTS,
    KeyReport,
    fill,
    first_convolution,
    numpy_makers,
    read_safetensors,
    read_torch,
    shorten,
)

State = Mapping[str, Tensor]
Naming = Callable[[Sequence[str]], list[str]]

WRAPPERS = ("model", "model_state", "state_dict", "network", "blobs")
"""Names under which training programs keep the weights inside a file."""
TABLES = re.compile(r".*(rel_pos_[hw]|pos_embed|relative_position_(bias_table|index))")
"""Tables of positions, which depend on the size of the images and can do without a start."""
TORCHVISION = (
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^layer(\d)\.", lambda found: f"res{int(found[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)

log = logging.getLogger(__name__)


def initialise(network: DeepDisc, model: ModelSettings) -> KeyReport | None:
    """Give a new network the weights that ``model.weights`` names, or its backbone those of ``model.backbone_weights``.

    Tells what became of every key; nothing is done, and nothing told, where neither names any.
    """
    if model.weights is not None:
        file = read_weights(model.weights)
        fill(network, file, model.bands, str(model.weights), remedy="a run starts from a member of its own shape alone")
        log.info("the whole network from %s", model.weights)
        return KeyReport(matched={key: key for key in file})
    if model.backbone_weights is None:
        return None
    report = load_backbone(network, read_weights(model.backbone_weights), model, str(model.backbone_weights))
    log.info("backbone from %s: %s", model.backbone_weights, report)
    return report


def load_backbone(network: DeepDisc, file: State, model: ModelSettings, source: str = "the file") -> KeyReport:
    """Copy the tensors of ``file`` to the backbone; all its convolutions and matrices must be there, the pyramid need not.

    The first convolution is adapted to the bands as ``model.first_convolution`` says.
    """
    targets = {key: value for key, value in network.state_dict().items() if key.startswith("backbone.")}
    first = f"backbone.{first_convolution(network.backbone)}"
    names = match_names(list(file), targets, first)
    report, filled, misshapen = KeyReport(), set(), []
    for key, value in file.items():
        name = names[key]
        if name not in targets or name in filled:
            report.ignored[key] = "no part of this backbone"
        elif _of_batch_norm(name, names.values()) and not _of_batch_norm(name, targets):
            report.ignored[key] = "of a batch normalisation, which this backbone does not have"
        elif value.shape == targets[name].shape:
            _copy(value, targets[name])
            report.matched[key] = name
            filled.add(name)
        elif (adapted := _adapt(value, targets[name], name == first, name, model)) is not None:
            report.adapted[key] = adapted
            filled.add(name)
        elif TABLES.fullmatch(name):
            report.ignored[key] = f"of {tuple(value.shape)}, not {tuple(targets[name].shape)}"
        else:
            misshapen.append(name)
    _require_all(targets, filled, misshapen, model, source)
    report.left = tuple(key for key in targets if key not in filled)
    return report


def match_names(keys: Sequence[str], targets: State, first: str) -> dict[str, str]:
    """What each key of a file would be called here, under the naming and at the place that give the backbone most of its keys."""
    parts = first.split(".")
    places = ["", *(".".join(parts[: i + 1]) + "." for i in range(len(parts) - 1))]
    candidates = []
    for naming in NAMINGS:
        renamed = naming([key.removeprefix("module.") for key in keys])
        candidates += [[place + name for name in renamed] for place in places]
    best = max(candidates, key=lambda names: sum(name in targets for name in names))
    return dict(zip(keys, best, strict=True))


def inflate(weight: Tensor, bands: int) -> Tensor:
    """(out, colours, h, w) -> (out, C, h, w): the mean over the colours, scaled so that equal bands give what those gave."""
    return weight.mean(1, keepdim=True).repeat(1, bands, 1, 1) * (weight.shape[1] / bands)


def _adapt(value: Tensor, target: Tensor, is_first: bool, name: str, model: ModelSettings) -> str | None:
    """Make the best of a tensor of another shape and say what; nothing for one that cannot be used."""
    if is_first and value.dim() == target.dim():
        bands, same_kernel = target.shape[1], value.shape[2:] == target.shape[2:] and len(value) == len(target)
        if not same_kernel:
            return f"re-initialised: {tuple(value.shape)} in the file, {tuple(target.shape)} here"
        if model.first_convolution == "reinitialise":
            return f"re-initialised: {value.shape[1]} bands in the file, {bands} here"
        _copy(inflate(value, bands), target)
        return f"inflated from {value.shape[1]} bands to {bands}"
    if re.search(r"rel_pos_[hw]$", name) and value.shape[1:] == target.shape[1:]:
        _copy(functional.interpolate(value.float().T[None], size=len(target), mode="linear")[0].T, target)
        return f"interpolated from {len(value)} to {len(target)} positions"
    return None


@torch.no_grad()
def _copy(value: Tensor, target: Tensor) -> None:
    target.copy_(value)


def _of_batch_norm(name: str, names: Any) -> bool:
    layer, _, kind = name.rpartition(".")
    return kind in ("weight", "bias", "running_mean", "running_var") and f"{layer}.running_var" in names


def _require_all(targets: State, filled: set[str], misshapen: Sequence[str], model: ModelSettings, source: str) -> None:
    body = [key for key, value in targets.items() if value.dim() > 1 and not TABLES.fullmatch(key) and not re.search("fpn_", key)]
    body = [key for key in body if "simfp_" not in key]
    missing = [key for key in body if key not in filled and key not in misshapen]
    faults = [f"{what} {shorten(keys)}" for what, keys in (("missing", missing), ("of another shape", misshapen)) if keys]
    if faults:
        raise CheckpointError(
            f"{source} does not fit model.backbone.name {model.backbone.name!r}: {'; '.join(faults)} "
            f"({len(body) - len(missing) - len(misshapen)} of {len(body)} fit); give weights of that network"
        )


def _same(keys: Sequence[str]) -> list[str]:
    return list(keys)


def _torchvision(keys: Sequence[str]) -> list[str]:
    """ResNets of torchvision and timm."""
    return [_substitute(key, TORCHVISION) for key in keys]


def _caffe2(keys: Sequence[str]) -> list[str]:
    """ResNets of Detectron 1, as in detectron2's R-50.pkl by MSRA."""
    return list(convert_basic_c2_names(list(keys)))


def _timm_mvit(keys: Sequence[str]) -> list[str]:
    """In timm blocks are counted stage by stage."""
    found = {tuple(map(int, match.groups())) for key in keys if (match := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", key))}
    places = {place: number for number, place in enumerate(sorted(found))}

    def block(match: re.Match[str]) -> str:
        return f"blocks.{places[int(match[1]), int(match[2])]}."

    rules = ((r"^stages\.(\d+)\.blocks\.(\d+)\.", block), (r"\.shortcut_proj_attn\.", ".proj."))
    return [_substitute(key, rules) for key in keys]


def _timm_swin(keys: Sequence[str]) -> list[str]:
    """In timm patches are merged at the beginning of a stage, elsewhere at the end of the one before."""
    return [re.sub(r"^layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", key) for key in keys]


def _timm_flat(keys: Sequence[str]) -> list[str]:
    """Models of timm that are cut into a flat list of stages."""
    return [re.sub(r"^(\w+)\.(\d+)\.", r"\1_\2.", key) for key in keys]


NAMINGS: tuple[Naming, ...] = (_same, _torchvision, _caffe2, _timm_mvit, _timm_swin, _timm_flat)


def _substitute(key: str, rules: Sequence[tuple[str, Any]]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a weight file, by the names they have there; of a folder, those of the member in it."""
    file = path / WEIGHTS if path.is_dir() else path
    if not file.exists():
        raise CheckpointError(f"weights {file} do not exist; give a .pkl, .pth or .safetensors file, or a checkpoint folder")
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    tree = read_pickle(file) if file.suffix == ".pkl" else read_torch(file)
    for name in WRAPPERS:
        if isinstance(tree.get(name), dict):
            tree = tree[name]
    tensors = {key: tensor for key, value in tree.items() if (tensor := _to_tensor(value)) is not None}
    if not tensors:
        found = shorten(map(str, tree)) or "nothing"
        raise CheckpointError(f"{file} holds no tensors but {found}; expected the weights of a backbone")
    return tensors


def read_pickle(path: Path) -> dict[str, Any]:
    """A pickled mapping of NumPy arrays, as detectron2's model zoo has them; a pickle that asks for anything else is refused."""
    try:
        tree = _Arrays(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not read ({error}); expected a mapping of NumPy arrays") from None
    except Exception as error:  # noqa: BLE001 a damaged pickle may raise anything
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {str(error)[:120]}); fetch it again") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} holds a {type(tree).__name__}; expected a mapping of NumPy arrays")
    return tree


class _Arrays(pickle.Unpickler):
    """Builds NumPy arrays and plain containers, and looks nothing else up."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = numpy_makers() | {("collections", "OrderedDict"): OrderedDict, ("_codecs", "encode"): _latin1}
        if (module, name) not in allowed:
            raise CheckpointError(f"it asks for {module}.{name}, which may run code")
        return allowed[module, name]


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """Bytes that Python 2 protocols keep as text."""
    if encoding != "latin1":
        raise CheckpointError(f"it asks for the codec {encoding}")
    return codecs.latin_1_encode(text)[0]


def _to_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        return torch.from_numpy(np.ascontiguousarray(value.astype(value.dtype.newbyteorder("="))))
    return None
