"""``deepdisc-ops colours``: which objects of a catalogue resemble those with spectra, and where spectra are missing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deepdisc_ops.cli.console import AsJson, console, print_json, short

SHOWN = 5


def colours(
    catalog: Annotated[Path, typer.Argument(help="Catalogue with fluxes, as `predict` makes it, or with mag_<band> columns.")],
    spectra: Annotated[Path, typer.Option(help="Table with ra, dec (deg) and redshift of objects with spectra.")],
    out: Annotated[Path, typer.Option(help="Folder for map.npz, cells.parquet, advice.ecsv and map.png.")] = Path("colours"),
    stored: Annotated[
        Path | None, typer.Option("--map", help="A map.npz to use; without it one is trained on the catalogue.")
    ] = None,
    bands: Annotated[str | None, typer.Option(help="Bands from blue to red: u,g,r,i,z,y; all of the catalogue without.")] = None,
    side: Annotated[int, typer.Option(min=2, help="Cells along each side of a new map.")] = 32,
    wanted: Annotated[int | None, typer.Option(min=1, help="Spectra there shall be in all; as many as there are without.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of a new map.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Put a catalogue on a self-organising map of its colours, and tell which cells need spectra (JADES paper, spec-rep).

    cells.parquet has, row for row, each object's cell and the number of spectra in it; advice.ecsv has the cells in the order of
    their need.

    Example: `deepdisc-ops colours catalog.parquet --spectra specz.fits`
    """
    from deepdisc_ops.report import map_colours

    names = [name.strip() for name in bands.split(",")] if bands else ()
    found = map_colours(catalog, spectra, out, stored=stored, bands=names, side=side, wanted=wanted, seed=seed)
    placed, near = int((found.cell >= 0).sum()), int((found.spec_rep > 0).sum())
    if as_json:
        told = {"objects": len(found.cell), "placed": placed, "represented": near, "spectra": found.matched, "out": out}
        print_json(told)
        return
    spectra_told = f"{found.matched} spectra, {found.placed} of them on the map"
    console.print(f"{len(found.cell)} objects, {placed} with all bands; {spectra_told}; {near} objects share a cell with one")
    advice = found.advice.as_table()[:SHOWN]
    table = Table(*advice.colnames, title=f"cells that need spectra most, of {len(found.advice.cell)} in {out / 'advice.ecsv'}")
    for row in advice:
        table.add_row(*(short(value.item()) for value in row))
    console.print(table)
