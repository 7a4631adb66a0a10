"""The zip that an archive is: written so that its bytes depend on names and contents alone, read as if a stranger had made it."""

from __future__ import annotations

import hashlib
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from deepdisc_ops.errors import ArchiveError

MAX_EXPANSION = 200
DATE = (1980, 1, 1, 0, 0, 0)
_CHUNK = 1 << 20
_DAMAGE = (OSError, EOFError, zipfile.BadZipFile, zlib.error)


def write_zip(folder: Path, out: Path) -> None:
    """Write ``folder`` as a zip, uncompressed, in order of name and without dates."""
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), DATE)
            entry.external_attr = 0o644 << 16
            entry.file_size = path.stat().st_size
            with path.open("rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target, _CHUNK)


def open_zip(mar: Path) -> zipfile.ZipFile:
    """The archive, opened."""
    try:
        return zipfile.ZipFile(mar)
    except FileNotFoundError:
        raise ArchiveError(f"archive {mar} does not exist; make it with deepdisc-ops archive build") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise ArchiveError(f"{mar} is not a readable archive ({error}); copy it again or rebuild it") from None


def unpack_archive(mar: Path, folder: Path) -> Path:
    """Extract ``mar`` into ``folder``, which `Ensemble.load` can then read; returns the folder.

    Refuses names that lead out of the folder, links, and more than MAX_EXPANSION times the archive's size.
    """
    with open_zip(mar) as archive:
        members = archive.infolist()
        for member in members:
            _check_member(mar, member)
        total = sum(member.file_size for member in members)
        if total > MAX_EXPANSION * max(mar.stat().st_size, 1):
            raise ArchiveError(f"{mar} would unpack to {total} bytes, over {MAX_EXPANSION} times its size; build it again")
        for member in members:
            if not member.is_dir():
                _extract(mar, archive, member, folder / member.filename)
    return folder


def read_entry(mar: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    """A small file of the archive."""
    try:
        return archive.read(name)
    except KeyError:
        raise ArchiveError(f"{mar} has no {name}, so it is no ensemble of deepdisc-ops; rebuild it") from None
    except _DAMAGE as error:
        raise ArchiveError(f"{mar}: {name} is damaged ({error}); copy the archive again or rebuild it") from None


def entry_digest(mar: Path, archive: zipfile.ZipFile, name: str) -> str:
    """sha256 of a file of the archive."""
    digest = hashlib.sha256()
    try:
        with archive.open(name) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except KeyError:
        raise ArchiveError(f"{mar} lacks the member {name}; rebuild it") from None
    except _DAMAGE as error:
        raise ArchiveError(f"{mar}: member {name} is damaged ({error}); copy the archive again or rebuild it") from None
    return digest.hexdigest()


def _check_member(mar: Path, member: zipfile.ZipInfo) -> None:
    path = PurePosixPath(member.filename)
    if path.is_absolute() or ".." in path.parts or "\\" in member.filename or stat.S_ISLNK(member.external_attr >> 16):
        raise ArchiveError(f"{mar}: member {member.filename!r} would be written outside its folder; do not use this archive")


def _extract(mar: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, _CHUNK)
    except (EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ArchiveError(f"{mar}: member {member.filename} is damaged ({error}); copy the archive again or rebuild it") from None
