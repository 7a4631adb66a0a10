"""Reading a data set for training: ``python -m benchmarks.loader [--quick]``.

Simulated LSST scenes of 6 x 512 x 512 pixels are kept once by reference (FITS) and once packed (HDF5, memory-mapped), and read
as training crops of the default settings. Every figure is the median of several rounds, rounds of what is compared in turn, from
a warm page cache unless it says otherwise:

- crops a second with 0, 1 and 2 workers, and what the workers own of the memory;
- crops a second from packed pixels, from files, and from files whose decoded images are cached;
- opening data sets of 10^3 and 10^5 records (--quick: 10^4): alone, and with the list of the training images and a first record;
- crops a second while another process appends to the data set, over those without;
- random windows from layouts that a packed data set could have: HDF5 mapped and through h5py, Zarr. Needs zarr.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks import record
from deepdisc_ops.config import DataSettings, ModelSettings, SkySettings
from deepdisc_ops.data.loader import CropDataset, open_batches
from deepdisc_ops.data.pixels import read_pixels
from deepdisc_ops.data.records import COLUMNS, DatasetInfo, Objects, Record, Reference
from deepdisc_ops.data.simulate import simulate_dataset
from deepdisc_ops.data.store import Dataset, create_dataset, open_dataset
from deepdisc_ops.data.writer import DatasetWriter

BATCH = 8
SIZE = 512
MODEL = ModelSettings()
Rates = dict[str, float]
Window = tuple[int, slice, slice]


@dataclass(frozen=True)
class Effort:
    """How much is done: scenes, seconds a round, rounds, records of the larger data set that is opened, images of a layout."""

    scenes: int
    seconds: float
    rounds: int
    records: int
    images: int


FULL = Effort(scenes=48, seconds=6.0, rounds=5, records=100_000, images=64)
QUICK = Effort(scenes=8, seconds=0.7, rounds=3, records=10_000, images=8)


def in_turn(measure: Mapping[str, Callable[[], float]], rounds: int) -> Rates:
    """Median of each measurement; a round makes all of them, so that a disturbance does not hit one alone."""
    found: dict[str, list[float]] = {name: [] for name in measure}
    for _ in range(rounds):
        for name, one in measure.items():
            found[name].append(one())
    return {name: statistics.median(values) for name, values in found.items()}


def crops(dataset: Dataset, cache_gb: float = 0.0) -> CropDataset:
    """Training crops of the default settings."""
    return CropDataset(dataset.records("train"), dataset.info, DataSettings(cache_gb=cache_gb), MODEL, seed=0)


def crops_per_second(dataset: CropDataset, workers: int, seconds: float) -> float:
    """Crops in batches of `BATCH` for ``seconds``, after the workers have started and two epochs have passed."""
    batches = open_batches(dataset, first_step=0, steps=10**9, batch_size=BATCH, workers=workers)
    for _ in range(2 * len(dataset) // BATCH + 4 * workers):
        next(batches)
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        steps += 1
    return BATCH * steps / (time.perf_counter() - start)


def worker_memory(dataset: CropDataset, workers: int) -> dict[str, float]:
    """MB that the workers own (Private_Dirty) and use (Pss: shared pages divided among those who map them) after four epochs."""
    batches = open_batches(dataset, first_step=0, steps=10**9, batch_size=BATCH, workers=workers)
    for _ in range(4 * len(dataset) // BATCH + 4 * workers):
        next(batches)
    rows = [
        line.split()
        for process in multiprocessing.active_children()
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    ]
    return {
        name: sum(int(row[1]) for row in rows if row[0] == f"{key}:") / 1000
        for name, key in (("own", "Private_Dirty"), ("pss", "Pss"))
    }


def pack(dataset: Dataset, folder: Path) -> Dataset:
    """The data set with its pixels inside."""
    with DatasetWriter(create_dataset(folder, dataset.info), packed=True) as writer:
        for one in dataset.records():
            writer.add(one)
    return open_dataset(folder)


def many_records(folder: Path, image: Path, info: DatasetInfo, count: int) -> Path:
    """A data set of ``count`` records by reference to one image, with two objects each."""
    columns = {name: np.zeros(2, dtype) for name, dtype in COLUMNS.items()}
    columns |= {"ids": np.arange(2), "boxes": np.array([[0, 0, 9, 9], [20, 30, 35, 44]], np.float32)}
    reference, objects = Reference((image,)), Objects(**columns)
    with DatasetWriter(create_dataset(folder, info)) as writer:
        for number in range(count):
            writer.add(Record(f"{number:07}", reference, info.bands, SIZE, SIZE, objects, split="train"))
    return folder


def seconds_to_open(folder: Path, *, first: bool) -> float:
    """Seconds to open a data set, with ``first`` also to list its training images and read one of them."""
    start = time.perf_counter()
    dataset = open_dataset(folder)
    if first:
        records = dataset.records("train")
        _ = records[len(records) // 2].key
    return time.perf_counter() - start


def append(folder: Path, source: Path, started: Event, stop: Event) -> None:
    """Copy scenes into a data set under new names until told to stop; runs in a process of its own."""
    scenes = [(one, read_pixels(one)) for one in open_dataset(source).records()[:4]]
    number = 0
    with DatasetWriter(folder, packed=True) as writer:
        while not stop.is_set():
            one, image = scenes[number % len(scenes)]
            writer.add(replace(one, key=f"appended {os.getpid()} {number}"), image)
            number += 1
            started.set()
            time.sleep(0.02)


def reading_while_appending(dataset: Dataset, seconds: float, rounds: int) -> Rates:
    """Crops a second from a packed data set alone and while another process adds some 50 scenes a second to it."""
    reader = crops(dataset)
    context = multiprocessing.get_context("spawn")

    def disturbed() -> float:
        started, stop = context.Event(), context.Event()
        writer = context.Process(target=append, args=(dataset.path, dataset.path, started, stop))
        writer.start()
        started.wait()
        try:
            return crops_per_second(reader, 0, seconds)
        finally:
            stop.set()
            writer.join()

    return in_turn({"alone": partial(crops_per_second, reader, 0, seconds), "while appending": disturbed}, rounds)


def layouts(folder: Path, images: NDArray[np.float32]) -> dict[str, Callable[[Window], NDArray[np.float32]]]:
    """The images (N, C, H, W) written in several layouts, each as a function that reads a window of an image."""
    import zarr

    with h5py.File(folder / "contiguous.h5", "w", libver="latest") as file:
        place = file.create_dataset("pixels", data=images).id.get_offset()
    with h5py.File(folder / "chunked.h5", "w", libver="latest") as file:
        file.create_dataset("pixels", data=images, chunks=(1, images.shape[1], 128, 128))
    whole, part = (1, *images.shape[1:]), (1, images.shape[1], 128, 128)
    arrays: dict[str, Any] = {
        "HDF5 contiguous, mapped": np.memmap(folder / "contiguous.h5", "<f4", "r", place, images.shape),
        "HDF5 contiguous, h5py": h5py.File(folder / "contiguous.h5")["pixels"],
        "HDF5 chunks of 128, h5py": h5py.File(folder / "chunked.h5")["pixels"],
    }
    for name, options in {
        "Zarr chunk an image": {"chunks": whole},
        "Zarr chunks of 128": {"chunks": part},
        "Zarr chunks of 128, sharded": {"chunks": part, "shards": whole},
    }.items():
        array = zarr.create_array(folder / name, shape=images.shape, dtype="f4", compressors=None, **options)
        array[:] = images
        arrays[name] = array

    def reader(array: Any) -> Callable[[Window], NDArray[np.float32]]:
        return lambda window: np.array(array[window[0], :, window[1], window[2]])

    return {name: reader(array) for name, array in arrays.items()}


def forget(folder: Path) -> None:
    """Ask the kernel to drop the files of a folder from its cache; what is mapped stays."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def windows_per_second(read: Callable[[Window], NDArray[np.float32]], images: int, side: int, seconds: float) -> float:
    """Random windows of ``side`` pixels a second."""
    rng = np.random.default_rng(0)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        y, x = (int(rng.integers(SIZE - side + 1)) for _ in range(2))
        read((int(rng.integers(images)), slice(y, y + side), slice(x, x + side)))
        count += 1
    return count / (time.perf_counter() - start)


