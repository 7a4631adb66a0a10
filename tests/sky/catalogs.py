"""Catalogues of random objects for the tests."""

from __future__ import annotations

import numpy as np
from astropy.table import Table
from astropy.wcs import WCS

from deepdisc_ops.photoz.mixture import GaussianMixture, summarise
from deepdisc_ops.sky.catalog import build_catalog
from deepdisc_ops.sky.detections import MASK_SIDE, Detections

BANDS = ("u", "g", "r")
PROVENANCE = {"model": "test", "command": "deepdisc-ops predict 'a b.fits'"}


def tangent(ra: float = 30.0, dec: float = -5.0, scale: float = 0.2) -> WCS:
    """A turned and flipped tangent plane of ``scale`` arcsec a pixel."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.crpix = ["RA---TAN", "DEC--TAN"], [ra, dec], [50.0, 50.0]
    c, s = np.cos(0.4) * scale / 3600, np.sin(0.4) * scale / 3600
    wcs.wcs.cd = [[-c, s], [s, c]]
    return wcs


def detections(n: int, components: int = 4, *, full: bool = False, seed: int = 1) -> Detections:
    """Objects in 120 x 120 pixels; ``full`` ones have masks, fluxes in `BANDS` and columns of a given catalogue."""
    rng = np.random.default_rng([n, seed])
    corner = rng.uniform(0, 90, (n, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 20, (n, 2))], axis=1).astype(np.float32)
    mixture = [rng.dirichlet(np.ones(components), n), rng.uniform(0.1, 2, (n, components)), rng.uniform(0.02, 0.3, (n, components))]
    weights, means, sigmas = (np.asarray(part, np.float32).reshape(n, components) for part in mixture)
    index = np.arange(n, dtype=np.int32)
    extra = {
        "flux": rng.uniform(1, 9, (n, 3)).astype(np.float32),
        "flux_err": rng.uniform(0.1, 1, (n, 3)).astype(np.float32),
        "given_name": np.array([f"object {i}" for i in range(n)], "U12"),
        "sizes": rng.normal(size=(n, 2)),
        "isolated": index % 2 == 0,
    }
    return Detections(
        boxes,
        index / np.float32(7),
        index,
        weights,
        means,
        sigmas,
        index / np.float32(100),
        index,
        index,
        masks=rng.integers(0, 256, (n, MASK_SIDE, MASK_SIDE)).astype(np.uint8) if full else None,
        extra=extra if full else {},
    )


def summary(objects: Detections) -> dict[str, np.ndarray]:
    """The catalogue's redshift columns."""
    return summarise(GaussianMixture.from_arrays(objects.weights, objects.means, objects.sigmas))


def catalog(n: int, wcs: WCS | None = None, components: int = 4, *, full: bool = False, seed: int = 1) -> Table:
    """The catalogue of `detections`."""
    objects = detections(n, components, full=full, seed=seed)
    return build_catalog(objects, summary(objects), wcs, PROVENANCE, BANDS)
