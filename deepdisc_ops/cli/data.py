"""``deepdisc-ops data``: what a data set holds, whether it is whole, its splits, and a packed copy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from deepdisc_ops.cli.console import AsJson, console, print_json, progress_bar
from deepdisc_ops.errors import CatalogError

if TYPE_CHECKING:
    from deepdisc_ops.data.describe import PixelStatistics

data_app = typer.Typer(no_args_is_help=True, help="Data sets: what they hold, their splits, packed copies.")

DataPath = Annotated[Path, typer.Argument(help="Folder of a data set.")]


@data_app.command("describe")
def data_describe(
    path: DataPath,
    out: Annotated[Path | None, typer.Option(help="Folder for description.json and description.png.")] = None,
    split: Annotated[str | None, typer.Option(help="Describe this split alone.")] = None,
    levels: Annotated[int, typer.Option(min=1, help="Pyramid levels, for each of which an anchor is suggested.")] = 3,
    sample: Annotated[int, typer.Option(min=0, help="At most so many images are read for the pixel statistics.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of that choice.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Print, and with --out draw, what a data set holds: n(z), magnitudes, objects, boxes, coverage, labels, anchors, pixels.

    Example: `deepdisc-ops data describe scenes --out description`
    """
    from deepdisc_ops.data import describe
    from deepdisc_ops.data.store import open_dataset

    dataset = open_dataset(path)
    with progress_bar("reading", max(1, min(sample, len(dataset))), "images") as advance:
        found = describe.describe(
            dataset, split=split, levels=levels, sample=sample, seed=seed, progress=lambda done, total: advance(done, "", total)
        )
    if as_json:
        print_json(describe.as_tree(found))
    else:
        table = Table("figure", "value", title=str(path))
        for name, value in describe.summary(found):
            table.add_row(name, value)
        console.print(table)
        if found.pixels:
            console.print(_pixel_table(found.pixels, found.sampled))
    if out is not None:
        describe.write_description(found, out)
        console.print(f"description.json and description.png in {out}")


@data_app.command("verify")
def data_verify(path: DataPath) -> None:
    """Check every record and every packed pixel against its checksum, and referenced files against their fingerprints.

    Example: `deepdisc-ops data verify scenes`
    """
    from deepdisc_ops.data.store import open_dataset, verify

    dataset = open_dataset(path)
    faults = verify(dataset)
    for fault in faults:
        console.print(fault, markup=False)
    if faults:
        raise CatalogError(f"{path} has {len(faults)} fault{'s' * (len(faults) > 1)}")
    console.print(f"{path}: {len(dataset)} records, no fault")


