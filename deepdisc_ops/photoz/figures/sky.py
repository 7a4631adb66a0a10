"""Pictures of the sky with what was found in it. Glossary: N objects, H x W pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from astropy.visualization import make_lupton_rgb
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike, NDArray

from deepdisc_ops.photoz.figures.style import SKY_BLUE, VERMILION, new_figure

Floats = NDArray[np.float64]

LABEL_LIMIT = 150  # labelled boxes in one picture; more hide the sky


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
    image = lupton_picture(red, green, blue, stretch=stretch, softening=softening)
    height, width = image.shape[:2]
    figure, (axes,) = new_figure(8.0 * min(1, width / height), 8.0 * min(1, height / width))
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


def lupton_picture(
    red: ArrayLike, green: ArrayLike, blue: ArrayLike, *, stretch: float | None = None, softening: float = 8.0
) -> NDArray[np.uint8]:
    """The picture (H, W, 3) of three planes that `rgb_with_boxes` shows, the first row at the bottom of the sky."""
    planes = _grey_sky(red, green, blue)
    bright = float(np.percentile(planes[1], 99.5)) if planes[1].size else 1.0
    return lupton_colours(*planes, stretch=stretch or max(bright / 2, 4.0), softening=softening)


def lupton_colours(red: Floats, green: Floats, blue: Floats, *, stretch: float, softening: float = 8.0) -> NDArray[np.uint8]:
    """The picture (H, W, 3) of planes (H, W) in units of their noise, the sky at 0."""
    return np.asarray(make_lupton_rgb(red, green, blue, minimum=-1.0, stretch=stretch, Q=softening), np.uint8)


def _grey_sky(*planes: ArrayLike) -> list[Floats]:
    """Planes less their median, in units of their noise (from the median absolute deviation), invalid pixels 0."""
    scaled = []
    for plane in planes:
        values = np.nan_to_num(np.asarray(plane, np.float64))
        values = values - (np.median(values) if values.size else 0)
        noise = 1.4826 * float(np.median(np.abs(values))) if values.size else 0.0
        scaled.append(values / noise if noise > 0 else values)
    return scaled
