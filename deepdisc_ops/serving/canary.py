"""The canary: a small sky that an archive carries with what its members made of it when it was packed.

Whoever serves the archive asks the same question before it answers anyone: another library, processor or precision may compute
otherwise without raising anything. The image holds sources on noise like that of the training images. It is asked twice: each
member for the redshifts of the sources' boxes, which does not depend on what it detects and tells who is wrong, and the
ensemble for its catalogue.

Glossary: C bands, H x W pixels, S sources, N objects found, K components.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from scipy.special import ndtr

from deepdisc_ops.errors import ArchiveError
from deepdisc_ops.serving.contents import check_digest, read_contents
from deepdisc_ops.sky.detections import Array
from deepdisc_ops.sky.dust import EbvPlane
from deepdisc_ops.sky.matching import pairwise_iou_candidates

if TYPE_CHECKING:
    from deepdisc_ops.config import InferenceSettings
    from deepdisc_ops.inference.ensemble import Ensemble, Seat

CANARY = "canary.safetensors"
SIDE = 128
ROWS = 5
"""Sources stand on so many rows and columns."""
PEAK_SNR = (3.0, 60.0)
EBV = EbvPlane((0.0, 0.05, 0.02, 0.1))
REDSHIFTS = 400
"""Points at which two densities are compared."""

log = logging.getLogger(__name__)


class Mixture(NamedTuple):
    """Redshift densities: weights, means and sigmas, each (N, K)."""

    weights: Array
    means: Array
    sigmas: Array


@dataclass(frozen=True)
class Answers:
    """What was found, boxes (N, 4) px, scores (N,) and densities, and each member's densities of the S given boxes, by its name."""

    boxes: Array
    scores: Array
    found: Mixture
    given: Mapping[str, Mixture]


@dataclass(frozen=True)
class Canary:
    """Image (C, H, W) nJy, given boxes (S, 4) px, and the answers that are expected."""

    image: NDArray[np.float32]
    boxes: NDArray[np.float32]
    expected: Answers


@dataclass(frozen=True)
class Difference:
    """How far two answers are apart at most: boxes px, scores, cumulative densities, and mean redshifts over 1 + z.

    lost: share of all objects that one of the two lacks; a NaN is as far as can be.
    """

    box_px: float = 0.0
    score: float = 0.0
    density: float = 0.0
    redshift: float = 0.0
    lost: float = 0.0

    def __str__(self) -> str:
        return (
            f"boxes by {self.box_px:.2g} px, scores by {self.score:.2g}, densities by {self.density:.2g}, "
            f"redshifts by {self.redshift:.2g} (1 + z), {100 * self.lost:.0f} % of the objects in one alone"
        )

    def within(self, limit: Difference) -> bool:
        """Whether nothing is farther apart than in ``limit``."""
        return all(getattr(self, field.name) <= getattr(limit, field.name) for field in fields(self))


SAME = Difference(box_px=0.1, score=0.01, density=0.02, redshift=0.002, lost=0.1)
"""Of single precision on processors: sums in another order. Narrow densities shift by a good part of their width."""
ALIKE = Difference(box_px=1.0, score=0.1, density=0.2, redshift=0.03, lost=0.25)
"""Of GPUs and of half precision."""


def make(ensemble: Ensemble) -> Canary:
    """A sky for the ensemble and its answers to it, computed on one thread so that they are the same at every time."""
    image, boxes = draw(len(ensemble.bands), noise(ensemble))
    with _one_thread():
        return Canary(image, boxes, ask(ensemble, image, boxes))


