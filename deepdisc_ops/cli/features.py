"""``deepdisc-ops members features``: what a network sees in galaxies, and how much that tells of their redshifts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepdisc_ops.cli.console import AsJson, as_json_text, console, print_json, progress_bar


def features(
    model: Annotated[Path, typer.Argument(help="A checkpoint folder, or an ensemble.")],
    data: Annotated[Path, typer.Option(help="Data set; its gold galaxies are looked at in the boxes of its truth.")],
    split: Annotated[str, typer.Option(help="Split of the data set; not one that trained the network.")] = "test",
    member: Annotated[int, typer.Option(min=0, help="Which member of an ensemble.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for features.h5, features.png and information.json.")] = Path("features"),
    dimensions: Annotated[int, typer.Option(min=1, help="Dimensions that UMAP leaves for the flows.")] = 11,
    flows: Annotated[int, typer.Option(min=0, help="Normalising flows that bound the mutual information; 0: none.")] = 30,
    epochs: Annotated[int, typer.Option(min=1, help="Of each flow.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the maps, the flows and their held-out galaxies.")] = 0,
    device: Annotated[str, typer.Option(help="torch device of the network, such as cpu or cuda:0.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Map a network's features of galaxies by UMAP, coloured by redshift, and bound what they tell of it (JADES paper).

    The bound, in nats, is one from below: m = E[log q(z | features)] + H(z). Images go through the network whole, and the features
    of all galaxies lie in memory: cutouts of a survey, not its mosaics, and 50 kB a galaxy for the papers' networks.

    Example: `deepdisc-ops members features runs/a/best --data scenes --flows 10`
    """
    from deepdisc_ops.inference.features import features_of
    from deepdisc_ops.inference.information import embed, mutual_information, require_packages
    from deepdisc_ops.photoz.figures import map_of_features, write_figure

    require_packages()
    with progress_bar("looking", 1, "images") as advance:
        seen = features_of(model, data, split, member=member, device=device, progress=lambda done, total: advance(done, "", total))
    seen.save(out / "features.h5")
    with console.status("mapping to two dimensions"):
        plane = embed(seen.values, 2, seed=seed)
    write_figure(map_of_features(plane, seen.redshift, seen.magnitude, seen.band), out / "features.png")
    console.print(f"{len(seen)} galaxies, {seen.values.shape[1]} features of each: {out / 'features.png'}")
    found = None
    if flows:
        with console.status(f"mapping to {dimensions} dimensions"):
            embedding = embed(seen.values, dimensions, seed=seed)
        with progress_bar("learning", flows, "flows") as advance:
            found = mutual_information(
                embedding, seen.redshift, flows=flows, epochs=epochs, seed=seed, progress=lambda done, _: advance(done)
            )
        (out / "information.json").write_text(as_json_text(found) + "\n")
        console.print(
            f"mutual information with redshift at least {found.bound:.3f} ± {found.scatter:.3f} nats, of an entropy of "
            f"{found.entropy:.3f}: {out / 'information.json'}"
        )
    if as_json:
        print_json({"galaxies": len(seen), "out": out, "information": found})
