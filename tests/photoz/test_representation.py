from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deepdisc_ops.errors import CatalogError
from deepdisc_ops.photoz.figures import map_of_cells, write_figure
from deepdisc_ops.photoz.representation import SelfOrganisingMap, advise, colour_features, colour_names, train_map

minisom = pytest.importorskip("minisom")
BANDS = ("g", "r", "i", "z")


def magnitudes(n: int, seed: int) -> np.ndarray:
    """Two sorts of objects, blue and red, of all brightnesses."""
    rng = np.random.default_rng(seed)
    colour = np.where(rng.random(n) < 0.3, 0.9, 0.2)[:, None] + 0.1 * rng.standard_normal((n, 3))
    last = rng.uniform(20, 25, (n, 1))
    return np.concatenate([last + colour[:, ::-1].cumsum(1)[:, ::-1], last], axis=1)


@pytest.fixture(scope="module")
def som() -> SelfOrganisingMap:
    return train_map(colour_features(magnitudes(1500, 1)), colour_names(BANDS), side=10, steps=3000)


def test_features_are_the_papers() -> None:
    assert colour_names(("F090W", "F115W", "F444W")) == ("F444W", "F115W - F090W", "F444W - F115W")
    np.testing.assert_allclose(colour_features([[20.0, 21.0, 23.0]]), [[23, 1, 2]])


def test_cells_are_those_of_minisom(som: SelfOrganisingMap) -> None:
    features = colour_features(magnitudes(400, 2))
    network = minisom.MiniSom(10, 10, 4)
    network._weights = som.cells.copy()
    scaled = (features - som.offset) / som.scale
    theirs = [x * 10 + y for x, y in map(network.winner, scaled)]
    assert som.assign(features).tolist() == theirs
    np.testing.assert_array_equal(som.occupation(som.assign(features)), network.activation_response(scaled))


def test_neighbours_resemble_each_other(som: SelfOrganisingMap) -> None:
    apart = np.linalg.norm(np.diff(som.cells, axis=0), axis=2).mean()
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(som.cells.reshape(100, 4)).reshape(10, 10, 4)
    assert apart < 0.5 * np.linalg.norm(np.diff(shuffled, axis=0), axis=2).mean()


def test_the_same_seed_gives_the_same_map_and_it_survives_a_file(som: SelfOrganisingMap, spaced: Path) -> None:
    again = train_map(colour_features(magnitudes(1500, 1)), colour_names(BANDS), side=10, steps=3000)
    np.testing.assert_array_equal(again.cells, som.cells)
    som.save(spaced / "map.npz")
    loaded = SelfOrganisingMap.load(spaced / "map.npz")
    assert loaded.features == som.features
    np.testing.assert_array_equal(loaded.assign(colour_features(magnitudes(50, 3))), som.assign(colour_features(magnitudes(50, 3))))
    (spaced / "map.npz").write_bytes(b"no map")
    with pytest.raises(CatalogError, match="train it anew"):
        SelfOrganisingMap.load(spaced / "map.npz")


def test_objects_without_all_bands_have_no_cell(som: SelfOrganisingMap) -> None:
    features = colour_features(magnitudes(3, 4))
    features[1, 2] = np.nan
    cell = som.assign(features)
    assert cell[1] == -1
    assert som.occupation(cell).sum() == 2
    assert som.spec_rep(cell, cell[:1]).tolist() == [1, 0, int(cell[2] == cell[0])]
    assert som.assign(np.zeros((0, 4))).shape == (0,)


def test_advice_puts_cells_without_spectra_first(som: SelfOrganisingMap, spaced: Path) -> None:
    cell = som.assign(colour_features(magnitudes(2000, 5)))
    with_spectra = cell[cell < 50]
    z = np.linspace(0.1, 2, len(with_spectra))
    advice = advise(som, cell, with_spectra, z, wanted=2000)
    assert advice.objects.sum() == 2000
    first = advice.spectra[: int((advice.spectra == 0).sum() // 2)]
    assert (first == 0).all()
    assert (advice.missing[advice.spectra == 0] >= advice.objects[advice.spectra == 0]).all()
    assert (advice.missing[advice.spectra == advice.objects] == 0).all()
    np.testing.assert_array_equal(advice.cell, advice.x * 10 + advice.y)
    assert np.isfinite(advice.scatter[advice.spectra >= 4]).all()
    assert len(advice.as_table()) == len(advice.cell)
    redshift = np.where(cell < 50, 0.5, 1.5)
    write_figure(map_of_cells(som, cell, redshift, with_spectra), spaced / "map.png")
    assert (spaced / "map.png").stat().st_size > 10_000


def test_unusable_features_are_named() -> None:
    features = colour_features(magnitudes(20, 6))
    features[:, 1] = 1
    with pytest.raises(CatalogError, match=r"\['r - g'\] are the same for all objects"):
        train_map(features, colour_names(BANDS), side=3, steps=10)
    with pytest.raises(CatalogError, match="0 objects with all of 4 features"):
        train_map(np.full((5, 4), np.nan), colour_names(BANDS))
    with pytest.raises(CatalogError, match="expected \\(objects, 4\\)"):
        train_map(np.zeros((5, 3)), colour_names(BANDS))
