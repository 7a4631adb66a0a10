"""What a request's headers ask for, read into types and rendered from them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.serving.wire.fault import Refused
from deepdisc_ops.serving.wire.protocol import (
    BANDS_HEADER,
    BOXES_HEADER,
    CORE_HEADER,
    EBV_HEADER,
    MASKS_HEADER,
    MAX_BANDS,
    MAX_EBV,
    MAX_GRID,
    MAX_HEADER_BOXES,
    MEMBERS_HEADER,
    PDF_HEADER,
    REPLY_HEADER,
    REPLY_TYPES,
    REQUEST_HEADER,
    SERVER_EBV,
)
from deepdisc_ops.sky.dust import EbvPlane

_BAND_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,31}")
_REQUEST_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Grid:
    """``count`` redshifts from ``first`` to ``last``."""

    first: float
    last: float
    count: int

    def points(self) -> NDArray[np.float64]:
        """(count,) redshifts."""
        return np.linspace(self.first, self.last, self.count)

    def __str__(self) -> str:
        return f"grid:{self.first!r},{self.last!r},{self.count}"


@dataclass(frozen=True)
class Options:
    """The wishes of a request.

    bands: names of the planes where a header gives them; ebv: None for the server's map; core: x0, y0, x1, y1 in pixels of the
    window; boxes (N, 4): given ones, None for a search; members: names, none for all; pdf: what becomes of the mixtures.
    """

    ebv: EbvPlane | None
    bands: tuple[str, ...] = ()
    core: tuple[float, float, float, float] | None = None
    boxes: NDArray[np.float32] | None = None
    masks: bool = False
    members: tuple[str, ...] = ()
    pdf: Grid | Literal["mixture", "none"] = "mixture"
    reply: str = "hdf5"


def parse_options(headers: Mapping[str, str]) -> Options:
    """Read the headers, whose names are lower-case; `Refused` says what is wrong with which."""
    bands, members = headers.get(BANDS_HEADER), headers.get(MEMBERS_HEADER)
    return Options(
        ebv=_parse_ebv(headers.get(EBV_HEADER)),
        bands=() if bands is None else parse_bands(bands, f"header {BANDS_HEADER}"),
        core=_parse_core(headers.get(CORE_HEADER)),
        boxes=_parse_boxes(headers.get(BOXES_HEADER)),
        masks=_choice(headers, MASKS_HEADER, ("0", "1"), "bad_masks") == "1",
        members=() if members is None else _parse_members(members),
        pdf=_parse_pdf(headers.get(PDF_HEADER, "mixture")),
        reply=_choice(headers, REPLY_HEADER, tuple(REPLY_TYPES), "bad_reply"),
    )


def render_options(options: Options, request: str = "") -> dict[str, str]:
    """The headers that ask for ``options``, without those that are at their defaults."""
    ebv = SERVER_EBV if options.ebv is None else ",".join(repr(float(value)) for value in options.ebv.corners)
    said = {
        EBV_HEADER: ebv,
        BANDS_HEADER: ",".join(options.bands) or None,
        CORE_HEADER: None if options.core is None else ",".join(repr(float(edge)) for edge in options.core),
        BOXES_HEADER: None if options.boxes is None else ";".join(",".join(map(repr, box)) for box in options.boxes.tolist()),
        MASKS_HEADER: "1" if options.masks else None,
        MEMBERS_HEADER: ",".join(options.members) or None,
        PDF_HEADER: None if options.pdf == "mixture" else str(options.pdf),
        REPLY_HEADER: None if options.reply == "hdf5" else options.reply,
        REQUEST_HEADER: request or None,
    }
    return {name: value for name, value in said.items() if value is not None}


def request_name(headers: Mapping[str, str]) -> str | None:
    """What the client calls its request; None where it does not say."""
    name = headers.get(REQUEST_HEADER)
    if name is not None and not _REQUEST_NAME.fullmatch(name):
        raise Refused("bad_request_id", f"header {REQUEST_HEADER} is {name[:80]!r}", "use up to 64 of A-Z a-z 0-9 . _ -")
    return name


def parse_bands(text: str, where: str) -> tuple[str, ...]:
    """Names of planes, each once; ``where`` they were found is told in a refusal."""
    bands = tuple(name.strip() for name in text[: 64 * MAX_BANDS].split(","))
    wrong = [name for name in bands if not _BAND_NAME.fullmatch(name)]
    if wrong or len(set(bands)) != len(bands) or len(bands) > MAX_BANDS:
        raise Refused("bad_bands", f"{where} is {text[:200]!r}", "give each band once, as in u,g,r,i,z,y")
    return bands


def _parse_ebv(text: str | None) -> EbvPlane | None:
    if text is None:
        raise Refused("no_ebv", f"no header {EBV_HEADER}", "give E(B-V) in mag at the four corners, as in 0.02,0.02,0.02,0.02")
    if text.strip() == SERVER_EBV:
        return None
    values = _numbers(text)
    if len(values) != 4:
        raise Refused("bad_ebv", f"header {EBV_HEADER} is {text[:200]!r}", f"give four numbers in mag, or {SERVER_EBV}")
    if not all(abs(value) <= MAX_EBV for value in values):
        raise Refused("bad_ebv", f"header {EBV_HEADER} is {text[:200]!r}", f"give four finite numbers up to {MAX_EBV} mag")
    a, b, c, d = values
    return EbvPlane((a, b, c, d))


def _parse_core(text: str | None) -> tuple[float, float, float, float] | None:
    if text is None:
        return None
    values = _numbers(text)
    if len(values) != 4 or not all(map(math.isfinite, values)) or values[0] >= values[2] or values[1] >= values[3]:
        raise Refused("bad_core", f"header {CORE_HEADER} is {text[:200]!r}", "give x0,y0,x1,y1 in pixels, x0 < x1 and y0 < y1")
    x0, y0, x1, y1 = values
    return x0, y0, x1, y1


def _parse_boxes(text: str | None) -> NDArray[np.float32] | None:
    if text is None:
        return None
    rows = [_numbers(row) for row in text.split(";")] if text.strip() else []
    if any(len(row) != 4 for row in rows):
        raise Refused("bad_boxes", f"header {BOXES_HEADER} is {text[:200]!r}", "give x0,y0,x1,y1;x0,y0,x1,y1 in pixels")
    if len(rows) > MAX_HEADER_BOXES:
        raise Refused("bad_boxes", f"{len(rows)} boxes in the header, expected up to {MAX_HEADER_BOXES}", "send them in HDF5")
    with np.errstate(over="ignore"):
        return np.array(rows, np.float32).reshape(-1, 4)


def _parse_members(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise Refused("bad_members", f"header {MEMBERS_HEADER} is {text[:200]!r}", "give each name once, as in member-0,member-1")
    return names


def _parse_pdf(text: str) -> Grid | Literal["mixture", "none"]:
    if text == "mixture":
        return "mixture"
    if text == "none":
        return "none"
    values = _numbers(text.removeprefix("grid:")) if text.startswith("grid:") else []
    sound = len(values) == 3 and all(map(math.isfinite, values)) and 0 <= values[0] < values[1] <= 100
    if not sound or not (2 <= values[2] <= MAX_GRID and values[2].is_integer()):
        remedy = f"give mixture, none or grid:z0,z1,n with 0 <= z0 < z1 <= 100 and n from 2 to {MAX_GRID}"
        raise Refused("bad_pdf", f"header {PDF_HEADER} is {text[:200]!r}", remedy)
    return Grid(values[0], values[1], int(values[2]))


def _choice(headers: Mapping[str, str], name: str, known: tuple[str, ...], code: str) -> str:
    """The value of a header, the first of ``known`` where it is missing."""
    value = headers.get(name, known[0])
    if value not in known:
        raise Refused(code, f"header {name} is {value[:200]!r}", f"give {' or '.join(known)}")
    return value


def _numbers(text: str) -> list[float]:
    """The numbers between commas; none where one is no number."""
    try:
        return [float(value) for value in text.split(",")]
    except ValueError:
        return []
