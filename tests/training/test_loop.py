from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.structures import Instances
from torch import Tensor

from deepdisc_ops.config import TrainingConfig, TrainSettings, validate
from deepdisc_ops.data.store import Records
from deepdisc_ops.errors import CatalogError, CheckpointError, ConfigError, TrainingError
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.model.weights import load_member, recover
from deepdisc_ops.training import loop
from deepdisc_ops.training.checkpoint import read_history, write_atomically


def config(
    dataset: Path, *, data: Mapping[str, object] | None = None, inputs: Mapping[str, object] | None = None, **train: object
) -> TrainingConfig:
    tree = {
        "data": {"path": str(dataset), "crop": 64, **(data or {})},
        "model": {
            "input": inputs or {},
            "backbone": {"name": "tiny", "fpn_channels": 16},
            "box_head": {"hidden": [32]},
            "redshift_head": {"hidden": [16]},
        },
        "train": {"steps": 4, "batch_size": 2, "validate_every": 2, "warmup_steps": 1, "threads": 1, **train},
    }
    return validate(TrainingConfig, tree, "test")


class Stop(Exception):
    """What a scheduler raises in a trial."""


def test_an_interrupted_run_continued_equals_one_that_was_not(mini_dataset: Path, spaced: Path) -> None:
    whole: dict[int, Mapping[str, float]] = {}
    loop.train(config(mini_dataset), spaced / "whole", report=lambda step, metrics: whole.update({step: metrics}))

    parts: dict[int, Mapping[str, float]] = {}

    def stop_at_first(step: int, metrics: Mapping[str, float]) -> None:
        parts[step] = metrics
        if step == 2:
            raise Stop

    with pytest.raises(Stop):
        loop.train(config(mini_dataset), spaced / "parts", report=stop_at_first)
    loop.train(config(mini_dataset), spaced / "parts", report=stop_at_first)

    assert list(whole) == list(parts) == [2, 4]
    for step, metrics in whole.items():
        for name in set(metrics) - {"images_per_s"}:
            assert metrics[name] == pytest.approx(parts[step][name], rel=1e-6), (step, name)
    one, _ = load_member(spaced / "whole" / "best")
    other, _ = load_member(spaced / "parts" / "best")
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-6, atol=1e-6)
    assert (spaced / "whole" / "loss.png").stat().st_size > 1000


def test_workers_and_augmentations_change_neither_the_run_nor_its_resumption(mini_dataset: Path, spaced: Path) -> None:
    augment = {"blur_px": [0, 1], "noise_factor": [1, 2], "band_dropout": 0.2}
    inputs = {"scaling": "zscore", "noise_njy": [8, 4, 4, 7, 13, 38]}

    def run(workers: int, name: str, steps_until: int | None = None) -> dict[int, Mapping[str, float]]:
        told: dict[int, Mapping[str, float]] = {}

        def report(step: int, metrics: Mapping[str, float]) -> None:
            told[step] = metrics
            if step == steps_until:
                raise Stop

        data = {"workers": workers, "augment": augment, "balance": 0.5}
        loop.train(config(mini_dataset, data=data, inputs=inputs), spaced / name, report=report)
        return told

    alone = run(0, "alone")
    with pytest.raises(Stop):
        run(2, "shared", steps_until=2)
    shared = run(1, "shared")
    assert list(alone) == [2, 4]
    assert list(shared) == [4]
    for name in set(shared[4]) - {"images_per_s"}:
        assert alone[4][name] == pytest.approx(shared[4][name], rel=1e-6), name


def test_a_z_score_is_measured_and_kept(mini_dataset: Path, spaced: Path) -> None:
    best = loop.train(config(mini_dataset, inputs={"scaling": "zscore"}, steps=1), spaced)
    network, info = load_member(best)
    found = info.config.model.input
    assert found.mean_njy is not None
    assert found.std_njy is not None
    assert found.noise_njy is not None
    assert all(std > noise for std, noise in zip(found.std_njy, found.noise_njy, strict=True))
    torch.testing.assert_close(network.offset.flatten(), torch.tensor(found.mean_njy))


