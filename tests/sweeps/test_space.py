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


AXES = {
    "train.lr": {"loguniform": [1e-4, 1e-2]},
    "data.fraction": {"uniform": [0.5, 1.0]},
    "train.batch_size": {"randint": [2, 5]},
    "model.backbone.name": {"choice": ["tiny", "small"]},
    "train.steps": {"grid": [600, 800]},
}


def test_draws_stay_inside_the_ranges_and_cover_them() -> None:
    spec = parse(space=AXES, trials=100)
    points = space.points(spec)
    assert len(points) == space.number_of_trials(spec) == 200
    configs = [space.trial_config(spec.base, point) for point in points]
    assert {config.train.steps for config in configs} == {600, 800}
    assert {config.train.batch_size for config in configs} == {2, 3, 4}
    assert {config.model.backbone.name for config in configs} == {"tiny", "small"}
    assert all(1e-4 <= config.train.lr <= 1e-2 and 0.5 <= config.data.fraction <= 1 for config in configs)
    # as many in each decade of a logarithmic range: 100 +- 7 of 200
    assert 70 < sum(config.train.lr < 1e-3 for config in configs) < 130
    assert len({config.train.lr for config in configs}) == 200
    assert space.longest_training(spec) == 800


def test_draws_are_those_of_the_seed_whatever_comes_after_them() -> None:
    first = space.points(parse(space=AXES, trials=3, seed=5))
    assert first == space.points(parse(space=AXES, trials=3, seed=5))
    assert first != space.points(parse(space=AXES, trials=3, seed=6))
    assert space.points(parse(space=AXES, trials=9, seed=5))[:6] == first


def test_a_conditional_range_counts_where_its_condition_holds() -> None:
    spec = parse(
        space={
            "train.momentum": {"grid": [0.8, 0.9], "when": {"train.optimizer": "sgd"}},
            "train.optimizer": {"grid": ["adamw", "sgd"]},
            "train.weight_decay": {"uniform": [0.0, 0.1], "when": {"train.momentum": [0.9]}},
        }
    )
    points = space.points(spec)
    assert [sorted(point) for point in points] == [
        ["train.optimizer"],
        ["train.momentum", "train.optimizer"],
        ["train.momentum", "train.optimizer", "train.weight_decay"],
    ]
    assert space.number_of_trials(spec) == 3


