"""Catalogues and other tables from the formats that `sky.catalog.writer` writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from astropy.table import Table

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.sky.catalog.ecsv import read_ecsv
from deepdisc_ops.sky.catalog.fits import read_fits
from deepdisc_ops.sky.catalog.hdf5 import read_hdf5
from deepdisc_ops.sky.catalog.parquet import read_parquet

READERS: dict[str, Callable[[Path], Table]] = {
    ".parquet": read_parquet,
    ".fits": read_fits,
    ".hdf5": read_hdf5,
    ".ecsv": read_ecsv,
}


def read_catalog(path: Path, hdu: str | None = None) -> Table:
    """Read a catalogue of any format that `write_catalog` writes, or table ``hdu`` of a FITS file."""
    if not path.exists():
        raise CatalogError(f"catalogue {path} does not exist")
    reader = READERS.get(path.suffix)
    try:
        return read_fits(path, hdu) if reader is None or hdu else reader(path)
    except (OSError, ValueError, KeyError) as error:
        raise CatalogError(f"{path} cannot be read as a table ({error}); expected {', '.join(READERS)}") from None
