"""Several members as one predictor: their objects matched, their mixtures summed.

An ensemble on disk is a folder with ensemble.yaml and one safetensors file a member; a model archive carries the
same folder. Glossary: M members, N objects, K components a member.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

import deepdisc_ops
from deepdisc_ops.errors import ArchiveError, CheckpointError
from deepdisc_ops.inference.engine import Member
from deepdisc_ops.model.weights import (
    WEIGHTS,
    MemberInfo,
    copy_weights,
    info_as_dict,
    info_from_dict,
    load_network,
    read_info,
    staged,
)
from deepdisc_ops.sky.detections import Array, Detections, Flag
from deepdisc_ops.sky.dust import EbvPlane
from deepdisc_ops.sky.matching import match_boxes
from deepdisc_ops.sky.tiling import Window, plan, reconcile

FORMAT = 1
DESCRIPTION = "ensemble.yaml"
MATCH_IOU = 0.3  # JADES paper


@dataclass(frozen=True)
class Ensemble:
    """M members with their weights w_m (summing to 1); all share bands and pixel scale."""

    members: tuple[Member, ...]
    weights: tuple[float, ...]
    names: tuple[str, ...]

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Ensemble:
        """Read an ensemble folder; a member whose file changed is named in the `ArchiveError`."""
        description = read_description(folder)
        members = [_load_checked(folder, entry, device) for entry in description["members"]]
        entries = description["members"]
        return cls(tuple(members), tuple(float(e["weight"]) for e in entries), tuple(e["name"] for e in entries))

    @property
    def bands(self) -> tuple[str, ...]:
        """Order of the input planes."""
        return self.members[0].config.model.bands

    @property
    def pixel_scale(self) -> float | None:
        """Arcsec per pixel of the images the members were trained on."""
        return self.members[0].config.model.pixel_scale

    @property
    def components(self) -> int:
        """Components of a combined mixture, M x K."""
        return sum(member.components for member in self.members)

    @property
    def stride(self) -> int:
        """Window origins belong on multiples of this."""
        return math.lcm(*(member.stride for member in self.members))

    def predict(self, data: NDArray[np.float32], ebv: EbvPlane, mask: NDArray[np.bool_] | None = None) -> Detections:
        """Objects of one window (C, H, W) nJy in the order of `bands`, tiled inside where it is larger than a tile.

        ``mask`` (H, W) is True where data are invalid; boxes are in pixels of the window.
        """
        height, width = data.shape[1:]
        inference = self.members[0].config.inference
        tiles = plan(width, height, inference.tile, inference.overlap, self.stride)
        found = [self._predict_tile(data, tile.window, ebv) for tile in tiles]
        objects = reconcile(tiles, found, width, height)
        return objects if mask is None else objects.flagged(_touches(mask, objects.boxes), Flag.MASKED)

    def _predict_tile(self, data: NDArray[np.float32], window: Window, ebv: EbvPlane) -> Detections:
        height, width = data.shape[1:]
        tile = data[:, window.y0 : window.y1, window.x0 : window.x1]
        per_member = [
            member.predict(tile, lambda x, y: ebv.at(x + window.x0, y + window.y0, width, height)) for member in self.members
        ]
        return combine(per_member, self.weights).shift(window.x0, window.y0)


def combine(per_member: Sequence[Detections], weights: Sequence[float]) -> Detections:
    """The objects that every member found, p(z) = sum_m w_m p_m(z) (JADES paper, section 4.2).

    Objects are matched one-to-one by IoU >= 0.3 to those of the first member; boxes, scores and E(B-V) are the
    members' means, the class is the first member's.
    """
    if len(per_member) == 1:
        return per_member[0]
    index = np.arange(len(per_member[0]))
    partners = [index]
    for other in per_member[1:]:
        matches = match_boxes(per_member[0].boxes, other.boxes, MATCH_IOU)
        partner = np.full(len(per_member[0]), -1)
        partner[matches.index1] = matches.index2
        partners.append(partner)
    common = np.flatnonzero(np.all([p >= 0 for p in partners], axis=0))
    aligned = [d.select(p[common]) for d, p in zip(per_member, partners, strict=True)]
    return Detections(
        boxes=_mean([d.boxes for d in aligned]),
        scores=_mean([d.scores for d in aligned]),
        classes=aligned[0].classes,
        weights=np.concatenate([np.float32(w) * d.weights for w, d in zip(weights, aligned, strict=True)], axis=1),
        means=np.concatenate([d.means for d in aligned], axis=1),
        sigmas=np.concatenate([d.sigmas for d in aligned], axis=1),
        ebv=_mean([d.ebv for d in aligned]),
        n_members=np.full(len(common), len(per_member), np.int32),
        flags=np.bitwise_or.reduce([d.flags for d in aligned]),
    )


def _mean(arrays: Sequence[Array]) -> Array:
    return np.asarray(np.mean(arrays, axis=0), np.float32)


def _touches(mask: NDArray[np.bool_], boxes: Array) -> NDArray[np.bool_]:
    """Whether each box holds a masked pixel, by a summed-area table."""
    area = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    area[1:, 1:] = mask.cumsum(0, dtype=np.int64).cumsum(1)
    x0, y0 = np.floor(boxes[:, :2]).astype(int).T
    x1, y1 = np.ceil(boxes[:, 2:]).astype(int).T
    return np.asarray(area[y1, x1] - area[y0, x1] - area[y1, x0] + area[y0, x0] > 0)


def member_weights(nll: Sequence[float]) -> list[float]:
    """w_m = exp(-mean validation NLL of member m), normalised over members."""
    best = min(nll)
    raw = [math.exp(best - value) for value in nll]
    return [value / sum(raw) for value in raw]


def write_ensemble(
    folder: Path, checkpoints: Sequence[Path], run_ids: Sequence[str | None] | None = None, *, half: bool = False
) -> None:
    """Gather checkpoint folders into an ensemble folder with their weights, checksums and run ids.

    ``half`` stores the weights in 16 bits, half the size; they are used in 32 bits again.
    """
    if not checkpoints:
        raise CheckpointError("an ensemble needs at least one checkpoint folder; found none")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / DESCRIPTION).exists():
        raise ArchiveError(f"{folder} holds other files and would be replaced; name a new folder or an ensemble's")
    infos = [read_info(path) for path in checkpoints]
    _check_alike(checkpoints, infos)
    weights = member_weights([info.metrics["val_nll"] for info in infos])
    with staged(folder) as staging:
        _write(staging, checkpoints, infos, weights, run_ids, half)


def _write(
    folder: Path,
    checkpoints: Sequence[Path],
    infos: Sequence[MemberInfo],
    weights: Sequence[float],
    run_ids: Sequence[str | None] | None,
    half: bool,
) -> None:
    entries = []
    for i, (path, info) in enumerate(zip(checkpoints, infos, strict=True)):
        file = f"member-{i}.safetensors"
        copy_weights(path / WEIGHTS, folder / file, half=half)
        run_id = run_ids[i] if run_ids else None
        entry = {"name": f"member-{i}", "file": file, "sha256": sha256(folder / file), "weight": weights[i], "run_id": run_id}
        member = info_as_dict(info)
        member["config"]["data"]["path"] = info.config.data.path.name  # an ensemble leaves the machine: no paths of it
        entries.append(entry | member)
    model = infos[0].config.model
    description = {
        "format": FORMAT,
        "package_version": deepdisc_ops.__version__,
        "bands": list(model.bands),
        "pixel_scale": model.pixel_scale,
        "members": entries,
    }
    (folder / DESCRIPTION).write_text(yaml.safe_dump(description, sort_keys=False))


def read_description(folder: Path) -> dict[str, Any]:
    """ensemble.yaml as plain types, its format checked."""
    path = folder / DESCRIPTION
    if not path.exists():
        raise ArchiveError(f"{folder} is no ensemble: {DESCRIPTION} is missing; build one with `deepdisc-ops archive build`")
    description: dict[str, Any] = yaml.safe_load(path.read_text())
    if not isinstance(description, dict) or description.get("format") != FORMAT or not description.get("members"):
        raise ArchiveError(f"{path} is not of format {FORMAT}; build the archive again with this version")
    return description


def digest(folder: Path) -> str:
    """What names an ensemble in a catalogue's provenance: the sha256 of its description, which holds its members'."""
    return f"sha256:{sha256(folder / DESCRIPTION)}"


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_checked(folder: Path, entry: dict[str, Any], device: str) -> Member:
    path = folder / entry["file"]
    if not path.exists():
        raise ArchiveError(f"member {entry['name']}: {entry['file']} is missing from {folder}; build the archive again")
    if sha256(path) != entry["sha256"]:
        raise ArchiveError(
            f"member {entry['name']}: {entry['file']} is damaged (checksum differs); copy or build the archive again"
        )
    keys = ("config", "metrics", "step", "package_version", "git_commit")
    config = info_from_dict({key: entry.get(key) for key in keys}, f"{folder / DESCRIPTION}, {entry['name']}").config
    return Member(load_network(path, config, device), config, device)


def _check_alike(checkpoints: Sequence[Path], infos: Sequence[MemberInfo]) -> None:
    for path, info in zip(checkpoints, infos, strict=True):
        for key in ("bands", "classes", "pixel_scale"):
            mine, first = getattr(info.config.model, key), getattr(infos[0].config.model, key)
            if mine != first:
                raise CheckpointError(f"{path} has {key} {mine}, {checkpoints[0]} has {first}; an ensemble shares them")
        if not math.isfinite(info.metrics.get("val_nll", math.nan)):
            raise CheckpointError(f"{path} has no finite val_nll, which weighs the member; train it further before building")
        if not (path / WEIGHTS).exists():
            raise CheckpointError(f"{path} lacks {WEIGHTS}; fetch or train the member again")
