"""Model archives: one .mar file holds an ensemble, the handler that serves it, and a canary.

The archive is a zip as TorchServe wants it: ``ensemble.yaml`` and one ``member-<i>.safetensors`` a member with its domain and
metrics, ``archive.yaml`` (`serving.contents`), ``canary.safetensors`` (`serving.canary`), the handler and
``MAR-INF/MANIFEST.json``. Members are stored uncompressed, in order of name and without dates: the same inputs give the same
bytes, on one kind of processor (the canary's answers are computed). Nothing in an archive is unpickled or executed here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

import deepdisc_ops
from deepdisc_ops import resources
from deepdisc_ops.config import EnsembleSettings
from deepdisc_ops.errors import ArchiveError
from deepdisc_ops.serving.contents import (
    CONTENTS,
    CanarySummary,
    Contents,
    DustSource,
    HalfEffect,
    check_digest,
    check_version,
    parse_contents,
)
from deepdisc_ops.serving.packing import DATE, entry_digest, open_zip, read_entry, unpack_archive, write_zip

if TYPE_CHECKING:
    from deepdisc_ops.inference.ensemble import Ensemble

__all__ = [
    "DESCRIPTION",
    "HANDLER",
    "build_archive",
    "check_version",
    "description_digest",
    "inspect_archive",
    "try_archive",
    "unpack_archive",
    "verify_archive",
]

HANDLER = "handlers/ensemble_handler.py"
DESCRIPTION = "ensemble.yaml"
MANIFEST = "MAR-INF/MANIFEST.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

log = logging.getLogger(__name__)


def build_archive(
    checkpoints: Sequence[Path],
    out: Path,
    run_ids: Sequence[str] | None = None,
    weights: Sequence[float] = (),
    *,
    half: bool = False,
    on_failure: Literal["raise", "skip"] | None = None,
    dust: DustSource | None = None,
) -> Path:
    """Pack checkpoint folders, or one ensemble folder, into the archive ``out`` (name.mar); it appears when it is complete.

    ``run_ids`` are the tracking runs the checkpoints come from, one each. ``weights`` are those of the members in the combined
    density, where they are not to follow from their validation. ``half`` stores the members' weights in 16 bits; what this
    changes is measured on the canary. ``on_failure`` is what a server does when a member fails, "raise" or go on without it.
    ``dust`` is the E(B-V) the members were trained with.
    """
    _check_names(checkpoints, out, run_ids)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".archive-", dir=out.parent) as scratch:
        parts = Path(scratch) / "parts"
        parts.mkdir()
        _gather(checkpoints, parts, run_ids, weights)
        if on_failure is not None:
            _change_description(parts, {"on_failure": on_failure})
        shutil.copyfile(resources.find(HANDLER), parts / Path(HANDLER).name)
        _add_canary(parts, half, dust)
        model = _run_archiver(out.stem, parts, Path(scratch))
        finished = Path(scratch) / out.name
        write_zip(model, finished)
        finished.replace(out)
    log.info("wrote %s: %d members, %.1f MB", out, len(checkpoints), out.stat().st_size / 1e6)
    return out


def inspect_archive(mar: Path) -> dict[str, Any]:
    """What an archive holds, as it says itself.

    file, bytes, sha256, version (`description_digest`), package_version, bands, pixel_scale, on_failure, members, and of its
    archive.yaml dust, half and canary, None where it has none. A member is {name, file, bytes, sha256, weight, config, metrics,
    run_id, domain}.
    """
    return _inspect(mar)[0]


def verify_archive(mar: Path) -> dict[str, Any]:
    """Check version and checksums and return `inspect_archive`; `ArchiveError` names the damaged member or file."""
    description, contents = _inspect(mar)
    check_version(description)
    with open_zip(mar) as archive:
        for member in description["members"]:
            found = entry_digest(mar, archive, str(member["file"]))
            if found != member["sha256"]:
                raise ArchiveError(
                    f"{mar}: member {member['name']} ({member['file']}) is damaged, sha256 {found[:12]} instead of "
                    f"{str(member['sha256'])[:12]}; copy the archive again or rebuild it"
                )
        names = set(archive.namelist())
        for name, expected in (contents.files if contents else {}).items():
            check_digest(f"{mar}: {name}", entry_digest(mar, archive, name) if name in names else None, expected)
    return description


def try_archive(mar: Path, device: str = "cpu") -> dict[str, Any]:
    """`verify_archive`, then read the ensemble and ask its canary, as a worker does before it is ready."""
    from deepdisc_ops.inference.ensemble import Ensemble
    from deepdisc_ops.serving import canary

    description = verify_archive(mar)
    if description["canary"] is None:
        raise ArchiveError(f"{mar} has no canary, it was made before there were any; build it again")
    with tempfile.TemporaryDirectory(prefix="deepdisc-archive-") as folder:
        canary.check(Ensemble.load(unpack_archive(mar, Path(folder)), device), Path(folder))
    return description


def description_digest(text: bytes) -> str:
    """Twelve characters that name an ensemble: the SHA-256 of its ``ensemble.yaml``, which holds its members' own."""
    return hashlib.sha256(text).hexdigest()[:12]


