"""Model archives: one .mar file holds an ensemble and the handler that serves it.

The archive is a zip as TorchServe wants it: ``ensemble.yaml``, one ``member-<i>.safetensors`` a member, the handler and
``MAR-INF/MANIFEST.json``. Members are stored uncompressed, in order of name and without dates: the same inputs give the
same bytes. Nothing in an archive is unpickled or executed here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from deepdisc_ops import resources
from deepdisc_ops.config import EnsembleSettings
from deepdisc_ops.errors import ArchiveError

HANDLER = "handlers/ensemble_handler.py"
DESCRIPTION = "ensemble.yaml"
MANIFEST = "MAR-INF/MANIFEST.json"
MAX_EXPANSION = 200

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_DATE = (1980, 1, 1, 0, 0, 0)
_CHUNK = 1 << 20

log = logging.getLogger(__name__)


def build_archive(
    checkpoints: Sequence[Path], out: Path, run_ids: Sequence[str] | None = None, weights: Sequence[float] = ()
) -> Path:
    """Pack checkpoint folders, or one ensemble folder, into the archive ``out`` (name.mar); it appears when it is complete.

    ``run_ids`` are the tracking runs the checkpoints come from, one each. ``weights`` are those of the members in the combined
    density, where they are not to follow from their validation.
    """
    if out.suffix != ".mar" or not _NAME.fullmatch(out.stem):
        raise ArchiveError(f"archive name {out.name!r} cannot be served; use letters, digits, '-', '_' and '.', ending in .mar")
    if not checkpoints:
        raise ArchiveError("an archive needs at least one member; name a checkpoint folder")
    if run_ids is not None and len(run_ids) != len(checkpoints):
        raise ArchiveError(f"{len(run_ids)} run ids for {len(checkpoints)} checkpoints; give one for each")
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".archive-", dir=out.parent) as scratch:
        parts = Path(scratch) / "parts"
        parts.mkdir()
        _gather(checkpoints, parts, run_ids, weights)
        shutil.copyfile(resources.find(HANDLER), parts / Path(HANDLER).name)
        model = _run_archiver(out.stem, parts, Path(scratch))
        finished = Path(scratch) / out.name
        _zip(model, finished)
        finished.replace(out)
    log.info("wrote %s: %d members, %.1f MB", out, len(checkpoints), out.stat().st_size / 1e6)
    return out


def _gather(checkpoints: Sequence[Path], parts: Path, run_ids: Sequence[str] | None, weights: Sequence[float]) -> None:
    """Make the ensemble folder ``parts``, or copy the one that is named."""
    from deepdisc_ops.inference.ensemble import read_description, write_ensemble

    if len(checkpoints) == 1 and (checkpoints[0] / DESCRIPTION).exists():
        for name in (DESCRIPTION, *(member["file"] for member in read_description(checkpoints[0])["members"])):
            shutil.copyfile(checkpoints[0] / name, parts / name)
        return
    settings = EnsembleSettings(weights=tuple(weights)) if weights else None
    write_ensemble(parts, list(checkpoints), run_ids, settings=settings)


def unpack_archive(mar: Path, folder: Path) -> Path:
    """Extract ``mar`` into ``folder``, which `Ensemble.load` can then read; returns the folder.

    Refuses names that lead out of the folder, links, and more than MAX_EXPANSION times the archive's size.
    """
    with _open(mar) as archive:
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


def inspect_archive(mar: Path) -> dict[str, Any]:
    """What an archive holds: file, bytes, sha256, version, package_version, bands, pixel_scale and members.

    A member is {name, file, bytes, sha256, weight, config, metrics, run_id}. ``version`` is `description_digest`.
    """
    with _open(mar) as archive:
        text = _read(mar, archive, DESCRIPTION)
        description = _parse_description(mar, text)
        sizes = {member.filename: member.file_size for member in archive.infolist()}
    members = [{**member, "bytes": sizes.get(str(member["file"]), 0)} for member in description["members"]]
    return {
        "file": str(mar),
        "bytes": mar.stat().st_size,
        "sha256": _digest(mar),
        "version": description_digest(text),
        **{key: description.get(key) for key in ("package_version", "bands", "pixel_scale")},
        "members": members,
    }


def verify_archive(mar: Path) -> dict[str, Any]:
    """Check every member against its checksum and return `inspect_archive`; `ArchiveError` names the damaged member."""
    contents = inspect_archive(mar)
    with _open(mar) as archive:
        for member in contents["members"]:
            found = _member_digest(mar, archive, str(member["file"]))
            if found != member["sha256"]:
                raise ArchiveError(
                    f"{mar}: member {member['name']} ({member['file']}) is damaged, sha256 {found[:12]} instead of "
                    f"{str(member['sha256'])[:12]}; copy the archive again or rebuild it"
                )
    return contents


def description_digest(text: bytes) -> str:
    """Twelve characters that name an ensemble: the SHA-256 of its ``ensemble.yaml``, which holds its members' own."""
    return hashlib.sha256(text).hexdigest()[:12]


