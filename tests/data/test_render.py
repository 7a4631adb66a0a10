from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdisc_ops.config import SkySettings
from deepdisc_ops.data import population, render, surveys

LSST = surveys.survey("lsst")


def one_source(*, star: bool = False, flux: float = 1000.0, bulge: float = 0.3, radius: float = 0.4) -> population.Population:
    bands = np.ones((1, len(LSST.bands))) * flux
    return population.Population(
        redshift=np.array([0.0 if star else 0.7]),
        is_star=np.array([star]),
        disc_flux=bands * (1 if star else 1 - bulge),
        bulge_flux=bands * (0 if star else bulge),
        knot_flux=np.zeros_like(bands),
        disc_radius=np.array([0.0 if star else radius]),
        bulge_radius=np.array([0.0 if star else radius / 2]),
        axis_ratio=np.array([1.0 if star else 0.5]),
        angle=np.array([0.6]),
        knot_offsets=np.zeros((1, population.KNOTS, 2)),
        group=np.array([-1]),
    )


def knotted(source: population.Population, share: float, seed: int = 3) -> population.Population:
    """The same sources with ``share`` of the discs' light in knots."""
    offsets = np.random.default_rng(seed).normal(0, 0.7, source.knot_offsets.shape) * source.disc_radius[:, None, None]
    return replace(source, disc_flux=source.disc_flux * (1 - share), knot_flux=source.disc_flux * share, knot_offsets=offsets)


def optics(survey: surveys.Survey = LSST, conditions: surveys.Conditions | None = None) -> render.Optics:
    seen = conditions or surveys.typical_conditions(survey, 5.0)
    return render.Optics(seen.psf_fwhm, surveys.pixel_noise(survey, seen), survey.pixel_scale, survey.psf_profile)


