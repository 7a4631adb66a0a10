"""Several members as one predictor: their objects matched, their mixtures summed.

An ensemble on disk is a folder with ensemble.yaml and one safetensors file a member; a model archive carries the
same folder. Glossary: M members, N objects, K components a member.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

import deepdisc_ops
from deepdisc_ops.config import EnsembleSettings, validate
from deepdisc_ops.errors import ArchiveError, CheckpointError, ConfigError, DeepdiscOpsError, ImageError, nearest
from deepdisc_ops.inference import window
from deepdisc_ops.inference.combine import combine, combine_aligned, member_weights
from deepdisc_ops.inference.engine import Member
from deepdisc_ops.model.weights import (
    WEIGHTS,
    MemberInfo,
    copy_weights,
    info_as_dict,
    info_from_dict,
    load_network,
    read_info,
    staged,
)
from deepdisc_ops.photoz.calibration import Calibration
from deepdisc_ops.sky.detections import Array, Detections, Flag
from deepdisc_ops.sky.dust import EbvPlane

FORMAT = 1
DESCRIPTION = "ensemble.yaml"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seat:
    """A member's place: its name, what it weighs, its description, its network's stride, and how to get at the network."""

    name: str
    weight: float
    info: MemberInfo
    stride: int
    load: Callable[[], Member]


class Ensemble:
    """M members with their weights w_m; all share bands, classes and pixel scale.

    ``memory`` is "keep" where all networks stay in memory, "swap" where each is read when it is used and there is never more
    than one. ``on_failure`` says what follows when a member fails: "raise" an error that names it, or "skip" it from then on;
    ``failures`` holds the names of those left out and why. ``calibration``, of one knot, recalibrates all mixtures unless the
    settings say otherwise. Threads may share an ensemble.
    """

    def __init__(
        self,
        seats: Sequence[Seat],
        settings: EnsembleSettings | None = None,
        *,
        memory: Literal["keep", "swap"] = "keep",
        on_failure: Literal["raise", "skip"] = "raise",
        failures: Mapping[str, str] | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        self.seats, self.settings, self.on_failure = tuple(seats), settings or EnsembleSettings(), on_failure
        if calibration is not None and len(calibration.knots) > 1:
            raise ConfigError("the calibration goes by magnitude, which a window does not tell; calibrate with one knot")
        self.calibration = calibration
        self.failures = dict(failures or {})
        self._turn = threading.Lock() if memory == "swap" else nullcontext()

    def __repr__(self) -> str:
        scale = "" if self.pixel_scale is None else f", {self.pixel_scale:g} arcsec a pixel"
        lost = f", without {', '.join(self.failures)}" if self.failures else ""
        return (
            f"<Ensemble of {len(self.seats)} ({', '.join(self.names)}{lost}), bands {' '.join(self.bands)}{scale}, "
            f"densities of {self.components} components>"
        )

    @classmethod
    def load(
        cls,
        folder: Path,
        device: str = "cpu",
        settings: EnsembleSettings | None = None,
        *,
        memory: Literal["keep", "swap"] = "keep",
        on_failure: Literal["raise", "skip"] = "raise",
    ) -> Ensemble:
        """Read an ensemble folder; a member whose file changed is named in the `ArchiveError`.

        ``settings`` take the place of those in the folder. Every member is read once here, also where it is swapped later.
        """
        description = read_description(folder)
        entries = description["members"]
        own = validate(EnsembleSettings, description.get("combination", {}), str(folder / DESCRIPTION))
        weights = [float(entry["weight"]) for entry in entries]
        if settings is not None and settings.weights != own.weights:
            nll = [float(entry["metrics"].get("val_nll", math.nan)) for entry in entries]
            weights = member_weights(nll, settings.weights, [str(entry["name"]) for entry in entries])
        seats, failures = [], {}
        for entry, weight in zip(entries, weights, strict=True):
            try:
                seats.append(_seat(folder, entry, weight, device, keep=memory == "keep"))
            except (DeepdiscOpsError, OSError) as error:
                if on_failure == "raise":
                    raise
                failures[str(entry["name"])] = _line(error)
                log.warning("member %s is left out: %s", entry["name"], _line(error))
        if not seats:
            raise ArchiveError(_all_failed(failures))
        learned = description.get("calibration")
        calibration = None if learned is None else Calibration.from_dict(learned)
        return cls(seats, settings or own, memory=memory, on_failure=on_failure, failures=failures, calibration=calibration)

    @property
    def members(self) -> tuple[Member, ...]:
        """The networks; where they are swapped, they are read anew, all of them."""
        return tuple(seat.load() for seat in self.seats)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the members, in their order."""
        return tuple(seat.name for seat in self.seats)

    @property
    def weights(self) -> tuple[float, ...]:
        """w_m of the members; an object's are brought to a sum of 1 over those that found it."""
        return tuple(seat.weight for seat in self.seats)

    @property
    def bands(self) -> tuple[str, ...]:
        """Order of the input planes."""
        return self.seats[0].info.config.model.bands

    @property
    def pixel_scale(self) -> float | None:
        """Arcsec per pixel of the images the members were trained on."""
        return self.seats[0].info.config.model.pixel_scale

    @property
    def components(self) -> int:
        """Components of a combined mixture: those of all members, or as many as they are reduced to."""
        every = sum(seat.info.config.model.redshift_head.components for seat in self.seats)
        if self.settings.components is None:
            return every
        return self.settings.components if self.settings.max_divergence is None else max(every, self.settings.components)

    @property
    def stride(self) -> int:
        """Window origins belong on multiples of this."""
        return math.lcm(*(seat.stride for seat in self.seats))

    def predict(
        self, data: NDArray[np.float32], ebv: EbvPlane, mask: NDArray[np.bool_] | None = None, *, masks: bool = False
    ) -> Detections:
        """Objects of one window (C, H, W) nJy in the order of `bands`, tiled inside where it is larger than a tile.

        ``mask`` (H, W) is True where data are invalid; boxes are in pixels of the window. ``masks`` asks for the objects' own,
        which members without a mask head do not have.
        """
        self._check(data)
        answers = self._ask(lambda member: window.find(member, data, ebv, masks=masks))
        found = combine([answer for _, answer in answers], [seat.weight for seat, _ in answers], self.settings)
        return self._finish(found, mask)

    def redshift(self, data: NDArray[np.float32], boxes: Array, ebv: EbvPlane, mask: NDArray[np.bool_] | None = None) -> Detections:
        """The mixtures of given ``boxes`` (N, 4) px of one window by all members, row for row, flagged `FORCED`.

        Nothing was detected: scores are NaN, and classes -1 where the model has more than one.
        """
        self._check(data)
        given = window.given_boxes(boxes)
        answers = self._ask(lambda member: window.redshift(member, data, given, ebv))
        found = combine_aligned([answer for _, answer in answers], [seat.weight for seat, _ in answers], self.settings)
        one_class = len(self.seats[0].info.config.model.classes) == 1
        unknown = np.full(len(given), 0 if one_class else -1, np.int32)
        return self._finish(replace(found, scores=np.full(len(given), np.nan, np.float32), classes=unknown), mask)

    def _check(self, data: NDArray[np.float32]) -> None:
        if data.ndim != 3 or len(data) != len(self.bands):
            raise ImageError(f"pixels have shape {data.shape}; expected (bands, rows, columns) of {', '.join(self.bands)}")

    def _ask(self, question: Callable[[Member], Detections]) -> list[tuple[Seat, Detections]]:
        """What every member answers, one after the other, without those that failed."""
        answers = []
        for seat in self.seats:
            if seat.name in self.failures:
                continue
            try:
                answers.append((seat, self._answer(seat, question)))
            except (DeepdiscOpsError, RuntimeError, ValueError, ArithmeticError, MemoryError, OSError) as error:
                self._failed(seat, error)
        if not answers:
            raise ArchiveError(_all_failed(self.failures))
        return answers

    def _answer(self, seat: Seat, question: Callable[[Member], Detections]) -> Detections:
        with self._turn:
            answer = question(seat.load())
        wrong = [name for name in ("boxes", "scores", "weights", "means", "sigmas") if not np.isfinite(getattr(answer, name)).all()]
        if wrong:
            raise ArithmeticError(f"its answer holds {', '.join(wrong)} that are no numbers")
        return answer

    def _failed(self, seat: Seat, error: Exception) -> None:
        if ran_out_of_memory(error):  # the window's fault, not the member's
            error.add_note(f"member {seat.name} ran out of memory")
            raise error
        if self.on_failure == "skip":
            self.failures[seat.name] = _line(error)
            log.warning("member %s is left out from now on: %s", seat.name, _line(error))
        elif isinstance(error, DeepdiscOpsError):
            raise type(error)(f"member {seat.name}: {error}") from error
        else:
            raise ArchiveError(
                f"member {seat.name} failed: {_line(error)}; train or fetch it again, or let the others go on without it "
                "(on_failure: skip)"
            ) from error

    def _finish(self, found: Detections, mask: NDArray[np.bool_] | None) -> Detections:
        """Mixtures of as many columns as ever, also where a member was left out, and objects on invalid pixels flagged."""
        lacking = ((0, 0), (0, max(0, self.components - found.weights.shape[1])))
        weights, means = (np.pad(column, lacking) for column in (found.weights, found.means))
        found = replace(found, weights=weights, means=means, sigmas=np.pad(found.sigmas, lacking, constant_values=1))
        if self.calibration is not None and self.settings.calibrated:
            nowhere = np.full(len(found), np.nan)
            mixture = self.calibration.apply(found.weights, found.means, found.sigmas, nowhere)
            weights, means, sigmas = (part.astype(np.float32) for part in mixture)
            found = replace(found, weights=weights, means=means, sigmas=sigmas)
        return found if mask is None else found.flagged(window.touches(mask, found.boxes), Flag.MASKED)


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, in Python, on a GPU, or in torch's allocator, which raises a RuntimeError for it."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            return True
        error = error.__cause__
    return False


