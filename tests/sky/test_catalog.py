from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.table import Table
from astropy.wcs import WCS

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.photoz.mixture import GaussianMixture, summarise
from deepdisc_ops.sky.catalog import COLUMNS, build_catalog, read_catalog, write_catalog
from deepdisc_ops.sky.detections import Detections


def make(n: int, wcs: WCS | None = None, components: int = 4) -> Table:
    rng = np.random.default_rng(n)
    corner = rng.uniform(0, 90, (n, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 20, (n, 2))], axis=1).astype(np.float32)
    mixture = [rng.dirichlet(np.ones(components), n), rng.uniform(0.1, 2, (n, components)), rng.uniform(0.02, 0.3, (n, components))]
    weights, means, sigmas = (np.asarray(part, np.float32).reshape(n, components) for part in mixture)
    index = np.arange(n, dtype=np.int32)
    detections = Detections(boxes, index / np.float32(7), index, weights, means, sigmas, index / np.float32(100), index, index)
    summary = summarise(GaussianMixture.from_arrays(weights, means, sigmas))
    return build_catalog(detections, summary, wcs, {"model": "test", "command": "deepdisc-ops predict 'a b.fits'"})


@pytest.mark.parametrize("suffix", [".parquet", ".fits"])
@pytest.mark.parametrize("n", [0, 1, 50])
def test_catalogue_survives_a_round_trip(spaced: Path, suffix: str, n: int) -> None:
    table, path = make(n), spaced / f"catalog{suffix}"
    write_catalog(table, path)
    back = read_catalog(path)
    assert back.colnames == list(COLUMNS)
    for name in COLUMNS:
        np.testing.assert_array_equal(np.asarray(back[name]).reshape(table[name].shape), np.asarray(table[name]))
        assert (back[name].unit or None) == (table[name].unit or None)
    metadata = {key.lower(): value for key, value in back.meta.items()}
    assert metadata["model"] == "test"
    assert list(spaced.iterdir()) == [path]


def test_columns_carry_descriptions_in_fits_and_parquet(spaced: Path) -> None:
    for suffix in (".parquet", ".fits"):
        write_catalog(make(3), spaced / f"catalog{suffix}")
        assert read_catalog(spaced / f"catalog{suffix}")["z_mode"].description == COLUMNS["z_mode"].description


def test_rows_go_by_row_of_the_mosaic_and_positions_through_the_wcs() -> None:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.crpix = ["RA---TAN", "DEC--TAN"], [30.0, -5.0], [50.0, 50.0]
    wcs.wcs.cdelt = [-0.2 / 3600, 0.2 / 3600]
    table = make(40, wcs)
    assert (np.diff(table["y"]) >= 0).all()
    assert table["id"].tolist() == list(range(1, 41))
    x, y = wcs.world_to_pixel_values(table["ra"], table["dec"])
    np.testing.assert_allclose([x, y], [table["x"], table["y"]], atol=1e-6)
    np.testing.assert_allclose(table["x"], (table["x0"] + table["x1"]) / 2 - 0.5, atol=1e-4)


def test_unwritable_places_are_refused_early(spaced: Path) -> None:
    with pytest.raises(CatalogError, match="expected one of"):
        write_catalog(make(1), spaced / "catalog.csv")
    with pytest.raises(CatalogError, match="does not exist or cannot be written"):
        write_catalog(make(1), spaced / "absent" / "catalog.fits")
    with pytest.raises(CatalogError, match="does not exist"):
        read_catalog(spaced / "absent.fits")
