"""What members say of objects they were not trained on: log densities at the true redshifts of a split, in forced mode.

Every member looks at the true boxes, so that each has a density for every object, whether it would detect it or not.
Glossary: M members, N gold objects (those that the redshift head is trained for) of the split.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from deepdisc_ops.config import TrainingConfig
from deepdisc_ops.data.loader import label
from deepdisc_ops.data.pixels import read_pixels
from deepdisc_ops.data.records import Record
from deepdisc_ops.data.store import Dataset, open_dataset
from deepdisc_ops.errors import CatalogError, TrainingError
from deepdisc_ops.inference import window
from deepdisc_ops.inference.engine import Member
from deepdisc_ops.inference.ensemble import sha256
from deepdisc_ops.model.weights import DESCRIPTION, WEIGHTS
from deepdisc_ops.photoz.mixture import GaussianMixture
from deepdisc_ops.sky.dust import EbvPlane
from deepdisc_ops.sweeps.greedy import Floats, Progress
from deepdisc_ops.sweeps.select import SelectedMember

_Tell = Callable[[int], None]
"""Called with images done of one member."""


@dataclass(frozen=True)
class _Gold:
    """Gold objects of one image: boxes (n, 4) px cut at its border, true redshifts (n,), and their median E(B-V) in mag."""

    record: Record
    boxes: NDArray[np.float32]
    redshift: NDArray[np.float32]
    ebv: float


def log_densities(
    members: Sequence[SelectedMember],
    dataset: Path,
    split: str = "calibration",
    *,
    cache: Path,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Floats:
    """Log p(z_true) (M, N) of the members' mixtures, on the whole line and at one E(B-V) an image, as in validation.

    A member's answers are kept in ``cache`` and found there as long as its weights and the truth are the same. Raises
    CatalogError for a split without gold objects, TrainingError for members that call other objects gold than the first does.
    """
    data = open_dataset(dataset)
    every = [_gold(data, split, member.config) for member in members]
    images, rows = len(every[0]), []
    for number, (member, gold) in enumerate(zip(members, every, strict=True)):
        _check_same(member, gold, members[0], every[0])

        def tell(done: int, before: int = number * images, run: str = member.run_id[:8]) -> None:
            if progress:
                progress(before + done, images * len(members), run)

        rows.append(_cached(member, gold, cache, device, tell))
    return np.stack(rows)


def _gold(data: Dataset, split: str, config: TrainingConfig) -> list[_Gold]:
    """The images of a split with gold objects."""
    images = []
    for record in data.records(split):
        labels = label(record.objects, data.info, config.model, config.data)
        size = np.array([record.width, record.height])
        inside = ((labels.centres >= 0) & (labels.centres < size)).all(1)
        gold = inside & np.isfinite(labels.redshift)
        if gold.any():
            boxes = np.clip(labels.boxes[gold], 0, np.tile(size, 2)).astype(np.float32)
            images.append(_Gold(record, boxes, labels.redshift[gold], float(np.median(labels.ebv))))
    if not images:
        raise CatalogError(f"{data.path} has no gold object in split {split!r}; name another split")
    return images


def _check_same(member: SelectedMember, gold: Sequence[_Gold], first: SelectedMember, its: Sequence[_Gold]) -> None:
    mine, others = (np.concatenate([image.redshift for image in images]) for images in (gold, its))
    if not np.array_equal(mine, others):
        raise TrainingError(
            f"run {member.run_id} calls {len(mine)} objects gold, run {first.run_id} {len(others)}, so they do not compare: "
            "model.redshift_head.gold_limit, .stars or model.classes differ; select among trials that share them"
        )


def _cached(member: SelectedMember, gold: Sequence[_Gold], cache: Path, device: str, tell: _Tell) -> Floats:
    """The member's row, read if it is there and computed if it is not."""
    key, path = _key(member, gold), cache / f"{member.run_id}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["key"]) == key:
                tell(len(gold))
                return np.asarray(kept["log_density"], np.float64)
    row = _computed(member, gold, device, tell)
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = cache / f".{member.run_id}.{os.getpid()}.npz"
    np.savez(unfinished, key=key, log_density=row)
    unfinished.replace(path)
    return row


def _computed(member: SelectedMember, gold: Sequence[_Gold], device: str, tell: _Tell) -> Floats:
    network = Member.load(member.checkpoint, device)
    parts = []
    for done, image in enumerate(gold, start=1):
        pixels = read_pixels(image.record, network.config.model.bands, with_wcs=False)
        seen = window.redshift(network, pixels.data, image.boxes, EbvPlane.constant(image.ebv))
        mixture = GaussianMixture.from_arrays(seen.weights, seen.means, seen.sigmas)
        parts.append(mixture.log_prob(torch.from_numpy(image.redshift).double()).numpy())
        tell(done)
    row = np.concatenate(parts)
    if not np.isfinite(row).all():
        raise TrainingError(
            f"run {member.run_id} gives densities that are no numbers; leave it out by a condition or train it again"
        )
    return row


def _key(member: SelectedMember, gold: Sequence[_Gold]) -> str:
    """What a row depends on: the weights, their description, and the truth."""
    digest = hashlib.sha256(sha256(member.checkpoint / WEIGHTS).encode())
    digest.update((member.checkpoint / DESCRIPTION).read_bytes())
    for image in gold:
        digest.update(image.record.key.encode() + image.boxes.tobytes() + image.redshift.tobytes())
        digest.update(np.float64(image.ebv).tobytes())
    return digest.hexdigest()
