"""The bands in a FITS file: which extension is an image, which belongs to it, and what its header says.

An extension's name tells its role: SCI, IMAGE, or no name at all is the image; ERR, VARIANCE, WHT and MASK (and their
synonyms) are its companions. With a band before or after it (``U_MASK``, ``MASK_U``, ``SCI_F090W``) a role belongs to that
band. Any other name is the band of an image. The band is the header's FILTER, or the extension's name, or the FILTER of the
primary header (for JWST the PUPIL, if that is a filter).
"""

from __future__ import annotations

import bz2
import gzip
import io
import logging
import lzma
import re
import zlib
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from deepdisc_ops.errors import ImageError
from deepdisc_ops.sky.coordinates import celestial_wcs, pixel_area_arcsec2
from deepdisc_ops.sky.fluxes import njy_per_unit
from deepdisc_ops.sky.planes import (
    Mask,
    MemoryPixels,
    Noise,
    Pixels,
    Plane,
    RawPixels,
    Scaling,
    Stamp,
    TiledPixels,
    Wishes,
    quiet_fits,
)

log = logging.getLogger(__name__)

SCIENCE = ("sci", "science", "image", "data")
GENERIC = ("", "primary", "compressed_image", *SCIENCE)
"""Extension names that say nothing of the band."""
DISTORTIONS = ("wcsdvarr", "d2imarr")
"""Extensions that belong to the WCS (Calabretta et al., paper IV; HST)."""
NOT_ASTROMETRY = {"", "EXTNAME", "FILTER", "BUNIT", "MAGZERO", "SKYSIG", "PSFFWHM", "CHECKSUM", "DATASUM", "COMMENT", "HISTORY"}
"""Keywords in which the bands of a file may differ and still have one WCS."""
ROLES = {
    **dict.fromkeys(("err", "error", "sigma", "rms"), "sigma"),
    **dict.fromkeys(("variance", "var"), "variance"),
    **dict.fromkeys(("wht", "weight"), "weight"),
    **dict.fromkeys(("mask", "dq"), "mask"),
}
BAD_BITS = ("NO_DATA", "UNMASKEDNAN", "BAD", "SAT", "BLEED", "TRAIL")
"""Mask planes in which a pixel's value is not the sky's. Not among them: CR and INTRP (repaired), EDGE, SPIKE, DETECTED."""
DO_NOT_USE = 1
"""The bit of a JWST DQ array in which all reasons to leave a pixel out come together."""

_DECOMPRESS = {b"\x1f\x8b": gzip.decompress, b"BZ": bz2.decompress, b"\xfd7": lzma.decompress}
_FILTER = re.compile(r"(?:hsc|lsst|decam)?[-_ ]?([ugrizy])(?:2|[ _]decam.*|_sim.*|_\d+)?", re.IGNORECASE)
"""Names that surveys give to their ugrizy: HSC-R2, g DECam SDSS c0001 ..., lsst_u, r_sim_1.4, i_39."""


def band_name(filter_name: str) -> str:
    """The band that a FILTER card means, in lower case: ``HSC-I2`` is i, ``F090W`` f090w."""
    name = filter_name.strip()
    match = _FILTER.fullmatch(name)
    return (match[1] if match else name).lower()


@dataclass(frozen=True)
class _Extension:
    """One array of the file: what it is for (`ROLES` or "image"), its own label, and the names its band goes by."""

    number: int
    role: str
    label: str
    version: int
    filter: str
    header: fits.Header
    shape: tuple[int, ...]

    @property
    def band(self) -> str:
        return self.filter or self.label


def fits_planes(path: Path, wishes: Wishes) -> list[Plane]:
    """The image planes of one file with their companions; a plane without a name of its own has an empty band."""
    try:
        stamp = Stamp.of(path.stat())
        content = _whole_file(path)
        with quiet_fits(), fits.open(path if content is None else io.BytesIO(content), memmap=False) as file:
            _check_complete(path, file, stamp.size if content is None else len(content))
            return _File(path, file, stamp, content, wishes).planes()
    except FileNotFoundError:
        raise ImageError(f"image {path} does not exist") from None
    except (OSError, fits.VerifyError, TypeError) as error:
        raise ImageError(f"{path} is not readable FITS ({error}); fetch it again or check it with fitscheck") from None


def _whole_file(path: Path) -> bytes | None:
    """The content of a file that is compressed as a whole, which cannot be read in parts; None for any other."""
    with path.open("rb") as file:
        start = file.read(6)
        decompress = _DECOMPRESS.get(start[:2])
        if decompress is None:
            if start != b"SIMPLE":
                raise ImageError(f"{path} is no FITS file; images may be FITS, HDF5, .npy or .npz")
            return None
        file.seek(0)
        try:
            content = decompress(file.read())
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise ImageError(f"{path} is cut or damaged ({error}); fetch it again") from None
    log.warning(
        "%s is compressed as a whole: its %.0f MB stay in memory; decompress it or compress it by tiles (fpack) "
        "to have it read window by window",
        path,
        len(content) / 1e6,
    )
    return content


