"""A real Apptainer: the environment's definition built on a real base, from a wheelhouse of one small wheel, and run.

Needs apptainer or singularity on PATH and $DEEPDISC_OPS_BASE, an image built by `deepdisc-ops images build base.sif`;
scripts/test-containers brings both, and does with the real wheels what takes longer (tests/containers).
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepdisc_ops.errors import ConfigError, SetupError
from deepdisc_ops.hpc.containers import instances
from deepdisc_ops.hpc.containers.build import build, labels
from deepdisc_ops.hpc.containers.render import PLACEHOLDERS, arguments, render
from deepdisc_ops.hpc.containers.run import ROLES, Place, execute, try_roles
from deepdisc_ops.hpc.containers.runtime import PROGRAMS, Runtime, find_runtime
from deepdisc_ops.hpc.containers.targets import Provenance, load_target
from deepdisc_ops.hpc.containers.wheelhouse import check

from .small_wheels import make_wheelhouse

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not any(map(shutil.which, PROGRAMS)), reason="neither apptainer nor singularity is on PATH"),
    pytest.mark.skipif(
        "DEEPDISC_OPS_BASE" not in os.environ, reason="no base image in $DEEPDISC_OPS_BASE; scripts/test-containers has one"
    ),
]
ORIGIN = Provenance("9.9", "c" * 40, "d" * 64)


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wheelhouse(tmp_path_factory.mktemp("wheel") / "a house")


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return find_runtime()


def definition(wheels: Path) -> str:
    known = {**PLACEHOLDERS, "BASE": str(Path(os.environ["DEEPDISC_OPS_BASE"]).absolute()), "WHEELS_DIGEST": check(wheels).digest}
    return render("environment", arguments(load_target("cpu"), ORIGIN, known))


def bound(wheels: Path) -> list[str]:
    return [f"{wheels}:/mnt/wheels:ro"]


@pytest.fixture(scope="module")
def image(runtime: Runtime, wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("an image") / "small.sif"
    built = build(runtime, definition(wheels), out, binds=bound(wheels), tell=quiet)
    assert built.size == out.stat().st_size > 10e6
    return out


def told(runtime: Runtime, image: Path, place: Place, words: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the program inside tells of itself."""
    answer = execute(runtime, image, ["deepdisc-ops", *words], place)
    assert answer.code == 0, answer
    found: dict[str, Any] = json.loads(answer.out)
    return found


def test_labels_say_where_it_is_from(runtime: Runtime, image: Path, wheels: Path) -> None:
    found = labels(runtime, image)
    assert (found["org.deepdisc-ops.version"], found["org.deepdisc-ops.commit"]) == ("9.9", "c" * 40)
    assert (found["org.deepdisc-ops.wheels"], found["org.deepdisc-ops.target"]) == (check(wheels).digest, "cpu")


