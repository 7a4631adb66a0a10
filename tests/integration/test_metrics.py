"""A real /metrics page: all that dashboard and alerts ask for is on it, with the numbers of what was asked; and real memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from deepdisc_ops.errors import RequestRejected
from deepdisc_ops.serving import archive, memory, metrics, server
from deepdisc_ops.serving.client import Client
from deepdisc_ops.sky.detections import Detections
from deepdisc_ops.sky.dust import EbvPlane
from deepdisc_ops.sky.images import SkyImage

pytestmark = pytest.mark.integration

MAX_WINDOW = 256
BANDS = ("u", "g", "r", "i", "z", "y")
SAMPLE = re.compile(r"([A-Za-z_]\w*)(?:\{(.*)\})? (\S+)")
UNSEEN = {"Requests5XX"}
"""What is on the page only when it happened."""


def window(bands: tuple[str, ...]) -> SkyImage:
    noise = np.random.default_rng(3).normal(0, 9, (len(bands), 200, 250)).astype(np.float32)
    return SkyImage(noise, bands, None, 0.2, np.zeros(noise.shape[1:], bool))


@pytest.fixture(scope="module")
def mar(tiny_ensemble: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archive.build_archive([tiny_ensemble], tmp_path_factory.mktemp("archive") / "e.mar")


@pytest.fixture(scope="module")
def served(mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[server.ServerInfo, Detections]]:
    """A server, and its reply to one window; it has refused another."""
    run_dir = tmp_path_factory.mktemp("run of metrics")
    info = server.start(mar, run_dir, threads=1, max_window=MAX_WINDOW)
    try:
        with Client.from_discovery(run_dir / "server.json") as client:
            found = client.predict(window(BANDS), EbvPlane.constant(0.02))
            with pytest.raises(RequestRejected, match="missing"):
                client.predict(window(BANDS[:5]), EbvPlane.constant(0.02))
        yield info, found
    finally:
        server.stop(run_dir)


@pytest.fixture(scope="module")
def page(served: tuple[server.ServerInfo, Detections]) -> dict[tuple[str, str], float]:
    """Values by name and labels."""
    text = httpx.get(f"{served[0].metrics_url}/metrics", trust_env=False).text
    samples = [match for line in text.splitlines() if (match := SAMPLE.fullmatch(line))]
    return {(match[1], ",".join(sorted((match[2] or "").rstrip(",").split(",")))): float(match[3]) for match in samples}


def values(page: dict[tuple[str, str], float], name: str, label: str = "") -> list[float]:
    return [value for (found, labels), value in page.items() if found == name and label in labels]


def test_everything_that_is_asked_for_is_on_the_page(page: dict[tuple[str, str], float]) -> None:
    told = {name for name, _ in page}
    assert metrics.names(metrics.OWN) <= told
    assert metrics.names(metrics.TORCHSERVE) - UNSEEN <= told


def test_the_numbers_are_those_of_what_was_asked(
    page: dict[tuple[str, str], float], served: tuple[server.ServerInfo, Detections], mar: Path
) -> None:
    info, found = served
    assert values(page, "deepdisc_requests_total", 'status="422"') == [1]
    assert sum(values(page, "deepdisc_requests_total", 'status="200"')) >= 1
    assert values(page, "deepdisc_objects_total")[0] >= len(found) > 0
    assert values(page, "deepdisc_megapixels_total")[0] >= 0.05
    assert values(page, "deepdisc_request_seconds_sum")[0] == pytest.approx(
        sum(values(page, "deepdisc_stage_seconds_total")), rel=1e-3
    )
    assert values(page, "deepdisc_members") == [2]
    assert values(page, "deepdisc_members_left_out") == [0]
    assert values(page, "deepdisc_worker_starts_total") == [1]
    assert values(page, "deepdisc_model", f'version="{archive.inspect_archive(mar)["version"]}"') == [1]
    (worker,) = info.worker_pids
    assert values(page, "deepdisc_resident_bytes")[0] == pytest.approx(psutil.Process(worker).memory_info().rss, rel=0.1)


def test_a_worker_needs_about_the_memory_that_the_archive_tells(served: tuple[server.ServerInfo, Detections], mar: Path) -> None:
    (worker,) = served[0].worker_pids
    status = Path(f"/proc/{worker}/status").read_text()
    peak = 1024 * int(re.findall(r"VmHWM:\s*(\d+)", status)[0])
    description = archive.inspect_archive(mar)
    expected = memory.estimate(description, MAX_WINDOW).total
    assert 0.7 < expected / peak < 1.4
    assert 0.7 < memory.measure(mar, MAX_WINDOW) / peak < 1.4


def test_prometheus_finds_the_page_by_file(served: tuple[server.ServerInfo, Detections]) -> None:
    info, _ = served
    (group,) = json.loads((Path(info.run_dir) / "targets.json").read_text())
    assert [f"http://{target}" for target in group["targets"]] == [info.metrics_url]
