"""Makes `learning_curves` importable by name, and one tracking store for all: a fresh one takes seconds to migrate."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deepdisc_ops.tracking import default_uri

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def store_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return default_uri(tmp_path_factory.mktemp("a store"))
