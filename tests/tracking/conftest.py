"""Fresh stores without the seconds that MLflow takes to migrate one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from deepdisc_ops.tracking import default_uri
from deepdisc_ops.tracking.store import connect

MakeStore = Callable[[str], str]


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("migrated")
    connect(default_uri(folder))
    return folder / "mlflow.db"


@pytest.fixture
def make_store(migrated: Path, spaced: Path) -> MakeStore:
    """URI of an empty store in a folder of that name."""

    def make(name: str) -> str:
        folder = spaced / name
        folder.mkdir()
        shutil.copy(migrated, folder / "mlflow.db")
        return default_uri(folder)

    return make
