"""The informer: an ensemble trained on a data set, or one that is there already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ceci.config import StageParameter
from rail.core.data import ModelHandle
from rail.core.stage import RailStage
from rail.estimation.informer import CatInformer

from deepdisc_ops.config import TrainingConfig, load
from deepdisc_ops.data.store import Dataset
from deepdisc_ops.errors import CatalogError, ConfigError
from deepdisc_ops.rail.handles import EnsembleHandle, ImagesHandle, check_bands
from deepdisc_ops.rail.packed import PackedEnsemble
from deepdisc_ops.rail.stage import DeepdiscStage, given


class DeepdiscInformer(DeepdiscStage, CatInformer):
    """Train an ensemble of DeepDISC networks on a data set of images, or take a trained one as the model."""

    name = "DeepdiscInformer"
    entrypoint_function = "inform"
    parallel = False
    config_options = RailStage.config_options | {
        "ensemble": StageParameter(
            str, "", msg="A trained archive, ensemble or checkpoint folder to take; nothing is trained then"
        ),
        "settings": StageParameter(str, "small", msg="How to train: a preset (small, lsst, jades) or a YAML file"),
        "overrides": StageParameter(dict, {}, msg="Settings in the place of those, nested or by dotted key, such as train.steps"),
        "members": StageParameter(int, 1, msg="Networks to train, each from the next seed"),
        "runs": StageParameter(str, "", msg="Folder of the trainings, which go on from there; beside the model if not given"),
    }
    inputs = [("input", ImagesHandle)]  # noqa: RUF012  # as ceci has them
    outputs = [("model", EnsembleHandle)]  # noqa: RUF012  # as ceci has them

    def inform(self, training_data: Dataset, **kwargs: Any) -> ModelHandle:
        """The handle of the model that is trained on ``training_data``."""
        return super().inform(training_data, **kwargs)

    def validate(self) -> None:
        """Refuse before the work what cannot be done: images, bands, settings."""
        images = self.images()
        if given(self.config.ensemble):
            check_bands(images, tuple(PackedEnsemble.read(Path(self.config.ensemble)).description["bands"]))
        else:
            config = self.training(0)
            check_bands(images, config.model.bands)
            if self.config.members < 1:
                raise ConfigError(f"members is {self.config.members}; expected 1 or more")

    def run(self) -> None:
        """Train the members in turn, or read those that are there."""
        if given(self.config.ensemble):
            packed = PackedEnsemble.read(Path(self.config.ensemble))
        else:
            packed = PackedEnsemble.gather([self._member(number) for number in range(self.config.members)])
        self.add_data("model", packed)

    def training(self, number: int) -> TrainingConfig:
        """The settings of one member's training."""
        images = self.images()
        if not isinstance(images, Dataset):
            raise CatalogError(f"{images!r} has no training truth; make a data set of it, or name a trained model as ensemble")
        tree = dict(_dotted(self.config.overrides)) | {"data.path": str(images.path)}
        config: TrainingConfig = load(Path(self.config.settings), [f"{key}={json.dumps(value)}" for key, value in tree.items()])
        return config.model_copy(update={"seed": config.seed + number})

    def _member(self, number: int) -> Path:
        from deepdisc_ops.training.loop import train

        out = Path(self.get_output("model", final_name=True)).with_suffix(".runs")
        folder = Path(self.config.runs) if given(self.config.runs) else out
        return train(self.training(number), folder / f"member-{number}", report=self._report)

    def _report(self, step: int, metrics: Mapping[str, float]) -> None:
        self.log.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
