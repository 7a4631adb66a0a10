"""Members that are worth most together: greedy forward selection on a split that none of them has seen.

Caruana, Niculescu-Mizil, Crew and Ksikes 2004, "Ensemble selection from libraries of models": starting from nothing, that
candidate is added with which the ensemble's loss falls most. Here the loss is the NLL of the combined density,

    NLL(S) = -1/N sum_n log [ sum_{m in S} w_m p_m(z_n) / sum_{m in S} w_m ],

in which the weights w_m are fixed beforehand, as those of `inference.combine.member_weights` are up to a factor. With
replacement, a member added again counts again, which tunes the weights. Glossary: M candidates, N objects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepdisc_ops.errors import ConfigError, InputError
from deepdisc_ops.sweeps.select import Conditions, SelectedMember, eligible, fetch_member
from deepdisc_ops.tracking import RunRecord, Tracker

Floats = NDArray[np.float64]
Admits = Callable[[Sequence[int], int], bool]
"""Whether a candidate may join those chosen, all by their numbers."""
Progress = Callable[[int, int, str], None]
"""Called with images done, images in all and the run at work."""
IMPROVEMENT = 1e-6
"""Nats per object; an addition that is worth less than this is none."""
ADDITIONS_PER_MEMBER = 20
"""With replacement the weights are multiples of their sum over at most so many additions for each member."""


@dataclass(frozen=True)
class Additions:
    """Candidates by their numbers as they were added, and the NLL of the ensemble after each; numbers recur with replacement."""

    order: tuple[int, ...]
    nll: tuple[float, ...]

    @property
    def members(self) -> tuple[int, ...]:
        """Each candidate once, in the order of its first addition."""
        return tuple(dict.fromkeys(self.order))


@dataclass(frozen=True)
class Greedy:
    """How `select_greedily` goes about it.

    candidates: the best so many by the metric are looked at, 4 for each member when not given; weights: as in
    `EnsembleSettings.weights`; data: the data set, that of the trials when not given.
    """

    candidates: int | None = None
    replacement: bool = False
    weights: Literal["likelihood", "log_likelihood", "uniform"] = "likelihood"
    data: Path | None = None
    split: str = "calibration"
    device: str = "cpu"


@dataclass(frozen=True)
class GreedyChoice:
    """The members with their weights, and how they came to be chosen.

    additions are numbers of ``members``; alone holds the NLL of each member by itself; both are means over ``objects`` gold
    objects of the split.
    """

    members: tuple[SelectedMember, ...]
    additions: Additions
    alone: tuple[float, ...]
    objects: int
    candidates: int


def forward_selection(
    log_density: ArrayLike, k: int, weights: ArrayLike | None = None, *, replacement: bool = False, admits: Admits | None = None
) -> Additions:
    """Choose at most ``k`` of M candidates from their log densities at the truth (M, N), until nothing improves the NLL.

    weights (M,) are positive, equal ones when not given. ``admits`` bars company. Of equal candidates the first is taken.
    """
    density, raw = np.asarray(log_density, np.float64), np.asarray(1.0 if weights is None else weights, np.float64)
    _check(density, raw, k)
    log_weight = np.log(np.broadcast_to(raw, len(density)))
    order: list[int] = []
    nll: list[float] = []
    combined, total = np.full(density.shape[1], -np.inf), -np.inf  # logarithms of both sums
    while len(order) < k * (ADDITIONS_PER_MEMBER if replacement else 1):
        members = list(dict.fromkeys(order))
        again = members if replacement else []
        new = [c for c in range(len(density)) if c not in members and (admits is None or admits(members, c))]
        allowed = sorted([*again, *(new if len(members) < k else [])])
        if not allowed:
            break
        totals = np.logaddexp(total, log_weight[allowed])
        sums = np.logaddexp(combined, log_weight[allowed, None] + density[allowed])
        after = totals - sums.mean(1)
        best = int(after.argmin())
        if nll and after[best] > nll[-1] - IMPROVEMENT:
            break
        order.append(allowed[best])
        nll.append(float(after[best]))
        combined, total = sums[best], totals[best]
    return Additions(tuple(order), tuple(nll))


def select_greedily(
    tracking_uri: str,
    sweep: str,
    k: int,
    conditions: Conditions | None = None,
    how: Greedy | None = None,
    *,
    into: Path,
    progress: Progress | None = None,
) -> GreedyChoice:
    """At most ``k`` trials of ``sweep`` whose combined density suits a split best, that which helps most first.

    Candidates are the best by ``conditions``, all trained on one data set. Checkpoints are found as in `select_members`; the
    candidates' densities are kept in ``into``, so that a call that was interrupted, or asks for another ``k``, does not compute
    them again.
    """
    from deepdisc_ops.inference.combine import member_weights
    from deepdisc_ops.sweeps.densities import log_densities

    how, conditions = how or Greedy(), replace(conditions or Conditions(), one_dataset=True)
    tracker = Tracker(tracking_uri, create=False)
    runs = _candidates(tracker, sweep, k, conditions, how.candidates or 4 * k)
    members = [fetch_member(tracker, run, into) for run in runs]
    weights = member_weights(
        [member.metrics.get("val_nll", np.nan) for member in members], how.weights, [f"run {member.run_id}" for member in members]
    )
    data = how.data or members[0].config.data.path
    density = log_densities(members, data, how.split, cache=into / "densities", device=how.device, progress=progress)
    added = forward_selection(
        density,
        k,
        weights,
        replacement=how.replacement,
        admits=lambda chosen, new: conditions.go_together([runs[i] for i in (*chosen, new)]),
    )
    shares = np.array([added.order.count(i) * weights[i] for i in added.members])
    chosen = [replace(members[i], weight=float(share)) for i, share in zip(added.members, shares / shares.sum(), strict=True)]
    order = tuple(added.members.index(i) for i in added.order)
    alone = tuple(float(-density[i].mean()) for i in added.members)
    return GreedyChoice(tuple(chosen), Additions(order, added.nll), alone, density.shape[1], len(runs))


def _candidates(tracker: Tracker, sweep: str, k: int, conditions: Conditions, count: int) -> list[RunRecord]:
    """The ``count`` best trials, best first; among them ``k`` that go together."""
    if count < k:
        raise ConfigError(f"{count} candidates for {k} members; look at no fewer than {k}, or better {4 * k}")
    ranked, chosen = eligible(tracker, sweep, k, conditions)
    first = (chosen + [run for run in ranked if run not in chosen])[:count]
    return [run for run in ranked if run in first]


def _check(density: Floats, weights: Floats, k: int) -> None:
    if density.ndim != 2 or not density.size:
        raise InputError(f"log densities have shape {density.shape}; expected candidates x objects, at least one of each")
    wrong = np.flatnonzero(~(density < np.inf).all(1))
    if len(wrong):
        raise InputError(f"log densities of candidates {wrong.tolist()} are not all numbers; leave those candidates out")
    if not (weights > 0).all() or weights.shape not in ((), (len(density),)):
        raise ConfigError(f"weights {weights.tolist()} for {len(density)} candidates; give each one that is positive")
    if k < 1:
        raise ConfigError(f"{k} members asked for; at least 1 makes an ensemble")
