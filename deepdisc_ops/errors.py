"""Errors the toolkit raises on purpose; everything else is a bug.

::

    DeepdiscOpsError            one line: what was found, what was expected, what to do
    ├── ConfigError             a setting, a YAML file, a sweep specification
    ├── InputError              something a user handed in
    │   ├── ImageError          pixels, bands, WCS, FITS structure
    │   └── CatalogError        a truth or prediction table
    ├── CheckpointError         a training checkpoint or its weights
    ├── TrainingError           a loss that is no number, a sweep without a usable trial
    │   └── Requeue             told to stop, saved everything, wants to be started again
    ├── ArchiveError            a model archive or one of its members
    ├── ServerError             the endpoint answered with a failure
    │   ├── ServerUnreachable   nothing listens, or it stopped answering
    │   ├── AccessDenied        missing, wrong or expired token
    │   └── RequestRejected     the endpoint refused what was sent
    └── SetupError              a missing or unusable part of the installation
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DeepdiscOpsError(Exception):
    """Base of all errors meant for the user; the command line prints one line and exits with ``exit_code``."""

    exit_code = 2


class ConfigError(DeepdiscOpsError):
    """A setting is unknown, out of range or contradicts another."""


class InputError(DeepdiscOpsError):
    """Data handed in by the user cannot be used as it is."""


class ImageError(InputError):
    """An image file lacks bands, WCS or valid pixels, or cannot be read."""


class CatalogError(InputError):
    """A table lacks columns, rows or units that are needed."""


class CheckpointError(DeepdiscOpsError):
    """A checkpoint is missing, damaged or made for something else."""


class TrainingError(DeepdiscOpsError):
    """Training or a sweep cannot go on."""


class Requeue(TrainingError):
    """Training was told to stop and has saved its state; the same call goes on from there."""

    exit_code = 85


class ArchiveError(DeepdiscOpsError):
    """A model archive is missing, damaged or of another version."""


class ServerError(DeepdiscOpsError):
    """The endpoint failed to answer as it should."""


class ServerUnreachable(ServerError):
    """No endpoint answers at the address."""


class AccessDenied(ServerError):
    """The endpoint does not accept the token."""


class RequestRejected(ServerError):
    """The endpoint refused the request and said why."""


class SetupError(DeepdiscOpsError):
    """A part of the installation is missing or cannot be used."""


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of ``known`` most like a word, if any is; ``cutoff`` is how like it must be, from 0 to 1; case does not count."""
    folded = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=cutoff)
    return folded[near[0]] if near else None


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of a sentence about a word that is not among ``known``: the nearest, or else all there are."""
    names = list(known)
    near = nearest(word, names, cutoff)
    return f"expected one of {', '.join(names)}" if near is None else f"did you mean {near!r}?"
