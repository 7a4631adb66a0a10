"""Windows: slices of the whole in pixels and on the sky, in any thread, in little memory."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS, Sip
from astropy.wcs.utils import proj_plane_pixel_area
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdisc_ops.errors import ImageError
from deepdisc_ops.sky.coordinates import grid_offset_pixels, icrs_positions, pixel_area_arcsec2
from deepdisc_ops.sky.images import Mosaic, open_mosaic
from deepdisc_ops.sky.tiling import Window

WIDTH, HEIGHT = 67, 43
DISTORTIONS = ("none", "sip", "tpv", "table")
STORAGE = ("raw", "scaled", "tiles", "hdf5", "npy")


def distorted(kind: str, width: int = WIDTH, height: int = HEIGHT, strength: float = 1.0) -> WCS:
    """A rotated WCS whose distortion moves the corners by some pixels and vanishes at the reference pixel."""
    angle, scale = np.radians(37.0), 0.2 / 3600
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval, wcs.wcs.crpix = [150.0, 62.0], [width / 3, height / 2]
    wcs.wcs.cd = scale * np.array([[-np.cos(angle), np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    if kind == "sip":
        wcs.wcs.ctype = ["RA---TAN-SIP", "DEC--TAN-SIP"]
        a = np.zeros((4, 4))
        a[2, 0], a[0, 2], a[1, 2] = np.array([3, -2, 2]) * strength / width**2 / np.array([1, 1, width])
        wcs.sip = Sip(a, -a.T, None, None, wcs.wcs.crpix)
    elif kind == "tpv":
        wcs.wcs.ctype = ["RA---TPV", "DEC--TPV"]
        size = width * scale
        wcs.wcs.set_pv([(1, 1, 1.0), (1, 4, 0.04 * strength / size), (2, 1, 1.0), (2, 5, 0.05 * strength / size)])
    wcs.wcs.set()
    return wcs


def write(folder: Path, distortion: str = "none", storage: str = "raw") -> Path:
    """Two bands of noise with a few NaN."""
    rng = np.random.default_rng(5)
    data = rng.normal(0, 10, (2, HEIGHT, WIDTH)).astype(np.float32)
    wcs = distorted("none" if distortion == "table" else distortion)
    if storage == "hdf5":
        import h5py

        with h5py.File(folder / "m.h5", "w") as file:
            images = file.create_dataset("images", data=data, chunks=(1, 16, 16))
            images.attrs.update(bands=["g", "r"], unit="nJy", wcs=wcs.to_header(relax=True).tostring(sep="\n"))
        return folder / "m.h5"
    if storage == "npy":
        np.save(folder / "m.npy", data)
        return folder / "m.npy"
    hdus = []
    for band, plane in zip(("g", "r"), data, strict=True):
        header = wcs.to_header(relax=True)
        header["BUNIT"] = "nJy"
        if distortion == "table":
            header.update(CPDIS1="LOOKUP", CPDIS2="LOOKUP")
            for axis in (1, 2):
                header.update({f"DP{axis}.EXTVER": axis, f"DP{axis}.NAXES": 2, f"DP{axis}.AXIS.1": 1, f"DP{axis}.AXIS.2": 2})
        hdu = fits.CompImageHDU if storage == "tiles" else fits.ImageHDU
        options = {"tile_shape": (16, 16), "quantize_level": 0, "compression_type": "GZIP_1"} if storage == "tiles" else {}
        hdus.append(hdu(plane, header, name=band, **options))
        if storage == "scaled":
            hdus[-1].scale("int16", bscale=0.01, bzero=3)
    if distortion == "table":
        for axis in (1, 2):
            grid = rng.normal(0, 1, (5, 7)).astype(np.float32)
            table = fits.Header({"CRPIX1": 1, "CRPIX2": 1, "CRVAL1": 1, "CRVAL2": 1, "CDELT1": 11, "CDELT2": 11})
            hdus.append(fits.ImageHDU(grid, table, name="WCSDVARR", ver=axis))
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(folder / "m.fits")
    return folder / "m.fits"


@pytest.fixture(scope="module")
def mosaics(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Mosaic]]:
    opened = {}
    for kind in DISTORTIONS:
        opened[kind] = open_mosaic(write(tmp_path_factory.mktemp(f"a {kind}"), kind), "gr")
    for kind in STORAGE[1:-1]:
        opened[kind] = open_mosaic(write(tmp_path_factory.mktemp(f"a {kind}"), storage=kind), "gr")
    path = write(tmp_path_factory.mktemp("a npy"), storage="npy")
    opened["npy"] = open_mosaic(path, "gr", plane_bands="gr", zero_point=31.4, pixel_scale=0.2, require_wcs=False)
    yield opened
    for mosaic in opened.values():
        mosaic.close()


@settings(max_examples=120)
@given(
    kind=st.sampled_from(sorted({*DISTORTIONS, *STORAGE[1:]})),
    columns=st.tuples(st.integers(0, WIDTH - 1), st.integers(0, WIDTH - 1)),
    rows=st.tuples(st.integers(0, HEIGHT - 1), st.integers(0, HEIGHT - 1)),
)
def test_a_window_is_a_slice_of_the_whole(
    mosaics: dict[str, Mosaic], kind: str, columns: tuple[int, int], rows: tuple[int, int]
) -> None:
    mosaic = mosaics[kind]
    window = Window(min(columns), min(rows), max(columns) + 1, max(rows) + 1)
    whole, part = mosaic.read(), mosaic.read(window)
    np.testing.assert_array_equal(part.data, whole.data[:, window.y0 : window.y1, window.x0 : window.x1])
    if kind == "npy":
        assert part.wcs is whole.wcs is None
        return
    x, y = np.array([0.0, window.width - 1, 0.3]), np.array([0.0, window.height - 1, 0.2])
    here = icrs_positions(part.wcs, x, y)
    there = icrs_positions(mosaic.wcs, x + window.x0, y + window.y0)
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-9)


@pytest.mark.parametrize("window", [(0, 0, 68, 5), (-1, 0, 5, 5), (5, 5, 5, 9), (9, 5, 5, 9)])
def test_a_window_outside_is_refused(mosaics: dict[str, Mosaic], window: tuple[int, int, int, int]) -> None:
    with pytest.raises(ImageError, match="is no window of 67x43 pixels"):
        mosaics["none"].read(Window(*window))


@pytest.mark.parametrize("kind", ["sip", "table", "tiles", "hdf5", "npy"])
def test_threads_may_share_a_mosaic(mosaics: dict[str, Mosaic], kind: str) -> None:
    mosaic = mosaics[kind]
    whole = mosaic.read()
    windows = [Window(x, y, x + 15, y + 9) for x in range(0, 50, 3) for y in range(0, 34, 4)]
    sky = None if mosaic.wcs is None else icrs_positions(mosaic.wcs, [w.x0 for w in windows], [w.y0 for w in windows])

    def same(i: int) -> bool:
        window = windows[i]
        part = mosaic.read(window)
        equal = np.array_equal(part.data, whole.data[:, window.y0 : window.y1, window.x0 : window.x1])
        if sky is None:
            return equal
        ra, dec = icrs_positions(part.wcs, [0.0], [0.0])
        return equal and bool(abs(ra[0] - sky[0][i]) < 1e-9 and abs(dec[0] - sky[1][i]) < 1e-9)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(same, range(len(windows))))


@pytest.mark.parametrize("kind", STORAGE[1:])
def test_a_mosaic_goes_to_another_process(mosaics: dict[str, Mosaic], kind: str) -> None:
    here = mosaics[kind]
    image = here.read()
    with pickle.loads(pickle.dumps(here)) as there:  # noqa: S301 - our own bytes
        np.testing.assert_array_equal(there.read(Window(1, 2, 30, 20)).data, image.data[:, 2:20, 1:30])


@pytest.mark.parametrize("kind", ["sip", "tpv"])
def test_distortion_between_the_corners_is_no_common_grid(spaced: Path, kind: str) -> None:
    hdus = []
    for band, strength in (("g", 1.0), ("r", 1.05)):
        header = distorted(kind, strength=strength).to_header(relax=True)
        header["BUNIT"] = "nJy"
        hdus.append(fits.ImageHDU(np.ones((HEIGHT, WIDTH), np.float32), header, name=band))
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(spaced / "m.fits")
    with pytest.raises(ImageError, match=r"WCS of band r is 0\.\d+ px off that of band g"):
        open_mosaic(spaced / "m.fits")


def test_a_bump_that_vanishes_at_the_corners_is_seen() -> None:
    """Distortion u (1 - u) along x: zero at both ends, a tenth of a pixel in the middle."""
    flat, bump = (distorted("sip", 101, 101) for _ in range(2))
    flat.wcs.crpix = bump.wcs.crpix = [1.0, 51.0]
    a = np.zeros((3, 3))
    flat.sip = Sip(a, a, None, None, flat.wcs.crpix)
    a = a.copy()
    a[1, 0], a[2, 0] = 0.4 / 100, -0.4 / 100**2
    bump.sip = Sip(a, np.zeros((3, 3)), None, None, bump.wcs.crpix)
    corners = np.array([0.0, 100.0])
    np.testing.assert_allclose(icrs_positions(flat, corners, corners), icrs_positions(bump, corners, corners), atol=1e-9)
    assert grid_offset_pixels(flat, bump, 101, 101) == pytest.approx(0.1, rel=0.01)
    assert grid_offset_pixels(bump, bump, 101, 101) == 0


def test_the_pixel_area_is_that_of_the_plane_and_follows_distortion() -> None:
    plain = distorted("none")
    assert pixel_area_arcsec2(plain, WIDTH, HEIGHT) == pytest.approx(proj_plane_pixel_area(plain) * 3600**2, rel=1e-6)
    stretched = distorted("none")
    stretched.wcs.ctype = ["RA---TAN-SIP", "DEC--TAN-SIP"]
    a = np.zeros((2, 2))
    a[1, 0] = 0.1
    stretched.sip = Sip(a, np.zeros((2, 2)), None, None, stretched.wcs.crpix)
    assert pixel_area_arcsec2(stretched, WIDTH, HEIGHT) == pytest.approx(0.04 * 1.1, rel=1e-6)


@pytest.mark.parametrize("change", ["cut", "grown", "rewritten", "gone"])
def test_a_file_that_changes_under_the_mosaic_is_noticed(spaced: Path, change: str) -> None:
    path = write(spaced)
    with open_mosaic(path, "gr") as mosaic:
        mosaic.read(Window(0, 0, 5, 5))
        content = path.read_bytes()
        if change == "gone":
            path.unlink()
        elif change == "rewritten":
            path.write_bytes(content[::-1])
            os.utime(path, ns=(1, 1))
        else:
            path.write_bytes(content[:-2880] if change == "cut" else content + bytes(2880))
        with pytest.raises(ImageError, match="has changed since it was opened|cannot be read any more"):
            mosaic.read(Window(0, 0, 5, 5))


PASS = """
import sys
from pathlib import Path
import numpy as np
from astropy.io import fits
from deepdisc_ops.sky.images import open_mosaic
from deepdisc_ops.sky.tiling import Window


