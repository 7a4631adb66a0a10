"""The page of an evaluation, read as text and opened in Chromium."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.simulate import simulate_scene, write_scene
from deepdisc_ops.errors import ConfigError
from deepdisc_ops.photoz.evaluation import Evaluation
from deepdisc_ops.photoz.mixture import GaussianMixture, summarise
from deepdisc_ops.report import evaluate_files, rows
from deepdisc_ops.report.picture import ACROSS, THUMBNAIL, thumbnail_sheets
from deepdisc_ops.sky.catalog import build_catalog, read_catalog, write_catalog
from deepdisc_ops.sky.detections import MASK_SIDE, Detections
from deepdisc_ops.sky.images import open_mosaic

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page in: apt-get install chromium")
OPEN_MS = 3000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sky of 220 pixels and a catalogue of its true objects, with masks and names that need care in HTML."""
    folder = tmp_path_factory.mktemp("page of a sky")
    scene = simulate_scene(SkySettings(density=2.0), size=220, seed=5)
    write_scene(scene, folder / "sky.fits")
    truth = scene.truth
    n, rng = len(truth), np.random.default_rng(1)
    z = np.asarray(truth["redshift"], float)
    means = np.maximum(z + 0.05 * rng.standard_normal(n), 0.05)[:, None]
    y, x = np.mgrid[-1 : 1 : MASK_SIDE * 1j, -1 : 1 : MASK_SIDE * 1j]
    disc = np.where(x**2 + y**2 < 1, 255, 0).astype(np.uint8)
    count = np.ones(n, np.int32)
    objects = Detections(
        np.stack([truth[name] for name in ("x0", "y0", "x1", "y1")], axis=1).astype(np.float32),
        np.full(n, 0.9, np.float32),
        np.zeros(n, np.int32),
        *(part.astype(np.float32) for part in (np.ones((n, 1)), means, np.full((n, 1), 0.05))),
        np.full(n, 0.03, np.float32),
        0 * count,
        count,
        masks=np.repeat(disc[None], n, 0),
    )  # fmt: skip
    summary = summarise(GaussianMixture.from_arrays(objects.weights, objects.means, objects.sigmas))
    with open_mosaic(folder / "sky.fits") as mosaic:
        write_catalog(build_catalog(objects, summary, mosaic.wcs, {}, ()), folder / "a & b.parquet")
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> Evaluation:
    return evaluate_files(folder / "a & b.parquet", folder / "sky.fits", folder / "out", gold_limit=26.5, formats=("png", "svg"))


def page(folder: Path) -> str:
    return (folder / "out" / "index.html").read_text()


