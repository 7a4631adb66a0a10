"""The parts of the programs of benchmarks/ that take no training: what they compare, keep and write."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from benchmarks import metrics, photoz, record, scoring, studies, study_page
from benchmarks.information import common
from benchmarks.scoring import Judged
from benchmarks.studies import aligned
from benchmarks.study_list import STUDIES
from benchmarks.study_sky import Answers
from deepdisc_ops.inference import ensemble


@pytest.fixture
def judged(rng: np.random.Generator) -> tuple[Judged, np.ndarray]:
    """What a code says of 200 galaxies, and their true redshifts."""
    truth = rng.uniform(0.2, 1.5, 200)
    return Judged(truth + 0.03 * rng.standard_normal(200), rng.random(200), rng.normal(size=200), rng.normal(size=200)), truth


def test_features_are_compared_on_the_galaxies_that_all_have(rng: np.random.Generator) -> None:
    redshift = rng.uniform(0, 2, 30)
    features = rng.normal(size=(30, 3)).astype(np.float32)
    broken = features.copy()
    broken[4, 1] = np.nan
    order = rng.permutation(30)[:25]
    rows, z = common({"all": (features, redshift), "broken": (broken, redshift), "some": (features[order], redshift[order])})
    expected = np.setdiff1d(order, [4])
    assert len(z) == len(expected)
    assert (np.diff(z) > 0).all()
    for values in rows.values():
        np.testing.assert_array_equal(values, features[expected[np.argsort(redshift[expected])]])


def test_answers_are_kept_and_those_of_other_galaxies_refused(judged: tuple[Judged, np.ndarray], spaced: Path) -> None:
    one, truth = judged
    told = scoring.keep(one, truth, spaced / "code.npz")
    again = scoring.read(spaced / "code.npz", truth)
    assert scoring.digest(again) == told
    np.testing.assert_array_equal(again.pit, one.pit)
    assert scoring.digest(one.select(np.arange(199))) != told
    with pytest.raises(ValueError, match="about other galaxies than these 200"):
        scoring.read(spaced / "code.npz", truth[::-1])


def test_every_galaxy_is_in_one_bin_that_at_the_last_edge_too(judged: tuple[Judged, np.ndarray]) -> None:
    one, truth = judged
    column = np.linspace(0, 1, 200)
    rows = scoring.binned({"code": one}, truth, column, (0.0, 0.5, 1.0))
    assert [row["n"] for row in rows] == [100, 100]


def test_differences_have_the_errors_of_pairs(judged: tuple[Judged, np.ndarray]) -> None:
    one, truth = judged
    wider = replace(one, redshift=truth + 1.1 * (one.redshift - truth), nll=one.nll + 0.2)
    found = scoring.differences(wider, one, truth)
    table = scoring.scores(one, truth)
    assert found["sigma_iqr"] == pytest.approx(0.1 * table["sigma_iqr"], rel=1e-3)
    assert 0 < found["sigma_iqr_error"] < 0.2 * table["sigma_iqr_error"]
    assert (found["nll"], found["nll_error"]) == (pytest.approx(0.2), pytest.approx(0, abs=1e-9))
    assert set(scoring.differences(one, one, truth).values()) == {0.0}


def test_ratios_have_the_errors_of_pairs(judged: tuple[Judged, np.ndarray]) -> None:
    one, truth = judged
    far = np.where(np.arange(truth.size) < 10, 1.0, 0.0)  # ten outliers, and twenty of the other
    base = replace(one, redshift=one.redshift + far * (1 + truth))
    other = replace(one, redshift=one.redshift + (far + np.roll(far, 10)) * (1 + truth))
    found = scoring.over(other, base, truth)
    assert found["outlier_fraction"] == found["beyond_its_limit"] == pytest.approx(2.0)
    assert scoring.over(base, base, truth) == {key: (0.0 if key.endswith("_error") else 1.0) for key in found}


def test_completeness_in_bins_counts_every_galaxy_once() -> None:
    rows = photoz.complete_in_bins(np.array([True, False, True, True]), np.array([0.1, 0.2, 0.5, 1.0]), (0.0, 0.5, 0.7, 1.0))
    assert [(row["n"], row["value"]) for row in rows] == [(2, 0.5), (1, 1.0), (1, 1.0)]


def test_codes_that_changed_since_they_were_frozen_are_named(
    judged: tuple[Judged, np.ndarray], spaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", spaced)
    one, _ = judged
    for sky, file in (("lsst_reference", "baselines"), ("lsst_reference_dc2", "baselines_lsst_reference_dc2")):
        kept = {"figures": {sky: {"codes": {"bpz": {"digest": scoring.digest(one)}}}}}
        (spaced / f"{file}.json").write_text(json.dumps(kept))
        assert photoz.unfrozen({"bpz": one}, sky) == []
        assert photoz.unfrozen({"bpz": one.select(np.arange(50)), "other": one}, sky) == ["bpz", "other"]
    assert photoz.unfrozen({"bpz": one}, "another sky") == ["bpz"]


def answers(redshift: np.ndarray) -> Answers:
    n = len(redshift)
    mixture = (np.ones((n, 1)), redshift[:, None], np.full((n, 1), 0.1))
    return Answers(redshift, 20 + redshift, np.zeros(n, bool), np.ones(n, bool), *mixture)


def test_skies_of_two_depths_are_compared_source_by_source() -> None:
    found = aligned({"deep": answers(np.array([0.3, 0.1, 0.7, 0.5])), "shallow": answers(np.array([0.7, 0.1, 0.3]))})
    for one in found.values():
        np.testing.assert_array_equal(one.redshift, [0.1, 0.3, 0.7])
        np.testing.assert_array_equal(one.means[:, 0], one.redshift)


def test_trainings_from_another_member_are_others(spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = studies.Runner(spaced / "work", None, steps=10, quick=True)
    variant = STUDIES["depth"].variants[0]
    names, starts = set(), set()
    for place in ("first", "second"):
        folder = shutil.copytree(Path(__file__).parents[2] / "models" / "lsst-small", spaced / place)
        description = folder / ensemble.DESCRIPTION
        description.write_text(f"{description.read_text()}# {place}\n")
        monkeypatch.setattr(studies, "START", str(folder))
        names |= {runner.name(variant, tuned) for tuned in (False, True)}
        starts |= {runner.start(bands) for bands in ("ugrizy", "griz")}
    assert len(names) == 3  # one of them from scratch
    assert len(starts) == 4
    assert {load_file(start)["backbone.bottom_up.stem.conv1.weight"].shape[1] for start in starts} == {4, 6}


def test_the_page_has_a_section_for_every_study_run_or_not(judged: tuple[Judged, np.ndarray], spaced: Path) -> None:
    figures = {
        "variants": {
            "5 years": scoring.scores(*judged),
            "1 year": scoring.scores(*judged) | {"less_first": scoring.differences(judged[0], *judged)},
        },
        "common": 150,
        "completeness": {"5 years": 0.9},
        "steps": 960,
        "training": {label: {"commit": "def", "ranks": 1, "step": step} for label, step in (("5 years", 720), ("1 year", 960))},
        "median_magnitude": 23.21,
        "curves": {"5 years": [[480, -0.5], [720, -0.8], [960, -0.75]], "1 year": [[960, -0.3]]},
        "members": None,
        "batch": 6,
        "test": 200,
    }
    result = {"figures": figures, "command": "python -m benchmarks.studies", "commit": "abc", "date": "2026-01-01"}
    (spaced / "study_depth.json").write_text(json.dumps(result))
    text = study_page.write_page(spaced, spaced / "docs" / "studies.md").read_text()
    assert text.count("\n## ") == len(STUDIES)
    assert text.count("Not run yet") == len(STUDIES) - 1
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| ")]
    lengths, shown = {len(row) for row in rows}, {row[1]: row[4] for row in rows}
    assert len(lengths) == 1
    assert shown == {"": "less the first's", "5 years": "", "1 year": "+0.0000 ± 0.0000"}
    assert "150 galaxies that all found, of 200, their median i 23.2; completeness: 5 years 90.0 %" in text
    assert "of which the better one is asked: 5 years -0.800, -0.750." in text
    assert study_page.ADAPTED not in text
    trained = "6 crops each (commit def, ranks 1; asked as they were after 720, 960)"
    assert f"{trained}; `python -m benchmarks.studies`, commit abc" in text


def test_the_statistics_of_a_survey_on_a_small_one() -> None:
    """Densities that are right by construction; the limits of time and memory are those of the kept result."""
    found = metrics.measure(4000)
    assert found["ks"] < 1.95 / np.sqrt(4000)
    assert found["objects"] == 4000
    lists = metrics.measure_lists(4000)
    assert lists["sky_matched"] > 0.99
    assert lists["box_matched"] > 0.99
    assert lists["cells_used"] > 500
