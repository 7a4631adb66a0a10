"""The files open where astronomers open them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from astropy import units
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import Table
from catalogs import BANDS, PROVENANCE, catalog, tangent

from deepdisc_ops.photoz.mixture import GaussianMixture
from deepdisc_ops.sky.catalog import COLUMNS, open_catalog, write_catalog

WCS = tangent()


def test_astropy_and_topcat_find_units_descriptors_and_provenance_in_fits(spaced: Path) -> None:
    path, provenance = spaced / "catalog.fits", {**PROVENANCE, "long_name": "é", "simple": "yes", "many": "x" * 500}
    with open_catalog([path], BANDS, ("galaxy", "star"), provenance) as writer:
        writer.write(catalog(20, WCS, full=True))
    with fits.open(path) as file:
        file.verify("exception")
        table = file["CATALOG"]
        header, data, names = table.header, table.data, list(table.columns.names)
        assert list(data["mask_rle"][3]) == list(catalog(20, WCS, full=True)["mask_rle"][3])
    at = names.index("ra") + 1
    assert [header[f"{key}{at}"] for key in ("TUNIT", "TUCD", "TCOMM")] == ["deg", COLUMNS["ra"].ucd, COLUMNS["ra"].description]
    assert (header["MODEL"], header["BANDS"], header["CLASSES"], header["MANY"]) == ("test", "u,g,r", "galaxy,star", "x" * 500)
    back = Table.read(path)
    assert back["flux_u"].unit == units.nJy
    assert back["z_mode"].description == COLUMNS["z_mode"].description
    assert back["dec"].meta["ucd"] == COLUMNS["dec"].ucd


def test_pandas_and_pyarrow_read_parquet(spaced: Path) -> None:
    import pandas as pd
    import pyarrow.parquet as parquet

    table, path = catalog(30, WCS, full=True), spaced / "catalog.parquet"
    write_catalog(table, path)
    frame = pd.read_parquet(path)
    assert list(frame.columns) == table.colnames
    np.testing.assert_array_equal(frame["ra"], table["ra"])
    np.testing.assert_array_equal(np.stack(frame["mix_means"]), table["mix_means"])
    assert frame["given_name"].tolist() == table["given_name"].tolist()
    schema = parquet.read_schema(path)
    assert schema.metadata[b"model"] == b"test"
    metadata = {key.decode(): value.decode() for key, value in schema.field("ra").metadata.items()}
    assert metadata == {"description": COLUMNS["ra"].description, "unit": "deg", "ucd": COLUMNS["ra"].ucd}


def test_qp_reads_the_densities_and_agrees_with_ours(spaced: Path) -> None:
    import qp

    table, path = catalog(40, WCS, components=5, full=True), spaced / "catalog.hdf5"
    table["mix_weights"][3] = [1, 0, 0, 0, 0]
    table["mix_sigmas"][3, 1:] = 0
    write_catalog(table, path)
    ensemble = qp.read(str(path))
    mixture = GaussianMixture.from_arrays(*(np.asarray(table[name]) for name in ("mix_weights", "mix_means", "mix_sigmas")))
    assert ensemble.npdf == 40
    np.testing.assert_array_equal(ensemble.ancil["id"], table["id"])

    z_true = np.random.default_rng(3).uniform(0, 2, 40)
    pit = np.array([ensemble[i].cdf(z_true[i]) for i in range(40)]).ravel()
    np.testing.assert_allclose(pit, mixture.cdf(torch.as_tensor(z_true)), atol=1e-6)
    below = np.array([ensemble[i].cdf(0.0) for i in range(40)]).ravel()
    cut = (pit - below) / (1 - below)
    np.testing.assert_allclose(cut, mixture.truncated_cdf(torch.as_tensor(z_true)), atol=1e-6)
    for i in range(40):
        everywhere = ensemble[i].mode(np.linspace(0, 3, 3001)).item()
        mode = ensemble[i].mode(np.clip(np.linspace(everywhere - 0.002, everywhere + 0.002, 4001), 0, None)).item()
        assert mode == pytest.approx(mixture.mode()[i].item(), abs=1.1e-6)


def test_tables_io_and_h5py_find_the_columns(spaced: Path) -> None:
    import tables_io

    table, path = catalog(10, WCS), spaced / "catalog.hdf5"
    write_catalog(table, path)
    columns = tables_io.read(str(path))["ancil"]
    np.testing.assert_array_equal(columns["z_mode"], table["z_mode"])


def test_regions_lie_on_the_objects(spaced: Path) -> None:
    from regions import Regions

    table = catalog(25, WCS)
    corners = WCS.pixel_to_world(table["x0"] - 0.5, table["y1"] - 0.5)
    for wcs, path in ((WCS, spaced / "sky.reg"), (None, spaced / "image.reg")):
        with open_catalog([path], (), (), PROVENANCE, wcs) as writer:
            writer.write(table)
    sky, image = (Regions.read(spaced / name, format="ds9") for name in ("sky.reg", "image.reg"))
    assert len(sky) == len(image) == 25
    for i in range(25):
        assert sky[i].vertices[3].separation(SkyCoord(corners[i])) < 1e-4 * units.arcsec
        row = table[i]
        assert (float(sky[i].meta["text"]), sky[i].meta["tag"]) == (round(row["z_mode"], 2), [str(row["id"])])
        assert image[i].center.xy == pytest.approx((row["x"], row["y"]), abs=1e-3)
        assert (image[i].width, image[i].height) == pytest.approx((row["x1"] - row["x0"], row["y1"] - row["y0"]), abs=1e-3)
        assert sky[i].to_pixel(WCS).area == pytest.approx(image[i].area, rel=1e-3)
