from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdisc_ops.data import population, render, surveys

LSST = surveys.survey("lsst")


def one_source(*, star: bool = False, flux: float = 1000.0, bulge: float = 0.3, radius: float = 0.4) -> population.Population:
    bands = np.ones((1, len(LSST.bands))) * flux
    return population.Population(
        redshift=np.array([0.0 if star else 0.7]),
        is_star=np.array([star]),
        disc_flux=bands * (1 if star else 1 - bulge),
        bulge_flux=bands * (0 if star else bulge),
        disc_radius=np.array([0.0 if star else radius]),
        bulge_radius=np.array([0.0 if star else radius / 2]),
        axis_ratio=np.array([1.0 if star else 0.5]),
        angle=np.array([0.6]),
    )


def draw(
    source: population.Population, x: float, y: float, survey: surveys.Survey = LSST
) -> tuple[np.ndarray, np.ndarray, surveys.Conditions]:
    conditions = surveys.typical_conditions(survey, 5.0)
    noise = surveys.pixel_noise(survey, conditions)
    (stamps,) = render.render(source, np.array([x]), np.array([y]), conditions.psf_fwhm, noise, survey.pixel_scale)
    return stamps.flux[0], stamps.origins[0], conditions


@pytest.mark.parametrize("name", ["lsst", "hsc"])
def test_fast_renderer_agrees_with_galsim_within_a_third_of_the_noise(name: str) -> None:
    survey = surveys.survey(name)
    rng = np.random.default_rng(11)
    conditions = surveys.draw_conditions(survey, 5.0, rng)
    noise = surveys.pixel_noise(survey, conditions)
    crowd = population.draw_population(survey, 10.0, rng)
    brightest = np.argsort(-crowd.flux.max(axis=1))[:6]
    sources = crowd.select(np.concatenate([brightest, rng.choice(len(crowd), 30, replace=False)]))
    x, y = rng.uniform(0, 100, (2, len(sources)))
    arguments = (sources, x, y, conditions.psf_fwhm, noise, survey.pixel_scale)
    fast = {int(i): flux for stamps in render.render(*arguments) for i, flux in zip(stamps.sources, stamps.flux, strict=True)}
    for stamps in render.render_galsim(*arguments):
        difference = np.abs(fast[int(stamps.sources[0])] - stamps.flux[0]) / noise[:, None, None]
        assert difference.max() < 0.3


def test_every_source_is_drawn_once() -> None:
    rng = np.random.default_rng(0)
    sources = population.draw_population(LSST, 1.0, rng)
    x, y = rng.uniform(0, 200, (2, len(sources)))
    conditions = surveys.typical_conditions(LSST, 5.0)
    noise = surveys.pixel_noise(LSST, conditions)
    drawn = [stamps.sources for stamps in render.render(sources, x, y, conditions.psf_fwhm, noise, LSST.pixel_scale)]
    np.testing.assert_array_equal(np.sort(np.concatenate(drawn)), np.arange(len(sources)))


@settings(max_examples=25, deadline=None)
@given(st.floats(-20, 600), st.floats(-20, 600), st.booleans())
def test_light_is_conserved_and_centred(x: float, y: float, star: bool) -> None:
    flux, origin, _ = draw(one_source(star=star), x, y)
    total = flux.sum(axis=(1, 2))
    np.testing.assert_allclose(total, 1000.0, rtol=0.02)
    rows, columns = np.indices(flux.shape[1:])
    assert (flux[3] * columns).sum() / total[3] + origin[0] == pytest.approx(x, abs=0.05)
    assert (flux[3] * rows).sum() / total[3] + origin[1] == pytest.approx(y, abs=0.05)


def test_a_point_has_the_width_of_the_psf() -> None:
    flux, _, conditions = draw(one_source(star=True, flux=5000.0), 10.0, 10.0)
    for plane, fwhm in zip(flux, conditions.psf_fwhm, strict=True):
        above = (plane > plane.max() / 2).sum() * LSST.pixel_scale**2
        assert 2 * np.sqrt(above / np.pi) == pytest.approx(fwhm, rel=0.2)


def test_brighter_sources_get_larger_stamps() -> None:
    sides = [draw(one_source(flux=flux), 0.0, 0.0)[0].shape[-1] for flux in (10.0, 1e3, 1e5)]
    assert sides == sorted(sides)
    assert sides[0] < sides[-1]


def test_the_edge_of_a_stamp_is_below_the_noise() -> None:
    flux, _, conditions = draw(one_source(flux=1e5, radius=1.0), 0.0, 0.0)
    noise = surveys.pixel_noise(LSST, conditions)[:, None]
    edges = np.concatenate([flux[:, 0], flux[:, -1], flux[:, :, 0], flux[:, :, -1]], axis=1)
    assert (edges < 0.2 * noise).all()


def test_no_sources_give_no_stamps() -> None:
    none = one_source().select(np.zeros(0, np.intp))
    conditions = surveys.typical_conditions(LSST, 5.0)
    noise = surveys.pixel_noise(LSST, conditions)
    assert list(render.render(none, np.zeros(0), np.zeros(0), conditions.psf_fwhm, noise, LSST.pixel_scale)) == []
