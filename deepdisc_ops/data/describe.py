"""What a data set holds, in numbers and in one figure: redshifts, magnitudes, objects, boxes, coverage, labels, pixels.

Glossary: C bands, N objects, L pyramid levels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.data.pixels import read_pixels
from deepdisc_ops.data.records import GALAXY, SPLITS, STAR
from deepdisc_ops.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from deepdisc_ops.data.store import Dataset, Records

Floats = NDArray[np.floating[Any]]

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
MIN_SIDE = 1.0
"""Sides of boxes below this many pixels count as this long where anchors are sought."""

_PIXELS_PER_RECORD = 65536
"""Pixels of a band that each sampled record gives to the percentiles."""


@dataclass(frozen=True)
class PixelStatistics:
    """Valid pixels of one band in nJy; noise is the robust scatter 1.4826 x MAD, percentiles at `QUANTILES`.

    invalid: share of pixels without data; empty: share of the images that lack the band altogether.
    """

    band: str
    mean: float
    std: float
    noise: float
    percentiles: tuple[float, ...]
    invalid: float
    empty: float


@dataclass(frozen=True)
class Description:
    """What a data set holds.

    objects, redshift, mag, sides: per-object columns (N,), NaN for none, that the figure draws; sides is the square root of the
    box area in pixels; counts (records,) objects per image; anchors: L sides in pixels; splits: number of records in each.
    """

    name: str
    survey: str
    gold_band: str
    records: int
    splits: dict[str, int]
    origins: dict[str, int]
    sizes: tuple[tuple[int, int, int], ...]
    counts: NDArray[np.int64]
    redshift: Floats
    mag: Floats
    classes: NDArray[np.int32]
    sides: Floats
    anchors: tuple[float, ...]
    masks: bool
    pixels: tuple[PixelStatistics, ...]
    sampled: int

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """(N,) galaxies with a redshift."""
        return np.isfinite(self.redshift) & (self.classes == GALAXY)

    @property
    def objects(self) -> int:
        """Number of objects."""
        return len(self.redshift)


def describe(
    dataset: Dataset,
    *,
    split: str | None = None,
    levels: int = 3,
    sample: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Description:
    """Describe a data set, or one split of it; pixels are those of at most ``sample`` records, drawn by ``seed``.

    levels: how many anchors to suggest, one for each level of a feature pyramid; progress is called with (records read, of all).
    """
    if levels < 1 or sample < 0:
        raise ConfigError(f"levels is {levels} and sample {sample}, expected at least 1 and 0")
    records = dataset.records(split)
    boxes, _ = records.column("boxes")
    sides = np.sqrt(np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1, dtype=np.float64))
    chosen = np.sort(np.random.default_rng(seed).permutation(len(records))[:sample])
    origins, origin_counts = np.unique(records.texts("origin"), return_counts=True)
    shapes, shape_counts = np.unique(records.sizes, axis=0, return_counts=True)
    order = np.argsort(-shape_counts, kind="stable")
    return Description(
        name=dataset.path.name,
        survey=dataset.info.survey,
        gold_band=dataset.info.gold_band,
        records=len(records),
        splits={name: dataset.split_sizes[name] for name in (*SPLITS, "") if dataset.split_sizes.get(name)},
        origins=dict(zip(origins.tolist(), origin_counts.tolist(), strict=True)),
        sizes=tuple((int(shapes[i, 0]), int(shapes[i, 1]), int(shape_counts[i])) for i in order),
        counts=records.counts,
        redshift=records.column("redshift")[0],
        mag=records.column("mag")[0],
        classes=records.column("classes")[0],
        sides=sides,
        anchors=suggest_anchors(sides, levels),
        masks=bool(len(records)) and records[0].objects.masks is not None,
        pixels=pixel_statistics(records[chosen], dataset.info.bands, seed, progress) if len(chosen) else (),
        sampled=len(chosen),
    )


def suggest_anchors(sides: Floats, levels: int) -> tuple[float, ...]:
    """One anchor side for each of ``levels``: the centres of one-dimensional k-means on the logarithm of the box sides.

    The logarithm, for what an anchor of side a gives a box of side s depends on s / a. Fewer different sides than levels give
    fewer anchors; no boxes give none.
    """
    logs = np.sort(np.log(np.maximum(np.asarray(sides, np.float64), MIN_SIDE)))
    distinct = np.unique(logs)
    if len(distinct) <= levels:
        return tuple(float(side) for side in np.exp(distinct))
    centres = np.quantile(distinct, (np.arange(levels) + 0.5) / levels)
    sums = np.concatenate([[0.0], np.cumsum(logs)])
    for _ in range(100):
        cuts = np.concatenate([[0], np.searchsorted(logs, (centres[1:] + centres[:-1]) / 2), [len(logs)]])
        filled = np.diff(cuts) > 0
        moved = np.where(filled, np.diff(sums[cuts]) / np.maximum(np.diff(cuts), 1), centres)
        if np.allclose(moved, centres, rtol=0, atol=1e-9):
            break
        centres = moved
    return tuple(float(side) for side in np.exp(centres))


def pixel_statistics(
    records: Records, bands: tuple[str, ...], seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> tuple[PixelStatistics, ...]:
    """Statistics of each band over whole images; mean and std of all their valid pixels, the rest of a seeded sample."""
    rng = np.random.default_rng(seed)
    number, total, squares = np.zeros(len(bands)), np.zeros(len(bands)), np.zeros(len(bands))
    invalid, empty, seen = np.zeros(len(bands)), np.zeros(len(bands)), 0
    samples: list[list[NDArray[np.float32]]] = [[] for _ in bands]
    for done, record in enumerate(records, start=1):
        image = read_pixels(record, with_wcs=False)
        bad = np.broadcast_to(image.mask if image.invalid is None else image.invalid, image.data.shape)
        seen += image.data[0].size
        for band in range(len(bands)):
            valid = image.data[band][~bad[band]]
            invalid[band] += bad[band].sum()
            empty[band] += not len(valid)
            number[band] += len(valid)
            total[band] += valid.sum(dtype=np.float64)
            squares[band] += np.square(valid, dtype=np.float64).sum()
            samples[band].append(valid if len(valid) <= _PIXELS_PER_RECORD else rng.choice(valid, _PIXELS_PER_RECORD))
        if progress is not None:
            progress(done, len(records))
    mean = total / np.maximum(number, 1)
    std = np.sqrt(np.maximum(squares / np.maximum(number, 1) - mean**2, 0))
    found = []
    for band, name in enumerate(bands):
        values = np.concatenate(samples[band])
        if len(values):
            noise = float(1.4826 * np.median(np.abs(values - np.median(values))))
            percentiles = tuple(float(value) for value in np.quantile(values, QUANTILES))
            figures = (float(mean[band]), float(std[band]), noise, percentiles)
        else:
            figures = (np.nan, np.nan, np.nan, (np.nan,) * len(QUANTILES))
        found.append(
            PixelStatistics(name, *figures, float(invalid[band] / max(seen, 1)), float(empty[band] / max(len(records), 1)))
        )
    return tuple(found)


def summary(description: Description) -> list[tuple[str, str]]:
    """Names and values of the figures of a description, for a table of two columns."""
    d = description
    galaxies, stars = int((d.classes == GALAXY).sum()), int((d.classes == STAR).sum())
    shapes = [f"{width} x {height} px ({count})" for width, height, count in d.sizes]
    return [
        ("survey", d.survey),
        ("records", f"{d.records}"),
        ("splits", ", ".join(f"{name or 'unused'} {count}" for name, count in d.splits.items())),
        ("origins", ", ".join(f"{name or 'unnamed'} {count}" for name, count in d.origins.items())),
        ("image sizes", ", ".join(shapes[:4]) + (f" and {len(shapes) - 4} more" if len(shapes) > 4 else "")),
        ("objects", f"{d.objects}: {galaxies} galaxies, {stars} stars"),
        ("objects per image (5 %, median, 95 %)", _quantiles(d.counts, "{:.0f}")),
        ("redshift (5 %, median, 95 %)", _quantiles(d.redshift[d.labelled], "{:.2f}")),
        (f"{d.gold_band} magnitude (5 %, median, 95 %)", _quantiles(d.mag, "{:.2f}")),
        ("box side (5 %, median, 95 %)", f"{_quantiles(d.sides, '{:.1f}')} px"),
        ("galaxies with redshift", _share(int(d.labelled.sum()), galaxies)),
        ("objects with magnitude", _share(int(np.isfinite(d.mag).sum()), d.objects)),
        ("stars", _share(stars, d.objects)),
        ("images without an object", _share(int((d.counts == 0).sum()), d.records)),
        ("masks", "yes" if d.masks else "no"),
        ("suggested anchors", ", ".join(f"{side:.1f}" for side in d.anchors) + " px" if d.anchors else "none"),
    ]


def as_tree(description: Description) -> dict[str, Any]:
    """What description.json holds: the summary, the suggested anchors, and the pixels' statistics band by band."""
    tree: dict[str, Any] = dict(summary(description))
    tree |= {"anchors": description.anchors, "sampled": description.sampled}
    return tree | {"pixels": [asdict(band) for band in description.pixels]}


