"""``deepdisc-ops weights``: checkpoints of DeepDISC in and out, and what a backbone would start from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from deepdisc_ops.cli.console import AsJson, console, print_json
from deepdisc_ops.errors import ConfigError

if TYPE_CHECKING:
    from deepdisc_ops.model.weights import KeyReport

weights_app = typer.Typer(no_args_is_help=True, help="Weights of other programs: DeepDISC's checkpoints, ImageNet's backbones.")

Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a setting, as in model.bands=[g,r,i]; repeatable.")]
EveryKey = Annotated[bool, typer.Option("--keys", help="List every key and what became of it.")]


@weights_app.command("import-deepdisc")
def weights_import(
    checkpoint: Annotated[Path, typer.Argument(help="A DeepDISC checkpoint with a redshift_fc head, .pth.")],
    out: Annotated[Path, typer.Argument(help="The member's folder.")],
    zero_point: Annotated[
        float | None,
        typer.Option(help="AB zero point of the pixels it was trained on: 27 for LSST and HSC coadds; nJy without."),
    ] = None,
    overrides: Overrides = None,
    every_key: EveryKey = False,
) -> None:
    """Turn a DeepDISC checkpoint into a member.

    A checkpoint names neither bands nor anchors nor thresholds. Bands are given in the order the network saw them, which an
    "RGB" input format in DeepDISC's config reverses.

    Example: `deepdisc-ops weights import-deepdisc model_final.pth members/old --zero-point 27 --set model.pixel_scale=0.2
    --set 'model.anchor_sizes=[8,16,32,64,128]' --set inference.score_threshold=0.3`
    """
    from deepdisc_ops.model.published import import_checkpoint
    from deepdisc_ops.model.weights import save_member
    from deepdisc_ops.sky.fluxes import njy_per_count

    unit_njy = 1.0 if zero_point is None else njy_per_count(zero_point)
    network, config, report = import_checkpoint(checkpoint, overrides or (), unit_njy=unit_njy)
    save_member(out, network, config, {}, 0)
    _tell(report, every_key)
    model = config.model
    console.print(f"{model.backbone.name}, bands {' '.join(model.bands)}, {model.redshift_head.components} Gaussians: {out}")


@weights_app.command("export-deepdisc")
def weights_export(
    member: Annotated[Path, typer.Argument(help="A checkpoint folder (RUN/best).")],
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint to write, .pth.")],
) -> None:
    """Write a member's weights under DeepDISC's names, for its configs to load, if its network is one that DeepDISC has.

    Example: `deepdisc-ops weights export-deepdisc members/old model.pth`
    """
    from deepdisc_ops.model.published import export_checkpoint
    from deepdisc_ops.model.weights import load_member

    network, info = load_member(member)
    export_checkpoint(network, info.config.model, checkpoint)
    console.print(f"weights in {checkpoint}; its config needs anchor sizes {info.config.model.anchor_sizes}")
    if info.config.model.redshift_head.sigma_floor > 0:
        console.print(f"DeepDISC has no floor: its sigmas will be smaller by {info.config.model.redshift_head.sigma_floor}")


@weights_app.command("check")
def weights_check(
    config: Annotated[Path, typer.Argument(help="A training config.")],
    overrides: Overrides = None,
    every_key: EveryKey = False,
    as_json: AsJson = False,
) -> None:
    """Show what would become of every key of model.weights or model.backbone_weights in the network of a training config.

    Example: `deepdisc-ops weights check jades --set model.backbone_weights=R-50.pkl`
    """
    from deepdisc_ops import config as settings
    from deepdisc_ops.model.build import DeepDisc
    from deepdisc_ops.model.pretrained import initialise

    loaded = settings.load(config, overrides or (), settings.TrainingConfig)
    unscaled = settings.InputSettings(scaling="snr", noise_njy=(1.0,) * len(loaded.model.bands))  # measured when training begins
    report = initialise(DeepDisc(loaded.model.model_copy(update={"input": unscaled}), loaded.inference), loaded.model)
    if report is None:
        raise ConfigError(
            "neither model.weights nor model.backbone_weights is set; name a file, as in --set model.backbone_weights=R-50.pkl"
        )
    if as_json:
        print_json(report)
    else:
        _tell(report, every_key)


def _tell(report: KeyReport, every_key: bool) -> None:
    if every_key:
        table = Table("key", "became", "of it")
        for row in report.rows():
            table.add_row(*row)
        console.print(table)
    console.print(str(report))
