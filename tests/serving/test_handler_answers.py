"""What is asked for is what comes back, of a real ensemble: boxes, core, members, masks, densities, forms of the reply."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS

from deepdisc_ops.inference.ensemble import Ensemble
from deepdisc_ops.serving import wire
from deepdisc_ops.serving.answering import Answer, Answerer
from deepdisc_ops.serving.service import ServiceSettings
from deepdisc_ops.serving.wire.protocol import MAX_NJY
from deepdisc_ops.sky.catalog import COLUMNS, read_catalog, write_catalog
from deepdisc_ops.sky.detections import MASK_SIDE, Detections, Flag
from deepdisc_ops.sky.dust import EbvPlane

BANDS = ("u", "g", "r", "i", "z", "y")
EBV = EbvPlane((0.01, 0.05, 0.1, 0.2))
BOXES = np.array([[3, 4, 20, 30], [50, 60, 70.5, 80], [-4, -4, 6, 6]], np.float32)


@pytest.fixture(scope="module")
def ensemble(tiny_ensemble: Path) -> Ensemble:
    return Ensemble.load(tiny_ensemble)


@pytest.fixture(scope="module")
def reddening(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of E(B-V) of which each quarter of a degree has its own."""
    path = tmp_path_factory.mktemp("dust of ours") / "ebv.fits"
    write_catalog(Table({"ra": [150.0, 151.0], "dec": [2.0, 2.0], "ebv": [0.07, 0.9]}), path)
    return path


@pytest.fixture(scope="module")
def answerer(ensemble: Ensemble, reddening: Path) -> Iterator[Answerer]:
    answerer = Answerer(ensemble, "abc", ServiceSettings(dust_map="column:ebv", dust_folder=reddening, dust_scale=0.5))
    yield answerer
    answerer.close()


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(1).normal(0, 9, (6, 96, 100)).astype(np.float32)


def ask(answerer: Answerer, image: np.ndarray, boxes: np.ndarray | None = None, **options: Any) -> Answer:
    wishes = wire.Options(EBV, BANDS, **options)
    if boxes is None:
        body, headers = wire.encode_image(image, BANDS, None, EBV)
        headers |= wire.render_options(wishes)
    else:
        body, headers = wire.encode_hdf5(image, BANDS, None, EBV, boxes, options=wishes)
        headers["content-type"] = wire.HDF5_TYPE
    return answerer.answer(bytearray(body), headers, "0")


def found(answer: Answer) -> Detections:
    assert answer.status == 200, answer.body
    assert isinstance(answer.body, bytes)
    return wire.decode_detections(answer.body)


