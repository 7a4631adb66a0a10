"""Networks against catalogue codes: ``python -m benchmarks.photoz [--model FOLDER] [--sky NAME] [--each] [--quick]``.

The test scenes of a frozen sky go through an ensemble of any number of members, which sees their images and E(B-V) alone. The
codes' answers are those that `benchmarks.baselines` kept before, in the folder ``--baselines``: from fluxes in five apertures at
the true positions in the same images, learned from the gold galaxies (i < 25.3) of the same sky's train split.

All are judged on the galaxies that the network found, clear of the border of their scene, which is the scene's and not the sky's;
completeness with the border is told, and within 1", the radius of the papers. What the network does not find, blends above all,
counts against it in completeness alone: the codes' scores on all galaxies, and on all blends, stand beside. Redshifts of the
network are modes (medians and the redshifts of the least risk stand beside), scatter and outliers those of the LSST paper, whose
limit is three times one's own sigma_IQR: how many lie beyond that of each code is told too. ``calibrated`` is the ensemble with
what `members calibrate` has learned.

``--each`` looks with every member alone as well, on the galaxies that all of them found, for the scatter over members.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import differential_entropy

from benchmarks import record, scoring
from benchmarks.codes import CODES
from benchmarks.gold import Gold, Traits, read_gold, read_traits, scene_count
from benchmarks.looking import RADIUS_ARCSEC, WIDE_ARCSEC, Look, Seen, look
from benchmarks.reference_sky import counted
from benchmarks.scoring import BLENDED, EDGES, Judged
from deepdisc_ops.data.reference import ReferenceSky, check_reference, load_reference, reference_names
from deepdisc_ops.inference.ensemble import digest, read_description
from deepdisc_ops.photoz.calibration import Calibration
from deepdisc_ops.photoz.figures import binned_statistics, redshift_scatter, write_figure
from deepdisc_ops.photoz.metrics import (
    PointMetrics,
    binned_metrics,
    completeness,
    ensemble_metrics,
    pit_ks,
    point_metrics,
    residual,
)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

SHORT = {"gradient_boosting": "gbm"}
"""Codes whose ratios have a shorter name."""


def looks(sky: ReferenceSky, model: Path, member: int | None, scenes: int, pool: Executor, work: Path) -> Seen:
    """All test scenes, seen by an ensemble or by one member of it; what the work folder holds is not looked at again."""
    title = "test scenes" if member is None else f"test scenes, member {member}"
    which = "all" if member is None else f"member{member}"
    file = work / f"{sky.name}_{scenes}_{digest(model).removeprefix('sha256:')[:16]}_{which}.npz"
    if not file.is_file():
        tasks = [Look(sky, index, model, member) for index in range(scenes)]
        Seen.together(list(counted(pool.map(look, tasks), scenes, title))).save(file)
    return Seen.load(file)


def estimates(seen: Seen, where: Bools, truth: Floats, calibration: Calibration | None) -> dict[str, Judged]:
    """The network by its modes, medians and redshifts of the least risk, without and with its calibration."""
    mixture = seen.mixture(where)
    named = {
        "network": mixture.mode(),
        "network_median": mixture.quantiles((0.5,))[:, 0],
        "network_least_risk": mixture.least_risk(),
    }
    found = {name: Judged.of_mixture(z.numpy(), mixture, truth[where]) for name, z in named.items()}
    if calibration is not None:
        mixture = seen.mixture(where, calibration)
        named = {"calibrated": mixture.mode(), "calibrated_least_risk": mixture.least_risk()}
        found |= {name: Judged.of_mixture(z.numpy(), mixture, truth[where]) for name, z in named.items()}
    return found


def read_baselines(folder: Path, truth: Floats) -> dict[str, Judged]:
    """The codes whose answers are there."""
    found = {code: scoring.read(folder / f"{code}.npz", truth) for code in CODES if (folder / f"{code}.npz").is_file()}
    if not found:
        raise SystemExit(f"{folder} holds no code's answers; run `python -m benchmarks.baselines` on the same scenes first")
    return found


def unfrozen(codes: Mapping[str, Judged], sky: str) -> list[str]:
    """Codes whose answers are not those of the kept result, which were frozen before any network was judged."""
    file = record.RESULTS / f"{record.of_sky('baselines', sky)}.json"
    kept = json.loads(file.read_text())["figures"].get(sky, {}).get("codes", {}) if file.is_file() else {}
    return [name for name, judged in codes.items() if kept.get(name, {}).get("digest") != scoring.digest(judged)]


def judge(seen: Seen, gold: Gold, traits: Traits, codes: Mapping[str, Judged], calibration: Calibration | None) -> dict[str, Any]:
    """All figures of the ensemble beside the codes."""
    where = seen.found & traits.whole
    truth = gold.redshift[where]
    rows = estimates(seen, where, gold.redshift, calibration) | {name: judged.select(where) for name, judged in codes.items()}
    main = "calibrated" if calibration is not None else "network"
    shown = {name: rows[name] for name in (main, f"{main}_least_risk", *codes)}
    columns = {"magnitude": gold.magnitude, "redshift": gold.redshift, "blendedness": traits.blendedness}
    found = completeness(traits.whole, np.flatnonzero(seen.found))
    table = {name: scoring.scores(judged, truth) for name, judged in rows.items()}
    limits = {name: table[name]["outlier_limit"] for name in codes}
    return {
        "gold": int(traits.whole.sum()),
        "completeness": found.value,
        "completeness_error": found.error,
        "completeness_with_borders": float(seen.found.mean()),
        "completeness_wide": float(seen.within_wide[traits.whole].mean()),
        "detections": seen.detections,
        "purity": 1 - seen.false / seen.detections,
        "purity_wide": 1 - seen.false_wide / seen.detections,
        "radius_arcsec": RADIUS_ARCSEC,
        "radius_wide_arcsec": WIDE_ARCSEC,
        "main": main,
        "entropy": scoring.rounded(float(differential_entropy(truth))),  # less the NLL: what densities know, nats at least
        "scores": table,
        "of_all": {
            name: scoring.scores(judged.select(traits.whole), gold.redshift[traits.whole]) for name, judged in codes.items()
        },
        "codes_missing": [name for name in CODES if name not in codes],
        "over": compared(rows, shown, codes, truth),
        "beyond_limit_of": {
            code: {name: float((np.abs(residual(one.redshift, truth, "lsst")) > limit).mean()) for name, one in rows.items()}
            for code, limit in limits.items()
        },
        **blends({name: rows[name] for name in shown}, seen, gold, traits, codes),
        "binned": {column: scoring.binned(shown, truth, values[where], EDGES[column]) for column, values in columns.items()},
        "completeness_binned": {
            column: complete_in_bins(seen.found[traits.whole], values[traits.whole], EDGES[column])
            for column, values in columns.items()
        },
    }


def compared(
    rows: Mapping[str, Judged], shown: Collection[str], codes: Collection[str], truth: Floats
) -> dict[str, dict[str, dict[str, float]]]:
    """The network's estimates ``shown`` over each code."""
    mine = [name for name in shown if name not in codes]
    return {code: {name: scoring.over(rows[name], rows[code], truth) for name in mine} for code in codes}


