"""Milky Way reddening E(B-V): a constant, a column of the user's, or a dustmaps map read from local files.

Reddening varies over arcminutes (SFD: 6.1'), a window is smaller; over a window it is held as the bilinear
surface through the window's corners, so that whoever computes the window needs no map.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import inspect
import io
import logging
import math
import os
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from astropy import units
from astropy.coordinates import SkyCoord
from astropy.table import Table
from astropy.utils.exceptions import AstropyWarning
from astropy.wcs import WCS
from numpy.typing import ArrayLike, NDArray

from deepdisc_ops.errors import CatalogError, ConfigError, ImageError, InputError, SetupError
from deepdisc_ops.sky.catalog import read_catalog
from deepdisc_ops.sky.coordinates import icrs_positions, unit_vectors
from deepdisc_ops.sky.tiling import Window

log = logging.getLogger(__name__)

EbvSource = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""E(B-V) in mag at right ascensions and declinations in degrees."""

MAX_EBV = 10.0
BEHIND_ALL_DUST_KPC = 60.0
"""Distance at which maps in three dimensions are asked, so that they answer with the reddening of a galaxy."""
COLUMN_REACH_DEG = 0.1
"""How far a supplied value holds: the resolution of the SFD map."""


@dataclass(frozen=True)
class EbvPlane:
    """Bilinear E(B-V) over a window: values at its corners (x0, y0), (x1, y0), (x0, y1), (x1, y1), mag."""

    corners: tuple[float, float, float, float]

    @classmethod
    def constant(cls, ebv: float) -> EbvPlane:
        """The same value everywhere."""
        return cls((ebv, ebv, ebv, ebv))

    def at(self, x: NDArray[np.floating], y: NDArray[np.floating], width: int, height: int) -> NDArray[np.float32]:
        """E(B-V) at pixel positions of a window of ``width`` x ``height``."""
        u, v = (np.asarray(x) + 0.5) / width, (np.asarray(y) + 0.5) / height
        a, b, c, d = self.corners
        return np.asarray((1 - v) * ((1 - u) * a + u * b) + v * ((1 - u) * c + u * d), np.float32)


@dataclass(frozen=True)
class Reddening:
    """A source of E(B-V) that says what it is: an `EbvSource`.

    name: "constant", the map's name, or "column NAME"; scale: what the map's values are multiplied by; needs_position: whether
    an image without a WCS is refused. Threads may share it. Negative values, which are noise of a map, count as 0.
    """

    name: str
    scale: float
    query: EbvSource = field(repr=False)
    needs_position: bool = True

    def __str__(self) -> str:
        return self.name if self.scale == 1 else f"{self.name} x {self.scale:g}"

    def __call__(self, ra: ArrayLike, dec: ArrayLike) -> NDArray[np.float64]:
        """E(B-V) in mag at ICRS positions in degrees, of any shape.

        Raises `InputError` where a position is no number or the map has no value.
        """
        ra, dec = np.broadcast_arrays(np.asarray(ra, np.float64), np.asarray(dec, np.float64))
        good = np.isfinite(ra) & np.isfinite(dec) & (np.abs(dec) <= 90)
        if not good.all():
            raise InputError(
                f"{np.count_nonzero(~good)} of {ra.size} positions for E(B-V) are no numbers or beyond a pole; expected degrees"
            )
        if not ra.size:
            return np.zeros(ra.shape)
        values = self.scale * np.asarray(self.query(ra.ravel(), dec.ravel()), np.float64)
        if values.shape != (ra.size,):
            raise ConfigError(f"{self.name} answers {values.shape} to {ra.size} positions; expected a map of one number a position")
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            raise InputError(
                f"{self.name} has no E(B-V) at {len(wrong)} of {ra.size} positions, the first at ra {ra.flat[wrong[0]]:.5f}, "
                f"dec {dec.flat[wrong[0]]:.5f}; choose a map that covers the field or give a number"
            )
        return np.asarray(np.maximum(values, 0).reshape(ra.shape))


@dataclass(frozen=True)
class DustMap:
    """A map of the dustmaps package: query class, the files it reads and the call that fetches them."""

    query: str
    files: tuple[str, ...]
    fetch: str


