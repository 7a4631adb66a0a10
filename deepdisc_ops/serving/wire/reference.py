"""References: files that the server sees itself, below the folders that it may read for its clients.

A name is followed to its end first, then opened without following anything, and the kernel is asked what was opened: a link
that is changed in between leads nowhere else. What is outside and what does not exist is answered alike.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, field_validator

from deepdisc_ops.config import Settings
from deepdisc_ops.serving.wire.fault import Refused
from deepdisc_ops.serving.wire.protocol import MAX_BANDS
from deepdisc_ops.sky.tiling import Window

_OPENING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_Name = Annotated[str, Field(min_length=1, max_length=4096)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class Reference(Settings):
    """Files and a window of them; the options are those of `sky.images.open_mosaic`.

    paths: absolute, or below one of the server's folders; window: x0, y0, x1, y1 in pixels, the whole image where it is missing.
    """

    paths: tuple[_Name, ...] = Field(min_length=1, max_length=MAX_BANDS)
    window: tuple[int, int, int, int] | None = None
    plane_bands: tuple[_Name, ...] | None = Field(None, max_length=MAX_BANDS)
    zero_point: _Finite | None = Field(None, ge=-100, le=100)
    pixel_scale: _Finite | None = Field(None, gt=0, le=1e4)
    blank: _Finite | None = None
    bad_bits: tuple[_Name, ...] | int | None = None

    @field_validator("window")
    @classmethod
    def _window(cls, value: tuple[int, int, int, int] | None) -> tuple[int, int, int, int] | None:
        if value is not None and not (0 <= value[0] < value[2] < 2**31 and 0 <= value[1] < value[3] < 2**31):
            raise ValueError("expected 0 <= x0 < x1 and 0 <= y0 < y1")
        return value

    @property
    def part(self) -> Window | None:
        """The window."""
        return None if self.window is None else Window(*self.window)


@dataclass(frozen=True)
class Opened:
    """A file of a reference: the name it was asked for, and a descriptor that whoever has it closes."""

    name: str
    descriptor: int


def parse_reference(tree: object) -> Reference:
    """A reference from JSON; `Refused` names the first thing that is wrong."""
    if not isinstance(tree, dict):
        remedy = 'send {"paths": [...], "window": [x0, y0, x1, y1]}'
        raise Refused("bad_reference", f"the JSON is {type(tree).__name__}, expected an object", remedy)
    try:
        return Reference.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:100]
        raise Refused("bad_reference", f"{where}: {first['msg']}"[:300], "see docs/endpoint.md for its keys") from None


def open_files(names: Sequence[str], roots: Sequence[Path]) -> list[Opened]:
    """Descriptors of regular files below ``roots``; `Refused` where one is none, and all are closed again."""
    if not roots:
        raise Refused("no_references", "this server reads no files for its clients", "send the pixels, or start it with --root")
    opened: list[Opened] = []
    try:
        opened.extend(Opened(name, _open(name, roots)) for name in names)
    except BaseException:
        close(opened)
        raise
    return opened


def close(files: Sequence[Opened]) -> None:
    """Close all of them."""
    for file in files:
        os.close(file.descriptor)


def _open(name: str, roots: Sequence[Path]) -> int:
    for root in roots:
        try:
            real_root = root.resolve(strict=True)
            found = (real_root / name).resolve(strict=True)  # an absolute name stays what it is
            if not found.is_relative_to(real_root) or not stat.S_ISREG(found.lstat().st_mode):
                continue
            descriptor = os.open(found, _OPENING)
        except (OSError, ValueError, RuntimeError):  # a name with a NUL; a loop of links
            continue
        if _is_below(descriptor, real_root):
            return descriptor
        os.close(descriptor)
    what = f"{name[:200]!r} is no regular file below the folders that the server reads"
    raise Refused("not_found", what, "name a file that the server sees, or send the pixels")


def _is_below(descriptor: int, real_root: Path) -> bool:
    """Whether what is open is a regular file below the folder, as the kernel sees it."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return False
    return Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(real_root)  # noqa: PTH115 - of the descriptor itself
