from __future__ import annotations

import math

import numpy as np
import pytest

from deepdisc_ops.config import SkySettings
from deepdisc_ops.data.scenes import Scene, simulate_scene
from deepdisc_ops.errors import CatalogError, ImageError
from deepdisc_ops.sky.detections import Detections
from deepdisc_ops.sky.images import SkyImage
from deepdisc_ops.sky.photometry import (
    PixelNoise,
    forced_photometry,
    magnitudes,
    measure,
    measure_noise,
    noise_factor,
    owner_map,
)

SCALE = 0.2
SIGMA_PX = 1.6
UNIT = PixelNoise(np.ones(2), np.zeros(2))


def make_image(data: np.ndarray, invalid: np.ndarray | None = None) -> SkyImage:
    mask = np.zeros(data.shape[1:], bool) if invalid is None else invalid.any(axis=0)
    bands = tuple("ugrizy"[: len(data)])
    return SkyImage(data.astype(np.float32), bands, None, SCALE, mask, invalid=invalid)


def gaussian_source(size: int, x: float, y: float, flux: float, sigma: float = SIGMA_PX) -> np.ndarray:
    """A Gaussian integrated over the pixels."""
    edges = np.arange(size + 1) - 0.5
    along = [np.diff([0.5 * math.erf((edge - centre) / sigma / math.sqrt(2)) for edge in edges]) for centre in (x, y)]
    return flux * along[1][:, None] * along[0]


def enclosed(radius_px: float, sigma: float = SIGMA_PX) -> float:
    """Share of a Gaussian's light inside a circle; pixels smear it twice, when they gather light and when they are cut."""
    return 1 - math.exp(-(radius_px**2) / 2 / (sigma**2 + 2 / 12))


def found_at(boxes: object, masks: np.ndarray | None = None) -> Detections:
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    n = len(boxes)
    none, index, mixture = np.zeros(n, np.float32), np.zeros(n, np.int32), np.ones((n, 1), np.float32)
    return Detections(boxes, none, index, mixture, mixture, mixture, none, index, index, masks=masks)


def box_at(x: float, y: float, side: float = 12.0) -> list[float]:
    return [x + 0.5 - side / 2, y + 0.5 - side / 2, x + 0.5 + side / 2, y + 0.5 + side / 2]


@pytest.fixture(scope="module")
def scene() -> Scene:
    return simulate_scene(SkySettings(), size=384, seed=77)


def test_a_flat_sky_gives_the_area_of_the_circle():
    found = forced_photometry(make_image(np.ones((1, 41, 41))), [20.3], [19.6], SCALE * np.array([0.4, 3.0, 9.3]), variance=[1.0])
    assert found.flux[0, 0] == pytest.approx(np.pi * np.array([0.4, 3.0, 9.3]) ** 2, rel=1e-4)


@pytest.mark.parametrize("offset", [0.0, 0.31, -0.5])
def test_a_gaussian_of_known_flux_is_measured(offset):
    x, y, radii = 30.0 + offset, 24.0 - offset, np.array([0.4, 0.8, 1.6])
    data = np.stack([gaussian_source(61, x, y, flux) for flux in (100.0, 250.0)])
    found = forced_photometry(make_image(data), [x], [y], radii, variance=[1.0, 1.0])
    for band, flux in enumerate((100.0, 250.0)):
        expected = [flux * enclosed(radius / SCALE) for radius in radii]
        np.testing.assert_allclose(found.flux[0, band], expected, rtol=0.015)
    assert found.coverage == pytest.approx(1.0)
    assert found.radii.shape == (2, 3)


def test_errors_are_the_scatter_of_many_measurements(rng):
    sigma = np.array([2.0, 5.0])
    data = sigma[:, None, None] * rng.standard_normal((2, 500, 500))
    x, y = (np.arange(12.3, 488, 12), np.arange(11.8, 488, 12))
    x, y = (grid.ravel() for grid in np.meshgrid(x, y))
    found = forced_photometry(make_image(data), x, y, [0.3, 0.6], variance=sigma**2)
    pull = (found.flux / found.error).std(axis=0)
    np.testing.assert_allclose(pull, 1.0, atol=0.06)


def test_errors_follow_correlated_noise(rng):
    correlation = 0.2
    share = (1 - math.sqrt(1 - 4 * correlation**2)) / (2 * correlation)
    noise = rng.standard_normal((1, 600, 600))
    for axis in (1, 2):
        noise = (noise + share * np.roll(noise, 1, axis=axis)) / math.sqrt(1 + share**2)
    x, y = (grid.ravel() for grid in np.meshgrid(np.arange(12.0, 588, 14), np.arange(12.0, 588, 14)))
    found = forced_photometry(make_image(noise), x, y, [0.4, 1.0], variance=[1.0], noise_correlation=correlation)
    np.testing.assert_allclose((found.flux / found.error).std(axis=0), 1.0, atol=0.07)
    assert noise_factor(1e6, correlation) == pytest.approx((1 + 2 * correlation) ** 2, rel=1e-3)


