"""The papers' studies, small but true: ``python -m benchmarks.studies --study NAME [--minutes 20] [--data FOLDER]``.

Every variant of a study (`benchmarks.study_list`) trains the preset `small`, from the same seed or from the same member of models/,
for as many steps as the minutes stand for at the speed of the machine that those members were trained on (`STEPS_PER_MINUTE`), so
that the result does not hang on how busy another machine is. All are judged on the test split of the frozen sky `lsst_reference`,
on the gold galaxies (i < 25.3) that every variant found. Studies of members ask those of models/lsst-ensemble, and train none. The
same command goes on where it was interrupted: trainings continue, answers that are there are used again.

Results go to benchmarks/results/study_NAME.json, figures and the page that puts them beside the papers' into docs/; ``--render``
writes the page anew from the results that are there, without any training.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from benchmarks import record, scoring
from benchmarks.scoring import Judged
from benchmarks.study_list import MEMBERS, START, STUDIES, TUNING, Sky, Study, Variant
from benchmarks.study_page import write_page
from benchmarks.study_sky import Answers, ask, data_set
from deepdisc_ops.config import TrainingConfig, load
from deepdisc_ops.inference.calibrating import learn_calibration
from deepdisc_ops.inference.ensemble import DESCRIPTION, Ensemble, digest, read_description, write_ensemble
from deepdisc_ops.model.precision import computes_bf16
from deepdisc_ops.photoz.figures import compared_values, write_figure
from deepdisc_ops.training.checkpoint import read_history
from deepdisc_ops.training.loop import train

Bools = NDArray[np.bool_]

STEPS_PER_MINUTE = 240
"""Of 6 crops, two ranks in bf16 on two cores (docs/training.md)."""
QUICK_STEPS = 8
PIT_SCORES = ("ks", "cvm", "ad")
METRICS = {
    "bias": "bias",
    "sigma_iqr": "$\\sigma_{IQR}$",
    "outlier_fraction": "outlier fraction",
    "nll": "NLL per galaxy",
    "ks": "PIT KS",
}


def steps_of(minutes: float) -> int:
    """Steps that so many minutes stand for."""
    return max(1, round(STEPS_PER_MINUTE * minutes))


class Runner:
    """Trains and asks the variants of studies in a work folder; what is there is not done again."""

    def __init__(self, work: Path, data: Path | None, *, steps: int, quick: bool) -> None:
        self.work, self.data, self.steps, self.quick = work, data, steps, quick
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.precision = "bf16" if computes_bf16(torch.device("cpu")) else "float32"

    def member(self, variant: Variant, tuned: bool) -> Path:
        """The best checkpoint of a variant's training; equal trainings of several studies are one."""
        dataset = data_set(
            variant.sky, self.data, self.work, quick=self.quick, processes=self.cores, progress=progress(f"sky {variant.sky}")
        )
        every = max(1, self.steps // 4)
        settings = [f"data.path={json.dumps(str(dataset.path))}", f"train.steps={self.steps}", f"train.validate_every={every}"]
        machine = [f"train.precision={self.precision}", f"train.ranks={self.cores}", "train.threads=1", "train.save_every=200"]
        hasty = ["inference.score_threshold=0.01", "train.batch_size=2"]  # so that next to nothing learned finds something
        overrides = [*settings, *(hasty if self.quick else machine), *variant.overrides]
        config: TrainingConfig = load(Path("small"), overrides)
        if tuned:
            start = self.start(config.model.bands)
            config = load(Path("small"), [*overrides, f"model.weights={json.dumps(str(start))}", *TUNING])
        out = self.work / "runs" / self.name(variant, tuned)
        train(
            config, out, report=lambda step, found: print(f"{variant.label}: step {step}, NLL {found['val_nll']:.3f}", flush=True)
        )
        return out / "best"

    def start(self, bands: Sequence[str]) -> Path:
        """The weights of `START`, its first convolution without the bands that are not among ``bands``."""
        source = Path(__file__).parents[1] / START
        description = read_description(source)
        file = self.work / "starts" / f"{short_digest(source)}-{''.join(bands)}.safetensors"
        if not file.is_file():
            tensors = load_file(source / description["members"][0]["file"])
            (first,) = (key for key in tensors if key.endswith("stem.conv1.weight"))
            kept = [description["bands"].index(band) for band in bands]
            tensors[first] = tensors[first][:, kept].contiguous()
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, file)
        return file

    def name(self, variant: Variant, tuned: bool) -> str:
        """Of the folder of a variant: what differs from the preset, where it starts, for how many steps, how it is computed."""
        start = [f"tuned-{short_digest(Path(__file__).parents[1] / START)}", *TUNING] if tuned else []
        words = [variant.sky, *variant.overrides, *start, f"{self.steps}", self.precision, f"ranks-{self.cores}"]
        return "_".join("".join(c if c.isalnum() else "-" for c in word) for word in words)

    def answers(self, variant: Variant, tuned: bool) -> tuple[Answers, Path]:
        """What the member of a variant says of the test split, and the folder of it as an ensemble."""
        name = self.name(variant, tuned)
        folder, member = self.work / "ensembles" / name, self.member(variant, tuned)
        if not (folder / DESCRIPTION).is_file():
            write_ensemble(folder, [member])
        return self._asked(name, variant.label, variant.sky), folder

    def members(self, count: int) -> tuple[Answers, Path]:
        """What the first ``count`` members of the published ensemble say together of the test split, and their folder."""
        source = Path(__file__).parents[1] / MEMBERS
        name = f"{source.name}-{count}-{short_digest(source)}"
        folder = self.work / "ensembles" / name
        if not (folder / DESCRIPTION).is_file():
            description = read_description(source)
            if len(description["members"]) < count:
                raise SystemExit(f"{source} has {len(description['members'])} members; the study asks {count}")
            description["members"] = description["members"][:count]
            folder.mkdir(parents=True, exist_ok=True)
            for member in description["members"]:
                shutil.copy(source / member["file"], folder)
            (folder / DESCRIPTION).write_text(yaml.safe_dump(description, sort_keys=False))
        return self._asked(name, name, "as_is"), folder

    def _asked(self, name: str, label: str, sky: Sky) -> Answers:
        """The answers of an ensemble of the work folder, without its calibration, kept."""
        file = self.work / "answers" / f"{name}.npz"
        if not file.is_file():
            ensemble = Ensemble.load(self.work / "ensembles" / name)
            ensemble.calibration = None
            dataset = data_set(sky, self.data, self.work, quick=self.quick, processes=self.cores, progress=progress("sky"))
            torch.set_num_threads(self.cores)
            ask(ensemble, dataset, "test", progress(f"{label}, test")).save(file)
        return Answers.load(file)


