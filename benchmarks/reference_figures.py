"""Pictures of the frozen skies: redshifts, colours and counts, against what was put in and against cosmoDC2.

cosmoDC2 is the photometry that pz-rail-base ships (i < 25.3): the training file, from which the painted sky takes its colours,
and the validation file, which nothing in the simulator has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import weibull_min

from deepdisc_ops.data import population
from deepdisc_ops.data.surveys import example_data, survey
from deepdisc_ops.photoz.figures import BLACK, BLUE, GREEN, GREY, ORANGE, VERMILION

Floats = NDArray[np.float64]

GOLD_LIMIT = 25.3
LSST = survey("lsst")
BANDS = "ugrizy"
SKY_COLOURS = (BLUE, VERMILION, GREEN)
TRACK = np.arange(0.05, 3.0, 0.1)
LEAST = 25
"""Galaxies in a bin of redshift for its median to be drawn."""


@dataclass(frozen=True)
class Drawn:
    """A simulated sky: all its sources (class, redshift, dereddened mag_<band>), those of ``area`` square arcminutes."""

    name: str
    bands: tuple[str, ...]
    area: float
    sources: pa.Table


@dataclass(frozen=True)
class Sample:
    """Galaxies to compare: magnitudes (N, 6) without dust, NaN where not detected, and redshifts (N,)."""

    name: str
    magnitude: Floats
    redshift: Floats

    @property
    def gold(self) -> Sample:
        """Those brighter than the gold limit."""
        chosen = self.magnitude[:, 3] < GOLD_LIMIT
        return Sample(self.name, self.magnitude[chosen], self.redshift[chosen])


def cosmodc2(part: str) -> Sample:
    """The photometry of a file: ``training`` or ``validation``; u of non-detections is NaN."""
    with h5py.File(str(example_data("testdata", f"test_dc2_{part}_9816.hdf5"))) as file:
        table = file["photometry"]
        magnitude = np.stack([np.asarray(table[f"mag_{band}_lsst"], np.float64) for band in BANDS], axis=1)
        redshift = np.asarray(table["redshift"], np.float64)
    return Sample(f"cosmoDC2, {part} file", np.where(magnitude > 90, np.nan, magnitude), redshift)


def galaxies(sky: Drawn) -> Sample:
    """The galaxies of a simulated sky."""
    chosen = np.asarray(sky.sources["class"]) == 0
    magnitude = np.stack([np.asarray(sky.sources[f"mag_{band}"], np.float64)[chosen] for band in sky.bands], axis=1)
    return Sample(sky.name, magnitude, np.asarray(sky.sources["redshift"], np.float64)[chosen])


def figures(skies: Sequence[Drawn]) -> dict[str, Figure]:
    """All pictures by name."""
    samples = [galaxies(sky) for sky in skies]
    real = [cosmodc2("training"), cosmodc2("validation")]
    return {
        "redshifts": redshifts([sample.gold for sample in samples], real),
        "colours": colours([sample.gold for sample in samples], real[1].gold),
        "counts": counts(samples, [sky.area for sky in skies], real),
    }


def redshifts(simulated: Sequence[Sample], real: Sequence[Sample]) -> Figure:
    """n(z) of the gold galaxies, and their median redshift against magnitude, with the Science Book's law for both."""
    figure, (density, median) = panels(10.0, 4.2, 2)
    edges = np.arange(0, 3.3, 0.1)
    grid = np.linspace(0.005, 3.5, 700)
    density.plot(grid, input_density(grid), color=BLACK, ls="--", lw=1.2, label="input, $p(z|i)$ by counts")
    magnitude_edges = np.arange(18.0, 25.5, 0.5)
    median.plot(*population.MEDIAN_REDSHIFTS.T, color=BLACK, ls="--", lw=1.2, label="input, median of $p(z|i)$")
    for sample, colour, style in styled(simulated, real):
        density.hist(sample.redshift, edges, density=True, histtype="step", color=colour, lw=1.5, ls=style, label=sample.name)
        centre, value, low, high = running(sample.magnitude[:, 3], sample.redshift, magnitude_edges)
        median.plot(centre, value, color=colour, lw=1.5, ls=style, label=sample.name)
        if sample is simulated[0]:
            median.fill_between(centre, low, high, color=colour, alpha=0.15, lw=0, label="its 16-84 %")
    density.set(xlim=(0, 3.2), ylim=(0, None), xlabel="redshift", ylabel="n(z), normalised")
    median.set(xlim=(18, 25.3), ylim=(0, None), xlabel="$i$ (AB mag)", ylabel="median redshift")
    for axes in (density, median):
        axes.legend(fontsize=8, frameon=False)
    return figure


