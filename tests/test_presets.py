"""The presets hold what the papers say."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepdisc_ops.config import PRESETS, InputSettings, PretrainSettings, TrainingConfig, load, presets, validate
from deepdisc_ops.errors import ConfigError
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.model.published import export_state, unlike_published
from deepdisc_ops.sweeps.space import SweepSpec
from deepdisc_ops.training.schedule import learning_rate_factor

HEAD = {"components": 5, "hidden": (1024, 64), "activation": "tanh", "pool": 7, "ebv": True, "loss_weight": 1.0}
PAPERS: dict[str, dict[str, Any]] = {
    "lsst": {
        "model.bands": tuple("ugrizy"),
        "model.classes": ("galaxy", "star"),
        "model.backbone.name": "mvitv2_b",
        "model.first_convolution": "reinitialise",
        "model.box_head.stages": 3,
        "model.mask_head": True,
        "model.redshift_head.gold_band": "i",
        "model.redshift_head.gold_limit": 25.3,
        "model.redshift_head.stars": "z_pure",
        "train.epochs": 50,
        "train.lr": 1e-3,
    },
    "jades": {
        "model.bands": ("f090w", "f115w", "f150w", "f200w", "f277w", "f335m", "f356w", "f410m", "f444w"),
        "model.classes": ("object",),
        "model.input.scaling": "zscore",
        "model.backbone.name": "resnet50",
        "model.box_head.stages": 3,
        "model.mask_head": True,
        "model.redshift_head.gold_limit": None,
        "train.epochs": 150,
        "train.lr": 1e-3,
        "train.optimizer": "sgd",
        "train.monitor": "val_nll",
    },
}


def at(config: Any, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


@pytest.mark.parametrize("name", PAPERS)
def test_a_preset_says_what_its_paper_says(name: str) -> None:
    config = load(Path(name))
    told = PAPERS[name] | {f"model.redshift_head.{key}": value for key, value in HEAD.items()}
    assert {key: at(config, key) for key in told} == told


@pytest.mark.parametrize(("name", "falls"), [("lsst", (15, 25, 35)), ("jades", (45, 75, 105))])
def test_the_learning_rate_falls_to_a_tenth_at_the_papers_epochs(name: str, falls: tuple[int, ...]) -> None:
    train = load(Path(name)).train
    assert train.epochs is not None
    an_epoch = 100
    train = train.model_copy(update={"steps": int(train.epochs * an_epoch), "warmup_steps": 0})
    for count, epoch in enumerate(falls):
        assert learning_rate_factor(epoch * an_epoch - 1, train) == pytest.approx(0.1**count)
        assert learning_rate_factor(epoch * an_epoch, train) == pytest.approx(0.1 ** (count + 1))


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_preset_is_the_published_network(name: str) -> None:
    config = load(Path(name))
    ones = (1.0,) * len(config.model.bands)
    model = config.model.model_copy(update={"input": InputSettings(scaling="zscore", mean_njy=ones, std_njy=ones)})
    state = export_state(DeepDisc(model, config.inference))
    assert unlike_published(model, state) == []


def test_the_pretraining_preset_has_the_jades_backbone() -> None:
    pretraining = load(Path("galaxiesml"), schema=PretrainSettings)
    assert (pretraining.epochs, pretraining.optimizer) == (50, "sgd")
    mine, detector = pretraining.model.backbone, load(Path("jades")).model.backbone
    assert mine.model_copy(update={"norm": detector.norm}) == detector


@pytest.mark.parametrize("name", ["lsst", "jades", "galaxiesml"])
def test_what_is_not_the_papers_is_marked(name: str) -> None:
    text = (PRESETS / f"{name}.yaml").read_text()
    assert text.count("(ours)") > 8
    assert "are not in the paper" in text


def test_every_preset_is_one_of_a_known_kind() -> None:
    for name in presets():
        load(Path(name), schema=PretrainSettings if name == "galaxiesml" else TrainingConfig)


def test_a_file_takes_from_a_preset_what_it_leaves_open(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: jades\nmodel: {backbone: {norm: GN}}\ntrain: {epochs: 3}\n")
    config, preset = load(path), load(Path("jades"))
    assert (config.model.backbone.norm, config.train.epochs) == ("GN", 3)
    assert config.model.backbone.name == preset.model.backbone.name
    assert config.model.box_head == preset.model.box_head


def test_a_sweep_takes_a_preset_as_its_base() -> None:
    spec = validate(SweepSpec, yaml.safe_load("{name: s, base: {preset: small, train: {steps: 7}}}"), "test")
    assert spec.base["train"]["steps"] == 7
    assert spec.base["train"]["batch_size"] == load(Path("small")).train.batch_size


def test_a_file_of_a_presets_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lsst").write_text("train: {epochs: 2}\n")
    assert load(Path("lsst")).train.epochs == 2


def test_an_unknown_preset_is_told_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: jade\n")
    with pytest.raises(ConfigError, match="no preset 'jade', did you mean 'jades'"):
        load(path)
    with pytest.raises(ConfigError, match="or a preset: galaxiesml, jades, lsst, small"):
        load(tmp_path / "lost.yaml")