def peak_mb():
    line = next(one for one in open("/proc/self/status") if one.startswith("VmHWM"))
    return int(line.split()[1]) / 1000


idle, size = peak_mb(), 12000
with open_mosaic([Path(path) for path in sys.argv[1:]], "ugrizy") as mosaic:
    for y in range(0, size, size // 8):
        for x in range(0, size, size // 8):
            image = mosaic.read(Window(x, y, x + size // 8, y + size // 8))
            assert image.data.shape == (6, 1500, 1500)
print(peak_mb() - idle)
"""


def sparse(path: Path, bands: str, size: int = 12000) -> Path:
    """A FITS file of ``size`` squared float32 zeros a band that takes no room on disk."""
    with path.open("wb") as file:
        file.write(fits.PrimaryHDU().header.tostring().encode())
        for band in bands:
            header = distorted("none", size, size).to_header()
            cards = {"XTENSION": "IMAGE", "BITPIX": -32, "NAXIS": 2, "NAXIS1": size, "NAXIS2": size, "PCOUNT": 0, "GCOUNT": 1}
            full = fits.Header(cards | {"EXTNAME": band.upper(), "BUNIT": "nJy"})
            full.update(header)
            file.write(full.tostring().encode())
            end = file.tell() + 4 * size**2
            file.truncate(end + -end % 2880)
            file.seek(0, 2)
    return path


@pytest.mark.parametrize("layout", ["one file", "a file a band"])
def test_a_pass_over_a_large_mosaic_takes_little_memory(spaced: Path, layout: str) -> None:
    if layout == "one file":
        paths = [sparse(spaced / "m.fits", "ugrizy")]
    else:
        paths = [sparse(spaced / f"{band}.fits", band) for band in "ugrizy"]
    assert sum(path.stat().st_size for path in paths) > 3.4e9
    command = [sys.executable, "-c", PASS, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 400
