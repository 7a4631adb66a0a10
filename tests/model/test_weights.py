from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from deepdisc_ops.errors import CheckpointError
from deepdisc_ops.model.weights import fill, first_convolution, load_member, read_info, save_member, shorten


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


def test_keys_that_do_not_fit_are_listed_by_their_modules(tiny_checkpoints: list[Path]) -> None:
    network, info = load_member(tiny_checkpoints[0])
    tensors = network.state_dict()
    for key in [key for key in tensors if key.startswith("redshift_head.mixture.2")]:
        del tensors[key]
    tensors = {key: value + 1 for key, value in tensors.items()}
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"missing redshift_head\.mixture\.2 \(2\); unknown x; use the config"):
        fill(network, tensors | {"x": torch.zeros(1)}, info.config.model.bands, "a file")
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())


def test_weights_of_other_bands_are_named(tiny_checkpoints: list[Path], spaced: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoints[0], spaced / "member"))
    tree = yaml.safe_load((folder / "member.yaml").read_text())
    tree["config"]["model"]["bands"] = ["g", "r", "i"]
    tree["config"]["model"]["input"]["noise_njy"] = [1.0, 1.0, 1.0]
    (folder / "member.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(CheckpointError, match=r"of a network of 6 bands, the config names 3 \(g, r, i\); give the bands"):
        load_member(folder)


def test_the_first_convolution_is_that_which_meets_the_bands(tiny_checkpoints: list[Path]) -> None:
    network, _ = load_member(tiny_checkpoints[0])
    assert first_convolution(network) == "backbone.bottom_up.stem.conv1.weight"
    assert first_convolution(network.backbone) == "bottom_up.stem.conv1.weight"


def test_long_lists_of_keys_are_cut() -> None:
    keys = [f"a.b{i}.c.weight" for i in range(6)] + ["a.b0.c.bias"]
    assert shorten(keys) == "a.b0.c (2), a.b1.c, a.b2.c, a.b3.c and 2 more"
    assert shorten([]) == ""


def test_other_folders_are_no_checkpoints(spaced: Path) -> None:
    with pytest.raises(CheckpointError, match=r"member\.yaml is missing"):
        load_member(spaced)
