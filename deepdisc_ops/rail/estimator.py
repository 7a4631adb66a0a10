"""The estimator: images to a qp ensemble of redshift densities, and the catalogue with boxes and masks beside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import qp
from ceci.config import StageParameter
from rail.core.common_params import SharedParams
from rail.core.data import ModelHandle, QPHandle
from rail.core.enums import DistributionType
from rail.core.stage import RailStage
from rail.estimation.estimator import CatEstimator

import deepdisc_ops
from deepdisc_ops.data.records import SPLITS
from deepdisc_ops.errors import ConfigError
from deepdisc_ops.inference.journal import Found, read_found, write_found
from deepdisc_ops.rail.handles import CatalogHandle, EnsembleHandle, Images, ImagesHandle, check_bands
from deepdisc_ops.rail.packed import PackedEnsemble
from deepdisc_ops.rail.stage import DeepdiscStage, given
from deepdisc_ops.sky.catalog import Column, open_catalog, read_catalog
from deepdisc_ops.sky.dust import ebv_source
from deepdisc_ops.sky.images import Mosaic

if TYPE_CHECKING:
    from deepdisc_ops.inference.ensemble import Ensemble
    from deepdisc_ops.rail.sights import Sight

POINT_ESTIMATES = {"zmode": "z_mode", "zmean": "z_mean", "zmedian": "z_median", "zbest": "z_best"}
"""What RAIL calls the point estimates, and what the catalogue does."""
IMAGE = Column("number of the image among those of its split, 0 for a mosaic")
DEFAULT_EBV = "0.03"


class DeepdiscEstimator(DeepdiscStage, CatEstimator):
    """Redshift densities of all objects of a data set's images or of a mosaic, found and deblended by the same network.

    Processes look at pieces in turn, each writes what it found, and the first puts the pieces together: h5py needs no MPI.
    """

    name = "DeepdiscEstimator"
    entrypoint_function = "estimate"
    config_options = RailStage.config_options | {
        "split": StageParameter(str, "test", msg=f"Images of a data set to look at: {', '.join(SPLITS)}"),
        "chunk_size": StageParameter(int, 1, msg="Images, or windows of a mosaic, that a process looks at in its turn"),
        "device": StageParameter(str, "cpu", msg="Where the networks run: cpu, cuda, cuda:1"),
        "ebv": StageParameter(
            str, "", msg=f"E(B-V) in mag, or a map (sfd, ...); else what records tell, {DEFAULT_EBV} for a mosaic"
        ),
        "dust_maps": StageParameter(str, "", msg="Folder of the dust maps"),
        "window": StageParameter(int, 1024, msg="Side of a mosaic's windows in pixels"),
        "overlap": StageParameter(int, 64, msg="Pixels that neighbouring windows share"),
        "photometry": StageParameter(bool, True, msg="Measure fluxes"),
        "masks": StageParameter(bool, False, msg="Keep the objects' masks, where the networks make some"),
        "calculated_point_estimates": SharedParams.copy_param("calculated_point_estimates"),
    }
    inputs = [("model", EnsembleHandle), ("input", ImagesHandle)]  # noqa: RUF012  # as ceci has them
    outputs = [("output", QPHandle), ("catalog", CatalogHandle)]  # noqa: RUF012  # as ceci has them

    @classmethod
    def default_distribution_type(cls) -> DistributionType:
        """Densities are posteriors under the redshifts of training."""
        return DistributionType.posterior

    def open_model(self, tag: str = "model", **kwargs: Any) -> Ensemble:
        """The networks of the model, which is a path, a handle or a `PackedEnsemble`; on the device of the settings."""
        self.model = self._packed(kwargs.get(tag), tag).load(self.config.device)
        return self.model

    def validate(self) -> None:
        """Refuse before the work what cannot be done: a missing model, images without a band or without any record."""
        images = self.images()
        check_bands(images, tuple(self._packed(self.config.get("model")).description["bands"]))
        if not isinstance(images, Mosaic):
            images.records(self.config.split)
        unknown = [name for name in self.config.calculated_point_estimates if name not in POINT_ESTIMATES]
        if unknown:
            raise ConfigError(f"no point estimate is called {', '.join(unknown)}; expected some of {', '.join(POINT_ESTIMATES)}")
        if self.config.chunk_size < 1:
            raise ConfigError(f"chunk_size is {self.config.chunk_size}; expected 1 or more")

    def run(self) -> None:
        """Look at the pieces of this process, wait for the others, and put all together in the first."""
        ensemble = self.open_model(**self.config)
        sight = self._sight(self.images(), ensemble)
        folder = Path(self.get_output("output", final_name=True) + ".parts").absolute()
        self.together(lambda: _emptied(folder), first_alone=True)
        self.together(lambda: self._look(sight, folder))
        self.together(lambda: self._gather(sight, ensemble, folder), first_alone=True)

    def _look(self, sight: Sight, folder: Path) -> None:
        for start, end in self.data_ranges_by_rank(len(sight), self.config.chunk_size):
            for number in range(start, end):
                write_found(folder / f"{number}.npz", sight.look(number))

    def _gather(self, sight: Sight, ensemble: Ensemble, folder: Path) -> None:
        """Write both outputs from the pieces; the handles take them from there."""
        in_memory = self.config.output_mode == "return"
        paths = [Path(self.get_output(tag)) for tag in ("output", "catalog")]
        if in_memory:
            paths = [folder / path.name for path in paths]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._write(sight, ensemble, lambda number: read_found(folder / f"{number}.npz"), *paths)
        for tag, path, read in (("output", paths[0], qp.read), ("catalog", paths[1], read_catalog)):
            handle = self.add_handle(tag, data=read(path) if in_memory else None)
            handle.partial = not in_memory  # it is on disk, complete
        shutil.rmtree(folder)

    def _write(self, sight: Sight, ensemble: Ensemble, answers: Callable[[int], Found], densities: Path, catalog: Path) -> None:
        from deepdisc_ops.inference.mosaic import catalogue_rows

        bands, classes = ensemble.bands, ensemble.seats[0].info.config.model.classes
        provenance = {"made_by": f"deepdisc_ops {deepdisc_ops.__version__}, {self.name}", "model": ", ".join(ensemble.names)}
        with (
            open_catalog([densities], bands, classes, provenance) as pdfs,
            open_catalog([catalog], bands, classes, provenance) as rest,
        ):
            for objects, wcs, image in sight.parts(answers):
                numbered = objects.with_columns({"image": np.full(len(objects), image, np.int32)})
                rows = catalogue_rows(numbered, wcs, bands, {}, {"image": IMAGE})
                rest.write(rows)
                rows = rows[[name for name in rows.colnames if name != "mask_rle"]]
                rows["distribution_type"] = np.full(len(rows), self.default_distribution_type().value, np.int32)
                for name in self.config.calculated_point_estimates:
                    rows[name] = rows[POINT_ESTIMATES[name]]
                pdfs.write(rows)

    def _sight(self, images: Images, ensemble: Ensemble) -> Sight:
        from deepdisc_ops.rail.sights import Look, MosaicSight, RecordSight

        config = self.config
        maps = Path(config.dust_maps) if given(config.dust_maps) else None
        ebv = ebv_source(config.ebv, maps) if given(config.ebv) else None
        look = Look(ensemble, ebv, config.masks, config.photometry)
        if isinstance(images, Mosaic):
            return MosaicSight(images, look, ebv or ebv_source(DEFAULT_EBV), config.window, config.overlap)
        return RecordSight(images.records(config.split), look)

    def _packed(self, model: Any, tag: str = "model") -> PackedEnsemble:
        """The model, wherever it was handed in."""
        if isinstance(model, PackedEnsemble):
            return model
        handle = model if isinstance(model, ModelHandle) else self.get_handle(tag, allow_missing=True)
        if handle.has_data:
            return handle.data
        path = model if isinstance(model, str) and given(model) else handle.path
        if not given(path):
            raise ConfigError("no model is given; name the file that DeepdiscInformer wrote, or an ensemble folder")
        return PackedEnsemble.read(Path(path))


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
