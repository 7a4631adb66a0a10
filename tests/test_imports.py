"""The import contract of pyproject.toml holds, and would catch what it forbids."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _lint(tree: Path) -> subprocess.CompletedProcess[str]:
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(config_filename='pyproject.toml'))"
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "deepdisc_ops", tmp_path / "deepdisc_ops", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_contract_holds() -> None:
    result = _lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "forbidden", "contract"),
    [
        ("sky/tiling.py", "deepdisc_ops.model", "Imports run one way"),
        ("sky/tiling.py", "torch", "sky and photoz import no framework, torch in photoz.mixture alone"),
        ("training/__init__.py", "ray", "ray is imported by sweeps, inference.cluster and ray_session alone"),
        ("inference/mosaic.py", "ray", "ray is imported by sweeps, inference.cluster and ray_session alone"),
        ("errors.py", "deepdisc_ops.sky.tiling", "config and errors import no room"),
    ],
)
def test_a_planted_import_is_caught(tree: Path, module: str, forbidden: str, contract: str) -> None:
    path = tree / "deepdisc_ops" / module
    path.write_text(path.read_text() + f"\nimport {forbidden}\n")
    result = _lint(tree)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{contract} BROKEN" in result.stdout
