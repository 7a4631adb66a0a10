"""Which objects resemble those with spectra: a self-organising map of colours (JADES paper, its ``spec-rep`` flag).

The paper's map: 32 x 32 cells, rectangular, Gaussian neighbourhood of 5 cells, learning rate 0.5, begun along the principal
components, of a magnitude and the colours of neighbouring bands of all objects that have all bands; trained by MiniSom once, and
stored. `spec_rep` is the number of training spectra in an object's cell. Features are scaled to unit variance before (the paper
does not say).

Glossary: N objects, F features, X x Y cells. Cells are numbered x * Y + y; -1 is an object without all features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from astropy.table import Table
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from deepdisc_ops.errors import CatalogError, SetupError

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

SIDE, NEIGHBOURHOOD, LEARNING_RATE = 32, 5.0, 0.5
STEPS = 100_000
NOWHERE = -1
LIGHTEST = 1e-12
"""Variance, relative to the largest, below which a feature says nothing."""


@dataclass(frozen=True)
class SelfOrganisingMap:
    """Cells (X, Y, F) in features scaled by ``offset`` and ``scale`` (F,), whose names are ``features``."""

    cells: Floats
    offset: Floats
    scale: Floats
    features: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """X, Y."""
        return self.cells.shape[0], self.cells.shape[1]

    def assign(self, features: ArrayLike) -> Indices:
        """The cell (N,) nearest to each object's features (N, F), `NOWHERE` where one is not finite."""
        table = _table(features, len(self.features))
        cell = np.full(len(table), NOWHERE, np.int64)
        whole = np.isfinite(table).all(1)
        if whole.any():
            tree = cKDTree(self.cells.reshape(-1, len(self.features)))
            cell[whole] = tree.query((table[whole] - self.offset) / self.scale)[1]
        return cell

    def occupation(self, cell: ArrayLike) -> Indices:
        """Number of objects in each cell (X, Y)."""
        places = np.asarray(cell, np.int64)
        return np.bincount(places[places >= 0], minlength=math.prod(self.shape)).reshape(self.shape)

    def spec_rep(self, cell: ArrayLike, cell_of_spectra: ArrayLike) -> Indices:
        """Training spectra (N,) in the cells of objects (N,); 0 for objects without a cell."""
        places = np.asarray(cell, np.int64)
        return np.where(places >= 0, self.occupation(cell_of_spectra).ravel()[places], 0)

    def save(self, path: Path) -> None:
        """Write a .npz of arrays and text, replacing it at once."""
        partial = path.with_name(f".{path.name}.part")
        with partial.open("wb") as file:
            names = np.array(json.dumps(self.features))
            np.savez_compressed(file, cells=self.cells, offset=self.offset, scale=self.scale, features=names)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> SelfOrganisingMap:
        """Read what `save` wrote; raises CatalogError."""
        try:
            with np.load(path, allow_pickle=False) as file:
                names = tuple(str(name) for name in json.loads(str(file["features"])))
                cells, offset, scale = (np.asarray(file[name], np.float64) for name in ("cells", "offset", "scale"))
                found = cls(cells, offset, scale, names)
        except (OSError, KeyError, ValueError, BadZipFile) as error:
            raise CatalogError(f"{path} cannot be read as a self-organising map ({error}); train it anew") from None
        if found.cells.ndim != 3 or not len(names) == found.cells.shape[2] == found.offset.size == found.scale.size:
            raise CatalogError(f"{path} holds {found.cells.shape} cells for {len(names)} features; train the map anew")
        return found


@dataclass(frozen=True)
class Advice:
    """What spectra would help most: cells in the order of need.

    cell, x, y; objects and spectra in it; missing: how many more spectra make it as well sampled as the whole, in proportion to
    its objects; scatter: that of the spectra's redshifts in it (sigma_IQR of z / (1 + median z)), NaN for fewer than 4.
    """

    cell: Indices
    x: Indices
    y: Indices
    objects: Indices
    spectra: Indices
    missing: Indices
    scatter: Floats

    def as_table(self) -> Table:
        """The same as a table."""
        return Table({name: getattr(self, name) for name in ("cell", "x", "y", "objects", "spectra", "missing", "scatter")})


