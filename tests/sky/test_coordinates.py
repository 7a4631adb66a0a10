from __future__ import annotations

import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.wcs import WCS

from deepdisc_ops.sky.coordinates import icrs_positions

TRUTH = SkyCoord(149.667, 2.634, unit="deg")


@pytest.mark.parametrize("kind", ["icrs", "galactic", "swapped", "fk4"])
def test_positions_are_icrs_whatever_the_frame(kind: str) -> None:
    wcs = WCS(naxis=2)
    wcs.wcs.crpix, wcs.wcs.cdelt = [11.0, 21.0], [-5e-5, 5e-5]
    if kind == "galactic":
        wcs.wcs.ctype, wcs.wcs.crval = ["GLON-TAN", "GLAT-TAN"], [TRUTH.galactic.l.deg, TRUTH.galactic.b.deg]
    elif kind == "swapped":
        wcs.wcs.ctype, wcs.wcs.crval = ["DEC--TAN", "RA---TAN"], [TRUTH.dec.deg, TRUTH.ra.deg]
    elif kind == "fk4":
        old = TRUTH.transform_to("fk4")
        wcs.wcs.ctype, wcs.wcs.crval = ["RA---TAN", "DEC--TAN"], [old.ra.deg, old.dec.deg]
        wcs.wcs.radesys, wcs.wcs.equinox = "FK4", 1950.0
    else:
        wcs.wcs.ctype, wcs.wcs.crval = ["RA---TAN", "DEC--TAN"], [TRUTH.ra.deg, TRUTH.dec.deg]
    ra, dec = icrs_positions(wcs, [10.0], [20.0])
    np.testing.assert_allclose([ra[0], dec[0]], [TRUTH.ra.deg, TRUTH.dec.deg], atol=1e-6)


def test_no_positions() -> None:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval = ["RA---TAN", "DEC--TAN"], [10.0, 20.0]
    ra, dec = icrs_positions(wcs, [], [])
    assert len(ra) == len(dec) == 0
