"""Pictures of MLflow's web interface for docs/tracking.md, taken from a sweep's store by headless Chromium.

::

    python -m benchmarks.tracking_pictures SWEEP_FOLDER [--out docs]

It needs selenium, and chromium and chromedriver from the distribution.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from deepdisc_ops.tracking import KIND_TAG, PARENT_TAG, Tracker, store_uri, ui_command

LARGEST_BYTES = 200_000
START_S, DRAWN_S = 300, 180
PICTURES = {
    "tracking-sweep": (1500, 620),
    "tracking-compare": (1500, 1000),
    "tracking-child": (1500, 950),
    "tracking-system": (1500, 800),
}
"""Width and height of each, in pixels."""
DRAWN = """
    const main = document.querySelector('main') || document.body;
    const turning = '[aria-busy=true], [role=progressbar], [class*=spin], [class*=skeleton]';
    const waits = main.querySelectorAll(turning);
    const seen = one => one.offsetParent && one.getBoundingClientRect().top < innerHeight;
    return main.innerText.length > 200 && ![...waits].some(seen);
"""
"""Whether a page shows its contents and nothing that turns; charts below the window's edge wait to be scrolled to."""
TIDIED = (
    "//*[normalize-space(text())='Model training']",
    "//section//button[@aria-label='Close']",
    "//button[@aria-label='Close']",
)
"""What is clicked: the view for trained models rather than that for language models, and away with the assistant."""
BARE = "document.head.insertAdjacentHTML('beforeend', '<style>.modebar-container { display: none }</style>')"
CHARTS = "^val_(nll|sigma_iqr|outliers|completeness|bias|loss)$"
"""The charts that are shown, among some dozens."""
SETTLE_S = 10
SCREEN = {"deviceScaleFactor": 1, "mobile": False}


def pages(tracker: Tracker, sweep: str | None) -> dict[str, str]:
    """The part of the address after the server's, for every picture; of the named sweep or the newest."""
    parent = next(run for run in tracker.runs({KIND_TAG: "sweep"}) if sweep in (None, run.name, run.run_id))
    metric, sign = parent.tags["metric"], 1 if parent.tags["mode"] == "min" else -1
    children = [run for run in tracker.children(parent.run_id) if f"best_{metric}" in run.metrics]
    best = min(children, key=lambda run: sign * run.metrics[f"best_{metric}"])
    runs = f"/#/experiments/{tracker.experiment_id}/runs"
    trials = quote(f"tags.`{PARENT_TAG}` = '{parent.run_id}'")
    order = f"orderByKey={quote(f'metrics.`best_{metric}`')}&orderByAsc={str(sign > 0).lower()}"
    return {
        "tracking-sweep": f"{runs}?searchFilter={trials}&{order}",
        "tracking-compare": f"{runs}?searchFilter={trials}&{order}&compareRunsMode=CHART",
        "tracking-child": f"{runs}/{best.run_id}/model-metrics",
        "tracking-system": f"{runs}/{best.run_id}/system-metrics",
    }


@contextlib.contextmanager
def interface(uri: str) -> Iterator[str]:
    """Address of MLflow's web interface of a store: the server's own, or one on a free port."""
    if uri.startswith("http"):
        yield uri
        return
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen([sys.executable, "-m", *ui_command(uri, port)], stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + START_S
            while not answers(f"{address}/health"):
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"MLflow's interface did not start: {log.read().decode()[-500:]}")
                time.sleep(0.5)
            yield address
        finally:
            server.terminate()
            server.wait()


def answers(url: str) -> bool:
    """Whether a server is there."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Chromium without a window, steered by its own driver."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-dev-shm-usage"):
        options.add_argument(word)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium has none for root
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(DRAWN_S)
    try:
        yield driver
    finally:
        driver.quit()


def photograph(driver: Any, url: str, path: Path, size: tuple[int, int]) -> None:
    """Take a picture of a page once it is drawn, with few colours where it would be large."""
    from selenium.webdriver.support.wait import WebDriverWait

    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(zip(("width", "height"), size, strict=True)) | SCREEN)
    wait = WebDriverWait(driver, DRAWN_S, poll_frequency=1)
    for labels in (TIDIED, ()):  # clicks are remembered, but lead away from some pages
        driver.get("about:blank")  # an address that differs behind its # alone loads nothing
        driver.get(url)
        wait.until(lambda page: page.execute_script(DRAWN))
        for label in labels:
            for button in driver.find_elements("xpath", label):
                if button.is_displayed():
                    button.click()
    driver.execute_script(BARE)
    for field in driver.find_elements("xpath", "//input[@placeholder='Search metric charts']"):
        if "system-metrics" not in url:
            field.send_keys(CHARTS)
    time.sleep(SETTLE_S)
    wait.until(lambda page: page.execute_script(DRAWN))
    driver.save_screenshot(str(path))
    picture = Image.open(path).convert("RGB")
    for colours in (256, 128, 64, 32):
        picture.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= LARGEST_BYTES:
            return
    raise SystemExit(f"{path} is larger than {LARGEST_BYTES} bytes; make the window smaller")


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a sweep's folder, an .db file or the URI of a store")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--sweep", help="name or id of the sweep; the newest without one")
    parser.add_argument("--only", choices=PICTURES, help="one of the pictures")
    options = parser.parse_args()
    tracker = Tracker(store_uri(options.store), create=False)
    with interface(tracker.uri) as address, browser() as driver:
        for name, page in pages(tracker, options.sweep).items():
            if options.only not in (None, name):
                continue
            path = options.out.absolute() / f"{name}.png"
            photograph(driver, address + page, path, PICTURES[name])
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB of {page}")


if __name__ == "__main__":
    main()