def blends(rows: Mapping[str, Judged], seen: Seen, gold: Gold, traits: Traits, codes: Mapping[str, Judged]) -> dict[str, Any]:
    """Scores of the significant blends that the network found, the share it found, and the codes' scores on all of them."""
    where, every = seen.found & traits.whole, traits.whole & (traits.blendedness > BLENDED)
    blended, truth = every[where], gold.redshift[where & every]
    if blended.sum() < 2:
        return {"blended": {name: {"n": int(blended.sum())} for name in rows}}
    found = {name: one.select(blended) for name, one in rows.items()}
    return {
        "blended": {name: scoring.scores(one, truth) for name, one in found.items()},
        "blended_over": compared(found, found, codes, truth),
        "blended_completeness": asdict(completeness(every, np.flatnonzero(seen.found))),
        "blended_of_all": {name: scoring.scores(one.select(every), gold.redshift[every]) for name, one in codes.items()},
    }


def complete_in_bins(found: Bools, column: Floats, edges: Sequence[float]) -> list[dict[str, float]]:
    """How many of the galaxies (N,) were found, in bins of a column (N,)."""
    rows = []
    for low, high, inside in scoring.bins(column, edges):
        if inside.any():
            share = completeness(inside, np.flatnonzero(found))
            rows.append({"low": low, "high": high, **{name: scoring.rounded(value) for name, value in asdict(share).items()}})
    return rows


