"""A network that cannot learn four scenes by heart cannot learn a survey."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import gaussian_kde
from training_runs import config

from deepdisc_ops.data.loader import training_redshifts
from deepdisc_ops.data.store import open_dataset
from deepdisc_ops.model.weights import load_member
from deepdisc_ops.training import loop
from deepdisc_ops.training.validation import validate


@pytest.mark.slow
def test_four_scenes_are_learned_by_heart(mini_dataset: Path, spaced: Path) -> None:
    model = {"box_head": {"hidden": [128]}, "redshift_head": {"hidden": [128, 64]}}
    data = {"crop": 128, "augment": {"symmetries": "none"}}
    # boxes are widened to 11 px, so that those of close pairs overlap more than survey settings let pass
    inference = {"score_threshold": 0.05, "nms_threshold": 0.7, "proposals_per_megapixel": 30000}
    steps = {"steps": 400, "validate_every": 400, "batch_size": 4, "warmup_steps": 20}
    asked = config(mini_dataset, data=data, model=model, inference=inference, norm="GN", **steps)
    network, info = load_member(loop.train(asked, spaced))
    dataset = open_dataset(mini_dataset)
    records = dataset.records("train")
    found = validate(network, info.config, records, dataset.info)
    z, _ = training_redshifts(records, info.config.model)
    z = z[np.isfinite(z)]
    prior = -float(np.mean(np.log(gaussian_kde(z)(z))))  # knows these very redshifts, if not whose they are
    assert found["val_completeness"] >= 0.98
    assert found["val_nll"] <= prior - 1
