"""Redshifts and colours of real survey photometry: the cosmoDC2 galaxies that pz-rail-base ships for training.

A painted galaxy takes redshift and colours from a lender of nearly its own i magnitude, moved part of the way to one of the
lender's neighbours in redshift, magnitude and colours, so that no sky is made of copies. Noisy colours, and those of bands in which
the lender was not detected, are first combined with what the neighbours show (empirical Bayes), and then drawn anew each time.
Galaxies fainter than the file reaches (i = 25.3) take their redshift from p(z | i) and their colours from the faintest lenders
at that redshift: colours do not change further with magnitude.

Glossary: N painted galaxies, M lenders, C bands (u g r i z y), K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from deepdisc_ops.data.surveys import Survey, example_data, to_njy
from deepdisc_ops.errors import ConfigError

Floats = NDArray[np.float64]
Part = Literal["all", "train", "test"]

FILE = "test_dc2_training_9816.hdf5"
BANDS = ("u", "g", "r", "i", "z", "y")
REFERENCE = BANDS.index("i")
TRAIN_SHARE = 0.7
"""Share of the lenders in the part "train"; the rest is "test"."""

NEIGHBOURS = 6
"""A lender's colours may move towards this many neighbours."""

PRIOR_NEIGHBOURS = 30
"""As many neighbours tell what a noisy colour should be."""

WINDOW = 20
"""A lender is drawn among this many to either side of the place of the wanted magnitude (or redshift)."""

FAINT_LENDERS = 24.3
"""Lenders fainter than this i magnitude stand for the galaxies that the file does not reach."""

LEAST_SCATTER = 0.03
"""Galaxies of one redshift and one colour differ in the others by at least this share of the flux."""

UNDETECTED = 90.0
"""Magnitudes above this stand for a galaxy that was not detected in the band."""


@dataclass(frozen=True)
class Lenders:
    """M real galaxies in order of i magnitude.

    identity (M,) int64; magnitude (M,) in i; redshift (M,); colours (M, C) band minus i, and scatter (M, C) their uncertainty, mag;
    redness (M,) rank in g - i among the galaxies of like redshift, 0 to 1; neighbours (M, K) positions;
    faint: positions of the lenders fainter than `FAINT_LENDERS`, in order of redshift.
    """

    identity: NDArray[np.int64]
    magnitude: Floats
    redshift: Floats
    colours: Floats
    scatter: Floats
    redness: Floats
    neighbours: NDArray[np.intp]
    faint: NDArray[np.intp]


@dataclass(frozen=True)
class Painted:
    """What N galaxies look like: redshift (N,), colours (N, C) band minus i, redness (N,) as in `Lenders`."""

    redshift: Floats
    colours: Floats
    redness: Floats


def check_survey(survey: Survey) -> None:
    """Raise ConfigError unless the survey has the bands of the photometry."""
    if survey.name != "lsst":
        raise ConfigError(f"colours 'dc2' are photometry of LSST, the survey is {survey.name!r}: use colours 'templates' for it")


def in_part(identity: NDArray[np.int64], part: Part) -> NDArray[np.bool_]:
    """Which galaxies belong to a part: a fixed hash of the identity (Knuth's multiplicative) decides."""
    share = (identity.astype(np.uint64) * np.uint64(2654435761) % np.uint64(2**32)).astype(np.float64) / 2**32
    if part == "all":
        return np.ones(len(identity), bool)
    return share < TRAIN_SHARE if part == "train" else share >= TRAIN_SHARE


@cache
def lenders(part: Part) -> Lenders:
    """The galaxies of a part, read and cleaned once per process."""
    with h5py.File(str(example_data("testdata", FILE))) as file:
        table = file["photometry"]
        identity = np.asarray(table["id"], np.int64)
        redshift = np.asarray(table["redshift"], np.float64)
        magnitudes = np.stack([np.asarray(table[f"mag_{band}_lsst"], np.float64) for band in BANDS], axis=1)
        errors = np.stack([np.asarray(table[f"mag_err_{band}_lsst"], np.float64) for band in BANDS], axis=1)
    chosen = np.flatnonzero(in_part(identity, part))
    order = chosen[np.argsort(magnitudes[chosen, REFERENCE], kind="stable")]
    magnitude, redshift = magnitudes[order, REFERENCE], redshift[order]
    colours, scatter = _cleaned(magnitudes[order], errors[order], redshift)
    near = cKDTree(_features(redshift, magnitude, colours)).query(_features(redshift, magnitude, colours), NEIGHBOURS + 1)[1]
    faint = np.flatnonzero(magnitude > FAINT_LENDERS)
    return Lenders(
        identity=identity[order],
        magnitude=magnitude,
        redshift=redshift,
        colours=colours,
        scatter=scatter,
        redness=_rank_within(colours[:, BANDS.index("g")], redshift),
        neighbours=near[:, 1:],
        faint=faint[np.argsort(redshift[faint], kind="stable")],
    )


