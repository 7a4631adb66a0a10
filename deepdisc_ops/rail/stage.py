"""What our stages share: how ceci starts them, how images come in, how processes keep step."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any

from rail.core.stage import RailStage

from deepdisc_ops.errors import DeepdiscOpsError
from deepdisc_ops.rail.handles import Images


class DeepdiscStage(RailStage):
    """Base of our stages; none by itself."""

    @classmethod
    def generate_command(
        cls,
        inputs: Mapping[str, str],
        config: str,
        outputs: Mapping[str, str],
        aliases: Mapping[str, str] | None = None,
        instance_name: str | None = None,
    ) -> str:
        """The command that ceci runs for this stage: through ceci's own main, since ours is another; paths are quoted."""
        quoted = [{tag: shlex.quote(str(path)) for tag, path in paths.items()} for paths in (inputs, outputs)]
        command: str = super().generate_command(quoted[0], shlex.quote(str(config)), quoted[1], aliases, instance_name)
        return command.replace(f"-m {__name__.split('.')[0]} {cls.name}", f"-m ceci {cls.__module__}.{cls.name}", 1)

    def images(self, tag: str = "input") -> Images:
        """The images of an input."""
        handle = self.get_handle(tag, allow_missing=True)
        return handle.data if handle.has_data else handle.read()

    def together(self, work: Callable[[], None], *, first_alone: bool = False) -> None:
        """Do this process' part of ``work`` and wait for the others; raises in all where it failed in one.

        ``first_alone`` leaves the work to the first process.
        """
        state = "failed"
        try:
            if self.rank == 0 or not first_alone:
                work()
            state = ""
        finally:  # the others must not wait for ever
            states = [state] if self.comm is None else self.comm.allgather(state)
        failed = [rank for rank, one in enumerate(states) if one]
        if failed:
            raise DeepdiscOpsError(f"process {failed[0]} of {len(states)} failed; its own message tells why")


def given(value: Any) -> bool:
    """Whether ceci handed in something: it says None as text too."""
    return value is not None and str(value) not in ("", "None", "none")
