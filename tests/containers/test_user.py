"""An ordinary user on a machine that offers little: no home, a long folder, a small /tmp, a poisoned ~/.local."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from deepdisc_ops.hpc.containers.runtime import Runtime

pytestmark = pytest.mark.containers
NOBODY = 65534


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder of a hundred letters that the user may write, and reach."""
    made = tmp_path / ("x" * 100)
    made.mkdir()
    made.chmod(0o777)
    for parent in made.parents:
        if parent.owner() == pwd.getpwuid(os.getuid()).pw_name and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    return made


def as_user(runtime: Runtime, words: Sequence[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Apptainer as an ordinary user: ourselves, or nobody where we are root. HOME is unset unless it is given."""
    prefix: list[str] = []
    if os.getuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("we are root, and there is no setpriv (util-linux) to become somebody else")
        prefix = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    environment |= {"APPTAINER_CONFIGDIR": str(folder / ".apptainer"), "APPTAINER_TMPDIR": str(folder), **variables}
    command = [*prefix, str(runtime.program), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def inside(folder: Path, image: Path, *words: str, tmp: bool = False) -> list[str]:
    """A contained call: /tmp is the 64 MB that --contain gives, unless the folder is bound there."""
    shown = ["--bind", str(folder), "--bind", "/dev/shm", *(["--bind", f"{folder}:/tmp"] if tmp else [])]
    return ["exec", "--userns", "--contain", "--no-home", "--pwd", str(folder), *shown, str(image), *words]


def test_the_role_train_needs_no_home_and_a_small_tmp(runtime: Runtime, image: Path, folder: Path) -> None:
    words = inside(folder, image, "python", "-m", "deepdisc_ops.hpc.containers.canary", "train")
    done = as_user(runtime, words, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "train: well" in done.stdout


def test_the_role_tune_does_in_a_long_folder(runtime: Runtime, image: Path, folder: Path) -> None:
    words = inside(folder, image, "python", "-m", "deepdisc_ops.hpc.containers.canary", "tune", tmp=True)
    done = as_user(runtime, words, folder)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_user_is_the_same_inside_and_cannot_write_the_root(runtime: Runtime, image: Path, folder: Path) -> None:
    done = as_user(runtime, inside(folder, image, "sh", "-c", "id -u; touch here; touch /opt/there"), folder)
    assert done.returncode == 1
    assert done.stdout.strip() == str(os.getuid() or NOBODY)
    assert "Read-only file system" in done.stderr
    assert (folder / "here").exists()


def test_a_poisoned_home_does_not_leak_in(runtime: Runtime, image: Path, folder: Path) -> None:
    poisoned = folder / ".local" / "lib" / "python3.11" / "site-packages"
    poisoned.mkdir(parents=True)
    (poisoned / "numpy.py").write_text("raise SystemExit('poisoned')\n")
    words = ["exec", "--userns", "--home", str(folder), str(image), "python", "-c", "import numpy; print(numpy.__file__)"]
    done = as_user(runtime, words, folder, HOME=str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("/opt/deepdisc-ops/")
