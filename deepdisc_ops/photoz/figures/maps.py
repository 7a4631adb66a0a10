"""Maps of many dimensions: cells of a self-organising one, and features in a plane. Glossary: N objects, X x Y cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from deepdisc_ops.errors import InputError
from deepdisc_ops.photoz.figures.style import new_figure, plain_ticks

if TYPE_CHECKING:
    from deepdisc_ops.photoz.representation import SelfOrganisingMap

Floats = NDArray[np.float64]


def map_of_cells(som: SelfOrganisingMap, cell: ArrayLike, redshift: ArrayLike, cell_of_spectra: ArrayLike) -> Figure:
    """Objects in each cell, their median redshift (N,; NaN: unknown), and the spectra in each cell (spec-rep)."""
    places, z = np.asarray(cell, np.int64), np.asarray(redshift, np.float64)
    if places.shape != z.shape:
        raise InputError(f"there are {z.size} redshifts for {places.size} cells; expected one for each object")
    figure, panels = new_figure(12.6, 4.2, columns=3)
    panel = (
        (som.occupation(places).astype(float), "objects", "viridis", True),
        (_medians(places, z, som.shape), "median redshift", "cividis", False),
        (som.occupation(cell_of_spectra).astype(float), "training spectra", "viridis", True),
    )
    for axes, (values, label, colours, logarithmic) in zip(panels, panel, strict=True):
        _cells(axes, values, label, colours, logarithmic)
    return figure


def map_of_features(embedding: ArrayLike, redshift: ArrayLike, magnitude: ArrayLike, band: str) -> Figure:
    """Objects in two dimensions (N, 2) of their features, coloured by redshift and by magnitude in ``band``, each (N,)."""
    x, colours = np.asarray(embedding, np.float64), [np.asarray(values, np.float64) for values in (redshift, magnitude)]
    if x.ndim != 2 or x.shape[1] != 2 or any(values.shape != (len(x),) for values in colours):
        raise InputError(f"an embedding of shape {x.shape} with {colours[0].size} redshifts; expected (N, 2), and one for each")
    figure, panels = new_figure(10.4, 4.6, columns=2)
    for axes, values, (label, scale) in zip(
        panels, colours, (("redshift", "viridis"), (f"{band} (AB mag)", "cividis")), strict=True
    ):
        low, high = np.nanpercentile(values, (1, 99)) if np.isfinite(values).any() else (0.0, 1.0)
        dots = axes.scatter(
            x[:, 0], x[:, 1], c=values, s=max(2.0, min(20.0, 4e4 / max(len(x), 1))), cmap=scale, vmin=low, vmax=high, lw=0
        )
        dots.set_rasterized(True)
        axes.set(xlabel="first dimension", ylabel="second dimension", xticks=[], yticks=[])
        axes.figure.colorbar(dots, ax=axes, label=label, fraction=0.046, pad=0.03)
    return figure


def _medians(places: NDArray[np.int64], z: Floats, shape: tuple[int, int]) -> Floats:
    """Median redshift (X, Y) of the objects in each cell, NaN where there are none."""
    known = (places >= 0) & np.isfinite(z)
    order = np.lexsort((z[known], places[known]))
    where, value = places[known][order], z[known][order]
    found = np.full(shape[0] * shape[1], np.nan)
    filled, first, count = np.unique(where, return_index=True, return_counts=True)
    found[filled] = (value[first + (count - 1) // 2] + value[first + count // 2]) / 2
    return found.reshape(shape)


def _cells(axes: Axes, values: Floats, label: str, colours: str, logarithmic: bool) -> None:
    shown = np.ma.masked_invalid(np.where(values > 0, values, np.nan) if logarithmic else values)
    top = float(shown.max()) if shown.count() else 1.0
    norm = LogNorm(1, max(top, 10)) if logarithmic else Normalize(0, max(top, 0.1))
    axes.set_facecolor("#eeeeee")
    image = axes.imshow(shown.T, origin="lower", cmap=colours, norm=norm, interpolation="nearest")
    axes.set(xlabel="cell x", ylabel="cell y")
    axes.set_title(f"{label}; grey: none", fontsize=10)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.ax.tick_params(labelsize=8)
    if logarithmic:
        plain_ticks(bar.ax.yaxis)
