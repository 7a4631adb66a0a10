"""What networks' features know of redshift: ``python -m benchmarks.information --data lsst_reference [--model FOLDER]``.

A lower bound of the mutual information with redshift, on gold galaxies (i < 25.3) of the frozen sky's test split: of a network's
pooled features in the boxes of the truth, before any training and with each member of ``--model``, and of the fluxes measured in
five apertures of the same images (asinh magnitudes, colours, sizes; what `benchmarks.baselines` learns from). All on the same
galaxies, through as many UMAP dimensions and flows (`deepdisc_ops.inference.information`).

UMAP does not know of redshift and keeps what separates galaxies most, so that a bound through it may be far below what features
know; the densities of a code that learned from the fluxes tell more of these: H(z) less their NLL, in the result of
`benchmarks.photoz`. The map of the last member's features goes to docs/. What is in the work folder is not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
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
from deepdisc_ops.inference.information import DIMENSIONS, EPOCHS, Information, embed, mutual_information, require_packages
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


def bounded(values: NDArray[np.float32], redshift: NDArray[np.float64], work: Path, flows: int, epochs: int) -> Information:
    """The bound of features (N, D), or what an earlier run kept of just these."""
    digest = hashlib.sha256(np.ascontiguousarray(values).tobytes() + redshift.tobytes()).hexdigest()[:16]
    file = work / f"information_{digest}_{flows}_{epochs}.json"
    if not file.is_file():
        found = mutual_information(embed(values), redshift, flows=flows, epochs=epochs)
        file.write_text(json.dumps(asdict(found)) + "\n")
    kept = json.loads(file.read_text())
    return Information(**{**kept, "flows": tuple(kept["flows"])})


def told(name: str, found: Information) -> str:
    """A line on one."""
    return f"{name:<28}{found.bound:>8.4f} ± {found.scatter:.4f} nats of {found.entropy:.4f}"


def main() -> None:
    """Look, bound, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="lsst_reference, where `simulate --reference` has made it")
    parser.add_argument("--model", type=Path, default=Path("models/lsst-small"), help="ensemble folder")
    parser.add_argument("--galaxies", type=int, default=4000, help="so many of the test split's, drawn at random")
    parser.add_argument("--flows", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument(
        "--work", type=Path, default=Path("build/reference-sky"), help="folder of benchmarks.reference_sky's tables"
    )
    arguments = parser.parse_args()
    started = time.monotonic()
    require_packages()
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
    last = list(looks)[-1]
    chosen = np.random.default_rng(0).permutation(len(redshift))[: arguments.galaxies]
    shown = np.random.default_rng(0).permutation(len(looks[last]))[: arguments.galaxies]
    one = looks[last]
    figure = map_of_features(embed(one.values[shown], 2), one.redshift[shown], one.magnitude[shown], one.band)
    write_figure(figure, Path(__file__).parents[1] / "docs" / "features.png")
    found, lines = {}, []
    for name, values in rows.items():
        found[name] = bounded(values[chosen], redshift[chosen], arguments.work, arguments.flows, arguments.epochs)
        lines.append(told(name, found[name]))
        print(lines[-1], flush=True)
    figures = {
        "galaxies": len(chosen),
        "dimensions": DIMENSIONS,
        "flows": arguments.flows,
        "epochs": arguments.epochs,
        "entropy": found[last].entropy,
        "bounds": {name: [round(one.bound, 4), round(one.scatter, 4)] for name, one in found.items()},
    }
    ratios = {"trained_over_untrained": round(found[last].bound / found["network, untrained"].bound, 4)}
    lines.append(f"{time.monotonic() - started:.0f} s")
    print(record.write("information", ratios=ratios, figures=figures, log=lines))


if __name__ == "__main__":
    main()
