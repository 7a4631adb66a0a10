"""Groups of galaxies: which galaxies share one, and where its members lie about its centre.

A group is a run of neighbours in redshift of a larger sky, so that its members lie at one distance and yet have, taken together,
the magnitudes and redshifts of all galaxies.

Glossary: N galaxies, P galaxies of the larger sky (the pool).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

SIZES = np.arange(3, 61)
"""Numbers of members a group may have; n occurs with probability proportional to n^-2."""

HALF_RADIUS_KPC = 200.0
"""Radius of the sphere that holds half the members of an untruncated Hernquist (1990) profile."""

INNER_SHARE = 0.8
"""The profile is cut where it holds this share of its members, at 0.7 Mpc."""

MINIMUM_POOL = 20000


def pool_size(expected: float) -> int:
    """Galaxies of the larger sky from which ``expected`` members come; enough that a group spans little in redshift."""
    return max(MINIMUM_POOL, int(4 * expected))


def draw_groups(redshift: Floats, expected: float, rng: np.random.Generator) -> tuple[NDArray[np.intp], Integers]:
    """Members (N,), positions in the pool of redshifts (P,), and the number (N,) of the group of each, counted from 0.

    N is ``expected`` on average; it scatters more than a Poisson number, since whole groups come or do not.
    """
    weights = 1.0 / SIZES**2
    sizes = rng.choice(SIZES, size=len(redshift) // SIZES[0] + 1, p=weights / weights.sum())
    sizes = np.diff(np.minimum(np.cumsum(sizes), len(redshift)), prepend=0)  # the last group gets what is left
    sizes = sizes[sizes >= SIZES[0]]
    first = np.cumsum(sizes) - sizes
    kept = np.flatnonzero(rng.uniform(size=len(sizes)) < expected / max(len(redshift), 1))
    group = np.repeat(np.arange(len(kept)), sizes[kept])
    within = np.arange(len(group)) - np.repeat(np.cumsum(sizes[kept]) - sizes[kept], sizes[kept])
    members = np.argsort(redshift)[first[kept][group] + within]
    return members, group.astype(np.int64)


def draw_offsets(kpc_per_arcsec: Floats, rng: np.random.Generator) -> Floats:
    """(N, 2) arcsec x, y of members from the centres of their groups: a Hernquist profile seen in projection."""
    root = np.sqrt(rng.uniform(0.0, INNER_SHARE, len(kpc_per_arcsec)))
    radius = HALF_RADIUS_KPC / (1 + np.sqrt(2.0)) * root / (1 - root)
    direction = rng.standard_normal((len(radius), 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return (radius / kpc_per_arcsec)[:, None] * direction[:, :2]