MAPS: dict[str, DustMap] = {
    "sfd": DustMap("dustmaps.sfd:SFDQuery", ("SFD_dust_4096_ngp.fits", "SFD_dust_4096_sgp.fits"), "dustmaps.sfd.fetch()"),
    "csfd": DustMap("dustmaps.csfd:CSFDQuery", ("csfd_ebv.fits", "mask.fits"), "dustmaps.csfd.fetch()"),
    "planck": DustMap("dustmaps.planck:PlanckQuery", ("HFI_CompMap_ThermalDustModel_2048_R1.20.fits",), "dustmaps.planck.fetch()"),
    "planck_gnilc": DustMap(
        "dustmaps.planck:PlanckGNILCQuery",
        ("COM_CompMap_Dust-GNILC-Model-Opacity_2048_R2.01.fits",),
        "dustmaps.planck.fetch(which='GNILC')",
    ),
    "lenz2017": DustMap("dustmaps.lenz2017:Lenz2017Query", ("ebv_lhd.hpx.fits",), "dustmaps.lenz2017.fetch()"),
    "bh": DustMap("dustmaps.bh:BHQuery", ("bh.h5",), "pip install dustmaps, which ships it"),
}
"""Maps by name: Schlegel, Finkbeiner & Davis (1998); Chiang (2023), SFD without its galaxies; Planck Collaboration (2013), and
GNILC (2016); Lenz, Hensley & Dore (2017); Burstein & Heiles (1982), which dustmaps ships (no value below |b| 10 and in a part
of the south)."""


def plane_over(window: Window, wcs: WCS | None, source: EbvSource) -> EbvPlane:
    """E(B-V) at the corners of ``window``; ``wcs`` is the mosaic's (without one, only a constant will do)."""
    if wcs is None and getattr(source, "needs_position", False):
        raise ImageError(f"E(B-V) from {source} needs positions on the sky and the image has no WCS; give a number in mag")
    x = np.array([window.x0, window.x1, window.x0, window.x1]) - 0.5
    y = np.array([window.y0, window.y0, window.y1, window.y1]) - 0.5
    ra, dec = icrs_positions(wcs, x, y) if wcs is not None else (np.zeros(4), np.zeros(4))
    a, b, c, d = (float(value) for value in source(ra, dec))
    return EbvPlane((a, b, c, d))


def ebv_source(text: str, maps: Path | None = None, scale: float = 1.0) -> Reddening:
    """Read where E(B-V) comes from.

    ``0.03`` is a constant in mag; a name of `MAPS` is that map, its files in the folder ``maps`` (or in the folder of its name
    below); ``dustmaps.MODULE:Class`` is any other query of dustmaps, given its file or folder as ``maps``;
    ``column:NAME`` is column NAME of the table ``maps``, see `ebv_column`. ``scale`` multiplies maps and columns: 0.86 turns SFD
    into Schlafly & Finkbeiner (2011). Nothing is fetched and nothing is written. Raises `ConfigError`, `SetupError`.
    """
    if not math.isfinite(scale) or scale <= 0:
        raise ConfigError(f"scale of E(B-V) is {scale}; expected a positive number, such as 0.86")
    try:
        value = float(text)
    except ValueError:
        return _positional(text, maps, scale)
    if not 0 <= value < MAX_EBV:
        raise ConfigError(f"E(B-V) = {value} mag is out of range; expected 0 to {MAX_EBV:g}")
    return Reddening("constant", 1.0, lambda ra, _dec: np.full(np.shape(ra), value), needs_position=False)


def ebv_column(table: Table, column: str = "ebv", scale: float = 1.0, reach_deg: float = COLUMN_REACH_DEG) -> Reddening:
    """A source made of a catalogue's own values: each position takes that of the nearest row within ``reach_deg``.

    The table has ``ra`` and ``dec`` (degrees unless their unit says otherwise) and ``column`` (mag). Raises `CatalogError`.
    """
    from scipy.spatial import cKDTree

    missing = [name for name in ("ra", "dec", column) if name not in table.colnames]
    if missing:
        raise CatalogError(f"table has no column {', '.join(missing)} for E(B-V); it has {', '.join(table.colnames)}")
    ra, dec = (_degrees(table[name]) for name in ("ra", "dec"))
    values = np.asarray(np.ma.filled(np.ma.masked_invalid(np.ma.asarray(table[column], np.float64)), np.nan))
    wrong = ~(np.isfinite(ra) & np.isfinite(dec) & (values >= 0) & (values < MAX_EBV))
    if wrong.any() or not len(values):
        raise CatalogError(
            f"{np.count_nonzero(wrong)} of {len(values)} rows have no position or no {column} between 0 and {MAX_EBV:g} mag; "
            "leave them out or mend them"
        )
    tree = cKDTree(unit_vectors(ra, dec))

    def nearest(ra: NDArray[np.float64], dec: NDArray[np.float64]) -> NDArray[np.float64]:
        chord = 2 * math.sin(math.radians(reach_deg) / 2)
        distance, row = tree.query(unit_vectors(ra, dec), distance_upper_bound=chord)
        return np.where(np.isfinite(distance), np.append(values, np.nan)[row], np.nan)

    return Reddening(f"column {column}", scale, nearest)


def _degrees(column: Any) -> NDArray[np.float64]:
    values = np.ma.filled(np.ma.asarray(column, np.float64), np.nan)
    return np.asarray(values if column.unit is None else units.Quantity(values, column.unit).to_value(units.deg))


