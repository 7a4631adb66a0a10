from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from deepdisc_ops.config import SkySettings
from deepdisc_ops.data import masks, noise, population, render, scenes, surveys
from deepdisc_ops.data.artifacts import FLAG_BITS
from deepdisc_ops.data.pixels import header_wcs, read_pixels
from deepdisc_ops.errors import CatalogError, ConfigError

LSST = surveys.survey("lsst")
SIZE = (200, 160)
EVERYTHING = ("saturation", "spikes", "trail", "missing_band")


def simulate(size: int | tuple[int, int] = SIZE, seed: int = 4, **settings: object) -> scenes.Scene:
    return scenes.simulate_scene(SkySettings(**settings), size=size, seed=seed)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def scene() -> scenes.Scene:
    return simulate()


def assert_same_tables(one: scenes.Scene, other: scenes.Scene) -> None:
    assert one.truth.to_pandas().equals(other.truth.to_pandas())
    assert one.catalog.to_pandas().equals(other.catalog.to_pandas())


def test_the_same_seed_gives_the_same_bytes(scene: scenes.Scene) -> None:
    again = simulate()
    assert again.image.tobytes() == scene.image.tobytes()
    assert_same_tables(again, scene)
    assert simulate(seed=5).image.tobytes() != scene.image.tobytes()


@pytest.mark.parametrize("settings", [{"colours": "templates"}, {"colours": "dc2"}, {"survey": "hsc"}])
def test_two_depths_show_the_same_sky(settings: dict[str, str]) -> None:
    deep, shallow = (simulate(years=years, **settings) for years in (10.0, 1.0))
    assert deep.noiseless.tobytes() == shallow.noiseless.tobytes()
    assert deep.catalog.to_pandas().equals(shallow.catalog.to_pandas())
    np.testing.assert_array_equal(deep.conditions.psf_fwhm, shallow.conditions.psf_fwhm)
    if deep.survey.reference_years is None:
        assert deep.image.tobytes() == shallow.image.tobytes()
        return
    np.testing.assert_allclose(shallow.noise / deep.noise, np.sqrt(10))
    assert set(shallow.truth["id"]) < set(deep.truth["id"])


def test_a_whole_scene_is_the_one_that_galsim_draws() -> None:
    """Knots, dust and a PSF that vary over the field, groups and neighbours together."""
    settings = SkySettings(psf_variation=0.1, ebv_variation=0.5, clustering=0.5)
    fast, slow = (
        scenes.simulate_scene(settings, size=90, seed=1, renderer=renderer) for renderer in (render.render, render.render_galsim)
    )
    assert fast.catalog["knot_share"].max() > 0
    assert len(fast.catalog) > 15
    assert (np.abs(fast.noiseless - slow.noiseless) / fast.noise[:, None, None]).max() < 0.3
    assert fast.catalog.to_pandas().equals(slow.catalog.to_pandas())


def test_blemishes_do_not_change_the_sky(scene: scenes.Scene) -> None:
    spoilt = simulate(artifacts=EVERYTHING)
    assert spoilt.noiseless.tobytes() == scene.noiseless.tobytes()
    assert spoilt.catalog.to_pandas().equals(scene.catalog.to_pandas())
    assert spoilt.flags is not None
    untouched = (spoilt.flags == 0) & np.isfinite(spoilt.image)
    faint = np.abs(spoilt.image - scene.image) < 0.6 * scene.noise[:, None, None]
    assert faint[untouched].all()
    assert scene.flags is None


def test_noise_options_do_not_change_the_sky(scene: scenes.Scene) -> None:
    other = simulate(source_noise=False, noise_correlation=0.3)
    assert other.noiseless.tobytes() == scene.noiseless.tobytes()
    assert_same_tables(other, scene)
    assert other.image.tobytes() != scene.image.tobytes()


def test_a_given_reddening_leaves_the_rest_of_the_scene_alone(scene: scenes.Scene) -> None:
    same = simulate(ebv=scene.ebv)
    assert same.image.tobytes() == scene.image.tobytes()
    redder = simulate(ebv=0.3)
    np.testing.assert_allclose(redder.truth["ebv"], 0.3, rtol=0.051)
    assert redder.noiseless.sum() < scene.noiseless.sum()


