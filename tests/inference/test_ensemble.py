from __future__ import annotations

import math
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from deepdisc_ops.config import EnsembleSettings
from deepdisc_ops.errors import ArchiveError, CheckpointError, ConfigError, ImageError
from deepdisc_ops.inference.engine import Member
from deepdisc_ops.inference.ensemble import Ensemble, sha256, write_ensemble
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.model.weights import load_member, read_info, save_member
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


def test_the_order_of_members_does_not_matter(tiny_checkpoints: list[Path], spaced: Path, sky: NDArray[np.float32]) -> None:
    answers = []
    for order in (1, -1):
        write_ensemble(spaced / f"order {order}", tiny_checkpoints[::order], settings=EnsembleSettings(match="union", components=4))
        answers.append(Ensemble.load(spaced / f"order {order}").predict(sky, EbvPlane.constant(0.03)))
    assert len(answers[0]) > 10
    assert set(answers[0].n_members) == {1, 2}
    for name in ("boxes", "scores", "classes", "n_members", "flags", "means", "sigmas", "weights"):
        np.testing.assert_allclose(getattr(answers[0], name), getattr(answers[1], name), atol=1e-4)


def test_given_boxes_are_answered_row_for_row(tiny_ensemble: Path, sky: NDArray[np.float32], rng: np.random.Generator) -> None:
    """An ensemble's forced mixture is the weighted sum of its members' answers to the same box, from the same tile."""
    ensemble, plane = Ensemble.load(tiny_ensemble), EbvPlane((0.0, 0.4, 0.0, 0.4))
    corners = rng.uniform(-3, 145, (40, 2))
    boxes = np.hstack([corners, corners + rng.uniform(5, 30, (40, 2))])
    mask = np.zeros(sky.shape[1:], bool)
    mask[60:80, 60:80] = True
    forced = ensemble.redshift(sky, boxes, plane, mask)
    np.testing.assert_allclose(forced.boxes, boxes, rtol=1e-6)
    np.testing.assert_allclose(forced.ebv, 0.4 * boxes[:, ::2].mean(1) / sky.shape[2], atol=1e-6)
    assert np.isnan(forced.scores).all()
    assert (forced.n_members == 2).all()
    assert ((forced.flags & Flag.FORCED) > 0).all()
    inside = (boxes[:, 0] < 80) & (boxes[:, 2] > 60) & (boxes[:, 1] < 80) & (boxes[:, 3] > 60)
    np.testing.assert_array_equal((forced.flags & Flag.MASKED) > 0, inside)
    order = rng.permutation(40)
    shuffled = ensemble.redshift(sky, boxes[order], plane)
    np.testing.assert_allclose(shuffled.means, forced.means[order], atol=1e-5)
    corner = np.flatnonzero((boxes[:, ::2].mean(1) < 80) & (boxes[:, 1::2].mean(1) < 80))  # the first tile's core
    for m, member in enumerate(ensemble.members):
        own = member.redshift(sky[:, :128, :128], forced.boxes[corner], forced.ebv[corner])
        np.testing.assert_allclose(forced.means[corner, 5 * m : 5 * m + 5], own.means.numpy(), atol=1e-5)
        np.testing.assert_allclose(forced.weights[corner, 5 * m : 5 * m + 5], ensemble.weights[m] * own.weights.numpy(), atol=1e-5)


def test_detected_boxes_given_back_have_the_same_mixtures(
    tiny_checkpoints: list[Path], spaced: Path, sky: NDArray[np.float32]
) -> None:
    write_ensemble(spaced / "one", tiny_checkpoints[:1])
    ensemble = Ensemble.load(spaced / "one")
    found = ensemble.predict(sky, EbvPlane.constant(0.03))
    forced = ensemble.redshift(sky, found.boxes, EbvPlane.constant(0.03))
    x, y = found.centres.T
    deep = (np.abs(x - 112) > 16) & (np.abs(y - 112) > 16)  # elsewhere tiles overlap and the copy kept may be the other's
    assert deep.sum() > 10
    for name in ("weights", "means", "sigmas"):
        np.testing.assert_allclose(getattr(forced, name)[deep], getattr(found, name)[deep], atol=1e-5)


