"""A training step against detectron2's own loop: ``python -m benchmarks.training [--quick]``.

The network of the preset `small`, simulated LSST scenes of 6 x 512 x 512 pixels, batches of 6 crops of 128 px, flipped at random,
AdamW, gradients clipped; once in detectron2's `SimpleTrainer` with its `DatasetMapper` and its data loader, once in our loop.
The stock mapper is spared what it does badly: images are .npy files, memory-mapped, so that a crop reads its own pixels alone, and
it is a subclass only where it has to keep redshift and E(B-V) of an object. Both loops are timed at their best number of
workers. What our loop gains is told by a ladder that adds one cause at a time. All rungs are timed in turn, round by round, each
from its own warm process of data; a figure is the median over rounds.

`step_over_gemm_peak`: operations of a step (convolutions and matrix products, forward and backward) per second, over those of the
fastest matrix product of this process, by NumPy, torch or oneDNN; both in single precision.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper, build_detection_train_loader, detection_utils
from detectron2.data import transforms as turns
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import SimpleTrainer
from detectron2.structures import BoxMode, ImageList, Instances
from detectron2.utils.events import EventStorage
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import record
from deepdisc_ops.config import SkySettings, TrainingConfig, load
from deepdisc_ops.data.loader import CropDataset, label
from deepdisc_ops.data.pixels import read_pixels
from deepdisc_ops.data.simulate import simulate_dataset
from deepdisc_ops.data.store import Dataset
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.training.distributed import World
from deepdisc_ops.training.loop import complete, start_at_redshifts, steps_on_device
from deepdisc_ops.training.meter import Meter
from deepdisc_ops.training.schedule import build_optimizer
from deepdisc_ops.training.signals import StopRequest
from deepdisc_ops.training.step import Optimisation

SIZE = 512
WORKERS = (0, 1, 2)
CPU = torch.device("cpu")
Step = Callable[[], float]
"""Does one step and gives the seconds it waited for data."""


@dataclass(frozen=True)
class Effort:
    """How much is done: scenes, steps of a round, rounds; seconds between them."""

    scenes: int
    steps: int
    rounds: int
    settle_s: float


FULL = Effort(scenes=32, steps=12, rounds=7, settle_s=3.0)
QUICK = Effort(scenes=4, steps=2, rounds=2, settle_s=0.0)


@dataclass
class Rung:
    """A way of training with what was measured of it: images per second and share of waiting, round by round."""

    name: str
    step: Step
    rates: list[float]
    waits: list[float]

    def round(self, steps: int, batch: int) -> None:
        """Time so many steps."""
        started = time.perf_counter()
        waited = sum(self.step() for _ in range(steps))
        elapsed = time.perf_counter() - started
        self.rates.append(batch * steps / elapsed)
        self.waits.append(waited / elapsed)

    @property
    def rate(self) -> float:
        """Images per second."""
        return statistics.median(self.rates)

    @property
    def wait(self) -> float:
        """Share of the time spent waiting for data."""
        return statistics.median(self.waits)


class KeepsRedshifts(DatasetMapper):  # type: ignore[misc]  # detectron2 has no types
    """detectron2's mapper, with the two columns of an object that it would lose."""

    def _transform_annotations(self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]) -> None:
        annotations = dataset_dict.pop("annotations")
        moved = [detection_utils.transform_instance_annotations(each, transforms, image_shape) for each in annotations]
        instances = detection_utils.annotations_to_instances(moved, image_shape)
        instances.gt_redshift = torch.tensor([each["redshift"] for each in moved], dtype=torch.float32)
        instances.gt_ebv = torch.tensor([each["ebv"] for each in moved], dtype=torch.float32)
        dataset_dict["instances"] = detection_utils.filter_empty_instances(instances)


class StockModel(nn.Module):
    """The network behind the interface of detectron2's models: a list of dicts to a dict of losses."""

    def __init__(self, network: DeepDisc) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Losses of a batch as the data loader gives it."""
        images = ImageList.from_tensors([each["image"] for each in batch], self.network.stride)
        targets: list[Instances] = [each["instances"] for each in batch]
        return self.network.losses(images.tensor, targets)


class ClippedTrainer(SimpleTrainer):  # type: ignore[misc]  # detectron2 has no types
    """detectron2's loop, with the clipping of gradients where it leaves room for it."""

    def __init__(self, model: StockModel, loader: Any, optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
        super().__init__(model, loader, optimizer)
        self._clip_norm = clip_norm

    def after_backward(self) -> None:
        """Clip as our loop does."""
        nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)


