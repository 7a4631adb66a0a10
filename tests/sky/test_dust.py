from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from deepdisc_ops.errors import ConfigError, SetupError
from deepdisc_ops.sky.dust import EbvPlane, ebv_source, plane_over
from deepdisc_ops.sky.tiling import Window


def test_plane_meets_its_corners_and_is_linear_between() -> None:
    plane = EbvPlane((0.1, 0.2, 0.3, 0.4))
    x, y = np.array([-0.5, 9.5, -0.5, 9.5, 4.5]), np.array([-0.5, -0.5, 19.5, 19.5, 9.5])
    np.testing.assert_allclose(plane.at(x, y, 10, 20), [0.1, 0.2, 0.3, 0.4, 0.25], rtol=1e-6)
    np.testing.assert_allclose(EbvPlane.constant(0.03).at(x, y, 10, 20), 0.03)


def test_constant_source() -> None:
    assert plane_over(Window(0, 0, 8, 8), None, ebv_source("0.05")).corners == (0.05,) * 4
    with pytest.raises(ConfigError, match="out of range"):
        ebv_source("-1")
    with pytest.raises(ConfigError, match="'sfd'"):
        ebv_source("planck")


def test_absent_map_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"dustmaps\.sfd\.fetch"):
        ebv_source("sfd", tmp_path)


def test_sfd_map_is_read_from_a_directory_and_scaled(spaced: Path) -> None:
    """A map of constant 0.08 and 0.04 mag over the two Galactic caps."""
    for pole, value, sign in (("ngp", 0.08, 1), ("sgp", 0.04, -1)):
        header = fits.Header({"LAM_NSGP": sign, "LAM_SCAL": 32, "CRPIX1": 32.5, "CRPIX2": 32.5})
        wcs = WCS(naxis=2)
        wcs.wcs.ctype, wcs.wcs.crpix = ["GLON-ZEA", "GLAT-ZEA"], [32.5, 32.5]
        wcs.wcs.crval, wcs.wcs.cdelt = [90.0 * sign, 90.0 * sign], [-2.8, 2.8 * sign]
        header.update(wcs.to_header())
        fits.PrimaryHDU(np.full((64, 64), value, np.float32), header).writeto(spaced / f"SFD_dust_4096_{pole}.fits")
    source = ebv_source("sfd", spaced, scale=0.86)
    # (192.86, 27.13) and (12.86, -27.13) are the Galactic poles
    np.testing.assert_allclose(source(np.array([192.86, 12.86]), np.array([27.13, -27.13])), [0.0688, 0.0344], rtol=1e-3)
