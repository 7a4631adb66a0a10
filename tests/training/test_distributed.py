"""Runs on two ranks, and runs that are killed or told to stop, against runs on one that nobody disturbed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from multiprocessing import connection
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import training_runs
import yaml
from training_runs import config, untimed

from deepdisc_ops.config import TrainingConfig, TrainSettings
from deepdisc_ops.data.records import GALAXY
from deepdisc_ops.data.store import open_dataset
from deepdisc_ops.errors import ConfigError, Requeue, TrainingError
from deepdisc_ops.training import distributed, loop
from deepdisc_ops.training.checkpoint import read_history
from deepdisc_ops.training.distributed import World, check_devices, first_host, spawn, world_from_environment

INTERRUPTED = {"steps": 8, "validate_every": 4, "save_every": 1, "ema_decay": 0.9}


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No rank may outlive the run."""
    yield
    children = (child.as_dict(["cmdline", "status"], ad_value=None) for child in psutil.Process().children(recursive=True))
    assert [child for child in children if child["status"] != psutil.STATUS_ZOMBIE and _is_rank(child["cmdline"])] == []


@pytest.fixture(scope="module")
def undisturbed(mini_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Path]:
    """Folders of complete runs on 1 and 2 ranks, made when they are first asked for."""

    class Runs(dict[int, Path]):
        def __missing__(self, ranks: int) -> Path:
            folder = self[ranks] = tmp_path_factory.mktemp("undisturbed")
            loop.train(config(mini_dataset, ranks=ranks, **INTERRUPTED), folder)
            return folder

    return Runs()


def assert_same_run(one: Path, other: Path) -> None:
    """Equal weights, averaged weights, optimiser and curves."""
    first, second = (torch.load(folder / "last" / "state.pt") for folder in (one, other))
    for part in ("network", "optimizer", "averaged"):
        torch.testing.assert_close(first[part], second[part], rtol=1e-6, atol=1e-6)
    curves = [untimed(read_history(folder / "last")) for folder in (one, other)]
    assert [entry["step"] for entry in curves[0]] == [4, 8]
    for entry, same in zip(*curves, strict=True):
        assert entry == pytest.approx(same, rel=1e-6)


def test_ranks_that_torchrun_started_train_as_ours_do(mini_dataset: Path, spaced: Path, undisturbed: Mapping[int, Path]) -> None:
    settings = config(mini_dataset, **INTERRUPTED)
    (spaced / "run.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*ranks, sys.executable, "-m", "deepdisc_ops", "train", str(spaced / "run.yaml"), "--out", str(spaced / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("best checkpoint in") == 1
    assert_same_run(spaced / "out", undisturbed[2])


def test_ranks_share_the_cpus_that_they_have_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = (socket.gethostname(), [0, 1, 2, 3])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    for others, threads in (([mine], 2), ([("elsewhere", [0, 1, 2, 3])], 4), ([(mine[0], [4, 5, 6, 7])], 4), ([mine] * 7, 1)):
        monkeypatch.setattr(World, "gather", lambda _self, value, others=others: [value, *others])
        assert loop.fair_threads(World()) == threads


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_at_a_random_step_and_resumed_equals_one_that_was_not(
    mini_dataset: Path, spaced: Path, undisturbed: Mapping[int, Path], ranks: int, rng: np.random.Generator
) -> None:
    settings = config(mini_dataset, ranks=ranks, **INTERRUPTED)
    process = start(settings, spaced)
    try:
        wait_for(spaced / "out" / "last" / "state.pt", process)
        time.sleep(rng.uniform(0, 0.5))
    finally:
        process.kill()
        process.communicate()
    wait_for_children()
    step = torch.load(spaced / "out" / "last" / "state.pt")["step"]
    assert step >= 1
    loop.train(settings, spaced / "out")
    assert_same_run(spaced / "out", undisturbed[ranks])


def test_a_command_told_to_stop_saves_and_asks_to_be_queued_again(
    mini_dataset: Path, spaced: Path, undisturbed: Mapping[int, Path]
) -> None:
    settings = config(mini_dataset, data={"workers": 1}, **INTERRUPTED)
    process = start(settings, spaced)
    wait_for(spaced / "out" / "last" / "state.pt", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    step = torch.load(spaced / "out" / "last" / "state.pt")["step"]
    if step < 8:  # a very fast machine may be through
        assert process.returncode == Requeue.exit_code, errors
        assert f"told to stop; saved after step {step}" in errors
    loop.train(settings, spaced / "out")
    assert_same_run(spaced / "out", undisturbed[1])


def test_ranks_told_to_stop_save_together_and_go_on(mini_dataset: Path, spaced: Path, undisturbed: Mapping[int, Path]) -> None:
    settings = config(mini_dataset, ranks=2, **INTERRUPTED)

    def stop_here(step: int, metrics: Mapping[str, float]) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(Requeue, match="told to stop; saved after step 4"):
        loop.train(settings, spaced, report=stop_here)
    loop.train(settings, spaced, report=stop_here)
    assert_same_run(spaced, undisturbed[2])


GENTLE = {"optimizer": "sgd", "lr": 1e-6, "weight_decay": 0, "clip_norm": 1e9, "steps": 1, "batch_size": 4}
"""One step, all images in it; its first momentum is the gradient."""


def on_one_and_two_ranks(settings: TrainingConfig, folder: Path) -> list[dict[int, torch.Tensor]]:
    """The gradients of every parameter; the curves are compared here."""
    gradients, curves = [], []
    for ranks in (1, 2):
        train = settings.train.model_copy(update={"ranks": ranks})
        loop.train(settings.model_copy(update={"train": train}), folder / str(ranks))
        state = torch.load(folder / str(ranks) / "last" / "state.pt")["optimizer"]["state"]
        gradients.append({number: entry["momentum_buffer"] for number, entry in state.items()})
        curves.append(untimed(read_history(folder / str(ranks) / "last")))
    assert curves[0][0] == pytest.approx(curves[1][0], rel=1e-5)
    return gradients


def test_two_ranks_with_half_batches_are_one_with_the_whole(mini_dataset: Path, spaced: Path) -> None:
    model = {"box_head": {"hidden": [32], "stages": 3}, "mask_head": True}
    gradients = on_one_and_two_ranks(config(mini_dataset, model=model, norm="GN", **GENTLE), spaced)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in gradients[0].values()) > 0.1


def test_a_rank_without_a_labelled_object_does_not_wait_for_one(mini_dataset: Path, spaced: Path) -> None:
    objects = open_dataset(mini_dataset).records("train")
    classes, mag = objects.column("classes")[0], objects.column("mag")[0]
    second = float(np.sort(mag[classes == GALAXY])[1])  # only the brightest galaxy of all images has a label
    model = {"redshift_head": {"hidden": [16], "gold_limit": second}}
    gradients = on_one_and_two_ranks(config(mini_dataset, data={"crop": 128}, model=model, norm="FrozenBN", **GENTLE), spaced)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)
    assert float(gradients[0][max(gradients[0])].abs().max()) > 1e-3  # of the redshift head, which comes last