def colour_features(magnitude: ArrayLike) -> Floats:
    """(N, C) features from magnitudes (N, C), the reddest band's magnitude and the colours: redder less bluer, as in the paper."""
    m = np.asarray(magnitude, np.float64)
    if m.ndim != 2 or m.shape[1] < 2:
        raise CatalogError(f"magnitudes have the shape {m.shape}; expected (objects, bands) with two bands at least")
    return np.concatenate([m[:, -1:], m[:, 1:] - m[:, :-1]], axis=1)


def colour_names(bands: Sequence[str]) -> tuple[str, ...]:
    """Names of `colour_features`."""
    return (bands[-1], *(f"{red} - {blue}" for blue, red in pairwise(bands)))


def train_map(
    features: ArrayLike, names: Sequence[str], *, side: int = SIDE, steps: int = STEPS, seed: int = 0
) -> SelfOrganisingMap:
    """Train a map of ``side`` x ``side`` cells on objects (N, F), those with a feature that is not finite left out.

    ``steps`` objects are shown, drawn at random; the same seed gives the same map.
    """
    table = _table(features, len(names))
    table = table[np.isfinite(table).all(1)]
    if len(table) < 2 or len(names) < 2:
        raise CatalogError(f"{len(table)} objects with all of {len(names)} features; a map needs two of each at least")
    offset, scale = table.mean(0), table.std(0)
    dull = [name for name, width in zip(names, scale, strict=True) if not width > LIGHTEST * max(scale.max(), 1)]
    if dull:
        raise CatalogError(f"the features {dull} are the same for all objects; leave them out")
    scaled = (table - offset) / scale
    network = _minisom()(
        side, side, len(names), sigma=min(NEIGHBOURHOOD, side), learning_rate=LEARNING_RATE, random_seed=seed,
        neighborhood_function="gaussian", topology="rectangular",
    )  # fmt: skip
    network.pca_weights_init(scaled)
    network.train(scaled, steps, random_order=True)
    return SelfOrganisingMap(np.array(network.get_weights(), np.float64), offset, scale, tuple(names))


def advise(
    som: SelfOrganisingMap, cell: ArrayLike, cell_of_spectra: ArrayLike, redshift: ArrayLike, *, wanted: int | None = None
) -> Advice:
    """Which cells need spectra: those with the most objects for each of their spectra first, empty cells left out.

    ``cell`` (N,) of all objects, ``cell_of_spectra`` and ``redshift`` (M,) of those with spectra. ``wanted`` is the number of
    spectra there shall be in all; without it, as many as there are.
    """
    spectra_cell, z = np.asarray(cell_of_spectra, np.int64), np.asarray(redshift, np.float64)
    objects, spectra = som.occupation(cell).ravel(), som.occupation(spectra_cell).ravel()
    total = max(int(spectra.sum()), 1) if wanted is None else wanted
    share = objects / max(int(objects.sum()), 1)
    missing = np.maximum(np.ceil(total * share).astype(np.int64) - spectra, 0)
    scatter = np.full(objects.size, np.nan)
    order = np.argsort(spectra_cell, kind="stable")
    starts = np.searchsorted(spectra_cell[order], np.arange(objects.size + 1))
    for index in np.flatnonzero(spectra >= 4):
        here = z[order[starts[index] : starts[index + 1]]]
        low, middle, high = np.quantile(here, (0.25, 0.5, 0.75))
        scatter[index] = (high - low) / 1.349 / (1 + middle)
    filled = np.flatnonzero(objects)
    need = filled[np.lexsort((filled, -objects[filled], -objects[filled] / (spectra[filled] + 1)))]
    x, y = np.divmod(need, som.shape[1])
    return Advice(need, x, y, objects[need], spectra[need], missing[need], scatter[need])


def _table(features: ArrayLike, count: int) -> Floats:
    table = np.asarray(features, np.float64)
    if table.ndim != 2 or table.shape[1] != count:
        raise CatalogError(f"features have the shape {table.shape}; expected (objects, {count})")
    return table


def _minisom() -> Any:
    try:
        from minisom import MiniSom  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise SetupError("the package minisom, which trains maps, is missing; run: pip install 'deepdisc-ops[som]'") from None
    return MiniSom
