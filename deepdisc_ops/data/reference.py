"""Frozen simulated skies, on which every scientific figure of the project is taken.

A sky is a file in skies/: all settings of the simulator, the seed and the number of scenes of each split, with the SHA-256 of
these and of the survey's table, and with a fingerprint of the first scene of each split: sums over what was drawn, compared
to a relative 1e-4 because floating point differs between machines. The settings are refused when they do not fit their
digest, and `check_reference` tells when the simulator has come to draw another sky. What is frozen stays: a changed sky gets
a new name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import Field, PositiveInt

from deepdisc_ops.config import Settings, SkySettings, read_yaml, validate
from deepdisc_ops.data import surveys
from deepdisc_ops.data.simulate import Scene, scene_centre, scene_seed, simulate_dataset, simulate_scene
from deepdisc_ops.data.store import Dataset
from deepdisc_ops.errors import ConfigError, did_you_mean

SKIES = Path(__file__).with_name("skies")
TOLERANCE = 1e-4

Split = Literal["train", "validation", "calibration", "test"]


class SplitSettings(Settings):
    """The scenes of one split, and the settings of the sky that are different in it."""

    scenes: PositiveInt
    changes: dict[str, Any] = Field(default_factory=dict)


class Fingerprint(Settings):
    """What is in a scene. Values of bands are in the survey's order; fluxes nJy, of the whole noiseless image."""

    sources: int
    redshift: float = Field(description="sum over the sources")
    magnitude: float = Field(description="sum over the sources in the gold band, AB")
    flux: tuple[float, ...]
    noise: tuple[float, ...] = Field(description="per pixel of empty sky, nJy")
    scatter: tuple[float, ...] = Field(description="quartile range of the pixels, nJy")


class ReferenceSky(Settings):
    """A frozen sky; size is the side of a scene in pixels."""

    name: str
    description: str
    size: PositiveInt
    seed: int
    settings: SkySettings
    splits: dict[Split, SplitSettings]
    digest: str = ""
    fingerprints: dict[Split, Fingerprint] = Field(default_factory=dict)

    def sky_settings(self, split: str) -> SkySettings:
        """The simulator's settings in a split."""
        stated = self.settings.model_dump(exclude_unset=True)
        return validate(SkySettings, stated | self.part(split).changes, f"split {split} of the sky {self.name}")

    def part(self, split: str) -> SplitSettings:
        """The scenes of a split."""
        parts = dict[str, SplitSettings](self.splits.items())
        if split not in parts:
            raise ConfigError(f"the sky {self.name} has no split {split!r}, {did_you_mean(split, parts)}")
        return parts[split]


def reference_names() -> tuple[str, ...]:
    """Names of the frozen skies."""
    return tuple(sorted(path.stem for path in SKIES.glob("*.yaml")))


def load_reference(name: str) -> ReferenceSky:
    """The frozen sky of that name; `ConfigError` when its settings are not those that were frozen."""
    if name not in reference_names():
        raise ConfigError(f"unknown reference sky {name!r}, {did_you_mean(name, reference_names())}")
    sky = validate(ReferenceSky, read_yaml(SKIES / f"{name}.yaml"), f"reference sky {name}")
    found = settings_digest(sky)
    if found != sky.digest:
        raise ConfigError(
            f"the settings of the sky {name} have the digest {found[:12]}, frozen was {sky.digest[:12] or 'none'}; "
            "a frozen sky does not change: take the settings back and freeze others under another name"
        )
    return sky


def settings_digest(sky: ReferenceSky) -> str:
    """SHA-256 of all that decides what is drawn: size, seed, survey, and the settings and number of scenes of each split.

    Settings count as the file states them, and of the survey what is not a default: what the simulator learns later, and
    does not do unless told, changes no frozen sky.
    """
    survey = surveys.survey(sky.settings.survey)
    splits = {}
    for split in sorted(sky.splits):
        settings = sky.sky_settings(split).model_dump(mode="json", exclude_unset=True)
        splits[split] = {"scenes": sky.splits[split].scenes, "settings": settings}
    tree = {
        "size": sky.size,
        "seed": sky.seed,
        "survey": {field.name: value for field in fields(survey) if (value := getattr(survey, field.name)) != field.default},
        "splits": splits,
    }
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def reference_scene(sky: ReferenceSky, split: str, index: int, **changes: Any) -> Scene:
    """One scene as `build_reference` draws it; ``changes`` of the settings (``years=1.0``) show the same sky otherwise."""
    settings = validate(SkySettings, sky.sky_settings(split).model_dump() | changes, f"the sky {sky.name}")
    seed = scene_seed(sky.seed, split, index)
    return simulate_scene(settings, size=sky.size, seed=seed, centre=scene_centre(seed))


