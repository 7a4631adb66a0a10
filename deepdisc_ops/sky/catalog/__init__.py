"""The catalogue: one row an object, in the formats that astronomers open.

columns: what the rows are, and the table of an image's objects; ids and masks: two of those columns; writer: all formats in one
pass, in parts; parquet, fits, hdf5, ecsv, regions: a format each, written and read; coverage: the area that was searched.
"""

from deepdisc_ops.sky.catalog.columns import COLUMNS, Column, build_catalog, object_ids
from deepdisc_ops.sky.catalog.coverage import Coverage
from deepdisc_ops.sky.catalog.reader import read_catalog
from deepdisc_ops.sky.catalog.writer import FORMATS, CatalogWriter, check_path, open_catalog, write_catalog

__all__ = [
    "COLUMNS",
    "FORMATS",
    "CatalogWriter",
    "Column",
    "Coverage",
    "build_catalog",
    "check_path",
    "object_ids",
    "open_catalog",
    "read_catalog",
    "write_catalog",
]
