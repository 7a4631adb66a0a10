from __future__ import annotations

import numpy as np
import pytest
import yaml

from deepdisc_ops.data import reference
from deepdisc_ops.data.records import SPLITS
from deepdisc_ops.data.reference import (
    SKIES,
    build_reference,
    check_reference,
    differences,
    fingerprint,
    freeze,
    load_reference,
    reference_names,
    reference_scene,
    settings_digest,
)
from deepdisc_ops.data.simulate import scene_seed
from deepdisc_ops.errors import ConfigError

DIGESTS = {
    "lsst_reference": "f61e1ceeacfb54324439570e021db377bbb680f7c163bba1adf209cfe45188d3",
    "lsst_reference_dc2": "2a511c2b2fcfaaa5593d18cb06c26b13b78c51d5192a891e4b1c34f04c300a51",
}

SMALL = {
    "name": "small",
    "description": "a sky for tests",
    "size": 64,
    "seed": 5,
    "settings": {"survey": "lsst", "ebv": 0.05},
    "splits": {"train": {"scenes": 2}, "test": {"scenes": 1, "changes": {"years": 1.0}}},
}


@pytest.fixture
def skies(tmp_path, monkeypatch):
    folder = tmp_path / "some skies"
    folder.mkdir()
    monkeypatch.setattr(reference, "SKIES", folder)
    (folder / "small.yaml").write_text(freeze(SMALL))
    return folder


def rewrite(folder, **changes) -> None:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def test_the_frozen_skies_are_these_and_have_not_changed():
    assert {name: load_reference(name).digest for name in reference_names()} == DIGESTS
    assert all((SKIES / f"{name}.yaml").is_file() for name in DIGESTS)


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_this_version_draws_the_frozen_skies(name):
    check_reference(name)


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_skies_have_all_splits_and_enough_gold_galaxies_to_test_on(name):
    sky = load_reference(name)
    assert set(sky.splits) == set(SPLITS)
    gold = []
    for index in range(6):
        catalog = reference_scene(sky, "test", index).catalog
        gold.append(int(((catalog["class"] == 0) & (catalog["mag_i"] < 25.3)).sum()))
    assert np.mean(gold) * sky.splits["test"].scenes > 10_000


def test_no_test_scene_is_painted_from_galaxies_of_the_other_splits():
    sky = load_reference("lsst_reference_dc2")
    parts = {split: sky.sky_settings(split).dc2_part for split in SPLITS}
    assert parts == {"train": "train", "validation": "train", "calibration": "train", "test": "test"}


def test_the_same_sky_can_be_seen_at_another_depth(skies):
    sky = load_reference("small")
    deep, shallow = (reference_scene(sky, "train", 1, years=years) for years in (10.0, 1.0))
    assert deep.catalog["mag_i"].tolist() == shallow.catalog["mag_i"].tolist()
    assert (deep.noise < shallow.noise).all()


def test_a_built_sky_holds_the_scenes_of_the_recipe(skies, spaced):
    dataset = build_reference("small", spaced / "built")
    assert {split: len(dataset.records(split)) for split in dataset.splits} == {"train": 2, "test": 1}
    first = dataset.records("test")[0]
    scene = reference_scene(load_reference("small"), "test", 0)
    assert set(first.objects.ids.tolist()) <= set(scene.truth["id"].tolist())
    assert scene.settings.years == 1.0
    assert scene.seed == scene_seed(5, "test", 0)
    again = build_reference("small", spaced / "built", splits=["train"])
    assert len(again) == 3


def test_a_digest_covers_all_that_decides_what_is_drawn(skies):
    sky = load_reference("small")
    digests = {settings_digest(sky)}
    for tree in (
        {"size": 65},
        {"seed": 6},
        {"settings": {"survey": "lsst", "ebv": 0.06}},
        {"splits": {"train": {"scenes": 3}, "test": {"scenes": 1, "changes": {"years": 1.0}}}},
        {"splits": {"train": {"scenes": 2}, "test": {"scenes": 1, "changes": {"years": 2.0}}}},
    ):
        digests.add(yaml.safe_load(freeze(SMALL | tree))["digest"])
    assert len(digests) == 6
    assert yaml.safe_load(freeze(SMALL | {"name": "other", "description": ""}))["digest"] in digests


def test_a_setting_that_is_added_later_changes_no_frozen_sky(skies):
    tree = yaml.safe_load((skies / "small.yaml").read_text())
    del tree["settings"]["artifacts"]  # as if the file were older than the setting
    older = reference.ReferenceSky.model_validate(tree)
    tree["digest"] = settings_digest(older)
    (skies / "small.yaml").write_text(yaml.safe_dump(tree))
    assert load_reference("small").sky_settings("train").artifacts == ()
    check_reference("small")


def test_changed_settings_are_refused(skies):
    rewrite(skies, seed=6)
    with pytest.raises(ConfigError, match="a frozen sky does not change"):
        load_reference("small")


def test_another_sky_than_the_frozen_one_is_noticed(skies):
    tree = yaml.safe_load((skies / "small.yaml").read_text())["fingerprints"]
    tree["test"]["flux"][0] *= 1.001
    del tree["train"]
    rewrite(skies, fingerprints=tree)
    with pytest.raises(ConfigError, match=r"draws another sky.*test: flux.*train: no fingerprint"):
        check_reference("small")
    with pytest.raises(ConfigError, match="draws another sky"):
        build_reference("small", skies / "out")
    assert not (skies / "out").exists()


def test_fingerprints_ignore_rounding_but_not_another_seed(skies):
    sky = load_reference("small")
    frozen = fingerprint(reference_scene(sky, "train", 0))
    rounded = frozen.model_copy(update={"flux": tuple(value * (1 + 5e-5) for value in frozen.flux)})
    assert differences(rounded, frozen) == []
    other = differences(fingerprint(reference_scene(sky, "train", 1)), frozen)
    assert {text.split()[0] for text in other} >= {"magnitude", "flux", "scatter"}


def test_unknown_skies_and_splits_are_told(skies):
    with pytest.raises(ConfigError, match="unknown reference sky 'big', expected one of small"):
        load_reference("big")
    with pytest.raises(ConfigError, match="has no split 'validation'"):
        load_reference("small").sky_settings("validation")
    with pytest.raises(ConfigError, match="has no split 'validation'"):
        build_reference("small", skies / "out", splits=["validation"])
    (skies / "broken.yaml").write_text("name: broken\nsizes: 3\n")
    with pytest.raises(ConfigError, match="sizes"):
        load_reference("broken")
