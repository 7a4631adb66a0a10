from __future__ import annotations

import numpy as np
import pytest

from deepdisc_ops.data import surveys
from deepdisc_ops.data.render import unit_psf
from deepdisc_ops.errors import ConfigError, SetupError


@pytest.fixture(params=sorted(surveys.SURVEYS))
def survey(request: pytest.FixtureRequest) -> surveys.Survey:
    return surveys.survey(request.param)


def test_every_column_has_a_value_per_band(survey: surveys.Survey) -> None:
    columns = (survey.psf_fwhm, survey.five_sigma_depth, survey.filter_files, survey.shallow_depth or survey.bands)
    columns += (survey.sky_brightness, survey.saturation)
    assert {len(column) for column in columns} == {len(survey.bands)}
    assert survey.gold_band in survey.bands


def test_unknown_survey_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'lsst'"):
        surveys.survey("LSTT".lower())


def test_noise_falls_with_the_root_of_the_years() -> None:
    lsst = surveys.survey("lsst")
    np.testing.assert_allclose(surveys.noise(lsst, 1.0) / surveys.noise(lsst, 4.0), 2.0)


def test_years_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="years is 0"):
        surveys.noise(surveys.survey("lsst"), 0)


def test_a_point_at_the_depth_has_five_sigma(survey: surveys.Survey) -> None:
    """By the best weighting of GalSim's pixels; from the ground LSST's n_eff leaves out Kolmogorov's wings: 4.2 sigma."""
    conditions = surveys.typical_conditions(survey, 5.0)
    noise = surveys.pixel_noise(survey, conditions)
    expected = 5.0 if survey.psf_profile == "airy" else 4.24
    for fwhm, flux, sigma in zip(conditions.psf_fwhm, surveys.to_njy(conditions.depth), noise, strict=True):
        psf = unit_psf(survey.psf_profile).dilate(fwhm / survey.pixel_scale)
        places = [(x, y) for x in (0.0, 0.25, 0.5) for y in (0.0, 0.25, 0.5)]
        shares = [psf.drawImage(nx=96, ny=96, scale=1.0, offset=place).array.astype(float) for place in places]
        snr = flux / sigma * np.sqrt(np.mean([(share**2).sum() for share in shares]))
        assert snr == pytest.approx(expected, rel=0.02)


def test_magnitude_and_flux_are_inverse() -> None:
    magnitudes = np.linspace(15, 35, 21)
    np.testing.assert_allclose(surveys.to_magnitude(surveys.to_njy(magnitudes)), magnitudes)


def test_scenes_without_scatter_are_typical_and_others_are_not() -> None:
    rng = np.random.default_rng(0)
    lsst, hsc = surveys.survey("lsst"), surveys.survey("hsc")
    np.testing.assert_array_equal(surveys.draw_conditions(lsst, 5.0, rng).depth, surveys.typical_conditions(lsst, 5.0).depth)
    drawn = np.array([surveys.draw_conditions(hsc, 5.0, rng).depth for _ in range(300)])
    middle = (np.array(hsc.five_sigma_depth) + np.array(hsc.shallow_depth)) / 2
    np.testing.assert_allclose(drawn.mean(axis=0), middle, atol=0.15)
    assert (drawn.std(axis=0) > 0.2).all()


def test_filters_are_normalised_and_in_order_of_wavelength(survey: surveys.Survey) -> None:
    bands = surveys.filters(survey)
    for band in bands:
        assert np.trapezoid(band.response, np.log(band.wavelength)) == pytest.approx(1.0)
    effective = [band.effective_wavelength for band in bands]
    assert effective == sorted(effective)
    assert 3000 < effective[0] < effective[-1] < 50000
    assert all(0 < np.ptp(band.wavelength) < 0.6 * band.effective_wavelength for band in bands)


def test_nircam_bands_lie_where_their_names_say() -> None:
    jades = surveys.survey("jades")
    for name, band in zip(jades.bands, surveys.filters(jades), strict=True):
        assert band.effective_wavelength == pytest.approx(float(name[1:4]) * 100, rel=0.03)


@pytest.mark.parametrize("name", ["jades", "roman"])
def test_above_the_atmosphere_the_psf_is_near_the_diffraction_limit(name: str) -> None:
    survey, diameter = surveys.survey(name), {"jades": 6.5, "roman": 2.4}[name]
    assert survey.psf_profile == "airy"
    wavelength = np.array([band.effective_wavelength for band in surveys.filters(survey)]) * 1e-10
    limit = np.degrees(1.03 * wavelength / diameter) * 3600
    ratio = np.array(survey.psf_fwhm) / limit
    assert ((ratio > 0.9) & (ratio < 1.3)).all()


def test_the_sky_gives_some_electrons_per_nanojansky(survey: surveys.Survey) -> None:
    """Sky per pixel over noise squared: a long exposure on a large mirror collects 0.1 to 10^4 electrons per nanojansky."""
    sky = surveys.to_njy(np.array(survey.sky_brightness)) * survey.pixel_scale**2
    gain = sky / surveys.noise(survey) ** 2
    assert ((gain > 0.1) & (gain < 1e4)).all()
    assert (np.array(survey.saturation) < np.array(survey.five_sigma_depth) - 7).all()


def test_missing_example_data_name_the_package() -> None:
    with pytest.raises(SetupError, match="no/such_file is missing.*pz-rail-base"):
        surveys.example_data("no", "such_file")
