"""What a trial asks of its machine, under the names that MLflow's interface shows as system metrics.

The trial's journal carries the readings to the driver. Several trials share a node: the figures of the machine are of all that
runs there, ``system/process_memory_megabytes`` is of the trial and its ranks alone, and GPUs are those the trial may use,
numbered from 0 as torch does.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import psutil

log = logging.getLogger(__name__)

PREFIX = "system/"
MEGABYTE = 1e6


class SystemSampler:
    """Samples the machine in a thread for as long as a block lasts.

    ::

        with SystemSampler(folder) as system:
            report(step, {**metrics, **system.read()})
    """

    def __init__(self, folder: Path, interval_s: float = 5.0) -> None:
        """``folder`` says which file system is watched; a sample takes some milliseconds."""
        import psutil

        self._folder, self._interval_s = folder, interval_s
        self._process = psutil.Process()
        self._gpus = _visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
        self._network = _network()
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._lock, self._ending = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)

    def __enter__(self) -> Self:
        import psutil

        psutil.cpu_percent()  # the first call of a process has nothing to compare with and says 0
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ending.set()
        self._thread.join()

    def read(self) -> dict[str, float]:
        """Means since the last call, of one sample at least; network traffic is the sum since the beginning."""
        with self._lock:
            self._sample()
            means = {f"{PREFIX}{name}": round(total / self._counts[name], 1) for name, total in self._sums.items()}
            self._sums.clear()
            self._counts.clear()
        traffic = {f"{PREFIX}{name}": round(now - self._network[name], 1) for name, now in _network().items()}
        return means | traffic

    def _run(self) -> None:
        while not self._ending.wait(self._interval_s):
            with self._lock:
                self._sample()

    def _sample(self) -> None:
        import psutil

        memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(self._folder))
        cpu = psutil.cpu_percent()
        figures = {
            "cpu_utilization_percentage": cpu,
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / MEGABYTE,
            "disk_available_megabytes": disk.free / MEGABYTE,
            "process_memory_megabytes": _tree_bytes(self._process) / MEGABYTE,
        }
        for index, gpu in enumerate(self._gpus):
            figures |= {f"gpu_{index}_{name}": value for name, value in _gpu_figures(gpu).items()}
        for name, value in figures.items():
            self._sums[name] += value
            self._counts[name] += 1


def _tree_bytes(process: psutil.Process) -> int:
    """Resident memory of a process and all below it; pages they share count for each."""
    import psutil

    total = 0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += one.memory_info().rss
    return total


def _network() -> dict[str, float]:
    """Megabytes in and out of the machine since it started; none where the system keeps no counters."""
    import psutil

    counters = psutil.net_io_counters()
    if counters is None:
        return {}
    return {
        "network_receive_megabytes": counters.bytes_recv / MEGABYTE,
        "network_transmit_megabytes": counters.bytes_sent / MEGABYTE,
    }


def _visible_gpus(visible: str | None) -> Sequence[Any]:
    """NVML's handles of the GPUs that CUDA_VISIBLE_DEVICES names by index or UUID; none without pynvml or a driver."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except ImportError:
        return ()
    except nvml.NVMLError as error:
        log.debug("no GPU is watched: %s", error)
        return ()
    names = [str(i) for i in range(nvml.nvmlDeviceGetCount())] if visible is None else [w for w in visible.split(",") if w.strip()]
    handles = []
    for name in map(str.strip, names):
        with contextlib.suppress(nvml.NVMLError):  # one that is gone, or -1, which ends CUDA's list
            by_index = name.lstrip("-").isdigit()
            handles.append(nvml.nvmlDeviceGetHandleByIndex(int(name)) if by_index else nvml.nvmlDeviceGetHandleByUUID(name))
    return handles


def _gpu_figures(gpu: Any) -> dict[str, float]:
    """Use of a GPU; what the device does not tell is left out (power, on some; utilisation, in a slice of one)."""
    nvml = importlib.import_module("pynvml")
    figures = {}
    with contextlib.suppress(nvml.NVMLError):
        memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
        figures["memory_usage_percentage"] = memory.used / memory.total * 100
        figures["memory_usage_megabytes"] = memory.used / MEGABYTE
    with contextlib.suppress(nvml.NVMLError):
        figures["utilization_percentage"] = float(nvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
    with contextlib.suppress(nvml.NVMLError):
        watts = nvml.nvmlDeviceGetPowerUsage(gpu) / 1000
        figures["power_usage_watts"] = watts
        figures["power_usage_percentage"] = watts * 1000 / nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) * 100
    return {name: value for name, value in figures.items() if math.isfinite(value)}
