r"""Mixtures recalibrated by magnitude, learned from objects of known redshift; what comes out is a mixture again.

Each component of an object of magnitude m becomes

.. math::
    w' \propto w^{1/T(m)} \qquad \mu' = \mu + b(m) (1 + \mu) \qquad \sigma' = s(m) \sigma

with a shift b, a width scale s and a temperature T that are linear between a few knots in magnitude and constant beyond them.
They are those of the least negative log likelihood on the calibration split, which neither trained the network nor chose it, held
back by two penalties: one on steps between neighbouring knots, so that the curves are smooth and near to constants unless the
objects say otherwise, and one on any change, so that few objects change little.
Bounds keep the order of redshifts (b > -1) and every width between a third and three times what it was.

Glossary: N objects, K components, M knots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize

from deepdisc_ops.errors import CatalogError, ConfigError
from deepdisc_ops.photoz.metrics.points import redshifts

Floats = NDArray[np.float64]
Part = Literal["shift", "width", "temperature"]
PARTS: tuple[Part, ...] = ("shift", "width", "temperature")

VERSION = 1
KNOTS = 5
LEAST_OBJECTS = 50
"""Objects a calibration needs, in all; knots are so far apart that as many lie about each."""
LIMITS: Mapping[Part, float] = {"shift": 0.1, "width": math.log(3), "temperature": math.log(3)}
"""Largest abs(b), abs(log s), abs(log T)."""
SCALES: Mapping[Part, float] = {"shift": 0.01, "width": 0.2, "temperature": 0.2}
"""Changes that cost the same."""
STEPS, CHANGES = 20.0, 0.3
"""What a step between knots and a change of one scale cost, in nats of the whole sample."""


@dataclass(frozen=True)
class Calibration:
    """Shift b, logarithm of the width scale s and of the temperature T at ascending knots in magnitude, each (M,) as a tuple.

    ``band`` names the magnitude, ``objects`` how many it was learned from; ``nll_before`` and ``nll_after`` are their mean
    negative log likelihoods. Survives `as_dict` and `from_dict`, which hold nothing but numbers and text.
    """

    band: str
    knots: tuple[float, ...]
    shift: tuple[float, ...]
    log_width: tuple[float, ...]
    log_temperature: tuple[float, ...]
    objects: int
    nll_before: float
    nll_after: float

    def __post_init__(self) -> None:
        columns = {"shift": self.shift, "width": self.log_width, "temperature": self.log_temperature}
        lengths = {name: len(values) for name, values in columns.items()}
        knots = np.asarray(self.knots, np.float64)
        if not knots.size or set(lengths.values()) != {knots.size} or not np.isfinite(knots).all() or (np.diff(knots) <= 0).any():
            raise ConfigError(
                f"a calibration has the knots {self.knots} and {lengths} values; expected ascending knots, a value each"
            )
        for name in PARTS:
            values = np.asarray(columns[name], np.float64)
            if not (np.abs(values) <= LIMITS[name] * (1 + 1e-9)).all():
                raise ConfigError(f"the calibration's {name} is {columns[name]}; expected numbers within ±{LIMITS[name]:.3g}")

    def apply(self, weights: ArrayLike, means: ArrayLike, sigmas: ArrayLike, magnitude: ArrayLike) -> tuple[Floats, Floats, Floats]:
        """Weights, means and sigmas (N, K) recalibrated by the magnitude (N,).

        Objects without a magnitude (NaN, or infinite as of a flux below zero) count as the faintest knot.
        """
        w, m, s = (np.asarray(part, np.float64) for part in (weights, means, sigmas))
        at = np.asarray(magnitude, np.float64)
        if w.ndim != 2 or not w.shape == m.shape == s.shape or at.shape != w.shape[:1]:
            raise CatalogError(
                f"mixtures have the shapes {w.shape}, {m.shape}, {s.shape} for magnitudes of {at.shape}; expected (N, K), (N,)"
            )
        hats = _hats(np.asarray(self.knots), at)
        shift, log_width, log_temperature = (
            (hats @ np.asarray(values))[:, None] for values in (self.shift, self.log_width, self.log_temperature)
        )
        with np.errstate(divide="ignore"):
            tempered = np.log(w) * np.exp(-log_temperature)
        top = tempered.max(1, keepdims=True, initial=-np.inf)
        powers = np.exp(tempered - np.where(np.isfinite(top), top, 0))
        total = powers.sum(1, keepdims=True)
        return powers / np.where(total > 0, total, 1), m + shift * (1 + m), s * np.exp(log_width)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and text, for YAML and JSON."""
        return {
            "version": VERSION,
            "band": self.band,
            "knots": list(self.knots),
            "shift": list(self.shift),
            "log_width": list(self.log_width),
            "log_temperature": list(self.log_temperature),
            "objects": self.objects,
            "nll_before": self.nll_before,
            "nll_after": self.nll_after,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """What `as_dict` gave; raises ConfigError."""
        given = dict(values)
        if given.pop("version", None) != VERSION:
            raise ConfigError(
                f"the calibration is of version {values.get('version')}; this package reads {VERSION}: calibrate anew"
            )
        names = ("band", "knots", "shift", "log_width", "log_temperature", "objects", "nll_before", "nll_after")
        if set(given) != set(names):
            raise ConfigError(f"a calibration has the entries {sorted(given)}; expected {sorted(names)}")
        try:
            knots, shift, width, temperature = (tuple(float(value) for value in given[name]) for name in names[1:5])
            before, after = float(given["nll_before"]), float(given["nll_after"])
            return cls(str(given["band"]), knots, shift, width, temperature, int(given["objects"]), before, after)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"a calibration cannot be read ({error}); calibrate anew") from None


