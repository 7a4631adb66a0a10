"""Fractions of objects: completeness, purity, classes, blends. Glossary: N true objects, M matches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from deepdisc_ops.errors import CatalogError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """A fraction of n objects and its standard error, the binomial one (which a bootstrap of ones and zeros estimates)."""

    value: float
    error: float
    n: int


@dataclass(frozen=True)
class ClassShares:
    """Completeness and purity of one class among matched objects; None where the class was not there, or never given."""

    name: str
    completeness: Share | None
    purity: Share | None


def share(part: int, n: int, what: str) -> Share:
    """``part`` of ``n`` objects, of which there must be one; ``what`` they are stands in the error."""
    if n == 0:
        raise CatalogError(f"there are no {what}; expected at least one to take a fraction of")
    value = part / n
    return Share(value, math.sqrt(value * (1 - value) / n), n)


def completeness(sample: ArrayLike, matched_truth: Indices) -> Share:
    """Matched fraction of the true objects that ``sample`` (N,) bool picks; ``matched_truth``: indices (M,) into N."""
    wanted = np.asarray(sample, bool)
    found = np.zeros(wanted.size, bool)
    found[matched_truth] = True
    return share(int((found & wanted).sum()), int(wanted.sum()), "true objects in the sample")


def purity(n_catalog: int, matched_catalog: Indices) -> Share:
    """Fraction of ``n_catalog`` objects that are real: ``matched_catalog`` (M,) are the indices of those matched."""
    return share(np.unique(matched_catalog).size, n_catalog, "objects in the catalogue")


def class_shares(
    true_class: ArrayLike, given_class: ArrayLike, names: tuple[str, ...] = ("galaxy", "star")
) -> tuple[ClassShares, ...]:
    """Completeness and purity of each class, over the classes (M,) of matched objects, indices into ``names``."""
    true, given = np.asarray(true_class), np.asarray(given_class)
    if true.shape != given.shape:
        raise CatalogError(f"there are {true.size} true and {given.size} given classes; expected one for each")
    found = []
    for index, name in enumerate(names):
        right, is_it, called = (int(np.sum(mask)) for mask in ((true == index) & (given == index), true == index, given == index))
        found.append(
            ClassShares(name, share(right, is_it, name) if is_it else None, share(right, called, name) if called else None)
        )
    return tuple(found)


def blends_recognised(x: ArrayLike, y: ArrayLike, radius: float, matched: ArrayLike) -> Share | None:
    """Fraction of blends each of whose objects was matched to one of its own; None without blends.

    A blend is a group of objects (N,) each within ``radius`` of another of the group; x, y in the unit of the radius. ``matched``
    (N,) bool, of a one-to-one matching.
    """
    points, hit = np.stack([np.asarray(x, np.float64), np.asarray(y, np.float64)], axis=1), np.asarray(matched, bool)
    if not len(points):
        return None
    pairs = cKDTree(points).query_pairs(radius, output_type="ndarray")
    if not len(pairs):
        return None
    links = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(len(points), len(points)))
    _, group = connected_components(links, directed=False)
    size, seen = np.bincount(group), np.bincount(group, weights=hit)
    blend = size > 1
    return share(int((seen[blend] == size[blend]).sum()), int(blend.sum()), "blends")