def ratios(figures: Mapping[str, Any], codes: Mapping[str, Judged]) -> dict[str, float]:
    """Scatter and outliers of the network over those of each code, of all galaxies and of the blended ones; PIT KS."""
    main, table, blended = figures["main"], figures["scores"], figures["blended"]
    risk = f"{main}_least_risk"
    found: dict[str, float] = {f"pit_ks_{name}": table[name]["ks"] for name in ("network", "calibrated") if name in table}
    for code in codes:
        short, beyond = SHORT.get(code, code), figures["beyond_limit_of"][code]
        for name, suffix in ((main, ""), (risk, "_of_least_risk")):
            found[f"sigma_iqr_over_{short}{suffix}"] = table[name]["sigma_iqr"] / table[code]["sigma_iqr"]
            found[f"outliers_over_{short}{suffix}"] = table[name]["outlier_fraction"] / table[code]["outlier_fraction"]
            found[f"outliers_over_{short}_at_its_limit{suffix}"] = beyond[name] / beyond[code]
            found[f"cde_loss_minus_{short}{suffix}"] = table[name]["cde_loss"] - table[code]["cde_loss"]
        if "sigma_iqr" in blended[main]:
            found[f"blended_sigma_iqr_over_{short}"] = blended[main]["sigma_iqr"] / blended[code]["sigma_iqr"]
            found[f"blended_outliers_over_{short}"] = blended[main]["outlier_fraction"] / blended[code]["outlier_fraction"]
    return {name: round(value, 4) for name, value in found.items()}


def members(alone: list[Seen], together: Seen, gold: Gold, traits: Traits) -> dict[str, Any]:
    """Every member by itself and the ensemble, on the galaxies that all found; the mean and scatter over members."""
    common = traits.whole & together.found & np.logical_and.reduce([one.found for one in alone])
    truth = gold.redshift[common]

    def of(seen: Seen) -> tuple[PointMetrics, dict[str, float]]:
        judged = Judged.of_mixture(seen.mixture(common).mode().numpy(), seen.mixture(common), truth)
        points = point_metrics(judged.redshift, truth, "lsst", np.random.default_rng(0))
        shown = {name: scoring.rounded(getattr(points, name)) for name in ("bias", "sigma_iqr", "outlier_fraction")}
        return points, shown | {"nll": scoring.rounded(float(judged.nll.mean())), "pit_ks": scoring.rounded(pit_ks(judged.pit))}

    rows = [of(one) for one in alone]
    over = ensemble_metrics([points for points, _ in rows])
    return {
        "common": int(common.sum()),
        "members": [shown for _, shown in rows],
        "mean_and_scatter": {name: [scoring.rounded(part) for part in estimate] for name, estimate in over.items()},
        "ensemble": of(together)[1],
    }


def draw(seen: Seen, gold: Gold, traits: Traits, codes: Mapping[str, Judged], calibration: Calibration | None, stem: Path) -> None:
    """The redshifts, and the ensemble against the codes in bins."""
    where = seen.found & traits.whole
    truth, mode = gold.redshift[where], seen.mixture(where, calibration).mode().numpy()
    write_figure(redshift_scatter(truth, mode, point_metrics(mode, truth, "lsst", np.random.default_rng(0))), stem)
    redshifts = {"network": mode} | {name.replace("_", " "): judged.redshift[where] for name, judged in codes.items()}
    columns = {"magnitude": ("i (AB mag)", gold.magnitude), "blendedness": ("blendedness", traits.blendedness)}
    for column, (title, values) in columns.items():
        series = {
            name: binned_metrics(z, truth, values[where], EDGES[column], "lsst", np.random.default_rng(0), samples=100, least=20)
            for name, z in redshifts.items()
        }
        if any(series.values()):
            write_figure(binned_statistics(series, title), stem.with_name(f"{stem.stem}-{column}.png"))