def calibrate(
    weights: ArrayLike,
    means: ArrayLike,
    sigmas: ArrayLike,
    magnitude: ArrayLike,
    z_true: ArrayLike,
    *,
    band: str,
    parts: tuple[Part, ...] = PARTS,
    knots: int = KNOTS,
) -> Calibration:
    """Learn the ``parts`` of a calibration from mixtures (N, K) of objects of known magnitude and redshift (N,)."""
    z = redshifts(z_true, "true")
    w, m, s = (np.asarray(part, np.float64) for part in (weights, means, sigmas))
    at = np.asarray(magnitude, np.float64)
    if z.size < LEAST_OBJECTS:
        raise CatalogError(f"{z.size} objects to calibrate on; expected {LEAST_OBJECTS} at least")
    if w.ndim != 2 or not w.shape == m.shape == s.shape or at.shape != z.shape or len(w) != z.size:
        raise CatalogError(
            f"mixtures have the shapes {w.shape}, {m.shape}, {s.shape}, {at.size} magnitudes, {z.size} redshifts; expected as many"
        )
    if not np.isfinite(at).all():
        raise CatalogError(f"{int((~np.isfinite(at)).sum())} of {at.size} magnitudes are not finite; leave those objects out")
    places = _knots(at, knots)
    fit = _Fit(w, m, s, z, _hats(places, at), parts)
    start = np.zeros(len(parts) * len(places))
    bounds = [(-LIMITS[part] / SCALES[part], LIMITS[part] / SCALES[part]) for part in parts for _ in places]
    found = minimize(fit, start, jac=True, method="L-BFGS-B", bounds=bounds)
    curves = fit.curves(found.x)
    shift, width, temperature = (tuple(float(value) for value in curves[part]) for part in PARTS)
    before, after = (fit.nll({part: curve * share for part, curve in curves.items()}) for share in (0.0, 1.0))
    return Calibration(band, tuple(places.tolist()), shift, width, temperature, z.size, before, after)


