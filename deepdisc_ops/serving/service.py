"""How a server wants its workers to work: written by the server, read by the handler, both from this one form."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from deepdisc_ops.config import Settings
from deepdisc_ops.errors import ConfigError

VARIABLE = "DEEPDISC_OPS_SERVICE"
"""Environment variable with the path of the settings' file."""


class ServiceSettings(Settings):
    """What a worker may read, how much it may take in and give back, and where it says that it is at work.

    roots: folders below which requests may name files, none for none; max_window: largest side of a window, pixels;
    request_bytes and reply_bytes: limits of the front end, which kills a worker that goes over the latter; busy: folder where
    a worker keeps a file while it answers, for whoever waits until all is answered; memory: whether members stay in memory or
    are read one after the other; dust_map, dust_folder and dust_scale: the map of E(B-V) for requests that ask for the server's.
    """

    roots: tuple[Path, ...] = ()
    max_window: int = Field(2048, ge=64)
    request_bytes: int = Field(1 << 28, gt=0)
    reply_bytes: int = Field(1 << 28, gt=0)
    busy: Path | None = None
    memory: Literal["keep", "swap"] = "keep"
    dust_map: str | None = None
    dust_folder: Path | None = None
    dust_scale: float = Field(1.0, gt=0)


def read_service(environment: Mapping[str, str] = os.environ) -> ServiceSettings:
    """The settings that the environment names; the defaults where it names none."""
    if not (path := environment.get(VARIABLE)):
        return ServiceSettings()
    try:
        return ServiceSettings.model_validate_json(Path(path).read_text())
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"{path}, the server's settings for its workers, cannot be used ({error}); start the server anew"
        ) from None
