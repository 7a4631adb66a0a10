"""A trained network against a catalogue's redshifts: ``python -m benchmarks.photoz [--model FOLDER] [--sky NAME] [--quick]``.

The test scenes of a frozen sky go through the network, which sees their images and E(B-V) alone. Gradient boosting learns from the
gold galaxies (i < 25.3) of the same sky's train split: from fluxes in five apertures at the true positions in the same images
(``measured``, what the network is compared with) and from noisy true magnitudes (``catalogue``, a bound that no image gives).
Gold galaxies are found if a detection lies within the radius, one-to-one with all true sources. Redshifts are modes of the
network's densities (medians and the redshifts of the least risk stand beside) and medians of the boosting; scatter and outliers
are those of the LSST paper, whose limit is three times one's own sigma_IQR: how many lie beyond that of the boosting is told for
all. Galaxies whose box the border of their scene cuts are left out, as the border is the scene's and not the sky's; completeness
with them is told, and within 1", the radius of the papers. Network and boosting are judged on the galaxies that the network
found; of the boosting on all is told too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from benchmarks import record
from benchmarks.reference_sky import GOLD_LIMIT, GRID, QUICK_SHARE, SPLITS, counted, rounded, table_features, tables
from deepdisc_ops.data import surveys
from deepdisc_ops.data.reference import ReferenceSky, Split, check_reference, load_reference, reference_names, reference_scene
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.photoz.baseline import Baseline
from deepdisc_ops.photoz.figures import redshift_scatter, write_figure
from deepdisc_ops.photoz.metrics import pit_ks, point_metrics, residual
from deepdisc_ops.photoz.mixture import GaussianMixture
from deepdisc_ops.sky.dust import EbvPlane
from deepdisc_ops.sky.matching import match_on_sky

Floats = NDArray[np.float64]

YEARS = 5.0
RADIUS_ARCSEC, WIDE_ARCSEC = 0.5, 1.0
BORDER_PX = 5.5
"""Half of the smallest box that the network learns."""
MAGNITUDES = (17.0, 20.0, 22.0, 23.5, 24.5, GOLD_LIMIT)


@dataclass(frozen=True)
class Task:
    """A test scene and the folder of the network that looks at it."""

    sky: ReferenceSky
    index: int
    model: Path


@dataclass(frozen=True)
class Seen:
    """What the network says of the G gold galaxies of a scene, in the catalogue's order.

    found, within_wide and whole (G,) bool: whether a detection is within either radius, and whether the galaxy is clear of the
    border; mixtures weights, means and sigmas (G, K), zero where a galaxy was not found; detections: how many there were, and
    how many of them match no true source, within either radius.
    """

    found: NDArray[np.bool_]
    within_wide: NDArray[np.bool_]
    whole: NDArray[np.bool_]
    weights: Floats
    means: Floats
    sigmas: Floats
    detections: int
    false: int
    false_wide: int


@cache
def ensemble(folder: Path) -> Ensemble:
    """The network, loaded once a process."""
    return Ensemble.load(folder)


def look(task: Task) -> Seen:
    """Detect in a scene and match with its truth."""
    scene = reference_scene(task.sky, "test", task.index, years=YEARS)
    network = ensemble(task.model)
    order = [scene.survey.bands.index(band) for band in network.bands]
    ebv = float(np.median(np.asarray(scene.catalog["ebv"])))
    found = network.predict(scene.image[order], EbvPlane.constant(ebv))
    magnitude = np.asarray(scene.catalog[f"mag_{scene.survey.bands[scene.survey.gold_index]}"])
    gold = np.flatnonzero((magnitude < GOLD_LIMIT) & (np.asarray(scene.catalog["class"]) == 0))
    catalog = scene.catalog
    degrees = scene.survey.pixel_scale / 3600
    true = np.array([np.asarray(catalog[axis], np.float64) for axis in ("x", "y")])
    sizes = np.array(scene.image.shape[:0:-1])
    inside = [(axis >= BORDER_PX) & (axis <= size - 1 - BORDER_PX) for axis, size in zip(true, sizes, strict=True)]

    def partners(radius: float) -> tuple[NDArray[np.int64], int]:
        """The detection (N,) of each true source, -1 for none, and the number of detections without one."""
        (x, y), (x_found, y_found) = (degrees * true), (degrees * found.centres.T)
        matches = match_on_sky(x, y, x_found, y_found, radius)
        partner = np.full(len(catalog), -1)
        partner[matches.index1] = matches.index2
        return partner, len(found) - len(matches.index2)

    (near, false), (wide, false_wide) = partners(RADIUS_ARCSEC), partners(WIDE_ARCSEC)
    mine = near[gold]
    there = mine >= 0
    weights, means, sigmas = (np.zeros((len(gold), network.components)) for _ in range(3))
    for table, answers in ((weights, found.weights), (means, found.means), (sigmas, found.sigmas)):
        table[there] = answers[mine[there]]
    whole = (inside[0] & inside[1])[gold]
    return Seen(there, wide[gold] >= 0, whole, weights, means, sigmas, len(found), false, false_wide)


def baselines(files: dict[Split, Path], bands: int) -> dict[str, tuple[Floats, Floats]]:
    """Redshifts (G,) and log densities at the truth (G,) of the gold galaxies of the test split, by kind of table."""
    read = {split: pq.read_table(file) for split, file in files.items()}
    z = {split: np.asarray(table["redshift"], np.float64) for split, table in read.items()}
    found = {}
    for kind in ("measured", "catalogue"):
        features = {split: table_features(table, kind, bands) for split, table in read.items()}
        boosted = Baseline().fit(features["train"], z["train"]).calibrate(features["calibration"], z["calibration"])
        density = boosted.densities(features["test"], GRID)
        found[kind] = boosted.predict(features["test"]), density.log_density(z["test"])
    return found


def scores(estimate: Floats, truth: Floats) -> dict[str, Any]:
    """Point metrics of the LSST convention, with bootstrap errors."""
    return rounded(point_metrics(estimate, truth, "lsst", np.random.default_rng(0)))


def by_magnitude(
    mode: Floats, boosted: Floats, truth: Floats, magnitude: Floats, found: NDArray[np.bool_], whole: NDArray[np.bool_]
) -> list[dict[str, Any]]:
    """Completeness, and scatter and outliers of network and boosting, in bins of magnitude."""
    rows = []
    for low, high in pairwise(MAGNITUDES):
        inside = (magnitude >= low) & (magnitude < high) & whole
        both = inside & found
        row: dict[str, Any] = {"magnitude": [low, high], "n": int(inside.sum()), "completeness": float(found[inside].mean())}
        for name, estimate in (("network", mode), ("gbm", boosted)):
            score = scores(estimate[both], truth[both])
            row |= {f"{name}_{key}": score[key] for key in ("bias", "sigma_iqr", "outlier_fraction")}
        rows.append(row)
    return rows


def judge(sky: ReferenceSky, seen: list[Seen], files: dict[Split, Path], pictures: Path) -> dict[str, Any]:
    """All figures."""
    bands = len(surveys.survey(sky.settings.survey).bands)
    table = pq.read_table(files["test"])
    truth, magnitude = (np.asarray(table[name], np.float64) for name in ("redshift", "mag"))
    seen_at_all, within_wide, whole = (
        np.concatenate([getattr(one, name) for one in seen]) for name in ("found", "within_wide", "whole")
    )
    found = seen_at_all & whole
    columns = [np.concatenate([getattr(one, name) for one in seen])[found] for name in ("weights", "means", "sigmas")]
    mixture = GaussianMixture.from_arrays(*columns)
    mode = np.full(len(truth), np.nan)
    mode[found] = mixture.mode().numpy()
    boosted = baselines(files, bands)
    network = scores(mode[found], truth[found])
    figure = redshift_scatter(truth[found], mode[found], point_metrics(mode[found], truth[found], "lsst", np.random.default_rng(0)))
    write_figure(figure, pictures / "photoz-network.png")
    z = torch.from_numpy(truth[found])
    rows: dict[str, Any] = {
        "network": network
        | {
            "mean_nll": float(-mixture.log_prob(z).mean()),
            "pit_ks": float(pit_ks(mixture.truncated_cdf(z).numpy())),
        }
    }
    for kind, (estimate, log_density) in boosted.items():
        finite = np.maximum(log_density, -20.0)
        rows[f"gbm_{kind}"] = scores(estimate[found], truth[found]) | {"mean_nll": float(-finite[found].mean())}
        rows[f"gbm_{kind}_of_all"] = scores(estimate[whole], truth[whole])
    share, detections = float(seen_at_all[whole].mean()), sum(one.detections for one in seen)
    limit = rows["gbm_measured"]["outlier_limit"]
    others = {"median": mixture.quantiles((0.5,))[:, 0].numpy(), "least_risk": mixture.least_risk().numpy()}
    rows |= {f"network_{name}": scores(estimate, truth[found]) for name, estimate in others.items()}
    told = {"network": mode[found], **{f"network_{name}": estimate for name, estimate in others.items()}}
    beyond = {
        name: float((np.abs(residual(estimate, truth[found], "lsst")) > limit).mean())
        for name, estimate in (told | {"gbm": boosted["measured"][0][found]}).items()
    }
    return {
        "beyond_outlier_limit_of_gbm": beyond,
        "gold": int(whole.sum()),
        "completeness": share,
        "completeness_error": float(np.sqrt(share * (1 - share) / whole.sum())),
        "completeness_with_borders": float(seen_at_all.mean()),
        "completeness_wide": float(within_wide[whole].mean()),
        "detections": detections,
        "purity": 1 - sum(one.false for one in seen) / detections,
        "purity_wide": 1 - sum(one.false_wide for one in seen) / detections,
        "radius_arcsec": RADIUS_ARCSEC,
        "radius_wide_arcsec": WIDE_ARCSEC,
        **rows,
        "by_magnitude": by_magnitude(mode, boosted["measured"][0], truth, magnitude, seen_at_all, whole),
    }


def report(figures: dict[str, Any]) -> list[str]:
    """What was found, a line each."""
    found, error = figures["completeness"], figures["completeness_error"]
    lines = [
        f"{figures['gold']} gold galaxies, completeness {found:.4f} ± {error:.4f}, purity {figures['purity']:.4f}",
        f"with those at borders {figures['completeness_with_borders']:.4f}",
        f"within {WIDE_ARCSEC:g} arcsec {figures['completeness_wide']:.4f}, purity {figures['purity_wide']:.4f}",
    ]
    for name, score in figures.items():
        if isinstance(score, dict) and "sigma_iqr" in score:
            nll = f"{score['mean_nll']:>8.3f}" if "mean_nll" in score else ""
            lines.append(
                f"{name:<22}{score['n']:>7}{score['bias']:>+9.4f}{score['sigma_iqr']:>9.4f} ± {score['sigma_iqr_error']:.4f}"
                f"{score['outlier_fraction']:>9.4f} ± {score['outlier_fraction_error']:.4f}{nll}"
            )
    lines += [
        f"i {row['magnitude'][0]:.1f} to {row['magnitude'][1]:.1f}{row['n']:>7} completeness {row['completeness']:.3f}"
        f" sigma_IQR {row['network_sigma_iqr']:.4f}, gbm {row['gbm_sigma_iqr']:.4f}"
        for row in figures["by_magnitude"]
    ]
    return lines


def main() -> None:
    """Look, judge, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/lsst-small"), help="ensemble folder")
    parser.add_argument("--sky", choices=reference_names(), default="lsst_reference")
    parser.add_argument("--quick", action="store_true", help="a tenth of the scenes; results go to the work folder")
    parser.add_argument(
        "--work", type=Path, default=Path("build/reference-sky"), help="folder of benchmarks.reference_sky's tables"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    check_reference(arguments.sky)
    sky, start = load_reference(arguments.sky), time.monotonic()
    arguments.work.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    files: dict[Split, Path] = {}
    with ProcessPoolExecutor(arguments.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for split in SPLITS:
            scenes = sky.splits[split].scenes
            count = max(2, int(scenes * QUICK_SHARE)) if arguments.quick else scenes
            _, files[split] = tables(sky, YEARS, split, count, arguments.work, keep=False, pool=pool)
        tasks = [Task(sky, index, arguments.model.resolve()) for index in range(count)]
        seen = list(counted(pool.map(look, tasks), len(tasks), "test scenes"))
    pictures = arguments.work if arguments.quick else Path(__file__).parent.parent / "docs"
    figures = judge(sky, seen, files, pictures)
    lines = [*report(figures), f"{time.monotonic() - start:.0f} s"]
    print("\n".join(lines))
    beyond = figures["beyond_outlier_limit_of_gbm"]
    network, boosted, of_all = figures["network"], figures["gbm_measured"], figures["gbm_measured_of_all"]
    others = {
        f"{what}_of_{name}": figures[f"network_{name}"][column] / boosted[column]
        for name in ("median", "least_risk")
        for what, column in (("sigma_iqr", "sigma_iqr"), ("outliers", "outlier_fraction"))
    }
    ratios = others | {
        "sigma_iqr_over_gbm": network["sigma_iqr"] / boosted["sigma_iqr"],
        "outliers_over_gbm": network["outlier_fraction"] / boosted["outlier_fraction"],
        "outliers_over_gbm_at_its_limit": beyond["network"] / beyond["gbm"],
        "outliers_of_median_at_its_limit": beyond["network_median"] / beyond["gbm"],
        "outliers_of_least_risk_at_its_limit": beyond["network_least_risk"] / beyond["gbm"],
        "sigma_iqr_over_gbm_of_all": network["sigma_iqr"] / of_all["sigma_iqr"],
        "outliers_over_gbm_of_all": network["outlier_fraction"] / of_all["outlier_fraction"],
    }
    print(ratios)
    folder = arguments.work if arguments.quick else record.RESULTS
    print(record.write("photoz", ratios=ratios, figures=figures, log=lines, folder=folder))


if __name__ == "__main__":
    main()
