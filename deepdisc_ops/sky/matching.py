"""Which object of one list is which of another: by position on the sky, or by overlap of boxes.

Every matching is one-to-one: candidate pairs are taken from the closest (or best overlapping) on, and a pair counts if
neither of its objects has been taken. Exchanging the lists exchanges the indices and changes nothing else.
Glossary: N1, N2 objects in the lists, M matches. An empty list is an ordinary value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from deepdisc_ops.errors import CatalogError

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

ARCSEC = math.pi / 648000
# Shifts (east, north) in arcsec that make every match a chance one: larger than galaxies, smaller than fields.
CHANCE_SHIFTS = ((10.0, 0.0), (0.0, 13.0), (-16.0, 0.0), (0.0, -20.0))


@dataclass(frozen=True)
class Matches:
    """M pairs on the sky in the order of the first list: index1, index2 (M,), separation_arcsec (M,)."""

    index1: Indices
    index2: Indices
    separation_arcsec: Floats

    def __len__(self) -> int:
        return len(self.index1)


@dataclass(frozen=True)
class BoxMatches:
    """M pairs of boxes in the order of the first list: index1, index2 (M,), iou (M,)."""

    index1: Indices
    index2: Indices
    iou: Floats

    def __len__(self) -> int:
        return len(self.index1)


def match_on_sky(ra1: ArrayLike, dec1: ArrayLike, ra2: ArrayLike, dec2: ArrayLike, radius_arcsec: float) -> Matches:
    """One-to-one matches within ``radius_arcsec``, by increasing separation; positions in degrees."""
    return _match_directions(_directions(ra1, dec1, "first"), _directions(ra2, dec2, "second"), radius_arcsec)


def same_place(ra: ArrayLike, dec: ArrayLike, radius_arcsec: float) -> tuple[Indices, Indices]:
    """All pairs i < j (P,), (P,) of one list that are at most ``radius_arcsec`` apart, in the order of i; positions in degrees."""
    places = _directions(ra, dec, "first")
    pairs = cKDTree(places).query_pairs(_chord(radius_arcsec), output_type="ndarray") if len(places) else np.zeros((0, 2), np.int64)
    first, second = pairs.astype(np.int64).T
    order = np.lexsort((second, first))
    return first[order], second[order]


def match_in_plane(points1: ArrayLike, points2: ArrayLike, radius: float) -> tuple[Indices, Indices]:
    """Indices of the one-to-one matches of finite points (N, 2) within ``radius``, by increasing distance."""
    first, second = (np.asarray(points, np.float64).reshape(-1, 2) for points in (points1, points2))
    if not len(first) or not len(second):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    i, j, distance = _pairs_within(first, second, radius, norm=2)
    accepted = _one_to_one(i, j, distance)
    return i[accepted], j[accepted]


def match_boxes(boxes1: ArrayLike, boxes2: ArrayLike, min_iou: float) -> BoxMatches:
    """One-to-one matches of boxes (N, 4) that overlap with at least ``min_iou``, by decreasing IoU."""
    i, j, iou = pairwise_iou_candidates(boxes1, boxes2, min_iou)
    accepted = _one_to_one(i, j, -iou)
    return BoxMatches(i[accepted], j[accepted], iou[accepted])


def pairwise_iou_candidates(boxes1: ArrayLike, boxes2: ArrayLike, min_iou: float) -> tuple[Indices, Indices, Floats]:
    """All pairs (i, j) of boxes x0, y0, x1, y1 whose intersection over union is at least ``min_iou``, and that IoU.

    Boxes without area match nothing. Pairs come in the order of i, then j.
    """
    if not 0 < min_iou <= 1:
        raise ValueError(f"min_iou is {min_iou}; expected a number above 0 and at most 1")
    first, second = _boxes(boxes1, "first"), _boxes(boxes2, "second")
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for i, j in _overlap_candidates(first, second, min_iou):
        iou = _iou(first[i], second[j])
        enough = iou >= min_iou
        found.append((i[enough], j[enough], iou[enough]))
    one, other, ious = (np.concatenate(columns) for columns in zip(*found, strict=True))
    in_order = np.lexsort((other, one))
    return one[in_order], other[in_order], ious[in_order]


def chance_matches(ra1: ArrayLike, dec1: ArrayLike, ra2: ArrayLike, dec2: ArrayLike, radius_arcsec: float) -> float:
    """Fraction of the first list that `match_on_sky` would match if the lists had nothing to do with each other.

    The first list is moved by each of `CHANCE_SHIFTS`, what leaves the rectangle (east, north) of the second is left
    out, and the matched fractions are averaged. NaN if nothing stays inside (a field of a few arcsec).
    """
    first, second = _directions(ra1, dec1, "first"), _directions(ra2, dec2, "second")
    if not len(first) or not len(second):
        return math.nan if not len(first) else 0.0
    east, north = _tangent_basis(second)
    field = np.stack([second @ east, second @ north], 1)
    matched, kept = 0, 0
    for shift_east, shift_north in CHANCE_SHIFTS:
        moved = first + ARCSEC * (shift_east * east + shift_north * north)
        moved /= np.linalg.norm(moved, axis=1, keepdims=True)
        place = np.stack([moved @ east, moved @ north], 1)
        inside = np.all((place >= field.min(0)) & (place <= field.max(0)), axis=1)
        matched += len(_match_directions(moved[inside], second, radius_arcsec))
        kept += int(inside.sum())
    return matched / kept if kept else math.nan


def centre_separation_arcsec(ra1: ArrayLike, dec1: ArrayLike, ra2: ArrayLike, dec2: ArrayLike) -> float:
    """Distance in arcsec between the mean directions of two lists, neither of them empty."""
    centres = [_directions(*positions).mean(0) for positions in ((ra1, dec1, "first"), (ra2, dec2, "second"))]
    cross, dot = np.linalg.norm(np.cross(*centres)), np.dot(*centres)
    return float(np.arctan2(cross, dot) / ARCSEC)


def _directions(ra: ArrayLike, dec: ArrayLike, which: str) -> Floats:
    """Unit vectors (N, 3) of positions in degrees."""
    longitude, latitude = np.radians(np.asarray(ra, np.float64)), np.radians(np.asarray(dec, np.float64))
    if longitude.shape != latitude.shape or longitude.ndim != 1:
        raise CatalogError(
            f"the {which} list has ra of shape {longitude.shape} and dec of {latitude.shape}; expected two equal columns"
        )
    bad = int((~np.isfinite(longitude) | ~np.isfinite(latitude)).sum())
    if bad:
        raise CatalogError(f"{bad} of {len(longitude)} positions in the {which} list are not finite; remove those rows")
    return np.stack([np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], 1)


def _tangent_basis(directions: Floats) -> tuple[Floats, Floats]:
    """Unit vectors east and north at the mean direction; at a pole, any two."""
    centre = directions.mean(0)
    east = np.array([-centre[1], centre[0], 0.0])
    east = east / np.linalg.norm(east) if np.linalg.norm(east) > 0 else np.array([0.0, 1.0, 0.0])
    north = np.cross(centre, east)
    return east, north / np.linalg.norm(north)


def _match_directions(first: Floats, second: Floats, radius_arcsec: float) -> Matches:
    if not radius_arcsec > 0:
        raise ValueError(f"radius_arcsec is {radius_arcsec}; expected a positive number of arcsec")
    if not len(first) or not len(second):
        return Matches(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    i, j, distance = _pairs_within(first, second, _chord(radius_arcsec), norm=2)
    accepted = _one_to_one(i, j, distance)
    return Matches(i[accepted], j[accepted], 2 * np.arcsin(np.minimum(distance[accepted] / 2, 1)) / ARCSEC)


def _chord(radius_arcsec: float) -> float:
    """Distance between two unit vectors that are ``radius_arcsec`` apart."""
    return 2 * math.sin(min(radius_arcsec * ARCSEC, math.pi) / 2)


def _pairs_within(first: Floats, second: Floats, distance: float, norm: float) -> tuple[Indices, Indices, Floats]:
    """Indices of all pairs of points at most ``distance`` apart, and their distances."""
    pairs = cKDTree(first).sparse_distance_matrix(cKDTree(second), distance, p=norm, output_type="ndarray")
    return pairs["i"].astype(np.int64), pairs["j"].astype(np.int64), pairs["v"].astype(np.float64)


def _one_to_one(i: Indices, j: Indices, cost: Floats) -> Indices:
    """Positions of the pairs a greedy choice by increasing cost accepts, in the order of i.

    Ties are broken by the indices in a way that does not care which list is the first.
    """
    taken1, taken2, accepted = set(), set(), []
    order = np.lexsort((np.maximum(i, j), np.minimum(i, j), cost))
    for position, a, b in zip(order.tolist(), i[order].tolist(), j[order].tolist(), strict=True):
        if a not in taken1 and b not in taken2:
            taken1.add(a)
            taken2.add(b)
            accepted.append(position)
    chosen = np.array(accepted, np.int64)
    return chosen[np.argsort(i[chosen])]


def _boxes(boxes: ArrayLike, which: str) -> Floats:
    array = np.asarray(boxes, np.float64)
    if array.size == 0:
        return np.zeros((0, 4))
    if array.ndim != 2 or array.shape[1] != 4:
        raise CatalogError(f"the {which} boxes have shape {array.shape}; expected (N, 4): x0, y0, x1, y1")
    bad = int((~np.isfinite(array)).any(1).sum())
    if bad:
        raise CatalogError(f"{bad} of {len(array)} of the {which} boxes are not finite; remove those rows")
    return array


def _overlap_candidates(first: Floats, second: Floats, min_iou: float) -> Iterator[tuple[Indices, Indices]]:
    """Pairs that hold all with IoU >= ``min_iou`` and few others.

    IoU >= t needs sides whose ratios are above t and centres closer than (1 - t) times the larger side, along x as
    along y. So boxes are grouped by octaves of their longer side, and groups searched with a radius of their own: one
    huge box does not make all others expensive.
    """
    groups1, groups2 = _octaves(first), _octaves(second)
    for octave1, index1 in groups1.items():
        centres1 = (first[index1, :2] + first[index1, 2:]) / 2
        for octave2, index2 in groups2.items():
            largest_ratio = 2.0 ** (1 - abs(octave1 - octave2))
            if largest_ratio < min_iou:
                continue
            radius = (1 - min_iou) * 2.0 ** (max(octave1, octave2) + 1) * (1 + 1e-9) + 1e-9
            i, j, _ = _pairs_within(centres1, (second[index2, :2] + second[index2, 2:]) / 2, radius, norm=np.inf)
            yield index1[i], index2[j]


def _octaves(boxes: Floats) -> dict[int, Indices]:
    """Indices of the boxes that have an area, by the octave of their longer side."""
    sides = boxes[:, 2:] - boxes[:, :2]
    solid = np.flatnonzero(sides.min(1, initial=np.inf) > 0)
    octave = np.floor(np.log2(sides[solid].max(1, initial=0))).astype(np.int64)
    return {int(value): solid[octave == value] for value in np.unique(octave)}


def _iou(first: Floats, second: Floats) -> Floats:
    """Intersection over union of boxes (M, 4), pair by pair."""
    overlap = np.minimum(first[:, 2:], second[:, 2:]) - np.maximum(first[:, :2], second[:, :2])
    intersection = overlap.clip(0).prod(1)
    areas = (first[:, 2:] - first[:, :2]).prod(1) + (second[:, 2:] - second[:, :2]).prod(1)
    return np.asarray(intersection / (areas - intersection))
