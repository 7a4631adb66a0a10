from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from deepdisc_ops.errors import InputError
from deepdisc_ops.photoz import figures
from deepdisc_ops.photoz.metrics import Recovery, binned_metrics, equal_counts, point_metrics, share
from deepdisc_ops.photoz.mixture import GaussianMixture


def redshifts(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    z_true = rng.gamma(4, 0.25, n)
    return z_true, np.maximum(z_true + 0.05 * rng.standard_normal(n), 0)


def mixture(n: int, rng: np.random.Generator) -> GaussianMixture:
    return GaussianMixture.from_arrays(rng.dirichlet(np.ones(3), n), rng.uniform(-0.2, 2, (n, 3)), rng.uniform(0.01, 0.3, (n, 3)))


def png(figure: Figure, folder: Path) -> np.ndarray:
    path = folder / "new" / "figure.png"
    figures.write_figure(figure, path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return np.asarray(Image.open(path).convert("RGB"))


def texts(figure: Figure) -> str:
    return " ".join(artist.get_text() for artist in figure.findobj(Text))


@pytest.mark.parametrize("n", [1, 400])
def test_the_redshift_scatter_carries_its_figures(n: int, rng: np.random.Generator, spaced: Path) -> None:
    z_true, z_phot = redshifts(n, rng)
    metrics = point_metrics(z_phot, z_true, "lsst", rng)
    figure = figures.redshift_scatter(z_true, z_phot, metrics)
    assert png(figure, spaced).std() > 5
    assert f"N = {n}" in texts(figure)
    assert f"{metrics.bias:+.4f}" in texts(figure)


@pytest.mark.parametrize("n", [1, 500])
def test_the_pit_figure(n: int, rng: np.random.Generator, spaced: Path) -> None:
    figure = figures.pit_figure(rng.random(n))
    assert png(figure, spaced).std() > 5
    assert "KS distance" in texts(figure)


def test_example_densities_show_truth_where_there_is_one(rng: np.random.Generator, spaced: Path) -> None:
    examples = mixture(4, rng)
    figure = figures.example_densities(examples, [0.5, np.nan, 1.0, 2.0], examples.mode().numpy(), ["a", "b", "c", "d"])
    assert png(figure, spaced).std() > 5
    assert texts(figure).count("true ") == 3
    assert texts(figure).count("mode ") == 4
    with pytest.raises(InputError, match="no objects"):
        figures.example_densities(mixture(0, rng), [], [])


def test_completeness_is_drawn_per_magnitude_bin(rng: np.random.Generator, spaced: Path) -> None:
    magnitude = np.r_[rng.uniform(20, 27, 300), np.nan]
    figure = figures.completeness_by_magnitude(magnitude, magnitude < 25, band="i", limit=25.3)
    assert png(figure, spaced).std() > 5
    assert "i = 25.3" in texts(figure)
    line = next(line for axes in figure.axes for line in axes.lines if len(line.get_xdata()) > 5)
    centre, share = line.get_data()
    np.testing.assert_array_equal(np.asarray(share)[np.asarray(centre) < 25], 1)
    np.testing.assert_array_equal(np.asarray(share)[np.asarray(centre) > 25], 0)
    with pytest.raises(InputError, match="no object has a magnitude in i"):
        figures.completeness_by_magnitude([np.nan], [True], band="i")


@pytest.mark.parametrize("shape", [(41, 60), (1, 1)])
def test_rgb_pictures_of_odd_sizes_and_nan_pixels(shape: tuple[int, int], rng: np.random.Generator, spaced: Path) -> None:
    planes = rng.standard_normal((3, *shape))
    planes[0, 0, 0] = np.nan
    boxes = np.array([[3, 4, 9, 12], [30, 20, 41, 33.5]])
    figure = figures.rgb_with_boxes(*planes, boxes, [True, False], ["0.51", "1.20"], title="field")
    assert png(figure, spaced).size > 0
    assert "matched: 1" in texts(figure)
    assert "unmatched: 1" in texts(figure)
    assert "1.20" in texts(figure)
    assert png(figures.rgb_with_boxes(*planes), spaced).size > 0


def test_a_box_is_drawn_around_its_pixels() -> None:
    planes = np.zeros((3, 20, 20))
    figure = figures.rgb_with_boxes(*planes, [[4, 6, 8, 9]])
    (outline,) = figure.axes[0].collections[0].get_paths()
    # pixel centres are whole numbers: pixels 4 to 7 reach from 3.5 to 7.5
    assert outline.vertices.min(0).tolist() == [3.5, 5.5]
    assert outline.vertices.max(0).tolist() == [7.5, 8.5]


def test_runs_are_compared_metric_by_metric(spaced: Path) -> None:
    runs = {"one": [{"step": 1.0, "val_nll": 0.5}, {"step": 2.0, "val_nll": 0.1}], "other": [{"step": 2.0, "val_sigma_iqr": 0.2}]}
    figure = figures.compared_curves(runs, ("val_nll", "val_sigma_iqr"))
    first, second = figure.axes
    assert [line.get_label() for line in first.lines] == ["one", "other"]
    assert first.lines[0].get_ydata().tolist() == [0.5, 0.1]
    assert (first.lines[1].get_ydata().size, second.lines[1].get_ydata().tolist()) == (0, [0.2])
    assert png(figure, spaced).size > 0
    with pytest.raises(InputError, match="nothing to compare"):
        figures.compared_curves({}, ("val_nll",))


def test_loss_curves_show_every_name_and_skip_gaps(spaced: Path) -> None:
    history: list[dict[str, float]] = [{"step": s, "train_loss": 10 / s, "lr": 1e-3, "images_per_s": 2.0} for s in (10, 20, 300)]
    history[2] |= {"val_nll": -0.3, "val_bias": float("nan"), "val_loss": 1.0}
    figure = figures.loss_curves(history)
    assert png(figure, spaced).std() > 5
    for name in ("train_loss", "val_loss", "val_nll", "val_bias"):
        assert name in texts(figure)
    assert "lr" not in texts(figure).split()
    with pytest.raises(InputError, match="history is empty"):
        figures.loss_curves([])


def test_a_history_without_metrics_is_an_empty_figure(spaced: Path) -> None:
    assert png(figures.loss_curves([{"step": 1}]), spaced).size > 0


def test_pyplot_is_left_alone() -> None:
    program = "import sys, deepdisc_ops.photoz.figures as f; f.pit_figure([0.5]); sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def scaling_series(value: list[float], *, size: tuple[float, ...] = (0.2, 1.0), whole: bool = True) -> figures.ScalingSeries:
    """Trials of both sizes in turn, the first of each the best."""
    n = len(value)
    metrics = {"val_nll": np.array(value), "val_sigma_iqr": np.full(n, np.nan)}
    errors = {name: np.full(n, 0.1) for name in metrics}
    return figures.ScalingSeries(np.resize(size, n), metrics, errors, np.arange(n) < 2, np.full(n, whole))


def test_scaling_lines_join_the_best_of_each_size(spaced: Path) -> None:
    series = {"tiny": scaling_series([2.0, 1.0, 2.1, 50.0]), "small": scaling_series([1.5, 0.5], whole=False)}
    figure = figures.scaling_curves(series, ["val_nll", "val_sigma_iqr"], size="share", title="how")
    assert png(figure, spaced).std() > 5
    assert {"tiny", "small", "stopped early", "other trials of that size"} <= {t.get_text() for t in figure.legends[0].get_texts()}
    axes, empty = figure.axes
    lines = [line for line in axes.lines if line.get_linestyle() != "None" and len(line.get_xdata()) == 2]
    assert [list(line.get_ydata()) for line in lines] == [[2.0, 1.0], [1.5, 0.5]]
    low, high = axes.get_ylim()
    assert low < 0.4 < 2.1 < high < 50
    arrows = [line for line in axes.lines if line.get_marker() == "^" and len(line.get_xdata())]
    assert len(arrows) == 1
    assert low < arrows[0].get_ydata()[0] < high
    assert not any(np.isfinite(np.asarray(line.get_ydata(), float)).any() for line in empty.lines)


def test_scaling_figures_can_be_vector_graphics(spaced: Path) -> None:
    figures.write_figure(figures.scaling_curves({"a": scaling_series([1.0, 2.0])}, ["val_nll"], size="images"), spaced / "f.svg")
    assert "<svg" in (spaced / "f.svg").read_text()[:600]


def test_one_size_is_no_scaling() -> None:
    with pytest.raises(InputError, match="trials of 1 different sizes"):
        figures.scaling_curves({"a": scaling_series([1.0, 2.0], size=(1.0, 1.0))}, ["val_nll"], size="images")
    with pytest.raises(InputError, match="trials of 0 different sizes"):
        figures.scaling_curves({}, ["val_nll"], size="images")


def test_labels_of_close_sizes_do_not_run_into_each_other() -> None:
    series = {"a": scaling_series([1.0, 2.0, 3.0], size=(1.0, 1.01, 40.0))}
    (axes,) = figures.scaling_curves(series, ["val_nll"], size="parameters").axes
    np.testing.assert_allclose(axes.get_xticks(), [1.0, 40.0])


def test_binned_statistics_show_every_series_and_the_requirements(rng: np.random.Generator, spaced: Path) -> None:
    z_true, z_phot = redshifts(300, rng)
    bins = binned_metrics(z_phot, z_true, z_true, equal_counts(z_true, 4), "lsst", rng, samples=5)
    figure = figures.binned_statistics({"mode": bins, "mean": bins[:2], "none": []}, "redshift")
    assert png(figure, spaced).std() > 5
    assert {"mode", "mean", "LSST requirement"} == {text.get_text() for text in figure.axes[0].get_legend().get_texts()}
    with pytest.raises(InputError, match="no bin of redshift"):
        figures.binned_statistics({"mode": []}, "redshift")


def test_coverage_of_right_levels_is_the_diagonal(rng: np.random.Generator, spaced: Path) -> None:
    figure = figures.coverage_figure({"equal-tailed": (np.arange(1000) + 0.5) / 1000})
    x, y = figure.axes[0].lines[0].get_data()
    np.testing.assert_allclose(x, y, atol=0.002)
    assert png(figure, spaced).std() > 5
    with pytest.raises(InputError, match="no credibility levels"):
        figures.coverage_figure({})


@pytest.mark.parametrize("n", [1, 500])
def test_normalised_residuals_count_what_lies_beyond(n: int, rng: np.random.Generator, spaced: Path) -> None:
    figure = figures.normalised_residuals(np.r_[rng.standard_normal(n - 1), 99.0])
    assert png(figure, spaced).std() > 5
    assert f"beyond 5: {1 / n:.2%}" in texts(figure)


@pytest.mark.parametrize("n", [1, 300])
def test_the_redshift_distribution_has_the_mean_of_the_densities(n: int, rng: np.random.Generator, spaced: Path) -> None:
    z_true, z_phot = redshifts(n, rng)
    grid = np.linspace(0, 4, 401)
    density = np.exp(-0.5 * ((grid - 1.5) / 0.1) ** 2)
    figure = figures.redshift_distribution(z_true, z_phot, grid, density)
    assert png(figure, spaced).std() > 5
    assert "of p(z) 1.5000" in texts(figure)
    with pytest.raises(InputError, match="expected objects"):
        figures.redshift_distribution([], [], grid, density)


def test_recovery_tells_the_number_of_outliers(spaced: Path) -> None:
    recovery = Recovery(share(3, 10, "outliers"), (0.0, 0.1, 0.5), (share(1, 7, "outliers"), None))
    figure = figures.recovery_figure(recovery)
    assert png(figure, spaced).std() > 5
    assert "all 10 outliers: 0.30" in texts(figure)


@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", b"\x89PNG")])
def test_figures_are_written_as_their_name_ends(suffix: str, start: bytes, spaced: Path) -> None:
    figures.write_figure(figures.pit_figure([0.1, 0.5]), spaced / f"figure.{suffix}")
    assert (spaced / f"figure.{suffix}").read_bytes().startswith(start)


def test_variants_stand_below_each_other(spaced: Path) -> None:
    values = {"all bands": {"bias": (0.001, 0.0005), "nll": (-0.9, 0.01)}, "no u": {"bias": (-0.004, 0.0006)}}
    figure = figures.compared_values(values, {"bias": "the bias", "nll": "NLL"})
    assert png(figure, spaced).std() > 5
    assert {"all bands", "no u", "the bias", "NLL"} <= {artist.get_text() for artist in figure.findobj(Text)}
    first, second = figure.axes
    assert first.get_ylim() == (1.5, -0.5)
    assert (len(first.containers), len(second.containers)) == (2, 1)
    with pytest.raises(InputError, match="nothing to compare"):
        figures.compared_values({}, {"bias": "bias"})


@pytest.mark.parametrize("n", [0, 1, 400])
def test_features_in_a_plane(n: int, rng: np.random.Generator, spaced: Path) -> None:
    figure = figures.map_of_features(rng.normal(size=(n, 2)), rng.uniform(0, 2, n), rng.uniform(20, 25, n), "i")
    assert len(figure.axes) == 4
    assert png(figure, spaced).std() > 0
    with pytest.raises(InputError, match=r"expected \(N, 2\), and one for each"):
        figures.map_of_features(rng.normal(size=(n, 3)), np.ones(n), np.ones(n), "i")
