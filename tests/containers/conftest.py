"""The real image, as scripts/test-containers has built it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepdisc_ops.hpc.containers.runtime import Runtime, find_runtime

TINY = Path(__file__).with_name("tiny.yaml")


@pytest.fixture(scope="session")
def image() -> Path:
    if "DEEPDISC_OPS_IMAGE" not in os.environ:
        pytest.skip("no image in $DEEPDISC_OPS_IMAGE; run scripts/test-containers")
    return Path(os.environ["DEEPDISC_OPS_IMAGE"]).absolute()


@pytest.fixture(scope="session")
def runtime(image: Path) -> Runtime:
    return find_runtime()


def verb(*words: str | Path, folder: Path, inside: Path | None = None, app: str | None = None) -> str:
    """Run a verb outside, or inside of an image; what it printed."""
    command = [sys.executable, "-m", "deepdisc_ops"]
    if inside is not None:
        command += ["images", "run", str(inside), *(["--app", app] if app else []), "--"]
    done = subprocess.run([*command, *map(str, words)], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stdout[-3000:], done.stderr[-3000:])
    return done.stdout
