"""RAIL is an extra: without it these tests are skipped, and say so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that are given no path write where they are run."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """structlog, as RAIL sets it up, prints every data handle."""
    structlog = pytest.importorskip("structlog")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
