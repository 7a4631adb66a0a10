"""What ``deepdisc-ops predict`` is asked for, as far as one word bears on another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from deepdisc_ops.errors import ConfigError

AREA = ".moc.fits"
TABLES = (".parquet", ".fits", ".hdf5", ".ecsv")


class ForcedFor(StrEnum):
    """Which objects of a given list are looked at."""

    ALL = "all"
    MISSING = "missing"


class Memory(StrEnum):
    """Whether members stay in memory."""

    KEEP = "keep"
    SWAP = "swap"


@dataclass(frozen=True)
class Words:
    """The words that others have to do with."""

    out: Sequence[Path]
    forced: Path | None
    forced_for: ForcedFor
    server: bool
    picture: Path | None

    @property
    def journal(self) -> Path:
        """The folder of an unfinished run."""
        return self.out[0].with_name(f"{self.out[0].name}.unfinished")

    @property
    def area(self) -> bool:
        """Whether a map of the area is asked for."""
        return any(path.name.endswith(AREA) for path in self.out)

    @property
    def tables(self) -> list[Path]:
        """The outputs that are tables, whole."""
        return [path for path in self.out if path.suffix in TABLES and not path.name.endswith(AREA)]

    def refuse(self, asked: Mapping[str, Any]) -> None:
        """Refuse what an endpoint does not do: it was settled when it was started."""
        if self.server and (said := [name for name, value in asked.items() if value]):
            raise ConfigError(f"an endpoint does not understand {', '.join(said)}; leave it out, or predict with --model")

    def check(self, *, masks: bool, actors: int, ray_address: str | None, pixels_only: bool) -> None:
        """Refuse what does not go together, and outputs that cannot be written."""
        from deepdisc_ops.sky.catalog import check_path

        for path in self.out:
            check_path(path)
        for wrong, why in (
            (ray_address is not None and not actors, "--ray-address is of use with --actors alone; say how many"),
            (actors and self.server, "--actors predict in process and --server does not; leave one of them out"),
            (actors and self.forced, "--forced does not run on --actors; leave one of them out"),
            (masks and self.forced, "given objects have no masks; leave --masks or --forced out"),
            (self.area and pixels_only, f"a map of the area (*{AREA}) needs a WCS; leave it or --pixels-only out"),
            (
                self.area and self.forced and self.forced_for == ForcedFor.ALL,
                f"--forced-for all searches no area; leave *{AREA} out, or take --forced-for missing",
            ),
            (self.picture and not self.tables, f"--picture is drawn from a table; add one to --out ({', '.join(TABLES)})"),
        ):
            if wrong:
                raise ConfigError(why)