def test_reddening_varies_linearly_over_the_field_and_dims_the_sources() -> None:
    flat, varied = simulate(ebv=0.2, ebv_variation=0.0), simulate(ebv=0.2, ebv_variation=0.4)
    assert (flat.catalog["ebv"] == np.float32(0.2)).all()
    rows = varied.catalog
    design = np.stack([np.ones(len(rows)), rows["x"], rows["y"]], axis=1)
    fit, *_ = np.linalg.lstsq(design, rows["ebv"], rcond=None)
    np.testing.assert_allclose(design @ fit, rows["ebv"], atol=1e-6)
    assert 0.05 < rows["ebv"].max() - rows["ebv"].min() < 0.0801
    extinction = -2.5 * np.log10(population.attenuation(LSST, np.asarray(rows["ebv"]) - 0.2))
    dimmed = np.stack([rows[f"mag_{band}"] - flat.catalog[f"mag_{band}"] for band in LSST.bands], axis=1)
    np.testing.assert_allclose(dimmed, extinction, atol=1e-4)


def test_the_psf_varies_over_the_field() -> None:
    same, varied = simulate(psf_variation=0.0), simulate(psf_variation=0.2)
    middle = same.conditions.psf_fwhm[LSST.gold_index]
    np.testing.assert_allclose(same.truth["psf_fwhm"], middle, rtol=1e-6)
    relative = varied.truth["psf_fwhm"] / middle
    assert 0.1 < relative.max() - relative.min() < 0.2001
    assert varied.noiseless.sum() == pytest.approx(same.noiseless.sum(), rel=1e-2)


def test_boxes_contain_their_centres(scene: scenes.Scene) -> None:
    rows = scene.truth
    assert len(rows) > 30
    assert ((rows["x0"] <= rows["x"] + 0.5) & (rows["x"] + 0.5 <= rows["x1"])).mean() > 0.98  # knots may lie off the centre
    assert ((rows["x0"] >= 0) & (rows["x1"] <= SIZE[0]) & (rows["y0"] >= 0) & (rows["y1"] <= SIZE[1])).all()
    assert (rows["snr"] > scenes.TRUTH_SNR).all()


def test_the_catalogue_lists_every_source_and_truth_the_bright_ones(scene: scenes.Scene) -> None:
    np.testing.assert_array_equal(scene.catalog["id"], np.arange(len(scene.catalog)))
    assert len(scene.catalog) > len(scene.truth)
    listed = scene.catalog[np.asarray(scene.truth["id"])]
    for name in ("x", "y", "ra", "dec", "class", "redshift", "mag_i", "ebv"):
        np.testing.assert_array_equal(listed[name], scene.truth[name])


def test_sky_positions_come_home(scene: scenes.Scene) -> None:
    x, y = scene.wcs.wcs_world2pix(scene.catalog["ra"], scene.catalog["dec"], 0)
    np.testing.assert_allclose(x, scene.catalog["x"], atol=1e-6)
    np.testing.assert_allclose(y, scene.catalog["y"], atol=1e-6)
    np.testing.assert_allclose(scene.wcs.wcs_pix2world(99.5, 79.5, 0), scenes.DEFAULT_CENTRE)


