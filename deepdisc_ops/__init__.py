"""DeepDISC photo-z at scale: survey images in, a catalogue with a redshift density for every object out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

try:  # written from git's tags where the package is built or installed
    from deepdisc_ops._version import version as _version
except ModuleNotFoundError:  # a folder of sources on the path of an installed one
    from importlib.metadata import version as _version_of

    _version = _version_of("deepdisc-ops")
__version__ = _version

if TYPE_CHECKING:
    from deepdisc_ops.api import (
        arrow,
        connect,
        densities,
        evaluate,
        load_config,
        load_ensemble,
        positions,
        predict,
        read,
        read_catalog,
        serve,
        simulate,
        simulate_mosaic,
        stop,
        train,
    )

__all__ = [
    "arrow",
    "connect",
    "densities",
    "evaluate",
    "load_config",
    "load_ensemble",
    "positions",
    "predict",
    "read",
    "read_catalog",
    "serve",
    "simulate",
    "simulate_mosaic",
    "stop",
    "train",
]


def __getattr__(name: str) -> Any:
    """Names of `deepdisc_ops.api`, loaded when the first is used."""
    if name in __all__:
        return getattr(import_module("deepdisc_ops.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