def _line(error: Exception) -> str:
    """An error in one line, what torch says cut short."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, DeepdiscOpsError) else f"{type(error).__name__}: {text}"


def _all_failed(failures: Mapping[str, str]) -> str:
    return f"no member of the ensemble is left: {'; '.join(f'{name}: {why}' for name, why in failures.items())}"


def write_ensemble(
    folder: Path,
    checkpoints: Sequence[Path],
    run_ids: Sequence[str | None] | None = None,
    *,
    half: bool = False,
    settings: EnsembleSettings | None = None,
) -> None:
    """Gather checkpoint folders into an ensemble folder with their weights, checksums and run ids.

    ``half`` stores the weights in 16 bits, half the size; they are used in 32 bits again. ``settings`` say how the members are
    combined by whoever loads the folder.
    """
    settings = settings or EnsembleSettings()
    if not checkpoints:
        raise CheckpointError("an ensemble needs at least one checkpoint folder; found none")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / DESCRIPTION).exists():
        raise ArchiveError(f"{folder} holds other files and would be replaced; name a new folder or an ensemble's")
    infos = [read_info(path) for path in checkpoints]
    _check_alike(checkpoints, infos)
    nll = [info.metrics.get("val_nll", math.nan) for info in infos]
    weights = member_weights(nll, settings.weights, [str(path) for path in checkpoints])
    with staged(folder) as staging:
        entries = _write_members(staging, checkpoints, infos, weights, run_ids, half)
        description = {
            "format": FORMAT,
            "package_version": deepdisc_ops.__version__,
            "bands": list(infos[0].config.model.bands),
            "pixel_scale": infos[0].config.model.pixel_scale,
            "combination": settings.model_dump(mode="json"),
            "members": entries,
        }
        (staging / DESCRIPTION).write_text(yaml.safe_dump(description, sort_keys=False))


def _write_members(
    folder: Path,
    checkpoints: Sequence[Path],
    infos: Sequence[MemberInfo],
    weights: Sequence[float],
    run_ids: Sequence[str | None] | None,
    half: bool,
) -> list[dict[str, Any]]:
    """Copy the members' weights into ``folder``; their entries in its description."""
    entries = []
    for i, (path, info) in enumerate(zip(checkpoints, infos, strict=True)):
        file = f"member-{i}.safetensors"
        copy_weights(path / WEIGHTS, folder / file, half=half)
        run_id = run_ids[i] if run_ids else None
        entry = {"name": f"member-{i}", "file": file, "sha256": sha256(folder / file), "weight": weights[i], "run_id": run_id}
        member = info_as_dict(info)
        member["config"]["data"]["path"] = info.config.data.path.name  # an ensemble leaves the machine: no paths of it
        member["config"]["model"] |= {
            key: start.name for key in ("weights", "backbone_weights") if (start := getattr(info.config.model, key))
        }
        entries.append(entry | member)
    return entries


