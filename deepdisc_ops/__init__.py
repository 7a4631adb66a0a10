"""DeepDISC photo-z at scale: survey images in, a catalogue with a redshift density for every object out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

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