def test_no_given_boxes_are_no_objects(tiny_ensemble: Path, sky: NDArray[np.float32]) -> None:
    ensemble = Ensemble.load(tiny_ensemble)
    forced = ensemble.redshift(sky, np.zeros((0, 4)), EbvPlane.constant(0.0))
    assert forced.weights.shape == (0, ensemble.components)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [([[0, 0, 5]], r"shape \(1, 3\)"), ([[0, 0, 5, 5], [3, 3, 3, 9]], "1 of 2 .* number 1"), ([[0, 0, np.nan, 5]], "1 of 1")],
)
def test_boxes_that_are_none_are_refused(
    tiny_ensemble: Path, sky: NDArray[np.float32], boxes: list[list[float]], message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        Ensemble.load(tiny_ensemble).redshift(sky, boxes, EbvPlane.constant(0.0))


def test_pixels_of_other_bands_are_refused(tiny_ensemble: Path, sky: NDArray[np.float32]) -> None:
    ensemble = Ensemble.load(tiny_ensemble, on_failure="skip")
    with pytest.raises(ImageError, match=r"\(5, 150, 170\); expected \(bands, rows, columns\) of u, g, r"):
        ensemble.predict(sky[:5], EbvPlane.constant(0.0))
    assert not ensemble.failures


def test_swapped_members_answer_the_same_one_at_a_time(
    tiny_ensemble: Path, sky: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Member]] = []
    most = 0

    class Counted(Member):
        def __init__(self, *arguments: object) -> None:
            nonlocal most
            alive.append(weakref.ref(self))
            most = max(most, sum(member() is not None for member in alive))
            super().__init__(*arguments)  # type: ignore[arg-type]

    expected = Ensemble.load(tiny_ensemble).predict(sky, EbvPlane.constant(0.02))
    monkeypatch.setattr("deepdisc_ops.inference.ensemble.Member", Counted)
    swapping = Ensemble.load(tiny_ensemble, memory="swap")
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: swapping.predict(sky, EbvPlane.constant(0.02)), range(2)))
    assert most == 1
    assert len(alive) == 6
    for field in fields(Detections):
        if field.name not in {"masks", "extra"}:
            for one in found:
                np.testing.assert_array_equal(getattr(one, field.name), getattr(expected, field.name))


