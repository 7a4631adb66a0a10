from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp
from typer.testing import CliRunner

from deepdisc_ops.cli.members import members_app
from deepdisc_ops.config import EnsembleSettings
from deepdisc_ops.data.loader import label
from deepdisc_ops.data.pixels import read_pixels
from deepdisc_ops.data.store import open_dataset
from deepdisc_ops.errors import CatalogError, ConfigError, InputError, TrainingError
from deepdisc_ops.inference.combine import combine_aligned, member_weights
from deepdisc_ops.inference.engine import Member
from deepdisc_ops.photoz.mixture import GaussianMixture
from deepdisc_ops.sky.detections import Detections
from deepdisc_ops.sweeps import densities, select
from deepdisc_ops.sweeps.greedy import ADDITIONS_PER_MEMBER, Greedy, forward_selection, select_greedily
from deepdisc_ops.tracking import CHECKPOINT_FOLDER, KIND_TAG, SWEEP_NAME_TAG, SWEEP_TAG, TRIAL_TAG, Tracker

seeds = st.integers(0, 10_000)


def random_densities(seed: int, candidates: int = 6, objects: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Log densities of candidates that err independently, and weights."""
    rng = np.random.default_rng(seed)
    return -0.5 * rng.normal(scale=2, size=(candidates, objects)) ** 2, rng.uniform(0.2, 3, candidates)


def nll(density: np.ndarray, weights: np.ndarray, bag: Sequence[int]) -> float:
    bag = list(bag)
    return float(-logsumexp(density[bag], axis=0, b=(weights[bag] / weights[bag].sum())[:, None]).mean())


@given(seeds, st.booleans())
def test_every_addition_is_the_one_that_helps_most(seed: int, replacement: bool) -> None:
    density, weights = random_densities(seed)
    added = forward_selection(density, 3, weights, replacement=replacement)
    for count, value in enumerate(added.nll):
        before = added.order[:count]
        allowed = [c for c in range(6) if (c in before and replacement) or (c not in before and len(set(before)) < 3)]
        best = min(nll(density, weights, [*before, c]) for c in allowed)
        assert value == pytest.approx(nll(density, weights, added.order[: count + 1]), abs=1e-12)
        assert value == pytest.approx(best, abs=1e-12)
    assert all(after < before for before, after in itertools.pairwise(added.nll))
    assert len(added.members) <= 3
    assert replacement or added.members == added.order


@given(seeds)
def test_neither_the_order_of_candidates_nor_the_scale_of_weights_matters(seed: int) -> None:
    density, weights = random_densities(seed)
    shuffled = np.random.default_rng(seed).permutation(6)
    straight, other = forward_selection(density, 4, weights), forward_selection(density[shuffled], 4, 7 * weights[shuffled])
    assert tuple(shuffled[list(other.order)]) == straight.order
    np.testing.assert_allclose(other.nll, straight.nll, rtol=1e-12)


def test_it_stops_where_nothing_helps() -> None:
    rng = np.random.default_rng(1)
    good, noise = rng.normal(size=50), np.full(50, -30.0)
    assert forward_selection([good, good, noise], 3).order == (0,)
    assert forward_selection([good, good, noise], 3, replacement=True).order == (0,)
    halves = np.where(np.arange(50) < 25, [[0.0], [-9.0]], [[-9.0], [0.0]])
    assert sorted(forward_selection(halves, 2).order) == [0, 1]


def test_with_replacement_the_better_half_gets_its_share() -> None:
    """Two members right on 4/5 and 1/5 of the objects: the best weights are those shares."""
    right = np.arange(100) < 80
    density = np.array([np.where(right, 0.0, -20.0), np.where(right, -20.0, 0.0)])
    added = forward_selection(density, 2, replacement=True)
    assert added.order.count(0) / len(added.order) == pytest.approx(0.8, abs=0.02)
    assert len(added.order) <= 2 * ADDITIONS_PER_MEMBER
    assert added.nll[-1] < forward_selection(density, 2).nll[-1]


def test_who_may_not_join_does_not() -> None:
    density, weights = random_densities(3)
    same = [0, 0, 0, 1, 1, 2]  # as if of three backbones, one member of each allowed
    added = forward_selection(
        density, 6, weights, replacement=True, admits=lambda chosen, new: same[new] not in {same[c] for c in chosen}
    )
    assert len({same[c] for c in added.members}) == len(added.members)
    assert (
        forward_selection(density, 6, weights, admits=lambda chosen, new: not chosen).order
        == forward_selection(density, 1, weights).order
    )


def test_the_nll_is_that_of_the_ensemble(rng: np.random.Generator) -> None:
    n, zero = 30, np.zeros(30, np.float32)
    z_true = torch.from_numpy(rng.uniform(0.2, 1.5, n))
    members = [
        Detections(
            boxes=np.tile(np.float32([0, 0, 9, 9]), (n, 1)),
            scores=zero + 1,
            classes=zero.astype(np.int32),
            weights=rng.dirichlet(np.ones(3), n).astype(np.float32),
            means=rng.uniform(0, 2, (n, 3)).astype(np.float32),
            sigmas=rng.uniform(0.1, 0.5, (n, 3)).astype(np.float32),
            ebv=zero,
            n_members=zero.astype(np.int32) + 1,
            flags=zero.astype(np.int32),
        )
        for _ in range(5)
    ]
    density = np.stack([log_prob(one, z_true) for one in members])
    weights = member_weights([0.3, -0.2, 0.1, 0.0, 0.6])
    added = forward_selection(density, 3, weights)
    together = combine_aligned([members[i] for i in added.order], [weights[i] for i in added.order], EnsembleSettings())
    assert len(added.order) >= 2
    assert added.nll[-1] == pytest.approx(-log_prob(together, z_true).mean(), abs=1e-6)


def log_prob(found: Detections, z: torch.Tensor) -> np.ndarray:
    return GaussianMixture.from_arrays(found.weights, found.means, found.sigmas).log_prob(z).numpy()


@pytest.mark.parametrize(
    ("density", "k", "weights", "error", "told"),
    [
        (np.zeros((0, 3)), 1, None, InputError, r"shape \(0, 3\)"),
        (np.zeros((2, 0)), 1, None, InputError, r"shape \(2, 0\)"),
        (np.array([[0.0, 1.0], [math.nan, 0.0]]), 1, None, InputError, r"candidates \[1\] are not all numbers"),
        (np.zeros((2, 3)), 1, [1.0, 0.0], ConfigError, "give each one that is positive"),
        (np.zeros((2, 3)), 1, [1.0], ConfigError, "weights .* for 2 candidates"),
        (np.zeros((2, 3)), 0, None, ConfigError, "0 members asked for"),
    ],
)
def test_what_cannot_be_selected_from_is_refused(
    density: np.ndarray, k: int, weights: list[float] | None, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        forward_selection(density, k, weights)


def test_an_impossible_object_does_not_stop_the_selection() -> None:
    density = np.array([[-math.inf, 0.0, 0.0], [0.0, -math.inf, -1.0], [-1.0, -1.0, -math.inf]])
    added = forward_selection(density, 3)
    assert added.order == (0, 1)
    assert added.nll[0] == math.inf
    assert math.isfinite(added.nll[1])


@pytest.fixture(scope="module")
def members(tiny_checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory, mini_dataset: Path) -> list[Path]:
    """Checkpoints of three members: two of the tiny ones, and the first again with its redshift head's last layer disturbed."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("three members")
    checkpoints = [Path(shutil.copytree(path, folder / str(i))) for i, path in enumerate([*tiny_checkpoints, tiny_checkpoints[0]])]
    weights = load_file(checkpoints[2] / "member.safetensors")
    bias = next(name for name in reversed(list(weights)) if "redshift" in name and name.endswith("bias"))
    weights[bias] += 0.5
    save_file(weights, checkpoints[2] / "member.safetensors")
    for number, path in enumerate(checkpoints):
        description = yaml.safe_load((path / "member.yaml").read_text())
        description["config"]["data"] |= {"path": str(mini_dataset), "partition": number % 2}
        (path / "member.yaml").write_text(yaml.safe_dump(description))
    return checkpoints


@pytest.fixture(scope="module")
def store(store_uri: str, members: list[Path]) -> str:
    """A store with the sweep "folds" of the three members, and a better one that was trained on other data."""
    tracker = Tracker(store_uri)
    parent = tracker.find_or_create("folds", (SWEEP_TAG, "folds-1"), tags={KIND_TAG: "sweep", SWEEP_NAME_TAG: "folds"})
    for name, path, digest in [("0", members[0], "d"), ("1", members[1], "d"), ("2", members[2], "d"), ("other", members[0], "e")]:
        tags = {"backbone": "tiny", "dataset": "mini", "dataset_digest": digest}
        run = tracker.find_or_create(name, (TRIAL_TAG, f"folds_{name}"), parent=parent, tags=tags)
        tracker.log_params(run, {"data.partition": str(int(name) % 2 if name != "other" else 0)})
        tracker.log_artifact(run, path, CHECKPOINT_FOLDER)
        tracker.log_summary(run, 1, {"best_val_nll": 9.0 if name == "other" else float(name)})
        tracker.end(run)
    return store_uri


def as_members(checkpoints: Sequence[Path]) -> list[select.SelectedMember]:
    from deepdisc_ops.model.weights import read_info

    return [select.SelectedMember(f"run-{i}", path, {}, read_info(path).config) for i, path in enumerate(checkpoints)]


def test_densities_are_those_of_the_true_boxes(members: list[Path], mini_dataset: Path, spaced: Path) -> None:
    done: list[int] = []
    found = densities.log_densities(
        as_members(members[:1]), mini_dataset, "validation", cache=spaced, progress=lambda now, total, run: done.append(now)
    )
    data, member, expected = open_dataset(mini_dataset), Member.load(members[0]), []
    for record in data.records("validation"):
        truth = label(record.objects, data.info, member.config.model, member.config.data)
        gold = np.isfinite(truth.redshift)
        boxes = truth.boxes[gold].clip(0, 128)
        ebv = np.full(gold.sum(), np.median(truth.ebv), np.float32)
        mixture = member.redshift(read_pixels(record, member.config.model.bands, with_wcs=False).data, boxes, ebv).double()
        expected.append(mixture.log_prob(torch.from_numpy(truth.redshift[gold]).double()).numpy())
    np.testing.assert_allclose(found[0], np.concatenate(expected), rtol=1e-4, atol=1e-4)
    assert done == [1, 2]


def test_densities_are_computed_once(
    members: list[Path], mini_dataset: Path, spaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []
    compute = densities._computed

    def watched(member: select.SelectedMember, *rest: object) -> np.ndarray:
        computed.append(member.run_id)
        if len(computed) == 2 and member.run_id == "run-1":
            raise KeyboardInterrupt
        return compute(member, *rest)

    monkeypatch.setattr(densities, "_computed", watched)
    both = as_members(members[:2])
    with pytest.raises(KeyboardInterrupt):
        densities.log_densities(both, mini_dataset, "validation", cache=spaced)
    first = densities.log_densities(both, mini_dataset, "validation", cache=spaced)
    np.testing.assert_array_equal(densities.log_densities(both, mini_dataset, "validation", cache=spaced), first)
    assert computed == ["run-0", "run-1", "run-1"]
    exchanged = [dataclasses.replace(both[0], checkpoint=members[2]), both[1]]
    again = densities.log_densities(exchanged, mini_dataset, "validation", cache=spaced)
    assert computed == ["run-0", "run-1", "run-1", "run-0"]
    assert not np.allclose(again[0], first[0])


def test_members_that_judge_other_objects_are_refused(members: list[Path], mini_dataset: Path, spaced: Path) -> None:
    first, second = as_members(members[:2])
    tree = second.config.model_dump()
    tree["model"]["redshift_head"]["gold_limit"] = 23.0
    second = dataclasses.replace(second, config=type(second.config).model_validate(tree))
    with pytest.raises(TrainingError, match=r"run run-1 calls \d+ objects gold, run run-0 \d+, .*gold_limit"):
        densities.log_densities([first, second], mini_dataset, "validation", cache=spaced)
    with pytest.raises(CatalogError, match="no record in split 'calibration'"):
        densities.log_densities([first], mini_dataset, cache=spaced)


def test_members_are_chosen_for_what_they_are_worth_together(
    store: str, members: list[Path], mini_dataset: Path, spaced: Path, caplog: pytest.LogCaptureFixture
) -> None:
    how = Greedy(split="validation", weights="uniform")
    with caplog.at_level(logging.WARNING):
        choice = select_greedily(store, "folds", 3, how=how, into=spaced)
    assert "left out: 1 with another data set than that of the best, 0: mini (d)" in caplog.text
    density = densities.log_densities(as_members(members), mini_dataset, "validation", cache=spaced / "again")
    expected = forward_selection(density, 3)
    names = [int(Tracker(store).record(member.run_id).name) for member in choice.members]
    assert tuple(names) == expected.members
    np.testing.assert_allclose(choice.additions.nll, expected.nll, rtol=1e-6)
    np.testing.assert_allclose(choice.alone, [-density[i].mean() for i in expected.members], rtol=1e-6)
    np.testing.assert_allclose([member.weight for member in choice.members], 1 / len(names))
    assert (choice.objects, choice.candidates) == (density.shape[1], 3)
    select.write_selection(choice.members, spaced / "members.yaml")
    assert select.read_selection(spaced / "members.yaml") == list(choice.members)


def test_conditions_bind_the_greedy_choice_too(store: str, spaced: Path) -> None:
    how = Greedy(split="validation")
    choice = select_greedily(store, "folds", 2, select.Conditions(one_per_fold=True), how, into=spaced)
    folds = [member.config.data.partition for member in choice.members]
    assert len(set(folds)) == len(folds)
    nll = [member.metrics["val_nll"] for member in choice.members]
    np.testing.assert_allclose([member.weight for member in choice.members], member_weights(nll))
    with pytest.raises(
        TrainingError, match=r"3 of 4 trials .* 4 members asked for \(1 with another data set than that of the best"
    ):
        select_greedily(store, "folds", 4, how=how, into=spaced)
    with pytest.raises(ConfigError, match="1 candidates for 2 members"):
        select_greedily(store, "folds", 2, how=dataclasses.replace(how, candidates=1), into=spaced)


def test_the_command_selects_and_registers(store: str, spaced: Path) -> None:
    out = spaced / "members.yaml"
    words = ["select", "folds", "--tracking-uri", store, "-k", "2", "--out", str(out)]
    told = CliRunner().invoke(
        members_app,
        [*words, "--greedy", "--replacement", "--split", "validation", "--register", "ensemble"],
        catch_exceptions=False,
    )
    assert told.exit_code == 0
    assert "additions from 3 candidates, NLL of" in told.output
    chosen = select.read_selection(out)
    assert sum(member.weight or 0 for member in chosen) == pytest.approx(1)
    aliases = {alias: one.run_id for one in Tracker(store).registered("ensemble") for alias in one.aliases}
    assert aliases == {"champion": chosen[0].run_id} | {f"member-{i}": member.run_id for i, member in enumerate(chosen)}
    with pytest.raises(ConfigError, match="--split belong to greedy selection; add --greedy"):
        CliRunner().invoke(members_app, [*words, "--split", "validation"], catch_exceptions=False)