@pytest.mark.parametrize(("name", "correlation"), [("lsst", None), ("lsst", 0.35), ("hsc", None), ("hsc", 0.0)])
def test_noise_is_as_stated(name: str, correlation: float | None) -> None:
    scene = simulate(400, 2, survey=name, noise_correlation=correlation, source_noise=False)
    sky = scene.image - scene.noiseless
    sky -= np.median(sky, axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(sky.std(axis=(1, 2)), scene.noise, rtol=0.12)
    expected = scene.survey.noise_correlation if correlation is None else correlation
    for one, other in ((sky[:, :, 1:], sky[:, :, :-1]), (sky[:, 1:], sky[:, :-1])):
        np.testing.assert_allclose((one * other).mean(axis=(1, 2)) / sky.var(axis=(1, 2)), expected, atol=0.12)


@pytest.mark.parametrize("correlation", [0.0, 0.1, 0.45])
def test_correlation_is_exact_and_reaches_no_farther(correlation: float) -> None:
    field = noise.correlated_noise(900, 1100, correlation, np.random.default_rng(1))
    assert field.shape == (1100, 900)
    error = 5 / np.sqrt(field.size)
    assert field.var() == pytest.approx(1, abs=3 * error)
    for shift, expected in (((0, 1), correlation), ((1, 0), correlation), ((1, 1), correlation**2), ((0, 2), 0), ((2, 1), 0)):
        rows, columns = shift
        found = (field[rows:, columns:] * field[: 1100 - rows, : 900 - columns]).mean()
        assert found == pytest.approx(expected, abs=3 * error)


def test_sources_add_the_poisson_noise_of_their_electrons() -> None:
    level = np.array(noise.sky_level(LSST))
    bright = np.broadcast_to((3 * level).astype(np.float32)[:, None, None], (6, 200, 200))
    typical = surveys.noise(LSST)
    streams = np.random.SeedSequence(0).spawn(6)
    seen = noise.add_noise(bright, LSST, typical, streams)
    electrons = noise.gain(LSST, typical)
    np.testing.assert_allclose((seen - bright).var(axis=(1, 2)), typical**2 + 3 * level / electrons, rtol=0.05)
    np.testing.assert_allclose(typical**2 * electrons**2, level * electrons)  # the sky's own: as many electrons as variance


def test_blendedness_is_light_of_others() -> None:
    crowd = population.draw_population(LSST, 3.0, np.random.default_rng(0), SkySettings(knots=False))
    flux = crowd.flux[:, LSST.gold_index]
    two = np.argsort(-np.where(crowd.is_star, flux, 0))[:2]
    pair = crowd.select(two)
    typical = surveys.typical_conditions(LSST, 5.0)
    sky = surveys.pixel_noise(LSST, typical)

    def blendedness(apart: float) -> np.ndarray:
        from deepdisc_ops.data.render import Optics

        field = scenes.Field(
            population=pair,
            x=np.array([100.0, 100.0 + apart]),
            y=np.array([80.0, 80.0]),
            ebv=np.zeros(2),
            stretch=np.ones(2),
            optics=Optics(typical.psf_fwhm, sky, LSST.pixel_scale),
            conditions=typical,
        )
        return scenes.paint(field, sky, LSST.gold_index, 300, 200)[1].blendedness

    alone = blendedness(150.0)
    assert (alone < 0.01).all()
    shares = flux[two] / flux[two].sum()
    np.testing.assert_allclose(blendedness(0.0), 1 - shares, atol=0.02)
    assert (blendedness(4.0) > alone).all()


def test_true_magnitudes_are_the_flux_in_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = population.draw_population(LSST, 2.0, np.random.default_rng(0), SkySettings())
    magnitude = surveys.to_magnitude(crowd.flux[:, LSST.gold_index])
    (source,) = np.flatnonzero((magnitude > 21) & ~crowd.is_star)[np.argsort(magnitude[(magnitude > 21) & ~crowd.is_star])][:1]
    monkeypatch.setattr(scenes, "draw_population", lambda *_: crowd.select(np.array([source])))
    monkeypatch.setattr(scenes, "draw_positions", lambda *_: (np.array([127.3]), np.array([120.8])))
    scene = simulate(256, 1)
    assert len(scene.truth) == 1
    measured = surveys.to_magnitude(scene.noiseless.sum(axis=(1, 2), dtype=float))
    stated = [scene.truth[f"mag_{band}"][0] for band in LSST.bands]
    np.testing.assert_allclose(measured, stated, atol=0.03)
    assert scene.truth["blendedness"][0] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("size", [1, (33, 7)])
@pytest.mark.parametrize("artifacts", [(), EVERYTHING])
def test_small_and_empty_scenes_are_ordinary(size: int | tuple[int, int], artifacts: tuple[str, ...], tmp_path: Path) -> None:
    scene = simulate(size, 0, density=0.0, artifacts=artifacts)
    assert len(scene.truth) == len(scene.catalog) == 0
    assert not scene.noiseless.any()
    scenes.write_scene(scene, tmp_path / "empty.fits")
    assert len(scenes.scene_record(tmp_path / "empty.fits").objects) == 0


def test_a_size_without_pixels_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 x 5"):
        simulate((0, 5))


@pytest.mark.parametrize("name", sorted(surveys.SURVEYS))
def test_every_survey_has_a_sky(name: str, tmp_path: Path) -> None:
    scene = simulate(128, 3, survey=name, density=2.0)
    assert np.isfinite(scene.image).all()
    assert len(scene.truth)
    scenes.write_scene(scene, tmp_path / "s.fits")
    record = scenes.scene_record(tmp_path / "s.fits")
    assert record.bands == surveys.survey(name).bands
    np.testing.assert_allclose(read_pixels(record).data, scene.image, rtol=1e-5, atol=1e-6)


def test_a_scene_file_holds_everything(scene: scenes.Scene, spaced: Path) -> None:
    path = spaced / "a scene.fits"
    scenes.write_scene(scene, path)
    assert list(spaced.iterdir()) == [path]
    with fits.open(path) as hdus:
        assert [hdu.name for hdu in hdus[1:]] == ["U", "G", "R", "I", "Z", "Y", "CATALOG", "TRUTH"]
        assert hdus[0].header["SEED"] == 4
        assert SkySettings(**json.loads(hdus[0].header["SETTINGS"])) == scene.settings
        plane = hdus["I"]
        assert plane.header["FILTER"] == "i"
        unit = 10 ** (0.4 * (31.4 - plane.header["MAGZERO"]))
        np.testing.assert_allclose(plane.data * unit, scene.image[3], rtol=1e-5)
        assert plane.header["SKYSIG"] * unit == pytest.approx(scene.noise[3])
        ra, dec = WCS(plane.header).wcs_pix2world(hdus["TRUTH"].data["x"], hdus["TRUTH"].data["y"], 0)
        np.testing.assert_allclose(ra, hdus["TRUTH"].data["ra"])
        np.testing.assert_allclose(dec, hdus["TRUTH"].data["dec"])
        assert len(hdus["CATALOG"].data) == len(scene.catalog)


def test_masks_are_in_the_file_and_reach_the_reader(tmp_path: Path) -> None:
    scene = simulate(artifacts=EVERYTHING, survey="hsc")
    path = tmp_path / "s.fits"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scenes.write_scene(scene, path)
    assert scene.flags is not None
    with fits.open(path) as hdus:
        for band, flags, plane in zip(scene.survey.bands, scene.flags, scene.image, strict=True):
            mask = hdus[f"MASK_{band.upper()}"]
            np.testing.assert_array_equal(mask.data, flags)
            assert {name: mask.header[f"MP_{name}"] for name in FLAG_BITS} == FLAG_BITS
            np.testing.assert_array_equal(np.isnan(plane), flags & 1 << FLAG_BITS["NO_DATA"] != 0)
            np.testing.assert_array_equal(np.isnan(hdus[band.upper()].data), np.isnan(plane))
    image = read_pixels(scenes.scene_record(path))
    lost = scene.flags & ~np.uint8(1 << FLAG_BITS["SPIKE"]) != 0
    np.testing.assert_array_equal(image.mask, lost.any(axis=0))
    assert image.invalid is not None
    np.testing.assert_array_equal(image.invalid, lost)


def test_records_list_the_objects_above_five_sigma(scene: scenes.Scene, tmp_path: Path) -> None:
    scenes.write_scene(scene, tmp_path / "s.fits")
    record = scenes.scene_record(tmp_path / "s.fits", split="train")
    bright = scene.truth[scene.truth["snr"] > 5]
    assert (record.key, record.split, record.width, record.height) == ("s", "train", *SIZE)
    np.testing.assert_array_equal(record.objects.ids, bright["id"])
    np.testing.assert_array_equal(record.objects.mag, bright["mag_i"])
    ra, dec = header_wcs(record.wcs).wcs_pix2world(record.objects.x, record.objects.y, 0)
    np.testing.assert_allclose([ra, dec], [record.objects.ra, record.objects.dec], atol=1e-9)
    for box, mask in zip(record.objects.boxes, record.objects.masks or (), strict=True):
        rows, columns = np.nonzero(masks.decode(mask))
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == tuple(box)


def test_what_blemishes_hide_in_every_band_is_no_training_truth(scene: scenes.Scene, tmp_path: Path) -> None:
    flags = np.zeros(scene.image.shape, np.uint8)
    flags[:, :, :100] = 1 << FLAG_BITS["SAT"]
    flags[2, :, :150] = 1 << FLAG_BITS["NO_DATA"]
    flags[:, :, 180:] = 1 << FLAG_BITS["SPIKE"]
    truth = scenes.Truth(
        np.asarray(scene.truth["id"]),
        np.stack([scene.truth[name] for name in ("x0", "y0", "x1", "y1")], axis=1),
        tuple({"size": [SIZE[1], SIZE[0]], "counts": counts} for counts in scene.truth["mask"]),
        np.zeros(len(scene.truth)),
    )
    rows = scene.truth.copy()
    rows["masked"] = scenes._masked_shares(truth, flags)
    hidden, shown = np.asarray(rows["x1"] <= 100), np.asarray(rows["x0"] >= 100)
    assert (rows["masked"][hidden] == 1).all()
    assert (rows["masked"][shown] == 0).all()
    assert (rows["masked"][~hidden & ~shown] < 1).all()
    path = tmp_path / "s.fits"
    scenes.write_scene(scenes.Scene(**vars(scene) | {"truth": rows}), path)
    record = scenes.scene_record(path)
    bright = np.asarray(rows["snr"] > scenes.RECORD_SNR)
    np.testing.assert_array_equal(record.objects.ids, rows["id"][bright & ~hidden])


def test_a_file_cut_short_is_no_scene(scene: scenes.Scene, tmp_path: Path) -> None:
    path = tmp_path / "s.fits"
    scenes.write_scene(scene, path)
    path.write_bytes(path.read_bytes()[:-6000])
    with pytest.raises(CatalogError, match="no complete scene"):
        scenes.scene_record(path)
