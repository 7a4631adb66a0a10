r"""Gaussian mixtures in redshift.

.. math:: p(z) = \sum_k w_k N(z | \mu_k, \sigma_k)

Glossary: N objects, K components, G grid points, Q quantile levels, P turning points. Weights are held as
unnormalised logits, widths as logarithms. Redshifts are positive: statistics (mode, mean, quantiles, peaks,
samples) come from the mixture cut at z = 0 and renormalised; they are computed in double precision on the CPU,
without gradients, in chunks of objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri_exp
from torch import Tensor
from torch.special import log_ndtr

Floats = NDArray[np.float64]

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
SQRT_2 = math.sqrt(2)

QUANTILES = {"z_lo95": 0.025, "z_lo68": 0.16, "z_median": 0.5, "z_hi68": 0.84, "z_hi95": 0.975}

# Where the slope of the density is looked at, in sigmas about each component. A shallow bump whose rise and fall both
# lie between two neighbouring points is overlooked; on random mixtures that changes a second peak in less than 1 % of them.
SLOPE_OFFSETS = (-5.0, -4.0, -3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0)
CHUNK_BYTES = 8e6  # of the largest temporary; several times faster than larger ones, which leave the cache
LEAST_RISK_STEP = 0.01  # in ln(1 + z), a fifteenth of the risk's usual width; the least risk is found between such points
ROOT_TOLERANCE = 1e-10
ROOT_ITERATIONS = 150


class Peaks(NamedTuple):
    """The two highest local maxima of each density, each field (N,); `second` is NaN and its weight 0 where there is one only."""

    mode: Tensor
    second: Tensor
    second_weight: Tensor


@dataclass(frozen=True)
class GaussianMixture:
    """N mixtures of K components: logits, means, log_sigmas, each (N, K).

    A component with logit -inf does not exist (an object that an ensemble member did not find).
    """

    logits: Tensor
    means: Tensor
    log_sigmas: Tensor

    def __len__(self) -> int:
        return len(self.logits)

    def __repr__(self) -> str:
        return f"<GaussianMixture of {len(self)} objects, {self.logits.shape[1]} components each>"

    @classmethod
    def from_arrays(cls, weights: object, means: object, sigmas: object) -> GaussianMixture:
        """Build from weights, means and sigmas (N, K), in double precision; means and sigmas of weight 0 may be anything."""
        w, m, s = (torch.as_tensor(a, dtype=torch.float64) for a in (weights, means, sigmas))
        exists = w > 0
        return cls(w.log(), torch.where(exists, m, 0.0), torch.where(exists, s, 1.0).log())

    @property
    def log_weights(self) -> Tensor:
        """(N, K) normalised; -inf throughout for an object without any component."""
        total = torch.logsumexp(self.logits, 1, keepdim=True)
        return self.logits - total.clamp_min(torch.finfo(total.dtype).min)

    @property
    def weights(self) -> Tensor:
        """(N, K), each row sums to 1."""
        return self.log_weights.exp()

    @property
    def sigmas(self) -> Tensor:
        """(N, K) standard deviations in redshift."""
        return self.log_sigmas.exp()

    def select(self, index: Tensor | slice) -> GaussianMixture:
        """The mixtures of the objects at ``index``."""
        return GaussianMixture(self.logits[index], self.means[index], self.log_sigmas[index])

    def double(self) -> GaussianMixture:
        """The same mixtures on the CPU in double precision, without gradients."""
        logits, means, log_sigmas = (t.detach().to("cpu", torch.float64) for t in (self.logits, self.means, self.log_sigmas))
        return GaussianMixture(logits, means, log_sigmas)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density at z: (N,) -> (N,), or on a shared grid (N, G) or (1, G) -> (N, G)."""
        grid = z.unsqueeze(-1)
        log_w, mean, log_sigma = (self._along(t, z) for t in (self.log_weights, self.means, self.log_sigmas))
        exponent = -0.5 * ((grid - mean) * torch.exp(-log_sigma)) ** 2
        return torch.logsumexp(log_w + exponent - log_sigma - LOG_SQRT_2PI, dim=-1)

    def cdf(self, z: Tensor) -> Tensor:
        """P(Z < z) on the whole line, of the shapes of `log_prob`."""
        w, mean, sigma = (self._along(t, z) for t in (self.weights, self.means, self.sigmas))
        return (w * 0.5 * torch.erfc((mean - z.unsqueeze(-1)) / (sigma * SQRT_2))).sum(-1)

    def log_survival(self, z: Tensor) -> Tensor:
        """Logarithm of P(Z > z) on the whole line, of the shapes of `log_prob`; finite far beyond the last component."""
        log_w, mean, sigma = (self._along(t, z) for t in (self.log_weights, self.means, self.sigmas))
        return torch.logsumexp(log_w + log_ndtr((mean - z.unsqueeze(-1)) / sigma), dim=-1)

    @property
    def mass_below_zero(self) -> Tensor:
        """(N,) probability at negative redshift before truncation."""
        return self.cdf(self._zero())

    def truncated_cdf(self, z: Tensor) -> Tensor:
        """CDF of the mixture cut at z = 0 and renormalised, 1 - S(z) / S(0); shapes of `log_prob`."""
        above_zero = self.log_survival(self._zero()).view((len(self),) + (1,) * (z.dim() - 1))
        return -torch.expm1((self.log_survival(z) - above_zero).clamp_max(0))

    def truncated_density(self, grid: Floats) -> Floats:
        """Density of the mixture cut at z = 0 and renormalised, on redshifts (G,) -> (N, G); 0 at negative redshift."""
        mixture, z = self.double(), torch.as_tensor(grid, dtype=torch.float64)[None]
        density = (mixture.log_prob(z) - mixture.log_survival(mixture._zero())[:, None]).exp()
        return np.asarray(torch.where(z < 0, 0.0, density).numpy())

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        r"""Mean and standard deviation (N,) of the truncated mixtures.

        A component cut at 0 has mean :math:`\sigma (\lambda - \alpha)` and second moment :math:`\sigma` (:math:`\sigma`
        - :math:`\alpha` mean), with :math:`\alpha = -\mu / \sigma` and :math:`\lambda` the hazard
        :math:`\phi(\alpha) / (1 - \Phi(\alpha))`.
        """
        mixture = self.double()
        alpha = -mixture.means / mixture.sigmas
        hazard = math.sqrt(2 / math.pi) / torch.special.erfcx(alpha / SQRT_2)
        means = (mixture.sigmas * (hazard - alpha)).clamp_min(0)
        second_moments = mixture.sigmas * (mixture.sigmas - alpha * means)
        weights = mixture._truncated_log_weights().exp()
        mean = (weights * means).sum(1)
        variance = (weights * (second_moments - means**2).clamp_min(0)).sum(1) + (weights * (means - mean[:, None]) ** 2).sum(1)
        return mean, variance.sqrt()

    def quantiles(self, levels: Sequence[float]) -> Tensor:
        """(N, Q) redshifts below which the truncated mixtures hold the shares ``levels``, each in (0, 1)."""
        if not all(0 < level < 1 for level in levels):
            raise ValueError(f"quantile levels {tuple(levels)} must lie strictly between 0 and 1")
        wanted = torch.tensor(levels, dtype=torch.float64)
        mixtures = self.double()._chunks(len(levels) * self.logits.shape[1])
        return torch.cat([mixture._quantiles(wanted) for mixture in mixtures])

    def mode(self) -> Tensor:
        """(N,) the redshift where the truncated mixture is densest."""
        return self.peaks().mode

    def peaks(self) -> Peaks:
        """The highest and the second highest local maximum at z >= 0; z = 0 is one if the density falls from there.

        The weight of the second is the probability between the minima of the density on either side of it (or z = 0,
        or infinity, where there is none), in the truncated mixture. Height alone ranks the peaks: a high
        and narrow second peak may weigh less than a broad third.
        """
        points = len(SLOPE_OFFSETS) * self.logits.shape[1] + 1
        parts = [mixture._peaks() for mixture in self.double()._chunks(points * self.logits.shape[1])]
        return Peaks(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def least_risk(self, width: float = 0.15) -> Tensor:
        r"""(N,) the redshift z where the expected loss of the truncated mixture is least.

        The loss of z where the truth is t is :math:`1 - 1 / (1 + ((z - t) / (width (1 + t)))^2)`: almost all that is farther
        off than ``width`` costs the same, so that the estimate stays with the heaviest peak and not with the highest (Tanaka et
        al. 2018, PASJ 70 S9, whose z_best it is).
        """
        if not len(self):
            return torch.zeros(0, dtype=torch.float64)
        mixture = self.double()
        farthest = float((mixture.means + 6 * mixture.sigmas)[mixture.weights > 0].max())
        count = max(2, math.ceil(math.log1p(max(farthest, 0.0)) / LEAST_RISK_STEP))
        edges = torch.expm1(torch.arange(count + 1, dtype=torch.float64) * LEAST_RISK_STEP)
        points = torch.expm1((torch.arange(count, dtype=torch.float64) + 0.5) * LEAST_RISK_STEP)
        gain = 1 / (1 + ((points[:, None] - points) / (width * (1 + points))) ** 2)
        parts = []
        for part in mixture._chunks(count * mixture.logits.shape[1]):
            expected = part.cdf(edges.expand(len(part), -1)).diff(dim=1) @ gain.T  # normalised or not, its maximum is there
            best = expected.argmax(1)
            inner = best.clamp(1, count - 2)[:, None] + torch.tensor([-1, 0, 1])
            low, middle, high = expected.gather(1, inner).T
            bend = (low - 2 * middle + high).clamp_max(-torch.finfo(torch.float64).tiny)
            offset = ((low - high) / (2 * bend)).clamp(-0.5, 0.5)
            at = torch.where(best == inner[:, 1], offset, 0.0) + best + 0.5
            # sums of products round by what else is in the chunk; no redshift is known that well
            parts.append(torch.expm1(at * LEAST_RISK_STEP).round(decimals=8))
        return torch.cat(parts)

    def sample(self, rng: np.random.Generator, size: int = 1) -> Floats:
        """(N, size) redshifts drawn from the truncated mixtures."""
        mixture = self.double()
        cumulative = mixture._truncated_log_weights().exp().cumsum(1).numpy()
        draw = rng.random((len(self), size)) * cumulative[:, -1:]
        component = (draw[:, :, None] >= cumulative[:, None, :-1]).sum(-1)
        mean, sigma = (np.take_along_axis(t.numpy(), component, 1) for t in (mixture.means, mixture.sigmas))
        log_above_zero = log_ndtr(torch.as_tensor(mean / sigma)).numpy()
        log_above_z = np.log1p(-rng.random((len(self), size))) + log_above_zero
        return np.asarray(np.maximum(mean - sigma * ndtri_exp(log_above_z), 0.0))

    def _along(self, parameters: Tensor, z: Tensor) -> Tensor:
        """(N, K) parameters shaped to broadcast against z.unsqueeze(-1)."""
        return parameters.view((len(self),) + (1,) * (z.dim() - 1) + parameters.shape[1:])

    def _zero(self) -> Tensor:
        return torch.zeros(len(self), dtype=self.means.dtype, device=self.means.device)

    def _truncated_log_weights(self) -> Tensor:
        above_zero: Tensor = self.log_weights + log_ndtr(self.means / self.sigmas)
        return above_zero - torch.logsumexp(above_zero, 1, keepdim=True)

    def _chunks(self, values_per_object: int) -> Iterator[GaussianMixture]:
        size = max(1, int(CHUNK_BYTES / 8 / max(values_per_object, 1)))
        for parts in zip(*(torch.split(t, size) for t in (self.logits, self.means, self.log_sigmas)), strict=True):
            yield GaussianMixture(*parts)

    def _quantiles(self, levels: Tensor) -> Tensor:
        """`quantiles` of one chunk: Newton's method on the CDF, bisection where that fails."""
        count = len(levels)
        rows = self.select(torch.arange(len(self)).repeat_interleave(count))
        level = levels.repeat(len(self))
        log_above_zero = rows.log_survival(rows._zero())
        log_w, inverse = rows.log_weights - log_above_zero[:, None], torch.exp(-rows.log_sigmas)

        def excess(index: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            pull = (rows.means[index] - z[:, None]) * inverse[index]
            above = torch.logsumexp(log_w[index] + log_ndtr(pull), 1)
            density = torch.exp(log_w[index] - 0.5 * pull**2 - LOG_SQRT_2PI) * inverse[index]
            return level[index] + torch.expm1(above), -density.sum(1)

        high = (rows.means.clamp_min(0) + 10 * rows.sigmas).amax(1)
        mean, std = self.mean_and_std()
        guess = mean[:, None] + std[:, None] * torch.special.ndtri(levels)
        return _falling_roots(excess, torch.zeros_like(high), high, guess.view(-1)).view(-1, count)

    def _score(self, z: Tensor) -> Tensor:
        """Slope of log p on a grid (N, G)."""
        log_w, mean, log_sigma = (self._along(t, z) for t in (self.log_weights, self.means, self.log_sigmas))
        pull = (mean - z.unsqueeze(-1)) * torch.exp(-log_sigma)
        share = torch.softmax(log_w - log_sigma - 0.5 * pull**2, dim=-1)
        return (share * pull * torch.exp(-log_sigma)).sum(-1)

    def _score_and_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivative of log p at z (N,)."""
        inverse = torch.exp(-self.log_sigmas)
        pull = (self.means - z[:, None]) * inverse
        share = torch.softmax(self.log_weights - self.log_sigmas - 0.5 * pull**2, dim=-1)
        score = (share * pull * inverse).sum(1)
        return score, (share * (pull**2 - 1) * inverse**2).sum(1) - score**2

    def _peaks(self) -> Peaks:
        """`peaks` of one chunk.

        The sign of the slope on a grid brackets every maximum and minimum, which alternate from a maximum to a
        maximum; each is then solved for.
        """
        offsets = torch.tensor(SLOPE_OFFSETS, dtype=torch.float64)
        grid = (self.means[:, :, None] + self.sigmas[:, :, None] * offsets).flatten(1).clamp_min(0)
        grid = torch.cat([torch.zeros(len(self), 1, dtype=torch.float64), grid], 1).sort(1).values
        rising = torch.cat([torch.ones(len(self), 1, dtype=torch.bool), self._score(grid) > 0], 1)
        left = torch.cat([grid[:, :1], grid[:, :-1]], 1)

        def turning_points(where: tuple[Tensor, ...], sign: float) -> Tensor:
            mixture = self.select(where[0])

            def slope(index: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
                score, curvature = mixture.select(index)._score_and_slope(z)
                return sign * score, sign * curvature

            low, high = left[where], grid[where]
            return _falling_roots(slope, low, high, (low + high) / 2)

        maxima = (rising[:, :-1] & ~rising[:, 1:]).nonzero(as_tuple=True)
        minima = (~rising[:, :-1] & rising[:, 1:]).nonzero(as_tuple=True)
        row, peak = maxima[0], turning_points(maxima, 1.0)
        count = torch.bincount(row, minlength=len(self))
        first = count.cumsum(0) - count
        height = self.select(row).log_prob(peak)
        by_height = torch.argsort(height, descending=True, stable=True)
        ranked = by_height[torch.argsort(row[by_height], stable=True)]

        twin = (count > 1).nonzero().squeeze(1)
        runner_up = ranked[first[twin] + 1]
        after = runner_up - twin  # index of the minimum after the peak: every row has one minimum less than maxima
        has_left, has_right = runner_up > first[twin], runner_up < first[twin] + count[twin] - 1
        mixture = self.select(twin)
        below, above = torch.zeros(len(twin), dtype=torch.float64), torch.ones(len(twin), dtype=torch.float64)
        for bound, exists, index in ((below, has_left, after - 1), (above, has_right, after)):
            valley = turning_points((minima[0][index[exists]], minima[1][index[exists]]), -1.0)
            bound[exists] = mixture.select(exists).truncated_cdf(valley)
        second, weight = torch.full((len(self),), math.nan, dtype=torch.float64), torch.zeros(len(self), dtype=torch.float64)
        second[twin], weight[twin] = peak[runner_up], above - below
        return Peaks(peak[ranked[first]], second, weight)


def concatenate(mixtures: Sequence[GaussianMixture], member_weights: Sequence[float]) -> GaussianMixture:
    """The weighted sum of M mixtures over the same N objects: (N, sum of K).

    p(z) = sum_m w_m p_m(z) (JADES paper, section 4.2); ``member_weights`` need not be normalised. A member that did not
    find an object has -inf for all its logits there and takes no part.
    """
    log_member = [math.log(weight) if weight > 0 else -math.inf for weight in member_weights]
    logits = [mixture.log_weights + log_weight for mixture, log_weight in zip(mixtures, log_member, strict=True)]
    return GaussianMixture(
        torch.cat(logits, 1), torch.cat([m.means for m in mixtures], 1), torch.cat([m.log_sigmas for m in mixtures], 1)
    )


def summarise(mixture: GaussianMixture) -> dict[str, Floats]:
    """The catalogue's redshift columns, each (N,) in double precision.

    z_mode, z_best (`GaussianMixture.least_risk`), z_mean, z_std, z_median, equal-tailed intervals z_lo68 .. z_hi68 and
    z_lo95 .. z_hi95, z_second_peak (NaN if there is none) and z_second_weight (0 then) as in `GaussianMixture.peaks`, all of the
    mixture cut at z = 0, and mass_below_zero, the probability that was cut off. A mixture all below zero gives finite redshifts at
    or near 0.
    """
    mixture = mixture.double()
    peaks = mixture.peaks()
    mean, std = mixture.mean_and_std()
    quantiles = mixture.quantiles(tuple(QUANTILES.values()))
    columns = {"z_mode": peaks.mode, "z_best": mixture.least_risk(), "z_mean": mean, "z_std": std}
    columns |= {name: quantiles[:, i] for i, name in enumerate(QUANTILES)}
    columns |= {"z_second_peak": peaks.second, "z_second_weight": peaks.second_weight, "mass_below_zero": mixture.mass_below_zero}
    return {name: np.ascontiguousarray(column.numpy()) for name, column in columns.items()}


def _falling_roots(function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], low: Tensor, high: Tensor, guess: Tensor) -> Tensor:
    """Roots (P,) of functions that fall through zero between low and high, to `ROOT_TOLERANCE`.

    ``function(index, z)`` gives value and slope of the functions at ``index``. Newton's step is taken where it stays
    within the bracket and is at most half of the step before; otherwise the bracket is halved, so that convergence is
    certain.
    """
    low, high, z = low.clone(), high.clone(), torch.minimum(torch.maximum(guess, low), high)
    last_step = high - low
    active = (high > low).nonzero().squeeze(1)
    for _ in range(ROOT_ITERATIONS):
        if not len(active):
            break
        here = z[active]
        value, slope = function(active, here)
        left, right = torch.where(value > 0, here, low[active]), torch.where(value > 0, high[active], here)
        newton = here - value / slope
        trusted = (newton >= left) & (newton <= right) & ((newton - here).abs() <= last_step[active] / 2)
        step_to = torch.where(trusted, newton, (left + right) / 2)
        step = torch.where(trusted, (step_to - here).abs(), (right - left) / 2)
        low[active], high[active], z[active], last_step[active] = left, right, step_to, step
        active = active[step > ROOT_TOLERANCE]
    return z