def _check_complete(path: Path, file: fits.HDUList, size: int) -> None:
    """The last array must end inside the file, and no extension may begin after it (its header would be cut)."""
    last = [hdu.fileinfo() for hdu in file][-1]
    expected = last["datLoc"] + last["datSpan"]
    if size < expected:
        raise ImageError(f"{path} is truncated: {size} bytes of {expected}; fetch it again")
    if size > expected:
        handle = last["file"]
        handle.seek(expected)
        if handle.read(8) == b"XTENSION":
            raise ImageError(f"{path} is truncated: it ends inside the header of extension {len(file)}; fetch it again")


@dataclass(frozen=True)
class _File:
    """An open file and how its user wants it read; content is that of a file that was decompressed as a whole."""

    path: Path
    file: fits.HDUList
    stamp: Stamp
    content: bytes | None
    wishes: Wishes
    astrometry: dict[tuple[tuple[str, ...], tuple[int, int]], tuple[WCS | None, float | None]] = field(default_factory=dict)

    def planes(self) -> list[Plane]:
        """Planes of all images, cubes taken apart, in the order of the file."""
        extensions = self._extensions()
        images = [extension for extension in extensions if extension.role == "image"]
        return [plane for image in images for plane in self._image_planes(image, self._companions(image, extensions))]

    def _extensions(self) -> list[_Extension]:
        primary = self.file[0].header
        found = []
        for number, hdu in enumerate(self.file):
            if not hdu.is_image or hdu.header.get("NAXIS", 0) not in (2, 3):
                continue
            role, label = _role(str(hdu.header.get("EXTNAME") or ""))
            if label in DISTORTIONS:
                continue
            own = _filter_card(hdu.header)
            name = band_name(own) or (band_name(_filter_card(primary)) if not label else "")
            found.append(_Extension(number, role, label, int(hdu.header.get("EXTVER", 1)), name, hdu.header, hdu.shape))
        if any(str(extension.header.get("EXTNAME") or "").strip().lower() in SCIENCE for extension in found):
            # a file that says which array is the image: what has another name (CON, AREA, a PSF) is no band
            found = [extension for extension in found if not extension.label]
        return found

    def _companions(self, image: _Extension, extensions: Sequence[_Extension]) -> dict[str, _Extension]:
        """Companions of ``image`` by role; a MASK without a band belongs to every image of the file, and any to the only one."""
        found = {}
        alone = sum(extension.role == "image" for extension in extensions) == 1
        for extension in extensions:
            if extension.role == "image":
                continue
            if image.label:
                belongs = bool(extension.label) and band_name(extension.label) in (image.band, image.label)
                belongs |= not extension.label and (alone or extension.role == "mask") and extension.role not in found
            else:
                belongs = not extension.label and extension.version == image.version and extension.filter in ("", image.filter)
            if belongs:
                found[extension.role] = extension
        return found

    def _image_planes(self, image: _Extension, companions: Mapping[str, _Extension]) -> list[Plane]:
        shape = (int(image.shape[-2]), int(image.shape[-1]))
        wcs, problem = None, ""
        header = ChainMap(image.header, self.file[0].header)
        area = self.wishes.pixel_scale**2 if self.wishes.pixel_scale else None
        factor = None
        try:
            wcs, seen = self._astrometry(image, shape)
            area = area if seen is None else seen
            factor = njy_per_unit(header, self.wishes.zero_point, area)
        except ImageError as error:
            problem = str(error)
        unit = str(header.get("BUNIT", "none"))
        indices = [None] if len(image.shape) == 2 else list(range(image.shape[0]))
        band = image.band if len(indices) == 1 else ""
        planes = [
            Plane(band, self.path, image.number, index, shape, wcs, factor, self._pixels(image, index), unit, problem)
            for index in indices
        ]
        return [self._with_companions(plane, companions) for plane in planes]

    def _astrometry(self, image: _Extension, shape: tuple[int, int]) -> tuple[WCS | None, float | None]:
        """WCS and pixel area (arcsec^2) of an image; images whose headers say the same of it share one WCS."""
        cards = tuple(str(card) for card in image.header.cards if card.keyword not in NOT_ASTROMETRY)
        key = (cards, shape)
        if key not in self.astrometry:
            wcs = celestial_wcs(image.header, self.file)
            self.astrometry[key] = wcs, None if wcs is None else pixel_area_arcsec2(wcs, shape[1], shape[0])
        return self.astrometry[key]

    def _with_companions(self, plane: Plane, companions: Mapping[str, _Extension]) -> Plane:
        """The plane with its companions, or with the problem that they have another shape."""
        sources: dict[str, Pixels] = {}
        for role, extension in companions.items():
            cube = len(extension.shape) == 3
            count = extension.shape[0] if cube else 1
            if extension.shape[-2:] != plane.shape or (cube and (plane.index is None or count <= plane.index)):
                name = str(extension.header.get("EXTNAME") or role)
                text = f"{name} has shape {tuple(extension.shape)}, the image {plane.shape}; make them of one size or drop {name}"
                return replace(plane, problem=plane.problem or text)
            sources[role] = self._pixels(extension, plane.index if cube else None)
        kind = "variance" if "variance" in sources else "sigma"
        mask = companions.get("mask")
        try:
            bad = 0 if mask is None else bad_value(self.path, mask.header, self.wishes.bad_bits, int(mask.header["BITPIX"]) == 8)
        except ImageError as error:
            return replace(plane, problem=plane.problem or str(error))
        return replace(
            plane,
            noise=Noise(sources[kind], kind) if kind in sources else None,  # type: ignore[arg-type]
            mask=None if bad == 0 else Mask(sources["mask"], bad),
            weight=sources.get("weight"),
        )

    def _pixels(self, extension: _Extension, index: int | None) -> Pixels:
        hdu, header = self.file[extension.number], extension.header
        shape = (int(extension.shape[-2]), int(extension.shape[-1]))
        if isinstance(hdu, fits.CompImageHDU):
            if self.content is not None:
                return MemoryPixels(hdu.data if index is None else hdu.data[index])
            return TiledPixels(self.path, extension.number, index, shape, self.stamp)
        stored = {8: ">u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}[int(header["BITPIX"])]
        blank = header.get("BLANK")
        scaling = Scaling(float(header.get("BSCALE", 1)), float(header.get("BZERO", 0)), None if blank is None else int(blank))
        count = shape[0] * shape[1]
        offset = int(hdu.fileinfo()["datLoc"]) + (index or 0) * count * np.dtype(stored).itemsize
        if self.content is not None:
            return MemoryPixels(np.frombuffer(self.content, stored, count, offset).reshape(shape), scaling)
        return RawPixels(self.path, offset, stored, shape, self.stamp, scaling)


def _role(extension_name: str) -> tuple[str, str]:
    """Role of an extension name and what is left of the name: ``U_VAR`` is the variance of u."""
    name = extension_name.strip().lower()
    if name in GENERIC:
        return "image", ""
    if name in ROLES:
        return ROLES[name], ""
    for pattern in (r"(?P<band>.+)[_ -](?P<role>[a-z]+)", r"(?P<role>[a-z]+)[_ -](?P<band>.+)"):
        match = re.fullmatch(pattern, name)
        if match and (match["role"] in ROLES or match["role"] in SCIENCE):
            return ROLES.get(match["role"], "image"), match["band"]
    return "image", name


def _filter_card(header: fits.Header) -> str:
    """FILTER, or PUPIL where the filter is in the pupil wheel (NIRCam F162M, F164N, F323N, F405N, F466N, F470N)."""
    pupil = str(header.get("PUPIL") or "").strip()
    return pupil if re.fullmatch(r"F\d{3,4}[A-Z]\d?", pupil) else str(header.get("FILTER") or "").strip()


def bad_value(path: Path, header: Mapping[str, Any], bad_bits: Sequence[str] | int | None, is_bool: bool) -> int | None:
    """The bits of a mask that mean "no data" as one number, 0 for none, None where any value but 0 means it.

    ``bad_bits`` are names of planes that the header numbers (MP_* cards) or the bits themselves; by default `BAD_BITS`. A mask
    of wider integers that names no planes is left alone, for "detected" may be among its bits.
    """
    if isinstance(bad_bits, int):
        return bad_bits
    planes = {str(key).upper()[3:]: int(value) for key, value in header.items() if str(key).upper().startswith("MP_")}
    if planes:
        missing = [name for name in bad_bits or () if name.upper() not in planes]
        if missing:
            raise ImageError(f"mask names no plane {', '.join(missing)}; it has {', '.join(planes)}: choose bad bits among them")
        names = {name.upper() for name in (BAD_BITS if bad_bits is None else bad_bits)}
        return sum(1 << planes[name] for name in names & planes.keys())
    if bad_bits is not None:
        raise ImageError(f"mask names no planes (MP_* cards), so {', '.join(bad_bits)} mean nothing; give the bits as a number")
    if is_bool:
        return None
    if str(header.get("EXTNAME") or "").strip().lower() == "dq":
        return DO_NOT_USE
    log.warning("%s: a mask without names of its bits (MP_* cards) is left alone; give its bad bits as a number", path)
    return 0
