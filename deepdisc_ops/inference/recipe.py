"""All that a process needs to look at windows of a mosaic, as paths and options: small, nothing open, so it can be sent anywhere.

The process that asks and the actors of `inference.cluster` build from the same recipe, so they look alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from deepdisc_ops.config import EnsembleSettings
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.inference.examine import DomainCheck, Photometer, ScaleCheck, mosaic_noise
from deepdisc_ops.inference.mosaic import Examiner, LocalLooker, Predictor
from deepdisc_ops.sky.domain import Domain
from deepdisc_ops.sky.dust import Reddening, ebv_source
from deepdisc_ops.sky.images import Mosaic, open_mosaic


@dataclass(frozen=True)
class ImageRecipe:
    """Files of a mosaic and how to read them; the options are those of `sky.images.open_mosaic`. Paths become absolute."""

    paths: tuple[Path, ...]
    plane_bands: tuple[str, ...] | None = None
    zero_point: float | None = None
    pixel_scale: float | None = None
    require_wcs: bool = True
    blank: float | None = None
    bad_bits: tuple[str, ...] | int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", tuple(path.absolute() for path in self.paths))

    def open(self, bands: Sequence[str]) -> Mosaic:
        """The mosaic, its planes in the order of ``bands``."""
        return open_mosaic(
            self.paths,
            bands,
            plane_bands=self.plane_bands,
            zero_point=self.zero_point,
            pixel_scale=self.pixel_scale,
            require_wcs=self.require_wcs,
            blank=self.blank,
            bad_bits=self.bad_bits,
        )


@dataclass(frozen=True)
class ModelRecipe:
    """An ensemble folder and how its members are run; the options are those of `Ensemble.load`. The path becomes absolute.

    masks: whether objects keep their masks.
    """

    folder: Path
    device: str = "cpu"
    settings: EnsembleSettings | None = None
    memory: Literal["keep", "swap"] = "keep"
    on_failure: Literal["raise", "skip"] = "raise"
    masks: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", self.folder.absolute())

    def load(self) -> Ensemble:
        """The members, read."""
        return Ensemble.load(self.folder, self.device, self.settings, memory=self.memory, on_failure=self.on_failure)

    def predictor(self, ensemble: Ensemble) -> Predictor:
        """What ``ensemble`` finds in a window."""
        return lambda image, ebv: ensemble.predict(image.data, ebv, image.mask, masks=self.masks)


@dataclass(frozen=True)
class EbvRecipe:
    """Where E(B-V) comes from; the options are those of `sky.dust.ebv_source`. The path becomes absolute."""

    source: str = "0.03"
    maps: Path | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.maps is not None:
            object.__setattr__(self, "maps", self.maps.absolute())

    def open(self) -> Reddening:
        """The source, its map read."""
        return ebv_source(self.source, self.maps, self.scale)


@dataclass(frozen=True)
class EnsembleLooker(LocalLooker):
    """A `LocalLooker` whose predictor is an ensemble; ``failures`` grows by the members that it leaves out, and why."""

    failures: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A mosaic, an ensemble, reddening, and what else is measured; the options are those of `examiners` and `LocalLooker`.

    To be carried out on other machines, its paths must be seen from there.
    """

    images: ImageRecipe
    model: ModelRecipe
    ebv: EbvRecipe = EbvRecipe()
    photometry: bool = True
    diameter: float | None = None
    order: int | None = None
    workers: int = 1

    def looker(self) -> EnsembleLooker:
        """All of it read and opened, in this process."""
        ensemble = self.model.load()
        return self.looker_with(ensemble, self.images.open(ensemble.bands))

    def looker_with(self, ensemble: Ensemble, mosaic: Mosaic) -> EnsembleLooker:
        """The same with an ensemble and a mosaic that are there already."""
        domains = [seat.info.domain for seat in ensemble.seats]
        return EnsembleLooker(
            mosaic,
            self.model.predictor(ensemble),
            self.ebv.open(),
            self.workers,
            examiners(mosaic, domains, ensemble.pixel_scale, photometry=self.photometry, diameter=self.diameter),
            self.order,
            ensemble.failures,
        )


def examiners(
    mosaic: Mosaic,
    domains: Sequence[Domain | None] = (),
    trained_scale: float | None = None,
    *,
    photometry: bool = True,
    diameter: float | None = None,
) -> list[Examiner]:
    """What is measured on windows: the light of objects, and whether the window is like the training images of all ``domains``.

    A member without a domain is not compared, and members of one training set are compared once; where no domain is known,
    the pixel scale (arcsec) is. ``diameter`` (arcsec) is that of `sky.photometry.measure`.
    """
    known = {str(domain.as_dict()): domain for domain in domains if domain is not None}
    made: list[Examiner] = [DomainCheck(domain) for domain in known.values()]
    if not made and trained_scale is not None:
        made.append(ScaleCheck(trained_scale))
    return [Photometer(diameter, mosaic_noise(mosaic)), *made] if photometry else made
