"""Point estimates against truth, over the whole catalogue and in bins. Glossary: N objects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from deepdisc_ops.errors import InputError
from deepdisc_ops.photoz.figures.style import (
    BLACK,
    BLUE,
    GREY,
    MARKERS,
    ORANGE,
    VERMILION,
    colour_of,
    new_figure,
    note,
    plain_ticks,
    style_of,
)
from deepdisc_ops.photoz.metrics import Bin, PointMetrics, Recovery

REQUIREMENTS: Mapping[str, tuple[float, float]] = {
    "bias": (-0.003, 0.003),
    "sigma_iqr": (0.0, 0.02),
    "outlier_fraction": (0.0, 0.1),
}
"""LSST's requirements, drawn as bands."""
PANELS = {"bias": "bias", "sigma_iqr": "$\\sigma_{IQR}$", "outlier_fraction": "outlier fraction"}


def redshift_scatter(z_true: ArrayLike, z_phot: ArrayLike, metrics: PointMetrics) -> Figure:
    """Density of z_phot against z_true (N,), with the outlier limit of the metrics' convention and its figures written in."""
    true, phot = np.asarray(z_true, np.float64), np.asarray(z_phot, np.float64)
    top = 1.04 * max(float(true.max(initial=0)), float(phot.max(initial=0)), 0.1)
    figure, (axes,) = new_figure(5.4, 5.0)
    bins = int(np.clip(4 * math.sqrt(true.size), 30, 120))
    counts, _, _ = np.histogram2d(true, phot, bins=bins, range=((0, top), (0, top)))
    mesh = axes.pcolormesh(
        *np.meshgrid(*[np.linspace(0, top, bins + 1)] * 2),
        np.ma.masked_equal(counts.T, 0),
        norm=LogNorm(1, max(float(counts.max(initial=0)), 10)),
        cmap="viridis",
        rasterized=True,
    )
    z = np.array([0, top])
    axes.plot(z, z, color=BLACK, lw=1)
    for sign in (-1, 1):
        axes.plot(z, z + sign * metrics.outlier_limit * (1 + z), color=VERMILION, lw=1, ls="--")
    axes.set(xlim=(0, top), ylim=(0, top), xlabel="true redshift", ylabel="photometric redshift (mode)", aspect="equal")
    lines = [
        f"N = {metrics.n}",
        f"bias = {metrics.bias:+.4f} ± {metrics.bias_error:.4f}",
        f"$\\sigma_{{IQR}}$ = {metrics.sigma_iqr:.4f} ± {metrics.sigma_iqr_error:.4f}",
        f"outliers = {metrics.outlier_fraction:.3f} ± {metrics.outlier_fraction_error:.3f}",
    ]
    note(axes, "\n".join(lines), "upper left")
    axes.set_title(f"{metrics.convention} convention, outliers beyond |e| = {metrics.outlier_limit:.3f} (dashed)", fontsize=10)
    bar = figure.colorbar(mesh, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label("objects per cell", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    plain_ticks(bar.ax.yaxis)
    return figure


def binned_statistics(series: Mapping[str, Sequence[Bin]], column: str, *, requirements: bool = True) -> Figure:
    """Bias, scatter and outlier fraction against a ``column``, a line for each of ``series``, with LSST's requirements as bands."""
    filled = {name: bins for name, bins in series.items() if bins}
    if not filled:
        raise InputError(f"no bin of {column} holds enough objects; take fewer bins")
    figure, panels = new_figure(12.0, 3.7, columns=3)
    for axes, (name, label) in zip(panels, PANELS.items(), strict=True):
        if requirements:
            axes.axhspan(*REQUIREMENTS[name], color=ORANGE, alpha=0.25, lw=0, label="LSST requirement")
        for i, (title, bins) in enumerate(filled.items()):
            _bins(axes, bins, name, i, title)
        axes.set(xlabel=column, ylabel=label)
        if name == "bias":
            axes.axhline(0, color=GREY, lw=0.8, ls=":")
        else:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(6))
    panels[0].legend(fontsize=8, frameon=False, loc="best")
    return figure


def recovery_figure(recovery: Recovery) -> Figure:
    """Fraction of outliers that are none at their second peak, against that peak's weight, with the number of outliers."""
    figure, (axes,) = new_figure(5.4, 3.8)
    for low, high, found in zip(recovery.edges[:-1], recovery.edges[1:], recovery.by_weight, strict=True):
        if found is not None:
            axes.errorbar(
                (low + high) / 2, found.value, xerr=(high - low) / 2, yerr=found.error, color=BLUE, marker="o", ms=5, capsize=2
            )
            axes.annotate(str(found.n), ((low + high) / 2, 0.02), ha="center", fontsize=8, color=GREY)
    axes.axhline(
        recovery.all.value, color=VERMILION, ls="--", lw=1.2, label=f"all {recovery.all.n} outliers: {recovery.all.value:.2f}"
    )
    axes.set(xlim=(recovery.edges[0], recovery.edges[-1]), ylim=(0, 1), xlabel="weight of the second peak")
    axes.set_ylabel("outliers recovered")
    axes.legend(fontsize=8, frameon=False, loc="upper right")
    return figure


def _bins(axes: Axes, bins: Sequence[Bin], name: str, number: int, title: str) -> None:
    x = np.array([one.middle for one in bins])
    value, error = (np.array([getattr(one.metrics, key) for one in bins]) for key in (name, f"{name}_error"))
    reach = np.abs(np.array([[one.middle - one.low, one.high - one.middle] for one in bins])).T
    axes.errorbar(
        x, value, yerr=error, xerr=reach, color=colour_of(number), ls=style_of(number), marker=MARKERS[number % len(MARKERS)],
        ms=4, lw=1.4, elinewidth=0.9, capsize=2, label=title,
    )  # fmt: skip