def test_small_circles_have_their_share_of_the_noise_of_the_pixels_they_cut(rng):
    noise = rng.standard_normal((1, 500, 500))
    x, y = (grid.ravel() + rng.uniform(-0.5, 0.5, 75 * 75) for grid in np.meshgrid(*[np.arange(25.0, 475, 6)] * 2))
    for radius in (0.5, 1.5):
        found = forced_photometry(make_image(noise), x, y, [radius * SCALE], variance=[1.0])
        assert (found.flux / found.error).std() == pytest.approx(1.0, abs=0.03)


def test_radii_may_follow_the_band():
    data = np.stack([gaussian_source(41, 20, 20, 100.0, sigma) for sigma in (1.0, 2.0)])
    radii = SCALE * np.array([[2.0], [4.0]])
    found = forced_photometry(make_image(data), [20.0], [20.0], radii, variance=[1.0, 1.0])
    np.testing.assert_allclose(found.flux[0, :, 0], [100 * enclosed(2.0, 1.0), 100 * enclosed(4.0, 2.0)], rtol=0.02)


def test_invalid_pixels_do_not_count_and_their_share_is_made_up_for():
    data = np.full((2, 21, 21), 3.0)
    invalid = np.zeros(data.shape, bool)
    invalid[0, 10, 12] = True
    data[0, 10, 12] = 1e9
    found = forced_photometry(make_image(data, invalid), [10.0], [10.0], [0.6], variance=[1.0, 1.0])
    assert found.coverage[0, :, 0] == pytest.approx([1 - 1 / (np.pi * 9), 1.0])
    assert found.flux[0, :, 0] == pytest.approx(3 * np.pi * 9)
    assert found.error[0, 0, 0] > found.error[0, 1, 0]


def test_an_images_own_variance_may_be_infinite_where_it_is_invalid():
    invalid = np.zeros((1, 21, 21), bool)
    invalid[0, 10, 12] = True
    variance = np.where(invalid, np.inf, 4.0).astype(np.float32)
    image = make_image(np.ones((1, 21, 21)), invalid)
    own = SkyImage(image.data, image.bands, None, SCALE, image.mask, invalid=invalid, variance=variance)
    found = forced_photometry(own, [10.0], [10.0], [0.6])
    assert found.error == pytest.approx(forced_photometry(image, [10.0], [10.0], [0.6], variance=[4.0]).error)
    assert np.isfinite(found.flux).all()


def test_the_mask_of_all_bands_holds_where_there_is_no_mask_of_each():
    image = make_image(np.ones((2, 21, 21)))
    image.mask[:, 10:] = True
    found = forced_photometry(image, [10.0], [10.0], [0.6], variance=[1.0, 1.0])
    assert np.isnan(found.flux).all()
    assert found.coverage.max() < 0.5


def test_an_aperture_over_the_edge_is_covered_in_part_and_beyond_it_not_at_all():
    image = make_image(np.full((1, 21, 31), 2.0))
    found = forced_photometry(image, [-0.5, 0.9, 30.5, 60.0], [10.0, 10.0, 20.5, -40.0], [0.4], variance=[1.0], min_coverage=0.4)
    assert found.coverage[:, 0, 0] == pytest.approx([0.5, found.coverage[1, 0, 0], 0.25, 0.0])
    assert 0.75 < found.coverage[1, 0, 0] < 1
    assert found.flux[:2, 0, 0] == pytest.approx(2 * np.pi * 4)
    assert np.isnan(found.flux[2:]).all()
    assert np.isnan(found.error[2:]).all()


def test_the_images_own_variance_is_used():
    image = make_image(np.ones((1, 11, 11)))
    with pytest.raises(ImageError, match="no variance"):
        forced_photometry(image, [5.0], [5.0], [0.4])
    own = SkyImage(image.data, image.bands, None, SCALE, image.mask, variance=np.full((1, 11, 11), 9.0, np.float32))
    assert forced_photometry(own, [5.0], [5.0], [0.4]).error == pytest.approx(
        forced_photometry(image, [5.0], [5.0], [0.4], variance=[9.0]).error
    )


