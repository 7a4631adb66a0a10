"""What travels between stages, as RAIL's data handles: images, a packed ensemble, a catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from astropy.table import Table
from rail.core.data import DataHandle, ModelHandle

from deepdisc_ops.data.store import DESCRIPTION, Dataset, open_dataset
from deepdisc_ops.errors import CatalogError, ImageError
from deepdisc_ops.rail.packed import PackedEnsemble
from deepdisc_ops.sky.catalog import read_catalog, write_catalog
from deepdisc_ops.sky.images import Mosaic, open_mosaic

Images = Dataset | Mosaic


def open_images(path: Path) -> Images:
    """A data set's folder, one file of a mosaic, or a folder with a FITS file a band; opened, not loaded."""
    if not path.exists():
        raise ImageError(f"no images at {path}; give the folder of a data set, a FITS file, or a folder with one a band")
    if path.is_file():
        return open_mosaic(path)
    if (path / DESCRIPTION).is_file():
        return open_dataset(path)
    files = sorted(file for file in path.iterdir() if ".fits" in file.suffixes)
    if not files:
        raise ImageError(
            f"{path} holds neither {DESCRIPTION} nor a FITS file; give the folder of a data set or of a mosaic's bands"
        )
    return open_mosaic(files)


def image_bands(images: Images) -> tuple[str, ...]:
    """The bands that images have."""
    return images.bands if isinstance(images, Mosaic) else tuple(images.info.bands)


def check_bands(images: Images, bands: tuple[str, ...]) -> None:
    """Raise `ImageError` where ``images`` lack one of a model's ``bands``."""
    there = image_bands(images)
    missing = [band for band in bands if band not in there]
    if missing:
        raise ImageError(
            f"the images have no band {', '.join(missing)}: found {', '.join(there)}, the model wants {', '.join(bands)}; "
            "add it, or use a model of the bands there are"
        )


class ImagesHandle(DataHandle):
    """A data set or a mosaic, by its path or opened; see `open_images`."""

    suffix = None
    interactive_type = "deepdisc_ops.data.store.Dataset or deepdisc_ops.sky.images.Mosaic"

    @classmethod
    def _read(cls, path: str, **_: Any) -> Images:
        return open_images(Path(path))

    @classmethod
    def _validate_data(cls, data: Any) -> None:
        if not isinstance(data, Dataset | Mosaic):
            raise CatalogError(f"the images are a {type(data).__name__}; expected a data set or a mosaic, opened, or a path")


class EnsembleHandle(ModelHandle):
    """A `PackedEnsemble`, kept as a zip."""

    suffix = "zip"
    interactive_type = "deepdisc_ops.rail.packed.PackedEnsemble"

    @classmethod
    def _read(cls, path: str, **_: Any) -> PackedEnsemble:
        return PackedEnsemble.read(Path(path))

    @classmethod
    def _write(cls, data: PackedEnsemble, path: str, **_: Any) -> None:
        Path(path).write_bytes(data.content)


class CatalogHandle(DataHandle):
    """A catalogue (`sky.catalog`), an astropy table in memory."""

    suffix = "parquet"
    interactive_type = "astropy.table.Table"

    @classmethod
    def _read(cls, path: str, **_: Any) -> Table:
        return read_catalog(Path(path))

    @classmethod
    def _write(cls, data: Table, path: str, **_: Any) -> None:
        write_catalog(data, Path(path))