def read_npy(path: str, format: str | None = None) -> np.ndarray:  # noqa: A002, ARG001  detectron2 names them
    """In the place of detectron2's reader of JPEG: pixels that are read when they are used."""
    return np.asanyarray(np.load(path, mmap_mode="r"))


def stock_files(dataset: Dataset, config: TrainingConfig, folder: Path) -> list[dict[str, Any]]:
    """The training images as .npy files (H, W, C), and their objects in detectron2's form."""
    rows = []
    for one in dataset.records("train"):
        path = folder / f"{one.key}.npy"
        np.save(path, np.ascontiguousarray(np.moveaxis(read_pixels(one, config.model.bands, with_wcs=False).data, 0, 2)))
        truth = label(one.objects, dataset.info, config.model, config.data)
        annotations = [
            {
                "bbox": box.tolist(),
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": int(kind),
                "redshift": float(z),
                "ebv": float(ebv),
            }
            for box, kind, z, ebv in zip(truth.boxes, truth.classes, truth.redshift, truth.ebv, strict=True)
        ]
        rows.append(
            {"file_name": str(path), "image_id": one.key, "height": one.height, "width": one.width, "annotations": annotations}
        )
    return rows


def fresh_network(config: TrainingConfig, dataset: Dataset) -> DeepDisc:
    """The same start for everyone."""
    torch.manual_seed(0)
    network = DeepDisc(config.model, config.inference)
    start_at_redshifts(network, config, dataset.records("train"), dataset)
    return network.train()


def stock(config: TrainingConfig, dataset: Dataset, rows: list[dict[str, Any]], workers: int) -> Step:
    """A step of `SimpleTrainer`, its gradients clipped as ours are."""
    crop = config.data.crop
    augmentations = [
        turns.RandomCrop("absolute", (crop, crop)),
        turns.RandomFlip(),
        turns.RandomFlip(horizontal=False, vertical=True),
    ]
    mapper = KeepsRedshifts(True, augmentations=augmentations, image_format="npy")
    loader = build_detection_train_loader(
        rows,
        mapper=mapper,
        sampler=TrainingSampler(len(rows), seed=0),
        total_batch_size=config.train.batch_size,
        aspect_ratio_grouping=False,
        num_workers=workers,
    )
    network = fresh_network(config, dataset)
    trainer = ClippedTrainer(StockModel(network), loader, build_optimizer(network, config.train), config.train.clip_norm)
    trainer.iter, storage = 0, EventStorage()

    def step() -> float:
        with storage:
            trainer.run_step()
        trainer.iter += 1
        storage.step()
        return float(storage.latest()["data_time"][0])

    return step


def ours(config: TrainingConfig, dataset: Dataset, workers: int, *, layout: torch.memory_format = torch.channels_last) -> Step:
    """A step of our loop; ``layout`` of the weights and pixels."""
    settings = config.model_copy(update={"data": config.data.model_copy(update={"workers": workers})})
    crops = CropDataset(dataset.records("train"), dataset.info, settings.data, settings.model, seed=0)
    learner = Optimisation(fresh_network(settings, dataset), settings.train, World(), CPU, seed=0)
    learner.network.to(memory_format=layout)
    meter = Meter()
    steps = iter(steps_on_device(crops, settings, 0, World(), CPU, meter, StopRequest()))

    def step() -> float:
        asked = time.perf_counter()
        parts = next(steps)
        waited = time.perf_counter() - asked
        learner.step([part._replace(pixels=part.pixels.contiguous(memory_format=layout)) for part in parts])
        return waited

    return step


def gflop_of_a_step(config: TrainingConfig, dataset: Dataset) -> float:
    """Operations of convolutions and matrix products of one step, two for a multiplication and addition, in 1e9."""
    step = ours(config, dataset, 0)
    step()
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops()) / 1e9


