from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deepdisc_ops import resources
from deepdisc_ops.errors import SetupError

ROOT = Path(__file__).parents[1]


def _package(folder: Path, resource_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (resource_folder / "tune").mkdir(parents=True)
    (resource_folder / "tune" / "quick.yaml").write_text("trials: 2\n")
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(resources, "_PACKAGE", folder)


def test_checkout_holds_resources_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _package(tmp_path / "a tree" / "deepdisc_ops", tmp_path / "a tree", monkeypatch)
    assert resources.find("tune/quick.yaml").read_text() == "trials: 2\n"
    assert resources.find("tune").is_dir()


def test_wheel_holds_resources_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _package(tmp_path / "deepdisc_ops", tmp_path / "deepdisc_ops" / "_resources", monkeypatch)
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune" / "quick.yaml").write_text("of another package\n")
    assert resources.find("tune/quick.yaml").read_text() == "trials: 2\n"


def test_an_incomplete_installation_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _package(tmp_path / "deepdisc_ops", tmp_path, monkeypatch)
    with pytest.raises(SetupError, match=r"tune/absent.yaml is not in .*incomplete"):
        resources.find("tune/absent.yaml")


@pytest.mark.parametrize("name", ["", "/etc/passwd", "tune/../../secret"])
def test_names_stay_inside(name: str) -> None:
    with pytest.raises(ValueError, match="relative name"):
        resources.find(name)


def test_the_wheel_carries_what_the_checkout_holds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = [path for folder in ("handlers", "tune") for path in (ROOT / folder).rglob("*") if path.is_file()]
    shipped = {path.relative_to(ROOT).as_posix() for path in files if path.suffix != ".pyc"}
    assert shipped
    assert {f"deepdisc_ops/_resources/{name}" for name in shipped} <= names
    assert not {name for name in names if name.startswith(("tests/", "handlers/", "tune/", "scripts/"))}
