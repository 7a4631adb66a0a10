"""Training and its trials: losses against step, metrics against sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from deepdisc_ops.errors import InputError
from deepdisc_ops.photoz.figures.style import BLUE, GREY, LINE_COLOURS, LINE_STYLES, colour_of, new_figure, plain_ticks, style_of

Floats = NDArray[np.float64]


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
    figure, panels = new_figure(max(3.8 * columns, 5.0), 3.0 * rows, columns, rows)
    if losses:
        for i, name in enumerate(losses):
            step, value = _series(history, name)
            colour, style = LINE_COLOURS[i % len(LINE_COLOURS)], LINE_STYLES[i // len(LINE_COLOURS) % len(LINE_STYLES)]
            panels[0].plot(step, value, style, color=colour, lw=1.5, marker=_marker(step), ms=3, label=name)
        values = np.concatenate([_series(history, name)[1] for name in losses])
        if values.size and values.min() > 0 and values.max() > 10 * values.min():
            panels[0].set_yscale("log")
            plain_ticks(panels[0].yaxis)
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
    figure, panels = new_figure(4.2 * len(metrics), 3.6, len(metrics))
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
    figure, panels = new_figure(4.4 * columns, 3.3 * rows + 0.6, columns, rows)
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
    handles = [Line2D([], [], color=colour_of(i), ls=style_of(i), marker="o", ms=5, label=name) for i, name in enumerate(series)]
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
    colour, value = colour_of(number), one.values[metric]
    known = np.isfinite(value)
    joined = np.flatnonzero(one.best & known)
    joined = joined[np.argsort(one.size[joined])]
    error = np.nan_to_num(one.errors[metric][joined])
    axes.plot(shift * one.size[joined], value[joined], style_of(number), color=colour, lw=1.4)
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


def _series(history: Iterable[Mapping[str, float]], name: str) -> tuple[Floats, Floats]:
    pairs = [(entry["step"], entry[name]) for entry in history if name in entry and math.isfinite(entry[name])]
    table = np.array(pairs, np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _marker(step: Floats) -> str:
    """Points are marked where there are few: a single one would not be seen as a line."""
    return "o" if step.size <= 30 else ""


def compared_values(values: Mapping[str, Mapping[str, tuple[float, float]]], metrics: Mapping[str, str]) -> Figure:
    """Figures of several variants side by side, a panel for each of ``metrics`` (key: title); (value, error) by variant and key.

    Variants stand below each other, the first of them on top and as a line through all; what a variant lacks is left out.
    """
    if not values or not metrics:
        raise InputError("there is nothing to compare; give at least one variant and one metric")
    figure, panels = new_figure(3.1 * len(metrics) + 1.2, 0.42 * len(values) + 1.3, len(metrics))
    rows = np.arange(len(values))
    for axes, (key, title) in zip(panels, metrics.items(), strict=True):
        for row, variant in zip(rows, values.values(), strict=True):
            if key in variant:
                value, error = variant[key]
                axes.errorbar(value, row, xerr=error, fmt="o", color=BLUE, ms=5, capsize=3, lw=1.4)
        first = next(iter(values.values())).get(key)
        if first is not None:
            axes.axvline(first[0], color=GREY, lw=0.8, ls=":")
        axes.set(title=title, ylim=(len(values) - 0.5, -0.5), yticks=rows, yticklabels=list(values) if axes is panels[0] else [])
        axes.xaxis.set_major_locator(MaxNLocator(4))
    return figure
