"""Catalogues side by side, and in a tracking store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from astropy.table import Table
from typer.testing import CliRunner

from deepdisc_ops.cli import app
from deepdisc_ops.errors import CatalogError
from deepdisc_ops.photoz import metrics
from deepdisc_ops.report import compare_files, comparison_rows

N = 300


@pytest.fixture
def truth(spaced: Path, rng: np.random.Generator) -> Path:
    table = Table({"ra": 50 + rng.uniform(0, 0.05, N), "dec": rng.uniform(0, 0.05, N), "class": np.zeros(N, np.int32)})
    table["redshift"] = rng.gamma(4, 0.2, N)
    table["mag_i"] = rng.uniform(20, 25, N)
    table.write(spaced / "truth.ecsv")
    return spaced / "truth.ecsv"


def catalogue(truth: Path, name: str, width: float, seed: int, rows: slice = slice(None)) -> Path:
    """A catalogue of some true sources, in another order, whose redshifts are off by ``width`` (1 + z)."""
    rng = np.random.default_rng(seed)
    source = Table.read(truth)[rows]
    source = source[rng.permutation(len(source))]
    z = np.asarray(source["redshift"])
    found = Table({"ra": source["ra"], "dec": source["dec"]})
    found["z_mode"] = np.maximum(z + width * (1 + z) * rng.standard_normal(len(z)), 0)
    found["mix_weights"] = np.ones((len(z), 1))
    found["mix_means"] = np.asarray(found["z_mode"])[:, None]
    found["mix_sigmas"] = (width * (1 + z))[:, None]
    path = truth.parent / f"{name}.ecsv"
    found.write(path)
    return path


def test_catalogues_are_judged_on_the_galaxies_all_found(truth: Path, tmp_path: Path) -> None:
    paths = [
        catalogue(truth, "sharp", 0.02, 1),
        catalogue(truth, "early", 0.05, 2, slice(200)),
        catalogue(truth, "late", 0.05, 3, slice(100, None)),
    ]
    comparison = compare_files(paths, truth, tmp_path)
    assert comparison.common == 100
    assert [one.name for one in comparison.catalogs] == ["sharp", "early", "late"]
    assert [one.lsst.n for one in comparison.catalogs] == [100] * 3
    assert [one.completeness.value for one in comparison.catalogs] == pytest.approx([1, 2 / 3, 2 / 3])
    sharp = Table.read(paths[0])
    table = Table.read(truth)
    place = {round(float(ra), 9): row for row, ra in enumerate(sharp["ra"])}
    rows = [place[round(float(ra), 9)] for ra in table["ra"][100:200]]
    expected = metrics.sigma_iqr(metrics.residual(sharp["z_mode"][rows], table["redshift"][100:200], "lsst"))
    assert comparison.catalogs[0].lsst.sigma_iqr == pytest.approx(float(expected), rel=1e-12)
    assert comparison.scatter is not None
    others = [one.lsst.sigma_iqr for one in comparison.catalogs[1:]]
    assert comparison.scatter["sigma_iqr"].value == pytest.approx(np.mean(others))
    assert comparison.scatter["sigma_iqr"].error == pytest.approx(np.std(others, ddof=1))
    kept = json.loads((tmp_path / "comparison.json").read_text())
    assert kept["catalogs"]["late"]["sigma_iqr"]["value"] == others[1]
    assert (tmp_path / "comparison.png").stat().st_size > 5000
    assert all(len(row) == 5 for row in comparison_rows(comparison))


def test_catalogues_without_a_common_galaxy_are_refused(truth: Path, tmp_path: Path) -> None:
    paths = [catalogue(truth, "one", 0.05, 1, slice(100)), catalogue(truth, "two", 0.05, 2, slice(100, 200))]
    with pytest.raises(CatalogError, match="no gold galaxy is in all of one, two"):
        compare_files(paths, truth, tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_evaluation_is_one_run_of_a_store_however_often(truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepdisc_ops.cli.console import console
    from deepdisc_ops.tracking import Tracker, store_uri

    monkeypatch.setattr(console, "stderr", False)  # --json turns it; back afterwards
    path, store, out = catalogue(truth, "sharp", 0.02, 1), tmp_path / "records" / "mlflow.db", tmp_path / "out"
    other = catalogue(truth, "other", 0.05, 2)
    words = ["evaluate", str(path), "--truth", str(truth), "--out", str(out), "--track", str(store), "--against", str(other)]
    for _ in range(2):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    tracker = Tracker(store_uri(str(store)), create=False)
    runs = tracker.runs({"deepdisc_ops.kind": "evaluation"})
    assert [run.run_id for run in runs] == [told["run"]]
    figures = json.loads((out / "metrics.json").read_text())
    assert {name: told[name] for name in figures} == figures
    assert told["against"] == json.loads((out / "comparison.json").read_text())
    assert runs[0].metrics["lsst_sigma_iqr"] == pytest.approx(figures["lsst"]["sigma_iqr"])
    assert runs[0].status == "FINISHED"
    kept = {Path(path).name for path in tracker.artifacts(runs[0].run_id, "evaluation")}
    assert {"index.html", "metrics.json", "redshifts.png", "comparison.json", "comparison.png"} <= kept
