"""``deepdisc-ops model``: the networks there are and what they cost."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from deepdisc_ops.cli.console import AsJson, console, print_json, progress_bar
from deepdisc_ops.errors import ConfigError

model_app = typer.Typer(no_args_is_help=True, help="Networks: the backbones there are and what they cost.")

PUBLISHED = {"stem_stride": 4, "levels": 4, "fpn_channels": 256}  # as detectron2 has them, so that the rows compare
LIGHT = 60e6  # parameters up to which a backbone is trained for a step without --all
CROP_PX = 128


@model_app.command("table")
def model_table(
    names: Annotated[list[str] | None, typer.Argument(help="Backbones, as timm/convnext_tiny; without, all but timm's.")] = None,
    everything: Annotated[bool, typer.Option("--all", "--slow", help="Train the heavy ones too: 10 GB and minutes.")] = False,
    size: Annotated[int, typer.Option(min=32, help="Side in pixels of the image whose operations are counted.")] = 512,
    bands: Annotated[int, typer.Option(min=1, help="Bands of the image and of the trained crop.")] = 6,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting of the backbones, as in stem_stride=2; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print every backbone's parameters and operations, and whether the whole network learns with it.

    Counted are the backbone and its pyramid, two operations a multiplication and addition. The step is forward and
    backward of the whole network on two random crops of 128 px.

    Example: `deepdisc-ops model table resnet50 mvitv2_t timm/convnext_tiny --set stem_stride=2 --set levels=3`
    """
    from deepdisc_ops.config import BACKBONES, BackboneSettings, parse_override, set_by_path, validate
    from deepdisc_ops.model.table import cost, learn

    tree = dict(PUBLISHED)
    for text in overrides or ():
        set_by_path(tree, *parse_override(text))
    asked = [validate(BackboneSettings, tree | {"name": name}, name) for name in names or BACKBONES]
    coarsest = max(each.stem_stride * 2 ** (each.levels - 1 + each.top_level) for each in asked)
    if size % coarsest:
        raise ConfigError(f"--size {size} is no multiple of {coarsest}, the coarsest stride; take {size + -size % coarsest}")
    table = Table("backbone", title=f"backbones with a pyramid of {', '.join(f'{key} {value}' for key, value in tree.items())}")
    for column in ("parameters / M", f"GFLOP at {bands}x{size}x{size}", "strides", "loss", "no gradient", "step / s"):
        table.add_column(column, justify="right")
    unsound, rows = [], []
    with progress_bar("trying", len(asked), "backbones") as advance:
        for done, settings in enumerate(asked, start=1):
            needs = cost(settings, bands, size)
            row = [f"{needs.parameters / 1e6:.1f}", f"{needs.gflop:.1f}", " ".join(map(str, needs.strides))]
            step = learn(settings, bands, CROP_PX) if needs.parameters <= LIGHT or everything else None
            if step:
                row += [f"{step.loss:.3g}", str(step.without_gradient), f"{step.seconds:.1f}"]
                unsound += [settings.name] if step.unsound else []
            else:
                row += ["with --all", "", ""]
            table.add_row(settings.name, *row)
            rows.append({"backbone": settings.name, "cost": needs, "step": step})
            advance(done, settings.name, tell=True)
    if as_json:
        print_json(rows)
    else:
        console.print(table)
    if unsound:
        raise ConfigError(f"{', '.join(unsound)}: a loss that is no number or weights without a gradient; change the settings")