def read_description(folder: Path) -> dict[str, Any]:
    """ensemble.yaml as plain types, its format checked."""
    path = folder / DESCRIPTION
    if not folder.exists():
        beside = [one.name for one in folder.parent.iterdir() if one.is_dir()] if folder.parent.is_dir() else []
        meant = nearest(folder.name, beside)
        remedy = f"did you mean {meant!r}?" if meant else "give an ensemble, a checkpoint folder or a .mar archive"
        raise ArchiveError(f"model {folder} does not exist; {remedy}")
    if not path.exists():
        raise ArchiveError(f"{folder} is no ensemble: {DESCRIPTION} is missing; build one with `deepdisc-ops archive build`")
    description: dict[str, Any] = yaml.safe_load(path.read_text())
    if not isinstance(description, dict) or description.get("format") != FORMAT or not description.get("members"):
        raise ArchiveError(f"{path} is not of format {FORMAT}; build the archive again with this version")
    return description


def digest(folder: Path) -> str:
    """What names an ensemble in a catalogue's provenance: the sha256 of its description, which holds its members'."""
    return f"sha256:{sha256(folder / DESCRIPTION)}"


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seat(folder: Path, entry: dict[str, Any], weight: float, device: str, *, keep: bool) -> Seat:
    """A member of an ensemble folder, its checksum compared and its network read; kept in memory if ``keep``."""
    path, name = folder / entry["file"], str(entry["name"])
    if not path.exists():
        raise ArchiveError(f"member {name}: {entry['file']} is missing from {folder}; build the archive again")
    if sha256(path) != entry["sha256"]:
        raise ArchiveError(f"member {name}: {entry['file']} is damaged (checksum differs); copy or build the archive again")
    info = info_from_dict(entry, f"{folder / DESCRIPTION}, {name}")

    def load() -> Member:
        return Member(load_network(path, info.config, device), info.config, device).prepared()

    member = load()
    return Seat(name, weight, info, member.stride, (lambda: member) if keep else load)


def _check_alike(checkpoints: Sequence[Path], infos: Sequence[MemberInfo]) -> None:
    for path, info in zip(checkpoints, infos, strict=True):
        for key in ("bands", "classes", "pixel_scale"):
            mine, first = getattr(info.config.model, key), getattr(infos[0].config.model, key)
            if mine != first:
                raise CheckpointError(f"{path} has {key} {mine}, {checkpoints[0]} has {first}; an ensemble shares them")
        if not (path / WEIGHTS).exists():
            raise CheckpointError(f"{path} lacks {WEIGHTS}; fetch or train the member again")
