"""A stand-in for Apptainer, and definitions to build with it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from deepdisc_ops.hpc.containers import instances
from deepdisc_ops.hpc.containers.render import PLACEHOLDERS, arguments, render
from deepdisc_ops.hpc.containers.runtime import Machine, Runtime, find_runtime
from deepdisc_ops.hpc.containers.targets import Provenance, load_target

ORIGIN = Provenance("1.2.3", "c" * 40, "d" * 64)
STAND_IN = Path(__file__).parent / "stand_ins" / "apptainer"


@dataclass
class StandIn:
    """Apptainer as far as we call it."""

    state: Path
    monkeypatch: pytest.MonkeyPatch

    @property
    def runtime(self) -> Runtime:
        """On a machine where an ordinary user may build, whatever this one allows."""
        user = Machine(root=False, resources=False, namespaces=True, ranges=True, user="me")
        return replace(find_runtime(STAND_IN), machine=user)

    @property
    def log(self) -> list[dict[str, Any]]:
        path = self.state / "log"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def go_wrong(self, fault: str) -> None:
        self.monkeypatch.setenv("STAND_IN_FAULT", fault)

    def image(self, path: Path, target: str = "cpu") -> Path:
        """An image of the environment."""
        path.write_text("#!/usr/bin/env run-singularity\n\0SIF_MAGIC\0" + environment(target))
        return path


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    pytest.importorskip("spython")
    state = tmp_path / "the state"
    state.mkdir()
    monkeypatch.setenv("STAND_IN_STATE", str(state))
    monkeypatch.delenv("STAND_IN_FAULT", raising=False)
    monkeypatch.setattr(instances, "_has_children", lambda _: True)
    monkeypatch.delenv("APPTAINER_BINDPATH", raising=False)
    assert shutil.which("python3")
    return StandIn(state, monkeypatch)


def environment(target: str = "cpu") -> str:
    return render("environment", arguments(load_target(target), ORIGIN, PLACEHOLDERS))