class _Fit:
    """Penalised negative log likelihood of mixtures, and its gradient, as a function of the scaled values at the knots."""

    def __init__(self, w: Floats, m: Floats, s: Floats, z: Floats, hats: Floats, parts: tuple[Part, ...]) -> None:
        exists = w > 0
        self.log_w = np.log(np.where(exists, w, 1e-300))
        self.m, self.log_s = np.where(exists, m, 0.0), np.log(np.where(exists, s, 1.0))
        self.z, self.hats, self.parts = z[:, None], hats, parts

    def curves(self, x: Floats) -> dict[Part, Floats]:
        """Values at the knots of each part, 0 of those that are not learned."""
        curves = {part: np.zeros(self.hats.shape[1]) for part in PARTS}
        for part, values in zip(self.parts, x.reshape(len(self.parts), -1), strict=True):
            curves[part] = values * SCALES[part]
        return curves

    def nll(self, curves: Mapping[Part, Floats]) -> float:
        return -float(self._log_density(curves)[0].mean())

    def __call__(self, x: Floats) -> tuple[float, Floats]:
        log_density, slopes = self._log_density(self.curves(x))
        table = x.reshape(len(self.parts), -1)
        steps = np.diff(table, axis=1)
        cost = -log_density.sum() + STEPS * (steps**2).sum() + CHANGES * (table**2).sum()
        gradient = np.stack([-SCALES[part] * (slopes[part] @ self.hats) for part in self.parts]) + 2 * CHANGES * table
        gradient[:, 1:] += 2 * STEPS * steps
        gradient[:, :-1] -= 2 * STEPS * steps
        return float(cost), gradient.ravel()

    def _log_density(self, curves: Mapping[Part, Floats]) -> tuple[Floats, dict[Part, Floats]]:
        """Log density (N,) at the true redshifts, and its slope in shift, log width and log temperature of each object."""
        shift, log_width, log_temperature = ((self.hats @ curves[part])[:, None] for part in PARTS)
        tempered = self.log_w * np.exp(-log_temperature)
        log_w = tempered - _logsumexp(tempered)
        log_s = self.log_s + log_width
        pull = (self.z - self.m - shift * (1 + self.m)) * np.exp(-log_s)
        parts = log_w - log_s - 0.5 * pull**2 - 0.5 * math.log(2 * math.pi)
        total = _logsumexp(parts)
        share = np.exp(parts - total)
        spread = share - np.exp(log_w)
        return total[:, 0], {
            "shift": (share * pull * np.exp(-log_s) * (1 + self.m)).sum(1),
            "width": (share * (pull**2 - 1)).sum(1),
            "temperature": -(spread * tempered).sum(1),
        }


def _knots(magnitude: Floats, count: int) -> Floats:
    """Ascending knots at equal numbers of objects, so few that each has enough of them; one knot is a constant."""
    if count < 1:
        raise ConfigError(f"{count} knots; expected 1 at least")
    count = min(count, max(1, magnitude.size // LEAST_OBJECTS))
    places = np.unique(np.quantile(magnitude, np.linspace(0.02, 0.98, count) if count > 1 else [0.5]))
    apart = np.r_[True, np.diff(places) > 1e-6]
    return np.asarray(places[apart])


def _hats(knots: Floats, magnitude: Floats) -> Floats:
    """(N, M) weights that take values at knots to magnitudes, linearly, constant beyond; no magnitude counts as the faintest."""
    at = np.where(np.isfinite(magnitude), magnitude, knots[-1]).clip(knots[0], knots[-1])
    hats = np.zeros((at.size, knots.size))
    row = np.arange(at.size)
    if knots.size == 1:
        hats[:, 0] = 1
        return hats
    left = np.searchsorted(knots, at, side="right").clip(1, knots.size - 1) - 1
    step = (at - knots[left]) / (knots[left + 1] - knots[left])
    hats[row, left], hats[row, left + 1] = 1 - step, step
    return hats


def _logsumexp(values: Floats) -> Floats:
    top = values.max(1, keepdims=True)
    return np.asarray(top + np.log(np.exp(values - top).sum(1, keepdims=True)))
