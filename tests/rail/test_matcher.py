"""The matcher, and RAIL's evaluators on what it gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rail.core.stage")

import qp
import torch
from rail.evaluation.evaluator import OldEvaluator
from scipy import stats

from deepdisc_ops.api import simulate_mosaic
from deepdisc_ops.data.records import GALAXY
from deepdisc_ops.data.store import Dataset, create_dataset, open_dataset
from deepdisc_ops.data.writer import DatasetWriter
from deepdisc_ops.errors import CatalogError
from deepdisc_ops.photoz import metrics
from deepdisc_ops.photoz.mixture import GaussianMixture
from deepdisc_ops.rail import DeepdiscMatcher
from deepdisc_ops.sky.catalog import read_catalog
from deepdisc_ops.sky.images import open_mosaic

BANDS = "ugrizy"


def matcher(**config: Any) -> DeepdiscMatcher:
    return DeepdiscMatcher.make_stage(name="match", **{"split": "validation"} | config)


def estimate(columns: dict[str, Any], rng: np.random.Generator) -> qp.Ensemble:
    """As the estimator's: densities and fluxes for objects at the places of ``columns``, the true redshift in ``truth``."""
    n = len(columns["x"])
    mixture = {
        "weights": rng.dirichlet(np.ones(3), n),
        "means": columns["truth"][:, None] + rng.normal(0, 0.1, (n, 3)),
        "stds": rng.uniform(0.05, 0.2, (n, 3)),
    }
    fluxes = {f"flux_{band}": rng.uniform(50, 500, n) for band in BANDS} | {f"flux_err_{band}": np.full(n, 5.0) for band in BANDS}
    z_mode = GaussianMixture.from_arrays(*mixture.values()).mode().numpy()
    ancil = {"id": np.arange(n), "ebv": np.full(n, 0.1), "z_mode": z_mode} | fluxes | columns
    return qp.Ensemble(qp.mixmod, data=mixture, ancil=ancil)


def of_records(dataset: Dataset, rng: np.random.Generator, split: str = "validation") -> qp.Ensemble:
    """An estimate of every object of the truth, in no order, and as many that are nowhere."""
    parts = []
    for number, record in enumerate(dataset.records(split)):
        truth = record.objects
        for x in (truth.x, truth.x - 1000):
            place = {"x": x + rng.normal(0, 0.2, len(x)), "y": truth.y, "ra": truth.ra, "dec": truth.dec}
            parts.append(place | {"truth": truth.redshift.astype(float), "image": np.full(len(x), number)})
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    shuffled = rng.permutation(len(columns["x"]))
    return estimate({name: column[shuffled] for name, column in columns.items()}, rng)


def test_galaxies_of_the_truth_are_matched_image_by_image(mini_dataset: Path, rng: np.random.Generator) -> None:
    dataset = open_dataset(mini_dataset)
    found = of_records(dataset, rng)
    made = matcher().match(found, dataset)
    densities, table = made["output"](), made["photometry"]()
    gold = sum(
        int(((r.objects.classes == GALAXY) & np.isfinite(r.objects.redshift) & (r.objects.mag < 25.3)).sum())
        for r in dataset.records("validation")
    )
    assert densities.npdf == len(table["redshift"]) > 0
    assert 0.9 * gold <= densities.npdf <= gold  # of two within 0.5 arcsec, one may take the other's place
    exact = np.isclose(table["redshift"], densities.ancil["truth"])
    assert exact.mean() > 0.9
    np.testing.assert_array_equal(densities.ancil["id"], table["id"])
    assert (np.diff(table["id"]) > 0).all()  # in the order of the estimate
    grid = np.linspace(0, 3, 301)
    mixture = [found.objdata[name][table["id"]] for name in ("weights", "means", "stds")]
    density = GaussianMixture.from_arrays(*mixture).truncated_density(grid)
    np.testing.assert_allclose(densities.pdf(grid), density / np.trapezoid(density, grid)[:, None], rtol=1e-6, atol=1e-9)


def test_magnitudes_are_dereddened_with_rails_coefficients(mini_dataset: Path, rng: np.random.Generator) -> None:
    dataset = open_dataset(mini_dataset)
    found = of_records(dataset, rng)
    found.ancil["flux_u"][:] = -3.0
    found.ancil["flux_g"][:] = np.nan
    table = matcher().match(found, dataset)["photometry"]()
    row = table["id"]
    np.testing.assert_allclose(table["mag_r_lsst"], 31.4 - 2.5 * np.log10(found.ancil["flux_r"][row]) - 0.1 * 2.70)
    np.testing.assert_allclose(table["mag_err_r_lsst"], 2.5 / np.log(10) * 5.0 / found.ancil["flux_r"][row])
    np.testing.assert_allclose(table["mag_u_lsst"], 31.4 - 2.5 * np.log10(5.0) - 0.1 * 4.81)  # the 1-sigma limit
    assert (table["mag_g_lsst"] == 99).all()


