from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deepdisc_ops.errors import ConfigError
from deepdisc_ops.resources import find
from deepdisc_ops.sweeps import space


def parse(**changes: Any) -> space.SweepSpec:
    return space.parse_spec({"name": "s", **changes}, "spec.yaml")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"space": {"train.lrr": {"grid": [1.0]}}}, "unknown key 'train.lrr', did you mean 'train.lr'"),
        ({"space": {"train": {"grid": [{}]}}}, "unknown key 'train'"),
        ({"space": {"train.lr.x": {"grid": [1.0]}}}, "unknown key 'train.lr.x'"),
        ({"space": {"train.lr": {"uniform": [-1.0, 1.0]}}}, r"space.train.lr: .*greater than 0 \(found -1.0\)"),
        ({"space": {"train.lr": {"uniform": [2e-3, 1e-3]}}}, r"space.train.lr: .*expected \[low, high\] with low < high"),
        ({"space": {"train.lr": {"loguniform": [0.0, 1e-3]}}}, "space.train.lr.loguniform.0: .*greater than 0"),
        ({"space": {"train.lr": {"uniform": [1e-3, float("inf")]}}}, "is no range"),
        ({"space": {"data.fraction": {"grid": [0.5, 1.5]}}}, r"space.data.fraction: .*less than or equal to 1 \(found 1.5\)"),
        ({"space": {"model.backbone.name": {"choice": ["tiny", "vgg"]}}}, "space.model.backbone.name: .*'vgg'"),
        ({"space": {"train.batch_size": {"randint": [0, 4]}}}, r"space.train.batch_size: .*\(found 0\)"),
        ({"space": {"train.lr": {"grid": []}}}, "grid is empty"),
        ({"base": {"train": {"epochs": 3}}}, "train.epochs: the scheduler of a sweep counts steps; set train.steps"),
        ({"space": {"train.epochs": {"grid": [1.0, 2.0]}}}, "train.epochs: the scheduler of a sweep counts steps"),
        ({"space": {"train.lr": {"grid": [1e-3, 1e-3]}}}, "names a value twice"),
        ({"space": {"train.lr": {"loguniforn": [1, 2]}}}, "unknown kind of range 'loguniforn', did you mean 'loguniform'"),
        ({"space": {"train.lr": {"grid": [1e-3], "choice": [1e-3]}}}, "expected one range"),
        ({"space": {"train.lr": 1e-3}}, "expected one range"),
        ({"base": {"train": {"stepss": 5}}}, "base: unknown key 'train.stepss', did you mean 'train.steps'"),
        ({"metric": "val_loss_x"}, "metric: "),
        ({"mode": "max"}, "mode: max does not suit val_nll"),
        ({"scheduler": {"grace_steps": 5000}}, "scheduler.grace_steps 5000 exceeds the 2000 training steps"),
        ({"scheduler": {"reduction_factor": 1}}, "scheduler.reduction_factor"),
        ({"resources": {"cpus": 0}}, "resources.cpus"),
        ({"trials": 0}, "trials"),
        ({"name": "a b"}, "name"),
        ({"trails": 3}, "unknown key 'trails', did you mean 'trials'"),
        ({"space": {"model.backbone.levels": {"grid": [2, 3]}}}, "model.backbone.levels=2 do not go together: .*anchor_sizes"),
    ],
)
def test_a_faulty_specification_is_one_line_with_the_key(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found) as caught:
        parse(**changes)
    assert str(caught.value).startswith("spec.yaml: ")
    assert "\n" not in str(caught.value)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(
            trails=3,
            base={"train": {"lr": -1}},
            space={"data.fraction": {"grid": [2.0]}, "train.lrr": {"grid": [1]}, "train.steps": {"randit": [1, 2]}},
        )
    for text in ("'trails'", "train.lr: ", "space.data.fraction", "'train.lrr'", "'randit'"):
        assert text in str(caught.value)


def test_keys_that_only_agree_together_may_vary_together() -> None:
    anchors = {"grid": [[9.0, 16.0], [9.0, 18.0]]}
    assert parse(base={"model": {"backbone": {"levels": 2}}}, space={"model.anchor_sizes": anchors})


@given(st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_trials_are_draws_times_the_grid(draws: int, sizes: list[int]) -> None:
    keys = ["train.lr", "train.weight_decay", "data.crop", "train.batch_size"]
    grids = {key: {"grid": list(range(1, size + 1))} for key, size in zip(keys, sizes, strict=False)}
    expected = draws
    for size in sizes:
        expected *= size
    assert space.number_of_trials(parse(trials=draws, space={**grids, "train.momentum": {"uniform": [0.0, 0.9]}})) == expected


def test_drawn_values_land_in_the_config_and_leave_the_base_alone() -> None:
    base = {"train": {"steps": 7}}
    config = space.trial_config(base, {"train.lr": 0.5, "model.backbone.name": "tiny", "model.anchor_sizes": (3.0, 4.0, 5.0)})
    assert (config.train.steps, config.train.lr, config.model.backbone.name) == (7, 0.5, "tiny")
    assert config.model.anchor_sizes == (3.0, 4.0, 5.0)
    assert base == {"train": {"steps": 7}}


def test_ray_draws_stay_inside_the_ranges() -> None:
    axes = {
        "train.lr": {"loguniform": [1e-4, 1e-2]},
        "data.fraction": {"uniform": [0.5, 1.0]},
        "train.batch_size": {"randint": [2, 5]},
        "model.backbone.name": {"choice": ["tiny", "small"]},
        "train.steps": {"grid": [600, 800]},
    }
    spec = parse(space=axes)
    domains = space.to_ray(spec)
    assert domains.pop("train.steps") == {"grid_search": [600, 800]}
    for _ in range(50):
        config = space.trial_config(spec.base, {key: domain.sample() for key, domain in domains.items()})
        assert 1e-4 <= config.train.lr <= 1e-2
        assert 0.5 <= config.data.fraction <= 1
        assert config.train.batch_size in (2, 3, 4)
    assert space.longest_training(spec) == 800


def test_a_specification_survives_the_round_trip_and_takes_overrides(spaced: Path) -> None:
    spec = parse(base={"seed": 3}, space={"train.lr": {"loguniform": [1e-4, 1e-2]}}, concurrency=2)
    path = spaced / "spec.yaml"
    path.write_text(space.dump(spec))
    assert space.load_spec(path) == spec
    changed = space.load_spec(path, ["trials=3", "base.train.steps=900", "scheduler.name=fifo"])
    assert (changed.trials, changed.base["train"]["steps"], changed.scheduler.name) == (3, 900, "fifo")


@pytest.mark.parametrize("name", ["quick.yaml", "backbones.yaml"])
def test_shipped_specifications_are_valid(name: str) -> None:
    path = find(f"tune/{name}")
    assert space.number_of_trials(space.load_spec(path)) > 1
    assert yaml.safe_load(path.read_text())["name"] == path.stem