def test_keys_may_vary_together() -> None:
    key = "model.backbone.name, model.backbone_weights"
    spec = parse(space={key: {"grid": [["resnet50", None], ["resnet50", "a.pkl"], ["resnet18", "b.pth"]]}})
    configs = [space.trial_config(spec.base, point).model for point in space.points(spec)]
    assert [(config.backbone.name, str(config.backbone_weights)) for config in configs] == [
        ("resnet50", "None"),
        ("resnet50", "a.pkl"),
        ("resnet18", "b.pth"),
    ]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"space": {"train.lr, train.lrr": {"grid": [[1, 2]]}}}, "unknown key 'train.lrr'"),
        ({"space": {"train.lr, train.steps": {"grid": [[1e-3]]}}}, r"found \[0.001\]; expected a grid or choice of lists of 2"),
        ({"space": {"train.lr, train.steps": {"uniform": [1, 2]}}}, "expected a grid or choice of lists of 2"),
        ({"space": {"train.lr, train.steps": {"grid": [[-1.0, 600]]}}}, "greater than 0"),
        ({"space": {"train.lr, train.epochs": {"grid": [[1e-3, 4]]}}}, "train.epochs: the scheduler of a sweep counts steps"),
        ({"space": {"train.lr": {"grid": [1e-3], "when": {"train.optimiser": "sgd"}}}}, "'train.optimiser' is no key of the space"),
        (
            {
                "space": {
                    "train.optimizer": {"grid": ["adamw"]},
                    "train.momentum": {"grid": [0.9], "when": {"train.optimizer": "sgd"}},
                }
            },
            r"train.optimizer is never 'sgd'; it is one of \['adamw'\]",
        ),
        (
            {
                "space": {
                    "train.lr": {"uniform": [1e-3, 2e-3]},
                    "train.momentum": {"grid": [0.9], "when": {"train.lr": 1e-3}},
                }
            },
            "train.lr is a uniform range; a condition needs the values",
        ),
        (
            {
                "space": {
                    "train.optimizer": {"grid": ["adamw", "sgd"], "when": {"train.momentum": 0.9}},
                    "train.momentum": {"grid": [0.9], "when": {"train.optimizer": "sgd"}},
                }
            },
            "wait for each other",
        ),
        ({"search": "optuna", "space": {"train.lr": {"grid": [1e-3]}}}, "train.lr is a grid; make it a choice, or search: random"),
        ({"search": "optuna", "space": {"model.bands": {"choice": [["g"], ["r"]]}}}, r"numbers and words, not \['g'\]"),
        ({"search": "optuna"}, "optuna has nothing to choose"),
        ({"scheduler": {"name": "pbt"}, "trials": 4}, "pbt has nothing to vary"),
        (
            {"scheduler": {"name": "pbt"}, "trials": 4, "space": {"data.fraction": {"uniform": [0.5, 1.0]}}},
            "cannot change while a network trains",
        ),
        ({"scheduler": {"name": "pbt"}, "space": {"train.lr": {"uniform": [1e-3, 1e-2]}}}, "needs a population"),
        ({"base": {"train": {"ranks": 3}}, "resources": {"cpus": 2}}, "resources.cpus 2 are less than train.ranks 3"),
        ({"base": {"train": {"device": "cuda"}}}, "resources.gpus is 0 and train.device cuda"),
        (
            {"base": {"train": {"device": "cuda", "ranks": 4}}, "resources": {"cpus": 8, "gpus": 2}},
            "resources.gpus 2 are less than train.ranks 4",
        ),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        parse(**changes)


def test_a_specification_survives_the_round_trip_and_takes_overrides(spaced: Path) -> None:
    spec = parse(base={"seed": 3}, space={"train.lr": {"loguniform": [1e-4, 1e-2]}}, concurrency=2)
    path = spaced / "spec.yaml"
    path.write_text(space.dump(spec))
    assert space.load_spec(path) == spec
    changed = space.load_spec(path, ["trials=3", "base.train.steps=900", "scheduler.name=fifo"])
    assert (changed.trials, changed.base["train"]["steps"], changed.scheduler.name) == (3, 900, "fifo")


@pytest.mark.parametrize(
    ("name", "trials"),
    [
        ("quick", 4),
        ("hyperparameters", 60),
        ("backbones", 6),
        ("dataset-size", 15),
        ("model-size", 3),
        ("depth", 2),
        ("bands", 3),
        ("folds", 10),
        ("scaling", 12),
        ("population", 8),
    ],
)
def test_shipped_specifications_are_valid(name: str, trials: int) -> None:
    path = find(f"tune/{name}.yaml")
    assert space.number_of_trials(space.load_spec(path)) == trials
    assert yaml.safe_load(path.read_text())["name"] == path.stem
    assert f"deepdisc-ops sweep run tune/{name}.yaml" in path.read_text()


def test_the_expected_cost_of_successive_halving() -> None:
    base = {"train": {"steps": 8000}}
    trials = {"space": {"train.lr": {"uniform": [1e-3, 1e-2]}}, "trials": 8}
    asha = parse(base=base, **trials, scheduler={"grace_steps": 1000, "reduction_factor": 2})
    # 8 to 1000 steps, 4 to 2000, 2 to 4000, 1 to 8000
    assert space.expected_share(asha, 8) == pytest.approx((8 + 4 + 2 * 2 + 4) / 64)
    assert space.expected_share(parse(base=base, **trials, scheduler={"name": "fifo"}), 8) == 1
