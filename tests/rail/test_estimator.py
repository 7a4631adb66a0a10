"""The estimator: the same objects as the engine gives, whoever looks, in files that RAIL and qp open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rail.core.stage")

import qp
import torch
from ranks import Communicator, run_ranks

from deepdisc_ops.api import simulate_mosaic
from deepdisc_ops.data.pixels import read_pixels
from deepdisc_ops.data.store import create_dataset, open_dataset
from deepdisc_ops.errors import ArchiveError, CatalogError, ConfigError, DeepdiscOpsError, ImageError
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.inference.mosaic import predict_mosaic
from deepdisc_ops.inference.recipe import examiners
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.model.weights import read_info, save_member
from deepdisc_ops.rail import DeepdiscEstimator
from deepdisc_ops.sky.catalog import read_catalog
from deepdisc_ops.sky.detections import Detections, Flag, row_order
from deepdisc_ops.sky.dust import EbvPlane, ebv_source
from deepdisc_ops.sky.images import open_mosaic


def estimator(model: Path, images: Path, **config: Any) -> DeepdiscEstimator:
    return DeepdiscEstimator.make_stage(name="estimate", model=str(model), input=str(images), **{"split": "validation"} | config)


def run(stage: DeepdiscEstimator) -> tuple[qp.Ensemble, Any]:
    stage.validate()
    stage.run()
    stage.finalize()
    return qp.read(stage.get_output("output", final_name=True)), read_catalog(Path(stage.get_output("catalog", final_name=True)))


@pytest.fixture(scope="module")
def mosaic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("a sky") / "sky.fits"
    simulate_mosaic(path, side=256, seed=7)
    return path


def test_a_data_set_gives_what_the_ensemble_finds_image_by_image(tiny_ensemble: Path, mini_dataset: Path) -> None:
    densities, catalog = run(estimator(tiny_ensemble, mini_dataset, ebv="0.02"))
    ensemble = Ensemble.load(tiny_ensemble)
    assert len(catalog) == densities.npdf > 0
    assert str(densities.metadata["pdf_name"][0].decode()) == "mixmod"
    for number, record in enumerate(open_dataset(mini_dataset).records("validation")):
        image = read_pixels(record, ensemble.bands)
        found = ensemble.predict(image.data, EbvPlane.constant(0.02), image.mask)
        found = found.select(row_order(found.boxes))
        here = np.flatnonzero(np.asarray(catalog["image"]) == number)
        np.testing.assert_array_equal(np.stack([catalog[name][here] for name in ("x0", "y0", "x1", "y1")], 1), found.boxes)
        for name, column in (("weights", found.weights), ("means", found.means), ("stds", found.sigmas)):
            np.testing.assert_allclose(densities.objdata[name][here], column, rtol=1e-6)
        ra, dec = image.wcs.pixel_to_world_values(*found.centres.T)  # type: ignore[union-attr]  # scenes have a WCS
        np.testing.assert_allclose(densities.ancil["ra"][here], ra, atol=1e-8)
        np.testing.assert_allclose(densities.ancil["dec"][here], dec, atol=1e-8)
    for name in ("class", "flags", "score", "z_mode", "flux_i", "image"):
        np.testing.assert_array_equal(densities.ancil[name], catalog[name])
    assert set(densities.ancil["distribution_type"]) == {1}
    assert not list(Path().glob("*.parts")) + list(Path().glob("inprogress*"))


def test_without_ebv_each_image_has_that_of_its_record(tiny_ensemble: Path, mini_dataset: Path) -> None:
    _, catalog = run(estimator(tiny_ensemble, mini_dataset))
    for number, record in enumerate(open_dataset(mini_dataset).records("validation")):
        here = np.asarray(catalog["image"]) == number
        np.testing.assert_allclose(catalog["ebv"][here], np.median(record.objects.ebv), rtol=1e-6)


def test_a_mosaic_gives_the_catalogue_of_predict_mosaic(tiny_ensemble: Path, mosaic: Path) -> None:
    _, catalog = run(estimator(tiny_ensemble, mosaic, window=128, overlap=32, ebv="0.02"))
    ensemble = Ensemble.load(tiny_ensemble)
    with open_mosaic(mosaic, ensemble.bands) as opened:
        expected = predict_mosaic(
            opened,
            lambda image, ebv: ensemble.predict(image.data, ebv, image.mask),
            ebv_source("0.02"),
            window=128,
            overlap=32,
            stride=int(np.lcm(32, ensemble.stride)),
            examiners=examiners(opened, [], ensemble.pixel_scale),
        )
    assert len(expected) > 3
    for name in expected.colnames:
        np.testing.assert_array_equal(catalog[name], expected[name], err_msg=name)


@pytest.mark.parametrize("kind", ["records", "mosaic"])
def test_two_processes_give_what_one_gives(kind: str, tiny_ensemble: Path, mini_dataset: Path, mosaic: Path) -> None:
    images, config = (mini_dataset, {"split": "train"}) if kind == "records" else (mosaic, {"window": 128, "overlap": 32})
    alone = run(estimator(tiny_ensemble, images, output="one.hdf5", catalog="one.parquet", **config))

    def work(comm: Communicator) -> None:
        stage = estimator(tiny_ensemble, images, output="two.hdf5", catalog="two.parquet", comm=comm, **config)
        stage.validate()
        stage.run()
        stage.finalize()

    assert run_ranks(2, work) == [None, None]
    same = qp.read("two.hdf5"), read_catalog(Path("two.parquet"))
    for name in ("weights", "means", "stds"):
        np.testing.assert_array_equal(same[0].objdata[name], alone[0].objdata[name])
    assert same[1].colnames == alone[1].colnames
    for name in same[1].colnames:
        np.testing.assert_array_equal(same[1][name], alone[1][name], err_msg=name)


def test_a_process_that_fails_ends_the_others(tiny_ensemble: Path, mini_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = DeepdiscEstimator._look

    def failing(self: DeepdiscEstimator, *args: Any) -> None:
        if self.rank == 1:
            raise MemoryError("no room in the second process")
        look(self, *args)

    monkeypatch.setattr(DeepdiscEstimator, "_look", failing)
    first, second = run_ranks(2, lambda comm: estimator(tiny_ensemble, mini_dataset, comm=comm).run())
    assert isinstance(second, MemoryError)
    assert isinstance(first, DeepdiscOpsError)
    assert str(first) == "process 1 of 2 failed; its own message tells why"
    assert not list(Path().glob("*.hdf5"))


def test_nothing_found_is_a_result(tiny_ensemble: Path, mini_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    components = Ensemble.load(tiny_ensemble).components
    monkeypatch.setattr("deepdisc_ops.rail.sights.Look.__call__", lambda *_: Detections.empty(components))
    densities, catalog = run(estimator(tiny_ensemble, mini_dataset))
    assert (densities.npdf, len(catalog)) == (0, 0)


def test_chunks_do_not_matter(tiny_ensemble: Path, mini_dataset: Path) -> None:
    one, many = (run(estimator(tiny_ensemble, mini_dataset, split="train", chunk_size=size))[1] for size in (1, 3))
    for name in one.colnames:
        np.testing.assert_array_equal(one[name], many[name], err_msg=name)


def test_in_memory_nothing_is_written(tiny_ensemble: Path, mini_dataset: Path) -> None:
    stage = estimator(tiny_ensemble, mini_dataset, output_mode="return", calculated_point_estimates=["zmode", "zbest"])
    found = stage.estimate(open_dataset(mini_dataset))
    densities, catalog = found["output"].data, found["catalog"].data
    assert densities.npdf == len(catalog) > 0
    np.testing.assert_array_equal(densities.ancil["zmode"], catalog["z_mode"])
    np.testing.assert_array_equal(densities.ancil["zbest"], catalog["z_best"])
    assert not list(Path().iterdir())


def test_masks_are_in_the_catalogue_alone(tiny_checkpoints: list[Path], mini_dataset: Path, tmp_path: Path) -> None:
    config = read_info(tiny_checkpoints[0]).config
    config = config.model_copy(update={"model": config.model.model_copy(update={"mask_head": True})})
    torch.manual_seed(0)
    save_member(tmp_path / "with masks", DeepDisc(config.model, config.inference), config, {"val_nll": 0.1}, step=1)
    densities, catalog = run(estimator(tmp_path / "with masks", mini_dataset, masks=True))
    assert "mask_rle" in catalog.colnames
    assert "mask_rle" not in densities.ancil
    assert len(catalog) == densities.npdf > 0
    assert all(catalog["mask_rle"])


def test_without_photometry_there_are_no_fluxes(tiny_ensemble: Path, mini_dataset: Path) -> None:
    densities, catalog = run(estimator(tiny_ensemble, mini_dataset, photometry=False))
    assert not [name for name in (*catalog.colnames, *densities.ancil) if name.startswith("flux")]
    assert not (np.asarray(catalog["flags"]) & Flag.FORCED).any()


def test_what_is_missing_is_told_in_a_line(tiny_ensemble: Path, mini_dataset: Path, mosaic: Path, tmp_path: Path) -> None:
    def refused(model: Path, images: Path, **config: Any) -> None:
        estimator(model, images, **config).validate()

    with pytest.raises(ArchiveError, match=r"^no model at model\.zip; run DeepdiscInformer[^\n]*$"):
        refused(Path("model.zip"), mini_dataset)
    with pytest.raises(ConfigError, match=r"^no model is given; name the file[^\n]*$"):
        DeepdiscEstimator.make_stage(name="estimate", input=str(mini_dataset)).validate()
    with pytest.raises(ImageError, match=r"^no images at nowhere; give[^\n]*$"):
        refused(tiny_ensemble, Path("nowhere"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(ImageError, match=r"^bare holds neither dataset\.yaml nor a FITS file[^\n]*$"):
        refused(tiny_ensemble, Path("bare"))
    with pytest.raises(CatalogError, match="no record in split 'test'"):
        refused(tiny_ensemble, mini_dataset, split="test")
    with pytest.raises(CatalogError, match="no record in split 'validation'"):
        refused(tiny_ensemble, create_dataset(tmp_path / "empty", open_dataset(mini_dataset).info).path)
    with pytest.raises(ConfigError, match="no point estimate is called zmod; expected some of zmode, zmean"):
        refused(tiny_ensemble, mini_dataset, calculated_point_estimates=["zmod"])
    with pytest.raises(ConfigError, match="chunk_size is 0"):
        refused(tiny_ensemble, mini_dataset, chunk_size=0)
    with open_mosaic(mosaic, ("g", "r")) as two:
        stage = estimator(tiny_ensemble, mosaic)
        stage.set_data("input", two)
        with pytest.raises(ImageError, match="no band u, i, z, y: found g, r"):
            stage.validate()


def test_a_folder_with_a_file_a_band_is_a_mosaic(mosaic: Path, tmp_path: Path) -> None:
    from astropy.io import fits

    from deepdisc_ops.rail.handles import image_bands, open_images

    (tmp_path / "bands").mkdir()
    with fits.open(mosaic) as file:
        for band in "rg":
            plane = fits.PrimaryHDU(file[band].data, file[band].header)
            plane.header["FILTER"] = band
            plane.writeto(tmp_path / "bands" / f"{band}.fits")
    assert set(image_bands(open_images(tmp_path / "bands"))) == {"g", "r"}


def test_the_command_of_ceci_keeps_paths_with_spaces_and_leaves_our_own_main_alone(mini_dataset: Path) -> None:
    import shlex

    paths = {"model": "a model.zip", "input": str(mini_dataset)}
    outputs = {"output": "out/it's.hdf5", "catalog": "c.parquet"}
    words = shlex.split(DeepdiscEstimator.generate_command(paths, "a config.yaml", outputs, {}, "estimate"))
    assert words[:4] == ["python3", "-m", "ceci", "deepdisc_ops.rail.estimator.DeepdiscEstimator"]
    for word in (f"--input={mini_dataset}", "--model=a model.zip", "--config=a config.yaml", "--output=out/it's.hdf5"):
        assert word in words


def test_the_pipeline_is_copied_once(tmp_path: Path) -> None:
    from deepdisc_ops.rail.__main__ import copy_pipeline

    assert [path.name for path in copy_pipeline(tmp_path / "a pipeline")] == ["pipeline.yaml", "config.yaml"]
    with pytest.raises(ConfigError, match="would be replaced"):
        copy_pipeline(tmp_path / "a pipeline")
