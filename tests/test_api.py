"""The names of the package: which there are, that they cost nothing until used, and that their examples run."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import deepdisc_ops
from deepdisc_ops import api
from deepdisc_ops.errors import ArchiveError, ConfigError

ROOT = Path(__file__).parents[1]
STORY = (
    "simulate_mosaic",
    "read",
    "simulate",
    "load_config",
    "train",
    "load_ensemble",
    "predict",
    "evaluate",
    "positions",
    "densities",
    "arrow",
    "read_catalog",
)
SERVED = ("serve", "connect", "stop")


def test_the_surface_is_what_it_was() -> None:
    assert sorted(deepdisc_ops.__all__) == sorted((*STORY, *SERVED))
    assert set(deepdisc_ops.__all__) <= set(dir(deepdisc_ops))
    for name in deepdisc_ops.__all__:
        assert getattr(deepdisc_ops, name) is getattr(api, name)
    with pytest.raises(AttributeError, match="no attribute 'prdict'"):
        _ = deepdisc_ops.prdict


def test_importing_loads_nothing() -> None:
    program = (
        "import sys; before = set(sys.modules); import deepdisc_ops; "
        "print(*sorted(name for name in set(sys.modules) - before if name.split('.')[0] not in sys.stdlib_module_names))"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["deepdisc_ops", "deepdisc_ops._version"]


def run_example(name: str, names: dict[str, object]) -> None:
    """Run the example of a function's docstring in ``names``, which keep what it defines."""
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(api, name), name, globs=names)
    assert example.examples, name
    told: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=told.append, clear_globs=False)
    names.update(example.globs)
    assert not result.failed, "".join(told)


def names_of_a_notebook() -> dict[str, object]:
    return {"np": np, **{name: getattr(api, name) for name in deepdisc_ops.__all__}}


def test_the_examples_run_in_the_order_of_a_story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    names = names_of_a_notebook()
    for name in STORY:
        if name == "read_catalog":
            from deepdisc_ops.sky.catalog import write_catalog

            write_catalog(names["catalog"], tmp_path / "catalog.parquet")  # type: ignore[arg-type]  # a namespace of examples
        run_example(name, names)


@pytest.mark.integration
def test_the_examples_of_the_endpoint_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepdisc_ops.serving.archive import build_archive

    monkeypatch.chdir(tmp_path)
    api.simulate_mosaic("mosaic.fits", side=256, seed=7).close()
    build_archive([ROOT / "models" / "lsst-small"], tmp_path / "ensemble.mar")
    names = names_of_a_notebook()
    try:
        for name in SERVED:
            run_example(name, names)
    finally:
        api.stop("server")
    assert not api.stop("server")


def test_values_tell_an_astronomer_what_they_are(mini_dataset: Path, tiny_ensemble: Path) -> None:
    from deepdisc_ops.data.store import open_dataset
    from deepdisc_ops.photoz.mixture import GaussianMixture
    from deepdisc_ops.sky.detections import Detections, Flag

    dataset = open_dataset(mini_dataset)
    assert repr(dataset) == f"<Dataset {mini_dataset}: 4 train, 2 validation images, bands u g r i z y>"
    mosaic = api.read(next(iter((mini_dataset).rglob("*.fits"))))
    assert repr(mosaic).startswith("<Mosaic 128 x 128 pixels of 0.2 arcsec, bands u g r i z y, centre ")
    assert repr(mosaic.read()).endswith("deg, 0% invalid>")
    mosaic.close()
    ensemble = api.load_ensemble(tiny_ensemble)
    told = "<Ensemble of 2 (member-0, member-1), bands u g r i z y, 0.2 arcsec a pixel, densities of 10 components>"
    assert repr(ensemble) == told
    assert repr(Detections.empty(5).flagged(np.zeros(0, bool), Flag.EDGE)) == "<Detections 0 objects, 5 components>"
    assert repr(GaussianMixture.from_arrays([[1.0]], [[0.5]], [[0.1]])) == "<GaussianMixture of 1 objects, 1 components each>"


def test_what_cannot_be_used_is_told(spaced: Path) -> None:
    with pytest.raises(ArchiveError, match="does not exist; give a .mar archive"):
        api.load_ensemble(spaced / "nothing.mar")
    with pytest.raises(ConfigError, match="no .fits file"):
        api.simulate_mosaic(spaced / "sky.npy")
    with pytest.raises(ConfigError, match="yeers"):
        api.simulate(spaced / "scenes", yeers=5)