def test_a_share_of_the_training_images_is_used(mini_dataset: Path, spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    class Seen(loop.CropDataset):
        def __init__(self, records: Records, *others: Any) -> None:
            used.append(records.keys.tolist())
            super().__init__(records, *others)

    monkeypatch.setattr(loop, "CropDataset", Seen)
    for fraction in (0.5, 1.0):
        loop.train(config(mini_dataset, data={"fraction": fraction}, steps=1), spaced / str(fraction))
    assert [len(keys) for keys in used] == [2, 4]
    assert set(used[0]) < set(used[1])


def test_a_partition_that_was_not_made_is_named(mini_dataset: Path, spaced: Path) -> None:
    with pytest.raises(CatalogError, match="has no partitions; make them with"):
        loop.train(config(mini_dataset, data={"partition": 3}), spaced)


def test_the_checkpoint_knows_bands_noise_and_scale(mini_dataset: Path, spaced: Path) -> None:
    best = loop.train(config(mini_dataset, steps=1, validate_every=1), spaced)
    _, info = load_member(best)
    assert info.config.model.pixel_scale == 0.2
    assert info.config.model.input.noise_njy is not None
    assert {"val_nll", "val_sigma_iqr", "val_completeness", "val_loss", "val_loss_redshift", "train_loss"} <= set(info.metrics)
    assert info.step == 1


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(
    mini_dataset: Path, spaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = loop.finite_losses

    def broken_later(network: DeepDisc, pixels: Tensor, targets: Sequence[Instances], step: int) -> dict[str, Tensor]:
        return good(network, pixels * (torch.nan if step == 3 else 1), targets, step)

    monkeypatch.setattr(loop, "finite_losses", broken_later)
    with pytest.raises(TrainingError, match=r"loss is not finite at step 3: .*; lower train.lr"):
        loop.train(config(mini_dataset), spaced)
    assert [entry["step"] for entry in read_history(spaced / "last")] == [2]
    assert load_member(spaced / "best")[1].step == 2


def test_bands_and_scale_are_checked_against_the_data(mini_dataset: Path, spaced: Path) -> None:
    base = config(mini_dataset)
    other = base.model_copy(update={"model": base.model.model_copy(update={"bands": ("g", "r", "k")})})
    with pytest.raises(ConfigError, match=r"model\.bands has k"):
        loop.train(other, spaced)
    other = base.model_copy(update={"model": base.model.model_copy(update={"pixel_scale": 0.03})})
    with pytest.raises(ConfigError, match=r"pixel_scale is 0\.03"):
        loop.train(other, spaced)


def test_a_run_of_another_network_is_not_resumed(mini_dataset: Path, spaced: Path) -> None:
    loop.train(config(mini_dataset, steps=1), spaced)
    base = config(mini_dataset, steps=2)
    wider = base.model.model_copy(update={"backbone": base.model.backbone.model_copy(update={"fpn_channels": 24})})
    with pytest.raises(CheckpointError, match=r"other model\.backbone\.fpn_channels, train\.steps; train into a new folder"):
        loop.train(base.model_copy(update={"model": wider}), spaced)


def test_a_damaged_state_is_named(mini_dataset: Path, spaced: Path) -> None:
    (spaced / "last").mkdir()
    (spaced / "last" / "state.pt").write_bytes(b"no checkpoint at all")
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read"):
        loop.train(config(mini_dataset), spaced)


def test_a_kill_between_the_two_renames_loses_nothing(spaced: Path) -> None:
    for name, content in ((".best-a1-old", "kept"), (".best-b2", "half")):
        (spaced / name).mkdir()
        (spaced / name / "file").write_text(content)
    recover(spaced / "best")
    assert [path.name for path in spaced.iterdir()] == ["best"]
    assert (spaced / "best" / "file").read_text() == "kept"


def test_learning_rate_warms_up_and_falls() -> None:
    cosine = TrainSettings(steps=100, warmup_steps=10)
    factors = [loop.learning_rate_factor(step, cosine) for step in range(100)]
    assert factors[0] < 0.1 < max(factors)
    assert factors[-1] < 0.02
    steps = TrainSettings(steps=100, warmup_steps=0, schedule="multistep", milestones=(0.3, 0.5, 0.7))
    assert [round(loop.learning_rate_factor(s, steps), 6) for s in (29, 30, 50, 70)] == [1, 0.1, 0.01, 0.001]


def test_a_failed_write_keeps_the_old_file(spaced: Path) -> None:
    target = spaced / "state.pt"
    target.write_text("old")

    def full(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device"):
        write_atomically(target, full)
    assert [path.read_text() for path in spaced.iterdir()] == ["old"]
