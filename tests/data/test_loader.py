from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deepdisc_ops.config import DataSettings, ModelSettings
from deepdisc_ops.data.loader import CropLoader, Sample, augment, cut, label, measure_noise
from deepdisc_ops.data.records import DatasetInfo, Objects, open_dataset
from deepdisc_ops.errors import ConfigError
from deepdisc_ops.sky.tiling import Window

INFO = DatasetInfo("lsst", ("u", "g", "r", "i", "z", "y"), 0.2, 27.0, "i", 0)


def objects(x: list[float], y: list[float], **columns: object) -> Objects:
    n = len(x)
    centre = np.stack([x, y], 1) + 0.5
    given = {
        "ids": np.arange(n),
        "boxes": np.concatenate([centre - 3, centre + 3], 1).astype(np.float32),
        "classes": np.zeros(n, np.int32),
        "redshift": np.linspace(0.2, 1.5, n, dtype=np.float32),
        "mag": np.full(n, 24.0, np.float32),
        "x": np.array(x),
        "y": np.array(y),
        "ra": np.zeros(n),
        "dec": np.zeros(n),
        "ebv": np.full(n, 0.02, np.float32),
        "masks": None,
    }
    return Objects(**(given | columns))  # type: ignore[arg-type]


def test_redshift_labels_are_left_to_gold_galaxies() -> None:
    truth = objects(
        [10, 20, 30, 40],
        [10, 20, 30, 40],
        classes=np.array([0, 1, 0, 0], np.int32),
        mag=np.array([24.0, 20.0, 25.4, np.nan], np.float32),
    )
    labels = label(truth, INFO, ModelSettings(), 11)
    assert np.isfinite(labels.redshift).tolist() == [True, False, False, False]
    assert labels.classes.tolist() == [0, 0, 0, 0]
    two = label(truth, INFO, ModelSettings(classes=("galaxy", "star")), 11)
    assert two.classes.tolist() == [0, 1, 0, 0]
    turned = label(truth, INFO, ModelSettings(classes=("star", "galaxy")), 11)
    assert turned.classes.tolist() == [1, 0, 1, 1]


def test_small_boxes_are_widened_about_the_centre() -> None:
    labels = label(objects([10.0], [20.0]), INFO, ModelSettings(), 11)
    np.testing.assert_allclose(labels.boxes, [[5, 15, 16, 26]])


def test_a_box_cut_by_the_edge_of_the_image_keeps_its_other_side() -> None:
    truth = objects([2.0], [20.0], boxes=np.array([[0, 8, 22, 33]], np.float32))
    np.testing.assert_allclose(label(truth, INFO, ModelSettings(), 11).boxes, [[-3, 8, 22, 33]])


def test_a_band_of_magnitudes_the_model_does_not_know_is_refused() -> None:
    settings = ModelSettings.model_validate({"redshift_head": {"gold_band": "r"}})
    with pytest.raises(ConfigError, match="'r', the data's magnitudes are 'i'"):
        label(objects([10], [10]), INFO, settings, 11)


def picture(x: list[float], y: list[float], side: int = 64) -> np.ndarray:
    """An image with a single bright pixel at every object."""
    pixels = np.zeros((2, side, side), np.float32)
    pixels[:, np.array(y, int), np.array(x, int)] = np.arange(1, len(x) + 1)
    return pixels


@pytest.mark.parametrize("number", range(8))
def test_pixels_and_boxes_stay_together_under_every_symmetry(number: int) -> None:
    x, y = [10, 40, 52], [20, 12, 50]
    masks = np.stack([picture(x, y)[0] == i + 1 for i in range(3)])
    labels = label(objects(list(map(float, x)), list(map(float, y))), INFO, ModelSettings(), 7)
    sample = cut(picture(x, y), labels, Window(0, 0, 64, 64))
    sample = Sample(sample.pixels, sample.boxes, sample.classes, sample.redshift, sample.ebv, masks)
    moved = augment(sample, flip_x=bool(number & 1), flip_y=bool(number & 2), transpose=bool(number & 4))
    for i, box in enumerate(moved.boxes):
        column, row = np.round((box[:2] + box[2:]) / 2 - 0.5).astype(int)
        assert moved.pixels[0, row, column] == i + 1
        assert moved.masks is not None
        assert np.argwhere(moved.masks[i]).tolist() == [[row, column]]


def test_cut_keeps_objects_inside_and_clips_their_boxes() -> None:
    labels = label(objects([10, 30, 60], [10, 30, 60]), INFO, ModelSettings(), 11)
    sample = cut(np.zeros((2, 32, 32), np.float32), labels, Window(0, 0, 32, 32))
    assert len(sample.boxes) == 2
    assert sample.boxes.max() <= 32
    assert len(cut(np.zeros((2, 8, 8), np.float32), labels, Window(40, 40, 48, 48)).boxes) == 0


def test_batches_depend_on_seed_and_step_alone(mini_dataset: Path) -> None:
    dataset = open_dataset(mini_dataset)
    records, model = dataset.records("train"), ModelSettings(mask_head=True)
    data = DataSettings(path=mini_dataset, crop=64)
    cached = CropLoader(records, dataset.info, data, model, seed=5)
    fresh = CropLoader(records, dataset.info, data.model_copy(update={"cache_gb": 0.0}), model, seed=5)
    cached.batch(0, 3)
    for one, other in zip(cached.batch(7, 3), fresh.batch(7, 3), strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)
        np.testing.assert_array_equal(one.boxes, other.boxes)
        assert one.masks is not None
        assert one.masks.shape == (len(one.boxes), 64, 64)
        assert one.masks.any(axis=(1, 2)).mean() > 0.9
    assert not np.array_equal(cached.batch(8, 1)[0].pixels, cached.batch(7, 1)[0].pixels)


def test_crops_larger_than_the_images_are_refused(mini_dataset: Path) -> None:
    dataset = open_dataset(mini_dataset)
    loader = CropLoader(dataset.records("train"), dataset.info, DataSettings(crop=256), ModelSettings(), 0)
    with pytest.raises(ConfigError, match="data.crop 256 is larger"):
        loader.batch(0, 1)


def test_noise_is_measured_in_nanojansky(mini_dataset: Path) -> None:
    from deepdisc_ops.data.surveys import noise, survey

    dataset = open_dataset(mini_dataset)
    measured = measure_noise(dataset.records("train"), dataset.info.bands)
    np.testing.assert_allclose(measured, noise(survey("lsst"), 5.0), rtol=0.25)
