from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.table import Table, vstack
from scipy.stats import kstest

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.photoz.evaluation import Evaluation, catalog_mixture, evaluate
from deepdisc_ops.photoz.mixture import GaussianMixture, summarise

ARCSEC = 1 / 3600
SCATTER = 0.05


def field(seed: int = 1, n: int = 1200, stars: int = 100, found: float = 0.9, invented: int = 60) -> tuple[Table, Table]:
    """A catalogue and its truth: some gold galaxies missed, some objects invented, redshifts with calibrated densities."""
    rng = np.random.default_rng(seed)
    total = n + stars
    truth = Table(
        {
            "ra": 40 + rng.uniform(0, 0.1, total),
            "dec": rng.uniform(0, 0.1, total),
            "class": np.repeat([0, 1], [n, stars]),
            "redshift": np.r_[rng.gamma(4, 0.25, n) + 0.3, np.zeros(stars)],
            "mag_i": np.where(rng.random(total) < 0.6, 24.0, 26.0),
        }
    )
    kept = rng.permutation(np.flatnonzero(rng.random(total) < found))
    z_true = np.r_[np.asarray(truth["redshift"])[kept], rng.uniform(0.5, 2, invented)]
    sigma = SCATTER * (1 + z_true)
    mean = z_true + sigma * rng.standard_normal(len(z_true))
    # the second component is a copy of the first
    mixture = GaussianMixture.from_arrays(*(np.repeat(column[:, None], 2, 1) for column in (np.full(len(mean), 0.5), mean, sigma)))
    jitter = 0.1 * ARCSEC * rng.standard_normal((2, len(kept)))
    catalog = Table(
        {
            "ra": np.r_[truth["ra"][kept] + jitter[0], 40 + rng.uniform(0, 0.1, invented)],
            "dec": np.r_[truth["dec"][kept] + jitter[1], rng.uniform(0, 0.1, invented)],
            "mix_weights": mixture.weights.numpy(),
            "mix_means": mixture.means.numpy(),
            "mix_sigmas": mixture.sigmas.numpy(),
            **summarise(mixture),
        }
    )
    return catalog, truth


