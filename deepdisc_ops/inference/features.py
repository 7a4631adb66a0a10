"""What a member's redshift head is shown of the gold galaxies of a data set: pooled features of their catalogued boxes.

Boxes are those of the truth, so that networks are compared on the same objects, found or not (JADES paper). Glossary:
N galaxies, D features: channels times pooled cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.data.loader import label
from deepdisc_ops.data.pixels import read_pixels
from deepdisc_ops.data.records import GALAXY, DatasetInfo, Record
from deepdisc_ops.data.store import open_dataset
from deepdisc_ops.errors import CatalogError, ConfigError
from deepdisc_ops.inference.engine import Member
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.inference.tuning import Progress
from deepdisc_ops.model.weights import WEIGHTS

FORMAT = 1


@dataclass(frozen=True)
class Features:
    """Of N gold galaxies: values (N, D), true redshift, AB magnitude in ``band``, and key of the image each is in, (N,)."""

    values: NDArray[np.float32]
    redshift: NDArray[np.float64]
    magnitude: NDArray[np.float64]
    image: NDArray[np.str_]
    band: str

    def __len__(self) -> int:
        return len(self.redshift)

    def save(self, file: Path) -> None:
        """Into an HDF5 file, whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{file.name}.part")
        with h5py.File(unfinished, "w") as store:
            store.attrs["format"], store.attrs["band"] = FORMAT, self.band
            store.create_dataset("features", data=self.values, compression="gzip", shuffle=True)
            store["redshift"], store["magnitude"] = self.redshift, self.magnitude
            store["image"] = self.image.astype(h5py.string_dtype())
        unfinished.replace(file)

    @classmethod
    def load(cls, file: Path) -> Features:
        """What `save` wrote."""
        try:
            with h5py.File(file, "r") as store:
                if store.attrs.get("format") != FORMAT:
                    raise CatalogError(f"{file} is of another format than {FORMAT}; write it again")
                values, redshift, magnitude = (store[name][()] for name in ("features", "redshift", "magnitude"))
                return cls(values, redshift, magnitude, store["image"].asstr()[()].astype(np.str_), str(store.attrs["band"]))
        except (OSError, KeyError) as error:
            raise CatalogError(f"{file} holds no features ({error}); write them with `deepdisc-ops members features`") from None


def features_of(
    model: Path, dataset: Path, split: str = "test", *, member: int = 0, device: str = "cpu", progress: Progress | None = None
) -> Features:
    """What the redshift head of a checkpoint folder, or of one member of an ensemble, is shown of a split's gold galaxies.

    Images go through the network whole. Raises `CatalogError` where there is no such galaxy, `ConfigError` where no such member.
    """
    seer, data = _member(model, member, device), open_dataset(dataset)
    records = data.records(split)
    parts = []
    for number, record in enumerate(records):
        parts.append(_seen(seer, record, data.info))
        if progress:
            progress(number + 1, len(records))
    if not sum(len(part) for part in parts):
        raise CatalogError(
            f"{dataset} has {len(records)} images in split {split!r} and no gold galaxy with a redshift in them; name another split"
        )
    values, redshift, magnitude, image = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("values", "redshift", "magnitude", "image")
    )
    return Features(values, redshift, magnitude, image, seer.config.model.redshift_head.gold_band)


def _member(model: Path, number: int, device: str) -> Member:
    if (model / WEIGHTS).exists():  # a checkpoint folder, a single member
        seats: list[Callable[[], Member]] = [partial(Member.load, model, device)]
    else:
        seats = [seat.load for seat in Ensemble.load(model, device).seats]
    if not 0 <= number < len(seats):
        raise ConfigError(f"{model} has no member {number}; expected 0 to {len(seats) - 1}")
    return seats[number]()


def _seen(seer: Member, record: Record, info: DatasetInfo) -> Features:
    config = seer.config
    image, labels = read_pixels(record, config.model.bands, with_wcs=False), label(record.objects, info, config.model, config.data)
    gold = np.isfinite(labels.redshift) & (record.objects.classes == GALAXY)  # a model may have learned stars at z = 0
    values = seer.pooled(image.data, labels.boxes[gold])
    magnitude, band = np.asarray(record.objects.mag[gold], np.float64), config.model.redshift_head.gold_band
    return Features(values, labels.redshift[gold].astype(np.float64), magnitude, np.full(int(gold.sum()), record.key), band)