def _features(redshift: Floats, magnitude: Floats, colours: Floats) -> Floats:
    """Coordinates in which a distance of 1 is a clear difference: 0.03 in log(1 + z), 0.3 mag in i, 0.1 mag in colour."""
    steps = -np.diff(colours, axis=1)
    return np.column_stack([np.log1p(redshift) / 0.03, magnitude / 0.3, steps / 0.1])


def _cleaned(magnitudes: Floats, errors: Floats, redshift: Floats) -> tuple[Floats, Floats]:
    """Colours (M, C) band minus i, and their scatter, of galaxies with magnitudes and errors (M, C).

    With f a flux in units of that in i, s its error, m and t mean and true scatter of f among the nearest galaxies in redshift and
    the well measured g r i z, the estimate is m + (f - m) t^2 / (t^2 + s^2), uncertain by t s / sqrt(t^2 + s^2). A galaxy that was
    not detected in a band counts as f = 0 with the median error of the faintest tenth.
    """
    reference = to_njy(magnitudes[:, [REFERENCE]])
    seen = magnitudes < UNDETECTED
    flux = np.where(seen, to_njy(magnitudes), 0.0) / reference
    error = np.where(seen, flux * errors * np.log(10.0) / 2.5, np.nan) * reference
    error = np.where(seen, error, np.nanmedian(error[-len(error) // 10 :], axis=0)) / reference
    features = _features(redshift, magnitudes[:, REFERENCE], magnitudes[:, 1:5])
    near = cKDTree(features).query(features, PRIOR_NEIGHBOURS)[1]
    mean, spread = flux[near].mean(axis=1), flux[near].var(axis=1)
    true = np.maximum(spread - (error**2)[near].mean(axis=1), (LEAST_SCATTER * mean) ** 2)
    estimate = np.maximum(mean + (flux - mean) * true / (true + error**2), 0.1 * mean)
    scatter = np.sqrt(true * error**2 / (true + error**2)) / estimate
    colours, scatter = -2.5 * np.log10(estimate), np.minimum(2.5 / np.log(10.0) * scatter, 0.5)
    colours[:, REFERENCE], scatter[:, REFERENCE] = 0.0, 0.0
    return colours, scatter


def _rank_within(colour: Floats, redshift: Floats, window: int = 200) -> Floats:
    """Rank (0 to 1) of each colour among the galaxies of nearest redshift."""
    order = np.argsort(redshift, kind="stable")
    rank = np.empty(len(order))
    for start in range(0, len(order), window):
        members = order[start : start + window]
        rank[members] = (np.argsort(np.argsort(colour[members])) + 0.5) / len(members)
    return rank


def paint(
    source: Lenders,
    magnitude: Floats,
    faint_redshifts: Callable[[Floats], Floats],
    redder: float,
    rng: np.random.Generator,
) -> Painted:
    """Redshift and colours for galaxies of given i magnitudes (N,).

    faint_redshifts draws the redshifts of galaxies fainter than the lenders. Of two candidate lenders, the redder for its redshift
    is taken with probability ``redder``.
    """
    count, known = len(magnitude), magnitude <= source.magnitude[-1]
    wanted = np.zeros(count)
    wanted[~known] = faint_redshifts(magnitude[~known])
    places = np.where(
        known,
        np.searchsorted(source.magnitude, magnitude),
        np.searchsorted(source.redshift[source.faint], wanted),
    )
    length = np.where(known, len(source.magnitude), len(source.faint))
    half = np.minimum(np.minimum(places, length - 1 - places).clip(0) + 3, WINDOW)
    candidates = places + rng.integers(-half, half + 1, (2, count))
    candidates = np.clip(candidates, 0, length - 1)
    candidates = np.where(known, candidates, source.faint[np.minimum(candidates, len(source.faint) - 1)])
    higher = np.argmax(source.redness[candidates], axis=0)
    lender = candidates[np.where(rng.uniform(size=count) < redder, higher, 1 - higher), np.arange(count)]
    return _interpolated(source, lender, wanted, known, rng)


def _interpolated(
    source: Lenders, lender: NDArray[np.intp], wanted: Floats, known: NDArray[np.bool_], rng: np.random.Generator
) -> Painted:
    """Lenders moved up to half the way to a neighbour; the faint (not ``known``) keep their redshift, which p(z | i) gave."""
    neighbour = source.neighbours[lender, rng.integers(0, source.neighbours.shape[1], len(lender))]
    share = rng.uniform(0.0, 0.5, len(lender))

    def moved(values: Floats) -> Floats:
        weight = share.reshape(-1, *[1] * (values.ndim - 1))
        return (1 - weight) * values[lender] + weight * values[neighbour]

    colours = moved(source.colours) + source.scatter[lender] * rng.standard_normal((len(lender), len(BANDS)))
    return Painted(np.where(known, moved(source.redshift), wanted), colours, moved(source.redness))
