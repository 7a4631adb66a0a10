"""``python -m deepdisc_ops.rail FOLDER``: pipeline.yaml and config.yaml, to be run by ceci and changed at will."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from deepdisc_ops.errors import ConfigError, DeepdiscOpsError

FILES = ("pipeline.yaml", "config.yaml")


def copy_pipeline(folder: Path) -> list[Path]:
    """Copy the files of the pipeline into ``folder``; raises `ConfigError` where one is there already."""
    targets = [folder / name for name in FILES]
    there = [str(path) for path in targets if path.exists()]
    if there:
        raise ConfigError(f"{', '.join(there)} would be replaced; name another folder, or remove them")
    folder.mkdir(parents=True, exist_ok=True)
    for path in targets:
        shutil.copyfile(Path(__file__).with_name(path.name), path)
    return targets


if __name__ == "__main__":
    try:
        copy_pipeline(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
    except (DeepdiscOpsError, OSError) as error:
        sys.exit(f"error: {error}")