def archiver_command(name: str, parts: Sequence[str], export: Path) -> list[str]:
    """The command that turns ``parts`` (file names in its working directory) into an unzipped model folder."""
    handler = Path(HANDLER).name
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", name, "--version", "1.0"]
    command += ["--handler", handler, "--extra-files", ",".join(part for part in parts if part != handler)]
    return [*command, "--archive-format", "no-archive", "--export-path", str(export)]


def _check_names(checkpoints: Sequence[Path], out: Path, run_ids: Sequence[str] | None) -> None:
    if out.suffix != ".mar" or not _NAME.fullmatch(out.stem):
        raise ArchiveError(f"archive name {out.name!r} cannot be served; use letters, digits, '-', '_' and '.', ending in .mar")
    if not checkpoints:
        raise ArchiveError("an archive needs at least one member; name a checkpoint folder")
    if run_ids is not None and len(run_ids) != len(checkpoints):
        raise ArchiveError(f"{len(run_ids)} run ids for {len(checkpoints)} checkpoints; give one for each")


def _gather(checkpoints: Sequence[Path], parts: Path, run_ids: Sequence[str] | None, weights: Sequence[float]) -> None:
    """Make the ensemble folder ``parts``, or copy the one that is named."""
    from deepdisc_ops.inference.ensemble import read_description, write_ensemble

    if len(checkpoints) == 1 and (checkpoints[0] / DESCRIPTION).exists():
        for name in (DESCRIPTION, *(member["file"] for member in read_description(checkpoints[0])["members"])):
            shutil.copyfile(checkpoints[0] / name, parts / name)
        return
    settings = EnsembleSettings(weights=tuple(weights)) if weights else None
    write_ensemble(parts, list(checkpoints), run_ids, settings=settings)


def _add_canary(parts: Path, half: bool, dust: DustSource | None) -> None:
    """Write canary and archive.yaml into ``parts``, whose members are halved on the way if ``half``."""
    from deepdisc_ops.inference.ensemble import sha256
    from deepdisc_ops.serving import canary

    made, effect = canary.make(_load(parts)), None
    if half:
        _halve(parts)
        whole, made = made, canary.make(_load(parts))
        effect = HalfEffect(
            **{name: float(f"{v:.3g}") for name, v in asdict(canary.difference(whole.expected, made.expected)).items()}
        )
    (parts / canary.CANARY).write_bytes(canary.encode(made))
    contents = Contents(
        package_version=deepdisc_ops.__version__,
        files={name: sha256(parts / name) for name in (DESCRIPTION, Path(HANDLER).name, canary.CANARY)},
        canary=CanarySummary(file=canary.CANARY, objects=len(made.expected.boxes), given=len(made.boxes)),
        half=effect,
        dust=dust,
    )
    (parts / CONTENTS).write_text(yaml.safe_dump(contents.model_dump(mode="json"), sort_keys=False))


def _load(parts: Path) -> Ensemble:
    """The ensemble as it is packed: a member that cannot be used is not packed, whatever a server would do with it."""
    from deepdisc_ops.inference.ensemble import Ensemble

    return Ensemble.load(parts, on_failure="raise")


def _halve(parts: Path) -> None:
    """Round the members of ``parts`` to 16 bits."""
    from deepdisc_ops.inference.ensemble import read_description, sha256
    from deepdisc_ops.model.weights import copy_weights

    members = read_description(parts)["members"]
    for member in members:
        path = parts / member["file"]
        rounded = path.with_suffix(".half")
        copy_weights(path, rounded, half=True)
        rounded.replace(path)
        member["sha256"] = sha256(path)
    _change_description(parts, {"members": members})


def _change_description(parts: Path, changes: Mapping[str, Any]) -> None:
    from deepdisc_ops.inference.ensemble import read_description

    (parts / DESCRIPTION).write_text(yaml.safe_dump({**read_description(parts), **changes}, sort_keys=False))


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
    manifest["createdOn"] = datetime(*DATE, tzinfo=UTC).strftime("%d/%m/%Y %H:%M:%S")
    (model / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return model


def _inspect(mar: Path) -> tuple[dict[str, Any], Contents | None]:
    """`inspect_archive`, and the archive.yaml that some of it comes from."""
    with open_zip(mar) as archive:
        text = read_entry(mar, archive, DESCRIPTION)
        description = _parse_description(mar, text)
        sizes = {member.filename: member.file_size for member in archive.infolist()}
        contents = parse_contents(read_entry(mar, archive, CONTENTS), f"{mar}: {CONTENTS}") if CONTENTS in sizes else None
    told = contents.model_dump(mode="json") if contents else {}
    return {
        "file": str(mar),
        "bytes": mar.stat().st_size,
        "sha256": _digest(mar),
        "version": description_digest(text),
        **{key: description.get(key) for key in ("package_version", "bands", "pixel_scale")},
        "on_failure": description.get("on_failure", "raise"),
        **{key: told.get(key) for key in ("dust", "half", "canary")},
        "members": [{**member, "bytes": sizes.get(str(member["file"]), 0)} for member in description["members"]],
    }, contents


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


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
