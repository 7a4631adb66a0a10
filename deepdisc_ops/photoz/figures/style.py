"""The one style of all figures: colours, panels, ticks, and how a figure becomes a file.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; maps of colour are viridis and cividis.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnchoredText
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

BLACK, ORANGE, SKY_BLUE, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
LINE_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY_BLUE, BLACK)
LINE_STYLES = ("-", "--", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#666666"
DPI = 130
FORMATS = ("png", "svg", "pdf")


def write_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, SVG or PDF as the name ends, replacing the file at once so that a reader never sees half of it.

    Anything but .svg and .pdf is a PNG. Vector files hold no date.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    kind = path.suffix[1:] if path.suffix[1:] in FORMATS else "png"
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    figure.savefig(partial, format=kind, dpi=DPI, metadata=metadata)
    partial.replace(path)


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
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


def plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, a few in each decade."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def colour_of(number: int) -> str:
    """Colour of line ``number``."""
    return LINE_COLOURS[number % len(LINE_COLOURS)]


def style_of(number: int) -> str:
    """Dashes of line ``number``: another where the colours begin again."""
    return LINE_STYLES[number // len(LINE_COLOURS) % len(LINE_STYLES)]


def note(axes: Axes, text: str, where: str) -> None:
    """Write figures into a corner of a panel."""
    box = AnchoredText(text, loc=where, prop={"size": 9}, frameon=True, borderpad=0.4)
    box.patch.set(alpha=0.85, edgecolor="none")
    axes.add_artist(box)