def draw(source: population.Population, x: float, y: float, stretch: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    (stamps,) = render.render(source, np.array([x]), np.array([y]), optics(), np.array([stretch]))
    return stamps.flux[0], stamps.origins[0]


@pytest.mark.parametrize(
    ("name", "field", "psf_variation"), [("lsst", 30, 0.02), ("lsst", 6, 0.3), ("hsc", 20, 0.02), ("roman", 8, 0.02)]
)
def test_fast_renderer_agrees_with_galsim_within_a_third_of_the_noise(name: str, field: int, psf_variation: float) -> None:
    survey = surveys.survey(name)
    rng = np.random.default_rng(11)
    seen = optics(survey, surveys.draw_conditions(survey, 5.0, rng))
    crowd = population.draw_population(survey, 10.0, rng, SkySettings(survey=name))
    brightest = np.argsort(-crowd.flux.max(axis=1))[:6]
    sources = crowd.select(np.concatenate([brightest, rng.choice(len(crowd), field, replace=False)]))
    assert_galsim_agrees(sources, seen, rng, psf_variation)


def test_undersampled_images_agree_with_galsim() -> None:
    """JWST at 0.03 arcsec: the shortest band has no full sampling, and PSFs with rings reach far."""
    survey = surveys.survey("jades")
    rng = np.random.default_rng(7)
    crowd = population.draw_population(survey, 1.0, rng, SkySettings(survey="jades"))
    brightness = crowd.flux.max(axis=1) / optics(survey).noise.min()
    of_each = [np.flatnonzero((brightness > low) & (brightness < 2 * low))[:2] for low in (10, 300, 3000)]
    sources = crowd.select(np.concatenate(of_each))
    assert len(sources) == 6
    assert render.samplings(sources, optics(survey)).max() > 1
    assert_galsim_agrees(sources, optics(survey), rng, 0.02)


@pytest.mark.parametrize("name", ["lsst", "jades"])
def test_knots_agree_with_galsim(name: str) -> None:
    survey = surveys.survey(name)
    rng = np.random.default_rng(5)
    crowd = population.draw_population(survey, 2.0, rng, SkySettings(survey=name))
    snr = crowd.flux.max(axis=1) / optics(survey).noise.min()
    sources = crowd.select(np.flatnonzero(~crowd.is_star & (snr > 100) & (snr < 3000))[:3])
    assert_galsim_agrees(knotted(sources, 0.6), optics(survey), rng, 0.0)


def assert_galsim_agrees(
    sources: population.Population, seen: render.Optics, rng: np.random.Generator, psf_variation: float
) -> None:
    x, y = rng.uniform(0, 100, (2, len(sources)))
    stretch = 1 + psf_variation * rng.uniform(-0.5, 0.5, len(sources))
    arguments = (sources, x, y, seen, stretch)
    fast = {int(i): flux for stamps in render.render(*arguments) for i, flux in zip(stamps.sources, stamps.flux, strict=True)}
    for stamps in render.render_galsim(*arguments):
        difference = np.abs(fast[int(stamps.sources[0])] - stamps.flux[0]) / seen.noise[:, None, None]
        assert difference.max() < 0.3


def test_every_source_is_drawn_once() -> None:
    rng = np.random.default_rng(0)
    sources = population.draw_population(LSST, 1.0, rng, SkySettings())
    x, y = rng.uniform(0, 200, (2, len(sources)))
    drawn = [stamps.sources for stamps in render.render(sources, x, y, optics(), rng.uniform(0.8, 1.2, len(sources)))]
    np.testing.assert_array_equal(np.sort(np.concatenate(drawn)), np.arange(len(sources)))


@settings(max_examples=25, deadline=None)
@given(st.floats(-20, 600), st.floats(-20, 600), st.booleans(), st.sampled_from([0.0, 0.5]))
def test_light_is_conserved_and_centred(x: float, y: float, star: bool, knots: float) -> None:
    source = knotted(one_source(star=star), knots)
    source = replace(source, knot_offsets=source.knot_offsets - source.knot_offsets.mean(axis=1, keepdims=True))
    flux, origin = draw(source, x, y)
    total = flux.sum(axis=(1, 2))
    np.testing.assert_allclose(total, 1000.0, rtol=0.02)
    rows, columns = np.indices(flux.shape[1:])
    assert (flux[3] * columns).sum() / total[3] + origin[0] == pytest.approx(x, abs=0.05)
    assert (flux[3] * rows).sum() / total[3] + origin[1] == pytest.approx(y, abs=0.05)


@pytest.mark.parametrize("stretch", [1.0, 1.013, 1.25])
def test_a_point_has_the_width_of_the_psf(stretch: float) -> None:
    flux, _ = draw(one_source(star=True, flux=5000.0), 10.0, 10.0, stretch)
    for plane, fwhm in zip(flux, optics().fwhm * stretch, strict=True):
        above = (plane > plane.max() / 2).sum() * LSST.pixel_scale**2
        assert 2 * np.sqrt(above / np.pi) == pytest.approx(fwhm, rel=0.2)


@pytest.mark.parametrize("name", ["lsst", "jades"])
def test_the_psf_changes_smoothly_over_the_field(name: str) -> None:
    """Peaks of one star seen through a growing PSF fall without steps where its transform is taken about another middle."""
    survey = surveys.survey(name)
    star, bands = one_source(star=True), len(survey.bands)
    star = replace(star, disc_flux=np.full((1, bands), 200.0), bulge_flux=np.zeros((1, bands)), knot_flux=np.zeros((1, bands)))
    stretches = np.linspace(0.97, 1.03, 61)
    stars = star.select(np.zeros(len(stretches), np.intp))
    assert (
        len(np.unique(render.stamp_sides(stars, optics(survey), stretches))) == 1
    )  # what wraps around a stamp depends on its side
    peaks = np.zeros((len(stretches), bands))
    place = np.full(len(stretches), 20.0)
    for stamps in render.render(stars, place, place, optics(survey), stretches):
        peaks[stamps.sources] = stamps.flux.max(axis=(2, 3))
    steps = np.diff(np.log(peaks), axis=0)
    assert (steps < 0).all()
    assert np.abs(np.diff(steps, axis=0)).max() < 1e-4


def test_knots_at_the_centre_are_a_point() -> None:
    source = one_source(star=True)
    knots = replace(source, disc_flux=source.knot_flux, knot_flux=source.disc_flux)
    np.testing.assert_allclose(draw(knots, 3.3, 4.4)[0], draw(source, 3.3, 4.4)[0], atol=1e-3)


def test_the_central_pixel_holds_its_share() -> None:
    flux, _ = draw(one_source(star=True, flux=1e4), 40.0, 40.0)
    np.testing.assert_allclose(flux.max(axis=(1, 2)) / 1e4, render.central_share(optics()), rtol=2e-3)


def test_brighter_sources_get_larger_stamps() -> None:
    sides = [draw(one_source(flux=flux), 0.0, 0.0)[0].shape[-1] for flux in (10.0, 1e3, 1e5)]
    assert sides == sorted(sides)
    assert sides[0] < sides[-1]


def test_the_edge_of_a_stamp_is_below_the_noise() -> None:
    flux, _ = draw(knotted(one_source(flux=1e5, radius=1.0), 0.3), 0.0, 0.0)
    edges = np.concatenate([flux[:, 0], flux[:, -1], flux[:, :, 0], flux[:, :, -1]], axis=1)
    assert (edges < 0.2 * optics().noise[:, None]).all()


def test_no_sources_give_no_stamps() -> None:
    none = one_source().select(np.zeros(0, np.intp))
    assert list(render.render(none, np.zeros(0), np.zeros(0), optics())) == []
