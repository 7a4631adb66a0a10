from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from deepdisc_ops.cli.compare import compare as command
from deepdisc_ops.errors import ConfigError
from deepdisc_ops.sweeps import compare
from deepdisc_ops.sweeps.compare import with_error
from deepdisc_ops.tracking import KIND_TAG, STATE_TAG, SWEEP_NAME_TAG, SWEEP_TAG, TRIAL_TAG, Tracker

TRIALS = [
    # backbone, parameters, fraction, lr, val_nll, state
    ("tiny", 0.3e6, 0.5, 0.01, -1.0, "finished"),
    ("tiny", 0.3e6, 0.5, 0.02, -1.1, "stopped_early"),
    ("tiny", 0.3e6, 1.0, 0.01, -1.3, "finished"),
    ("tiny", 0.3e6, 1.0, 0.02, math.inf, "finished"),
    ("small", 2e6, 0.5, 0.01, -1.2, "finished"),
    ("small", 2e6, 1.0, 0.01, -1.5, "finished"),
    ("small", 2e6, 1.0, 0.02, -1.4, "finished"),
    ("small", 2e6, 1.0, 0.03, None, "failed"),
    ("small", 2e6, 1.0, 0.04, -1.45, "running"),
]


def add_sweep(tracker: Tracker, name: str, shift: float = 0.0, **more: str) -> str:
    tags = {KIND_TAG: "sweep", SWEEP_NAME_TAG: name, "metric": "val_nll"}
    parent = tracker.find_or_create(name, (SWEEP_TAG, name), tags=tags)
    for i, (backbone, parameters, fraction, lr, nll, state) in enumerate(TRIALS):
        drawn: dict[str, Any] = {"model.backbone.name": backbone, "data.fraction": fraction, "train.lr": lr}
        own = {"backbone": backbone, "dataset": "scenes", "dataset_fraction": str(fraction), "last_step": "50", **more}
        if "training_images" in more:
            own["training_images"] = str(int(more["training_images"]) * fraction)
        own |= {STATE_TAG: state, "drawn": json.dumps(drawn), "wall_time_s": "3725"}
        run = tracker.find_or_create(f"{name}-{i}", (TRIAL_TAG, f"{name}_{i}"), parent=parent, tags=own)
        tracker.log_params(run, {"train.momentum": "0.9" if i % 2 else "0.8"})
        if nll is not None:
            metrics = {"best_val_nll": nll + shift, "best_val_nll_error": 0.02, "best_val_sigma_iqr": 0.04, "best_val_bias": 0.001}
            tracker.log_summary(run, 50, metrics | {"parameters": parameters})
        if state != "running":
            tracker.end(run, "FAILED" if state == "failed" else "FINISHED")
    tracker.end(parent)
    return parent


@pytest.fixture(scope="module")
def tracker(store_uri: str) -> Tracker:
    tracker = Tracker(store_uri)
    add_sweep(tracker, "scaling")
    add_sweep(tracker, "in-images", -0.5, training_images="1000")
    return tracker


def names(comparison: compare.Comparison) -> list[str]:
    return [trial.run.name for trial in comparison.trials]


def test_trials_are_sorted_by_the_metric_and_those_without_come_last(tracker: Tracker) -> None:
    found = compare.compare(tracker, ["scaling"])
    assert names(found) == [f"scaling-{i}" for i in (5, 8, 6, 2, 4, 1, 0, 3, 7)]
    both = compare.compare(tracker, ["scaling", "in-images"])
    assert [trial.sweep for trial in both.trials[:3]] == ["in-images"] * 3
    assert len(both.trials) == 18
    assert names(compare.compare(tracker, ["scaling", "scaling", found.parents[0].run_id])) == names(found)
    with pytest.raises(ConfigError, match="metric 'val_bias' cannot rank trials"):
        compare.compare(tracker, ["scaling"], "val_bias")
    with pytest.raises(ConfigError, match="no sweep 'gone'"):
        compare.compare(tracker, ["gone"])


def test_the_csv_holds_everything(tracker: Tracker, spaced: Path) -> None:
    path = spaced / "new" / "table.csv"
    compare.write_csv(compare.compare(tracker, ["scaling"]), path)
    table = pd.read_csv(path)
    assert table["trial"].tolist()[0] == "scaling-5"
    first = table.iloc[0]
    assert (first["data.fraction"], first["train.lr"], first["step"], first["parameters"]) == (1.0, 0.01, 50, 2_000_000)
    assert (first["val_nll"], first["val_nll_error"], first["val_bias"], first["wall_time_s"]) == (-1.5, 0.02, 0.001, 3725)
    assert math.isnan(table.set_index("trial").loc["scaling-7", "val_nll"])


def test_the_short_table_reads_well(tracker: Tracker) -> None:
    table = compare.short_table(compare.compare(tracker, ["scaling"]))
    assert list(table.columns) == [
        *("trial", "state", "backbone", "fraction", "lr", "steps"),
        *("nll", "sigma_iqr", "outliers", "completeness", "weights", "time"),
    ]
    assert table.iloc[0].tolist() == ["5", "finished", "small", "1", "0.01", "50", "-1.500(20)", "0.04", "-", "-", "2 M", "1:02:05"]
    assert "sweep" in compare.short_table(compare.compare(tracker, ["scaling", "in-images"]))
    assert compare.short_table(compare.compare(tracker, ["scaling"], "val_sigma_iqr")).columns[6] == "sigma_iqr"


