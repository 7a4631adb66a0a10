from __future__ import annotations

import math
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml
from astropy.coordinates import SkyCoord
from astropy.table import Table
from hypothesis import given
from hypothesis import strategies as st

from deepdisc_ops.config import validate
from deepdisc_ops.data.tables import Sources
from deepdisc_ops.data.truth import specz
from deepdisc_ops.data.truth.specz import SpecSettings, brightest_matches, compile_redshifts
from deepdisc_ops.errors import CatalogError, ConfigError

ARCSEC = 1 / 3600


def photometry(east: list[float], north: list[float] | None = None, mag: list[float] | None = None) -> Sources:
    """Sources at offsets in arcsec from (53, 0) with ids 100, 101, ..."""
    count = len(east)
    nothing = np.full(count, np.nan)
    magnitudes = {} if mag is None else {"F775W": np.array(mag), "F160W": np.array(mag)}
    return Sources(
        np.arange(100, 100 + count),
        53 + np.array(east) * ARCSEC,
        np.array(north or [0.0] * count) * ARCSEC,
        nothing,
        np.zeros(count, np.int32),
        magnitudes,
    )


def write(path: Path, east: list[float], z: list[float], **columns: list) -> str:
    Table({"ra": 53 + np.array(east) * ARCSEC, "dec": np.zeros(len(east)), "z": z} | columns).write(path, overwrite=True)
    return str(path)


def settings(*catalogs: dict, **more: object) -> SpecSettings:
    return validate(SpecSettings, {"catalogs": list(catalogs), **more}, "test")


def test_the_rules_in_the_docstring_are_the_rules_of_jades(tmp_path: Path) -> None:
    text = (specz.__doc__ or "").split("::\n\n", 1)[1].split("\n\nGlossary")[0]
    tree = yaml.safe_load(textwrap.dedent(text))
    east = [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]
    write(tmp_path / "n.fits", east, [1, 2, 3, 4, 5, 6.0], DR_flag=[False, True, False, False, False, False], f=list("ABDCXA"))
    table = Table.read(tmp_path / "n.fits")
    table.rename_columns(["z", "f"], ["z_Spec", "z_Spec_flag"])
    table.write(tmp_path / "n.fits", overwrite=True)
    write(tmp_path / "m.fits", [10.0, 20.0, 30.0], [2, 3.1, 4.02], zconf=[2, 1, 3], Mconf=[2, 3, 3])
    write(tmp_path / "a.fits", [20.0, 30.0, 40.0], [3.2, 6.0, -99])
    table = Table.read(tmp_path / "a.fits")
    table.rename_column("z", "zspec")
    table.write(tmp_path / "a.fits", overwrite=True)
    for catalog, name in zip(tree["catalogs"], "nma", strict=True):
        catalog["path"] = str(tmp_path / f"{name}.fits")
    result = compile_redshifts(validate(SpecSettings, tree, "docstring"), photometry(east, mag=[25.0] * 6))
    # 30: NIRSpec 4 and MUSE 4.02 agree, ASTRODEEP's 6.0 does not: out. 40 (flag X, no redshift) is in no catalogue
    assert result.table["id"].tolist() == [100, 101, 102, 105]
    assert result.table["redshift"].tolist() == [1, 2, 3.2, 6]
    assert result.table["catalog"].tolist() == ["NIRSpec", "MUSE", "ASTRODEEP", "NIRSpec"]
    assert result.table["quality"].tolist() == ["A", "2", "", "A"]
    removed = {(step.catalog, step.rule): (step.removed, step.left) for step in result.steps}
    assert removed["NIRSpec", "DR_flag is False"] == (1, 5)
    assert removed["NIRSpec", "flag A, B or C"] == (2, 3)
    assert removed["MUSE", "zconf is not 1"] == (1, 2)
    assert removed["ASTRODEEP", "no redshift"] == (1, 2)
    assert removed["all catalogues", "catalogues differ by more than 0.1"] == (1, 4)
    assert "MUSE: zconf is not 1" in result.summary()
    np.testing.assert_array_equal(result.redshift_of(np.array([105, 7, 103, 100])), [6, np.nan, np.nan, 1])


def test_the_brightest_candidate_wins_and_a_source_has_one_spectrum(tmp_path: Path) -> None:
    # sources: faint at 0, bright at 0.4, alone at 5; spectra: at 0.05 (nearest to the faint one), 5.3 (quality C), 5.4 (quality A)
    path = write(tmp_path / "s.fits", [0.05, 5.3, 5.4, 60.0], [1, 2, 2.5, 3.0], q=list("ACAA"))
    sources = photometry([0.0, 0.4, 5.0], mag=[27.0, 24.0, 25.0])
    base = {"name": "s", "path": path, "quality": "q"}
    chosen = compile_redshifts(settings(base | {"brightest_in": "F775W", "best_quality": ["A", "B", "C"]}), sources)
    assert dict(zip(chosen.table["id"].tolist(), chosen.table["redshift"].tolist(), strict=True)) == {101: 1, 102: 2.5}
    assert chosen.table["row"].tolist() == [0, 2]
    np.testing.assert_allclose(chosen.table["separation"], [0.35, 0.4], atol=1e-6)
    nearest = compile_redshifts(settings(base), sources)
    assert dict(zip(nearest.table["id"].tolist(), nearest.table["redshift"].tolist(), strict=True)) == {100: 1, 102: 2}