def draw(bands: int, noise: Array) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Gaussian sources of many brightnesses, sizes and colours on white noise (C,) nJy, and their boxes (S, 4) px."""
    rng = np.random.default_rng(20260101)
    sources = ROWS**2
    cell = SIDE / ROWS
    row, column = np.divmod(np.arange(sources), ROWS)
    x, y = (cell * (np.stack([column, row]) + rng.uniform(0.35, 0.65, (2, sources)))).round(3)
    size, axis_ratio = rng.uniform(1.2, 2.5, sources), rng.uniform(0.6, 1.0, sources)
    peak = rng.permutation(np.geomspace(*PEAK_SNR, sources))
    colour = rng.normal(0, 0.5, sources)[:, None] * np.linspace(-1, 1, bands) + rng.normal(0, 0.2, (sources, bands))
    pixel = np.arange(SIDE)
    across = np.exp(-0.5 * ((pixel - x[:, None]) / size[:, None]) ** 2)
    down = np.exp(-0.5 * ((pixel - y[:, None]) / (size * axis_ratio)[:, None]) ** 2)
    light = np.einsum("sc,sy,sx->cyx", peak[:, None] * np.exp(colour), down, across)
    image = noise[:, None, None] * (light + rng.normal(size=light.shape))
    reach = np.stack([size, size * axis_ratio], axis=1) * 2.5
    centres = np.stack([x, y], axis=1) + 0.5
    boxes = np.concatenate([centres - reach, centres + reach], axis=1).clip(0, SIDE)
    return image.astype(np.float32), boxes.astype(np.float32)


def ask(ensemble: Ensemble, image: NDArray[np.float32], boxes: NDArray[np.float32]) -> Answers:
    """What the ensemble finds in the image, and what each of its members makes of the boxes.

    A member that fails is treated as in any window: its error names it, or it is left out from then on.
    """
    found = ensemble.predict(image, EBV)
    given = {seat.name: _given(seat, image, boxes) for seat in ensemble.seats if seat.name not in ensemble.failures}
    return Answers(found.boxes, found.scores, Mixture(found.weights, found.means, found.sigmas), given)


def check(ensemble: Ensemble, folder: Path) -> None:
    """Ask the canary of the unpacked archive ``folder``; `ArchiveError` where the answer is not the expected one.

    Where the ensemble goes on without members that fail, one that answers otherwise is left out like any other. A folder without
    archive.yaml has no canary, and only warns.
    """
    contents = read_contents(folder)
    if contents is None:
        log.warning("%s has no canary: it was made before there were any; build the archive again", folder)
        return
    path = folder / contents.canary.file
    body = path.read_bytes() if path.is_file() else b""
    check_digest(path.name, hashlib.sha256(body).hexdigest() if body else None, contents.files.get(path.name, ""))
    canary = decode(body, str(path))
    compare(ensemble, canary, ask(ensemble, canary.image, canary.boxes))


def compare(ensemble: Ensemble, canary: Canary, answers: Answers) -> None:
    """Hold the ensemble's answers against those expected, as `check` says."""
    expected, limit = canary.expected, tolerance(ensemble)
    for name, mixture in answers.given.items():
        if name not in expected.given:
            raise ArchiveError(f"the canary knows no member {name}, only {', '.join(expected.given)}; build the archive again")
        apart = _densities_apart(expected.given[name], mixture)
        if not apart.within(limit):
            _differs(ensemble, name, apart, limit)
    if ensemble.failures:
        return  # fewer members find other objects
    if not (apart := difference(expected, answers)).within(limit):
        raise ArchiveError(
            f"the ensemble answers its canary otherwise than when it was packed: {apart}; allowed are {limit}; build the "
            "archive on this kind of machine, or serve it with the versions it was built with"
        )


def difference(one: Answers, other: Answers) -> Difference:
    """How far what was found is apart, objects matched by their boxes, or what members make of given ones if that is farther."""
    first, second, iou = pairwise_iou_candidates(one.boxes, other.boxes, 0.5)
    pairs: dict[int, int] = {}
    for a, b in zip(*(index[np.argsort(-iou, kind="stable")].tolist() for index in (first, second)), strict=True):
        if a not in pairs and b not in pairs.values():
            pairs[a] = b
    a, b = np.array(list(pairs), np.int64), np.array(list(pairs.values()), np.int64)
    total = len(one.boxes) + len(other.boxes)
    parts = [
        _densities_apart(Mixture(*(c[a] for c in one.found)), Mixture(*(c[b] for c in other.found))),
        *(_densities_apart(mixture, other.given[name]) for name, mixture in one.given.items() if name in other.given),
    ]
    return Difference(
        box_px=_largest(one.boxes[a] - other.boxes[b]),
        score=_largest(one.scores[a] - other.scores[b]),
        density=max(part.density for part in parts),
        redshift=max(part.redshift for part in parts),
        lost=(total - 2 * len(pairs)) / max(total, 1),
    )


def tolerance(ensemble: Ensemble) -> Difference:
    """How far answers may be apart on the device and in the precision of this ensemble."""
    exact = all(_exact(seat.info.config.inference) for seat in ensemble.seats)
    return SAME if exact and ensemble.seats[0].load().device.type == "cpu" else ALIKE