@data_app.command("split")
def data_split(
    path: DataPath,
    train: Annotated[float, typer.Option(min=0, max=1, help="Share of the records to train on.")] = 0.8,
    validation: Annotated[float, typer.Option(min=0, max=1, help="Share to validate on.")] = 0.1,
    calibration: Annotated[float, typer.Option(min=0, max=1, help="Share to calibrate on.")] = 0.0,
    test: Annotated[float, typer.Option(min=0, max=1, help="Share to test on.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same splits.")] = 0,
    cell_arcmin: Annotated[float, typer.Option(help="Side of the cells of sky that stay together.")] = 10.0,
    redshift_bins: Annotated[int, typer.Option(min=1, help="Strata of the cells' mean redshift.")] = 5,
    partitions: Annotated[int, typer.Option(min=0, help="Random partitions of train and validation, for ensembles.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Deal the records out to splits by sky position, stratified by redshift, and store the result.

    Example: `deepdisc-ops data split scenes --train 0.7 --validation 0.1 --test 0.2 --seed 1`
    """
    from deepdisc_ops.data.splits import UNUSED, make_splits
    from deepdisc_ops.data.store import open_dataset

    shares = {"train": train, "validation": validation, "calibration": calibration, "test": test}
    fractions = {name: share for name, share in shares.items() if share}
    splits = make_splits(
        open_dataset(path), fractions, seed=seed, cell_arcmin=cell_arcmin, redshift_bins=redshift_bins, partitions=partitions
    )
    counts = {name: int((splits.split == name).sum()) for name in (*fractions, UNUSED)}
    if as_json:
        print_json({"cells": splits.settings["cells"], "records": {name or "unused": count for name, count in counts.items()}})
        return
    table = Table("split", "records", "share", title=f"{path}: {splits.settings['cells']} cells of {cell_arcmin:g} arcmin")
    for name, count in counts.items():
        table.add_row(name or "unused: overlaps another split", str(count), f"{count / len(splits.split):.1%}")
    console.print(table)


@data_app.command("pack")
def data_pack(
    path: DataPath,
    out: Annotated[Path, typer.Argument(help="Folder of the copy.")],
) -> None:
    """Copy a data set with all its pixels into one folder; an interrupted copy goes on when run again.

    Example: `deepdisc-ops data pack scenes packed_scenes`
    """
    from deepdisc_ops.data.pack import pack_dataset
    from deepdisc_ops.data.store import open_dataset

    dataset = open_dataset(path)
    with progress_bar("packing", max(1, len(dataset)), "records") as advance:
        copy = pack_dataset(dataset, out, progress=lambda done, total: advance(done, "", total))
    size = sum(file.stat().st_size for file in (out / "shards").iterdir())
    console.print(f"{out}: {len(copy)} records, {size / 1e9:.2f} GB")


@data_app.command("merge")
def data_merge(
    paths: Annotated[list[Path], typer.Argument(help="Folders of data sets of the same bands and pixel scale.")],
    out: Annotated[Path, typer.Option(help="Folder of the data set of all their records.")],
    packed: Annotated[bool, typer.Option("--packed", help="Copy the pixels too; records that have theirs packed need it.")] = False,
) -> None:
    """Make one data set of several: tracts of a survey, real and simulated images. Splits and origins are kept.

    Example: `deepdisc-ops data merge tract_1 tract_2 scenes --out all --packed`
    """
    from deepdisc_ops.data.pack import merge_datasets
    from deepdisc_ops.data.store import open_dataset

    datasets = [open_dataset(path) for path in paths]
    with progress_bar("merging", max(1, sum(map(len, datasets))), "records") as advance:
        merged = merge_datasets(datasets, out, packed=packed, progress=lambda done, total: advance(done, "", total))
    parts = ", ".join(f"{count} {split or 'in no split'}" for split, count in merged.split_sizes.items())
    console.print(f"{out}: {len(merged)} records ({parts})")


@data_app.command("cutouts")
def data_cutouts(
    path: DataPath,
    out: Annotated[Path, typer.Option(help="HDF5 file, of the form of GalaxiesML.")],
    split: Annotated[str | None, typer.Option(help="Of this split alone.")] = None,
    side: Annotated[int, typer.Option(min=1, help="Side in pixels; 127 as GalaxiesML.")] = 127,
    faintest: Annotated[float | None, typer.Option(help="AB magnitude in the gold band of the faintest galaxy.")] = None,
    pad: Annotated[bool, typer.Option("--pad", help="Keep galaxies near an edge, padded with NaN.")] = False,
) -> None:
    """Cut out the galaxies with redshifts, one image each, for pretraining.

    Example: `deepdisc-ops data cutouts scenes --out cutouts.h5 --faintest 24`
    """
    from deepdisc_ops.data.cutouts import write_cutouts
    from deepdisc_ops.data.store import open_dataset

    dataset = open_dataset(path)
    info = dataset.info
    count = write_cutouts(
        dataset.records(split),
        out,
        bands=info.bands,
        gold_band=info.gold_band,
        pixel_scale=info.pixel_scale,
        side=side,
        edge="pad" if pad else "skip",
        faintest=float("inf") if faintest is None else faintest,
    )
    console.print(f"{out}: {count} galaxies, {len(info.bands)} bands, {side}x{side} pixels")


def _pixel_table(bands: Sequence[PixelStatistics], sampled: int) -> Table:
    from deepdisc_ops.data.describe import QUANTILES

    names = [f"{share:.0%}" for share in QUANTILES]
    table = Table("band", "mean", "std", "noise", *names, "invalid", "images without", title=f"pixels of {sampled} images, nJy")
    for band in bands:
        figures = [f"{value:.4g}" for value in (band.mean, band.std, band.noise, *band.percentiles)]
        table.add_row(band.band, *figures, f"{band.invalid:.2%}", f"{band.empty:.1%}")
    return table
