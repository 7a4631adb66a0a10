from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import config, first_part

from deepdisc_ops.config import TrainingConfig, TrainSettings
from deepdisc_ops.data.loader import CropDataset
from deepdisc_ops.data.store import Records, open_dataset
from deepdisc_ops.errors import CatalogError, CheckpointError, ConfigError, TrainingError
from deepdisc_ops.model.weights import load_member, read_info, recover
from deepdisc_ops.training import loop
from deepdisc_ops.training.averaging import AveragedWeights
from deepdisc_ops.training.checkpoint import TrainingState, load_state, read_history, save_state, write_atomically
from deepdisc_ops.training.meter import TIMINGS
from deepdisc_ops.training.schedule import learning_rate_factor
from deepdisc_ops.training.step import FaultyLoss, Optimisation, Part


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
        for name in set(metrics) - set(TIMINGS):
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
    for name in set(shared[4]) - set(TIMINGS):
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


def test_a_loss_that_is_no_number_names_its_image_and_keeps_the_last_checkpoint(
    mini_dataset: Path, spaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, shown = Optimisation.step, []

    def broken_later(learner: Optimisation, parts: Sequence[Part]) -> float:
        shown.append(parts[0].items)
        if len(shown) == 4:
            parts[0].pixels[1] = torch.nan
        return good(learner, parts)

    monkeypatch.setattr(Optimisation, "step", broken_later)
    with pytest.raises(TrainingError, match=r"loss is not finite at step 3: .* at (\S+); lower train.lr") as error:
        loop.train(config(mini_dataset), spaced)
    records = open_dataset(mini_dataset).records("train")
    whole = loop.complete(config(mini_dataset), open_dataset(mini_dataset), records)
    crops = CropDataset(records, open_dataset(mini_dataset).info, whole.data, whole.model, whole.seed)
    assert f"at {records.keys[crops[shown[3][1]].image]}; lower" in str(error.value)
    assert [entry["step"] for entry in read_history(spaced / "last")] == [2]
    assert load_member(spaced / "best")[1].step == 2


def test_a_gradient_that_is_no_number_changes_no_weight(mini_dataset: Path, spaced: Path) -> None:
    learner, part = first_part(config(mini_dataset))
    learner.network.redshift_head.mixture[0].weight.register_hook(lambda gradient: gradient * torch.nan)
    before = {name: value.clone() for name, value in learner.network.named_parameters()}
    with pytest.raises(FaultyLoss, match="gradient is not finite"):
        learner.step([part])
    assert all(torch.equal(before[name], value) for name, value in learner.network.named_parameters())


def test_a_full_disk_leaves_the_last_checkpoint_as_it_was(
    mini_dataset: Path, spaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(tree: dict[str, Any], path: Path) -> None:
        save(tree, path)
        if tree["step"] > 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        loop.train(config(mini_dataset), spaced)
    assert [entry["step"] for entry in read_history(spaced / "last")] == [2]
    assert [path.name for path in (spaced / "last").iterdir()] == ["state.pt"]
    monkeypatch.undo()
    loop.train(config(mini_dataset), spaced)
    assert [entry["step"] for entry in read_history(spaced / "last")] == [2, 4]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_file_system_that_is_full_leaves_the_last_checkpoint_as_it_was(spaced: Path) -> None:
    disk = spaced / "small disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        settings = TrainingConfig()
        save_state(disk / "last", TrainingState(step=1), settings, network=torch.nn.Linear(100, 100))
        with pytest.raises(CheckpointError, match=r"could not be written .*the file before it is untouched"):
            save_state(disk / "last", TrainingState(step=2), settings, network=torch.nn.Linear(1000, 1000))
        assert load_state(disk / "last", settings, network=torch.nn.Linear(100, 100)).step == 1
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_run_goes_on_from_a_member_heads_and_all(mini_dataset: Path, spaced: Path) -> None:
    """With steps that change next to nothing it is the member that is validated, its redshifts not begun anew."""
    first = loop.train(config(mini_dataset, steps=8, validate_every=8), spaced / "first")
    still = {"optimizer": "sgd", "lr": 1e-12, "weight_decay": 0, "steps": 1, "validate_every": 1}
    tuned, anew = (
        loop.train(config(mini_dataset, model=model, **still), spaced / name)
        for name, model in (("tuned", {"weights": str(first)}), ("anew", {}))
    )
    nll = {folder.parent.name: read_info(folder).metrics["val_nll"] for folder in (first, tuned, anew)}
    assert nll["tuned"] == pytest.approx(nll["first"], abs=0.05)
    assert abs(nll["anew"] - nll["first"]) > 0.2
    assert read_info(tuned).config.model.weights == first


@pytest.mark.parametrize("made_for_it", [True, False])
def test_a_processor_that_imitates_bf16_is_told(
    mini_dataset: Path, spaced: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, made_for_it: bool
) -> None:
    monkeypatch.setattr(loop, "computes_bf16", lambda _: made_for_it)
    loop.train(config(mini_dataset, precision="bf16", steps=1, validate_every=1), spaced / "run")
    assert ("set it to float32" in caplog.text) is not made_for_it


def test_epochs_count_the_images_of_the_data_set(mini_dataset: Path, spaced: Path) -> None:
    asked = config(mini_dataset, epochs=1.5, steps=100)
    assert loop.planned_steps(asked) == 3
    best = loop.train(asked, spaced)
    assert [entry["step"] for entry in read_history(spaced / "last")] == [2, 3]
    assert load_member(best)[1].config.train.steps == 3


def test_training_ends_when_patience_does(mini_dataset: Path, spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([0.5, 0.7, 0.7, 0.6, 0.9])
    monkeypatch.setattr(loop, "validate", lambda *_: {"val_completeness": next(measured), "val_nll": 1.0})
    asked = config(mini_dataset, steps=20, validate_every=1, monitor="val_completeness", patience=2)
    best = loop.train(asked, spaced)
    assert [entry["val_completeness"] for entry in read_history(spaced / "last")] == [0.5, 0.7, 0.7, 0.6]
    assert load_member(best)[1].step == 2
    loop.train(asked, spaced)  # over is over
    assert next(measured) == 0.9


def test_a_metric_that_is_not_measured_is_named(mini_dataset: Path, spaced: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.monitor 'val_loss_mask' is not measured; choose one of .*val_nll"):
        loop.train(config(mini_dataset, steps=1, monitor="val_loss_mask"), spaced)
    with pytest.raises(ConfigError, match=r"train\.monitor"):
        config(mini_dataset, monitor="accuracy")


def test_averaged_weights_follow_the_network_and_are_what_is_kept(mini_dataset: Path, spaced: Path) -> None:
    best = loop.train(config(mini_dataset, steps=2, ema_decay=0.9), spaced)
    tree = torch.load(spaced / "last" / "state.pt")
    kept, _ = load_member(best)
    name = "backbone.bottom_up.stem.conv1.weight"
    torch.testing.assert_close(kept.state_dict()[name], tree["averaged"]["network"][name])
    assert not torch.equal(kept.state_dict()[name], tree["network"][name])


def test_an_average_is_the_recursion_that_it_says() -> None:
    network = torch.nn.Linear(1, 1)
    averaged, expected = AveragedWeights(network, 0.25), float(network.weight.detach())
    for step in range(1, 5):
        with torch.no_grad():
            network.weight.fill_(step)
        averaged.update(network)
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert float(averaged.network.weight) == pytest.approx(expected, rel=1e-6)


def test_a_batch_in_parts_gives_the_mean_of_its_parts(mini_dataset: Path) -> None:
    """Proposal losses are per image, so that their gradient is that of the whole batch; those of boxes are means over a part."""
    gradients = []
    for size in (4, 2):
        learner, part = first_part(config(mini_dataset, batch_size=4, clip_norm=1e9, norm="GN"))
        starts = range(0, 4, size)
        learner.step([Part(*(field[i : i + size] for field in part)) for i in starts])
        gradients.append({name: parameter.grad for name, parameter in learner.network.proposals.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)
    assert max(float(gradient.abs().max()) for gradient in gradients[0].values()) > 1e-3


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
    factors = [learning_rate_factor(step, cosine) for step in range(100)]
    assert factors[0] < 0.1 < max(factors)
    assert factors[-1] < 0.02
    steps = TrainSettings(steps=100, warmup_steps=0, schedule="multistep", milestones=(0.3, 0.5, 0.7))
    assert [round(learning_rate_factor(s, steps), 6) for s in (29, 30, 50, 70)] == [1, 0.1, 0.01, 0.001]


def test_a_failed_write_keeps_the_old_file(spaced: Path) -> None:
    target = spaced / "state.pt"
    target.write_text("old")

    def full(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device"):
        write_atomically(target, full)
    assert [path.read_text() for path in spaced.iterdir()] == ["old"]