def colours(simulated: Sequence[Sample], real: Sample) -> Figure:
    """Colours of neighbouring bands against redshift: medians and the 16-84 % range."""
    figure, axes = panels(11.0, 6.6, 3, 2)
    edges = np.append(TRACK - 0.05, TRACK[-1] + 0.05)
    for k, panel in enumerate(axes[:5]):
        colour = real.magnitude[:, k] - real.magnitude[:, k + 1]
        seen = np.isfinite(colour)
        centre, value, low, high = running(real.redshift[seen], colour[seen], edges)
        panel.errorbar(centre, value, np.stack([value - low, high - value]), color=GREY, fmt="o", ms=3, lw=0.8, label=real.name)
        for sample, line in zip(simulated, SKY_COLOURS, strict=False):
            centre, value, low, high = running(sample.redshift, sample.magnitude[:, k] - sample.magnitude[:, k + 1], edges)
            panel.plot(centre, value, color=line, lw=1.6, label=sample.name)
            panel.fill_between(centre, low, high, color=line, alpha=0.15, lw=0)
        panel.set(xlim=(0, 3), xlabel="redshift", ylabel=f"{BANDS[k]} - {BANDS[k + 1]} (AB mag)")
    axes[5].set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    axes[5].legend(handles, labels, loc="center", frameon=False, fontsize=10, title="medians and 16-84 %, $i$ < 25.3")
    return figure


def counts(simulated: Sequence[Sample], areas: Sequence[float], real: Sequence[Sample]) -> Figure:
    """Galaxies per square arcminute and magnitude, with the input law; cosmoDC2, of unknown area, is scaled at the gold limit."""
    figure, (axes,) = panels(6.4, 4.4, 1)
    width = 0.5
    edges = np.arange(17.0, 28.0, width)
    middle = (edges[1:] + edges[:-1]) / 2
    law = np.diff([population.expected_counts(LSST, 1.0, edge) for edge in edges]) / width
    axes.plot(middle, law, color=BLACK, ls="--", lw=1.2, label="input")
    for (sample, colour, style), area in zip(styled(simulated, []), areas, strict=True):
        found, _ = np.histogram(sample.magnitude[:, 3], edges)
        density, error = found / area / width, np.sqrt(found) / area / width
        axes.errorbar(middle, density, error, color=colour, fmt="o", ms=4, lw=1, ls=style, label=sample.name)
    gold_density = np.mean([len(sample.gold.redshift) / area for sample, area in zip(simulated, areas, strict=True)])
    for sample, colour, marker in zip(real, (GREY, ORANGE), "^v", strict=True):
        found, _ = np.histogram(sample.magnitude[:, 3], edges)
        whole = edges[1:] <= GOLD_LIMIT
        scaled = found[whole] * gold_density / len(sample.redshift) / width
        axes.plot(middle[whole], scaled, marker, color=colour, ms=4, ls="none", label=f"{sample.name}, scaled")
    axes.axvline(GOLD_LIMIT, color=GREY, lw=0.8, ls=":")
    axes.set(yscale="log", ylim=(1e-2, None), xlabel="$i$ (AB mag)", ylabel="galaxies per arcmin² and mag")
    axes.legend(fontsize=8, frameon=False)
    return figure


def input_density(grid: Floats) -> Floats:
    """n(z) of the galaxies that the simulator is asked for, i < 25.3: p(z | i) weighted by the counts."""
    edges = np.linspace(population.BRIGHT_LIMIT, GOLD_LIMIT, 400)
    weight = np.diff([population.expected_counts(LSST, 1.0, edge) for edge in edges])
    shape = population.REDSHIFT_SHAPE
    scale = np.interp(edges[1:], *population.MEDIAN_REDSHIFTS.T) / np.log(2.0) ** (1 / shape)
    density = weibull_min.pdf(grid[:, None], shape, scale=scale) @ weight
    return np.asarray(density / np.trapezoid(density, grid))


def running(x: Floats, y: Floats, edges: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Centre, median, 16 and 84 % of y in the bins of x that hold at least `LEAST`."""
    bins = np.digitize(x, edges) - 1
    table = [
        [(edges[k] + edges[k + 1]) / 2, *np.quantile(y[bins == k], (0.5, 0.16, 0.84))]
        for k in range(len(edges) - 1)
        if (bins == k).sum() >= LEAST
    ]
    columns = np.array(table, np.float64).reshape(-1, 4).T
    return columns[0], columns[1], columns[2], columns[3]


def styled(simulated: Sequence[Sample], real: Sequence[Sample]) -> list[tuple[Sample, str, str]]:
    """Each sample with its colour and line style."""
    first = [(sample, colour, "-") for sample, colour in zip(simulated, SKY_COLOURS, strict=False)]
    return first + [(sample, colour, ":") for sample, colour in zip(real, (GREY, ORANGE), strict=False)]


def panels(width: float, height: float, columns: int, lines: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure (inches) and its panels row by row."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid: list[Any] = [figure.add_subplot(lines, columns, i + 1) for i in range(lines * columns)]
    for axes in grid:
        axes.tick_params(labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid
