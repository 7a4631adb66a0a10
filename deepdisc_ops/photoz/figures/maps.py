"""A self-organising map: what its cells hold. Glossary: N objects, X x Y cells."""

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
