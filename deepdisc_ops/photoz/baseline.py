"""The catalogue's own redshifts: gradient boosting on magnitudes or on fluxes through apertures, what a network has to beat.

A point estimate is the mean over seeds of the median of ln(1 + z) that boosted trees give; its density is that of the errors
made on objects kept apart, those with the most similar estimate and expected error. Nothing is kept on disk: fitting takes
less than reading a model safely would, and predictions are tables.

Glossary: N objects, C bands, A apertures, F features, G grid points, K neighbours.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepdisc_ops.errors import CatalogError, SetupError

Floats = NDArray[np.float64]

LEAST_ERROR = 1e-3
"""Added to errors in ln(1 + z) before their logarithm is learned."""


@dataclass(frozen=True)
class Densities:
    """Redshift densities values (N, G) on a regular grid of redshifts (G,), linear in between and 0 beyond."""

    grid: Floats
    values: Floats

    def log_density(self, redshift: ArrayLike) -> Floats:
        """Log density (N,) at one redshift each; minus infinity where there is none."""
        z = np.asarray(redshift, np.float64)
        position = (z - self.grid[0]) / (self.grid[1] - self.grid[0])
        left = np.clip(position.astype(np.int64), 0, len(self.grid) - 2)
        share, row = position - left, np.arange(len(z))
        density = (1 - share) * self.values[row, left] + share * self.values[row, left + 1]
        with np.errstate(divide="ignore"):
            return np.log(np.where((share < 0) | (share > 1), 0.0, density.clip(min=0)))

    def cde_loss(self, redshift: ArrayLike) -> float:
        """E[int f^2 dz] - 2 E[f(z_true)] (Izbicki & Lee 2017), up to the constant that depends on the truth alone."""
        return float(np.mean(self.cde_losses(redshift)))

    def cde_losses(self, redshift: ArrayLike) -> Floats:
        """The CDE loss of each object (N,), whose mean is `cde_loss`."""
        squared = np.trapezoid(self.values**2, self.grid, axis=1)
        return np.asarray(squared - 2 * np.exp(self.log_density(redshift)))

    def cdf(self) -> Floats:
        """(N, G) probability below each grid point."""
        steps = 0.5 * (self.values[:, 1:] + self.values[:, :-1]) * np.diff(self.grid)
        return np.concatenate([np.zeros((len(steps), 1)), np.cumsum(steps, axis=1)], axis=1)

    def mode(self) -> Floats:
        """(N,) the grid point where each density is highest."""
        return np.asarray(self.grid[self.values.argmax(axis=1)])

    def median(self) -> Floats:
        """(N,) the redshift below which half of each density lies; its CDF is taken as linear between grid points."""
        cdf = self.cdf()
        half = 0.5 * cdf[:, -1:]
        left = (cdf[:, 1:-1] <= half).sum(axis=1)
        low, high = (np.take_along_axis(cdf, (left + side)[:, None], 1) for side in (0, 1))
        share = ((half - low) / np.where(high > low, high - low, 1)).clip(0, 1)[:, 0]
        return np.asarray(self.grid[left] + share * (self.grid[left + 1] - self.grid[left]))

    @classmethod
    def normalised(cls, grid: ArrayLike, values: ArrayLike) -> Densities:
        """Densities proportional to ``values`` (N, G), flat where these are nowhere above zero."""
        nodes, table = np.asarray(grid, np.float64), np.asarray(values, np.float64).clip(min=0)
        total = np.trapezoid(table, nodes, axis=1)[:, None]
        flat = 1 / (nodes[-1] - nodes[0])
        return cls(nodes, np.where(total > 0, table / np.where(total > 0, total, 1), flat))


def magnitude_features(magnitude: ArrayLike) -> Floats:
    """(N, 2 C - 1) magnitudes and colours of neighbouring bands, from dereddened magnitudes (N, C); NaN stays NaN."""
    m = np.asarray(magnitude, np.float64)
    return np.concatenate([m, m[:, :-1] - m[:, 1:]], axis=1)


def aperture_features(flux: ArrayLike, error: ArrayLike) -> Floats:
    """(N, F) what fluxes and errors (N, C, A), dereddened, tell: brightness, colours and sizes.

    Brightness is asinh magnitudes (Lupton, Gunn & Szalay 1999) softened by the flux's own error, defined
    for fluxes below zero too; colours are theirs of neighbouring bands in each aperture; sizes are the
    ratios of neighbouring apertures in each band. F = C A + (C - 1) A + C (A - 1).
    """
    f, sigma = np.asarray(flux, np.float64), np.asarray(error, np.float64)
    if f.ndim != 3 or f.shape != sigma.shape:
        raise CatalogError(f"fluxes have the shape {f.shape}, errors {sigma.shape}; expected (objects, bands, apertures) for both")
    brightness = -2.5 / math.log(10) * (np.arcsinh(f / (2 * sigma)) + np.log(sigma))
    colours = brightness[:, :-1] - brightness[:, 1:]
    sizes = brightness[:, :, :-1] - brightness[:, :, 1:]
    return np.concatenate([part.reshape(len(f), math.prod(part.shape[1:])) for part in (brightness, colours, sizes)], axis=1)


class Baseline:
    """Gradient boosting (scikit-learn's, on histograms) of ln(1 + z); features may be NaN, the same seed gives the same trees.

    It takes one thread: scikit-learn's wait for each other, many times the work, when anything else runs on the machine.
    """

    def __init__(self, *, members: int = 2, iterations: int = 600, learning_rate: float = 0.05, leaves: int = 31, seed: int = 0):
        self.members, self.iterations, self.learning_rate, self.leaves, self.seed = members, iterations, learning_rate, leaves, seed
        self._trees: list[Any] = []
        self._spread: Any = None
        self._kept: tuple[Floats, Floats] | None = None

    def fit(self, features: ArrayLike, redshift: ArrayLike) -> Baseline:
        """Learn from features (N, F) and redshifts (N,)."""
        table, target = _pair(features, redshift)
        self._trees = [
            _fitted(
                table,
                np.log1p(target),
                max_iter=self.iterations,
                learning_rate=self.learning_rate,
                max_leaf_nodes=self.leaves,
                max_features=0.5,
                random_state=self.seed + member,
            )
            for member in range(self.members)
        ]
        self._spread = self._kept = None
        return self

    def predict(self, features: ArrayLike) -> Floats:
        """Redshifts (N,), 0 or more, of features (N, F)."""
        return np.expm1(self._log_redshift(np.asarray(features, np.float64))).clip(min=0)

    def calibrate(self, features: ArrayLike, redshift: ArrayLike) -> Baseline:
        """Learn how large the errors are, from objects that `fit` has not seen; `densities` needs it."""
        table, target = _pair(features, redshift)
        estimate = self._log_redshift(table)
        error = np.log1p(target) - estimate
        size = np.log(np.abs(error) + LEAST_ERROR)
        self._spread = _fitted(
            table, size, max_iter=100, learning_rate=0.05, max_leaf_nodes=15, min_samples_leaf=50, random_state=self.seed
        )
        self._kept = self._similarity(table, estimate), error
        return self

    def densities(self, features: ArrayLike, grid: ArrayLike, neighbours: int = 150) -> Densities:
        """Densities (N, G) on a regular grid of redshifts: errors of the ``neighbours`` most similar calibration objects."""
        from scipy.spatial import cKDTree

        if self._kept is None:
            raise CatalogError("densities need the errors of objects kept apart; call calibrate first")
        table, nodes = np.asarray(features, np.float64), np.asarray(grid, np.float64)
        estimate = self._log_redshift(table)
        places, errors = self._kept
        count = min(neighbours, len(places))
        _, nearest = cKDTree(places).query(self._similarity(table, estimate), k=[*range(1, count + 1)])
        values = np.empty((len(table), len(nodes)))
        for row, chosen in enumerate(nearest):
            values[row] = _kernel_density(np.expm1(estimate[row] + errors[chosen]), nodes)
        return Densities(nodes, values)

    def _log_redshift(self, table: Floats) -> Floats:
        if not self._trees:
            raise CatalogError("the baseline has learned nothing yet; call fit first")
        if not len(table):
            return np.zeros(0)
        return np.asarray(np.mean([_predicted(trees, table) for trees in self._trees], axis=0))

    def _similarity(self, table: Floats, estimate: Floats) -> Floats:
        """(N, 2) estimate and log of the expected error, scaled so that a difference of 1 is large in both."""
        spread = _predicted(self._spread, table) if len(table) else np.zeros(0)
        return np.stack([estimate / 0.1, spread / 0.5], axis=1)


def _kernel_density(redshifts: Floats, grid: Floats) -> Floats:
    """Gaussian kernel density of redshifts (K,) on a regular grid (G,), cut at the grid's ends and normalised.

    The width is Silverman's with the quartiles' scale (Silverman 1986, equation 3.31), at least one step of the grid.
    """
    low, high = np.quantile(redshifts, (0.25, 0.75))
    width = max(0.9 * min(redshifts.std(), (high - low) / 1.349) * len(redshifts) ** -0.2, grid[1] - grid[0])
    density = np.exp(-0.5 * ((grid[:, None] - redshifts) / width) ** 2).sum(axis=1) + 1e-12
    return np.asarray(density / np.trapezoid(density, grid))


def _fitted(table: Floats, target: Floats, **settings: Any) -> Any:
    try:
        from sklearn.ensemble import HistGradientBoostingRegressor
    except ModuleNotFoundError:
        raise SetupError("the catalogue baseline needs scikit-learn: pip install scikit-learn") from None
    with _one_thread():
        return HistGradientBoostingRegressor(loss="absolute_error", early_stopping=False, **settings).fit(table, target)


def _predicted(trees: Any, table: Floats) -> Floats:
    with _one_thread():
        return np.asarray(trees.predict(table), np.float64)


def _one_thread() -> AbstractContextManager[Any]:
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[Any] = threadpool_limits(1, user_api="openmp")
    return limits


def _pair(features: ArrayLike, redshift: ArrayLike) -> tuple[Floats, Floats]:
    table, z = np.asarray(features, np.float64), np.asarray(redshift, np.float64)
    if table.ndim != 2 or z.shape != (len(table),) or not len(z):
        raise CatalogError(f"features have the shape {table.shape} and redshifts {z.shape}; expected (N, F) and (N,), N above 0")
    if not np.isfinite(z).all() or z.min() <= -1:
        raise CatalogError("a redshift is not finite or not above -1; leave objects without redshift out")
    return table, z
