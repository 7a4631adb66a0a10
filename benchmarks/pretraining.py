"""A detector from a pretrained backbone against one from nothing: ``python -m benchmarks.pretraining [--quick] [--data FOLDER]``.

The backbone of the preset `small` learns redshifts from cutouts of the gold galaxies of `lsst_reference`'s train split (JADES
paper, 4.1: two layers on the deepest features, MSE). Then two detectors are trained with the same seed, data and number of steps
on that split, one of them from this backbone, and validated on the validation split's scenes, of which neither has seen anything.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import record
from deepdisc_ops.config import PretrainSettings, TrainingConfig, load, validate
from deepdisc_ops.data.cutouts import write_cutouts
from deepdisc_ops.data.reference import build_reference
from deepdisc_ops.data.store import Dataset, open_dataset
from deepdisc_ops.photoz.figures import compared_curves, write_figure
from deepdisc_ops.training.checkpoint import read_history
from deepdisc_ops.training.loop import train
from deepdisc_ops.training.pretrain import pretrain

SIDE = 32
METRICS = ("val_nll", "val_sigma_iqr", "val_completeness")
console = Console(width=120, record=True)
History = list[dict[str, float]]


@dataclass(frozen=True)
class Effort:
    """How much is done: steps of pretraining with their batch, steps of training, steps between validations."""

    pretraining: int
    batch: int
    training: int
    every: int


FULL = Effort(pretraining=3000, batch=48, training=1500, every=125)
QUICK = Effort(pretraining=4, batch=4, training=4, every=2)


def backbone(dataset: Dataset, effort: Effort, work: Path) -> tuple[Path, History]:
    """A backbone pretrained on the gold galaxies of the train split, and how it went."""
    cutouts, info = work / "cutouts.h5", dataset.info
    if not cutouts.exists():
        write_cutouts(
            dataset.records("train"),
            cutouts,
            bands=info.bands,
            gold_band=info.gold_band,
            pixel_scale=info.pixel_scale,
            side=SIDE,
            edge="skip",
            faintest=25.3,
        )
    small: TrainingConfig = load(Path("small"))
    settings = validate(
        PretrainSettings,
        {
            "cutouts": str(cutouts),
            "model": small.model.model_dump(mode="json"),
            "steps": effort.pretraining,
            "batch_size": effort.batch,
            "optimizer": "adamw",
            "lr": 0.002,
            "validate_every": effort.pretraining // 4,
        },
        "pretraining",
    )
    weights = pretrain(settings, work / "backbone", report=lambda step, metrics: told("pretraining", step, metrics))
    return weights, read_history(work / "backbone" / "last")


def detector(name: str, dataset: Dataset, effort: Effort, work: Path, overrides: Sequence[str]) -> History:
    """Validations of a detector of the preset `small`."""
    config: TrainingConfig = load(
        Path("small"),
        [
            f"data.path={json.dumps(str(dataset.path))}",
            f"train.steps={effort.training}",
            f"train.validate_every={effort.every}",
            "train.precision=bf16",
            *overrides,
        ],
    )
    train(config, work / name, report=lambda step, metrics: told(name, step, metrics))
    return read_history(work / name / "last")


def told(name: str, step: int, metrics: Mapping[str, float]) -> None:
    """Print a validation."""
    figures = ", ".join(f"{key} {metrics[key]:.4f}" for key in (*METRICS, "val_loss") if key in metrics)
    console.print(f"{name}, step {step}: {figures}")


def main() -> None:
    """Pretrain, train twice, draw and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps; results go to the work folder")
    parser.add_argument("--data", type=Path, help="lsst_reference, where `simulate --reference` has made it")
    parser.add_argument("--work", type=Path, default=Path("build/pretraining"), help="folder of cutouts and checkpoints")
    arguments = parser.parse_args()
    effort, work, start = (QUICK if arguments.quick else FULL), arguments.work, time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(os.cpu_count() or 1)
    if arguments.data:
        dataset = open_dataset(arguments.data)
    else:
        dataset = build_reference("lsst_reference", work / "sky", splits=("train", "validation"), processes=0, packed=True)
    weights, pretraining = backbone(dataset, effort, work)
    runs = {
        "from nothing": detector("scratch", dataset, effort, work, []),
        "pretrained": detector("pretrained", dataset, effort, work, [f"model.backbone_weights={json.dumps(str(weights))}"]),
    }
    pictures = work if arguments.quick else Path(__file__).parent.parent / "docs"
    write_figure(compared_curves(runs, METRICS), pictures / "pretraining.png")
    nll = {name: [entry["val_nll"] for entry in history] for name, history in runs.items()}
    ratios = {
        "sigma_iqr_pretrained_over_scratch": runs["pretrained"][-1]["val_sigma_iqr"] / runs["from nothing"][-1]["val_sigma_iqr"],
        "nll_pretrained_minus_scratch": nll["pretrained"][-1] - nll["from nothing"][-1],
    }
    console.print(ratios, f"{time.monotonic() - start:.0f} s")
    kept = {name: [{key: entry[key] for key in ("step", *METRICS)} for entry in history] for name, history in runs.items()}
    figures = kept | {"pretraining": pretraining}
    folder = work if arguments.quick else record.RESULTS
    console.print(
        str(record.write("pretraining", ratios=ratios, figures=figures, log=console.export_text().splitlines(), folder=folder))
    )


if __name__ == "__main__":
    main()
