"""Where images lie on the sky: centres and corners of records, cells of the sky, and which images overlap.

Positions are ICRS degrees. An image is the quadrangle of its corners; overlaps are judged on the plane that touches the sky at
one of the two centres.

Glossary: N images.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from deepdisc_ops.data.pixels import header_wcs
from deepdisc_ops.data.records import Record
from deepdisc_ops.sky.coordinates import icrs_positions

Floats = NDArray[np.float64]


def footprint(record: Record, pixel_scale: float) -> tuple[tuple[float, float], Floats]:
    """Centre (ra, dec) and corners (4, 2) of a record's image, NaN where nothing tells.

    Without a WCS the centre is the mean position of the objects and the image lies north up.
    """
    width, height = record.width, record.height
    if record.wcs:
        x = np.array([(width - 1) / 2, -0.5, width - 0.5, width - 0.5, -0.5])
        y = np.array([(height - 1) / 2, -0.5, -0.5, height - 0.5, height - 0.5])
        ra, dec = icrs_positions(header_wcs(record.wcs), x, y)
        return (float(ra[0]), float(dec[0])), np.stack([ra[1:], dec[1:]], axis=1)
    known = np.isfinite(record.objects.ra) & np.isfinite(record.objects.dec)
    if not known.any():
        return (np.nan, np.nan), np.full((4, 2), np.nan)
    mean = unit_vectors(record.objects.ra[known], record.objects.dec[known]).mean(axis=0)
    ra0, dec0 = float(np.degrees(np.arctan2(mean[1], mean[0])) % 360), float(np.degrees(np.arctan2(mean[2], np.hypot(*mean[:2]))))
    half = np.array([[1, -1], [-1, -1], [-1, 1], [1, 1]]) * np.array([width, height]) * pixel_scale / 7200
    stretch = max(np.cos(np.radians(dec0)), 1e-6)
    return (ra0, dec0), np.stack([(ra0 + half[:, 0] / stretch) % 360, np.clip(dec0 + half[:, 1], -90, 90)], axis=1)


def unit_vectors(ra: Floats, dec: Floats) -> Floats:
    """(..., 3) directions of positions in degrees."""
    ra, dec = np.radians(ra), np.radians(dec)
    return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=-1)


def sky_cells(centres: Floats, side_arcmin: float) -> NDArray[np.int64]:
    """(N,) number of the cell in which each centre (N, 2) lies: bands of declination, cut into cells of about equal width."""
    side = side_arcmin / 60
    rows = max(1, int(np.ceil(180 / side)))
    row = np.clip(((centres[:, 1] + 90) / side).astype(np.int64), 0, rows - 1)
    columns = np.maximum(1, (360 * np.cos(np.radians((row + 0.5) * side - 90)) / side).astype(np.int64))
    column = np.minimum((centres[:, 0] % 360 / 360 * columns).astype(np.int64), columns - 1)
    return row * np.int64(2**32) + column


def overlapping(corners: Floats, others: Floats, margin_arcsec: float = 0.0) -> NDArray[np.bool_]:
    """(N,) whether an image of corners (N, 4, 2) overlaps any of the others (M, 4, 2)."""
    found = np.zeros(len(corners), bool)
    if not len(corners) or not len(others):
        return found
    one, two = unit_vectors(corners[..., 0], corners[..., 1]), unit_vectors(others[..., 0], others[..., 1])
    middle, other_middle = _normalised(one.mean(axis=1)), _normalised(two.mean(axis=1))
    reach = np.linalg.norm(one - middle[:, None], axis=2).max() + np.linalg.norm(two - other_middle[:, None], axis=2).max()
    tree = cKDTree(other_middle)
    for first in range(0, len(corners), 1024):
        part = slice(first, first + 1024)
        near = tree.query_ball_point(middle[part], reach + 1e-12)
        left = np.repeat(np.arange(len(corners))[part], [len(found) for found in near])
        right = np.concatenate([np.asarray(numbers, np.intp) for numbers in near]) if len(left) else np.zeros(0, np.intp)
        touching = _quadrangles_overlap(one[left], two[right], middle[left], np.radians(margin_arcsec / 3600))
        found[left[touching]] = True
    return found


def _normalised(vectors: Floats) -> Floats:
    normalised: Floats = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return normalised


def _quadrangles_overlap(one: Floats, two: Floats, middle: Floats, margin: float) -> NDArray[np.bool_]:
    """Separating axes of pairs of convex quadrangles (N, 4, 3) on the planes that touch the sky at ``middle`` (N, 3)."""
    pole = np.where(np.abs(middle[:, 2:]) < 0.9, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]])
    east = _normalised(np.cross(pole, middle))
    basis = np.stack([east, np.cross(middle, east)], axis=2)
    one, two = one @ basis, two @ basis
    touching = np.ones(len(one), bool)
    for shape in (one, two):
        edges = np.roll(shape, -1, axis=1) - shape
        normals = _normalised(np.stack([edges[..., 1], -edges[..., 0]], axis=2) + 1e-300)
        for side in range(4):
            a, b = (one @ normals[:, side, :, None])[..., 0], (two @ normals[:, side, :, None])[..., 0]
            touching &= (a.max(axis=1) > b.min(axis=1) - margin) & (b.max(axis=1) > a.min(axis=1) - margin)
    return touching