def test_no_objects_and_one_band():
    found = forced_photometry(make_image(np.ones((1, 9, 11))), [], [], [0.4, 0.8], variance=[1.0])
    assert len(found) == 0
    assert found.flux.shape == (0, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": [np.nan]}, "1 of 1 positions are not finite"),
        ({"radii": [0.0]}, "positive radii"),
        ({"variance": [1.0, 2.0]}, r"shape (2,); expected (1,)"),
    ],
)
def test_faults_are_told(arguments, message):
    call = {"x": [4.0], "y": [4.0], "radii": [0.4], "variance": [1.0]} | arguments
    with pytest.raises((CatalogError, ImageError)) as error:
        forced_photometry(make_image(np.ones((1, 9, 9))), **call)
    assert message in str(error.value)


def test_dereddening_brightens_each_band_and_keeps_the_signal_to_noise():
    data = np.stack([gaussian_source(41, 20, 20, 100.0)] * 2)
    dimming = 10 ** (-0.4 * 0.1 * np.array([4.0, 2.0]))
    seen = forced_photometry(make_image(data * dimming[:, None, None]), [20.0], [20.0], [0.8], variance=[1.0, 1.0])
    clear = seen.dereddened([0.1], [4.0, 2.0])
    assert clear.flux[0, 0, 0] == pytest.approx(clear.flux[0, 1, 0], rel=1e-5)
    np.testing.assert_allclose(clear.flux / clear.error, seen.flux / seen.error)
    np.testing.assert_allclose(seen.dereddened(0.0, [4.0, 2.0]).flux, seen.flux)


def test_magnitudes_of_non_detections_are_the_one_sigma_limit():
    magnitude, error, detected = magnitudes([3631e9, 100.0, 0.5, -7.0, np.nan], [1.0, 10.0, 1.0, 1.0, 1.0])
    assert magnitude[:4] == pytest.approx([0.0, 26.4, 31.4, 31.4], abs=1e-3)
    assert error[1:4] == pytest.approx([0.1086, 0.7526, 0.7526], abs=1e-4)
    assert detected.tolist() == [True, True, False, False, False]
    assert np.isnan(magnitude[4])
    assert np.isnan(error[4])
    with pytest.raises(CatalogError, match="zero or negative"):
        magnitudes([1.0], [0.0])


def test_light_of_lonely_objects_is_measured_whole():
    places, fluxes = [(20.2, 19.7), (60.0, 45.4)], np.array([[100.0, 300.0], [50.0, 20.0]])
    data = np.zeros((2, 80, 80))
    for (x, y), light in zip(places, fluxes, strict=True):
        data += [gaussian_source(80, x, y, flux) for flux in light]
    columns = measure(make_image(data), found_at([box_at(x, y) for x, y in places]), noise=UNIT)
    np.testing.assert_allclose(columns["flux"], fluxes * enclosed(5.0), rtol=0.01)
    np.testing.assert_allclose(columns["flux_iso"], fluxes, rtol=0.01)
    assert {name: (values.shape, values.dtype.name) for name, values in columns.items()} == dict.fromkeys(
        ("flux", "flux_err", "flux_iso", "flux_iso_err"), ((2, 2), "float32")
    )


def test_neighbours_do_not_shine_into_each_other():
    data = gaussian_source(60, 26.0, 30.0, 100.0)[None] + gaussian_source(60, 34.0, 30.0, 1000.0)[None]
    image = make_image(np.concatenate([data, data]))
    pair, alone = found_at([box_at(26, 30), box_at(34, 30)]), found_at([box_at(26, 30)])
    apart, blended = measure(image, pair, noise=UNIT), measure(image, alone, noise=UNIT)
    assert abs(apart["flux"][0, 0] / 100 - 1) < 0.15 < blended["flux"][0, 0] / 100 - 1
    assert apart["flux_iso"][:, 0].sum() == pytest.approx(1100, rel=0.01)  # nothing counts twice
    swapped = measure(image, pair.select(np.array([1, 0])), noise=UNIT)
    for name in apart:
        np.testing.assert_allclose(apart[name][::-1], swapped[name], rtol=1e-5)


def test_masks_say_which_pixels_count():
    data = np.ones((2, 40, 40))
    masks = np.zeros((2, 28, 28), np.uint8)
    masks[0, :, :14] = 255  # the left half
    masks[1] = 100
    boxes = [[6, 6, 34, 20], [6, 20, 34, 34]]
    owners = owner_map(found_at(boxes, masks), 40, 40)
    assert (owners[6:20, 6:20] == 1).all()
    assert (owners > 0).sum() == 14 * 14
    columns = measure(make_image(data), found_at(boxes, masks), noise=UNIT)
    assert columns["flux_iso"][0, 0] == pytest.approx(14 * 14)
    assert np.isnan(columns["flux_iso"][1, 0])


