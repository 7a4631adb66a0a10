"""Who looks at a mosaic for ``deepdisc-ops predict``: an ensemble in this process, endpoints, or Ray's actors."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepdisc_ops.cli.words import Words
from deepdisc_ops.errors import ConfigError

if TYPE_CHECKING:
    from deepdisc_ops.config import EnsembleSettings
    from deepdisc_ops.inference.forced import ForcedLooker
    from deepdisc_ops.inference.mosaic import Looker
    from deepdisc_ops.inference.recipe import EbvRecipe, ImageRecipe, Recipe
    from deepdisc_ops.serving.fleet import Fleet
    from deepdisc_ops.sky.images import Mosaic

STRIDE = 32
"""Windows start on multiples of this and of the members' strides."""


@dataclass(frozen=True)
class Eyes:
    """Who looks at which mosaic, and what has to be known of them.

    about: what a run with them is about; order: of the HEALPix cells of the area, if that is wanted; failures: members that were
    left out, and why.
    """

    mosaic: Mosaic
    looker: Looker
    classes: tuple[str, ...]
    stride: int
    about: dict[str, Any]
    provenance: dict[str, str]
    order: int | None
    failures: Mapping[str, str] = field(default_factory=dict)
    forced: ForcedLooker | None = None
    recipe: Recipe | None = None
    fleet: Fleet | None = None

    @property
    def trouble(self) -> Counter[str]:
        """How often which failure of an endpoint was waited out."""
        return Counter() if self.fleet is None else self.fleet.trouble

    def told(self) -> dict[str, str]:
        """What is known of the provenance only at the end: members that were left out, models that answered."""
        failures = "; ".join(f"{name}: {why}" for name, why in self.failures.items())
        models = {} if self.fleet is None else {"model": ", ".join(self.fleet.versions)}
        return ({"failures": failures} if failures else {}) | models


def in_process(stack: ExitStack, recipe: Recipe, words: Words, *, actors: int) -> Eyes:
    """An ensemble in this process; with ``actors`` it only tells of itself here."""
    from deepdisc_ops.inference.ensemble import digest
    from deepdisc_ops.inference.forced import ForcedLooker

    model = replace(recipe.model, device="cpu") if actors else recipe.model
    ensemble = model.load()
    mosaic = stack.enter_context(recipe.images.open(ensemble.bands))
    recipe = replace(recipe, order=_cell_order(mosaic, words))
    looker = recipe.looker_with(ensemble, mosaic)
    settings, name = ensemble.settings.model_dump(mode="json"), digest(recipe.model.folder)
    options = [recipe.model.masks, recipe.model.on_failure, recipe.model.device.partition(":")[0]]
    return Eyes(
        mosaic,
        looker,
        ensemble.seats[0].info.config.model.classes,
        ensemble.stride,
        {"model": name, "members": settings, "options": options},
        {"model": name, "members": json.dumps(settings | {"names": ensemble.names, "shares": ensemble.weights})},
        recipe.order,
        ensemble.failures,
        ForcedLooker(
            mosaic,
            lambda image, boxes, plane: ensemble.redshift(image.data, boxes, plane, image.mask),
            looker.ebv,
            recipe.workers,
            looker.examiners,
        ),
        recipe,
    )


@dataclass(frozen=True)
class Servers:
    """The endpoints of a run: run directories, server.json files or URLs, and how they are dealt with, as `Fleet.open` has it."""

    sources: tuple[str, ...]
    token: str | None = None
    certificate: Path | None = None
    patience_s: float = 300.0
    mixed: bool = False


def server_list(texts: Sequence[str]) -> tuple[str, ...]:
    """The endpoints in options that may hold several, between commas; a path that is there may hold one itself."""
    parts = [[text] if Path(text).exists() else text.split(",") for text in texts]
    return tuple(dict.fromkeys(part.strip() for split in parts for part in split if part.strip()))


