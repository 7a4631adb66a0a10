"""One engine, two doors: the catalogue of the endpoint is the catalogue of the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.simulate import simulate_scene, write_scene
from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.inference.mosaic import predict_mosaic
from deepdisc_ops.serving import archive, server
from deepdisc_ops.serving.client import Client
from deepdisc_ops.sky.dust import EbvSource
from deepdisc_ops.sky.images import open_mosaic
from deepdisc_ops.sky.matching import match_boxes

pytestmark = pytest.mark.integration

MODEL = Path(__file__).parents[2] / "models" / "lsst-small"


@pytest.fixture(scope="module")
def dust() -> EbvSource:
    """Reddening that varies over the field."""
    return lambda ra, dec: 0.03 + 0.5 * (np.asarray(dec) + 32.0)


def refusal(folder: Path, discovery: Path) -> str:
    """The error line of `predict`, up to its reason; nothing is written."""
    out = folder / "refused.parquet"
    words = ["predict", folder / "sky.fits", "--server", discovery, "--out", out]
    answer = subprocess.run([sys.executable, "-m", "deepdisc_ops", *words], capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr.count("\n") == 1
    assert not out.exists()
    return answer.stderr.partition(" (")[0]


def test_served_catalogue_is_the_in_process_one(tmp_path: Path, dust: EbvSource) -> None:
    write_scene(simulate_scene(SkySettings(), size=(600, 500), seed=5), tmp_path / "sky.fits")
    mar = archive.build_archive([MODEL], tmp_path / "ensemble.mar")
    ensemble = Ensemble.load(MODEL)
    torch.set_num_threads(1)
    info = server.start(mar, tmp_path / "run", threads=1)
    known, forged = tmp_path / "known", tmp_path / "forged"
    text = (tmp_path / "run" / "server.json").read_text()
    for folder, content in ((known, text), (forged, text.replace(info.token, f"x{info.token[1:]}"))):
        folder.mkdir()
        (folder / "server.json").write_text(content)
    try:
        assert refusal(tmp_path, forged) == f"error: {info.url} does not accept the token"
        with open_mosaic(tmp_path / "sky.fits", ensemble.bands) as mosaic, Client(info.url, info.token) as client:
            served = predict_mosaic(mosaic, client.predict, dust, window=320, workers=2)
            local = predict_mosaic(mosaic, lambda i, ebv: ensemble.predict(i.data, ebv, i.mask), dust, window=320)
    finally:
        server.stop(tmp_path / "run")
    assert refusal(tmp_path, known) == f"error: nothing answers at {info.url}"
    assert len(local) > 300
    boxes = [np.stack([table[name] for name in ("x0", "y0", "x1", "y1")], axis=1) for table in (served, local)]
    pairs = match_boxes(*boxes, 0.9)
    threshold = ensemble.members[0].config.inference.score_threshold
    for table, index in ((served, pairs.index1), (local, pairs.index2)):
        alone = np.setdiff1d(np.arange(len(table)), index)
        assert (np.abs(table["score"][alone] - threshold) < 1e-4).all()
    np.testing.assert_allclose(boxes[0][pairs.index1], boxes[1][pairs.index2], atol=1e-3)
    for name in ("mix_weights", "mix_means", "mix_sigmas", "ebv", "score"):
        np.testing.assert_allclose(served[name][pairs.index1], local[name][pairs.index2], atol=1e-4)