def test_the_tests_of_every_role_run(runtime: Runtime, image: Path, spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = list(try_roles(runtime, image, Place(spaced)))
    assert [(one.role, one.answer.code, one.answer.out) for one in tried] == [(role, 0, f"tried {role}\n") for role in ROLES]
    monkeypatch.setenv("APPTAINERENV_CANARY_FAILS", "serve")
    assert [one.answer.code for one in try_roles(runtime, image, Place(spaced))] == [0, 0, 1, 0]


def test_help_tells_roles_and_what_to_mind(runtime: Runtime, image: Path) -> None:
    text = runtime.call(["run-help"], [str(image)]).out
    assert "deepdisc-ops 9.9" in text
    assert "torch for CUDA only" in text
    assert "--app train" in runtime.call(["run-help"], ["--app", "train", str(image)]).out


def test_the_root_is_read_only_and_the_folder_is_not(runtime: Runtime, image: Path, spaced: Path) -> None:
    found = told(runtime, image, Place(spaced), ("a b", "it's"))
    assert (found["root"], found["here"], found["tmp"]) == ("Read-only file system", True, True)
    assert (found["words"], found["folder"], found["uid"]) == (["a b", "it's"], str(spaced), os.getuid())


def test_no_package_of_the_home_leaks_in(runtime: Runtime, image: Path, spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = execute(
        runtime, image, ["python", "-c", "import sys; print('python%d.%d' % sys.version_info[:2])"], Place(spaced)
    ).out.strip()
    poisoned = spaced / ".local" / "lib" / python / "site-packages"
    poisoned.mkdir(parents=True)
    (poisoned / "poison.py").write_text("")
    (spaced / "poison").mkdir()
    (spaced / "poison" / "poison.py").write_text("")
    monkeypatch.setenv("HOME", str(spaced))
    monkeypatch.setenv("PYTHONPATH", str(spaced / "poison"))
    monkeypatch.delenv("PYTHONNOUSERSITE", raising=False)
    found = told(runtime, image, Place(spaced))
    assert (found["poisoned"], found["user_site"]) == (None, False)
    assert site.getusersitepackages() not in found["path"]


@pytest.mark.parametrize("home", [None, "/no/home"])
def test_no_home_is_needed(runtime: Runtime, image: Path, spaced: Path, home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if home is None:
        monkeypatch.delenv("HOME", raising=False)
    else:
        monkeypatch.setenv("HOME", home)
    assert told(runtime, image, Place(spaced))["here"] is True


def test_a_long_folder_is_no_matter(runtime: Runtime, image: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    assert told(runtime, image, Place(folder))["folder"] == str(folder)


def test_tmp_is_as_large_as_the_folder_bound_there(runtime: Runtime, image: Path, spaced: Path) -> None:
    words = ["deepdisc-ops", "fill", "/tmp", str(100 * 1024**2)]
    assert execute(runtime, image, words, Place(spaced)).code == 0


@pytest.fixture
def service(runtime: Runtime) -> Iterator[str]:
    name = f"dd-test-{os.getpid()}"
    yield name
    instances.stop(runtime, name, timeout_s=10)


@pytest.mark.parametrize("app", ["serve", "mlflow"])
def test_services_are_instances(runtime: Runtime, image: Path, spaced: Path, service: str, app: str) -> None:
    started = instances.start(runtime, image, service, ["--word", "a b"], Place(spaced), app=app)
    assert started in instances.running(runtime)
    wait = time.monotonic() + 60
    while not (spaced / "service.json").exists() and time.monotonic() < wait:
        time.sleep(0.1)
    assert json.loads((spaced / "service.json").read_text())[-2:] == ["--word", "a b"]
    with pytest.raises(ConfigError, match="runs already"):
        instances.start(runtime, image, service, [], Place(spaced), app=app)
    assert instances.stop(runtime, service, timeout_s=10)
    assert service not in [one.name for one in instances.running(runtime)]


def test_a_service_that_cannot_run_says_why(runtime: Runtime, image: Path, spaced: Path, service: str) -> None:
    with pytest.raises(SetupError, match="this service cannot run"):
        instances.start(runtime, image, service, ["--fail"], Place(spaced), app="serve", settle_s=10)
    assert service not in [one.name for one in instances.running(runtime)]


def test_an_instance_without_app_is_a_machine_to_enter(runtime: Runtime, image: Path, spaced: Path, service: str) -> None:
    instances.start(runtime, image, service, [], Place(spaced))
    assert runtime.call(["exec"], [f"instance://{service}", "deepdisc-ops"]).code == 0


def test_a_shell_is_opened_inside(image: Path, spaced: Path) -> None:
    program = """
import sys
from pathlib import Path
from deepdisc_ops.hpc.containers import run, runtime
sys.exit(run.shell(runtime.find_runtime(), Path(sys.argv[1]), run.Place(Path(sys.argv[2]))))
"""
    command = [sys.executable, "-c", program, str(image), str(spaced)]
    done = subprocess.run(command, input="command -v deepdisc-ops; exit 5\n", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (5, "/opt/deepdisc-ops/bin/deepdisc-ops\n")


def faulty(runtime: Runtime, text: str, out: Path, wheels: Path, **settings: Any) -> str:
    """The error of a build that must fail; what was under its name before is still there, and nothing else."""
    out.write_text("an older image")
    with pytest.raises((SetupError, ConfigError)) as caught:
        build(runtime, text, out, binds=settings.pop("binds", bound(wheels)), tell=quiet, **settings)
    assert out.read_text() == "an older image"
    assert [path.name for path in out.parent.iterdir() if path.name != "wheels"] == [out.name]
    return str(caught.value)


def test_a_failing_test_makes_no_image(runtime: Runtime, wheels: Path, spaced: Path) -> None:
    text = definition(wheels).replace("%test\n    set -eu\n", "%test\n    set -eu\n    false\n")
    assert "%test" in faulty(runtime, text, spaced / "a.sif", wheels)


def test_wheels_that_were_changed_make_no_image(runtime: Runtime, wheels: Path, spaced: Path) -> None:
    other = spaced / "wheels"
    shutil.copytree(wheels, other)
    with (other / "deepdisc_ops-9.9-py3-none-any.whl").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(SetupError, match="is not the wheel that requirements.txt names: sha256 is"):
        check(other)
    assert "was not built" in faulty(runtime, definition(wheels), spaced / "a.sif", wheels, binds=bound(other))


def test_another_wheelhouse_than_the_labels_makes_no_image(runtime: Runtime, wheels: Path, spaced: Path) -> None:
    text = definition(wheels).replace(check(wheels).digest, "e" * 64)
    assert "was not built" in faulty(runtime, text, spaced / "a.sif", wheels)


def test_a_wheelhouse_that_is_not_bound_makes_no_image(runtime: Runtime, wheels: Path, spaced: Path) -> None:
    assert "was not built" in faulty(runtime, definition(wheels), spaced / "a.sif", wheels, binds=[])


def test_a_full_disk_makes_no_image(runtime: Runtime, wheels: Path, spaced: Path) -> None:
    small = spaced / "small disk"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(small)], capture_output=True, check=False).returncode:
        pytest.skip("no small disk may be mounted here")
    try:
        assert "the disk is full: free it" in faulty(runtime, definition(wheels), small / "a.sif", wheels)
    finally:
        subprocess.run(["umount", str(small)], check=True)