def compare_layouts(folder: Path, effort: Effort) -> dict[str, Rates]:
    """Windows of 128 and 512 pixels a second from every layout."""
    folder.mkdir()
    images = np.random.default_rng(0).standard_normal((effort.images, len(MODEL.bands), SIZE, SIZE), np.float32)
    readers = layouts(folder, images)
    seconds = effort.seconds / 6
    found: dict[str, Rates] = {name: {} for name in readers}
    for side in (128, SIZE):
        timed = {name: partial(windows_per_second, read, len(images), side, seconds) for name, read in readers.items()}
        rates = in_turn(timed, effort.rounds)
        for name, rate in rates.items():
            found[name][f"{side} px"] = rate
    return found


def measure(work: Path, effort: Effort) -> dict[str, dict[str, Any]]:
    """All figures, by subject."""
    by_reference = simulate_dataset(SkySettings(), work / "files", counts={"train": effort.scenes}, size=SIZE, seed=1)
    packed = pack(by_reference, work / "packed")
    stores = {"packed": crops(packed), "files": crops(by_reference), "files, images cached": crops(by_reference, cache_gb=6.0)}
    speed: dict[str, Any] = {}
    for name, dataset in stores.items():
        timed = {f"{workers} workers": partial(crops_per_second, dataset, workers, effort.seconds) for workers in (0, 1, 2)}
        speed[name] = in_turn(timed, effort.rounds)
    bytes_mb = effort.scenes * len(MODEL.bands) * SIZE**2 * 4 / 1e6
    memory = {f"{workers} workers": worker_memory(stores["packed"], workers) for workers in (1, 2)}
    images = sorted((work / "files").rglob("*.fits"))
    opened: dict[str, Any] = {}
    for count in (1000, effort.records):
        folder = many_records(work / f"records {count}", images[0], by_reference.info, count)
        timed = {
            "open": partial(seconds_to_open, folder, first=False),
            "open, list, read one": partial(seconds_to_open, folder, first=True),
        }
        opened[str(count)] = in_turn(timed, 4 * effort.rounds)
    return {
        "crops_per_s": speed,
        "memory_mb": {"data set": bytes_mb, **memory},
        "seconds_to_open": opened,
        "appending_crops_per_s": reading_while_appending(packed, effort.seconds, effort.rounds),
        "layout_windows_per_s": compare_layouts(work / "layouts", effort),
    }


