"""The objects of the page: matched gold galaxies, the worst outliers first. Glossary: N objects, K mixture components."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from astropy.table import Table
from numpy.typing import NDArray

from deepdisc_ops.photoz import metrics
from deepdisc_ops.photoz.evaluation import Evaluation, catalog_mixture, numbers

Floats = NDArray[np.float64]

FROM_CATALOG = ("z_best", "z_lo68", "z_hi68", "z_second_peak", "z_second_weight", "score", "n_members", "flags")
FROM_TRUTH = ("blendedness", "ebv")


@dataclass(frozen=True)
class Objects:
    """What the page says of N objects.

    columns: numbers (N,) by name; names: their ids; x, y (N,) and boxes (N, 4) in the mosaic's pixels; mixture: weights, means,
    sigmas, each (N, K); masks: run lengths as in `sky.catalog.masks`, or none.
    """

    names: list[str]
    columns: Mapping[str, Floats]
    x: Floats
    y: Floats
    boxes: Floats
    mixture: tuple[Floats, Floats, Floats]
    masks: list[str] | None


def object_columns(result: Evaluation, catalog: Table, truth: Table, limit: int) -> Objects:
    """At most ``limit`` matched gold galaxies, by decreasing abs(e) of the LSST convention."""
    z_true = np.asarray(truth["redshift"], np.float64)[result.gold_truth]
    e = metrics.residual(np.asarray(catalog["z_mode"], np.float64)[result.gold_catalog], z_true, "lsst")
    worst = np.argsort(-np.abs(e), kind="stable")[:limit]
    rows, true = result.gold_catalog[worst], result.gold_truth[worst]
    columns: dict[str, Floats] = {
        "z_true": z_true[worst],
        "z_mode": numbers(catalog, "z_mode")[rows],
        "e": e[worst],
        "outlier": (np.abs(e[worst]) > result.lsst.outlier_limit).astype(np.float64),
        "pit": result.pit[worst],
        f"mag_{result.gold_band}": numbers(truth, f"mag_{result.gold_band}")[true],
    }
    columns |= {name: numbers(catalog, name)[rows] for name in FROM_CATALOG if name in catalog.colnames}
    columns |= {name: numbers(truth, name)[true] for name in FROM_TRUTH if name in truth.colnames}
    mixture = catalog_mixture(catalog, rows)
    place = {name: numbers(catalog, name)[rows] if name in catalog.colnames else np.full(len(rows), np.nan) for name in ("x", "y")}
    corners = ("x0", "y0", "x1", "y1")
    boxes = [numbers(catalog, name)[rows] if name in catalog.colnames else np.full(len(rows), np.nan) for name in corners]
    return Objects(
        names=[str(catalog["id"][i]) for i in rows] if "id" in catalog.colnames else [str(i) for i in rows],
        columns=columns,
        x=place["x"],
        y=place["y"],
        boxes=np.stack(boxes, axis=1),
        mixture=(mixture.weights.numpy(), mixture.means.numpy(), mixture.sigmas.numpy()),
        masks=[str(catalog["mask_rle"][i]) for i in rows] if "mask_rle" in catalog.colnames else None,
    )