def run(catalog: Table, truth: Table, **options: object) -> Evaluation:
    return evaluate(catalog, truth, rng=np.random.default_rng(1), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tables() -> tuple[Table, Table]:
    return field()


@pytest.fixture(scope="module")
def evaluation(tables: tuple[Table, Table]) -> Evaluation:
    return run(*tables)


def test_it_counts_what_was_put_in(tables: tuple[Table, Table], evaluation: Evaluation) -> None:
    catalog, truth = tables
    gold = (np.asarray(truth["class"]) == 0) & (np.asarray(truth["mag_i"]) < 25.3)
    assert evaluation.n_gold == gold.sum()
    assert (evaluation.n_catalog, evaluation.n_truth) == (len(catalog), len(truth))
    assert evaluation.completeness.value == pytest.approx(0.9, abs=0.03)
    assert evaluation.purity.value == pytest.approx((len(catalog) - 60) / len(catalog), abs=0.015)
    assert 0 < evaluation.completeness_chance < 0.06
    assert 0 < evaluation.purity_chance < 0.06


def test_redshifts_are_judged_on_matched_gold_galaxies(tables: tuple[Table, Table], evaluation: Evaluation) -> None:
    catalog, truth = tables
    assert len(evaluation.gold_truth) == len(evaluation.gold_catalog) == evaluation.n_matched == evaluation.lsst.n
    assert np.all(truth["class"][evaluation.gold_truth] == 0)
    assert np.all(truth["mag_i"][evaluation.gold_truth] < 25.3)
    offset = np.asarray(catalog["dec"][evaluation.gold_catalog]) - np.asarray(truth["dec"][evaluation.gold_truth])
    assert np.abs(offset).max() < ARCSEC
    assert evaluation.lsst.sigma_iqr == pytest.approx(SCATTER, rel=0.15)
    assert evaluation.lsst.bias == -evaluation.jades.bias
    assert evaluation.gain_over_constant > 2
    assert evaluation.sigma_iqr_constant == pytest.approx(evaluation.gain_over_constant * evaluation.lsst.sigma_iqr)


def test_calibrated_densities_pass() -> None:
    catalog, truth = field(found=1.0, invented=0)  # so that no galaxy is matched to another's density
    evaluation = run(catalog, truth)
    z_true = np.asarray(truth["redshift"])[evaluation.gold_truth]
    entropy = np.log(SCATTER * (1 + z_true)).mean() + 0.5 * math.log(2 * math.pi * math.e)
    assert kstest(evaluation.pit, "uniform").pvalue > 0.01
    assert evaluation.pit_ks == pytest.approx(kstest(evaluation.pit, "uniform").statistic)
    assert evaluation.mean_nll == pytest.approx(entropy, abs=0.1)


def test_the_summary_is_json(evaluation: Evaluation) -> None:
    text = json.dumps(replace(evaluation, purity_chance=math.nan).as_dict(), allow_nan=False)
    assert json.loads(text)["purity_chance"] is None
    assert json.loads(text)["lsst"]["sigma_iqr"] == evaluation.lsst.sigma_iqr
    assert "gold_truth" not in json.loads(text)


def test_the_same_seed_gives_the_same_evaluation(tables: tuple[Table, Table], evaluation: Evaluation) -> None:
    assert run(*tables).as_dict() == evaluation.as_dict()


def test_row_order_is_irrelevant(tables: tuple[Table, Table], evaluation: Evaluation) -> None:
    catalog, truth = tables
    rng = np.random.default_rng(5)
    shuffled = run(catalog[rng.permutation(len(catalog))], truth[rng.permutation(len(truth))])
    for name in ("completeness", "purity", "n_matched", "pit_ks", "sigma_iqr_constant"):
        assert getattr(shuffled, name) == getattr(evaluation, name)
    assert shuffled.lsst.sigma_iqr == pytest.approx(evaluation.lsst.sigma_iqr)


def test_tables_survive_fits(tables: tuple[Table, Table], evaluation: Evaluation, tmp_path: Path) -> None:
    read = []
    for name, table in zip(("catalog", "truth"), tables, strict=True):
        table.write(tmp_path / f"{name}.fits")
        read.append(Table.read(tmp_path / f"{name}.fits"))
    assert run(*read).as_dict() == evaluation.as_dict()


def test_one_object_of_one() -> None:
    catalog, truth = field()
    one = run(*(table[index : index + 1] for table, index in zip((catalog, truth), matched_gold(catalog, truth), strict=True)))
    assert (one.completeness.value, one.purity.value, one.n_matched) == (1, 1, 1)
    assert one.lsst.sigma_iqr == 0
    assert json.dumps(one.as_dict(), allow_nan=False)


def matched_gold(catalog: Table, truth: Table) -> tuple[int, int]:
    evaluation = run(catalog, truth)
    return int(evaluation.gold_catalog[0]), int(evaluation.gold_truth[0])


def test_the_mixture_of_selected_rows(tables: tuple[Table, Table]) -> None:
    index = np.array([5, 2])
    np.testing.assert_allclose(catalog_mixture(tables[0], index).means.numpy(), tables[0]["mix_means"][index])
    assert len(catalog_mixture(tables[0])) == len(tables[0])


def test_missing_columns_are_named(tables: tuple[Table, Table]) -> None:
    catalog, truth = (table.copy() for table in tables)
    with pytest.raises(CatalogError, match=r"the truth lacks mag_r; it has the columns .*mag_i"):
        run(catalog, truth, gold_band="r")
    catalog.remove_columns(["z_mode", "mix_sigmas"])
    with pytest.raises(CatalogError, match=r"the catalogue lacks z_mode, mix_sigmas; it has the columns .* and \d+ more"):
        run(catalog, truth)


def test_fields_that_do_not_overlap_are_told_apart(tables: tuple[Table, Table]) -> None:
    catalog, truth = (table.copy() for table in tables)
    catalog["dec"] += 1.0
    with pytest.raises(CatalogError, match=r"centres of truth and catalogue are 3\d\d\d\.\d arcsec \(\S+ deg\) apart"):
        run(catalog, truth)


def test_an_empty_catalogue_and_a_truth_without_gold(tables: tuple[Table, Table]) -> None:
    catalog, truth = tables
    with pytest.raises(CatalogError, match="catalogue is empty"):
        run(catalog[:0], truth)
    with pytest.raises(CatalogError, match=r"none of the 1300 truth sources is a galaxy with mag_i < 12"):
        run(catalog, truth, gold_limit=12.0)


def test_estimates_that_are_nan_are_counted(tables: tuple[Table, Table], evaluation: Evaluation) -> None:
    catalog = tables[0].copy()
    catalog["z_mode"][evaluation.gold_catalog[:7]] = np.nan
    with pytest.raises(CatalogError, match=f"7 of the {evaluation.n_matched} z_mode values"):
        run(catalog, tables[1])


@pytest.mark.parametrize("masked", [False, True])
def test_galaxies_without_a_spectrum_count_in_completeness_alone(
    tables: tuple[Table, Table], evaluation: Evaluation, *, masked: bool
) -> None:
    """As in a real field: figures of redshifts are those of the galaxies whose redshift is known."""
    catalog, truth = tables[0], Table(tables[1], masked=True)
    dark = evaluation.gold_truth[::3]
    if masked:
        truth["redshift"].mask[dark] = True
    else:
        truth["redshift"][dark] = np.nan
    some = run(catalog, truth)
    assert (some.n_matched, some.n_judged) == (evaluation.n_matched, evaluation.n_matched - len(dark))
    assert (some.completeness, some.purity) == (evaluation.completeness, evaluation.purity)
    rest = np.setdiff1d(np.arange(evaluation.n_matched), np.arange(0, evaluation.n_matched, 3))
    np.testing.assert_array_equal(some.gold_truth, evaluation.gold_truth[rest])
    np.testing.assert_allclose(some.pit, evaluation.pit[rest])
    assert some.lsst.n == len(rest)
    truth["redshift"] = np.nan
    with pytest.raises(CatalogError, match=f"none of the {evaluation.n_matched} matched gold galaxies has a redshift"):
        run(catalog, truth)


def test_calibrated_intervals_hold_their_share(evaluation: Evaluation) -> None:
    for level, covered in evaluation.coverage.items():
        assert covered.value == pytest.approx(float(level), abs=4 * covered.error)
        inside = np.abs(evaluation.pit - 0.5) * 2 <= float(level)
        assert covered.value == inside.mean()


def test_sources_listed_twice_count_once(tables: tuple[Table, Table], evaluation: Evaluation) -> None:
    catalog, truth = tables
    twice = run(catalog, vstack([truth, truth[:70]]))
    assert twice.n_duplicates == 70
    for name in ("n_truth", "n_gold", "n_matched", "completeness", "purity", "pit_ks"):
        assert getattr(twice, name) == getattr(evaluation, name)
    assert twice.gold_truth.max() < len(truth)
    contradiction = truth[:1].copy()
    contradiction["redshift"] += 1
    with pytest.raises(CatalogError, match=r"1 pairs of truth sources lie at one place and differ in redshift, such as rows 0"):
        run(catalog, vstack([truth, contradiction]))


def test_every_estimate_bin_and_class_is_told(tables: tuple[Table, Table], evaluation: Evaluation) -> None:
    catalog, truth = tables
    assert list(evaluation.points) == ["mode", "best", "median", "mean"]
    assert evaluation.points["mode"] == evaluation.lsst
    assert list(evaluation.binned) == ["redshift"]  # all gold galaxies have one magnitude
    assert sum(one.metrics.n for one in evaluation.binned["redshift"]) == evaluation.n_matched
    assert evaluation.densities.ks.value == pytest.approx(evaluation.pit_ks)
    assert (evaluation.classes, evaluation.blended) == ((), None)
    classed, blended = catalog.copy(), truth.copy()
    classed["class"] = 0
    blended["blendedness"] = np.where(np.arange(len(truth)) % 3 == 0, 0.5, 0.0)
    more = run(classed, blended)
    galaxy, star = more.classes
    assert (galaxy.completeness.value, star.completeness.value) == (1, 0)  # type: ignore[union-attr]
    assert star.purity is None
    classed.meta["classes"] = "object"  # a model that tells nothing apart
    assert run(classed, blended).classes == ()
    assert more.blended is not None
    assert more.blended.n == (more.is_gold & (np.arange(len(truth)) % 3 == 0)).sum()
    assert [one.high for one in more.binned["blendedness"]] == [0.02, 1.0]
    json.dumps(more.as_dict(), allow_nan=False)


def test_all_redshifts_may_be_wrong(tables: tuple[Table, Table]) -> None:
    catalog, truth = (table.copy() for table in tables)
    catalog["z_mode"] = 9.0
    evaluation = run(catalog, truth)
    assert evaluation.jades.outlier_fraction == 1
    assert json.dumps(evaluation.as_dict(), allow_nan=False)


def test_densities_beyond_all_redshifts_are_judged_and_unusable_ones_named(tables: tuple[Table, Table]) -> None:
    catalog, truth = (table.copy() for table in tables)
    catalog["mix_means"] += 40
    evaluation = run(catalog, truth)
    assert evaluation.pit_ks == pytest.approx(1)
    assert evaluation.densities.pit_beyond == 1
    catalog["mix_sigmas"] = np.nan
    with pytest.raises(CatalogError, match="densities have no component"):
        run(catalog, truth)