def test_a_mosaic_is_matched_to_the_truth_it_carries(tmp_path: Path, rng: np.random.Generator) -> None:
    simulate_mosaic(tmp_path / "sky.fits", side=192, seed=3)
    truth = read_catalog(tmp_path / "sky.fits", "TRUTH")
    names = {"x": "x", "y": "y", "ra": "ra", "dec": "dec", "truth": "redshift"}
    columns = {ours: np.asarray(truth[theirs], float) for ours, theirs in names.items()}
    found = estimate(columns | {"image": np.zeros(len(truth), int)}, rng)
    gold = (np.asarray(truth["class"]) == GALAXY) & (np.asarray(truth["mag_i"]) < 24)
    with open_mosaic(tmp_path / "sky.fits") as mosaic:
        made = matcher(gold_limit=24.0).match(found, mosaic)
        np.testing.assert_array_equal(made["photometry"]()["id"], np.flatnonzero(gold))
        np.testing.assert_allclose(made["photometry"]()["redshift"], columns["truth"][gold])
        truth["mag_i"].name = "magnitude"
        truth["ra", "dec", "class", "redshift", "magnitude"].write(tmp_path / "truth.fits")
        with pytest.raises(CatalogError, match=r"^the truth lacks the columns mag_i; expected ra, dec, class, redshift, mag_i$"):
            matcher(truth=str(tmp_path / "truth.fits")).match(found, mosaic)


def test_galaxies_whose_redshift_is_nan_are_left_out(mini_dataset: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    old = open_dataset(mini_dataset)
    found = of_records(old, rng)
    for name, known in (("some", 3), ("none", 0)):
        dataset = create_dataset(tmp_path / name, old.info)
        with DatasetWriter(dataset) as writer:
            for record in old.records("validation"):
                redshift = record.objects.redshift.copy()
                gold = np.flatnonzero((record.objects.classes == GALAXY) & (record.objects.mag < 25.3))
                redshift[gold[known:]] = np.nan
                writer.add(replace(record, objects=replace(record.objects, redshift=redshift)))
        if known:
            redshifts = matcher().match(found, dataset.refresh())["photometry"]()["redshift"]
            assert 0 < len(redshifts) <= known * len(old.records("validation"))
            assert np.isfinite(redshifts).all()
        else:
            with pytest.raises(
                CatalogError, match=r"^none of \d+ objects lies within 0\.5 arcsec of a galaxy with a redshift[^\n]*$"
            ):
                matcher().match(found, dataset.refresh())


def test_what_cannot_be_made_is_told_in_a_line(mini_dataset: Path, rng: np.random.Generator) -> None:
    dataset = open_dataset(mini_dataset)
    found = of_records(dataset, rng)
    with pytest.raises(CatalogError, match=r"^\d+ of \d+ densities are zero or not finite from 8\.0 to 9\.0; widen the grid"):
        matcher(zmin=8.0, zmax=9.0).match(found, dataset)
    dark = qp.Ensemble(
        qp.mixmod,
        data={name: found.objdata[name] for name in ("weights", "means", "stds")},
        ancil={name: column for name, column in found.ancil.items() if not name.startswith("flux")},
    )
    with pytest.raises(CatalogError, match=r"^the estimate has no fluxes; run DeepdiscEstimator with photometry$"):
        matcher().match(dark, dataset)


# of scipy's anderson_ksamp, as qp calls it
@pytest.mark.filterwarnings("ignore:p-value capped:UserWarning", "ignore:p-value floored:UserWarning")
@pytest.mark.filterwarnings("ignore:Parameter `variant` has been introduced:UserWarning")
def test_rails_evaluator_and_our_metrics_agree_to_the_tolerance_of_its_grid(mini_dataset: Path, rng: np.random.Generator) -> None:
    dataset = open_dataset(mini_dataset)
    found = of_records(dataset, rng, "train")
    grid = {"zmin": 0.0, "zmax": 6.0, "nzbins": 6001}
    step = 1e-3
    made = matcher(split="train", **grid).match(found, dataset)
    evaluator = OldEvaluator.make_stage(name="evaluate", hdf5_groupname="", **grid | {"nzbins": 6000})
    theirs = {name: float(value[0]) for name, value in evaluator.evaluate(made["output"], made["photometry"])().items()}

    table = made["photometry"]()
    rows, z = table["id"], table["redshift"]
    mixture = [found.objdata[name][rows] for name in ("weights", "means", "stds")]
    pit = GaussianMixture.from_arrays(*mixture).truncated_cdf(torch.as_tensor(z)).numpy()
    ours = metrics.density_metrics(*mixture, z, rng, samples=2)
    points = metrics.point_metrics(found.ancil["z_mode"][rows], z, "lsst", rng, samples=2)
    n = len(z)
    assert n > 20
    assert theirs["PIT_KS_stat"] == pytest.approx(ours.ks.value, abs=1e-5)
    assert theirs["PIT_CvM_stat"] == pytest.approx(ours.cvm.value, abs=1e-4)
    # RAIL's AD is another statistic: of two samples, the second a regular one, brought to unit width (scipy's anderson_ksamp)
    assert theirs["PIT_AD_stat"] == pytest.approx(stats.anderson_ksamp([pit, np.linspace(0, 1, n)]).statistic, abs=1e-3)
    assert theirs["PIT_OutRate_stat"] == pytest.approx(ours.pit_beyond, abs=0.01 + 1 / n)  # a CDF of 100 quantiles
    assert theirs["CDE_stat"] == pytest.approx(ours.cde_loss.value, rel=2 * step)
    assert theirs["POINT_Bias"] == pytest.approx(points.bias, abs=step)
    assert theirs["POINT_SimgaIQR"] == pytest.approx(points.sigma_iqr, abs=2 * step)
    assert theirs["POINT_OutlierRate"] == pytest.approx(points.outlier_fraction, abs=1.01 / n)