def assert_same(one: Detections, other: Detections) -> None:
    for name in ("boxes", "scores", "classes", "weights", "means", "sigmas", "ebv", "n_members", "flags"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_a_search_is_that_of_the_ensemble(answerer: Answerer, ensemble: Ensemble, image: np.ndarray) -> None:
    expected = ensemble.predict(image, EBV, np.zeros(image.shape[1:], bool))
    assert len(expected) > 3
    assert_same(found(ask(answerer, image)), expected)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_given_boxes_are_answered_in_their_order(answerer: Answerer, ensemble: Ensemble, image: np.ndarray, count: int) -> None:
    answer = found(ask(answerer, image, BOXES[:count]))
    assert_same(answer, ensemble.redshift(image, BOXES[:count], EBV, np.zeros(image.shape[1:], bool)))
    assert (answer.flags & Flag.FORCED > 0).all()


def test_few_boxes_fit_into_the_header(answerer: Answerer, image: np.ndarray) -> None:
    body, headers = wire.encode_image(image, BANDS, None, EBV)
    for count in (0, 3):
        wish = {wire.BOXES_HEADER: ";".join(",".join(map(str, box)) for box in BOXES[:count].tolist())}
        assert_same(found(answerer.answer(body, {**headers, **wish}, "0")), found(ask(answerer, image, BOXES[:count])))


def test_the_core_keeps_what_is_centred_in_it(answerer: Answerer, image: np.ndarray) -> None:
    whole = found(ask(answerer, image))
    halves = [found(ask(answerer, image, core=(x0, 0, x1, 96))) for x0, x1 in ((0, 47.5), (47.5, 100))]
    assert all(map(len, halves))
    assert sum(map(len, halves)) == len(whole)
    assert (halves[0].centres[:, 0] + 0.5 < 47.5).all()
    assert ask(answerer, image, core=(0, 0, 101, 96)).code == "bad_core"


def test_members_are_asked_by_name(answerer: Answerer, image: np.ndarray) -> None:
    one, other = (found(ask(answerer, image, members=(name,))) for name in ("member-0", "member-1"))
    assert (one.n_members == 1).all()
    assert not np.array_equal(one.boxes, other.boxes)
    assert_same(found(ask(answerer, image, members=("member-1", "member-0"))), found(ask(answerer, image)))
    refused = ask(answerer, image, members=("member-0", "member-7"))
    assert (refused.status, refused.code) == (422, "unknown_member")
    assert "choose among member-0, member-1" in str(refused.body)


def test_masks_come_where_they_are_asked_for(answerer: Answerer, image: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """The members here have no mask heads, so masks are put in their mouth."""
    predict = answerer.ensemble.predict

    def with_masks(*arguments: Any, masks: bool) -> Detections:
        seen = predict(*arguments)
        crops = np.random.default_rng(2).integers(0, 256, (len(seen), MASK_SIDE, MASK_SIDE), np.uint8)
        return replace(seen, masks=crops) if masks else seen

    refused = ask(answerer, image, masks=True)
    assert (refused.status, refused.code) == (422, "no_masks")
    monkeypatch.setattr(answerer.ensemble, "predict", with_masks)
    monkeypatch.setattr(answerer, "_check_masks", lambda ensemble: None)
    whole, half = (found(ask(answerer, image, masks=True, core=core)) for core in (None, (0, 0, 50, 96)))
    assert found(ask(answerer, image)).masks is None
    assert whole.masks is not None
    assert half.masks is not None
    left = (whole.boxes[:, 0] + whole.boxes[:, 2]) / 2 < 50
    np.testing.assert_array_equal(half.masks, whole.masks[left])
    rows = json.loads(ask(answerer, image, masks=True, reply="json").body)
    assert all(one["mask_rle"] for one in rows["objects"])


def test_a_density_on_a_grid_integrates_to_one(answerer: Answerer, image: np.ndarray) -> None:
    grid = wire.Grid(0.0, 60.0, 4000)
    answer = ask(answerer, image, pdf=grid)
    objects = found(answer)
    assert objects.weights.shape == (len(objects), 0)
    np.testing.assert_allclose(np.trapezoid(objects.extra["pdf"], grid.points(), axis=1), 1, atol=0.01)
    assert isinstance(answer.body, bytes)
    assert wire.reply_origin(answer.body).notes["pdf_grid"] == str(grid)
    plain = found(ask(answerer, image, pdf="none"))
    assert "pdf" not in plain.extra
    np.testing.assert_array_equal(plain.extra["z_mode"], objects.extra["z_mode"])


@pytest.mark.parametrize("form", ["parquet", "fits", "json"])
@pytest.mark.parametrize("pdf", ["mixture", "none", wire.Grid(0.0, 3.0, 7)])
def test_a_catalogue_has_the_objects_of_the_detections(
    answerer: Answerer, image: np.ndarray, spaced: Path, form: str, pdf: Any
) -> None:
    answer = ask(answerer, image, reply=form, pdf=pdf)
    objects = found(ask(answerer, image))
    assert answer.status == 200
    assert answer.content_type == wire.REPLY_TYPES[form]
    assert isinstance(answer.body, bytes)
    if form == "json":
        tree = json.loads(answer.body)
        rows = {name: [one[name] for one in tree["objects"]] for name in tree["columns"]}
        words = tree
        assert tree["columns"]["ra"] == {"unit": "deg", "description": COLUMNS["ra"].description}
    else:
        path = spaced / f"reply.{form}"
        path.write_bytes(answer.body)
        table = read_catalog(path)
        rows, words = {name: np.asarray(table[name]).tolist() for name in table.colnames}, table.meta
    words = {name.lower(): value for name, value in words.items()}  # FITS has capitals
    assert sorted(rows["x0"]) == sorted(objects.boxes[:, 0].tolist())
    assert rows["y"] == sorted(rows["y"])
    assert words["model_version"] == "abc"
    assert words["request"] == answer.request
    assert ("mix_means" in rows) == (pdf == "mixture")
    assert ("pdf" in rows) == isinstance(pdf, wire.Grid)
    if isinstance(pdf, wire.Grid):
        assert np.shape(rows["pdf"]) == (len(objects), 7)


@pytest.mark.parametrize("form", ["hdf5", "parquet", "fits", "json"])
def test_no_objects_are_a_reply_too(answerer: Answerer, image: np.ndarray, form: str) -> None:
    answer = ask(answerer, image, np.zeros((0, 4), np.float32), reply=form)
    assert (answer.status, answer.objects) == (200, 0)


def test_fits_has_positions_and_the_reddening_of_the_servers_map(answerer: Answerer, image: np.ndarray) -> None:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.crpix = ["RA---TAN", "DEC--TAN"], [150.0, 2.0], [50, 48]
    wcs.wcs.cdelt = [-5.6e-5, 5.6e-5]
    header = wcs.to_header()
    header["BUNIT"] = "nJy"
    buffer = io.BytesIO()
    planes = [fits.ImageHDU(plane, header, name=band) for plane, band in zip(image, BANDS, strict=True)]
    fits.HDUList([fits.PrimaryHDU(), *planes]).writeto(buffer)
    headers = {"content-type": wire.FITS_TYPE, wire.EBV_HEADER: wire.SERVER_EBV, wire.REPLY_HEADER: "json"}
    answer = answerer.answer(buffer.getvalue(), headers, "0")
    assert answer.status == 200, answer.body
    objects = json.loads(answer.body)["objects"]
    assert {round(one["ebv"], 6) for one in objects} == {0.035}
    ra, dec = wcs.wcs_pix2world([one["x"] for one in objects], [one["y"] for one in objects], 0)
    np.testing.assert_allclose([one["ra"] for one in objects], ra, rtol=0, atol=1e-9)
    np.testing.assert_allclose([one["dec"] for one in objects], dec, rtol=0, atol=1e-9)


def test_the_servers_map_needs_positions(answerer: Answerer, image: np.ndarray) -> None:
    body, headers = wire.encode_image(image, BANDS, None, EBV)
    answer = answerer.answer(body, {**headers, wire.EBV_HEADER: wire.SERVER_EBV}, "0")
    assert (answer.status, answer.code) == (422, "no_dust_map")
    assert "no WCS" in str(answer.body)


@pytest.mark.parametrize("value", [MAX_NJY, -MAX_NJY, 1e38, np.inf, np.nan, 1e-38])
def test_pixels_of_any_value_are_answered(answerer: Answerer, image: np.ndarray, value: float) -> None:
    odd = image.copy()
    odd[:, 20:40, 20:40] = value
    odd[2] = value
    assert ask(answerer, odd).status == 200
    assert ask(answerer, np.full_like(image, value)).status == 200


@pytest.mark.parametrize("ebv", [100.0, -100.0])
def test_reddening_of_any_value_is_answered(answerer: Answerer, image: np.ndarray, ebv: float) -> None:
    body, headers = wire.encode_image(image, BANDS, None, EbvPlane.constant(ebv))
    assert answerer.answer(body, headers, "0").status == 200


@pytest.mark.parametrize("box", [(0, 0, 1e-6, 1e-6), (-90, -90, -80, -80), (-100, -96, 200, 192), (99.99, 95.99, 100, 96)])
def test_boxes_of_any_size_near_the_window_are_answered(
    answerer: Answerer, image: np.ndarray, box: tuple[float, float, float, float]
) -> None:
    assert ask(answerer, image, np.array([box], np.float32)).status == 200


@pytest.mark.parametrize("shape", [(1, 1), (1, 100), (3, 7), (33, 1)])
def test_windows_of_any_size_are_answered(answerer: Answerer, image: np.ndarray, shape: tuple[int, int]) -> None:
    assert ask(answerer, image[:, : shape[0], : shape[1]]).status == 200


def test_what_is_served_is_told(answerer: Answerer) -> None:
    told = answerer.describe()
    assert told["bands"] == list(BANDS)
    assert [member["name"] for member in told["members"]] == ["member-0", "member-1"]
    assert told["dust_map"] == "column ebv x 0.5"
    json.dumps(told)