def test_an_error_of_a_rank_and_its_death_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not what they bring about on the ranks that wait, which has been told as well when this slow process looks up."""

    def wait(pending: list[connection.Connection], timeout: float | None) -> list[object]:
        return connection.wait(pending, timeout) and (time.sleep(1) or connection.wait(pending, 0))

    monkeypatch.setattr(distributed, "wait", wait)
    for work, error, told in (
        (training_runs.fails, ConfigError, "the second rank found a fault"),
        (training_runs.is_puzzled, TrainingError, "rank 1 failed with KeyError: 'no such band'"),
        (training_runs.dies, TrainingError, r"a rank ended without a word \(exit code -9\)"),
    ):
        with pytest.raises(error, match=told):
            spawn(work, (), 2, None)


def test_ranks_are_read_from_torchrun_and_from_srun() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert world_from_environment(torchrun) == World(5, 8, 1, "env://")
    batch = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "gpu[03-04]"}
    assert world_from_environment(batch) is None
    step = batch | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
    world = world_from_environment(step)
    assert world == World(3, 4, 1, "tcp://gpu03:20084")
    assert world_from_environment({}) is None


@pytest.mark.parametrize(
    ("nodes", "host"), [("node[003-007,9],login1", "node003"), ("a", "a"), ("n-1.b,n-2.b", "n-1.b"), ("x[1,3]", "x1")]
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            {"device": "cuda", "ranks": 64, "batch_size": 64},
            r"with 64 ranks needs 64 GPUs on this machine, found \d+; lower train.ranks",
        ),
        ({"device": "cuda:99"}, r"needs 100 GPUs on this machine, found \d+"),
        ({"device": "gpu"}, "'gpu' is no device of torch; use cpu or cuda"),
        ({"precision": "fp16"}, "fp16 needs a GPU, train.device is cpu; use bf16 or float32"),
        (
            {"batch_size": 6, "ranks": 2, "accumulate": 2},
            "6 cannot be shared equally by 2 ranks in 2 parts; make it a multiple of 4",
        ),
    ],
)
def test_what_the_machine_does_not_have_is_named(settings: Mapping[str, object], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        check_devices(TrainSettings(**settings))


def test_a_task_with_a_gpu_of_its_own_takes_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    settings, second = TrainSettings(device="cuda", batch_size=2), World(1, 2, 1, "env://")
    with pytest.raises(ConfigError, match="needs 2 GPUs on this machine, found 1"):
        check_devices(settings, second)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    assert check_devices(settings, second) == torch.device("cuda", 0)


def start(settings: TrainingConfig, folder: Path) -> subprocess.Popen[str]:
    """``deepdisc-ops train`` on the command line, into ``folder``/out."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    command = [sys.executable, "-m", "deepdisc_ops", "train", str(path), "--out", str(folder / "out")]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen[str], timeout_s: float = 180) -> None:
    end = time.monotonic() + timeout_s
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


def wait_for_children(timeout_s: float = 10) -> None:
    """Ranks whose parent was killed are killed by the kernel; they are no children of ours, so they are found by their parent."""
    end = time.monotonic() + timeout_s
    while ranks := [process for process in psutil.process_iter(["cmdline", "ppid"]) if _is_orphaned_rank(process)]:
        assert time.monotonic() < end, ranks
        time.sleep(0.05)


def _is_orphaned_rank(process: psutil.Process) -> bool:
    return process.info["ppid"] == 1 and _is_rank(process.info["cmdline"])


def _is_rank(command: list[str] | None) -> bool:
    return any("spawn_main" in word for word in command or [])
