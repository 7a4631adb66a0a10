"""Whole densities against truth. Glossary: N objects, n examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from deepdisc_ops.errors import InputError
from deepdisc_ops.photoz.figures.style import BLACK, BLUE, ORANGE, SKY_BLUE, VERMILION, colour_of, new_figure, note, style_of
from deepdisc_ops.photoz.metrics import coverage, pit_ks

if TYPE_CHECKING:
    from deepdisc_ops.photoz.mixture import GaussianMixture


def pit_figure(pit: ArrayLike) -> Figure:
    """PIT values (N,) as a histogram with the 2-sigma band of a uniform sample, and as quantile against quantile."""
    values = np.sort(np.asarray(pit, np.float64))
    ks = pit_ks(values)
    bins = int(np.clip(values.size // 20, 5, 50))
    expected = values.size / bins
    spread = 2 * math.sqrt(expected * (1 - 1 / bins)) / expected
    figure, (histogram, quantiles) = new_figure(9.4, 4.2, columns=2)
    histogram.axhspan(1 - spread, 1 + spread, color=ORANGE, alpha=0.3, lw=0, label="uniform, ±2σ")
    histogram.axhline(1, color=BLACK, lw=1, ls="--")
    histogram.hist(values, bins=bins, range=(0, 1), weights=np.full(values.size, 1 / expected), histtype="step", color=BLUE, lw=1.5)
    histogram.set(xlim=(0, 1), ylim=(0, None), xlabel="PIT = CDF(true redshift)", ylabel="density")
    histogram.set_title(f"{values.size} objects", fontsize=10)
    histogram.legend(loc="lower center", fontsize=8, framealpha=0.9)
    uniform = (np.arange(values.size) + 0.5) / values.size
    quantiles.plot([0, 1], [0, 1], color=BLACK, lw=1, ls="--")
    quantiles.plot(uniform, values, color=BLUE, lw=1.8)
    quantiles.set(
        xlim=(0, 1), ylim=(0, 1), xlabel="quantile of the uniform distribution", ylabel="quantile of the PIT", aspect="equal"
    )
    quantiles.set_title(f"KS distance {ks:.4f}", fontsize=10)
    return figure


def example_densities(mixture: GaussianMixture, z_true: ArrayLike, z_mode: ArrayLike, titles: Sequence[str] = ()) -> Figure:
    """Redshift densities of n mixtures cut at z = 0, a panel each, with the true redshift (NaN: none) and the mode."""
    true, mode = np.asarray(z_true, np.float64), np.asarray(z_mode, np.float64)
    if not len(mixture):
        raise InputError("no objects to draw the densities of; choose at least one")
    columns = min(3, len(mixture))
    rows = math.ceil(len(mixture) / columns)
    figure, panels = new_figure(3.4 * columns, 2.6 * rows, columns, rows)
    widest = mixture.quantiles((0.001, 0.999)).numpy()
    for i, axes in enumerate(panels[: len(mixture)]):
        low, high = (float(f(np.r_[widest[i], true[i] if np.isfinite(true[i]) else mode[i]])) for f in (np.min, np.max))
        margin = 0.08 * (high - low)
        grid = np.union1d(np.linspace(max(low - margin, 0), high + margin, 1500), mode[i])
        density = mixture.select(slice(i, i + 1)).truncated_density(grid)[0]
        axes.fill_between(grid, density, color=SKY_BLUE, alpha=0.4, lw=0)
        axes.plot(grid, density, color=BLUE, lw=1.3)
        top = 1.08 * density.max()  # below the legend
        axes.vlines(mode[i], 0, top, color=BLACK, lw=1.2, ls=":", label=f"mode {mode[i]:.3f}")
        if np.isfinite(true[i]):
            axes.vlines(true[i], 0, top, color=VERMILION, lw=1.4, ls="--", label=f"true {true[i]:.3f}")
        axes.set(xlim=(grid[0], grid[-1]), ylim=(0, 1.2 * top))
        axes.legend(loc="upper right", fontsize=7.5, frameon=False, ncols=2, handlelength=1.6, columnspacing=1.0)
        axes.set_title(titles[i] if titles else "", fontsize=10)
        if i % columns == 0:
            axes.set_ylabel("p(z)")
        if i + columns >= len(mixture):
            axes.set_xlabel("redshift")
    for axes in panels[len(mixture) :]:
        axes.set_axis_off()
    return figure


def coverage_figure(levels: Mapping[str, ArrayLike]) -> Figure:
    """Share of objects whose true redshift lies in the region of each credibility level; on the diagonal if all is right.

    ``levels`` holds for each way of taking regions the level (N,) at which each object's true redshift is reached.
    """
    if not levels:
        raise InputError("no credibility levels to draw; give at least one column of them")
    credibility = np.linspace(0, 1, 101)
    figure, (axes, below) = new_figure(9.0, 4.2, columns=2)
    size = 0
    for i, (name, values) in enumerate(levels.items()):
        covered = coverage(values, credibility)
        size = max(size, np.size(values))
        axes.plot(credibility, covered, style_of(i), color=colour_of(i), lw=1.7, label=name)
        below.plot(credibility, covered - credibility, style_of(i), color=colour_of(i), lw=1.7, label=name)
    spread = 2 * np.sqrt(credibility * (1 - credibility) / max(size, 1))
    below.fill_between(credibility, -spread, spread, color=ORANGE, alpha=0.3, lw=0, label="±2σ of a right one")
    axes.plot([0, 1], [0, 1], color=BLACK, lw=1, ls="--")
    below.axhline(0, color=BLACK, lw=1, ls="--")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="credibility level", ylabel="objects within", aspect="equal")
    below.set(xlim=(0, 1), xlabel="credibility level", ylabel="objects within, less the level")
    handles, names = below.get_legend_handles_labels()
    axes.legend(handles, names, fontsize=8, frameon=False, loc="upper left")
    return figure


def normalised_residuals(residuals: ArrayLike, *, reach: float = 5.0) -> Figure:
    """(z_phot - z_true) / error (N,) beside the unit normal distribution; what lies beyond ``reach`` is counted in a note."""
    values = np.asarray(residuals, np.float64)
    figure, (axes,) = new_figure(5.6, 4.0)
    bins = int(np.clip(math.sqrt(max(values.size, 1)) * 2, 20, 100))
    inside = values[np.abs(values) <= reach]
    weight = np.full(inside.size, bins / (2 * reach) / max(values.size, 1))
    axes.hist(inside, bins=bins, range=(-reach, reach), weights=weight, histtype="stepfilled", color=SKY_BLUE, alpha=0.5)
    x = np.linspace(-reach, reach, 400)
    axes.plot(x, np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi), color=BLACK, lw=1.2, ls="--", label="unit normal")
    axes.set(xlim=(-reach, reach), xlabel="(photometric - true redshift) / error", ylabel="density")
    if values.size:
        low, middle, high = np.quantile(values, (0.16, 0.5, 0.84))
        beyond = float((np.abs(values) > reach).mean())
        note(
            axes,
            f"N = {values.size}\nmedian {middle:+.2f}\nhalf of 68 %: {(high - low) / 2:.2f}\nbeyond {reach:g}: {beyond:.2%}",
            "upper left",
        )
    axes.legend(fontsize=8, frameon=False, loc="upper right")
    return figure
