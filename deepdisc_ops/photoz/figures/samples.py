"""What was found: completeness against magnitude, and the distribution of redshifts. Glossary: N objects, G grid points."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from deepdisc_ops.errors import InputError
from deepdisc_ops.photoz.figures.style import BLUE, GREY, VERMILION, new_figure


def completeness_by_magnitude(
    magnitude: ArrayLike, found: ArrayLike, *, band: str, limit: float | None = None, width: float = 0.5
) -> Figure:
    """Fraction of true objects (N,) found, in bins of ``width`` mag, with binomial errors and the number in each bin."""
    mag, hit = np.asarray(magnitude, np.float64), np.asarray(found, bool)
    mag, hit = mag[np.isfinite(mag)], hit[np.isfinite(mag)]
    if not mag.size:
        raise InputError(f"no object has a magnitude in {band}; expected at least one")
    first = math.floor(mag.min() / width)
    edges = width * np.arange(first, math.floor(mag.max() / width) + 2)
    total, _ = np.histogram(mag, edges)
    matched, _ = np.histogram(mag[hit], edges)
    filled = total > 0
    centre, share = ((edges[:-1] + edges[1:]) / 2)[filled], matched[filled] / total[filled]
    # Agresti-Coull: an interval that does not vanish at 0 and 1
    middle = (matched[filled] + 0.5) / (total[filled] + 1)
    half = np.sqrt(middle * (1 - middle) / (total[filled] + 1))
    low, high = np.maximum(share - (middle - half).clip(0), 0), np.maximum((middle + half).clip(max=1) - share, 0)
    figure, (axes,) = new_figure(6.4, 4.2)
    counts = axes.twinx()
    counts.bar(centre, total[filled], width=0.92 * width, color="#e6e6e6", zorder=0)
    counts.set_ylabel("true objects", fontsize=10, color=GREY)
    counts.tick_params(labelsize=9, colors=GREY)
    counts.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    counts.spines[["top", "right"]].set_visible(False)
    axes.set_zorder(counts.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.errorbar(centre, share, yerr=np.stack([low, high]), color=BLUE, marker="o", ms=4, lw=1.5, capsize=2)
    axes.axhline(1, color=GREY, lw=0.8, ls=":")
    if limit is not None:
        axes.axvline(limit, color=VERMILION, lw=1.2, ls="--", label=f"{band} = {limit:g}")
        axes.legend(loc="lower left", fontsize=9, framealpha=0.9)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.05), xlabel=f"{band} (AB mag)", ylabel="completeness")
    return figure


def redshift_distribution(z_true: ArrayLike, z_phot: ArrayLike, grid: ArrayLike, stacked: ArrayLike) -> Figure:
    """n(z): of the true redshifts (N,), of the point estimates (N,), and the mean (G,) of the densities on a grid (G,)."""
    true, phot = np.asarray(z_true, np.float64), np.asarray(z_phot, np.float64)
    z, density = np.asarray(grid, np.float64), np.asarray(stacked, np.float64)
    if not true.size or z.shape != density.shape or z.size < 2:
        raise InputError(
            f"{true.size} objects and {density.size} densities on {z.size} redshifts; expected objects, and as many of each"
        )
    bins = int(np.clip(2 * math.sqrt(true.size), 10, 80))
    figure, (axes,) = new_figure(6.4, 4.0)
    borders = (float(z[0]), float(z[-1]))
    width = (borders[1] - borders[0]) / bins
    for values, style in (
        (true, {"histtype": "stepfilled", "color": "#d0d0d0", "label": "true"}),
        (phot, {"histtype": "step", "color": VERMILION, "lw": 1.3, "label": "point estimates"}),
    ):
        axes.hist(values, bins=bins, range=borders, weights=np.full(values.size, 1 / (max(values.size, 1) * width)), **style)
    axes.plot(z, density, color=BLUE, lw=1.8, label="mean of p(z)")
    axes.axvline(float(true.mean()), color=GREY, lw=1, ls=":")
    mean = float(np.trapezoid(z * density, z) / max(np.trapezoid(density, z), 1e-300))
    axes.set_title(f"mean redshift: true {true.mean():.4f}, of p(z) {mean:.4f}", fontsize=10)
    axes.set(xlim=borders, ylim=(0, None), xlabel="redshift", ylabel="n(z)")
    axes.legend(fontsize=9, frameon=False)
    return figure