def ratios(figures: Mapping[str, Any]) -> dict[str, float]:
    """What does not depend on the machine's speed."""
    speed, opened, layout = figures["crops_per_s"], figures["seconds_to_open"], figures["layout_windows_per_s"]
    small, large = sorted(opened, key=int)
    power = f"1e{len(large) - 1}_over_1e{len(small) - 1}"
    mapped = layout["HDF5 contiguous, mapped"]["128 px"]
    rest = {name: rates["128 px"] for name, rates in layout.items() if name != "HDF5 contiguous, mapped"}
    found = {
        "two_workers_over_none": speed["packed"]["2 workers"] / speed["packed"]["0 workers"],
        "two_workers_over_none_files": speed["files"]["2 workers"] / speed["files"]["0 workers"],
        "packed_over_reference": speed["packed"]["0 workers"] / speed["files"]["0 workers"],
        "cached_over_reference": speed["files, images cached"]["0 workers"] / speed["files"]["0 workers"],
        f"open_{power}": opened[large]["open"] / opened[small]["open"],
        f"open_list_read_{power}": opened[large]["open, list, read one"] / opened[small]["open, list, read one"],
        "reading_while_appending_over_alone": figures["appending_crops_per_s"]["while appending"]
        / figures["appending_crops_per_s"]["alone"],
        "owned_by_second_worker_over_data_set": (
            figures["memory_mb"]["2 workers"]["own"] - figures["memory_mb"]["1 workers"]["own"]
        )
        / figures["memory_mb"]["data set"],
        "mapped_over_best_h5py": mapped / max(rate for name, rate in rest.items() if "h5py" in name),
        "mapped_over_best_zarr": mapped / max(rate for name, rate in rest.items() if "Zarr" in name),
    }
    return {name: round(value, 3) for name, value in found.items()}


def tables(figures: Mapping[str, Any], found: Mapping[str, float]) -> list[Table]:
    """Every subject as a table, and the ratios."""
    shown = []
    for subject, rows in {**figures, "ratio": found}.items():
        table = Table(title=subject.replace("_", " "))
        nested = {name: row if isinstance(row, Mapping) else {"": row} for name, row in rows.items()}
        columns = list(dict.fromkeys(column for row in nested.values() for column in row))
        for column in ("", *columns):
            table.add_column(column, justify="right" if column in columns else "left")
        for name, row in nested.items():
            table.add_row(name, *(f"{row[column]:.4g}" if column in row else "" for column in columns))
        shown.append(table)
    return shown


def main() -> None:
    """Measure, print, and keep the figures unless the run is quick."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small data sets and short rounds; nothing is kept")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory(prefix="loader-benchmark-") as work:
        figures = measure(Path(work), QUICK if quick else FULL)
    found = ratios(figures)
    console = Console(record=True, width=110)
    for table in tables(figures, found):
        console.print(table)
    if not quick:
        record.write("loader", ratios=found, figures=figures, log=console.export_text().splitlines())


if __name__ == "__main__":
    main()
