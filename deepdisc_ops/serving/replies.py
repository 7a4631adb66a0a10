"""Objects as the bytes of the reply that was asked for: the HDF5 of our client, or a catalogue in a format of `sky.catalog`.

Glossary: N objects, K components, G redshifts of a grid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from astropy.table import Table
from numpy.typing import NDArray

from deepdisc_ops.errors import CatalogError, ServerError
from deepdisc_ops.inference.mosaic import catalogue_rows
from deepdisc_ops.photoz.mixture import GaussianMixture
from deepdisc_ops.serving.wire.fault import Refused
from deepdisc_ops.serving.wire.image import Request
from deepdisc_ops.serving.wire.options import Grid
from deepdisc_ops.serving.wire.reply import Origin, encode_detections
from deepdisc_ops.sky.catalog import Column, write_catalog
from deepdisc_ops.sky.detections import Detections, row_order

PDF = "pdf"
PDF_GRID = "pdf_grid"
"""Note of a reply with densities on a grid: the grid, as in the request."""
_MIXTURE = ("mix_weights", "mix_means", "mix_sigmas")
_AT_ONCE = 1 << 22


def encode_reply(found: Detections, request: Request, origin: Origin, bands: Sequence[str], most: int) -> bytes:
    """The reply of at most ``most`` bytes; `Refused` where it is larger, which would end the worker."""
    options = request.options
    notes = {PDF_GRID: str(options.pdf)} if isinstance(options.pdf, Grid) else {}
    _check_size(_least_size(found, options.pdf), most)
    density = densities(found, options.pdf) if isinstance(options.pdf, Grid) else None
    if options.reply == "hdf5":
        body = _as_detections(found, request, origin, notes, density)
    else:
        rows = _as_rows(found, request, bands, density)
        words = {**origin.words(), **notes, "bands": ",".join(bands)}
        body = _as_json(rows, origin, notes) if options.reply == "json" else _as_file(rows, f".{options.reply}", words)
    _check_size(len(body), most)
    return body


def densities(found: Detections, grid: Grid) -> NDArray[np.float32]:
    """p(z) (N, G) cut at z = 0 and renormalised; NaN where there is no mixture."""
    out = np.full((len(found), grid.count), np.nan, np.float32)
    known = np.flatnonzero((found.weights > 0).any(axis=1))
    step = max(1, _AT_ONCE // (grid.count * max(1, found.weights.shape[1])))
    for start in range(0, len(known), step):
        part = known[start : start + step]
        mixture = GaussianMixture.from_arrays(found.weights[part], found.means[part], found.sigmas[part])
        out[part] = mixture.truncated_density(grid.points())
    return out


def _least_size(found: Detections, pdf: object) -> int:
    """Bytes that the reply has at least."""
    grid = 4 * pdf.count if isinstance(pdf, Grid) else 0
    mixture = 12 * found.weights.shape[1] if pdf == "mixture" else 0
    return len(found) * (grid + mixture + 36)


def _check_size(size: int, most: int) -> None:
    if size > most:
        what = f"a reply of {size} bytes, expected up to {most}"
        raise Refused("reply_too_large", what, "send smaller windows, or ask for less: no masks, no grid, fewer boxes")


def _as_detections(
    found: Detections, request: Request, origin: Origin, notes: Mapping[str, str], density: NDArray[np.float32] | None
) -> bytes:
    if request.options.pdf != "mixture":
        table = catalogue_rows(found, None, (), {}, {})
        columns = {name: np.asarray(table[name]) for name in table.colnames if name.startswith(("z_", "mass_"))}
        none = found.weights[:, :0]
        found = Detections(
            **{name: getattr(found, name) for name in ("boxes", "scores", "classes", "ebv", "n_members", "flags", "masks")},
            weights=none,
            means=none,
            sigmas=none,
            extra={**found.extra, **columns, **({} if density is None else {PDF: density})},
        )
    return encode_detections(
        found,
        model_version=origin.model_version,
        package_version=origin.package_version,
        request=origin.request,
        seconds=origin.seconds,
        notes=notes,
    )


def _as_rows(found: Detections, request: Request, bands: Sequence[str], density: NDArray[np.float32] | None) -> Table:
    """Catalogue rows: those of a search by row of the window, those of given boxes in their order."""
    if density is not None:
        found = found.with_columns({PDF: density})
    if request.boxes is None:
        found = found.select(row_order(found.boxes))
    described = {PDF: Column(f"p(z), z >= 0, at the redshifts {request.options.pdf}", None, "stat.probability;src.redshift.phot")}
    rows = catalogue_rows(found, request.wcs, bands, {}, described)
    if request.options.pdf != "mixture":
        rows.remove_columns(_MIXTURE)
    return rows


def _as_file(rows: Table, ending: str, words: Mapping[str, str]) -> bytes:
    rows.meta.update(words)
    try:
        with TemporaryDirectory(prefix="reply-") as folder:
            path = Path(folder) / f"catalog{ending}"
            write_catalog(rows, path)
            return path.read_bytes()
    except (CatalogError, OSError) as error:
        raise ServerError(
            f"the reply could not be written ({error}); make room where the server keeps its temporary files"
        ) from None


def _as_json(rows: Table, origin: Origin, notes: Mapping[str, str]) -> bytes:
    """An object with provenance, the meaning of the columns, and a list of objects, one a row; what is no number is null."""
    columns = {name: {"unit": str(rows[name].unit or ""), "description": rows[name].description or ""} for name in rows.colnames}
    values = {name: [_plain(value) for value in np.asarray(rows[name]).tolist()] for name in rows.colnames}
    objects = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    words = {**origin.words(), **notes, "seconds": dict(origin.seconds)}
    return json.dumps({**words, "columns": columns, "objects": objects}, allow_nan=False).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [_plain(one) for one in value] if isinstance(value, list) else value