def test_markdown_is_a_table_of_as_many_rows(tracker: Tracker) -> None:
    head, rule, *rows = compare.markdown(compare.compare(tracker, ["scaling"])).splitlines()
    assert head.startswith("| trial")
    assert set(rule) <= set("|:-")
    assert [row.count("|") for row in rows] == [head.count("|")] * 9


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.03651, 0.00111, "0.0365(11)"),
        (-1.5, 0.02, "-1.500(20)"),
        (0.123, 0.0996, "0.12(10)"),
        (1234.5, 12.4, "1234(12)"),
        (1234.5, 321.0, "1234 ± 3.2e+02"),
        (0.5, math.nan, "0.5"),
        (0.5, 0.0, "0.5"),
        (math.inf, 0.1, "-"),
        (math.nan, math.nan, "-"),
    ],
)
def test_errors_are_written_in_the_last_digits(value: float, error: float, text: str) -> None:
    assert with_error(value, error) == text


@given(st.floats(-1e3, 1e3), st.floats(1e-6, 10))
def test_value_and_error_can_be_read_back(value: float, error: float) -> None:
    digits, _, rest = with_error(value, error).partition("(")
    unit = 10.0 ** -len(digits.partition(".")[2])
    assert float(digits) == pytest.approx(value, abs=0.51 * unit)
    assert int(rest.rstrip(")")) * unit == pytest.approx(error, rel=0.051)


def test_the_best_trial_that_ran_to_its_end_stands_for_its_size(tracker: Tracker) -> None:
    found = compare.compare(tracker, ["scaling"])
    series = compare.scaling(found, lambda trial: trial.number("dataset_fraction"), lambda trial: trial.run.tags["backbone"])
    assert list(series) == ["small", "tiny"]

    def drawn(name: str) -> Mapping[float, float]:
        one = series[name]
        return dict(zip(one.size[one.best].tolist(), one.values["val_nll"][one.best].tolist(), strict=True))

    assert drawn("tiny") == {0.5: -1.0, 1.0: -1.3}
    assert drawn("small") == {0.5: -1.2, 1.0: -1.5}
    assert len(series["tiny"].size) == 3
    assert len(series["small"].size) == 3
    assert (~series["tiny"].whole).sum() == 1


def test_figures_are_drawn_where_sizes_differ(tracker: Tracker, spaced: Path) -> None:
    found = compare.compare(tracker, ["scaling"])
    paths = compare.write_figures(found, spaced / "all", by=["train.momentum"])
    assert sorted(path.name for path in paths) == ["dataset-size.png", "dataset-size.svg", "model-size.png", "model-size.svg"]
    svg = ElementTree.tostring(ElementTree.parse(spaced / "all" / "dataset-size.svg").getroot(), "unicode")
    assert "svg" in svg[:100]
    one_size = compare.Comparison(
        found.metric,
        found.parents,
        tuple(t for t in found.trials if t.run.tags["backbone"] == "tiny" and t.values["data.fraction"] == 1),
    )
    assert compare.write_figures(one_size, spaced / "none") == []


def test_sizes_are_in_images_where_all_trials_say_how_many(tracker: Tracker) -> None:
    def labels(*sweeps: str) -> list[str]:
        return [figure.label for figure in compare._scaling_figures(compare.compare(tracker, sweeps), ())]

    assert labels("scaling") == ["share of the training set", "parameters / $10^6$"]
    assert labels("in-images")[0] == "training images"
    assert labels("scaling", "in-images")[0] == "share of the training set"
    of_both = compare.compare(tracker, ["scaling", "in-images"])
    lines = {compare._scaling_figures(of_both, ["train.momentum"])[1].line(trial) for trial in of_both.trials}
    assert "whole training set, scaling, momentum 0.8" in lines


def test_the_command_writes_and_logs_back(tracker: Tracker, spaced: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    where = ["--tracking-uri", tracker.uri, "--csv", str(spaced / "t.csv"), "--markdown", str(spaced / "t.md")]
    told = CliRunner().invoke(app, ["scaling", *where, "--figures", str(spaced / "figures")], catch_exceptions=False)
    assert told.exit_code == 0
    assert "9 trials of scaling, best val_nll first" in told.output
    assert (spaced / "t.csv").exists()
    assert (spaced / "t.md").exists()
    assert len(list((spaced / "figures").iterdir())) == 4
    parent = compare.compare(tracker, ["scaling"]).parents[0]
    logged = [f"compare/{name}" for name in ("dataset-size.png", "dataset-size.svg", "model-size.png", "model-size.svg")]
    assert tracker.artifacts(parent.run_id, "compare") == sorted([*logged, "compare/table.csv", "compare/table.md"])
    assert tracker.record(parent.run_id).status == "FINISHED"
    CliRunner().invoke(app, ["in-images", "scaling", "--tracking-uri", tracker.uri], catch_exceptions=False)
    assert "compare/in-images+scaling/table.csv" in tracker.artifacts(parent.run_id, "compare/in-images+scaling")


def test_a_sweep_without_trials_says_so(store_uri: str) -> None:
    tracker = Tracker(store_uri)
    tracker.find_or_create("empty", (SWEEP_TAG, "empty"), tags={KIND_TAG: "sweep", SWEEP_NAME_TAG: "empty"})
    with pytest.raises(ConfigError, match="empty in .* holds no trial yet"):
        compare.compare(tracker, ["empty"])