def build_reference(
    name: str,
    out: Path,
    *,
    splits: Iterable[str] | None = None,
    processes: int = 1,
    packed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Simulate the frozen sky, or some of its splits, into the folder ``out``, or go on where an earlier run stopped.

    progress is called with (scenes done, scenes in all).
    """
    sky = load_reference(name)
    wanted = sky.splits if splits is None else tuple(splits)
    check_reference(name, wanted)
    return simulate_dataset(
        {split: sky.sky_settings(split) for split in sky.splits},
        out,
        counts={split: sky.part(split).scenes for split in wanted},
        size=sky.size,
        seed=sky.seed,
        processes=processes,
        packed=packed,
        progress=progress,
    )


def fingerprint(scene: Scene) -> Fingerprint:
    """Sums over a scene that change when another sky is drawn and hardly when arithmetic rounds otherwise."""
    catalog, gold = scene.catalog, scene.survey.gold_band
    low, high = np.quantile(scene.image.reshape(len(scene.survey.bands), -1), (0.25, 0.75), axis=1)

    def values(column: Any) -> tuple[float, ...]:
        return tuple(float(f"{value:.7g}") for value in np.atleast_1d(np.asarray(column, np.float64)))

    return Fingerprint(
        sources=len(catalog),
        redshift=values(np.sum(catalog["redshift"], dtype=np.float64))[0],
        magnitude=values(np.sum(catalog[f"mag_{gold}"], dtype=np.float64))[0],
        flux=values(scene.noiseless.sum(axis=(1, 2), dtype=np.float64)),
        noise=values(scene.noise),
        scatter=values(high - low),
    )


def differences(found: Fingerprint, frozen: Fingerprint, tolerance: float = TOLERANCE) -> list[str]:
    """What of a fingerprint is not as frozen, in words."""
    there, expected = found.model_dump(), frozen.model_dump()
    return [
        f"{field} {np.round(there[field], 1).tolist()} instead of {np.round(value, 1).tolist()}"
        for field, value in expected.items()
        if np.shape(there[field]) != np.shape(value) or not np.allclose(there[field], value, rtol=tolerance, atol=0)
    ]


def check_reference(name: str, splits: Iterable[str] | None = None) -> None:
    """Draw the first scene of each split, by default of all; `ConfigError` names all in which it is not the frozen one."""
    sky = load_reference(name)
    frozen_prints = dict[str, Fingerprint](sky.fingerprints.items())
    faults = []
    for split in sky.splits if splits is None else splits:
        found = fingerprint(reference_scene(sky, split, 0))
        frozen = frozen_prints.get(split)
        unlike = ["no fingerprint"] if frozen is None else differences(found, frozen)
        faults += [f"{split}: {unlike[0]}" + (f" and {len(unlike) - 1} more" if unlike[1:] else "")] if unlike else []
    if faults:
        raise ConfigError(
            f"this version draws another sky than the frozen {name} ({'; '.join(faults)}); "
            "use the version that froze it, or freeze the new one under another name"
        )


def freeze(tree: Mapping[str, Any]) -> str:
    """YAML of a new frozen sky from name, description, size, seed, settings and splits: all settings, digest and fingerprints."""
    settings = validate(SkySettings, tree["settings"], "settings of the sky to freeze").model_dump()
    recipe = {key: value for key, value in tree.items() if key not in ("digest", "fingerprints")} | {"settings": settings}
    sky = validate(ReferenceSky, recipe, "sky to freeze")
    prints = {split: fingerprint(reference_scene(sky, split, 0)) for split in sky.splits}
    frozen = sky.model_copy(update={"digest": settings_digest(sky), "fingerprints": prints})
    return yaml.safe_dump(frozen.model_dump(mode="json"), sort_keys=False, width=132, default_flow_style=None)
