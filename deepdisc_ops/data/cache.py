"""Decoded images in a temporary folder, memory-mapped: one copy in the page cache serves every worker.

The folder goes with the process that made it; what a killed process left is removed by the next.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PREFIX = "deepdisc-images-"
YOUNG_S = 60.0
"""A folder this young may be of a process that has not locked it yet."""
log = logging.getLogger(__name__)


class ImageCache:
    """At most ``capacity`` bytes of float32 images by number. Any number of processes may share one, by fork or by pickle."""

    def __init__(self, capacity: float) -> None:
        self._capacity, self._owner = capacity, os.getpid()
        _remove_orphans()
        self._folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        (self._folder / "used").write_text("0")
        self._lock = (self._folder / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def image(self, number: int, nbytes: int, read: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32] | None:
        """The image as ``read`` gave it once, mapped; None where it is not kept, for want of room (nbytes are needed)."""
        path = self._folder / f"{number}.npy"
        if not path.exists() and not (self._reserve(nbytes) and self._write(path, read())):
            return None
        mapped: NDArray[np.float32] = np.load(path, mmap_mode="r")
        return mapped

    def _reserve(self, nbytes: int) -> bool:
        """Count the bytes as used if there is room for them, one process at a time."""
        with (self._folder / "used").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            used = int(file.read()) + nbytes
            if used > self._capacity:
                return False
            file.seek(0)
            file.write(str(used))
        return True

    def _write(self, path: Path, pixels: NDArray[np.float32]) -> bool:
        staging = path.with_suffix(f".{os.getpid()}")
        try:
            with staging.open("wb") as file:
                np.save(file, pixels)
            staging.replace(path)
        except OSError as error:
            staging.unlink(missing_ok=True)
            self._capacity = 0.0
            log.warning("no more images are kept in %s: %s; set TMPDIR to a larger disk", self._folder, error.strerror)
            return False
        return True

    def close(self) -> None:
        """Remove the folder, in the process that made it."""
        if self._owner == os.getpid():
            shutil.rmtree(self._folder, ignore_errors=True)
            self._lock.close()
            self._owner = -1

    def __del__(self) -> None:
        if hasattr(self, "_folder"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"_capacity": self._capacity, "_owner": -1, "_folder": self._folder}


def _remove_orphans() -> None:
    """Remove folders that no living process holds."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            if time.time() - folder.stat().st_mtime < YOUNG_S:
                continue
            with (folder / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # held by its process, of another user, or just removed
            continue
