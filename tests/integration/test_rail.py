"""RAIL's own runner, with two processes of MPI, from images to the figures of RAIL's own evaluator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("rail.core.stage")
pytest.importorskip("rail.estimation.algos.flexzboost")

import qp
import tables_io
import torch
from scipy import stats

from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.simulate import simulate_dataset
from deepdisc_ops.photoz import metrics
from deepdisc_ops.photoz.mixture import GaussianMixture
from deepdisc_ops.rail import DeepdiscEstimator
from deepdisc_ops.rail.__main__ import FILES
from deepdisc_ops.sky.catalog import read_catalog

pytestmark = pytest.mark.integration

MODEL = Path(__file__).parents[2] / "models" / "lsst-small"
STEP = 2.5e-3
GRID = {"zmin": 0.0, "zmax": 5.0, "nzbins": 2001}


def environment() -> dict[str, str]:
    """ceci starts the python3 and the mpirun of the PATH."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "LOKY_MAX_CPU_COUNT": "1",  # FlexZBoost's trees need no processes of their own
    }


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes of a survey")
    simulate_dataset(SkySettings(), folder, counts={"train": 3, "test": 2}, size=192, seed=11)
    return folder


@pytest.fixture(scope="module")
def made(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the pipeline ran."""
    pytest.importorskip("mpi4py")
    folder = tmp_path_factory.mktemp("rail")
    command = [sys.executable, "-m", "deepdisc_ops.rail", str(folder)]
    subprocess.run(command, check=True, env=environment(), timeout=60)
    assert {path.name for path in folder.iterdir()} == set(FILES)
    config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    config["global"] |= GRID
    config["inform_deepdisc"] |= {"ensemble": str(MODEL)}
    config["inform_flexzboost"] |= {"max_basis": 8, "nbump": 2, "nsharp": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run = subprocess.run(
        [
            Path(sys.executable).with_name("ceci"),
            "pipeline.yaml",
            f"inputs.images={scenes}",
            "-t",
            "nprocess=2",
            "threads=2",
            "jobs=2",
        ],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    logs = {path.name: path.read_text()[-2000:] for path in (folder / "rail" / "logs").glob("*.out")}
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}\n{logs}"
    (folder / "commands").write_text(run.stdout)
    return folder / "rail"


def figures(path: Path) -> dict[str, float]:
    return {name: float(value[0]) for name, value in tables_io.read(path).items()}


def test_the_pipeline_evaluates_both_codes_on_the_same_galaxies(made: Path) -> None:
    truth = tables_io.read(made / "photometry_test.hdf5")
    ours, theirs = (qp.read(str(made / f"densities_{code}.hdf5")) for code in ("deepdisc", "flexzboost"))
    assert ours.npdf == theirs.npdf == len(truth["redshift"]) > 15
    np.testing.assert_array_equal(theirs.ancil["redshift"], truth["redshift"])
    assert set(figures(made / "metrics_deepdisc.hdf5")) == set(figures(made / "metrics_flexzboost.hdf5"))
    # the network has learned what n(z) alone does not tell
    assert figures(made / "metrics_deepdisc.hdf5")["POINT_SimgaIQR"] < 0.1


def test_the_evaluators_figures_are_ours_to_the_tolerance_of_its_grid(made: Path) -> None:
    theirs = figures(made / "metrics_deepdisc.hdf5")
    truth, found = tables_io.read(made / "photometry_test.hdf5"), qp.read(str(made / "mixtures_deepdisc.hdf5"))
    z, n = truth["redshift"], len(truth["redshift"])
    rows = np.array([np.flatnonzero(found.ancil["id"] == number)[0] for number in truth["id"]])
    mixture = [found.objdata[name][rows] for name in ("weights", "means", "stds")]
    rng = np.random.default_rng(0)
    ours = metrics.density_metrics(*mixture, z, rng, samples=2)
    points = metrics.point_metrics(found.ancil["z_mode"][rows], z, "lsst", rng, samples=2)
    pit = GaussianMixture.from_arrays(*mixture).truncated_cdf(torch.as_tensor(z)).numpy()
    densest = max(1.0, float(GaussianMixture.from_arrays(*mixture).truncated_density(np.linspace(0, 5, 2001)).max()))
    moved = STEP * densest / 2  # how far the grid may move a PIT
    assert theirs["PIT_KS_stat"] == pytest.approx(ours.ks.value, abs=moved)
    assert theirs["PIT_CvM_stat"] == pytest.approx(ours.cvm.value, abs=n * moved**2 + 2 * moved)
    with pytest.warns(UserWarning, match=r"p-value|variant"):
        assert theirs["PIT_AD_stat"] == pytest.approx(stats.anderson_ksamp([pit, np.linspace(0, 1, n)]).statistic, abs=0.05)
    assert theirs["PIT_OutRate_stat"] == pytest.approx(ours.pit_beyond, abs=0.01 + 1 / n)
    assert theirs["CDE_stat"] == pytest.approx(ours.cde_loss.value, rel=0.01)
    assert theirs["POINT_Bias"] == pytest.approx(points.bias, abs=STEP)
    assert theirs["POINT_SimgaIQR"] == pytest.approx(points.sigma_iqr, abs=2 * STEP)
    assert theirs["POINT_OutlierRate"] == pytest.approx(points.outlier_fraction, abs=1.01 / n)


def test_two_processes_wrote_what_one_writes(made: Path, scenes: Path, tmp_path: Path) -> None:
    commands = (made.parent / "commands").read_text()
    assert commands.count("mpirun -n 2 python3 -m ceci deepdisc_ops.rail.estimator.DeepdiscEstimator") == 2
    stage = DeepdiscEstimator.make_stage(
        name="alone",
        model=str(made / "model_deepdisc.zip"),
        input=str(scenes),
        split="train",
        output=str(tmp_path / "one.hdf5"),
        catalog=str(tmp_path / "one.parquet"),
    )
    stage.run()
    stage.finalize()
    one, two = (qp.read(str(path)) for path in (tmp_path / "one.hdf5", made / "mixtures_train.hdf5"))
    assert one.npdf == two.npdf > 30
    for name in ("weights", "means", "stds"):
        np.testing.assert_array_equal(two.objdata[name], one.objdata[name])
    one, two = (read_catalog(path) for path in (tmp_path / "one.parquet", made / "catalog_train.parquet"))
    for name in one.colnames:
        np.testing.assert_array_equal(two[name], one[name], err_msg=name)
    assert not list(made.glob("*.parts")) + list(made.glob("inprogress*"))