def test_catalogues_can_be_joined_by_id(tmp_path: Path) -> None:
    path = write(tmp_path / "s.fits", [0, 0, 0, 0], [1, 2, 3, 4.0], phot=[102, 100, 7, 102])
    result = compile_redshifts(settings({"name": "s", "path": path, "match": "id", "id": "phot"}), photometry([0.0, 10, 20]))
    assert result.table["id"].tolist() == [100, 102]
    assert result.table["redshift"].tolist() == [2, 1]
    assert np.isnan(result.table["separation"]).all()


positions = st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=1, max_size=25)


@given(positions, positions, st.floats(0.05, 1.0), st.integers(0, 2**31))
def test_brightest_matches_are_those_of_a_search_over_all_pairs(
    spectra: list[tuple[float, float]], sources: list[tuple[float, float]], radius: float, seed: int
) -> None:
    magnitude = np.random.default_rng(seed).choice([24.0, 25.0, 26.0, np.nan], len(sources))
    sky = [
        SkyCoord(53 + np.array(list_)[:, 0] * ARCSEC, np.array(list_)[:, 1] * ARCSEC, unit="deg") for list_ in (spectra, sources)
    ]
    spectrum, source, separation = brightest_matches(*sky, radius, magnitude)
    expected = {}
    for i in range(len(spectra)):
        candidates = []
        for j in range(len(sources)):
            distance = haversine(sky, i, j)
            if distance < radius - 1e-9:
                candidates.append((math.inf if np.isnan(magnitude[j]) else magnitude[j], round(distance, 7), j))
        if candidates:
            expected[i] = min(candidates)[2]
    found = dict(zip(spectrum.tolist(), source.tolist(), strict=True))
    for i, j in expected.items():
        assert magnitude[found[i]] == magnitude[j] or (np.isnan(magnitude[found[i]]) and np.isnan(magnitude[j]))
        assert haversine(sky, i, found[i]) == pytest.approx(haversine(sky, i, j), abs=1e-6)
    assert (separation <= radius + 1e-9).all()
    assert set(expected) <= set(found)


def haversine(sky: list[SkyCoord], i: int, j: int) -> float:
    ra1, dec1, ra2, dec2 = (math.radians(v) for v in (sky[0].ra.deg[i], sky[0].dec.deg[i], sky[1].ra.deg[j], sky[1].dec.deg[j]))
    h = math.sin((dec2 - dec1) / 2) ** 2 + math.cos(dec1) * math.cos(dec2) * math.sin((ra2 - ra1) / 2) ** 2
    return math.degrees(2 * math.asin(math.sqrt(h))) * 3600


def test_the_order_of_rows_and_of_agreeing_catalogues_changes_no_redshift_that_is_in_one(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    sources = photometry(rng.uniform(-40, 40, 60).tolist(), mag=rng.uniform(22, 28, 60).tolist())
    east = ((sources.ra - 53) / ARCSEC)[:40] + rng.normal(0, 0.1, 40)
    z = rng.uniform(0, 6, 40)
    order = rng.permutation(40)
    first = write(tmp_path / "1.fits", east.tolist(), z.tolist())
    second = write(tmp_path / "2.fits", east[order].tolist(), z[order].tolist())
    one, other = (compile_redshifts(settings({"name": "s", "path": path}), sources).table for path in (first, second))
    assert one["id"].tolist() == other["id"].tolist()
    assert one["redshift"].tolist() == other["redshift"].tolist()
    assert len(set(one["id"].tolist())) == len(one)
    assert len(set(one["row"].tolist())) == len(one)


def test_faults_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "s.fits", [0.0], [1.0])
    here = {"name": "s", "path": path}
    with pytest.raises(CatalogError, match="no photometric source has a spectroscopic redshift"):
        compile_redshifts(settings(here), photometry([100.0]))
    with pytest.raises(ConfigError, match="brightest_in is F775W, but the photometric catalogue has magnitudes in none"):
        compile_redshifts(settings(here | {"brightest_in": "F775W"}), photometry([0.0]))
    with pytest.raises(CatalogError, match=r"spectroscopic catalogue s .* lacks the column 'zs' \(close: z\)"):
        compile_redshifts(settings(here | {"redshift": "zs"}), photometry([0.0]))
    with pytest.raises(ConfigError, match="the column id goes with match: id"):
        settings(here | {"match": "id"})
    with pytest.raises(ConfigError, match="expected names that differ"):
        settings(here, here)
