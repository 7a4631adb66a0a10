"""Trials of one sweep or several side by side, straight from MLflow: a table, and metrics against the sizes of data and network.

A trial is judged by its best checkpoint; the errors are those of `best_<metric>_error`, bootstrap over objects. In a scaling
figure the best trial stands for all of one line and size, as one would use that and no other: the mean over learning rates or
restarts would say more about the ranges that were drawn from than about the size. All others are shown beside it.
"""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deepdisc_ops.errors import ConfigError
from deepdisc_ops.photoz.figures import ScalingSeries, scaling_curves, write_figure
from deepdisc_ops.sweeps.select import BEST, find_sweep
from deepdisc_ops.sweeps.space import DIRECTIONS
from deepdisc_ops.tracking import STATE_TAG, SWEEP_NAME_TAG, RunRecord, Tracker

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

FOLDER = "compare"
"""Artifact folder of a sweep's run."""
SHOWN = ("val_nll", "val_sigma_iqr", "val_outliers", "val_completeness")
IMAGES_TAG, SECONDS_TAG = "training_images", "wall_time_s"
"""Of a trial: the images of its share of the training set, and the seconds its training took in all its attempts."""
ENDED = ("finished", "stopped_early")
MISSING = "-"


@dataclass(frozen=True)
class Trial:
    """One trial of the sweep named ``sweep``."""

    sweep: str
    run: RunRecord

    @property
    def state(self) -> str:
        """As the sweep says, or else as MLflow does."""
        return self.run.tags.get(STATE_TAG) or self.run.status.lower()

    @cached_property
    def values(self) -> dict[str, Any]:
        """What was drawn, by dotted key."""
        return json.loads(self.run.tags.get("drawn", "{}"))

    def best(self, metric: str) -> float:
        """A metric of the best checkpoint; NaN for none."""
        return self.run.metrics.get(BEST + metric, math.nan)

    def number(self, name: str) -> float:
        """A number among the run's tags or metrics; NaN for none."""
        return float(self.run.tags.get(name, self.run.metrics.get(name, math.nan)))


@dataclass(frozen=True)
class Comparison:
    """Trials, best by ``metric`` first, those without it last; ``parents`` are the runs of their sweeps."""

    metric: str
    parents: tuple[RunRecord, ...]
    trials: tuple[Trial, ...]


def compare(tracker: Tracker, sweeps: Sequence[str], metric: str | None = None) -> Comparison:
    """The trials of sweeps, each by its name or the id of its run; the metric is that of the first sweep unless given."""
    parents = {parent.run_id: parent for parent in (find_sweep(tracker, sweep) for sweep in sweeps)}
    if not parents:
        raise ConfigError("no sweep to compare; name at least one")
    metric = metric or next(iter(parents.values())).tags.get("metric", "val_nll")
    if metric not in DIRECTIONS:
        raise ConfigError(f"metric {metric!r} cannot rank trials; expected one of {', '.join(DIRECTIONS)}")
    sign = 1 if DIRECTIONS[metric] == "min" else -1
    trials = [Trial(parent.tags[SWEEP_NAME_TAG], run) for parent in parents.values() for run in tracker.children(parent.run_id)]
    if not trials:
        raise ConfigError(f"{', '.join(sweeps)} in {tracker.uri} holds no trial yet; compare when the first has started")

    def rank(trial: Trial) -> tuple[bool, bool, float, str, str]:
        value = trial.best(metric)
        known = math.isfinite(value)
        return trial.state == "failed", not known, sign * value if known else 0.0, trial.sweep, trial.run.name

    return Comparison(metric, tuple(parents.values()), tuple(sorted(trials, key=rank)))


def full_table(comparison: Comparison) -> pd.DataFrame:
    """Every trial with all that is known of it, a column each, in plain numbers."""
    import pandas as pd

    keys, metrics = _drawn_keys(comparison), _metrics_of(comparison)
    return pd.DataFrame(
        [
            {
                "sweep": trial.sweep,
                "trial": trial.run.name,
                "run_id": trial.run.run_id,
                "state": trial.state,
                **{key: trial.values.get(key) for key in keys},
                "step": trial.number("last_step"),
                **{name: trial.best(name) for name in metrics},
                "parameters": trial.number("parameters"),
                SECONDS_TAG: trial.number(SECONDS_TAG),
                "backbone": trial.run.tags.get("backbone"),
                "dataset": trial.run.tags.get("dataset"),
                "dataset_fraction": trial.number("dataset_fraction"),
                IMAGES_TAG: trial.number(IMAGES_TAG),
            }
            for trial in comparison.trials
        ]
    ).astype({"step": "Int64", "parameters": "Int64", IMAGES_TAG: "Int64"})


