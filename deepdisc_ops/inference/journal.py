"""What a run over a mosaic has found so far, on disk, window by window, so that an interrupted one continues where it stopped.

A file a window, written under another name first; what the run is about (images, network, windows) lies beside them, and a run of
something else is not continued.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.sky.detections import Array, Detections
from deepdisc_ops.sky.tiling import Window

ABOUT = "run.json"
DIGEST_BYTES = 32


@dataclass(frozen=True)
class Found:
    """What one window gave: objects in mosaic pixels (None where no pixel is valid), valid pixels, and words of warning.

    cells: the HEALPix cells of its valid pixels (`sky.catalog.coverage`), empty where nobody asked for them.
    """

    objects: Detections | None
    valid: int
    warnings: tuple[str, ...] = ()
    cells: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


class Journal:
    """A folder of `Found`; ``about`` says of which run, in values that JSON knows."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder = folder
        told = json.loads(json.dumps(about))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / ABOUT).exists():
                self._check(told)
            elif len(self):
                raise CatalogError(f"{folder} holds {len(self)} windows and no {ABOUT} that says of what; remove it to begin anew")
            else:
                self._write(folder / ABOUT, lambda path: path.write_text(json.dumps(told, indent=1)))
        except OSError as error:
            raise no_room(folder, error) from None

    def __len__(self) -> int:
        return sum(1 for _ in self.folder.glob("*.npz"))

    def has(self, window: Window, pass_: str) -> bool:
        """Whether there is a file of what ``window`` gave in the pass of that name."""
        return self._path(window, pass_).exists()

    def get(self, window: Window, pass_: str) -> Found | None:
        """What ``window`` gave in the pass of that name, if it is known."""
        path = self._path(window, pass_)
        try:
            return read_found(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            path.unlink(missing_ok=True)  # damaged, perhaps by a machine that went down: found again
            return None

    def put(self, window: Window, pass_: str, found: Found) -> None:
        """Keep what ``window`` gave; raises `CatalogError` where there is no room, with all that was kept before."""
        path = self._path(window, pass_)
        try:
            self._write(path, lambda partial: write_found(partial, found))
        except OSError as error:
            raise no_room(self.folder, error) from None

    def remove(self) -> None:
        """Forget the run: it is complete. What it was about goes last, lest another takes windows that are left for its own."""
        for page in self.folder.glob("*.npz"):
            page.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, window: Window, pass_: str) -> Path:
        return self.folder / f"{pass_}-{'-'.join(map(str, window))}.npz"

    def _check(self, about: Mapping[str, Any]) -> None:
        try:
            kept = json.loads((self.folder / ABOUT).read_text())
        except ValueError:
            raise CatalogError(f"{self.folder / ABOUT} is damaged; remove {self.folder} to begin anew") from None
        differing = [key for key in sorted({*kept, *about}) if kept.get(key) != about.get(key)]
        if differing:
            told = "; ".join(f"{key} was {kept.get(key)}, is {about.get(key)}" for key in differing)
            raise CatalogError(f"{self.folder} holds an unfinished run of something else ({told}); finish it, or remove the folder")

    @staticmethod
    def _write(path: Path, write: Any) -> None:
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            write(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def read_found(path: Path) -> Found:
    """What `write_found` wrote; raises `ValueError` where the file is not as it was written, by a bit or by its end."""
    raw = path.read_bytes()
    if sha256(raw[:-DIGEST_BYTES]).digest() != raw[-DIGEST_BYTES:]:
        raise ValueError(f"{path} is damaged")
    with np.load(BytesIO(raw), allow_pickle=False) as file:
        return _from_arrays(dict(file.items()))


def write_found(path: Path, found: Found) -> None:
    """Write what a window gave, so that it is on the disk: an .npz, which may have bytes after its end, and its SHA-256."""
    page = BytesIO()
    np.savez(page, **_as_arrays(found))  # type: ignore[arg-type]  # none is named allow_pickle, its one option
    with path.open("wb") as file:
        file.write(page.getbuffer())
        file.write(sha256(page.getbuffer()).digest())
        file.flush()
        os.fsync(file.fileno())


def _as_arrays(found: Found) -> dict[str, Array]:
    arrays: dict[str, Array] = {"valid": np.asarray(found.valid), "warnings": np.array(found.warnings, "U"), "cells": found.cells}
    if found.objects is None:
        return arrays
    for name, value in vars(found.objects).items():
        if name == "extra":
            arrays |= {f"extra.{key}": column for key, column in value.items()}
        elif value is not None:
            arrays[f"objects.{name}"] = value
    return arrays


def _from_arrays(arrays: Mapping[str, Array]) -> Found:
    columns = {key.removeprefix("objects."): value for key, value in arrays.items() if key.startswith("objects.")}
    extra = {key.removeprefix("extra."): value for key, value in arrays.items() if key.startswith("extra.")}
    objects = Detections(**columns, extra=extra) if columns else None
    return Found(objects, int(arrays["valid"]), tuple(str(text) for text in arrays["warnings"]), arrays["cells"])


def no_room(folder: Path, error: OSError) -> CatalogError:
    """What to tell of a folder of a run that cannot be written."""
    reason = error.strerror or str(error)
    return CatalogError(f"{folder} cannot be written ({reason}); make room and run the same again: what is there is not lost")