def ladder(config: TrainingConfig, dataset: Dataset, rows: list[dict[str, Any]], best: Mapping[str, int]) -> list[Rung]:
    """From the stock loop to ours, one cause at a time."""
    half = config.model_copy(update={"train": config.train.model_copy(update={"precision": "bf16"})})
    steps = {
        "detectron2's SimpleTrainer": stock(config, dataset, rows, best["stock"]),
        "our data, its layout": ours(config, dataset, best["ours"], layout=torch.contiguous_format),
        "and channels last: our loop": ours(config, dataset, best["ours"]),
        "and products in bf16": ours(half, dataset, best["ours"]),
    }
    return [Rung(name, step, [], []) for name, step in steps.items()]


def measured(rungs: list[Rung], effort: Effort, batch: int) -> None:
    """Time all rungs in turn, after a warm-up each."""
    for rung in rungs:
        for _ in range(2):
            rung.step()
    for _ in range(effort.rounds):
        for rung in rungs:
            time.sleep(effort.settle_s)  # workers of the rung before fill their queues again
            rung.round(effort.steps, batch)


def best_workers(make: Callable[[int], Step], effort: Effort, batch: int) -> tuple[int, dict[int, float]]:
    """The number of workers with the highest rate, and all rates."""
    rungs = [Rung(str(count), make(count), [], []) for count in WORKERS]
    measured(rungs, replace(effort, rounds=min(3, effort.rounds)), batch)
    rates = {count: rung.rate for count, rung in zip(WORKERS, rungs, strict=True)}
    return max(rates, key=lambda count: rates[count]), rates


def run(effort: Effort, folder: Path) -> Iterator[tuple[str, Any]]:
    """All figures, by name, as they are found."""
    torch.set_num_threads(2)
    dataset = simulate_dataset(SkySettings(), folder / "scenes", counts={"train": effort.scenes}, size=SIZE, seed=4, packed=True)
    config = complete(load(Path("small"), [f"data.path={folder / 'scenes'}"]), dataset, dataset.records("train"))
    detection_utils.read_image = read_npy
    rows, batch = stock_files(dataset, config, folder), config.train.batch_size

    best = {}
    for name, make in {"stock": lambda n: stock(config, dataset, rows, n), "ours": lambda n: ours(config, dataset, n)}.items():
        best[name], rates = best_workers(make, effort, batch)
        yield f"{name}_images_per_s_by_workers", rates
    yield "best_workers", best
    rungs = ladder(config, dataset, rows, best)
    measured(rungs, effort, batch)
    yield "rungs", {rung.name: {"images_per_s": rung.rate, "data_wait": rung.wait} for rung in rungs}
    gflop = gflop_of_a_step(config, dataset)
    yield "gflop_per_step", gflop
    yield "gflops", gflop / batch * rungs[2].rate


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute, for a look; figures mean little")
    quick = parser.parse_args().quick
    console = Console(width=110, record=True)
    warnings.filterwarnings("ignore")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, value in run(QUICK if quick else FULL, Path(folder)):
            figures[name] = value
            console.print(name, value)
    stock_loop, *_, our_loop, in_bf16 = figures["rungs"].values()
    table = Table("loop", "images/s", "data wait", "over the one before")
    before = None
    for name, rung in figures["rungs"].items():
        gain = "" if before is None else f"{rung['images_per_s'] / before:.2f}"
        table.add_row(name, f"{rung['images_per_s']:.2f}", f"{100 * rung['data_wait']:.1f} %", gain)
        before = rung["images_per_s"]
    console.print(table)
    figures["peaks_gflops"] = record.peaks_gflops()
    peak = max(figures["peaks_gflops"].values())
    ratios = {
        "training_over_simpletrainer": our_loop["images_per_s"] / stock_loop["images_per_s"],
        "bf16_over_float32": in_bf16["images_per_s"] / our_loop["images_per_s"],
        "data_wait": our_loop["data_wait"],
        "step_over_gemm_peak": figures["gflops"] / peak,
    }
    console.print(ratios)
    if not quick:
        console.print(str(record.write("training", ratios=ratios, figures=figures, log=console.export_text().splitlines())))


if __name__ == "__main__":
    main()