def test_members_share_the_pixels(tiny_ensemble: Path, sky: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[NDArray[np.float32]] = []
    predict_batch = Member.predict_batch

    def watched(self: Member, tiles: list[NDArray[np.float32]], *arguments: Any) -> list[Detections]:
        seen.extend(tiles)
        return predict_batch(self, tiles, *arguments)

    monkeypatch.setattr(Member, "predict_batch", watched)
    Ensemble.load(tiny_ensemble).predict(sky, EbvPlane.constant(0.0))
    assert len(seen) == 2 * 4
    assert all(np.shares_memory(tile, sky) for tile in seen)


def broken(ensemble_folder: Path, spaced: Path, how: str) -> Path:
    """A copy of an ensemble whose second member gives numbers that are none, or is damaged on disk."""
    folder = Path(shutil.copytree(ensemble_folder, spaced / "ensemble"))
    path = folder / "member-1.safetensors"
    if how == "damaged":
        path.write_bytes(path.read_bytes()[:-8])
        return folder
    tensors = load_file(path)
    name = next(key for key in tensors if key.startswith("redshift_head") and key.endswith("weight"))
    save_file(tensors | {name: torch.full_like(tensors[name], math.nan)}, path)
    description = yaml.safe_load((folder / "ensemble.yaml").read_text())
    description["members"][1]["sha256"] = sha256(path)
    (folder / "ensemble.yaml").write_text(yaml.safe_dump(description))
    return folder


def test_a_member_that_fails_is_named_and_the_rest_go_on_only_if_asked(
    tiny_ensemble: Path, spaced: Path, sky: NDArray[np.float32], caplog: pytest.LogCaptureFixture
) -> None:
    folder = broken(tiny_ensemble, spaced, "nan")
    with pytest.raises(ArchiveError, match=r"member-1 failed: .*weights, means, sigmas that are no numbers; .*on_failure: skip"):
        Ensemble.load(folder).predict(sky, EbvPlane.constant(0.02))
    rest = Ensemble.load(folder, on_failure="skip")
    found = rest.predict(sky, EbvPlane.constant(0.02))
    rest.predict(sky, EbvPlane.constant(0.02))
    assert list(rest.failures) == ["member-1"]
    assert sum("member-1 is left out" in message for message in caplog.messages) == 1
    assert found.weights.shape == (len(found), 10)
    np.testing.assert_array_equal(found.weights[:, 5:], 0)
    np.testing.assert_allclose(found.weights.sum(1), 1, atol=1e-5)
    assert (found.n_members == 1).all()
    alone = Ensemble.load(tiny_ensemble).members[0].predict(sky[:, :128, :128], lambda x, y: np.full(len(x), 0.02, np.float32))
    assert len(alone) > 5


def test_a_member_damaged_on_disk_can_be_left_out(tiny_ensemble: Path, spaced: Path, sky: NDArray[np.float32]) -> None:
    folder = broken(tiny_ensemble, spaced, "damaged")
    rest = Ensemble.load(folder, on_failure="skip", settings=EnsembleSettings(weights=(1.0, 3.0)))
    assert rest.names == ("member-0",)
    assert "damaged" in rest.failures["member-1"]
    assert len(rest.predict(sky, EbvPlane.constant(0.0))) > 10
    (folder / "member-0.safetensors").unlink()
    with pytest.raises(ArchiveError, match=r"no member of the ensemble is left: member-0: .* missing.*; member-1: .* damaged"):
        Ensemble.load(folder, on_failure="skip")


def test_memory_that_ran_out_stays_that_error(
    tiny_ensemble: Path, sky: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Member, *arguments: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Member, "predict_batch", full)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        Ensemble.load(tiny_ensemble).predict(sky, EbvPlane.constant(0.0))
    assert caught.value.__notes__ == ["member member-0 ran out of memory"]


def test_what_is_asked_of_members_without_it_names_them(tiny_ensemble: Path, sky: NDArray[np.float32]) -> None:
    with pytest.raises(ConfigError, match="member member-0: .*mask head"):
        Ensemble.load(tiny_ensemble).predict(sky, EbvPlane.constant(0.0), masks=True)


def test_masks_come_where_they_are_asked_for(tiny_checkpoints: list[Path], spaced: Path, sky: NDArray[np.float32]) -> None:
    config = read_info(tiny_checkpoints[0]).config
    config = config.model_copy(update={"model": config.model.model_copy(update={"mask_head": True})})
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_member(spaced / str(seed), DeepDisc(config.model, config.inference), config, {"val_nll": 0.0}, step=1)
    write_ensemble(spaced / "one", [spaced / "0"])
    write_ensemble(spaced / "two", [spaced / "0", spaced / "0"])
    write_ensemble(spaced / "different", [spaced / "0", spaced / "1"], settings=EnsembleSettings(match="union"))
    one, two, different = (Ensemble.load(spaced / name) for name in ("one", "two", "different"))
    single, double = (ensemble.predict(sky, EbvPlane.constant(0.0), masks=True) for ensemble in (one, two))
    assert single.masks is not None
    assert single.masks.shape == (len(single), 28, 28)
    assert len(single) > 10
    np.testing.assert_array_equal(double.masks, single.masks)
    union = different.predict(sky, EbvPlane.constant(0.0), masks=True)
    assert union.masks is not None
    assert union.masks.dtype == np.uint8
    assert one.predict(sky, EbvPlane.constant(0.0)).masks is None


def test_how_members_are_combined_is_kept_and_can_be_changed(tiny_checkpoints: list[Path], spaced: Path) -> None:
    kept = EnsembleSettings(match="majority", weights=(1.0, 3.0), components=4)
    write_ensemble(spaced / "e", tiny_checkpoints, settings=kept)
    ensemble = Ensemble.load(spaced / "e")
    assert (ensemble.settings, ensemble.weights, ensemble.components) == (kept, (0.25, 0.75), 4)
    other = Ensemble.load(spaced / "e", settings=EnsembleSettings(weights="uniform"))
    assert (other.settings.match, other.weights, other.components) == ("intersection", (0.5, 0.5), 10)
    bounded = Ensemble.load(spaced / "e", settings=EnsembleSettings(components=4, max_divergence=0.1))
    assert bounded.components == 10
    with pytest.raises(ConfigError, match="3 values for 2 members"):
        write_ensemble(spaced / "f", tiny_checkpoints, settings=EnsembleSettings(weights=(1.0, 1.0, 1.0)))
    assert not (spaced / "f").exists()


def test_ensembles_of_before_the_settings_load(tiny_ensemble: Path, spaced: Path) -> None:
    folder = Path(shutil.copytree(tiny_ensemble, spaced / "ensemble"))
    description = yaml.safe_load((folder / "ensemble.yaml").read_text())
    del description["combination"]
    (folder / "ensemble.yaml").write_text(yaml.safe_dump(description))
    assert Ensemble.load(folder).settings == EnsembleSettings()


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
    with pytest.raises(ArchiveError, match=f"does not exist; did you mean '{folder.name}'"):
        Ensemble.load(folder.with_name(folder.name[:-1]))


def test_an_ensemble_tells_no_paths_of_the_machine_that_trained_it(tiny_checkpoints: list[Path], spaced: Path) -> None:
    network, info = load_member(tiny_checkpoints[0])
    start = spaced / "starts" / "start.safetensors"
    model = info.config.model.model_copy(update={"weights": start})
    data = info.config.data.model_copy(update={"path": spaced / "scenes"})
    config = info.config.model_copy(update={"model": model, "data": data})
    save_member(spaced / "member", network, config, {"val_nll": 1.0}, 1)
    write_ensemble(spaced / "ensemble", [spaced / "member"])
    told = (spaced / "ensemble" / "ensemble.yaml").read_text()
    assert str(spaced) not in told
    assert "weights: start.safetensors" in told


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