def encode(canary: Canary) -> bytes:
    """The canary as safetensors, the same bytes for the same canary."""
    expected = canary.expected
    tensors = {"image": canary.image, "boxes": canary.boxes, "found.boxes": expected.boxes, "found.scores": expected.scores}
    for prefix, mixture in (("found", expected.found), *((f"given.{name}", m) for name, m in expected.given.items())):
        tensors |= {f"{prefix}.{column}": values for column, values in mixture._asdict().items()}
    return save({name: np.ascontiguousarray(values, np.float32) for name, values in tensors.items()})


def decode(body: bytes, source: str) -> Canary:
    """The inverse of `encode`; ``source`` is named in the `ArchiveError`."""
    try:
        tensors = load(body)
        names = sorted(name[len("given.") : -len(".means")] for name in tensors if re.fullmatch(r"given\..+\.means", name))
        given = {name: _mixture(tensors, f"given.{name}") for name in names}
        found = Answers(tensors["found.boxes"], tensors["found.scores"], _mixture(tensors, "found"), given)
        return Canary(tensors["image"], tensors["boxes"], found)
    except (SafetensorError, KeyError) as error:
        raise ArchiveError(f"{source} is no canary ({error!r}); build the archive again") from None


def _mixture(tensors: Mapping[str, Array], prefix: str) -> Mixture:
    return Mixture(*(tensors[f"{prefix}.{column}"] for column in Mixture._fields))


def _given(seat: Seat, image: NDArray[np.float32], boxes: NDArray[np.float32]) -> Mixture:
    from deepdisc_ops.inference import window

    answer = window.redshift(seat.load(), image, boxes, EBV)
    return Mixture(answer.weights, answer.means, answer.sigmas)


def _differs(ensemble: Ensemble, name: str, apart: Difference, limit: Difference) -> None:
    """Leave the member out, or say that it answers otherwise."""
    what = (
        f"densities differ by {apart.density:.2g}, redshifts by {apart.redshift:.2g}; allowed are {limit.density}, {limit.redshift}"
    )
    if ensemble.on_failure == "skip" and len(ensemble.failures) + 1 < len(ensemble.seats):
        ensemble.failures[name] = f"its canary is another: {what}"
        log.warning("member %s is left out from now on: its canary is another: %s", name, what)
        return
    raise ArchiveError(
        f"member {name} answers its canary otherwise than when it was packed: {what}; build the archive on this kind of machine, "
        "or serve it with the versions it was built with"
    )


def _densities_apart(one: Mixture, other: Mixture) -> Difference:
    """Densities row by row, whatever the order and number of their components."""
    if not len(one.means) and not len(other.means):
        return Difference()
    if not all(np.isfinite(column).all() for mixture in (one, other) for column in mixture) or len(one.means) != len(other.means):
        return Difference(density=np.inf, redshift=np.inf)
    low, high = zip(_reach(one), _reach(other), strict=True)
    z = np.linspace(min(low), max(high), REDSHIFTS)
    first, second = (_cumulative(mixture, z) for mixture in (one, other))
    means = [(mixture.weights * mixture.means).sum(1) for mixture in (one, other)]
    return Difference(density=_largest(first - second), redshift=_largest((means[0] - means[1]) / (1 + np.abs(means[0]))))


def _reach(mixture: Mixture) -> tuple[float, float]:
    return float((mixture.means - 4 * mixture.sigmas).min()), float((mixture.means + 4 * mixture.sigmas).max())


def _cumulative(mixture: Mixture, z: Array) -> Array:
    """(N, Z) probability below each redshift."""
    weights, means, sigmas = (np.asarray(column, np.float64)[:, :, None] for column in mixture)
    return np.asarray((weights * ndtr((z - means) / sigmas)).sum(1))


def _largest(values: Array) -> float:
    """The largest magnitude; 0 of nothing, infinite where one is no number."""
    largest = float(np.abs(values).max(initial=0.0))
    return largest if np.isfinite(largest) else np.inf


def noise(ensemble: Ensemble) -> Array:
    """Noise (C,) nJy a pixel of the training images, as well as the first member tells."""
    info = ensemble.seats[0].info
    settings = info.config.model.input
    if settings.noise_njy is not None:
        return np.array(settings.noise_njy)
    if info.domain is not None and np.isfinite(info.domain.typical.noise).all():
        return info.domain.typical.noise
    return np.array(settings.std_njy if settings.std_njy is not None else np.ones(len(ensemble.bands)))


def _exact(settings: InferenceSettings) -> bool:
    """Whether a member computes in single precision on a processor."""
    return settings.precision == "float32" or (settings.precision == "auto" and settings.preset == "exact")


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
