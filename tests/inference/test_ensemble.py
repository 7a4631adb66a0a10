from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from deepdisc_ops.errors import ArchiveError, CheckpointError
from deepdisc_ops.inference.ensemble import Ensemble, combine, member_weights, write_ensemble
from deepdisc_ops.sky.detections import Detections, Flag
from deepdisc_ops.sky.dust import EbvPlane


@pytest.fixture(scope="module")
def sky() -> NDArray[np.float32]:
    rng = np.random.default_rng(3)
    data = rng.normal(0, 8, (6, 150, 170)).astype(np.float32)
    y, x = np.mgrid[:150, :170]
    for centre in rng.uniform(8, 140, (30, 2)):
        data += 400 * np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / 6).astype(np.float32)
    return data


def test_an_ensemble_of_equals_is_the_member(tiny_checkpoints: list[Path], spaced: Path, sky: NDArray[np.float32]) -> None:
    write_ensemble(spaced / "one", tiny_checkpoints[:1])
    write_ensemble(spaced / "three", [tiny_checkpoints[0]] * 3)
    one = Ensemble.load(spaced / "one").predict(sky, EbvPlane.constant(0.03))
    three = Ensemble.load(spaced / "three").predict(sky, EbvPlane.constant(0.03))
    assert len(one) == len(three) > 10
    np.testing.assert_allclose(one.boxes, three.boxes, atol=1e-4)
    np.testing.assert_allclose(np.tile(one.weights / 3, 3), three.weights, atol=1e-5)
    np.testing.assert_allclose(np.tile(one.means, 3), three.means, atol=1e-5)
    assert (three.n_members == 3).all()


def test_mixtures_stay_normalised(tiny_ensemble: Path, sky: NDArray[np.float32]) -> None:
    ensemble = Ensemble.load(tiny_ensemble)
    found = ensemble.predict(sky, EbvPlane.constant(0.03))
    assert found.weights.shape == (len(found), ensemble.components) == (len(found), 10)
    np.testing.assert_allclose(found.weights.sum(1), 1, atol=1e-5)


def test_given_boxes_get_the_mixtures_of_detected_ones(tiny_ensemble: Path, sky: NDArray[np.float32]) -> None:
    member = Ensemble.load(tiny_ensemble).members[0]
    tile = sky[:, :120, :120]
    found = member.predict(tile, lambda x, y: np.full(len(x), 0.02, np.float32))
    again = member.redshift(tile, found.boxes, found.ebv)
    np.testing.assert_allclose(again.means.numpy(), found.means, atol=1e-5)


def test_odd_sizes_are_padded_and_boxes_stay_inside(tiny_ensemble: Path) -> None:
    data = np.random.default_rng(0).normal(0, 50, (6, 37, 53)).astype(np.float32)
    found = Ensemble.load(tiny_ensemble).predict(data, EbvPlane.constant(0.0))
    assert (found.boxes[:, [0, 1]] >= 0).all()
    assert (found.boxes[:, 2] <= 53).all()
    assert (found.boxes[:, 3] <= 37).all()


def test_masked_pixels_flag_their_objects(tiny_ensemble: Path, sky: NDArray[np.float32]) -> None:
    mask = np.zeros(sky.shape[1:], bool)
    mask[70:72, 80:82] = True
    found = Ensemble.load(tiny_ensemble).predict(sky, EbvPlane.constant(0.0), mask)
    x0, y0, x1, y1 = found.boxes.T
    touching = (np.floor(x0) < 82) & (np.ceil(x1) > 80) & (np.floor(y0) < 72) & (np.ceil(y1) > 70)
    np.testing.assert_array_equal((found.flags & Flag.MASKED) > 0, touching)


def test_reddening_is_looked_up_at_the_objects(tiny_ensemble: Path, sky: NDArray[np.float32]) -> None:
    plane = EbvPlane((0.0, 0.4, 0.0, 0.4))
    found = Ensemble.load(tiny_ensemble).predict(sky, plane)
    expected = 0.4 * (found.centres[:, 0] + 0.5) / sky.shape[2]
    np.testing.assert_allclose(found.ebv, expected, atol=2e-3)  # members' boxes differ a little


def detections(boxes: list[list[float]]) -> Detections:
    n = len(boxes)
    index, ones = np.zeros(n, np.int32), np.ones((n, 2), np.float32)
    array = np.array(boxes, np.float32).reshape(n, 4)
    return Detections(array, ones[:, 0], index, ones / 2, ones, ones, ones[:, 0], index + 1, index)


def test_objects_common_to_all_members_are_kept() -> None:
    first = detections([[0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]])
    second = detections([[51, 51, 61, 61], [0, 1, 10, 11]])
    both = combine([first, second], [0.25, 0.75])
    np.testing.assert_allclose(both.boxes, [[0, 0.5, 10, 10.5], [50.5, 50.5, 60.5, 60.5]])
    np.testing.assert_allclose(both.weights, [[0.125, 0.125, 0.375, 0.375]] * 2)
    assert len(combine([first, detections([])], [0.5, 0.5])) == 0


def test_weights_follow_the_validation_likelihood() -> None:
    weights = member_weights([0.0, np.log(3.0)])
    np.testing.assert_allclose(weights, [0.75, 0.25])
    np.testing.assert_allclose(member_weights([-5000.0, -5000.0]), [0.5, 0.5])


def test_a_damaged_member_is_named(tiny_ensemble: Path, spaced: Path) -> None:
    folder = Path(shutil.copytree(tiny_ensemble, spaced / "ensemble"))
    weights = folder / "member-1.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(ArchiveError, match=r"member-1: .* is damaged"):
        Ensemble.load(folder)
    weights.unlink()
    with pytest.raises(ArchiveError, match="member-1: .* is missing"):
        Ensemble.load(folder)
    with pytest.raises(ArchiveError, match="is no ensemble"):
        Ensemble.load(spaced)


def test_members_must_share_bands(tiny_checkpoints: list[Path], spaced: Path) -> None:
    other = Path(shutil.copytree(tiny_checkpoints[1], spaced / "other"))
    text = (other / "member.yaml").read_text()
    (other / "member.yaml").write_text(text.replace("pixel_scale: 0.2", "pixel_scale: 0.168"))
    with pytest.raises(CheckpointError, match=r"pixel_scale 0\.168"):
        write_ensemble(spaced / "ensemble", [tiny_checkpoints[0], other])
    with pytest.raises(CheckpointError, match="at least one"):
        write_ensemble(spaced / "ensemble", [])


def test_a_folder_of_other_things_is_not_replaced(tiny_checkpoints: list[Path], spaced: Path) -> None:
    (spaced / "thesis.txt").write_text("years of work")
    with pytest.raises(ArchiveError, match="holds other files"):
        write_ensemble(spaced, tiny_checkpoints)
    assert [path.name for path in spaced.iterdir()] == ["thesis.txt"]
    for _ in range(2):
        write_ensemble(spaced / "ensemble", tiny_checkpoints)
    assert sorted(path.name for path in spaced.iterdir()) == ["ensemble", "thesis.txt"]


def test_select_and_concatenate_are_inverse(tiny_ensemble: Path, sky: NDArray[np.float32]) -> None:
    found = Ensemble.load(tiny_ensemble).predict(sky, EbvPlane.constant(0.0))
    index = np.arange(len(found))
    again = Detections.concatenate([found.select(index[:5]), found.select(index[5:])])
    for field in fields(Detections):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(found, field.name))
    assert len(replace(Detections.empty(3))) == 0
    assert torch.is_inference_mode_enabled() is False