def _quantiles(values: NDArray[Any], form: str) -> str:
    finite = values[np.isfinite(values)]
    return ", ".join(form.format(value) for value in np.quantile(finite, (0.05, 0.5, 0.95))) if len(finite) else "none"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%} ({part} of {whole})" if whole else "none"


def write_description(description: Description, out: Path) -> None:
    """description.json and description.png in the folder ``out``, which is made."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "description.json").write_text(json.dumps(as_tree(description), indent=1) + "\n")
    draw(description, out / "description.png")


def draw(description: Description, path: Path) -> None:
    """The figure of a description: six panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    axes = figure.subplots(2, 3)
    figure.suptitle(f"{description.name}: {description.records} images, {description.objects} objects")
    _draw_redshift(axes[0, 0], description)
    _draw_magnitude(axes[0, 1], description)
    _histogram(axes[0, 2], description.counts, "objects per image", "images", _whole_bins(description.counts))
    _draw_sides(axes[1, 0], description)
    _draw_coverage(axes[1, 1], description)
    _draw_pixels(axes[1, 2], description)
    figure.savefig(path, dpi=110)


def _histogram(axes: Axes, values: NDArray[Any], name: str, of: str, bins: Any = 40, **options: Any) -> None:
    finite = values[np.isfinite(values)]
    axes.set_xlabel(name)
    axes.set_ylabel(of)
    if len(finite):
        axes.hist(finite, bins=bins, histtype="stepfilled", alpha=0.6, **options)
    else:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center")