def report(figures: Mapping[str, Any]) -> list[str]:
    """What was found, a line each."""
    found = f"completeness {figures['completeness']:.4f} ± {figures['completeness_error']:.4f}, purity {figures['purity']:.4f}"
    lines = [
        f"{figures['gold']} gold galaxies, {found}",
        f"with those at borders {figures['completeness_with_borders']:.4f}",
        f"within {WIDE_ARCSEC:g} arcsec {figures['completeness_wide']:.4f}, purity {figures['purity_wide']:.4f}",
        *scoring.lines(figures["scores"]),
        *over_lines(figures["over"]),
        f"at blendedness above {BLENDED}",
        *scoring.lines({name: one for name, one in figures["blended"].items() if "sigma_iqr" in one}),
        *over_lines(figures.get("blended_over", {})),
    ]
    if "blended_of_all" in figures:
        share = figures["blended_completeness"]
        lines.append(f"the codes on all of those, of which the network found {share['value']:.3f} ± {share['error']:.3f}")
        lines += scoring.lines(figures["blended_of_all"])
    for column, rows in figures["binned"].items():
        lines += scoring.binned_lines(rows, list(figures["blended"]), column)
    for number, one in enumerate(figures.get("alone", {}).get("members", ())):
        lines.append(f"member {number} alone: " + ", ".join(f"{name} {value:.4f}" for name, value in one.items()))
    return lines


def over_lines(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """The network's scatter and outliers over those of each code, a line each."""
    return [
        f"{name} over {code}: sigma_IQR {one['sigma_iqr']:.3f} ± {one['sigma_iqr_error']:.3f}, outliers "
        f"{one['outlier_fraction']:.3f} ± {one['outlier_fraction_error']:.3f}, beyond its limit {one['beyond_its_limit']:.3f} ± "
        f"{one['beyond_its_limit_error']:.3f}"
        for code, rows in table.items()
        for name, one in rows.items()
    ]


def main() -> None:
    """Look, judge, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/lsst-small"), help="ensemble folder")
    parser.add_argument("--sky", choices=reference_names(), default="lsst_reference")
    parser.add_argument("--each", action="store_true", help="look with every member alone too")
    parser.add_argument("--baselines", type=Path, default=Path("build/baselines"), help="--out of benchmarks.baselines")
    parser.add_argument("--quick", action="store_true", help="a tenth of the scenes; results go to the work folder")
    parser.add_argument(
        "--work", type=Path, default=Path("build/reference-sky"), help="folder of benchmarks.reference_sky's tables"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    check_reference(arguments.sky)
    sky, model, start = load_reference(arguments.sky), arguments.model.resolve(), time.monotonic()
    description = read_description(model)
    learned = description.get("calibration")
    calibration = None if learned is None else Calibration.from_dict(learned)
    arguments.work.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    scenes = scene_count(sky, "test", quick=arguments.quick)
    with ProcessPoolExecutor(arguments.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        gold = read_gold(sky, "test", arguments.work, quick=arguments.quick, pool=pool)
        traits = read_traits(sky, arguments.work, quick=arguments.quick, pool=pool)
        codes = read_baselines(arguments.baselines / (f"{sky.name}-quick" if arguments.quick else sky.name), gold.redshift)
        seen = looks(sky, model, None, scenes, pool, arguments.work)
        count = len(description["members"])
        alone = (
            [looks(sky, model, member, scenes, pool, arguments.work) for member in range(count)]
            if arguments.each and count > 1
            else []
        )
    figures = judge(seen, gold, traits, codes, calibration) | {"members": count}
    if alone:
        figures["alone"] = members(alone, seen, gold, traits)
    if not arguments.quick:
        figures["codes_not_as_frozen"] = unfrozen(codes, sky.name)
        if figures["codes_not_as_frozen"]:
            print(
                f"NOT AS FROZEN in results/{record.of_sky('baselines', sky.name)}.json: {', '.join(figures['codes_not_as_frozen'])}"
            )
    lines = [*report(figures), f"{time.monotonic() - start:.0f} s"]
    found = ratios(figures, codes)
    print("\n".join([*lines, *(f"{name}: {value:g}" for name, value in found.items())]))
    name = record.of_sky("photoz", sky.name)
    pictures = arguments.work if arguments.quick else Path(__file__).parents[1] / "docs"
    draw(seen, gold, traits, codes, calibration, pictures / f"{name.replace('_', '-')}-network.png")
    folder = arguments.work if arguments.quick else record.RESULTS
    print(record.write(name, ratios=found, figures=figures, log=lines, folder=folder, module="photoz"))


if __name__ == "__main__":
    main()