def at_endpoints(
    stack: ExitStack,
    servers: Servers,
    images: ImageRecipe,
    ebv: EbvRecipe,
    words: Words,
    *,
    photometry: bool,
    diameter: float | None,
    workers: int | None,
    masks: bool,
) -> Eyes:
    """Endpoints; what is beyond redshifts is measured here. ``workers`` None: as many windows at once as they have room for."""
    from deepdisc_ops.inference.forced import ForcedLooker
    from deepdisc_ops.inference.mosaic import LocalLooker
    from deepdisc_ops.inference.recipe import examiners
    from deepdisc_ops.serving.fleet import Fleet
    from deepdisc_ops.serving.served import served_members

    fleet = stack.enter_context(
        Fleet.open(
            servers.sources,
            token=servers.token,
            certificate=servers.certificate,
            patience_s=servers.patience_s,
            mixed=servers.mixed,
        )
    )
    bands = fleet.bands or images.plane_bands
    if bands is None:
        raise ConfigError("a URL does not tell the model's bands; add --plane-bands, or give the server's run directory")
    mosaic = stack.enter_context(images.open(bands))
    members, order = served_members(fleet.addresses), _cell_order(mosaic, words)
    scale = next((address.pixel_scale for address in fleet.addresses if address.pixel_scale is not None), None)
    measured = examiners(mosaic, [member.domain for member in members], scale, photometry=photometry, diameter=diameter)
    reddening, at_once = ebv.open(), workers or fleet.room
    return Eyes(
        mosaic,
        LocalLooker(mosaic, partial(fleet.predict, masks=masks), reddening, at_once, measured, order),
        members[0].config.model.classes if members else (),
        STRIDE,
        {"model": None if servers.mixed else next(iter(fleet.versions), None), "options": [masks]},
        {"server": ", ".join(servers.sources)},
        order,
        forced=ForcedLooker(mosaic, fleet.redshift, reddening, at_once, measured),
        fleet=fleet,
    )


def on_actors(stack: ExitStack, eyes: Eyes, actors: int, address: str | None, device: str) -> Eyes:
    """The same eyes in so many actors."""
    from deepdisc_ops.inference.cluster import RayLooker

    if eyes.recipe is None:
        raise ValueError("actors need a recipe")
    gpus = 1 if device.startswith("cuda") else 0
    looker = stack.enter_context(RayLooker(eyes.recipe.looker, actors, gpus=gpus, address=address))
    return replace(eyes, looker=looker, failures=looker.failures)


def ensemble_folder(model: Path, stack: ExitStack, *, shared: bool) -> Path:
    """The ensemble folder of an archive, a checkpoint folder, or itself; ``shared``: other machines are to see it."""
    from deepdisc_ops.inference.ensemble import write_ensemble
    from deepdisc_ops.model.weights import DESCRIPTION

    archive = model.suffix == ".mar"
    if not archive and not (model / DESCRIPTION).exists():
        return model
    if shared:
        raise ConfigError(f"{model} is no ensemble folder, which a cluster needs; make one with `deepdisc-ops members gather`")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "ensemble"
    if archive:
        from deepdisc_ops.serving.archive import unpack_archive

        return unpack_archive(model, folder)
    write_ensemble(folder, [model])
    return folder


def combination(folder: Path, overrides: Sequence[str]) -> EnsembleSettings | None:
    """The folder's own settings with ``overrides``, None without any."""
    from deepdisc_ops.config import EnsembleSettings, parse_override, set_by_path, validate
    from deepdisc_ops.inference.ensemble import read_description

    if not overrides:
        return None
    tree = dict(read_description(folder).get("combination", {}))
    for text in overrides:
        set_by_path(tree, *parse_override(text))
    return validate(EnsembleSettings, tree, "--set")


def _cell_order(mosaic: Mosaic, words: Words) -> int | None:
    from deepdisc_ops.sky.catalog.coverage import cell_order

    return cell_order(mosaic.pixel_scale) if words.area else None
