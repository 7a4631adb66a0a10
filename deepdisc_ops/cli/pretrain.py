"""``deepdisc-ops pretrain``: a backbone that has learned redshifts from single galaxies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deepdisc_ops.cli.console import console, progress_bar

Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a setting, as in lr=0.01; may be repeated.")]


def pretrain(
    config: Annotated[Path | None, typer.Argument(help="YAML of pretraining settings, or the preset galaxiesml.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of backbone and curves; an unfinished run goes on.")] = Path("pretrained"),
    overrides: Overrides = None,
) -> None:
    """Train a backbone to predict redshifts from cutouts; writes OUT/backbone.safetensors, for `model.backbone_weights`.

    Example: `deepdisc-ops pretrain --out pretrained --set cutouts=cutouts.h5 --set model.backbone.name=resnet18`
    """
    from deepdisc_ops import config as settings

    loaded = settings.load(config, overrides or (), settings.PretrainSettings)
    from deepdisc_ops.training import pretrain as room

    with progress_bar("pretraining", room.planned_steps(loaded), "steps") as advance:

        def report(step: int, metrics: Any) -> None:
            advance(step, ", ".join(f"{name} {metrics[name]:.4f}" for name in ("val_loss", "val_sigma_iqr")))

        best = room.pretrain(loaded, out, report=report)
    console.print(f"backbone in {best}, curves in {out / 'loss.png'}; train with --set model.backbone_weights={best}")
