from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepdisc_ops.config import SkySettings, validate
from deepdisc_ops.data.masks import area, decode
from deepdisc_ops.data.scenes import Scene, scene_record, simulate_scene, write_scene
from deepdisc_ops.data.truth import deblend
from deepdisc_ops.data.truth.deblend import DeblendSettings, flood, from_truth_catalog, smooth
from deepdisc_ops.errors import CatalogError, ConfigError
from deepdisc_ops.sky.images import SkyImage

BANDS = list("ugrizy")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scene, Path]:
    folder = tmp_path_factory.mktemp("a scene")
    scene = simulate_scene(SkySettings(), size=512, seed=3)
    write_scene(scene, folder / "scene.fits")
    scene.catalog.write(folder / "catalogue.fits")
    return scene, folder


def settings(scene: Scene, folder: Path, **more: Any) -> DeblendSettings:
    columns = {"magnitudes": {band: f"mag_{band}" for band in BANDS}, "unit": "mag", "redshift": "redshift"}
    tree = {
        "survey": "simulated",
        "gold_band": "i",
        "images": {"paths": [str(folder / "scene.fits")], "bands": BANDS},
        "catalog": {"path": str(folder / "catalogue.fits"), "columns": columns | {"star": "class", "star_values": [1]}},
        "windows": {"width_arcsec": 51.2, "height_arcsec": 51.2},
        "psf_fwhm": scene.conditions.psf_fwhm.tolist(),
        "outside": "drop",
    }
    return validate(DeblendSettings, tree | more, "test")


def test_boxes_and_masks_agree_with_the_simulators_own(scene: tuple[Scene, Path], tmp_path: Path) -> None:
    built = from_truth_catalog(settings(*scene), tmp_path / "out")
    truth = scene_record(scene[1] / "scene.fits").objects
    found = {}
    for record in built.dataset.records():
        assert isinstance(record.pixels.window, tuple)
        shift = np.array(record.pixels.window[:2] * 2, np.float32)
        for i, number in enumerate(record.objects.ids.tolist()):
            assert number not in found
            found[number] = (record, i, record.objects.boxes[i] + shift)
    common = [i for i, number in enumerate(truth.ids.tolist()) if number in found]
    boxes = np.stack([found[int(truth.ids[i])][2] for i in common])
    overlap = (np.minimum(boxes[:, 2:], truth.boxes[common, 2:]) - np.maximum(boxes[:, :2], truth.boxes[common, :2])).clip(0)
    shared = overlap.prod(axis=1)
    areas = [(some[:, 2:] - some[:, :2]).prod(axis=1) for some in (boxes, truth.boxes[common])]
    iou = shared / (areas[0] + areas[1] - shared)
    bright = scene[0].truth["snr"][np.searchsorted(scene[0].truth["id"], truth.ids[common])] > 40
    # measured: 94 to 97 % found, median IoU 0.69 (boxes are 5 pixels wide in the median), 0.83 for S/N above 40, 75 % above 0.5
    assert len(common) > 0.93 * len(truth)
    assert len(found) < 1.02 * len(truth)
    assert np.median(iou) > 0.6
    assert np.median(iou[bright]) > 0.75
    assert np.mean(iou > 0.5) > 0.65
    for i in common[:20]:
        record, j, _ = found[int(truth.ids[i])]
        np.testing.assert_array_equal(record.objects.redshift[j], truth.redshift[i])
        assert record.objects.classes[j] == truth.classes[i]


def test_masks_of_a_window_share_no_pixel_and_fill_their_boxes(scene: tuple[Scene, Path], tmp_path: Path) -> None:
    built = from_truth_catalog(settings(*scene), tmp_path / "out", packed=True)
    record = built.dataset.records()[0]
    masks = record.objects.masks
    assert masks
    drawn = np.stack([decode(mask) for mask in masks])
    assert drawn.sum(axis=0).max() == 1
    assert all(area(mask) > 0 for mask in masks)
    for mask, (x0, y0, x1, y1) in zip(drawn, record.objects.boxes, strict=True):
        rows, columns = np.nonzero(mask)
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x0, y0, x1, y1)


def test_without_magnitudes_the_image_tells_the_snr(scene: tuple[Scene, Path], tmp_path: Path) -> None:
    bare = settings(*scene).model_dump(mode="json")["catalog"] | {"columns": {}}
    built = from_truth_catalog(settings(*scene, catalog=bare), tmp_path / "out")
    truth = set(scene_record(scene[1] / "scene.fits").objects.ids.tolist())
    found = {number for record in built.dataset.records() for number in record.objects.ids.tolist()}
    assert len(found & truth) > 0.5 * len(truth)  # measured 60 %: what is extended is less of a point
    assert len(found - truth) < 0.2 * len(found)  # measured 14 %: faint ones in the light of neighbours
    assert np.isnan(built.dataset.records()[0].objects.mag).all()


def test_two_blended_points_are_parted_between_them() -> None:
    rows, columns = np.indices((40, 40))
    light = sum(20 * np.exp(-((columns - x) ** 2 + (rows - 20) ** 2) / 8) for x in (16, 24)).astype(np.float32)
    labels = flood(light, np.array([16.0, 24.0]), np.array([20.0, 20.0]), np.array([50.0, 50.0]), 2.0, 2.0)
    np.testing.assert_array_equal(labels > 0, light > 2)
    assert (labels[:, :20][light[:, :20] > 2] == 1).all()
    assert (labels[:, 21:][light[:, 21:] > 2] == 2).all()
    assert not flood(light, np.zeros(0), np.zeros(0), np.zeros(0), 2.0, 2.0).any()
    one = flood(light, np.array([16.0, 16.2]), np.array([20.0, 20.1]), np.array([50.0, 60.0]), 2.0, 2.0)
    assert np.unique(one).tolist() == [0, 2]


@pytest.mark.parametrize("correlated", [False, True])
def test_the_snr_of_a_point_is_measured_against_the_noise_that_is_there(rng: np.random.Generator, correlated: bool) -> None:
    noise = rng.normal(0, 3, (2, 256, 256)).astype(np.float32)
    if correlated:
        noise = (noise + np.roll(noise, 1, 1) + np.roll(noise, 1, 2)) / np.sqrt(3).astype(np.float32)
    image = SkyImage(noise + 100, ("a", "b"), None, 0.2, np.zeros((256, 256), bool))
    image.mask[:, :30] = True
    smoothed = smooth(image, np.array([0.7, 0.9]), 64)
    assert smoothed.point_snr[:, :, 60:].std() == pytest.approx(1, abs=0.08)
    assert abs(smoothed.point_snr[:, :, 60:].mean()) < 0.1
    assert np.isinf(smoothed.noise[:, :, :30]).all()
    assert np.median(smoothed.noise[:, :, 60:]) == pytest.approx(3, rel=0.05)
    assert (smoothed.light > deblend.DeblendSettings.model_fields["isophote"].default).mean() < 1e-3


def test_faults_are_named(scene: tuple[Scene, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="psf_fwhm has 2 values for 6 bands"):
        settings(*scene, psf_fwhm=[0.7, 0.7])
    catalog = settings(*scene).model_dump(mode="json")["catalog"]
    catalog["columns"]["unit"] = None
    with pytest.raises(CatalogError, match="nothing tells the unit of column mag_u"):
        from_truth_catalog(settings(*scene, catalog=catalog), tmp_path / "out")
    with pytest.raises(CatalogError, match="no window of 4 is left"):
        from_truth_catalog(settings(*scene, min_snr=1e9), tmp_path / "out")
    assert not (tmp_path / "out").exists()