def _whole_bins(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Edges of at most 41 bins of equal whole width."""
    low, high = (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)
    step = max(1, -(-(high - low + 1) // 40))
    edges: NDArray[np.float64] = np.arange(low, high + step + 1, step) - np.float64(0.5)
    return edges


def _draw_redshift(axes: Axes, d: Description) -> None:
    _histogram(axes, d.redshift[d.labelled], "redshift", "galaxies")
    share = d.labelled.sum() / max(int((d.classes == GALAXY).sum()), 1)
    axes.set_title(f"{share:.0%} of the galaxies have a redshift", fontsize="medium")


def _draw_magnitude(axes: Axes, d: Description) -> None:
    finite = d.mag[np.isfinite(d.mag)]
    bins = np.linspace(finite.min(), finite.max() + 1e-3, 41).tolist() if len(finite) else 40
    _histogram(axes, d.mag, f"{d.gold_band} magnitude (AB)", "objects", bins, label="all")
    if len(finite):
        axes.hist(d.mag[d.labelled & np.isfinite(d.mag)], bins=bins, histtype="step", color="C1", label="galaxies with redshift")
        stars = d.mag[(d.classes == STAR) & np.isfinite(d.mag)]
        axes.hist(stars, bins=bins, histtype="step", color="C3", label="stars")
        axes.legend(fontsize="small", loc="upper left")
        axes.set_yscale("log")


def _draw_sides(axes: Axes, d: Description) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    sides = np.maximum(d.sides, MIN_SIDE)
    bins = np.geomspace(sides.min() * 0.95, sides.max() * 1.05, 41) if len(sides) else 40
    _histogram(axes, sides, "box side (px)", "objects", bins)
    if len(sides):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    for number, side in enumerate(d.anchors):
        axes.axvline(side, color="C3", lw=1, label="suggested anchors" if number == 0 else None)
    if d.anchors:
        axes.legend(fontsize="small")


def _draw_coverage(axes: Axes, d: Description) -> None:
    axes.set_ylabel("share of pixels (%)")
    axes.set_title(f"coverage, {d.sampled} images", fontsize="medium")
    axes.bar([band.band for band in d.pixels], [100 * (1 - band.invalid) for band in d.pixels], color="C2", alpha=0.6)
    axes.set_ylim(0, 105)
    for number, band in enumerate(d.pixels):
        if band.invalid:
            axes.text(number, 50, f"{band.invalid:.2%}\ninvalid", ha="center", va="center", fontsize="x-small", rotation=90)


def _draw_pixels(axes: Axes, d: Description) -> None:
    axes.set_ylabel("pixels (nJy)")
    axes.set_title("noise, and 1 to 99 % and 25 to 75 % of the pixels", fontsize="medium")
    axes.set_yscale("symlog", linthresh=max((band.noise for band in d.pixels if band.noise > 0), default=1.0))
    for number, band in enumerate(d.pixels):
        low, _, quarter, middle, three, _, high = band.percentiles
        axes.plot([number, number], [low, high], color="C0", lw=1)
        axes.plot([number, number], [quarter, three], color="C0", lw=6, solid_capstyle="butt")
        axes.plot(number, middle, "w_", ms=6)
        axes.plot(number, band.noise, "C3_", ms=14, mew=2, label="noise" if number == 0 else None)
    axes.set_xticks(range(len(d.pixels)), [band.band for band in d.pixels])
    if d.pixels:
        axes.legend(fontsize="small")
