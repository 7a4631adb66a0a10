"""What several members found in the same pixels as one list of objects: matched one-to-one, their mixtures summed.

Nothing depends on the order of the members. Glossary: M members, D detections of all members together, N objects,
K components of a member's mixture, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.config import EnsembleSettings
from deepdisc_ops.errors import CheckpointError, ConfigError
from deepdisc_ops.photoz.reduction import reduce_components
from deepdisc_ops.sky.detections import MASK_SIDE, Array, Detections
from deepdisc_ops.sky.matching import pairwise_iou_candidates

DIVERGENCE = "mix_divergence"
"""Column of a reduced mixture: nats by which it differs at most from the sum of all members' mixtures."""

Rows = NDArray[np.int64]
"""(N, M) index of an object among the D detections of all members, one member after the other; -1: that member lacks it."""


def combine(per_member: Sequence[Detections], weights: Sequence[float], settings: EnsembleSettings) -> Detections:
    """The objects that all, most or any of the members found, by decreasing score; ``weights`` are positive.

    An object's p(z) is sum_m w_m p_m(z) over the members that found it, their weights brought to a sum of 1 (JADES paper,
    section 4.2); the components of the others have weight 0. Boxes, scores, masks and E(B-V) are means over those members, the
    class has the most of their weighted scores, further columns are those of the member with the best score.
    """
    rows = same_objects(per_member, settings.min_iou)
    needed = {"union": 1, "majority": len(per_member) // 2 + 1, "intersection": len(per_member)}[settings.match]
    merged = merge(per_member, rows[(rows >= 0).sum(1) >= needed], weights, settings)
    return merged.select(_canonical_order(merged))


def combine_aligned(per_member: Sequence[Detections], weights: Sequence[float], settings: EnsembleSettings) -> Detections:
    """The same objects in the same order as seen by every member, as of given boxes; the order stays."""
    n = len(per_member[0])
    return merge(per_member, np.arange(n * len(per_member)).reshape(len(per_member), n).T, weights, settings)


def same_objects(per_member: Sequence[Detections], min_iou: float) -> Rows:
    """`Rows` of every object that some member found; each detection belongs to one object, each object to a member once.

    Pairs of detections are joined from the best IoU down. Groups are joined if all of their boxes overlap with all of the
    other's by ``min_iou``: two neighbours do not become one object because some member saw both as one.
    """
    boxes = np.concatenate([part.boxes for part in per_member])
    member_of = np.repeat(np.arange(len(per_member)), [len(part) for part in per_member])
    rank = np.argsort(_by_score_and_place(boxes, np.concatenate([part.scores for part in per_member])))
    first, second, iou = pairwise_iou_candidates(boxes, boxes, min_iou)
    between = member_of[first] < member_of[second]
    first, second, iou = first[between], second[between], iou[between]
    order = np.lexsort((np.maximum(rank[first], rank[second]), np.minimum(rank[first], rank[second]), -iou))
    groups = _link(list(zip(first[order].tolist(), second[order].tolist(), strict=True)), member_of.tolist())
    rows = np.full((len(groups), len(per_member)), -1, np.int64)
    for row, group in zip(rows, groups, strict=True):
        row[list(group)] = list(group.values())
    return rows


def _link(pairs: Sequence[tuple[int, int]], member_of: Sequence[int]) -> list[dict[int, int]]:
    """Groups of detections, each as a mapping of member to detection, from ``pairs`` in the order of preference."""
    group_of = [{member: i} for i, member in enumerate(member_of)]
    overlapping = set(pairs)
    for a, b in pairs:
        one, other = group_of[a], group_of[b]
        if one.keys() & other.keys():
            continue
        if all((min(i, j), max(i, j)) in overlapping for i in one.values() for j in other.values()):
            one |= other
            for i in other.values():
                group_of[i] = one
    return list({id(group): group for group in group_of}.values())


def merge(per_member: Sequence[Detections], rows: Rows, weights: Sequence[float], settings: EnsembleSettings) -> Detections:
    """The objects of ``rows``, their columns as `combine` says, in the order of ``rows``."""
    if not all(weight > 0 for weight in weights):
        raise ConfigError(f"weights of members {tuple(weights)} are not all positive; leave out members that should not count")
    everything = Detections.concatenate([_without_mixture(part) for part in per_member])
    there = rows >= 0
    shares = np.where(there, np.asarray(weights, np.float64), 0.0)
    shares /= shares.sum(1, keepdims=True)
    boxes, scores, ebv = (_mean(column[rows], there) for column in (everything.boxes, everything.scores, everything.ebv))
    every_score = np.where(there, everything.scores[rows], -np.inf)
    best = np.take_along_axis(rows, every_score.argmax(1)[:, None], 1)[:, 0]
    mixture, bound = _mixture(per_member, rows, shares, settings)
    return Detections(
        boxes=boxes,
        scores=scores,
        classes=_vote(everything.classes[rows], shares * np.where(there, everything.scores[rows], 0)),
        **mixture,
        ebv=ebv,
        n_members=np.where(there, everything.n_members[rows], 0).sum(1).astype(np.int32),
        flags=np.bitwise_or.reduce(np.where(there, everything.flags[rows], 0), axis=1).astype(np.int32),
        masks=None if everything.masks is None else _mean_masks(everything.masks, everything.boxes, rows, boxes),
        extra={name: column[best] for name, column in everything.extra.items()} | bound,
    )


def _mixture(
    per_member: Sequence[Detections], rows: Rows, shares: Array, settings: EnsembleSettings
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Columns weights, means, sigmas (N, K of all members, or as many as asked for), and the bound of a reduction."""
    starts = np.cumsum([0, *map(len, per_member)])
    columns: dict[str, list[Array]] = {"weights": [], "means": [], "sigmas": []}
    for m, part in enumerate(per_member):
        there = rows[:, m] >= 0
        for (name, blocks), missing in zip(columns.items(), (0, 0, 1), strict=True):
            block = np.full((len(rows), part.weights.shape[1]), missing, np.float64)
            block[there] = getattr(part, name)[rows[there, m] - starts[m]]
            blocks.append(block)
        columns["weights"][m] *= shares[:, [m]]
    whole = {name: np.concatenate(blocks, axis=1) for name, blocks in columns.items()}
    if settings.components is None:
        return {name: column.astype(np.float32) for name, column in whole.items()}, {}
    limit = math.inf if settings.max_divergence is None else settings.max_divergence
    reduced = reduce_components(**whole, components=settings.components, max_divergence=limit)._asdict()
    bound = reduced.pop("bound")
    return {name: column.astype(np.float32) for name, column in reduced.items()}, {DIVERGENCE: bound.astype(np.float32)}


def _without_mixture(part: Detections) -> Detections:
    none = part.weights[:, :0]
    return replace(part, weights=none, means=none, sigmas=none)


def _mean(values: Array, there: NDArray[np.bool_]) -> Array:
    """Mean over the members (N, M, ...) that are ``there`` (N, M)."""
    there = there.reshape(there.shape + (1,) * (values.ndim - 2))
    return np.asarray(np.where(there, values.astype(np.float64), 0).sum(1) / there.sum(1), np.float32)


def _vote(classes: Array, votes: Array) -> Array:
    """The class (N,) with the most ``votes`` (N, M), the first of equals."""
    ballot = np.zeros((len(classes), int(classes.max(initial=0)) + 1))
    np.add.at(ballot, (np.arange(len(classes))[:, None], classes), votes)
    return ballot.argmax(1).astype(np.int32)


def _mean_masks(masks: Array, own_boxes: Array, rows: Rows, boxes: Array) -> Array:
    """Masks (D, 28, 28) of ``own_boxes`` (D, 4) averaged over the ``boxes`` (N, 4): linear in between, zero outside of a box."""
    total = np.zeros((len(rows), MASK_SIDE, MASK_SIDE), np.float32)
    for m in range(rows.shape[1]):
        there = rows[:, m] >= 0
        index = rows[there, m]
        across, down = (_resampling(own_boxes[index][:, axis::2], boxes[there][:, axis::2]) for axis in (0, 1))
        total[there] += down @ masks[index].astype(np.float32) @ across.transpose(0, 2, 1)
    return np.rint(total / (rows >= 0).sum(1)[:, None, None]).astype(np.uint8)


def _resampling(old: Array, new: Array) -> NDArray[np.float32]:
    """(n, 28 of the new, 28 of the old) weights that bring a mask's cells from one extent (n, 2) of an axis to another."""
    cell = np.arange(MASK_SIDE, dtype=np.float32)
    place = new[:, :1] + (cell + 0.5) / MASK_SIDE * (new[:, 1:] - new[:, :1])
    place = (place - old[:, :1]) / (old[:, 1:] - old[:, :1]) * MASK_SIDE - 0.5
    inside = np.abs(place + 0.5 - MASK_SIDE / 2) <= MASK_SIDE / 2
    near = np.clip(1 - np.abs(np.clip(place, 0, MASK_SIDE - 1)[:, :, None] - cell), 0, None)
    return np.asarray(near * inside[:, :, None], np.float32)


def _canonical_order(found: Detections) -> Array:
    return _by_score_and_place(found.boxes, found.scores)


def _by_score_and_place(boxes: Array, scores: Array) -> Array:
    """Indices by decreasing score; equals by the left, lower, right and upper edge of their boxes."""
    return np.lexsort((*boxes.T[::-1], -scores))


def member_weights(
    nll: Sequence[float], how: str | Sequence[float] = "likelihood", names: Sequence[str] | None = None
) -> list[float]:
    """w_m, normalised over the members, from their mean validation NLL as `EnsembleSettings.weights` says.

    ``likelihood``: exp(-NLL), the geometric mean of p(z_true); ``log_likelihood``: -NLL, where it is positive for all (the
    JADES paper can be read either way); ``uniform``; or the weights themselves. ``names`` are the members' in errors.
    """
    names = names or [f"member {m}" for m in range(len(nll))]
    if not isinstance(how, str):
        if len(how) != len(nll):
            raise ConfigError(f"weights has {len(how)} values for {len(nll)} members; give one for each, in their order")
        raw = [float(value) for value in how]
    elif how == "uniform" or len(nll) == 1:  # a single member, perhaps imported and never validated, is all there is
        raw = [1.0] * len(nll)
    else:
        raw = _from_likelihood(nll, how, names)
    return [value / sum(raw) for value in raw]


def _from_likelihood(nll: Sequence[float], how: str, names: Sequence[str]) -> list[float]:
    for name, value in zip(names, nll, strict=True):
        if not math.isfinite(value):
            raise CheckpointError(f"{name} has no finite val_nll, which weighs the member; train it further or set other weights")
        if how == "log_likelihood" and value >= 0:
            raise ConfigError(f"{name} has a log likelihood of {-value:.3g}, which is no weight; set weights to 'likelihood'")
    if how == "log_likelihood":
        return [-value for value in nll]
    return [max(math.exp(min(nll) - value), np.finfo(np.float64).tiny) for value in nll]