def short_digest(ensemble: Path) -> str:
    """What tells the weights of an ensemble from others in the name of a folder."""
    return digest(ensemble).removeprefix("sha256:")[:12]


def progress(what: str) -> Any:
    """A callback that prints every quarter."""

    def told(done: int, total: int) -> None:
        if done == total or (total >= 4 and done % (total // 4) == 0):
            print(f"{what}: {done}/{total}", flush=True)

    return told


def judged(answers: Answers, where: Bools, calibration: Any = None) -> Judged:
    """Modes and densities of the sources at ``where`` (G + S,) bool."""
    mixture = answers.mixture(where, calibration)
    return Judged.of_mixture(mixture.mode().numpy(), mixture, answers.redshift[where])


def training(work: Path, name: str) -> dict[str, Any]:
    """Where the member that is asked comes from: the commit and the ranks of its training, and its step."""
    member = yaml.safe_load((work / "runs" / name / "best" / "member.yaml").read_text())
    return {"commit": str(member["git_commit"])[:7], "ranks": member["config"]["train"]["ranks"], "step": member["step"]}


def curve(work: Path, name: str) -> list[list[float]]:
    """Step and validation NLL of a training, each time it was validated."""
    history = read_history(work / "runs" / name / "last")
    return [[entry["step"], scoring.rounded(entry["val_nll"])] for entry in history if "val_nll" in entry]


def tabulated(found: Mapping[str, Judged], truth: NDArray[np.float64]) -> dict[str, dict[str, Any]]:
    """The `scoring.scores` of each, and what differs from the first."""
    base = next(iter(found.values()))
    return {
        label: scoring.scores(one, truth) | ({} if one is base else {"less_first": scoring.differences(one, base, truth)})
        for label, one in found.items()
    }


def run(study: Study, runner: Runner) -> dict[str, Any]:
    """All figures of a study."""
    asked = {variant.label: runner.answers(variant, study.tuned) for variant in study.variants}
    asked |= {f"{count} member{'s' if count > 1 else ''}": runner.members(count) for count in study.ensembles}
    answers = {label: one for label, (one, _) in asked.items()}
    first = next(iter(answers.values()))
    if any(not np.array_equal(one.redshift, first.redshift) for one in answers.values()):
        answers = aligned(answers)
        first = next(iter(answers.values()))
    common = np.logical_and.reduce([one.found for one in answers.values()])
    galaxies = common & ~first.star
    if galaxies.sum() < 2:
        raise SystemExit(f"the variants found {int(galaxies.sum())} galaxies in common; train longer, or on more scenes")
    found = {label: judged(one, galaxies) for label, one in answers.items()}
    if study.calibration:
        for label, (one, folder) in asked.items():
            dataset = data_set("as_is", runner.data, runner.work, quick=runner.quick, processes=1, progress=progress("sky"))
            learned = learn_calibration(folder, dataset.path, progress=progress(f"{label}, calibration"))
            found[f"{label}, calibrated"] = judged(one, galaxies, learned.calibration)
    table = tabulated(found, first.redshift[galaxies])
    if study.stars:
        whole = {f"{label}, with stars": judged(one, common) for label, one in answers.items()}
        for label, one in tabulated(whole, first.redshift[common]).items():  # a star's z = 0 is at the end of every density: no PIT
            table[label] = {key: value for key, value in one.items() if key.removesuffix("_error") not in PIT_SCORES}
    return {
        "variants": table,
        "common": int(galaxies.sum()),
        "completeness": {label: scoring.rounded(float(one.found[~one.star].mean())) for label, one in answers.items()},
        "overrides": {variant.label: list(variant.overrides) for variant in study.variants},
        "skies": {variant.label: variant.sky for variant in study.variants},
        "steps": runner.steps if study.variants else None,
        "curves": {variant.label: curve(runner.work, runner.name(variant, study.tuned)) for variant in study.variants},
        "training": {variant.label: training(runner.work, runner.name(variant, study.tuned)) for variant in study.variants},
        "median_magnitude": scoring.rounded(float(np.median(first.magnitude[galaxies]))),
        "start": START if study.tuned else None,
        "precision": runner.precision if study.variants else None,
        "members": MEMBERS if study.ensembles else None,
        "batch": 6,
        "test": int((~first.star).sum()),
    }


def aligned(answers: Mapping[str, Answers]) -> dict[str, Answers]:
    """Answers about one sky at several depths, brought to the sources that are in every truth; a redshift tells a source."""
    keys = {label: list(zip(one.redshift.tolist(), one.magnitude.tolist(), strict=True)) for label, one in answers.items()}
    shared = set.intersection(*(set(found) for found in keys.values()))
    order: dict[str, Answers] = {}
    for label, one in answers.items():
        place = {key: row for row, key in enumerate(keys[label]) if key in shared}
        rows = np.array([place[key] for key in sorted(shared)], np.int64)
        order[label] = one.select(rows)
    return order


def keep(name: str, figures: Mapping[str, Any], log: Sequence[str], folder: Path, pictures: Path) -> Path:
    """The result file and the figure of a study."""
    variants = figures["variants"].items()
    values = {label: {key: (one.get(key, np.nan), one.get(f"{key}_error", np.nan)) for key in METRICS} for label, one in variants}
    write_figure(compared_values(values, METRICS), pictures / f"study-{name}.png")
    labels = list(figures["variants"])
    base = figures["variants"][labels[0]]
    ratios = {
        f"{what}_{label.replace(' ', '_').replace(',', '')}_over_first": round(figures["variants"][label][what] / base[what], 4)
        for label in labels[1:]
        for what in ("sigma_iqr", "outlier_fraction")
        if base[what]
    }
    return record.write(f"study_{name}", ratios=ratios, figures=figures, log=log, folder=folder, module="studies")


def main() -> None:
    """Train, judge, draw and keep, or write the page alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=sorted(STUDIES), action="append", help="by default all, one after the other")
    parser.add_argument("--minutes", type=float, default=20, help=f"of each training, {STEPS_PER_MINUTE} steps each")
    parser.add_argument("--data", type=Path, help="lsst_reference, where `simulate --reference` has made it")
    parser.add_argument("--work", type=Path, default=Path("build/studies"), help="folder of skies, checkpoints and answers")
    parser.add_argument("--render", action="store_true", help="write the page from the results that are there")
    parser.add_argument("--quick", action="store_true", help="a few steps on a mini sky; results go to the work folder")
    arguments = parser.parse_args()
    docs = Path(__file__).parents[1] / "docs"
    folder, pictures = (arguments.work, arguments.work) if arguments.quick else (record.RESULTS, docs)
    steps = QUICK_STEPS if arguments.quick else steps_of(arguments.minutes)
    for name in () if arguments.render else arguments.study or STUDIES:
        study, started = STUDIES[name], time.monotonic()
        runner = Runner(
            arguments.work / ("quick" if arguments.quick else "full"), arguments.data, steps=steps, quick=arguments.quick
        )
        figures = run(study, runner)
        lines = [
            study.title,
            *scoring.lines(figures["variants"]),
            f"{figures['common']} galaxies, {time.monotonic() - started:.0f} s",
        ]
        print("\n".join(lines))
        print(keep(name, figures, lines, folder, pictures))
    print(write_page(folder, pictures / "studies.md"))


if __name__ == "__main__":
    main()
