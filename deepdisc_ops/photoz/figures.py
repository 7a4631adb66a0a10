"""Pictures of redshifts, detections and training, each a matplotlib Figure made from plain arrays.

No pyplot, no global state: figures can be drawn in threads and in servers without a display. Colours are those of Okabe
and Ito, which colour-blind readers tell apart. Glossary: N objects, n examples, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from astropy.visualization import make_lupton_rgb
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnchoredText
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray

from deepdisc_ops.errors import InputError
from deepdisc_ops.photoz.metrics import PointMetrics, pit_ks

if TYPE_CHECKING:
    from deepdisc_ops.photoz.mixture import GaussianMixture

Floats = NDArray[np.float64]

BLACK, ORANGE, SKY_BLUE, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
LINE_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY_BLUE, BLACK)
LINE_STYLES = ("-", "--", ":")
GREY = "#666666"
DPI = 130
LABEL_LIMIT = 150  # labelled boxes in one picture; more hide the sky


def redshift_scatter(z_true: ArrayLike, z_phot: ArrayLike, metrics: PointMetrics) -> Figure:
    """Density of z_phot against z_true (N,), with the outlier limit of the metrics' convention and its figures written in."""
    true, phot = np.asarray(z_true, np.float64), np.asarray(z_phot, np.float64)
    top = 1.04 * max(float(true.max(initial=0)), float(phot.max(initial=0)), 0.1)
    figure, (axes,) = _figure(5.4, 5.0)
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
    _note(axes, "\n".join(lines), "upper left")
    axes.set_title(f"{metrics.convention} convention, outliers beyond |e| = {metrics.outlier_limit:.3f} (dashed)", fontsize=10)
    bar = figure.colorbar(mesh, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label("objects per cell", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    _plain_ticks(bar.ax.yaxis)
    return figure


def pit_figure(pit: ArrayLike) -> Figure:
    """PIT values (N,) as a histogram with the 2-sigma band of a uniform sample, and as quantile against quantile."""
    values = np.sort(np.asarray(pit, np.float64))
    ks = pit_ks(values)
    bins = int(np.clip(values.size // 20, 5, 50))
    expected = values.size / bins
    spread = 2 * math.sqrt(expected * (1 - 1 / bins)) / expected
    figure, (histogram, quantiles) = _figure(9.4, 4.2, columns=2)
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
    figure, panels = _figure(3.4 * columns, 2.6 * rows, columns, rows)
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
    figure, (axes,) = _figure(6.4, 4.2)
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


def rgb_with_boxes(
    red: ArrayLike,
    green: ArrayLike,
    blue: ArrayLike,
    boxes: ArrayLike = (),
    matched: ArrayLike | None = None,
    labels: Sequence[str] | None = None,
    *,
    stretch: float | None = None,
    softening: float = 8.0,
    title: str = "",
) -> Figure:
    """Lupton picture of three planes (H, W), with boxes (N, 4) in their pixels, edges as in `Detections`.

    Boxes that ``matched`` (N,) bool confirms are blue, the others vermilion and dashed. Labels, such as redshifts, stand
    above their boxes as long as there are few. Each plane is scaled to the noise of the middle one, so that the sky is
    grey; ``stretch`` is in units of that noise (by default chosen from the bright pixels).
    """
    planes = _grey_sky(red, green, blue)
    bright = float(np.percentile(planes[1], 99.5)) if planes[1].size else 1.0
    image = make_lupton_rgb(*planes, minimum=-1.0, stretch=stretch or max(bright / 2, 4.0), Q=softening)
    height, width = image.shape[:2]
    figure, (axes,) = _figure(8.0 * min(1, width / height), 8.0 * min(1, height / width))
    axes.imshow(image, origin="lower", interpolation="nearest")
    corners = np.asarray(boxes, np.float64).reshape(-1, 4) - 0.5
    real = np.ones(len(corners), bool) if matched is None else np.asarray(matched, bool)
    handles = []
    for group, colour, style, name in ((real, SKY_BLUE, "-", "matched"), (~real, VERMILION, "--", "unmatched")):
        if group.any():
            outlines = [[(a, b), (c, b), (c, d), (a, d), (a, b)] for a, b, c, d in corners[group].tolist()]
            axes.add_collection(LineCollection(outlines, colors=colour, linewidths=0.9, linestyles=style))
            handles.append(
                Line2D([], [], color=colour, ls=style, label=f"{name if matched is not None else 'found'}: {group.sum()}")
            )
    if labels is not None and len(corners) <= LABEL_LIMIT:
        for (x0, _, _, y1), label, is_real in zip(corners.tolist(), labels, real, strict=True):
            colour = SKY_BLUE if is_real else VERMILION
            axes.text(x0, y1 + 0.5, label, color=colour, fontsize=6.5, ha="left", va="bottom", clip_on=True)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(-0.5, height - 0.5), xlabel="x (pixels)", ylabel="y (pixels)")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(True)
    if handles:
        axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=9, frameon=False)
    return figure


def loss_curves(history: Sequence[Mapping[str, float]]) -> Figure:
    """Training against step: losses in one panel, each validation metric that is no loss in one of its own.

    ``history`` holds a mapping per report with ``step`` and any of the names that the training loop gives (lr and speeds
    are left out); a name may be missing from some of them. NAME_error is the shaded band about NAME.
    """
    if not history:
        raise InputError("the history is empty; there is nothing to draw before the first report")
    names = list(dict.fromkeys(name for entry in history for name in entry if name not in ("step", "lr", "images_per_s")))
    losses = [name for name in names if "loss" in name]
    others = [name for name in names if name not in losses and not name.endswith("_error")]
    count = bool(losses) + len(others)
    columns = min(3, max(count, 1))
    rows = math.ceil(max(count, 1) / columns)
    figure, panels = _figure(max(3.8 * columns, 5.0), 3.0 * rows, columns, rows)
    if losses:
        for i, name in enumerate(losses):
            step, value = _series(history, name)
            colour, style = LINE_COLOURS[i % len(LINE_COLOURS)], LINE_STYLES[i // len(LINE_COLOURS) % len(LINE_STYLES)]
            panels[0].plot(step, value, style, color=colour, lw=1.5, marker=_marker(step), ms=3, label=name)
        values = np.concatenate([_series(history, name)[1] for name in losses])
        if values.size and values.min() > 0 and values.max() > 10 * values.min():
            panels[0].set_yscale("log")
            _plain_ticks(panels[0].yaxis)
        panels[0].legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, handlelength=1.4)
        panels[0].set_ylabel("loss")
    for axes, name in zip(panels[bool(losses) :], others, strict=False):
        step, value = _series(history, name)
        axes.plot(step, value, color=BLUE, lw=1.5, marker=_marker(step), ms=3)
        error = _series(history, f"{name}_error")[1]
        if len(error) == len(value):
            axes.fill_between(step, value - error, value + error, color=BLUE, alpha=0.2, lw=0)
        axes.set_title(name, fontsize=10)
    for axes in panels[:count]:
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure


def compared_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], metrics: Sequence[str]) -> Figure:
    """Several runs against step, a panel for each of ``metrics``; histories as in `loss_curves`, by the name of the run."""
    if not histories or not metrics:
        raise InputError("there is nothing to compare; give at least one run and one metric")
    figure, panels = _figure(4.2 * len(metrics), 3.6, len(metrics))
    for axes, metric in zip(panels, metrics, strict=True):
        for i, (name, history) in enumerate(histories.items()):
            step, value = _series(history, metric)
            style = LINE_STYLES[i // len(LINE_COLOURS) % len(LINE_STYLES)]
            axes.plot(step, value, style, color=LINE_COLOURS[i % len(LINE_COLOURS)], lw=1.5, marker=_marker(step), ms=3, label=name)
        axes.set(xlabel="step", title=metric)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panels[0].legend(fontsize=8, frameon=False)
    return figure


def write_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, or an SVG if the name ends so, replacing the file at once so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    figure.savefig(partial, format="svg" if path.suffix == ".svg" else "png", dpi=DPI)
    partial.replace(path)


def _figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure (inches) and its panels row by row, in the house style."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for axes in panels:
        axes.tick_params(labelsize=9)
        axes.xaxis.label.set_fontsize(10)
        axes.yaxis.label.set_fontsize(10)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, a few in each decade."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _note(axes: Axes, text: str, where: str) -> None:
    box = AnchoredText(text, loc=where, prop={"size": 9}, frameon=True, borderpad=0.4)
    box.patch.set(alpha=0.85, edgecolor="none")
    axes.add_artist(box)


def _grey_sky(*planes: ArrayLike) -> list[Floats]:
    """Planes less their median, in units of their noise (from the median absolute deviation), invalid pixels 0."""
    scaled = []
    for plane in planes:
        values = np.nan_to_num(np.asarray(plane, np.float64))
        values = values - (np.median(values) if values.size else 0)
        noise = 1.4826 * float(np.median(np.abs(values))) if values.size else 0.0
        scaled.append(values / noise if noise > 0 else values)
    return scaled


def _series(history: Iterable[Mapping[str, float]], name: str) -> tuple[Floats, Floats]:
    pairs = [(entry["step"], entry[name]) for entry in history if name in entry and math.isfinite(entry[name])]
    table = np.array(pairs, np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _marker(step: Floats) -> str:
    """Points are marked where there are few: a single one would not be seen as a line."""
    return "o" if step.size <= 30 else ""


METRIC_NAMES = {
    "val_nll": "NLL per object",
    "val_sigma_iqr": "$\\sigma_{IQR}$",
    "val_outliers": "outlier fraction",
    "val_completeness": "completeness",
}


@dataclass(frozen=True)
class ScalingSeries:
    """One line of a scaling figure, n trials: their sizes (n,), and values and errors (n,) of each metric, NaN where unknown.

    best (n,) bool: the trials that the line joins, one for each size; whole (n,) bool: those that were not stopped early.
    """

    size: Floats
    values: Mapping[str, Floats]
    errors: Mapping[str, Floats]
    best: NDArray[np.bool_]
    whole: NDArray[np.bool_]


def scaling_curves(series: Mapping[str, ScalingSeries], metrics: Sequence[str], *, size: str, title: str = "") -> Figure:
    """Metrics against a ``size``, of the training set or of the network, a panel for each metric and a line for each series.

    A line joins the best trial of each size, with its error; the other trials are small, those stopped early are open. Axes are
    chosen for the best trials; others beyond them are arrows at the border.
    """
    sizes = np.unique(np.concatenate([one.size for one in series.values()])) if series else np.zeros(0)
    if len(sizes) < 2 or not metrics:
        raise InputError(
            f"trials of {len(sizes)} different sizes and {len(metrics)} metrics; a scaling figure needs 2 sizes and a metric"
        )
    columns = min(2, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure, panels = _figure(4.4 * columns, 3.3 * rows + 0.6, columns, rows)
    for axes, metric in zip(panels, metrics, strict=False):
        axes.set_xscale("log")
        low, high = _range_of_best(series.values(), metric)
        for i, one in enumerate(series.values()):
            # side by side, so that error bars of one size are told apart
            shift = (sizes[-1] / sizes[0]) ** (min(0.012, 0.06 / len(series)) * (i - (len(series) - 1) / 2))
            _scaling_line(axes, one, metric, shift, i, (low, high))
        margin = 0.05 * (high - low)
        axes.set(ylim=(low - margin, high + margin), ylabel=METRIC_NAMES.get(metric, metric), xlabel=size)
        axes.xaxis.set_major_locator(FixedLocator(_apart(sizes)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(sizes[0] / (sizes[-1] / sizes[0]) ** 0.08, sizes[-1] * (sizes[-1] / sizes[0]) ** 0.08)
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    handles = [Line2D([], [], color=_colour(i), ls=_style(i), marker="o", ms=5, label=name) for i, name in enumerate(series)]
    if not all(one.best.all() for one in series.values()):
        handles.append(Line2D([], [], color=GREY, ls="", marker="o", ms=2.5, alpha=0.6, label="other trials of that size"))
    if not all(one.whole.all() for one in series.values()):
        handles.append(Line2D([], [], color=GREY, ls="", marker="o", ms=5, mfc="white", label="stopped early"))
    widest = 0.06 * max(len(str(handle.get_label())) for handle in handles) + 0.5  # inches of the font's 8 points
    across = max(1, min(4, int(4.4 * columns / widest)))
    figure.legend(
        handles=handles, title=title or None, loc="outside upper center", ncols=across, fontsize=8, title_fontsize=8, frameon=False
    )
    return figure


def _scaling_line(axes: Axes, one: ScalingSeries, metric: str, shift: float, number: int, limits: tuple[float, float]) -> None:
    colour, value = _colour(number), one.values[metric]
    known = np.isfinite(value)
    joined = np.flatnonzero(one.best & known)
    joined = joined[np.argsort(one.size[joined])]
    error = np.nan_to_num(one.errors[metric][joined])
    axes.plot(shift * one.size[joined], value[joined], _style(number), color=colour, lw=1.4)
    axes.errorbar(shift * one.size[joined], value[joined], yerr=error, fmt="none", ecolor=colour, elinewidth=1.2, capsize=2.5)
    for group, diameter, alpha in ((one.best, 5.0, 1.0), (~one.best, 2.5, 0.6)):
        for whole, face in ((True, colour), (False, "white")):
            here = group & known & (one.whole == whole)
            _points(axes, shift * one.size[here], value[here], limits, diameter, color=colour, mfc=face, alpha=alpha)


def _points(axes: Axes, x: Floats, y: Floats, limits: tuple[float, float], diameter: float, **style: Any) -> None:
    """Circles, and arrows at the limits for what lies beyond them."""
    low, high = limits
    for shown, marker, ms in (((y >= low) & (y <= high), "o", diameter), (y > high, "^", 4.0), (y < low, "v", 4.0)):
        axes.plot(x[shown], y[shown].clip(low, high), marker, ms=ms, mew=0.9, zorder=3, **style)


def _range_of_best(series: Iterable[ScalingSeries], metric: str) -> tuple[float, float]:
    """Of the best trials with their errors, and a quarter as much to either side for others."""
    ends = np.concatenate(
        [
            (one.values[metric] + sign * np.nan_to_num(one.errors[metric]))[one.best & np.isfinite(one.values[metric])]
            for one in series
            for sign in (-1, 1)
        ]
    )
    if not ends.size:
        return 0.0, 1.0
    low, high = float(ends.min()), float(ends.max())
    reach = 0.25 * (high - low) or 0.1 * abs(low) or 0.1
    return low - reach, high + reach


def _apart(sizes: Floats) -> list[float]:
    """Ascending sizes whose labels do not run into each other on a logarithmic axis."""
    least = 0.09 * math.log(sizes[-1] / sizes[0])
    shown = [float(sizes[0])]
    for size in sizes[1:]:
        if math.log(size / shown[-1]) >= least:
            shown.append(float(size))
    return shown


def _colour(number: int) -> str:
    return LINE_COLOURS[number % len(LINE_COLOURS)]


def _style(number: int) -> str:
    return LINE_STYLES[number // len(LINE_COLOURS) % len(LINE_STYLES)]
