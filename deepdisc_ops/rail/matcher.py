"""The matcher: galaxies that the estimator found and the truth knows, as RAIL's evaluators and other codes take them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import qp
from ceci.config import StageParameter
from numpy.typing import NDArray
from rail.core.common_params import SharedParams
from rail.core.data import Hdf5Handle, QPHandle
from rail.core.stage import RailStage

from deepdisc_ops.data.records import GALAXY, SPLITS
from deepdisc_ops.data.store import Dataset
from deepdisc_ops.errors import CatalogError
from deepdisc_ops.rail.handles import Images, ImagesHandle, image_bands
from deepdisc_ops.rail.stage import DeepdiscStage, given
from deepdisc_ops.sky.catalog import read_catalog
from deepdisc_ops.sky.images import Mosaic
from deepdisc_ops.sky.matching import match_on_sky
from deepdisc_ops.sky.photometry import magnitudes

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
NOT_OBSERVED = 99.0
"""What RAIL's codes take for a band without a measurement."""


class DeepdiscMatcher(DeepdiscStage):
    """Match an estimate to the truth of its images: densities on a grid, and photometry with true redshifts, row for row.

    Densities are those of the catalogue's columns and of our metrics, cut at z = 0 and renormalised, where the estimator's mixtures
    are of the whole line.
    """

    name = "DeepdiscMatcher"
    entrypoint_function = "match"
    parallel = False
    config_options = RailStage.config_options | {
        "split": StageParameter(str, "test", msg=f"Images of the data set that the estimate is of: {', '.join(SPLITS)}"),
        "truth": StageParameter(str, "", msg="Table with ra, dec, class, redshift, mag_<gold_band>; else what the images carry"),
        "gold_band": StageParameter(str, "i", msg="Band of the limit, for mosaics and tables"),
        "gold_limit": StageParameter(float, 25.3, msg="Magnitude that galaxies are brighter than"),
        "radius_arcsec": StageParameter(float, 0.5, msg="Largest distance of a match"),
        "magnitude": StageParameter(str, "mag_{band}_lsst", msg="Name of a column of magnitudes"),
        "error": StageParameter(str, "mag_err_{band}_lsst", msg="Name of a column of their errors"),
        "band_a_env": SharedParams.copy_param("band_a_env"),
        "redshift_col": SharedParams.copy_param("redshift_col"),
        "zmin": SharedParams.copy_param("zmin"),
        "zmax": SharedParams.copy_param("zmax"),
        "nzbins": SharedParams.copy_param("nzbins"),
    }
    inputs = [("input", QPHandle), ("images", ImagesHandle)]  # noqa: RUF012  # as ceci has them
    outputs = [("output", QPHandle), ("photometry", Hdf5Handle)]  # noqa: RUF012  # as ceci has them

    def match(self, estimate: qp.Ensemble, images: Images, **_: Any) -> dict[str, Any]:
        """The handles of densities (``output``) and ``photometry``."""
        self.set_data("input", estimate)
        self.set_data("images", images)
        self.validate()
        self.run()
        self.finalize()
        return {tag: self.get_handle(tag) for tag in ("output", "photometry")}

    def run(self) -> None:
        """Match, and write both tables."""
        estimate, images = self.get_data("input"), self.images("images")
        rows, redshift = self._matches(estimate.ancil, images)
        if not len(rows):
            raise CatalogError(
                f"none of {estimate.npdf} objects lies within {self.config.radius_arcsec} arcsec of a galaxy with a redshift and "
                f"a magnitude below {self.config.gold_limit}; are estimate and truth of the same images?"
            )
        order = np.argsort(rows, kind="stable")
        rows, redshift = rows[order], redshift[order]
        ancil = {name: np.asarray(column)[rows] for name, column in estimate.ancil.items()}
        ancil[self.config.redshift_col] = redshift
        self.add_data("output", qp.Ensemble(qp.interp, data=self._densities(estimate, rows), ancil=ancil))
        self.add_data("photometry", self._photometry(ancil, image_bands(images)))

    def _matches(self, found: Mapping[str, Any], images: Images) -> tuple[Rows, Floats]:
        """Rows of the estimate that are galaxies of the truth, and their redshifts."""
        if isinstance(images, Dataset) and not given(self.config.truth):
            return self._matches_by_image(found, images)
        table = self._truth(images)
        names = ("ra", "dec", "class", "redshift", f"mag_{self.config.gold_band}")
        missing = [name for name in names if name not in table]
        if missing:
            raise CatalogError(f"the truth lacks the columns {', '.join(missing)}; expected {', '.join(names)}")
        ra, dec, kind, redshift, mag = (np.asarray(table[name], np.float64) for name in names)
        gold = self._gold(kind, redshift, mag)
        pairs = match_on_sky(ra[gold], dec[gold], found["ra"], found["dec"], self.config.radius_arcsec)
        return pairs.index2, redshift[gold][pairs.index1]

    def _matches_by_image(self, found: Mapping[str, Any], dataset: Dataset) -> tuple[Rows, Floats]:
        """In the pixels of each image, which need not be on the sky."""
        degrees = dataset.info.pixel_scale / 3600
        rows, redshifts = [np.zeros(0, np.intp)], [np.zeros(0)]
        for number, record in enumerate(dataset.records(self.config.split)):
            here = np.flatnonzero(np.asarray(found["image"]) == number)
            truth = record.objects.select(self._gold(record.objects.classes, record.objects.redshift, record.objects.mag))
            x, y = (degrees * np.asarray(found[name], np.float64)[here] for name in ("x", "y"))
            pairs = match_on_sky(degrees * truth.x, degrees * truth.y, x, y, self.config.radius_arcsec)
            rows.append(here[pairs.index2])
            redshifts.append(truth.redshift[pairs.index1].astype(np.float64))
        return np.concatenate(rows), np.concatenate(redshifts)

    def _truth(self, images: Images) -> Any:
        if given(self.config.truth):
            return read_catalog(Path(self.config.truth)).columns
        if not isinstance(images, Mosaic):
            raise TypeError(f"{images!r} is no mosaic")
        return read_catalog(images.paths[0], "TRUTH").columns

    def _gold(self, classes: NDArray[Any], redshift: NDArray[Any], mag: NDArray[Any]) -> NDArray[np.bool_]:
        return np.asarray((classes == GALAXY) & np.isfinite(redshift) & (mag < self.config.gold_limit))

    def _densities(self, estimate: qp.Ensemble, rows: Rows) -> dict[str, Floats]:
        """The mixtures of ``rows`` on RAIL's grid."""
        from deepdisc_ops.photoz.mixture import GaussianMixture

        grid = np.linspace(self.config.zmin, self.config.zmax, self.config.nzbins)
        mixture = [np.asarray(estimate.objdata[name])[rows] for name in ("weights", "means", "stds")]
        density = GaussianMixture.from_arrays(*mixture).truncated_density(grid)
        outside = int((~(density.sum(1) > 0)).sum())
        if outside:
            raise CatalogError(
                f"{outside} of {len(rows)} densities are zero or not finite from {self.config.zmin} to {self.config.zmax}; "
                "widen the grid by zmin and zmax"
            )
        return {"xvals": grid, "yvals": density}

    def _photometry(self, ancil: Mapping[str, Any], bands: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        """Dereddened magnitudes with errors, and what else tells of the objects."""
        measured = [band for band in bands if f"flux_{band}" in ancil]
        if not measured:
            raise CatalogError("the estimate has no fluxes; run DeepdiscEstimator with photometry")
        table = {name: np.asarray(ancil[name]) for name in ("id", "ra", "dec", self.config.redshift_col)}
        for band in measured:
            mag, error, _ = magnitudes(ancil[f"flux_{band}"], ancil[f"flux_err_{band}"])
            name = self.config.magnitude.format(band=band)
            dust = np.asarray(ancil["ebv"], np.float64) * self.config.band_a_env.get(name, 0.0)
            table[name] = np.where(np.isfinite(mag), mag - dust, NOT_OBSERVED)
            table[self.config.error.format(band=band)] = np.where(np.isfinite(error), error, 1.0)
        return table