def short_table(comparison: Comparison) -> pd.DataFrame:
    """The same for reading: text alone, metrics of the best checkpoints with errors in brackets, and less of it."""
    import pandas as pd

    keys = _drawn_keys(comparison)
    heads = _short_names(keys)
    shown = list(dict.fromkeys([comparison.metric, *SHOWN]))
    several = len(comparison.parents) > 1
    return pd.DataFrame(
        [
            {
                **({"sweep": trial.sweep} if several else {}),
                "trial": trial.run.name.removeprefix(f"{trial.sweep}-"),
                "state": trial.state.replace("_", " "),
                **{heads[key]: _text(trial.values.get(key)) for key in keys},
                "steps": trial.run.tags.get("last_step", MISSING),
                **{name.removeprefix("val_"): with_error(trial.best(name), trial.best(f"{name}_error")) for name in shown},
                "weights": _millions(trial.number("parameters")),
                "time": _duration(trial.number(SECONDS_TAG)),
            }
            for trial in comparison.trials
        ]
    )


def markdown(comparison: Comparison) -> str:
    """`short_table` in Markdown."""
    table = short_table(comparison).map(lambda text: str(text).replace("|", "\\|"))
    return table.to_markdown(index=False, disable_numparse=True) + "\n"


def write_csv(comparison: Comparison, path: Path) -> None:
    """Write `full_table`; unknown values are empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    full_table(comparison).to_csv(path, index=False)


def scaling(comparison: Comparison, size: Callable[[Trial], float], line: Callable[[Trial], str]) -> dict[str, ScalingSeries]:
    """Series of `photoz.figures.scaling_curves`: the trials that ended with the metric, by ``line``, against their ``size``.

    The best trial of a size is one that was trained to its end, where there is one.
    """
    usable = [
        trial
        for trial in comparison.trials
        if trial.state in ENDED and math.isfinite(trial.best(comparison.metric)) and size(trial) > 0
    ]
    series = {}
    for name in sorted({line(trial) for trial in usable}, key=_natural):
        # sorting leaves the better ones before the worse
        trials = sorted((trial for trial in usable if line(trial) == name), key=lambda trial: trial.state != "finished")
        first: dict[float, Trial] = {}
        for trial in trials:
            first.setdefault(size(trial), trial)
        series[name] = ScalingSeries(
            np.array([size(trial) for trial in trials]),
            {metric: np.array([trial.best(metric) for trial in trials]) for metric in SHOWN},
            {metric: np.array([trial.best(f"{metric}_error") for trial in trials]) for metric in SHOWN},
            np.array([first[size(trial)] is trial for trial in trials]),
            np.array([trial.state == "finished" for trial in trials]),
        )
    return series


def write_figures(comparison: Comparison, folder: Path, by: Sequence[str] = ()) -> list[Path]:
    """Draw metrics against the sizes of the training set and of the network, as PNG and SVG, where the trials differ in them.

    Lines are the backbones or the shares of the training set, and the sweeps and data sets where there are several; ``by`` are
    dotted keys of the settings that tell further lines apart.
    """
    paths = []
    title = f"lines: the trial of best {comparison.metric} at each size; bars: bootstrap errors over objects"
    for figure in _scaling_figures(comparison, by):
        series = scaling(comparison, figure.size, figure.line)
        if len({size for one in series.values() for size in one.size.tolist()}) < 2:
            log.info("no figure %s: the trials do not differ in %s", figure.name, figure.label)
            continue
        metrics = [metric for metric in SHOWN if any(np.isfinite(one.values[metric]).any() for one in series.values())]
        drawn = scaling_curves(series, metrics, size=figure.label, title=title)
        for ending in ("png", "svg"):
            paths.append(folder / f"{figure.name}.{ending}")
            write_figure(drawn, paths[-1])
    return paths


def log_back(tracker: Tracker, comparison: Comparison, by: Sequence[str] = ()) -> str:
    """Store table and figures in the runs of the sweeps; returns the artifact folder.

    A comparison of several sweeps has a folder of its own, under the names of all.
    """
    names = [parent.tags[SWEEP_NAME_TAG] for parent in comparison.parents]
    folder = FOLDER if len(names) == 1 else f"{FOLDER}/{'+'.join(names)}"
    with tempfile.TemporaryDirectory(prefix="compare-") as scratch:
        write_csv(comparison, Path(scratch) / "table.csv")
        (Path(scratch) / "table.md").write_text(markdown(comparison))
        write_figures(comparison, Path(scratch), by)
        for parent in comparison.parents:
            tracker.log_artifact(parent.run_id, Path(scratch), folder)
    return folder


def with_error(value: float, error: float) -> str:
    """A value with its error in units of the last digits: 0.0365(11) is 0.0365 ± 0.0011; without an error, four digits."""
    if not math.isfinite(value):
        return MISSING
    if not (math.isfinite(error) and error > 0):
        return f"{value:.4g}"
    decimals = 1 - math.floor(math.log10(float(f"{error:.1e}")))  # of the error as it is rounded: 0.0996 is 0.10
    if decimals < 0:
        return f"{value:.4g} ± {error:.2g}"
    return f"{value:.{decimals}f}({round(error * 10**decimals)})"


def _drawn_keys(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(key for trial in comparison.trials for key in trial.values))


def _metrics_of(comparison: Comparison) -> list[str]:
    """All metrics of best checkpoints, those that are shown first, each before its error."""
    known = {key.removeprefix(BEST) for trial in comparison.trials for key in trial.run.metrics if key.startswith(BEST)}
    first = [name for shown in SHOWN for name in (shown, f"{shown}_error") if name in known]
    return [*first, *sorted(known - set(first))]


def _short_names(keys: Sequence[str]) -> Mapping[str, str]:
    """The last part of each dotted key, or as many as tell it from the others; "name" alone says nothing."""
    names = {}
    for key in keys:
        parts = key.split(".")
        if parts[-1] == "name" and len(parts) > 1:
            parts = parts[:-1]
        same = [other for other in keys if other != key and other.split(".")[-1] == parts[-1]]
        names[key] = ".".join(parts[-2:]) if same else parts[-1]
    return names if len(set(names.values())) == len(names) else {key: key for key in keys}


@dataclass(frozen=True)
class _ScalingFigure:
    """What a scaling figure shows: the ``size`` of a trial, and the texts that together name its line."""

    name: str
    label: str
    size: Callable[[Trial], float]
    parts: Sequence[Callable[[Trial], str]]

    def line(self, trial: Trial) -> str:
        return ", ".join(part(trial) for part in self.parts)


def _scaling_figures(comparison: Comparison, by: Sequence[str]) -> tuple[_ScalingFigure, _ScalingFigure]:
    """Those of the training set's size, in images where all trials say how many, and of the network's."""
    ended = [trial for trial in comparison.trials if trial.state in ENDED]
    in_images = all(math.isfinite(trial.number(IMAGES_TAG)) for trial in ended)
    origin: list[Callable[[Trial], str]] = [lambda trial: trial.sweep, lambda trial: trial.run.tags.get("dataset", MISSING)]
    common = [part for part in origin if len({part(trial) for trial in comparison.trials}) > 1]
    common += [partial(_setting, key, short) for key, short in _short_names(by).items()]
    tag, label = (IMAGES_TAG, "training images") if in_images else ("dataset_fraction", "share of the training set")
    share = partial(_share, tag)
    return (
        _ScalingFigure("dataset-size", label, lambda trial: trial.number(tag), [_backbone, *common]),
        _ScalingFigure("model-size", "parameters / $10^6$", lambda trial: trial.number("parameters") / 1e6, [share, *common]),
    )


def _backbone(trial: Trial) -> str:
    return trial.run.tags.get("backbone", MISSING)


def _share(tag: str, trial: Trial) -> str:
    size = trial.number(tag)
    if tag == IMAGES_TAG:
        return f"{size:g} images"
    return "whole training set" if size == 1 else f"{size:g} of the training set"


def _setting(key: str, short: str, trial: Trial) -> str:
    return f"{short} {trial.run.params.get(key, MISSING)}"


def _natural(name: str) -> list[tuple[float, str]]:
    """Numbers inside names in their order."""
    return [(float(number) if number else math.inf, text) for number, text in re.findall(r"(\d+(?:\.\d+)?)|(\D+)", name)]


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _millions(count: float) -> str:
    return f"{count / 1e6:.3g} M" if math.isfinite(count) else MISSING


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return MISSING
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
