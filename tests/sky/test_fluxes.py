from __future__ import annotations

import math
from typing import Any

import pytest
from astropy import units as u

from deepdisc_ops.errors import ImageError
from deepdisc_ops.sky.fluxes import njy_per_count, njy_per_unit

AREA = 0.03**2


def test_a_magnitude_is_a_flux() -> None:
    assert njy_per_count(31.4) == 1
    for zero_point in (22.5, 27.0, 31.4):
        assert (njy_per_count(zero_point) * u.nJy).to_value(u.ABmag) == pytest.approx(zero_point, abs=2e-4)


@pytest.mark.parametrize(
    ("header", "factor"),
    [
        ({"BUNIT": "nJy"}, 1.0),
        ({"BUNIT": "uJy"}, 1e3),
        ({"BUNIT": "Jy"}, 1e9),
        ({"BUNIT": "10.0*nanoJansky"}, 10.0),
        ({"BUNIT": "nanomaggy"}, 3630.78),
        ({"BUNIT": "erg/s/cm2/Hz"}, 1e32),
        ({"MAGZERO": 27.0, "BUNIT": "adu"}, 10 ** (0.4 * 4.4)),
        ({"FLUXMAG0": 63095734448.0194}, 10 ** (0.4 * 4.4)),
        ({"BUNIT": "MJy/sr", "PIXAR_SR": 2.0e-14}, 20.0),
        ({"BUNIT": "MJy/sr"}, 1e15 * AREA * math.radians(1 / 3600) ** 2),
        ({"BUNIT": "uJy/arcsec2"}, 1e3 * AREA),
        ({"BUNIT": "DN/s", "PHOTMJSR": 2.0, "PIXAR_SR": 2.0e-14}, 40.0),
        # calibrated already: the conversion that was used stays in the header
        ({"BUNIT": "MJy/sr", "PHOTMJSR": 2.0, "PIXAR_SR": 2.0e-14}, 20.0),
        ({"BUNIT": "nJy", "MAGZERO": 31.4}, 1.0),
    ],
)
def test_what_headers_say(header: dict[str, Any], factor: float) -> None:
    assert njy_per_unit(header, pixel_area_arcsec2=AREA) == pytest.approx(factor, rel=2e-5)
    assert njy_per_unit(header, zero_point=28.9) == pytest.approx(10)


def test_hubble_rates_have_the_zero_point_of_the_handbook() -> None:
    """ACS F814W: PHOTFLAM and PHOTPLAM give AB 25.94 (ACS zero points, after 2006)."""
    header = {"BUNIT": "ELECTRONS/S", "PHOTFLAM": 7.0332e-20, "PHOTPLAM": 8045.53}
    with pytest.raises(ImageError, match="'ELECTRONS/S' is no flux"):
        njy_per_unit(header | {"PHOTFLAM": 0})
    for unit in ("ELECTRONS/S", "electron/s", "COUNTS/S"):
        factor = njy_per_unit(header | {"BUNIT": unit})
        assert 31.4 - 2.5 * math.log10(factor) == pytest.approx(25.94, abs=0.01)


def test_an_area_of_other_pixels_is_refused() -> None:
    """The detector's PIXAR_SR in the header of a mosaic at half its scale would make every flux four times too large."""
    detector = 4 * AREA * math.radians(1 / 3600) ** 2
    with pytest.raises(ImageError, match="PIXAR_SR makes a pixel 8.46.*e-14 sr, its WCS or scale 2.11.*e-14 sr"):
        njy_per_unit({"BUNIT": "MJy/sr", "PIXAR_SR": detector}, pixel_area_arcsec2=AREA)
    assert njy_per_unit({"BUNIT": "MJy/sr", "PIXAR_SR": detector}) == pytest.approx(1e15 * detector)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({}, "its unit 'none' is no flux; give --zero-point"),
        ({"BUNIT": ""}, "its unit 'none' is no flux"),
        ({"BUNIT": "adu"}, "its unit 'adu' is no flux"),
        ({"BUNIT": "furlong per fortnight"}, "'furlong per fortnight' is no flux"),
        ({"BUNIT": "DN/s"}, "'DN/s' is no flux"),
        ({"BUNIT": "MJy/sr"}, "nothing tells the pixel's area"),
        ({"MAGZERO": "unknown"}, "MAGZERO is 'unknown', not a magnitude"),
        ({"MAGZERO": math.nan}, "not a magnitude"),
        ({"FLUXMAG0": 0.0}, "FLUXMAG0 is 0.0, not a flux of magnitude 0"),
        ({"FLUXMAG0": -1.0}, "not a flux of magnitude 0"),
        ({"MAGZERO": 27.0, "BUNIT": "nJy"}, "MAGZERO makes one unit 57.5.* nJy, BUNIT nJy 1 nJy"),
        ({"MAGZERO": 27.0, "FLUXMAG0": 1.0}, "correct the header or give --zero-point"),
    ],
)
def test_what_headers_fail_to_say(header: dict[str, Any], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        njy_per_unit(header)
    assert njy_per_unit(header, zero_point=31.4) == 1
