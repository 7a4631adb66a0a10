from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepdisc_ops.data import spectra, surveys

LSST = surveys.survey("lsst")


@pytest.mark.parametrize("survey", ["lsst", "jades"])
def test_grid_returns_its_own_nodes(survey: str) -> None:
    grid = spectra.spectral_grid(surveys.survey(survey))
    last = len(grid.redshift) - 1
    for step in (40, last - 1):
        node = grid(np.array([3 * grid.types_step]), grid.dust[[2]], grid.redshift[[step]])
        np.testing.assert_allclose(node[0], grid.magnitudes[3, 2, step])


def test_grid_agrees_with_direct_integration() -> None:
    """A template without dust at a redshift where the intergalactic medium is clear: photons counted on a fine grid."""
    redshift, band = 0.5, surveys.filters(LSST)[2]
    wavelength, per_wavelength = surveys.read_curve("SED", "Sc_A_0.sed")
    fine = np.geomspace(band.wavelength[0], band.wavelength[-1], 20000)

    def magnitude(z: float) -> float:
        flux = np.interp(fine / (1 + z), wavelength, per_wavelength * wavelength**2)
        response = np.interp(fine, band.wavelength, band.response)
        return float(-2.5 * np.log10(np.trapezoid(flux * response, np.log(fine))))

    grid = spectra.spectral_grid(LSST)
    kind = np.array([float(spectra.TEMPLATES.index("Sc"))])
    near, far = (grid(kind, np.zeros(1), np.array([z]))[0, 2] for z in (0.1, redshift))
    assert far - near == pytest.approx(magnitude(redshift) - magnitude(0.1), abs=0.01)


@given(st.floats(0, 11), st.floats(0, 0.5), st.floats(0, 3))
def test_dust_reddens_every_spectrum(kind: float, dust: float, redshift: float) -> None:
    grid = spectra.spectral_grid(LSST)
    clear, dusty = (grid(np.array([kind]), np.array([value]), np.array([redshift]))[0] for value in (dust, dust + 0.1))
    assert (dusty[1] - dusty[4]) > (clear[1] - clear[4])


def test_extinction_curves_have_their_ratio_of_total_to_selective() -> None:
    b_band, v_band = spectra.cardelli(np.array([4400.0, 5500.0]))
    assert v_band == pytest.approx(3.1, rel=0.02)
    assert b_band - v_band == pytest.approx(1.0, rel=0.06)
    assert spectra.calzetti(np.array([5500.0]))[0] == pytest.approx(4.05, rel=0.02)
    infrared = spectra.cardelli(np.geomspace(10000.0, 50000.0, 30))
    assert (np.diff(infrared) < 0).all()
    assert infrared[-1] > 0


@given(st.floats(0, 12))
def test_the_intergalactic_medium_takes_light_only_shortward_of_lyman_alpha(redshift: float) -> None:
    wavelength = np.linspace(400.0, 20000.0, 400)
    passed = spectra.intergalactic(wavelength, redshift)
    assert ((passed >= 0) & (passed <= 1)).all()
    assert (passed[wavelength > 1216.5 * (1 + redshift)] == 1).all()
    neutral = (wavelength > 1216 * (1 + spectra.REIONISED)) & (wavelength < 1215 * (1 + redshift))
    assert (passed[neutral] < 0.001).all()


@pytest.mark.parametrize("absorber", [2.2, 3.0, 3.8])
def test_the_forest_is_as_opaque_as_quasars_show(absorber: float) -> None:
    """Effective optical depth 0.0018 (1 + z)^3.92 of Faucher-Giguere et al. (2008), not Madau's own measurement."""
    passed = spectra.intergalactic(np.array([1216.0 * (1 + absorber)]), absorber + 0.1)[0]
    assert passed == pytest.approx(np.exp(-0.0018 * (1 + absorber) ** 3.92), abs=0.06)


def test_a_line_brightens_the_band_it_falls_into() -> None:
    boost = spectra.line_boost(LSST, np.array([0.0, 0.38]), np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))
    assert boost[0].argmax() == LSST.bands.index("r")  # H alpha at 6563
    assert boost[1].argmax() == LSST.bands.index("z")  # and at 9057
    assert boost[0, 0] == 1


def test_stars_lie_on_the_sloan_stellar_locus() -> None:
    """g-r against r-i of equation 4 of Juric et al. (2008), which knows nothing of the table."""
    g_minus_i, _, tabulated, r_minus_i = spectra.STELLAR_LOCUS[1:-2, :4].T
    g_minus_r = 1.39 * (1 - np.exp(-4.9 * r_minus_i**3 - 2.45 * r_minus_i**2 - 1.68 * r_minus_i - 0.05))
    np.testing.assert_allclose(tabulated, g_minus_r, atol=0.08)
    np.testing.assert_allclose(spectra.STELLAR_LOCUS[:, 2] + spectra.STELLAR_LOCUS[:, 3], spectra.STELLAR_LOCUS[:, 0], atol=0.03)
    magnitudes = spectra.star_magnitudes(LSST, g_minus_i)
    np.testing.assert_allclose(magnitudes[:, 1] - magnitudes[:, 3], g_minus_i, atol=0.15)  # its bands are not quite Sloan's


def test_cool_stars_have_the_strongest_red_colours_and_no_black_bodys() -> None:
    warm, cool = spectra.star_magnitudes(LSST, np.array([0.6, 2.8]))
    assert cool[2] - cool[3] > warm[2] - warm[3] + 0.9
    assert warm[0] - warm[1] > 0.9  # the blanketed ultraviolet; a black body of its g-r would have 0.6
