from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepdisc_ops.config import ModelSettings, TrainingConfig, load, parse_override, validate
from deepdisc_ops.errors import ConfigError


def test_defaults_survive_a_round_trip() -> None:
    config = TrainingConfig()
    assert validate(TrainingConfig, config.model_dump(mode="json"), "dump") == config


def test_overrides_reach_nested_settings(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("train: {steps: 10}\n")
    config = load(path, ["train.lr=1e-4", "model.backbone.name=resnet50", "model.bands=[g, r]"])
    assert (config.train.steps, config.train.lr, config.model.backbone.name, config.model.bands) == (
        10,
        1e-4,
        "resnet50",
        ("g", "r"),
    )


def test_all_faults_are_told_at_once_with_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("train: {stepz: 10, lr: -1}\nmodel: {backbone: {name: resnet49}}\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    text = str(caught.value)
    assert "unknown key 'train.stepz', did you mean 'train.steps'?" in text
    assert "train.lr: " in text
    assert "found -1" in text
    assert "model.backbone.name" in text
    assert "\n" not in text


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"noise_njy has 2 values for 6 bands"):
        validate(ModelSettings, {"input": {"noise_njy": [1.0, 2.0]}}, "test")
    with pytest.raises(ConfigError, match="anchor_sizes has 3 values for 2 pyramid levels"):
        validate(ModelSettings, {"backbone": {"levels": 2}}, "test")
    for tree, message in (
        ({"bands": ["g", "g"]}, "name a band twice"),
        ({"bands": []}, "bands"),
        ({"classes": ["galaxy", "quasar"]}, "one class, or galaxy and star"),
        ({"box_head": {"hidden": []}}, r"box_head\.hidden"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(ModelSettings, tree, "test")
    with pytest.raises(ConfigError, match="tile 64 does not advance with overlap 64"):
        load(None, ["inference.tile=64"])


@pytest.mark.parametrize("text", ["train.lr", "=3", "a..b=1", "model.bands=[u,g"])
def test_overrides_need_a_key_and_a_value(text: str) -> None:
    with pytest.raises(ConfigError, match="example: --set"):
        parse_override(text)


@given(st.text(max_size=40))
def test_no_override_does_more_than_fail_as_a_config_error(text: str) -> None:
    try:
        keys, _ = parse_override(text)
    except ConfigError:
        return
    assert ".".join(keys) == text.partition("=")[0]


def test_files_that_are_no_mapping_are_refused(tmp_path: Path) -> None:
    for content, message in (("- 1\n", "holds a list"), ("a: [", "not valid YAML")):
        (tmp_path / "c.yaml").write_text(content)
        with pytest.raises(ConfigError, match=message):
            load(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "absent.yaml")
