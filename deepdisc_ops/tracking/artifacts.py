"""The artifacts of one run, wherever its store keeps them: seen as entries of its top level, copied and compared as such."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from deepdisc_ops.tracking.store import local_artifacts

DIGEST_LENGTH = 12


@dataclass(frozen=True)
class Seen:
    """What a listing tells of a file; mtime is 0 where the store does not tell it."""

    size: int
    mtime_ns: int


class Artifacts:
    """Entries of the top level, a file or a folder with all in it: weights and what describes them are one thing."""

    def __init__(self, client: Any, uri: str, run: Any, scratch: Path) -> None:
        """``scratch`` takes copies of what does not lie on this machine."""
        self._client, self._run_id = client, str(run.info.run_id)
        self._scratch = scratch / self._run_id
        self._local = local_artifacts(uri, run)

    @cached_property
    def entries(self) -> dict[str, dict[str, Seen]]:
        """Files of every entry by their path below the run's root."""
        entries: dict[str, dict[str, Seen]] = defaultdict(dict)
        for path, seen in sorted((self._walk_local() if self._local else self._walk_remote(None)).items()):
            entries[path.partition("/")[0]][path] = seen
        return dict(entries)

    def local(self, entry: str) -> Path:
        """The entry on this machine: itself, or a copy."""
        if self._local:
            return self._local / entry
        if not (self._scratch / entry).exists():
            self._scratch.mkdir(parents=True, exist_ok=True)
            self._client.download_artifacts(self._run_id, entry, str(self._scratch))
        return self._scratch / entry

    def digests(self, entry: str, files: Iterable[str]) -> dict[str, str]:
        """Of the contents of the named files of an entry."""
        found = {}
        for file in files:
            with (self.local(entry).parent / file).open("rb") as stream:
                found[file] = hashlib.file_digest(stream, "blake2b").hexdigest()[:DIGEST_LENGTH]
        return found

    def put(self, entry: str, path: Path) -> None:
        """Copy a file or a folder into the run as ``entry``."""
        if path.is_dir():
            self._client.log_artifacts(self._run_id, str(path), entry)
        else:
            self._client.log_artifact(self._run_id, str(path))

    def _walk_local(self) -> dict[str, Seen]:
        assert self._local is not None
        found = {}
        for folder, _, names in os.walk(self._local):
            for path in (Path(folder) / name for name in names):
                stat = path.stat()
                found[path.relative_to(self._local).as_posix()] = Seen(stat.st_size, stat.st_mtime_ns)
        return found

    def _walk_remote(self, folder: str | None) -> dict[str, Seen]:
        found: dict[str, Seen] = {}
        for one in self._client.list_artifacts(self._run_id, folder):
            found |= self._walk_remote(one.path) if one.is_dir else {one.path: Seen(one.file_size or 0, 0)}
        return found