def test_a_shared_pixel_goes_to_the_more_probable_mask():
    masks = np.stack([np.full((28, 28), 200, np.uint8), np.full((28, 28), 250, np.uint8)])
    owners = owner_map(found_at([[0, 0, 20, 20], [10, 0, 30, 20]], masks), 20, 30)
    assert (owners[:, :10] == 1).all()
    assert (owners[:, 10:] == 2).all()


def test_invalid_pixels_and_the_edge_are_made_up_for_or_leave_no_flux():
    data = np.full((2, 40, 40), 2.0)
    invalid = np.zeros(data.shape, bool)
    invalid[0, 18:20, 18:20] = True
    data[invalid] = 1e6
    boxes = [box_at(20, 20), box_at(0, 20), box_at(100, 100)]
    columns = measure(make_image(data, invalid), found_at(boxes), diameter=[2.0, 1.6], noise=UNIT)
    assert columns["flux"][0] == pytest.approx(2 * np.pi * np.array([25.0, 16.0]), rel=1e-4)
    assert columns["flux_iso"][0, 0] == pytest.approx(columns["flux_iso"][0, 1], rel=1e-5)
    assert np.isnan(columns["flux"][1:]).all()
    assert np.isnan(columns["flux_iso"][2]).all()
    invalid[:] = True
    assert all(np.isnan(values).all() for values in measure(make_image(data, invalid), found_at(boxes)).values())


def test_errors_of_detections_are_the_scatter_of_many(rng):
    sigma = np.array([2.0, 5.0])
    white = rng.standard_normal((2, 601, 601))
    noise = sigma[:, None, None] * (white + 0.3 * np.roll(white, 1, axis=2))
    noise += 0.3 * np.roll(noise, 1, axis=1)
    centres = np.stack(np.meshgrid(np.arange(20.3, 580, 19), np.arange(19.8, 580, 19)), axis=-1).reshape(-1, 2)
    image, found = make_image(noise), found_at([box_at(x, y, 10) for x, y in centres])
    measured = measure_noise(image, found)
    np.testing.assert_allclose(measured.sigma, sigma * 1.09, rtol=0.02)
    np.testing.assert_allclose(measured.correlation, 0.3 / 1.09, atol=0.02)
    given = SkyImage(
        image.data,
        image.bands,
        None,
        SCALE,
        image.mask,
        variance=np.float32([[[(2 * 1.09) ** 2]], [[(5 * 1.09) ** 2]]]) + 0 * image.data,
    )
    for columns in (measure(image, found), measure(given, found), measure(image, found, noise=measured)):
        np.testing.assert_allclose((columns["flux"] / columns["flux_err"]).std(axis=0), 1.0, atol=0.08)
        np.testing.assert_allclose((columns["flux_iso"] / columns["flux_iso_err"]).std(axis=0), 1.0, atol=0.08)


def test_a_simulated_sky_is_measured_as_it_was_drawn(scene: Scene):
    truth = scene.truth[(scene.truth["mag_i"] < 25.3) & (scene.truth["snr"] > 5)]
    low, high = np.stack([truth["x0"], truth["y0"]], axis=1), np.stack([truth["x1"], truth["y1"]], axis=1)
    middle = np.stack([truth["x"], truth["y"]], axis=1) + 0.5
    boxes = np.concatenate([np.minimum(low, middle - 5.5), np.maximum(high, middle + 5.5)], axis=1)
    image = SkyImage(scene.image, scene.survey.bands, scene.wcs, SCALE, np.zeros(scene.image.shape[1:], bool))
    columns = measure(image, found_at(boxes))
    faintness = [magnitudes(columns[name], columns[f"{name}_err"])[0] for name in ("flux", "flux_iso")]
    wrong = faintness[1][:, 3] - truth["mag_i"]
    assert abs(np.nanmedian(wrong)) < 0.1
    assert np.nanquantile(np.abs(wrong), 0.68) < 0.3
    colour = faintness[0][:, 2] - faintness[0][:, 4] - (truth["mag_r"] - truth["mag_z"])
    assert abs(np.nanmedian(colour)) < 0.05
    assert np.nanquantile(np.abs(colour), 0.68) < 0.2
    np.testing.assert_allclose(measure_noise(image, found_at(boxes)).sigma, scene.noise, rtol=0.03)


def test_nothing_found_is_measured_too():
    columns = measure(make_image(np.ones((3, 9, 11))), found_at([]))
    assert all(values.shape == (0, 3) for values in columns.values())


@pytest.mark.parametrize("diameter", [0.0, [1.0, 2.0, 3.0], -1.0])
def test_a_wrong_diameter_is_told(diameter: object):
    with pytest.raises(CatalogError, match="expected arcsec above 0"):
        measure(make_image(np.ones((2, 9, 9))), found_at([box_at(4, 4)]), diameter=diameter)