def data(folder: Path) -> dict[str, object]:
    found = re.search(r'id="data">(.*?)</script>', page(folder), re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


def in_chromium(path: Path, state: str = "") -> str:
    """The page's elements after its script has run, the address ending in #``state``; clocks are real."""
    assert CHROMIUM
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path.parent / 'profile'}"]
    command += ["--dump-dom", f"{path.resolve().as_uri()}#{state}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def opened_ms(dom: str) -> int:
    """When the page was ready, by its own clock."""
    ready = re.search(r'data-ready-ms="(\d+)"', dom)
    assert ready
    return int(ready[1])


def cells(dom: str, column: str) -> list[float]:
    return [float(value) for value in re.findall(rf'<span class="{column}">([^<]*)</span>', dom)]


def test_the_page_needs_nothing_but_itself(folder: Path, result: Evaluation) -> None:
    text = page(folder)
    outside = re.findall(r"(?:src|href)=\"(?!data:)[^\"]*|url\((?!data:)|@import|https?://", text)
    assert outside == []
    assert "a &amp; b.parquet against sky.fits" in text
    assert "mask: sky blue" in text
    for name, value in rows(result):
        assert html.escape(name, quote=False) in text.replace("&#39;", "'").replace("&#34;", '"')
        assert value in text
    assert text.count("data:image/png;base64,") == len(list((folder / "out").glob("*.png")))
    assert {path.stem for path in (folder / "out").glob("*.svg")} >= {"pit", "redshifts", "coverage", "distribution"}


def test_objects_stand_by_decreasing_residual(folder: Path, result: Evaluation) -> None:
    columns = data(folder)["columns"]
    assert isinstance(columns, dict)
    e = np.abs(columns["e"])
    assert len(e) == result.n_matched > 10
    assert (np.diff(e) <= 0).all()
    assert sum(columns["outlier"]) == round(result.lsst.outlier_fraction * result.n_matched)


def test_thumbnails_show_their_objects(folder: Path) -> None:
    with open_mosaic(folder / "sky.fits") as mosaic:
        truth = read_catalog(folder / "sky.fits", hdu="TRUTH")
        bright = int(np.argmin(truth["mag_i"]))
        x, y = float(truth["x"][bright]), float(truth["y"][bright])
        (sheet,) = thumbnail_sheets(mosaic, [x, np.nan, -5.0, 219.0], [y, 3.0, 3.0, 219.0])
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(sheet))).convert("L"), float)
    assert image.shape == (THUMBNAIL, ACROSS * THUMBNAIL)
    first = image[:, :THUMBNAIL]
    middle = first[THUMBNAIL // 2 - 4 : THUMBNAIL // 2 + 4, THUMBNAIL // 2 - 4 : THUMBNAIL // 2 + 4]
    assert middle.mean() > first.mean() + 20
    assert image[:, THUMBNAIL : 3 * THUMBNAIL].std() < 3  # nowhere, and outside
    assert image[:, 3 * THUMBNAIL : 4 * THUMBNAIL].std() > 3


def test_a_truth_without_pixels_has_a_page_without_pictures(folder: Path, spaced: Path) -> None:
    truth = read_catalog(folder / "sky.fits", hdu="TRUTH")
    truth.write(spaced / "truth.ecsv", format="ascii.ecsv")
    evaluate_files(folder / "a & b.parquet", spaced / "truth.ecsv", spaced / "out", gold_limit=26.5, page_objects=3)
    found = json.loads(re.search(r'id="data">(.*?)</script>', (spaced / "out" / "index.html").read_text())[1])  # type: ignore[index]
    assert (len(found["names"]), found["pictures"]) == (3, False)
    assert "Box: white" not in (spaced / "out" / "index.html").read_text()
    assert not (spaced / "out" / "picture.png").exists()
    with pytest.raises(ConfigError, match=r"figures are asked as \['gif'\]"):
        evaluate_files(folder / "a & b.parquet", spaced / "truth.ecsv", spaced / "out", formats=("gif",))


def test_a_catalogue_of_another_program_has_a_page_without_boxes(folder: Path, spaced: Path) -> None:
    """It knows positions on the sky and densities, but no pixels."""
    catalog = read_catalog(folder / "a & b.parquet")
    catalog.keep_columns(["ra", "dec", "z_mode", "mix_weights", "mix_means", "mix_sigmas"])
    write_catalog(catalog, spaced / "bare.parquet")
    result = evaluate_files(spaced / "bare.parquet", folder / "sky.fits", spaced / "out", gold_limit=26.5)
    assert result.n_judged > 10
    assert "bare.parquet against sky.fits" in (spaced / "out" / "index.html").read_text()
    assert not (spaced / "out" / "picture.png").exists()


def test_a_catalogue_without_masks_says_how_to_have_them(folder: Path, spaced: Path) -> None:
    catalog = read_catalog(folder / "a & b.parquet")
    catalog.remove_column("mask_rle")
    write_catalog(catalog, spaced / "unmasked.parquet")
    evaluate_files(spaced / "unmasked.parquet", folder / "sky.fits", spaced / "out", gold_limit=26.5)
    text = (spaced / "out" / "index.html").read_text()
    assert "predict --masks" in text
    assert "sky blue" not in text


@needs_chromium
def test_chromium_sorts_and_filters(folder: Path, result: Evaluation) -> None:
    path = folder / "out" / "index.html"
    dom = in_chromium(path, "sort=z_true&down=0&filter=" + quote("z_true > 0.5"))
    shown = cells(dom, "z_true")
    assert len(shown) > 4
    assert shown == sorted(shown)
    assert min(shown) > 0.5
    columns = data(folder)["columns"]
    assert isinstance(columns, dict)
    assert f"{sum(z > 0.5 for z in columns['z_true'])} of {result.n_matched}" in dom
    assert cells(in_chromium(path, "sort=e"), "e")[0] == pytest.approx(max(columns["e"]), abs=1e-4)
    assert "there is no column nothing" in in_chromium(path, "filter=" + quote("nothing > 1"))


@needs_chromium
def test_chromium_opens_ten_thousand_objects_in_time(folder: Path, result: Evaluation) -> None:
    small = data(folder)
    times = -(-10_000 // result.n_matched)
    floats = [np.frombuffer(base64.b64decode(part), "<f4") for part in (*small["mixture"], small["boxes"])]  # type: ignore[misc]
    parts = [base64.b64encode(np.tile(part, times).tobytes()).decode() for part in floats]
    big = small | {name: list(small[name]) * times for name in ("names", "x", "y", "masks")}  # type: ignore[call-overload]
    big |= {"columns": {name: values * times for name, values in small["columns"].items()}}  # type: ignore[attr-defined]
    big |= {"mixture": parts[:3], "boxes": parts[3]}
    text = re.sub(
        r'(?<=id="data">).*?(?=</script>)', lambda _: json.dumps(big).replace("<", "\\u003c"), page(folder), flags=re.DOTALL
    )
    sheet = re.search(r'<script type="text/plain" class="sheet">.*?</script>', text, re.DOTALL)
    assert sheet
    path = folder / "out" / "big.html"
    text = text.replace(sheet[0], sheet[0] * -(-10_000 // ACROSS**2))
    path.write_text(text)
    dom = in_chromium(path)
    assert f"{len(big['names'])} of {len(big['names'])}" in dom  # type: ignore[arg-type]
    assert opened_ms(dom) < OPEN_MS
    slow = f"<script>const t = performance.now(); while (performance.now() - t < {OPEN_MS}) {{}}</script>"
    path.write_text(text.replace("</head>", f"{slow}</head>"))
    assert opened_ms(in_chromium(path)) >= OPEN_MS
    assert dom.count('class="row') < 40
