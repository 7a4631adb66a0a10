"""The package in a dozen names, for notebooks and scripts: each is one command's work on values instead of files.

``import deepdisc_ops as dd`` has them all and loads nothing until one is used.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from deepdisc_ops.errors import ArchiveError, ConfigError

if TYPE_CHECKING:
    from astropy.coordinates import SkyCoord
    from astropy.table import Table

    from deepdisc_ops.config import TrainingConfig
    from deepdisc_ops.data.store import Dataset
    from deepdisc_ops.inference.ensemble import Ensemble
    from deepdisc_ops.photoz.evaluation import Evaluation
    from deepdisc_ops.serving.client import Client
    from deepdisc_ops.sky.images import Mosaic

# What detectron2 does at its import and torch says of it, to nobody's use in a notebook.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release", UserWarning)

PathLike = str | Path


def read(*paths: PathLike, bands: Sequence[str] | None = None, **wishes: Any) -> Mosaic:
    """Images as one `Mosaic`, opened and not loaded; ``wishes`` are those of `sky.images.open_mosaic`.

    >>> mosaic = read("mosaic.fits", bands="gri")
    >>> mosaic.bands
    ('g', 'r', 'i')
    """
    from deepdisc_ops.sky.images import open_mosaic

    return open_mosaic([Path(path) for path in paths], bands, **wishes)


def read_catalog(path: PathLike) -> Table:
    """A catalogue of any of our formats, with units, descriptions and provenance.

    >>> catalog = read_catalog("catalog.parquet")
    >>> catalog["ra"].unit
    Unit("deg")
    """
    from deepdisc_ops.sky import catalog

    return catalog.read_catalog(Path(path))


def simulate(
    out: PathLike, *, train: int = 200, validation: int = 24, size: int = 256, seed: int = 0, processes: int = 0, **sky: Any
) -> Dataset:
    """A data set of simulated scenes with their truth; ``sky`` are settings of `config.SkySettings`.

    >>> scenes = simulate("scenes", train=4, validation=2, size=128, survey="lsst", years=5.0)
    >>> scenes.split_sizes
    {'train': 4, 'validation': 2}
    """
    from deepdisc_ops.config import SkySettings, validate
    from deepdisc_ops.data.simulate import simulate_dataset

    counts = {split: count for split, count in {"train": train, "validation": validation}.items() if count}
    settings = validate(SkySettings, sky, "simulate")
    return simulate_dataset(settings, Path(out), counts=counts, size=size, seed=seed, processes=processes)


def simulate_mosaic(out: PathLike, *, side: int = 1024, seed: int = 0, **sky: Any) -> Mosaic:
    """One simulated image with its truth (the table TRUTH of the file).

    >>> mosaic = simulate_mosaic("mosaic.fits", side=256, seed=7)
    >>> mosaic.width, mosaic.bands
    (256, ('u', 'g', 'r', 'i', 'z', 'y'))
    """
    from deepdisc_ops.config import SkySettings, validate
    from deepdisc_ops.data.simulate import simulate_scene, write_scene

    path = Path(out)
    if path.suffix != ".fits":
        raise ConfigError(f"the mosaic {path} is no .fits file; name one")
    write_scene(simulate_scene(validate(SkySettings, sky, "simulate_mosaic"), size=side, seed=seed), path)
    return read(path)


def load_config(config: PathLike | None = None, **overrides: Any) -> TrainingConfig:
    """A training's settings: a preset (lsst, jades, small) or a YAML file, with overrides by dotted key.

    >>> config = load_config("small", **{"data.path": "scenes", "train.steps": 4, "train.validate_every": 4, "data.crop": 64})
    >>> config.train.steps
    4
    """
    import json

    from deepdisc_ops import config as settings

    words = [f"{key}={json.dumps(str(value) if isinstance(value, Path) else value)}" for key, value in overrides.items()]
    return settings.load(None if config is None else Path(config), words, settings.TrainingConfig)


def train(config: TrainingConfig | PathLike, out: PathLike = "run", *, report: Callable[[int, Any], None] | None = None) -> Path:
    """One network, trained; the folder of its best checkpoint. An unfinished training in ``out`` goes on.

    ``report(step, metrics)`` is called after each validation.

    >>> best = train(config, "run")
    >>> best.name
    'best'
    """
    from deepdisc_ops.config import TrainingConfig
    from deepdisc_ops.training import loop

    settings = config if isinstance(config, TrainingConfig) else load_config(config)
    return loop.train(settings, Path(out), report=report or _quiet)


def _quiet(step: int, metrics: Any) -> None:
    """Report nothing."""


def load_ensemble(
    model: PathLike, device: str = "cpu", *, memory: Literal["keep"] = "keep", on_failure: Literal["raise", "skip"] = "raise"
) -> Ensemble:
    """The members of a .mar archive, an ensemble folder or a checkpoint folder, in memory on ``device``.

    >>> ensemble = load_ensemble("models/lsst-small")
    >>> ensemble.bands
    ('u', 'g', 'r', 'i', 'z', 'y')
    """
    from deepdisc_ops.inference.ensemble import Ensemble, write_ensemble
    from deepdisc_ops.model.weights import DESCRIPTION

    path = Path(model)
    if not path.exists():
        raise ArchiveError(f"{path} does not exist; give a .mar archive, an ensemble folder or a checkpoint folder (RUN/best)")
    with tempfile.TemporaryDirectory() as scratch:
        folder = path
        if path.suffix == ".mar":
            from deepdisc_ops.serving.archive import unpack_archive

            folder = unpack_archive(path, Path(scratch) / "ensemble")
        elif (path / DESCRIPTION).exists():
            folder = Path(scratch) / "ensemble"
            write_ensemble(folder, [path])
        return Ensemble.load(folder, device, memory=memory, on_failure=on_failure)


def predict(
    images: Mosaic | PathLike | Iterable[PathLike],
    model: Ensemble | Client | PathLike,
    *,
    ebv: float | str = 0.03,
    window: int = 1024,
    overlap: int = 64,
    photometry: bool = True,
    progress: Callable[[int, int, int], None] | None = None,
) -> Table:
    """The catalogue of a mosaic: one row an object, with its redshift density; columns as in `sky.catalog.COLUMNS`.

    ``model`` is an ensemble, the path of one, or a `Client` of an endpoint. ``ebv`` is a number in mag or the name of a map.
    In memory, for what fits: `deepdisc-ops predict` streams mosaics of any size to a file and goes on after an interruption.

    >>> catalog = predict("mosaic.fits", ensemble, ebv=0.02)
    >>> len(catalog) > 50
    True
    """
    from deepdisc_ops.inference.ensemble import Ensemble
    from deepdisc_ops.inference.mosaic import Predictor, predict_mosaic
    from deepdisc_ops.inference.recipe import examiners
    from deepdisc_ops.sky.dust import ebv_source
    from deepdisc_ops.sky.images import Mosaic

    eyes = load_ensemble(model) if isinstance(model, str | Path) else model
    look: Predictor
    if isinstance(eyes, Ensemble):
        ensemble = eyes
        bands, domains, scale = ensemble.bands, [seat.info.domain for seat in ensemble.seats], ensemble.pixel_scale
        stride, provenance = ensemble.stride, {"model": ", ".join(ensemble.names)}

        def look(image: Any, plane: Any) -> Any:
            return ensemble.predict(image.data, plane, image.mask)

    else:
        bands, domains, scale, stride, provenance, look = None, [], None, 32, {"model": eyes.url}, eyes.predict
    opened = None
    if not isinstance(images, Mosaic):
        opened = images = read(*([images] if isinstance(images, str | Path) else images), bands=bands)
    try:
        mosaic = images.select(bands) if bands else images
        return predict_mosaic(
            mosaic,
            look,
            ebv_source(str(ebv)),
            window=window,
            overlap=overlap,
            stride=int(np.lcm(32, stride)),
            examiners=examiners(mosaic, domains, scale, photometry=photometry, diameter=None),
            provenance=provenance,
            progress=progress,
        )
    finally:
        if opened is not None:
            opened.close()


def evaluate(catalog: Table | PathLike, truth: Table | PathLike, *, seed: int = 0, **options: Any) -> Evaluation:
    """Completeness, purity and redshift metrics of a catalogue against the truth; ``options`` of `photoz.evaluation.evaluate`.

    >>> evaluate(catalog, "mosaic.fits").completeness.value > 0.8
    True
    """
    from deepdisc_ops.photoz import evaluation
    from deepdisc_ops.sky.catalog import read_catalog

    def table(source: Table | PathLike, hdu: str | None = None) -> Table:
        return read_catalog(Path(source), hdu) if isinstance(source, str | Path) else source

    hdu = "TRUTH" if isinstance(truth, str | Path) and Path(truth).suffix == ".fits" else None
    return evaluation.evaluate(table(catalog), table(truth, hdu), rng=np.random.default_rng(seed), **options)


def positions(catalog: Table) -> SkyCoord:
    """Where a catalogue's objects are.

    >>> positions(catalog).match_to_catalog_sky(positions(catalog))[0][:3]
    array([0, 1, 2])
    """
    from astropy import units
    from astropy.coordinates import SkyCoord

    return SkyCoord(np.asarray(catalog["ra"]) * units.deg, np.asarray(catalog["dec"]) * units.deg)


def densities(catalog: Table) -> Any:
    """A catalogue's redshift densities as a ``qp`` ensemble (mixmod), whose ancillary table is the catalogue's other columns.

    >>> densities(catalog).pdf(np.linspace(0, 3, 301)).shape[1]
    301
    """
    import qp

    mixture = {"means": "mix_means", "stds": "mix_sigmas", "weights": "mix_weights"}
    plain: Mapping[str, Any] = {name: np.asarray(catalog[name]) for name in catalog.colnames if not name.startswith("mix_")}
    data = {key: np.asarray(catalog[name], np.float64) for key, name in mixture.items()}
    return qp.Ensemble(qp.mixmod, data=data, ancil=dict(plain))


def arrow(catalog: Table) -> Any:
    """A catalogue as a pyarrow table, mixtures as lists; its ``to_pandas`` gives a data frame.

    >>> arrow(catalog).to_pandas()["z_mode"].between(0, 5).all()
    np.True_
    """
    from deepdisc_ops.sky.catalog.parquet import arrow_table

    return arrow_table(catalog)


def connect(run_dir: PathLike) -> Client:
    """The endpoint that runs in ``run_dir``; close it, or use it as a context.

    >>> with connect("server") as endpoint:
    ...     catalog = predict("mosaic.fits", endpoint)
    >>> len(catalog) > 50
    True
    """
    from deepdisc_ops.serving.client import Client

    return Client.from_discovery(Path(run_dir))


def serve(archive: PathLike, run_dir: PathLike = "server", **options: Any) -> Client:
    """Start the endpoint of an archive and return its client; ``options`` of `serving.server.start`. `stop` ends it.

    >>> endpoint = serve("ensemble.mar", "server", threads=1)
    >>> endpoint.bands
    ('u', 'g', 'r', 'i', 'z', 'y')
    >>> endpoint.close()
    """
    from deepdisc_ops.serving import server

    server.start(Path(archive), Path(run_dir), **options)
    return connect(run_dir)


def stop(run_dir: PathLike = "server") -> bool:
    """End the endpoint of ``run_dir``; False where there was none.

    >>> stop("server")
    True
    """
    from deepdisc_ops.serving import server

    return server.stop(Path(run_dir))
