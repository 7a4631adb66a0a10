"""How much a network's features tell of redshift: their map by UMAP, and a lower bound of their mutual information with it.

The bound is that of the JADES paper: m = E[log q(z | features)] + H(z), with the density q of normalising flows, of
features brought to a few dimensions by UMAP. Glossary: N galaxies, D features, d dimensions of an embedding.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import differential_entropy

from deepdisc_ops.errors import CatalogError, ConfigError, SetupError

Floats = NDArray[np.float64]
Progress = Callable[[int, int], None]

DIMENSIONS = 11
"""Of the embedding that the flows see (JADES paper)."""
FLOWS, EPOCHS = 30, 200
RATE, RATE_FALLS = 1e-3, (50, 100, 150)
"""The rate falls to a tenth at each (JADES paper, from 1e-4; ours from ten times as much, since our samples are smaller)."""
BATCH = 512
HELD_OUT = 0.2
"""Share of the galaxies that a flow does not learn from and is judged on."""
WATCHED = 0.1
"""Share of the others that tells which epoch's flow is kept; wide features are learned by heart soon."""
LEAST_OBJECTS = 100
LAYERS = (64, 64)
REACH = 5.0
"""Beyond so many standard deviations the splines are the identity."""


@dataclass(frozen=True)
class Information:
    """A lower bound of the mutual information, nats: mean over flows and their scatter; ``flows`` holds that of each.

    entropy: H(z), nats; objects: N.
    """

    bound: float
    scatter: float
    entropy: float
    flows: tuple[float, ...]
    objects: int


def embed(features: ArrayLike, dimensions: int = DIMENSIONS, *, seed: int = 0) -> NDArray[np.float32]:
    """UMAP of features (N, D), each scaled to unit variance, in (N, d); redshifts are not looked at.

    Raises `SetupError` without umap-learn, `CatalogError` for too few galaxies or values that are no numbers.
    """
    table = np.asarray(features, np.float32)
    if table.ndim != 2 or len(table) < LEAST_OBJECTS:
        raise CatalogError(f"features have the shape {table.shape}; expected (N, D) of {LEAST_OBJECTS} galaxies at least")
    if not np.isfinite(table).all():
        bad = int((~np.isfinite(table).all(axis=1)).sum())
        raise CatalogError(f"the features of {bad} of {len(table)} galaxies are not finite; leave these out")
    if not 1 <= dimensions < len(table) - 1:
        raise ConfigError(f"{dimensions} dimensions were asked for; expected 1 to {len(table) - 2}")
    width = table.std(axis=0)
    scaled = (table - table.mean(axis=0)) / np.where(width > 0, width, 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="n_jobs value 1 overridden")  # a seed needs one thread, as we know
        return np.asarray(_umap()(n_components=dimensions, random_state=seed, n_jobs=1).fit_transform(scaled), np.float32)


def mutual_information(
    embedding: ArrayLike,
    redshift: ArrayLike,
    *,
    flows: int = FLOWS,
    epochs: int = EPOCHS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Information:
    """Lower bound of the information of an embedding (N, d) on redshift (N,), in nats.

    Every flow, a neural spline flow of z given the embedding, is another seed and another division of the galaxies into those it
    learns from and those it is judged on. Raises `SetupError` without zuko.
    """
    x, z = np.asarray(embedding, np.float32), np.asarray(redshift, np.float64)
    if x.ndim != 2 or z.shape != (len(x),) or len(z) < LEAST_OBJECTS:
        raise CatalogError(
            f"{x.shape} features and {z.shape} redshifts; expected (N, d) and (N,) of {LEAST_OBJECTS} galaxies at least"
        )
    if not (np.isfinite(x).all() and np.isfinite(z).all()):
        raise CatalogError("features or redshifts are not finite; leave these galaxies out")
    if flows < 1 or epochs < 1:
        raise ConfigError(f"{flows} flows of {epochs} epochs were asked for; expected one at least of each")
    with np.errstate(divide="ignore"):
        entropy = float(differential_entropy(z))
    if not np.isfinite(entropy):
        value, count = np.unique(z, return_counts=True)
        raise CatalogError(f"{count.max()} of the {len(z)} redshifts are {value[count.argmax()]:g}; expected a continuous quantity")
    bounds = []
    for number in range(flows):
        bounds.append(_log_likelihood(x, z, epochs, seed + number) + entropy)
        if progress:
            progress(number + 1, flows)
    scatter = float(np.std(bounds, ddof=1)) if flows > 1 else float("nan")
    return Information(float(np.mean(bounds)), scatter, entropy, tuple(bounds), len(z))


def _log_likelihood(x: NDArray[np.float32], z: Floats, epochs: int, seed: int) -> float:
    """Mean log density, of galaxies that one flow has not seen, at their redshifts, nats; of x (N, d) and z (N,)."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(z))
    held, kept = np.split(order, [max(1, int(HELD_OUT * len(z)))])
    watched, learned = np.split(kept, [max(1, int(WATCHED * len(kept)))])
    centre, width = float(z[kept].mean()), float(z[kept].std())
    features, target = _scaled(x, kept), torch.from_numpy((z - centre) / width).float()[:, None]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = _spline_flow()(1, x.shape[1], hidden_features=LAYERS)
    optimiser = torch.optim.Adam(flow.parameters(), RATE)
    falls = [max(1, round(fall * epochs / EPOCHS)) for fall in RATE_FALLS]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, falls, 0.1)

    def log_density(rows: NDArray[np.int64]) -> float:
        with torch.no_grad():
            index = torch.from_numpy(rows)
            return float(flow(features[index]).log_prob(target[index]).mean())

    best, state = log_density(watched), copy.deepcopy(flow.state_dict())
    for _ in range(epochs):
        for batch in np.array_split(rng.permutation(learned), -(-len(learned) // BATCH)):
            index = torch.from_numpy(batch)
            optimiser.zero_grad()
            (-flow(features[index]).log_prob(target[index]).mean()).backward()
            optimiser.step()
        schedule.step()
        if (reached := log_density(watched)) > best:
            best, state = reached, copy.deepcopy(flow.state_dict())
    flow.load_state_dict(state)
    return log_density(held) - float(np.log(width))


def _scaled(x: NDArray[np.float32], kept: NDArray[np.int64]) -> torch.Tensor:
    """Features x (N, d) centred and of unit variance, both of the rows ``kept``, within the reach of splines."""
    width = x[kept].std(axis=0)
    return torch.from_numpy((x - x[kept].mean(axis=0)) / np.where(width > 0, width, 1)).clamp(-REACH, REACH)


def require_packages() -> None:
    """Raises `SetupError` where umap-learn or zuko is missing: before the work that would be lost without them."""
    _umap()
    _spline_flow()


def _umap() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Tensorflow not installed")
            from umap import UMAP
    except ImportError:
        raise SetupError(
            "the package umap-learn, which maps features, is missing; run: pip install 'deepdisc-ops[features]'"
        ) from None
    return UMAP


def _spline_flow() -> Any:
    try:
        from zuko.flows import NSF
    except ImportError:
        raise SetupError("the package zuko, normalising flows, is missing; run: pip install 'deepdisc-ops[features]'") from None
    return NSF
