"""What turns a file's pixel values into nanojansky: zero points, flux units, surface brightness.

The AB system: magnitude 0 is 3630.78 Jy (Oke & Gunn 1983), so a flux of 1 nJy has magnitude 31.4.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from astropy import units

from deepdisc_ops.errors import ImageError

NJY_ZERO_POINT = 31.4
ZERO_POINT_KEYS = ("MAGZERO", "MAGZPT", "ZEROPT", "PHOTZP")
"""Header cards with the AB magnitude of one unit per pixel."""
AGREEMENT = 2e-3
"""Largest relative difference of two statements about the same flux."""
AREA_AGREEMENT = 0.1
"""The same of a pixel's area: PIXAR_SR is a detector's average, the WCS that of the middle of the image."""

_AB = units.zero_point_flux(10 ** (0.4 * NJY_ZERO_POINT) * units.nJy)
_RATES = ("DN/s", "adu/s", "ct/s", "electron/s")
STERADIAN_PER_ARCSEC2 = math.radians(1 / 3600) ** 2


def njy_per_count(zero_point: float) -> float:
    """Flux in nJy of one count whose AB magnitude is ``zero_point``."""
    return float(10 ** (0.4 * (NJY_ZERO_POINT - zero_point)))


def njy_per_unit(header: Mapping[str, Any], zero_point: float | None = None, pixel_area_arcsec2: float | None = None) -> float:
    """Factor from pixel values to nJy per pixel; ``zero_point`` (AB) comes before anything the header says.

    Understood are AB zero points (`ZERO_POINT_KEYS`), FLUXMAG0 (the value of magnitude 0; HSC, LSST), BUNIT of a flux (nJy,
    uJy, nanomaggy ...) or of a surface brightness (MJy/sr; the pixel's area is PIXAR_SR, else ``pixel_area_arcsec2``), rates
    with PHOTMJSR (JWST) and rates with PHOTFLAM and PHOTPLAM (HST). Statements that contradict each other are refused.
    Raises `ImageError`.
    """
    if zero_point is not None:
        return njy_per_count(zero_point)
    found = _zero_points(header) | _flux_unit(header, pixel_area_arcsec2) | _rates(header, pixel_area_arcsec2)
    if not found:
        raise ImageError(
            f"no zero point ({', '.join(ZERO_POINT_KEYS)}, FLUXMAG0) and its unit {_unit_text(header) or 'none'!r} is no flux; "
            "give --zero-point"
        )
    (name, factor), *others = found.items()
    for other, value in others:
        if not math.isclose(value, factor, rel_tol=AGREEMENT):
            raise ImageError(
                f"{name} makes one unit {factor:.6g} nJy, {other} {value:.6g} nJy; correct the header or give --zero-point"
            )
    return factor


def _zero_points(header: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for key in (*ZERO_POINT_KEYS, "FLUXMAG0"):
        if key not in header:
            continue
        try:
            value = float(header[key])
            found[key] = njy_per_count(0) / value if key == "FLUXMAG0" else njy_per_count(value)
        except (TypeError, ValueError, ZeroDivisionError, OverflowError):
            value = math.nan
        if not math.isfinite(value) or found[key] <= 0:
            meaning = "flux of magnitude 0" if key == "FLUXMAG0" else "magnitude"
            raise ImageError(f"{key} is {header[key]!r}, not a {meaning}; give --zero-point")
    return found


def _flux_unit(header: Mapping[str, Any], pixel_area_arcsec2: float | None) -> dict[str, float]:
    unit = _unit(_unit_text(header))
    if unit is None:
        return {}
    name = f"BUNIT {_unit_text(header)}"
    try:
        return {name: float(unit.to(units.nJy, equivalencies=_AB))}
    except units.UnitConversionError:
        pass
    try:
        per_steradian = float(unit.to(units.nJy / units.sr, equivalencies=_AB))
    except units.UnitConversionError:
        return {}
    return {name: per_steradian * _pixel_area_sr(header, pixel_area_arcsec2)}


def _rates(header: Mapping[str, Any], pixel_area_arcsec2: float | None) -> dict[str, float]:
    """Counts a second with the calibration that JWST (MJy/sr) and HST (erg/s/cm2/A at a wavelength) give beside them."""
    text = _unit_text(header)
    if "electron" in text.lower() or "count" in text.lower():
        # drizzled HST images say ELECTRONS/S, which is no unit of the FITS standard
        text = text.lower().replace("electrons", "electron").replace("counts", "count")
    if _unit(text) not in [_unit(rate) for rate in _RATES]:
        return {}
    found = {}
    if header.get("PHOTMJSR"):
        found["PHOTMJSR"] = float(header["PHOTMJSR"]) * 1e15 * _pixel_area_sr(header, pixel_area_arcsec2)
    if header.get("PHOTFLAM") and header.get("PHOTPLAM"):
        flux = float(header["PHOTFLAM"]) * units.Unit("erg s-1 cm-2 Angstrom-1")
        pivot = float(header["PHOTPLAM"]) * units.AA
        found["PHOTFLAM"] = float((1 * flux).to_value(units.nJy, equivalencies=units.spectral_density(pivot)))
    return found


def _pixel_area_sr(header: Mapping[str, Any], pixel_area_arcsec2: float | None) -> float:
    if header.get("PIXAR_SR"):
        stated = float(header["PIXAR_SR"])
        seen = stated if pixel_area_arcsec2 is None else pixel_area_arcsec2 * STERADIAN_PER_ARCSEC2
        if not math.isclose(stated, seen, rel_tol=AREA_AGREEMENT):
            raise ImageError(
                f"PIXAR_SR makes a pixel {stated:.4g} sr, its WCS or scale {seen:.4g} sr; correct PIXAR_SR "
                "(a resampled mosaic may keep the detector's) or give --zero-point"
            )
        return stated
    if pixel_area_arcsec2 is None:
        raise ImageError(
            f"unit {_unit_text(header)} is a surface brightness and nothing tells the pixel's area; add PIXAR_SR or a WCS, "
            "or give --pixel-scale"
        )
    return pixel_area_arcsec2 * STERADIAN_PER_ARCSEC2


def _unit_text(header: Mapping[str, Any]) -> str:
    return str(header.get("BUNIT") or "").strip()


def _unit(text: str) -> units.UnitBase | None:
    if not text:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", units.UnitsWarning)
        try:
            return units.Unit(text)
        except (ValueError, TypeError):
            return None
