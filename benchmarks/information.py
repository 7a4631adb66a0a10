"""What networks and catalogues know of redshift: ``python -m benchmarks.information --data lsst_reference [--model FOLDER]``.

A lower bound of the mutual information with redshift, on the gold galaxies (i < 25.3) of the frozen sky's test split: of a
network's pooled features in the boxes of the truth, before any training and with each member of ``--model``, and of the fluxes
measured in five apertures of the same images (asinh magnitudes, colours, sizes; what `benchmarks.baselines` learns from). All on
the same galaxies, through as many UMAP dimensions and flows (`deepdisc_ops.inference.information`). The map of the first member's
features goes to docs/.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import record
from benchmarks.codes import features as measured_features
from benchmarks.gold import read_gold
from deepdisc_ops.config import TrainingConfig, load
from deepdisc_ops.data.reference import check_reference, load_reference
from deepdisc_ops.data.store import open_dataset
from deepdisc_ops.inference.ensemble import read_description
from deepdisc_ops.inference.features import Features, features_of
from deepdisc_ops.inference.information import DIMENSIONS, EPOCHS, Information, embed, mutual_information
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.model.weights import save_member
from deepdisc_ops.photoz.figures import map_of_features, write_figure
from deepdisc_ops.training.loop import complete

Table = tuple[NDArray[np.float32], NDArray[np.float64]]
"""Features (N, D) and redshifts (N,)."""
SKY = "lsst_reference"


def untrained(data: Path) -> Features:
    """What the preset `small` sees before its first step."""
    dataset = open_dataset(data)
    config: TrainingConfig = load(Path("small"), [f"data.path={json.dumps(str(data))}"])
    config = complete(config, dataset, dataset.records("train"))
    torch.manual_seed(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        save_member(Path(folder) / "member", DeepDisc(config.model, config.inference), config, {}, 0)
        return features_of(Path(folder) / "member", data)


def common(tables: Mapping[str, Table]) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.float64]]:
    """Features (N, D) by name and redshifts (N,) of the galaxies that all tables have, finite, in one order.

    A redshift tells a galaxy.
    """
    whole = {name: np.isfinite(values).all(axis=1) for name, (values, _) in tables.items()}
    keys = {name: redshift[whole[name]].astype(np.float32) for name, (_, redshift) in tables.items()}
    shared = np.array(sorted(set.intersection(*(set(key.tolist()) for key in keys.values()))), np.float32)
    rows = {}
    for name, (values, _) in tables.items():
        unique, first = np.unique(keys[name], return_index=True)
        rows[name] = values[whole[name]][first[np.searchsorted(unique, shared)]]
    return rows, shared.astype(np.float64)


def told(name: str, found: Information) -> str:
    """A line on one."""
    return f"{name:<28}{found.bound:>8.4f} ± {found.scatter:.4f} nats of {found.entropy:.4f}"


def main() -> None:
    """Look, bound, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="lsst_reference, where `simulate --reference` has made it")
    parser.add_argument("--model", type=Path, default=Path("models/lsst-small"), help="ensemble folder")
    parser.add_argument("--flows", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument(
        "--work", type=Path, default=Path("build/reference-sky"), help="folder of benchmarks.reference_sky's tables"
    )
    arguments = parser.parse_args()
    started = time.monotonic()
    check_reference(SKY)
    arguments.work.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        gold = read_gold(load_reference(SKY), "test", arguments.work, quick=False, pool=pool)
    looks = {"network, untrained": untrained(arguments.data)}
    for member, entry in enumerate(read_description(arguments.model)["members"]):
        looks[f"network, {entry['name']}"] = features_of(arguments.model, arguments.data, member=member)
    tables: dict[str, Table] = {name: (one.values, one.redshift) for name, one in looks.items()}
    tables["fluxes in five apertures"] = (measured_features(gold).astype(np.float32), gold.redshift)
    rows, redshift = common(tables)
    print(f"{len(redshift)} galaxies that all of {len(tables)} have", flush=True)
    found, lines = {}, []
    for name, values in rows.items():
        found[name] = mutual_information(embed(values), redshift, flows=arguments.flows, epochs=arguments.epochs)
        lines.append(told(name, found[name]))
        print(lines[-1], flush=True)
    best = next(name for name in looks if name != "network, untrained")
    plane = embed(looks[best].values, 2)
    figure = map_of_features(plane, looks[best].redshift, looks[best].magnitude, looks[best].band)
    write_figure(figure, Path(__file__).parents[1] / "docs" / "features.png")
    figures = {
        "galaxies": len(redshift),
        "dimensions": DIMENSIONS,
        "flows": arguments.flows,
        "epochs": arguments.epochs,
        "entropy": found[best].entropy,
        "bounds": {name: [round(one.bound, 4), round(one.scatter, 4)] for name, one in found.items()},
    }
    ratios = {"network_over_fluxes": round(found[best].bound / found["fluxes in five apertures"].bound, 4)}
    lines.append(f"{time.monotonic() - started:.0f} s")
    print(record.write("information", ratios=ratios, figures=figures, log=lines))


if __name__ == "__main__":
    main()
