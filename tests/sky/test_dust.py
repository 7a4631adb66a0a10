from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import healpy
import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdisc_ops.errors import CatalogError, ConfigError, ImageError, InputError, SetupError
from deepdisc_ops.sky.dust import MAPS, EbvPlane, ebv_column, ebv_source, plane_over
from deepdisc_ops.sky.tiling import Window

POLES = np.array([192.86, 12.86]), np.array([27.13, -27.13])
"""The north and the south Galactic pole."""


def write_sfd(folder: Path, slope: float = 0.0, size: int = 64) -> Path:
    """Maps in the format of SFD: 0.08 and 0.04 mag over the two Galactic caps, rising by ``slope`` a pixel."""
    for pole, value, sign in (("ngp", 0.08, 1), ("sgp", 0.04, -1)):
        wcs = WCS(naxis=2)
        wcs.wcs.ctype, wcs.wcs.crpix = ["GLON-ZEA", "GLAT-ZEA"], [size / 2 + 0.5] * 2
        wcs.wcs.crval, wcs.wcs.cdelt = [90.0 * sign, 90.0 * sign], [-2.8, 2.8 * sign]
        header = fits.Header({"LAM_NSGP": sign, "LAM_SCAL": size // 2, **wcs.to_header()})
        ramp = value + slope * np.arange(size, dtype=np.float32)
        fits.PrimaryHDU(np.tile(ramp, (size, 1)), header).writeto(folder / f"SFD_dust_4096_{pole}.fits")
    return folder


@pytest.fixture(scope="module")
def sfd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sfd(tmp_path_factory.mktemp("a map"), slope=0.001)


def test_plane_meets_its_corners_and_is_linear_between() -> None:
    plane = EbvPlane((0.1, 0.2, 0.3, 0.4))
    x, y = np.array([-0.5, 9.5, -0.5, 9.5, 4.5]), np.array([-0.5, -0.5, 19.5, 19.5, 9.5])
    np.testing.assert_allclose(plane.at(x, y, 10, 20), [0.1, 0.2, 0.3, 0.4, 0.25], rtol=1e-6)
    np.testing.assert_allclose(EbvPlane.constant(0.03).at(x, y, 10, 20), 0.03)


def test_constant_source() -> None:
    source = ebv_source("0.05", scale=0.86)
    assert plane_over(Window(0, 0, 8, 8), None, source).corners == (0.05,) * 4
    assert str(source) == "constant"
    for text in ("-1", "nan", "10"):
        with pytest.raises(ConfigError, match="out of range"):
            ebv_source(text)


@pytest.mark.parametrize("text", ["dust", "os:system", "dustmaps.sfd:", "dustmaps.nothing:Query", "dustmaps.sfd:Nothing"])
def test_unknown_sources_are_named(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"E\\(B-V\\) source '{text}'"):
        ebv_source(text, tmp_path)


@pytest.mark.parametrize("name", [name for name in MAPS if name != "bh"])
def test_an_absent_map_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    for maps in (tmp_path, None):
        with pytest.raises(SetupError, match=rf"dust map {name} not found in .* fetch with dustmaps\.\w+\.fetch\("):
            ebv_source(name, maps)
    for file in MAPS[name].files:
        (tmp_path / file).write_bytes(b"not a map")
    with pytest.raises(SetupError, match=rf"dust map {name} in .* cannot be read"):
        ebv_source(name, tmp_path)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_senseless_scale_is_refused(scale: float) -> None:
    with pytest.raises(ConfigError, match="expected a positive number"):
        ebv_source("0.03", scale=scale)


def test_sfd_map_is_read_from_a_directory_and_scaled(spaced: Path) -> None:
    source = ebv_source("sfd", write_sfd(spaced), scale=0.86)
    np.testing.assert_allclose(source(*POLES), [0.0688, 0.0344], rtol=1e-3)
    assert str(source) == "sfd x 0.86"
    assert (source.name, source.scale) == ("sfd", 0.86)


def test_maps_are_found_where_dustmaps_puts_them(spaced: Path) -> None:
    (spaced / "sfd").mkdir()
    write_sfd(spaced / "sfd")
    np.testing.assert_allclose(ebv_source("sfd", spaced)(*POLES), [0.08, 0.04], rtol=1e-3)
    np.testing.assert_allclose(ebv_source("dustmaps.sfd:SFDQuery", spaced / "sfd")(*POLES), [0.08, 0.04], rtol=1e-3)


@settings(max_examples=30)
@given(st.sampled_from([(), (0,), (1,), (5,), (2, 3), (2, 0, 3), (2, 1, 4)]), st.integers(0, 1000))
def test_any_shape_of_positions(sfd: Path, shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    ra, dec = rng.uniform(0, 360, shape), rng.uniform(-90, 90, shape)
    source = ebv_source("sfd", sfd)
    values = source(ra, dec)
    assert values.shape == shape
    assert values.dtype == np.float64
    one_by_one = [source(a, d) for a, d in zip(np.ravel(ra), np.ravel(dec), strict=True)]
    np.testing.assert_allclose(values.ravel(), one_by_one, rtol=1e-6)


def test_threads_may_share_a_map(sfd: Path) -> None:
    source = ebv_source("sfd", sfd)
    rng = np.random.default_rng(3)
    fields = [(rng.uniform(0, 360, 300), rng.uniform(-90, 90, 300)) for _ in range(60)]
    expected = [source(*field) for field in fields]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for value, wanted in zip(pool.map(lambda field: source(*field), fields), expected, strict=True):
                np.testing.assert_array_equal(value, wanted)


def test_positions_must_be_numbers(sfd: Path) -> None:
    for ra, dec in (([1.0, np.nan], [0.0, 0.0]), ([1.0, 2.0], [0.0, 91.0])):
        with pytest.raises(InputError, match="1 of 2 positions"):
            ebv_source("sfd", sfd)(ra, dec)


def test_a_map_needs_a_wcs(sfd: Path) -> None:
    with pytest.raises(ImageError, match="E\\(B-V\\) from sfd needs positions"):
        plane_over(Window(0, 0, 8, 8), None, ebv_source("sfd", sfd))


def test_burstein_heiles_is_real_and_holes_are_named() -> None:
    source = ebv_source("bh")
    cosmos, draco = (150.1, 2.2), (260.05, 57.9)
    values = source(*np.transpose([cosmos, draco]))
    np.testing.assert_allclose(values, [0.02, 0.025], atol=0.02)
    plane = SkyCoord(30.0, 2.0, unit="deg", frame="galactic").icrs
    with pytest.raises(InputError, match=r"bh has no E\(B-V\) at 1 of 2 positions, the first at ra 279\.74145, dec -1\.69512"):
        source([150.1, plane.ra.deg], [2.2, plane.dec.deg])
    from dustmaps.bh import BHQuery

    rng = np.random.default_rng(0)
    ra, dec = rng.uniform(0, 360, 5000), np.degrees(np.arcsin(rng.uniform(-1, 1, 5000)))
    raw = BHQuery()(SkyCoord(ra, dec, unit="deg"))
    covered = np.isfinite(raw)
    values = source(ra[covered], dec[covered])
    np.testing.assert_allclose(values, np.maximum(raw[covered], 0))
    assert 0.7 < covered.mean() < 0.9
    assert values.min() == 0  # the map goes below zero around the poles
    assert 0.02 < np.median(values) < 0.08


def test_healpix_maps_by_name(spaced: Path) -> None:
    """Planck, GNILC and Lenz maps of 12 pixels, each holding its own number."""
    pixels = np.arange(12, dtype=np.float32) / 100 + 0.01
    for name, extension, column, unit in (
        ("planck", "COMP-MAP", "EBV", 1.0),
        ("planck_gnilc", "COMP-MAP", "TAU353", 1.49e4),
        ("lenz2017", "xtension", "EBV", 1.0),
    ):
        table = fits.BinTableHDU.from_columns([fits.Column(column, "E", array=pixels / unit)], name=extension)
        table.header["ORDERING"] = "NESTED"
        fits.HDUList([fits.PrimaryHDU(), table]).writeto(spaced / MAPS[name].files[0])
    for file, values in (("csfd_ebv.fits", pixels), ("mask.fits", pixels)):
        # HEALPix in rings, as Chiang's files are
        table = fits.BinTableHDU.from_columns([fits.Column("T", "E", array=values)], name="xtension")
        fits.HDUList([fits.PrimaryHDU(), table]).writeto(spaced / file)
    at = SkyCoord(np.array([10.0, 100, 190, 350]), np.array([50.0, -5, -60, 3]), unit="deg", frame="galactic")
    for name in ("planck", "planck_gnilc", "lenz2017", "csfd"):
        expected = pixels[healpy.ang2pix(1, at.l.deg, at.b.deg, nest=name != "csfd", lonlat=True)]
        np.testing.assert_allclose(ebv_source(name, spaced)(at.icrs.ra.deg, at.icrs.dec.deg), expected, rtol=1e-5)
    alone = spaced / "my planck map.fits"
    (spaced / MAPS["planck"].files[0]).rename(alone)
    for text in ("planck", "dustmaps.planck:PlanckQuery"):
        np.testing.assert_allclose(ebv_source(text, alone)(at.icrs.ra.deg, at.icrs.dec.deg).shape, (4,))


def test_a_map_in_three_dimensions_is_asked_behind_its_dust(spaced: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bayestar: 12 lines of sight, five samples, reddening that grows over 31 distances."""
    names = ["nside", "healpix_index", "DM_reliable_min", "DM_reliable_max", "n_stars", "converged"]
    info = np.zeros(12, dtype=list(zip(names, ["i4", "i8", "f4", "f4", "i4", "i1"], strict=True)))
    info["nside"], info["healpix_index"] = 1, np.arange(12)
    growth = np.linspace(0, 1, 31, dtype=np.float32)
    total = np.arange(1, 13, dtype=np.float32) / 10
    samples = total[:, None, None] * growth * np.array([0.5, 0.8, 1.0, 1.3, 9.0], np.float32)[:, None]
    with h5py.File(spaced / "bayestar.h5", "w") as file:
        file["pixel_info"], file["samples"], file["best_fit"] = info, samples, total[:, None] * growth
        file["pixel_info"].attrs["DM_bin_edges"] = np.linspace(4, 18.5, 31)
    source = ebv_source("dustmaps.bayestar:BayestarQuery", spaced / "bayestar.h5", scale=0.5)
    at = SkyCoord(np.array([10.0, 100, 190]), np.array([50.0, -5, -60]), unit="deg", frame="galactic")
    expected = total[healpy.ang2pix(1, at.l.deg, at.b.deg, nest=True, lonlat=True)] / 2
    np.testing.assert_allclose(source(at.icrs.ra.deg, at.icrs.dec.deg), expected, rtol=1e-5)
    assert capsys.readouterr().out == ""


def test_queries_without_a_local_map_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reads no local map"):
        ebv_source("dustmaps.sfd:SFDWebQuery", tmp_path)
    with pytest.raises(SetupError, match="needs its map; give its file"):
        ebv_source("dustmaps.bayestar:BayestarQuery")


def test_a_column_of_the_catalogue(spaced: Path) -> None:
    table = Table({"ra": [10.0, 10.05, 359.99], "dec": [0.0, 0.0, 0.0], "EBV": [0.1, 0.2, 0.3]})
    source = ebv_column(table, "EBV", scale=0.5)
    np.testing.assert_allclose(source([10.001, 10.04, 0.01], [0.01, 0.0, 0.0]), [0.05, 0.1, 0.15])
    assert str(source) == "column EBV x 0.5"
    with pytest.raises(InputError, match="column EBV has no E\\(B-V\\) at 1 of 2 positions"):
        source([10.0, 10.0], [0.0, 1.0])
    table.write(spaced / "t.fits")
    np.testing.assert_allclose(ebv_source("column:EBV", spaced / "t.fits")(10.0, 0.0), 0.1)
    with pytest.raises(ConfigError, match="needs a table"):
        ebv_source("column:EBV")
    with pytest.raises(CatalogError, match="no column ebv"):
        ebv_source("column:ebv", spaced / "t.fits")
    table["ra"] = (np.asarray(table["ra"]) * u.deg).to(u.hourangle)
    np.testing.assert_allclose(ebv_column(table, "EBV")(10.0, 0.0), 0.1)


@pytest.mark.parametrize("bad", [np.nan, -0.1, 20.0])
def test_a_column_with_holes_is_refused(bad: float) -> None:
    with pytest.raises(CatalogError, match="1 of 2 rows"):
        ebv_column(Table({"ra": [1.0, 2.0], "dec": [0.0, 0.0], "ebv": [0.1, bad]}))
    with pytest.raises(CatalogError, match="0 of 0 rows"):
        ebv_column(Table({"ra": [], "dec": [], "ebv": []}))


HOME = """
import os, sys
from pathlib import Path
import warnings
warnings.simplefilter("error")
from deepdisc_ops.sky.dust import ebv_source
before = dict(os.environ)
assert abs(ebv_source("sfd", Path(sys.argv[1]))(192.86, 27.13) - 0.112) < 0.01
assert 0 <= ebv_source("bh")(150.1, 2.2) < 0.1
assert dict(os.environ) == before
"""


def test_nothing_is_written_into_the_home_directory(sfd: Path, spaced: Path) -> None:
    home = spaced / "home"
    home.mkdir()
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", HOME, str(sfd)]
    root = Path(__file__).parents[2]
    environment["MPLBACKEND"] = "Agg"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    assert list(home.rglob("*")) == []
