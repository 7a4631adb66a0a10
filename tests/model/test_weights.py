from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from deepdisc_ops.errors import CheckpointError
from deepdisc_ops.model.weights import load_member, read_info, save_member


def test_a_member_survives_a_round_trip(tiny_checkpoints: list[Path], spaced: Path) -> None:
    network, info = load_member(tiny_checkpoints[0])
    save_member(spaced / "copy", network, info.config, info.metrics, info.step)
    again, info_again = load_member(spaced / "copy")
    assert info_again.config == info.config
    for (name, one), other in zip(network.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert [path.name for path in spaced.iterdir()] == ["copy"]


def test_saving_again_replaces_the_member(tiny_checkpoints: list[Path], spaced: Path) -> None:
    network, info = load_member(tiny_checkpoints[0])
    for step in (1, 2):
        save_member(spaced / "copy", network, info.config, {"val_nll": 0.0}, step)
    assert read_info(spaced / "copy").step == 2
    assert len(list(spaced.iterdir())) == 1


def test_damage_is_named(tiny_checkpoints: list[Path], spaced: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoints[0], spaced / "member"))
    weights = folder / "member.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"member\.safetensors cannot be read"):
        load_member(folder)


def test_weights_of_another_network_are_refused(tiny_checkpoints: list[Path], spaced: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoints[0], spaced / "member"))
    tree = yaml.safe_load((folder / "member.yaml").read_text())
    tree["config"]["model"]["backbone"]["fpn_channels"] = 24
    (folder / "member.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(CheckpointError, match="do not fit their config"):
        load_member(folder)


def test_other_folders_are_no_checkpoints(spaced: Path) -> None:
    with pytest.raises(CheckpointError, match=r"member\.yaml is missing"):
        load_member(spaced)
