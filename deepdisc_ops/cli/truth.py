"""``deepdisc-ops truth``: training sets from what a survey has, and DeepDISC's JSON read and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from deepdisc_ops.cli.console import console, progress_bar
from deepdisc_ops.errors import CatalogError, ConfigError, did_you_mean

if TYPE_CHECKING:
    from deepdisc_ops.data.truth.windows import Built

truth_app = typer.Typer(no_args_is_help=True, help="Training sets from segmentation maps, catalogues and DeepDISC's JSON.")

SettingsPath = Annotated[Path, typer.Argument(help="YAML: images, catalogue and its columns, windows.")]
OutFolder = Annotated[Path, typer.Option(help="Data set folder; an unfinished one goes on.")]
PackedFlag = Annotated[bool, typer.Option("--packed", help="Copy the pixels into the data set.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a setting, as in windows.width_arcsec=10.")]


@truth_app.command("from-segmentation")
def from_segmentation(settings: SettingsPath, out: OutFolder, packed: PackedFlag = False, overrides: Overrides = None) -> None:
    """A data set of a mosaic, its segmentation map and its catalogue, with redshifts compiled from spectra (the JADES way).

    Example: `deepdisc-ops truth from-segmentation jades.yaml --out jades`
    """
    from deepdisc_ops import config
    from deepdisc_ops.data.truth import segmentation as room

    loaded = config.load(settings, overrides or (), room.SegmentationSettings)
    _report(lambda progress: room.from_segmentation(loaded, out, packed=packed, progress=progress), out)


@truth_app.command("from-catalog")
def from_catalog(
    settings: SettingsPath,
    out: OutFolder,
    way: Annotated[
        Literal["deblend", "parametric"], typer.Option(help="deblend: the image around known centres; parametric: GalSim draws.")
    ] = "deblend",
    packed: PackedFlag = False,
    overrides: Overrides = None,
) -> None:
    """A data set of a mosaic and a truth catalogue: deblended (the DC2 way) or drawn again (the JAGUAR way).

    Example: `deepdisc-ops truth from-catalog dc2.yaml --out dc2 --way deblend`
    """
    from deepdisc_ops import config

    if way == "deblend":
        from deepdisc_ops.data.truth import deblend

        seen = config.load(settings, overrides or (), deblend.DeblendSettings)
        _report(lambda progress: deblend.from_truth_catalog(seen, out, packed=packed, progress=progress), out)
    else:
        from deepdisc_ops.data.truth import parametric

        drawn = config.load(settings, overrides or (), parametric.ParametricSettings)
        _report(lambda progress: parametric.from_parametric_catalog(drawn, out, packed=packed, progress=progress), out)


@truth_app.command("import-deepdisc")
def import_deepdisc(
    records: Annotated[Path, typer.Argument(help="DeepDISC JSON of either variant, or ours.")],
    out: Annotated[Path, typer.Option(help="Data set folder.")],
    images: Annotated[Path, typer.Option(help="Folder of the images that the records name.")] = Path(),
    bands: Annotated[
        str, typer.Option(help="Bands in the order of the planes, as ugrizy or F090W,F115W; those of the layout.")
    ] = "",
    zero_point: Annotated[float | None, typer.Option(help="AB magnitude of one count, where the images do not say.")] = None,
    pixel_scale: Annotated[float | None, typer.Option(help="arcsec, where the images have no WCS.")] = None,
    gold_band: Annotated[str, typer.Option(help="Band of the magnitudes.")] = "i",
    split: Annotated[str, typer.Option(help="Split of the records, for those that have none.")] = "",
    packed: PackedFlag = False,
) -> None:
    """A data set of DeepDISC's records; nothing of them is lost, and `export-deepdisc` gives them back.

    Example: `deepdisc-ops truth import-deepdisc train.json --images cutouts --zero-point 27 --out dc2`
    """
    from deepdisc_ops.data.records import SPLITS, DatasetInfo
    from deepdisc_ops.data.store import create_dataset
    from deepdisc_ops.data.truth import deepdisc as room
    from deepdisc_ops.data.writer import DatasetWriter

    if split not in ("", *SPLITS):
        raise ConfigError(f"split {split!r} is unknown; {did_you_mean(split, SPLITS)}")
    names = tuple(bands.split(",") if "," in bands else bands) or None
    found = room.read_deepdisc(records, room.Images(images, names, zero_point, pixel_scale))
    scale = pixel_scale or room.pixel_scale_of(found[0])
    info = DatasetInfo(found[0].origin, found[0].bands, scale, gold_band, 0)
    with DatasetWriter(create_dataset(out, info), packed=packed) as writer:
        new = [record for record in found if record.key not in writer]
        for record in new:
            writer.add(replace(record, split=record.split or split))
    objects = sum(len(record.objects) for record in new)
    console.print(f"{out}: {len(new)} records with {objects} objects, bands {' '.join(info.bands)}, {scale:.4g} arcsec a pixel")


@truth_app.command("export-deepdisc")
def export_deepdisc(
    dataset: Annotated[Path, typer.Argument(help="Data set folder.")],
    out: Annotated[Path, typer.Option(help="JSON file.")],
    split: Annotated[str, typer.Option(help="train, validation, calibration or test; all without one.")] = "",
    layout: Annotated[str, typer.Option(help="dc2, hsc or deepdisc_ops; that in which each record came without one.")] = "",
) -> None:
    """DeepDISC JSON of a data set, for detectron2 to read.

    Example: `deepdisc-ops truth export-deepdisc scenes --split train --out train.json`
    """
    from deepdisc_ops.data.store import open_dataset
    from deepdisc_ops.data.truth import deepdisc as room

    if layout not in ("", room.OWN, *room.LAYOUTS):
        raise ConfigError(f"layout {layout!r} is unknown; {did_you_mean(layout, (*room.LAYOUTS, room.OWN))}")
    if out.suffix != ".json" or not out.absolute().parent.is_dir():
        raise CatalogError(f"--out {out} is no .json file in a folder that exists; name one")
    chosen: Any = layout or None
    records = open_dataset(dataset).records(split or None)
    room.write_deepdisc(records, out, chosen)
    console.print(f"{out}: {len(records)} records")


def _report(run: Callable[[Callable[[int, int], None]], Built], out: Path) -> None:
    """Run a build and print what every rule and every window came to."""
    with progress_bar("windows", 1, "windows") as advance:
        built = run(lambda done, total: advance(done, "", total))
    if built.compilation is not None:
        console.print(built.compilation.summary())
    for name, count in built.counts.items():
        if count:
            console.print(f"{name}: {count}")
    console.print(f"{out}: {len(built.dataset)} records, bands {' '.join(built.dataset.info.bands)}")
