"""The canary sings as it did when it was packed, or says who does not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deepdisc_ops.errors import ArchiveError
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.serving import archive, canary
from deepdisc_ops.serving.canary import ALIKE, SAME, Canary, Difference, Mixture, difference


@pytest.fixture(scope="module")
def packed(tiny_ensemble: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    return archive.unpack_archive(archive.build_archive([tiny_ensemble], folder / "e.mar"), folder / "unpacked")


@pytest.fixture(scope="module")
def made(packed: Path) -> Canary:
    return canary.decode((packed / canary.CANARY).read_bytes(), "the canary")


@pytest.fixture
def ensemble(packed: Path) -> Iterator[Ensemble]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Ensemble.load(packed)
    torch.set_num_threads(threads)


def disturb(ensemble: Ensemble, number: int, by: float) -> None:
    """Add to the last layer's bias of a member: the means of its components move."""
    last = ensemble.seats[number].load().network.redshift_head.mixture[-1]
    with torch.no_grad():
        last.bias += by


def test_it_sings_the_same_where_it_was_packed(ensemble: Ensemble, packed: Path, made: Canary) -> None:
    canary.check(ensemble, packed)
    assert ensemble.failures == {}
    assert difference(made.expected, canary.ask(ensemble, made.image, made.boxes)) == Difference()


def test_it_survives_its_file(made: Canary) -> None:
    body = canary.encode(made)
    assert canary.encode(canary.decode(body, "x")) == body
    with pytest.raises(ArchiveError, match="x is no canary"):
        canary.decode(body[:-100], "x")


def test_it_holds_sources_of_all_bands_and_something_is_found(made: Canary) -> None:
    assert made.image.shape == (6, canary.SIDE, canary.SIDE)
    assert len(made.expected.boxes) > 0
    noise = np.median(np.abs(np.diff(made.image, axis=2)), axis=(1, 2)) * 1.4826 / np.sqrt(2)
    assert noise == pytest.approx([8.0, 4.0, 4.0, 7.0, 13.0, 38.0], rel=0.1)
    assert (made.image.max(axis=(1, 2)) > 20 * noise).all()
    assert ((made.boxes[:, 2:] - made.boxes[:, :2]) > 2).all()


@pytest.mark.parametrize("number", [0, 1])
def test_a_member_that_computes_otherwise_is_named(ensemble: Ensemble, packed: Path, number: int) -> None:
    disturb(ensemble, number, 0.1)
    with pytest.raises(ArchiveError, match=f"member member-{number} answers its canary otherwise"):
        canary.check(ensemble, packed)


def test_rounding_is_no_reason(ensemble: Ensemble, packed: Path) -> None:
    disturb(ensemble, 0, 1e-6)
    canary.check(ensemble, packed)


def test_a_member_that_computes_otherwise_is_left_out_where_the_ensemble_says_so(packed: Path) -> None:
    ensemble = Ensemble.load(packed, on_failure="skip")
    disturb(ensemble, 1, 0.1)
    canary.check(ensemble, packed)
    assert list(ensemble.failures) == ["member-1"]
    disturb(ensemble, 0, 0.1)
    with pytest.raises(ArchiveError, match="member member-0 answers"):
        canary.check(ensemble, packed)


def test_other_objects_are_noticed_where_redshifts_are_right(ensemble: Ensemble, packed: Path) -> None:
    for seat in ensemble.seats:
        seat.load().network.inference = replace_threshold(seat.load().network.inference, 0.99)
    with pytest.raises(ArchiveError, match="the ensemble answers its canary otherwise"):
        canary.check(ensemble, packed)


def replace_threshold(settings: object, threshold: float) -> object:
    return settings.model_copy(update={"score_threshold": threshold})  # type: ignore[attr-defined]


def test_a_folder_of_before_warns_and_a_lost_or_changed_canary_is_refused(
    ensemble: Ensemble, packed: Path, tiny_ensemble: Path, spaced: Path, caplog: pytest.LogCaptureFixture
) -> None:
    canary.check(ensemble, tiny_ensemble)
    assert "has no canary" in caplog.text
    folder = Path(shutil.copytree(packed, spaced / "copy"))
    path = folder / canary.CANARY
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ArchiveError, match=r"canary\.safetensors is damaged"):
        canary.check(ensemble, folder)
    path.unlink()
    with pytest.raises(ArchiveError, match=r"canary\.safetensors is missing"):
        canary.check(ensemble, folder)


def test_order_and_splitting_of_components_make_no_difference(made: Canary, rng: np.random.Generator) -> None:
    found = made.expected.found
    order = rng.permutation(found.means.shape[1])
    shuffled = Mixture(*(column[:, order] for column in found))
    twice = Mixture(np.tile(found.weights, 2) / 2, np.tile(found.means, 2), np.tile(found.sigmas, 2))
    rows = rng.permutation(len(made.expected.boxes))
    for other in (shuffled, twice):
        moved = replace(
            made.expected,
            boxes=made.expected.boxes[rows],
            scores=made.expected.scores[rows],
            found=Mixture(*(column[rows] for column in other)),
        )
        apart = difference(made.expected, moved)
        assert apart.density < 1e-6
        assert (apart.box_px, apart.score, apart.lost) == (0, 0, 0)


def test_differences_are_measured_as_they_are(made: Canary) -> None:
    expected = made.expected
    moved = replace(expected, boxes=expected.boxes + np.float32(0.25), scores=expected.scores - np.float32(0.05))
    apart = difference(expected, moved)
    assert (apart.box_px, apart.score) == pytest.approx((0.25, 0.05), abs=1e-4)
    assert not apart.within(SAME)
    assert apart.within(ALIKE)
    half = len(expected.boxes) // 2
    fewer = replace(
        expected, boxes=expected.boxes[:half], scores=expected.scores[:half], found=Mixture(*(c[:half] for c in expected.found))
    )
    assert difference(expected, fewer).lost == pytest.approx(1 - 2 * half / (half + len(expected.boxes)))


def test_no_number_is_as_far_as_can_be(made: Canary) -> None:
    found = made.expected.found
    nothing = replace(made.expected, found=found._replace(means=np.full_like(found.means, np.nan)))
    assert difference(made.expected, nothing).density == np.inf
    assert not difference(made.expected, nothing).within(ALIKE)


def test_nothing_found_twice_is_the_same(made: Canary) -> None:
    found = Mixture(*(column[:0] for column in made.expected.found))
    none = replace(made.expected, boxes=made.expected.boxes[:0], scores=made.expected.scores[:0], found=found)
    assert difference(none, none) == Difference()
    assert difference(none, made.expected).lost == 1