def archiver_command(name: str, parts: Sequence[str], export: Path) -> list[str]:
    """The command that turns ``parts`` (file names in its working directory) into an unzipped model folder."""
    handler = Path(HANDLER).name
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", name, "--version", "1.0"]
    command += ["--handler", handler, "--extra-files", ",".join(part for part in parts if part != handler)]
    return [*command, "--archive-format", "no-archive", "--export-path", str(export)]


def _run_archiver(name: str, parts: Path, scratch: Path) -> Path:
    """Let torch-model-archiver make the model folder; its scratch space is private, for it empties $TMPDIR/<name>."""
    export, private = scratch / "export", scratch / "tmp"
    export.mkdir()
    private.mkdir()
    command = archiver_command(name, sorted(path.name for path in parts.iterdir()), export)
    environment = {**os.environ, "TMPDIR": str(private)}
    result = subprocess.run(command, cwd=parts, env=environment, capture_output=True, text=True, check=False)
    model = export / name
    if result.returncode != 0 or not (model / MANIFEST).exists():
        reason = next((line.strip() for line in reversed(result.stderr.splitlines()) if line.strip()), "no message")
        raise ArchiveError(f"torch-model-archiver failed ({reason}); is deepdisc-ops[serve] installed?")
    manifest = json.loads((model / MANIFEST).read_text())
    manifest["createdOn"] = datetime(*_DATE, tzinfo=UTC).strftime("%d/%m/%Y %H:%M:%S")
    (model / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return model


def _zip(folder: Path, out: Path) -> None:
    """Write ``folder`` as a zip whose bytes depend on names and contents only."""
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _DATE)
            entry.external_attr = 0o644 << 16
            entry.file_size = path.stat().st_size
            with path.open("rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target, _CHUNK)


def _open(mar: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(mar)
    except FileNotFoundError:
        raise ArchiveError(f"archive {mar} does not exist; make it with deepdisc-ops archive build") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise ArchiveError(f"{mar} is not a readable archive ({error}); copy it again or rebuild it") from None


def _read(mar: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except KeyError:
        raise ArchiveError(f"{mar} has no {name}, so it is no ensemble of deepdisc-ops; rebuild it") from None
    except (OSError, EOFError, zipfile.BadZipFile, zipfile.zlib.error) as error:  # type: ignore[attr-defined]
        raise ArchiveError(f"{mar}: {name} is damaged ({error}); copy the archive again or rebuild it") from None


def _parse_description(mar: Path, text: bytes) -> Mapping[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ArchiveError(f"{mar}: {DESCRIPTION} is not YAML ({' '.join(str(error).split())}); rebuild the archive") from None
    members = tree.get("members") if isinstance(tree, dict) else None
    known = isinstance(members, list) and all(isinstance(m, dict) and {"name", "file", "sha256"} <= m.keys() for m in members)
    if not known or not members:
        raise ArchiveError(f"{mar}: {DESCRIPTION} lists no members; rebuild the archive")
    return dict(tree)


def _member_digest(mar: Path, archive: zipfile.ZipFile, name: str) -> str:
    digest = hashlib.sha256()
    try:
        with archive.open(name) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except KeyError:
        raise ArchiveError(f"{mar} lacks the member {name}; rebuild it") from None
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise ArchiveError(f"{mar}: member {name} is damaged ({error}); copy the archive again or rebuild it") from None
    return digest.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_member(mar: Path, member: zipfile.ZipInfo) -> None:
    path = PurePosixPath(member.filename)
    if path.is_absolute() or ".." in path.parts or "\\" in member.filename or stat.S_ISLNK(member.external_attr >> 16):
        raise ArchiveError(f"{mar}: member {member.filename!r} would be written outside its folder; do not use this archive")


def _extract(mar: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, _CHUNK)
    except (EOFError, zipfile.BadZipFile) as error:
        raise ArchiveError(f"{mar}: member {member.filename} is damaged ({error}); copy the archive again or rebuild it") from None
