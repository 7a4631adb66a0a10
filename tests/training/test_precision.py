"""Training in 16 bits and on GPUs. What needs no GPU runs here; the same bodies on GPUs are marked ``gpu``."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from training_runs import config, first_part, untimed

from deepdisc_ops.model.weights import load_member
from deepdisc_ops.training import loop
from deepdisc_ops.training.checkpoint import read_history

GENTLE = {"optimizer": "sgd", "lr": 1e-6, "weight_decay": 0, "clip_norm": 1e9, "steps": 1, "batch_size": 4}


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest) -> None:
    """Skip what this machine has not enough GPUs for."""
    arguments = request.node.callspec.params
    needed = arguments.get("ranks", 1) if arguments["device"] == "cuda" else 0
    if needed > torch.cuda.device_count():
        pytest.skip(f"needs {needed} GPUs")


@pytest.mark.parametrize(
    ("device", "precision", "stages"),
    [
        ("cpu", "bf16", 1),
        ("cpu", "bf16", 3),
        pytest.param("cuda", "bf16", 3, marks=pytest.mark.gpu),
        pytest.param("cuda", "fp16", 3, marks=pytest.mark.gpu),
    ],
)
def test_sixteen_bits_give_the_loss_of_thirty_two(mini_dataset: Path, device: str, precision: str, stages: int) -> None:
    model = {"box_head": {"hidden": [32], "stages": stages}, "mask_head": True}
    losses, dtypes = [], set()
    for chosen in ("float32", precision):
        learner, part = first_part(config(mini_dataset, model=model, norm="GN", precision=chosen, device=device), device)
        learner.network.backbone.bottom_up.stem.register_forward_hook(lambda *call: dtypes.add(call[-1].dtype))
        losses.append(learner.step([part]))
        assert all(parameter.dtype == torch.float32 for parameter in learner.network.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert dtypes == {torch.float32, torch.bfloat16 if precision == "bf16" else torch.float16}


@pytest.mark.parametrize(
    ("device", "precision", "ranks"),
    [
        ("cpu", "bf16", 1),
        pytest.param("cuda", "float32", 1, marks=pytest.mark.gpu),
        pytest.param("cuda", "bf16", 1, marks=pytest.mark.gpu),
        pytest.param("cuda", "fp16", 1, marks=pytest.mark.gpu),
        pytest.param("cuda", "bf16", 2, marks=pytest.mark.gpu),
        pytest.param("cuda", "fp16", 2, marks=pytest.mark.gpu),
    ],
)
def test_a_run_resumes_where_it_was(mini_dataset: Path, spaced: Path, device: str, precision: str, ranks: int) -> None:
    asked = config(mini_dataset, device=device, precision=precision, ranks=ranks, ema_decay=0.9)

    class Stop(Exception):
        pass

    def stop(step: int, _metrics: object) -> None:
        if step == 2:
            raise Stop

    loop.train(asked, spaced / "whole")
    with pytest.raises(Stop):
        loop.train(asked, spaced / "parts", report=stop)
    loop.train(asked, spaced / "parts")
    whole, parts = (untimed(read_history(spaced / name / "last")) for name in ("whole", "parts"))
    tolerance = 1e-6 if device == "cpu" else 1e-2  # GPUs add in any order
    assert whole[-1]["train_loss"] == pytest.approx(parts[-1]["train_loss"], rel=tolerance)
    assert math.isfinite(whole[-1]["val_loss"])
    assert load_member(spaced / "parts" / "best")[1].step in (2, 4)


@pytest.mark.gpu
@pytest.mark.parametrize(("device", "ranks"), [("cuda", 2)])
def test_two_gpus_with_half_batches_are_one_with_the_whole(mini_dataset: Path, spaced: Path, device: str, ranks: int) -> None:
    """The CPU's equivalent is in test_distributed."""
    gradients = []
    for count in (1, ranks):
        loop.train(config(mini_dataset, norm="GN", device=device, ranks=count, **GENTLE), spaced / str(count))
        state = torch.load(spaced / str(count) / "last" / "state.pt")["optimizer"]["state"]
        gradients.append({number: entry["momentum_buffer"] for number, entry in state.items()})
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-4)
