"""One HTML page that needs nothing but itself: summary, figures, and a table of objects drawn in the browser."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops import __version__
from deepdisc_ops.errors import SetupError
from deepdisc_ops.photoz.evaluation import Evaluation
from deepdisc_ops.report.objects import Objects
from deepdisc_ops.report.picture import ACROSS, THUMBNAIL

PAGE_OBJECTS = 10_000
TEMPLATE = Path(__file__).with_name("page.html")
DIGITS = 6
"""Significant digits of the numbers of the table."""


def write_page(
    path: Path,
    *,
    title: str,
    result: Evaluation,
    summary: Sequence[tuple[str, str]],
    figures: Mapping[str, Path],
    objects: Objects,
    sheets: Sequence[str] | None,
) -> None:
    """Write the page, replacing it at once; ``figures`` are PNG files by name, ``sheets`` WebP thumbnails in the objects' order."""
    images = {name: base64.b64encode(file.read_bytes()).decode("ascii") for name, file in figures.items()}
    text = _template().render(
        title=title,
        version=__version__,
        summary=summary,
        binned=result.binned,
        figures=images,
        count=len(objects.names),
        matched=result.n_judged,
        data=page_data(objects, bool(sheets)),
        boxed=bool(sheets) and bool(np.isfinite(objects.boxes).any()),
        outlined=bool(sheets) and objects.masks is not None,
        sheets=sheets or (),
    )
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def page_data(objects: Objects, pictures: bool) -> str:
    """The objects as JSON that may stand inside a script element; numbers that are none are null."""
    data: dict[str, Any] = {
        "names": objects.names,
        "columns": {name: _short(values) for name, values in objects.columns.items()},
        "x": _short(objects.x),
        "y": _short(objects.y),
        "boxes": _packed(objects.boxes),
        "components": objects.mixture[0].shape[1],
        "mixture": [_packed(part) for part in objects.mixture],
        "masks": objects.masks,
        "pictures": pictures,
        "thumbnail": THUMBNAIL,
        "across": ACROSS,
    }
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _template() -> Any:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise SetupError("the package jinja2, which writes the page, is missing; install it: pip install jinja2") from None
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _short(values: NDArray[np.float64]) -> list[float | None]:
    return [float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None for value in values.tolist()]


def _packed(values: NDArray[np.floating]) -> str:
    """Little-endian single precision, base64."""
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode("ascii")