def _positional(text: str, maps: Path | None, scale: float) -> Reddening:
    if text.startswith("column:"):
        if maps is None:
            raise ConfigError(f"E(B-V) source {text!r} needs a table; give its path as the place of the map (--dust-maps)")
        return ebv_column(read_catalog(maps), text.removeprefix("column:"), scale)
    if text in MAPS:
        query = _construct(MAPS[text].query, _files(text, maps), text)
    elif re.fullmatch(r"dustmaps(\.\w+)+:\w+", text):
        query = _construct(text, None if maps is None else (maps,), text)
    else:
        raise ConfigError(
            f"E(B-V) source {text!r} is unknown; give a number in mag, 'column:NAME', one of "
            f"{', '.join(map(repr, MAPS))}, or 'dustmaps.MODULE:Class'"
        )
    return Reddening(text, scale, _ask(query))


def _files(name: str, maps: Path | None) -> tuple[Path, ...] | None:
    """The files of map ``name``: ``maps``, or in it, or in the folder below that dustmaps makes; None for the shipped map."""
    known = MAPS[name]
    if maps is None and name == "bh":
        return None
    if maps is not None and maps.is_file() and len(known.files) == 1:
        return (maps,)
    module = known.query.partition(":")[0].rpartition(".")[2]
    folders = [] if maps is None else [maps if maps.is_dir() else maps.parent, maps / module]
    for folder in folders:
        files = tuple(folder / file for file in known.files)
        if all(file.exists() for file in files):
            return files
    raise SetupError(
        f"dust map {name} not found in {maps}: expected {' and '.join(known.files)}; "
        f"fetch with {known.fetch} where there is internet and pass the folder with --dust-maps"
    )


def _construct(query: str, files: tuple[Path, ...] | None, name: str) -> Any:
    """The query object of ``module:Class``, told of its files by the parameters that dustmaps has for that."""
    module, _, attribute = query.partition(":")
    with _dustmaps_settings():
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"E(B-V) source {name!r}: {error}; expected a class of the dustmaps package") from None
    given = inspect.signature(cls.__init__).parameters
    folder = next((key for key in given if key.endswith("_dir")), None)
    names = [key for key in given if key.endswith("_fname")]
    if folder is None and not names:
        raise ConfigError(f"E(B-V) source {name!r} reads no local map (no map_fname or map_dir); choose another query")
    if files is None and name != "bh":
        raise SetupError(f"E(B-V) source {name!r} needs its map; give its {'folder' if folder else 'file'} with --dust-maps")
    options: dict[str, str] = {}
    if files is not None:
        base = files[0] if files[0].is_dir() else files[0].parent
        options = {folder: str(base)} if folder else dict(zip(names, map(str, files), strict=False))
    said = io.StringIO()
    try:
        # some maps tell of their loading; what astropy says of a damaged file comes back as an error below
        with contextlib.redirect_stdout(said), warnings.catch_warnings(action="ignore", category=AstropyWarning):
            return cls(**options)
    except (OSError, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise SetupError(f"dust map {name} in {', '.join(options.values())} cannot be read ({reason}); fetch it again") from None
    finally:
        log.debug("%s: %s", name, said.getvalue().strip())


@contextlib.contextmanager
def _dustmaps_settings() -> Iterator[None]:
    """Import dustmaps without a trace: it looks for a settings file in the home directory, or where the environment says.

    Its healpy draws in matplotlib, which would list the machine's fonts into the home directory unless it has done so before.
    """
    scratch = _scratch()
    own = {"DUSTMAPS_CONFIG_FNAME": str(scratch / "dustmapsrc")}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "matplotlib"
    if "matplotlib" not in sys.modules and "MPLCONFIGDIR" not in os.environ and not any(cache.glob("fontlist-*.json")):
        own["MPLCONFIGDIR"] = str(scratch)
    before = {key: os.environ.get(key) for key in own}
    with warnings.catch_warnings(action="ignore"):
        os.environ.update(own)
        try:
            yield
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})


@functools.cache
def _scratch() -> Path:
    """A folder that lives as long as the process, for matplotlib remembers it."""
    folder = tempfile.TemporaryDirectory(prefix="deepdisc-ops-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _ask(query: Any) -> EbvSource:
    """A function of ra and dec that asks one thread at a time: the maps' WCS is not safe to share.

    A map in three dimensions is asked behind all its dust, a map of samples for their median.
    """
    options = {"mode": "median"} if "mode" in inspect.signature(query.query).parameters else {}
    lock = threading.Lock()

    def ask(ra: NDArray[np.float64], dec: NDArray[np.float64]) -> NDArray[np.float64]:
        positions = SkyCoord(ra * units.deg, dec * units.deg, distance=np.full(ra.shape, BEHIND_ALL_DUST_KPC) * units.kpc)
        with lock:
            return np.asarray(query(positions, **options), np.float64)

    return ask
