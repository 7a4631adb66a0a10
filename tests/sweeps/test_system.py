from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest

from deepdisc_ops.sweeps import system
from deepdisc_ops.sweeps.system import SystemSampler

MEGABYTES = 100


@contextmanager
def child_that_holds(megabytes: int) -> Iterator[None]:
    program = f"held = bytearray({megabytes} * 10**6); held[::4096] = b'x' * len(held[::4096]); print('ready', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield
        child.communicate("\n")


class Nvml(ModuleType):
    """Two GPUs, of which the second tells nothing of its power."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, driver: bool = True) -> None:
        super().__init__("pynvml")
        self.driver = driver

    def nvmlInit(self) -> None:  # noqa: N802  NVML's own name
        if not self.driver:
            raise self.NVMLError("driver not loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802  NVML's own name
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802  NVML's own name
        if index not in (0, 1):
            raise self.NVMLError("invalid argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802  NVML's own name
        return {"GPU-a": 0, "GPU-b": 1}[uuid]

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> SimpleNamespace:  # noqa: N802  NVML's own name
        return SimpleNamespace(used=(1 + gpu) * 10**9, total=10 * 10**9)

    def nvmlDeviceGetUtilizationRates(self, gpu: int) -> SimpleNamespace:  # noqa: N802  NVML's own name
        return SimpleNamespace(gpu=50 + gpu)

    def nvmlDeviceGetPowerUsage(self, gpu: int) -> int:  # noqa: N802  NVML's own name
        if gpu == 1:
            raise self.NVMLError("not supported")
        return 150_000

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu: int) -> int:  # noqa: N802  NVML's own name
        return 300_000


def test_the_names_are_those_of_mlflows_interface(spaced: Path) -> None:
    folder = Path(importlib.util.find_spec("mlflow").origin).parent / "system_metrics" / "metrics"  # type: ignore[union-attr, arg-type]
    known = "".join((folder / f"{part}_monitor.py").read_text() for part in ("cpu", "disk", "network"))
    with SystemSampler(spaced) as sampler:
        names = {name.removeprefix("system/") for name in sampler.read()}
    assert {name for name in names if name not in known} == {"process_memory_megabytes"}
    assert len(names) == 9


def test_the_memory_of_children_counts(spaced: Path) -> None:
    with SystemSampler(spaced) as sampler:
        alone = sampler.read()["system/process_memory_megabytes"]
        assert alone == pytest.approx(psutil.Process().memory_info().rss / 1e6, rel=0.1)
        with child_that_holds(MEGABYTES):
            assert sampler.read()["system/process_memory_megabytes"] > alone + 0.9 * MEGABYTES
        assert sampler.read()["system/process_memory_megabytes"] < alone + 0.5 * MEGABYTES


def test_a_reading_is_the_mean_since_the_last(spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([1e6, 5e6, 9e6, 20e6])
    monkeypatch.setattr(system, "_tree_bytes", lambda _: next(values))
    sampler = SystemSampler(spaced)
    sampler._sample()
    sampler._sample()
    assert sampler.read()["system/process_memory_megabytes"] == 5
    assert sampler.read()["system/process_memory_megabytes"] == 20


def test_it_samples_by_itself_and_ends_with_the_block(spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = threading.Semaphore(0)
    monkeypatch.setattr(system, "_tree_bytes", lambda _: taken.release() or 0)
    with SystemSampler(spaced, interval_s=0.001) as sampler:
        assert all(taken.acquire(timeout=60) for _ in range(3))
    assert not sampler._thread.is_alive()


def test_a_sample_costs_less_than_a_hundredth_of_the_interval(spaced: Path) -> None:
    sampler = SystemSampler(spaced)
    sampler._sample()
    begun = time.process_time()
    for _ in range(10):
        sampler._sample()
    assert (time.process_time() - begun) / 10 < 0.01 * sampler._interval_s


@pytest.mark.parametrize(
    ("visible", "used"),
    [(None, [1000, 2000]), ("1", [2000]), ("1,0", [2000, 1000]), ("GPU-b", [2000]), ("", []), ("-1", []), ("7", [])],
)
def test_visible_gpus_are_numbered_from_zero(
    visible: str | None, used: list[int], spaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    reading = SystemSampler(spaced).read()
    assert [reading.get(f"system/gpu_{i}_memory_usage_megabytes") for i in range(len(used))] == used
    assert sum(name.endswith("memory_usage_megabytes") for name in reading) == len(used) + 1


def test_what_a_gpu_does_not_tell_is_left_out(spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    reading = SystemSampler(spaced).read()
    assert (reading["system/gpu_0_power_usage_watts"], reading["system/gpu_0_power_usage_percentage"]) == (150, 50)
    assert {name for name in reading if name.startswith("system/gpu_1")} == {
        "system/gpu_1_memory_usage_percentage",
        "system/gpu_1_memory_usage_megabytes",
        "system/gpu_1_utilization_percentage",
    }


@pytest.mark.parametrize("module", [None, Nvml(driver=False)])
def test_without_a_driver_there_are_no_gpus(module: ModuleType | None, spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert not any("gpu" in name for name in SystemSampler(spaced).read())
