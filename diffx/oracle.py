"""Exact denoisers: data whose best possible network is known in closed form, so that a sampler can be judged against the truth.

Notation of the whole package: ``x = alpha * x0 + sigma * eps``. Every oracle can stand where a network stands, in each
prediction type, on VP (alpha^2 + sigma^2 = 1), VE (alpha = 1) and flow (alpha = 1 - sigma) levels alike.

Example:
    >>> data = Gaussian(torch.zeros(4, 8, 8), std=0.5)
    >>> out = data.predict(x, alpha, sigma, "v_prediction")     # what a perfectly trained network returns
    >>> end = data.flow(x, (alpha, sigma), (1.0, 0.0))          # where an infinitely fine sampler ends
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

Level = tuple[float, float]  # (alpha, sigma)
FLOW_RTOL, FLOW_ATOL = 1e-10, 1e-12  # of DOP853, where a flow has no closed form
LAST_ANGLE = 1e-6  # sigma / alpha below which point data are reached by one exact straight step


class Oracle(ABC):
    """A data distribution over tensors of one shape; samples carry a leading batch axis."""

    @abstractmethod
    def x0(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        """The posterior mean E[x0 | x], which is what training by squared error aims at.

        Args:
            x: (B, ...) noisy samples; computed in float64, returned in the dtype of ``x``.
            alpha, sigma: the noise level, a number or one per sample (B entries).
        """

    @abstractmethod
    def flow(self, x: Tensor, start: Level, end: Level) -> Tensor:
        """The point at level ``end`` of the probability flow through ``x`` (B, ...) at level ``start``, in the dtype of ``x``."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` clean samples, (n, ...) float64."""

    def predict(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, prediction_type: str) -> Tensor:
        """What a perfect network of this prediction type returns for ``x`` (B, ...), in the dtype of ``x``.

        epsilon: (x - alpha x0) / sigma; sample: x0; v_prediction: alpha eps - sigma x0; flow_prediction: eps - x0.

        Raises:
            ValueError: unknown prediction type.
        """
        wide = x.double()
        x0 = self.x0(wide, alpha, sigma)
        alpha, sigma = _level(alpha, wide), _level(sigma, wide)
        match prediction_type:
            case "sample":
                out = x0
            case "epsilon":
                out = (wide - alpha * x0) / sigma
            case "v_prediction":
                out = alpha * (wide - alpha * x0) / sigma - sigma * x0
            case "flow_prediction":
                out = (wide - alpha * x0) / sigma - x0
            case _:
                known = "epsilon, sample, v_prediction, flow_prediction"
                raise ValueError(f"prediction_type={prediction_type!r} is not one of {known}")
        return out.to(x.dtype)


@dataclass(frozen=True)
class Gaussian(Oracle):
    """Normal data, the one distribution whose flow is a formula.

    With ``d`` the coordinate of ``x - alpha mean`` along a principal axis of standard deviation ``std``:
    E[x0 | x] = mean + alpha std^2 / (alpha^2 std^2 + sigma^2) d, and the flow scales d by the ratio of
    sqrt(alpha^2 std^2 + sigma^2) at its two ends.
    """

    mean: Tensor  # (...) the shape of one sample
    std: Tensor | float = 1.0  # per coordinate, or per column of axes; broadcasts to (...)
    axes: Tensor | None = None  # (D, D) orthonormal columns, D = mean.numel(); None: the coordinates themselves

    @classmethod
    def from_covariance(cls, mean: Tensor, covariance: Tensor) -> "Gaussian":
        """Normal data with a full (D, D) covariance, D = mean.numel().

        Raises:
            ValueError: wrong shape, not symmetric, or a negative variance.
        """
        if covariance.shape != (mean.numel(), mean.numel()):
            raise ValueError(f"covariance has shape {tuple(covariance.shape)}; the mean has {mean.numel()} entries, and so must each side")
        if not torch.allclose(covariance, covariance.T):
            raise ValueError("covariance is not symmetric")
        variance, axes = torch.linalg.eigh(covariance.double())
        if variance.min() < -1e-12 * variance.max():
            raise ValueError(f"covariance has the negative eigenvalue {variance.min().item():.3g}")
        return cls(mean, variance.clamp(min=0).sqrt().reshape(mean.shape), axes)

    def x0(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        wide = x.double()
        alpha, sigma, std = _level(alpha, wide), _level(sigma, wide), self._std()
        spread = alpha**2 * std**2 + sigma**2
        return (self.mean + self._turn(wide - alpha * self.mean, alpha * std**2 / spread)).to(x.dtype)

    def flow(self, x: Tensor, start: Level, end: Level) -> Tensor:
        (a0, s0), (a1, s1) = start, end
        std = self._std()
        ratio = ((a1**2 * std**2 + s1**2) / (a0**2 * std**2 + s0**2)).sqrt()
        return (a1 * self.mean + self._turn(x.double() - a0 * self.mean, ratio)).to(x.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        z = torch.randn((n, *self.mean.shape), generator=generator, dtype=torch.float64) * self._std()
        return self.mean + (z if self.axes is None else (z.flatten(1) @ self.axes.double().T).reshape(z.shape))

    def _std(self) -> Tensor:
        return torch.as_tensor(self.std, dtype=torch.float64).expand(self.mean.shape)

    def _turn(self, d: Tensor, factor: Tensor) -> Tensor:
        """``d`` (B, ...) with its principal coordinates multiplied by ``factor``."""
        if self.axes is None:
            return factor * d
        axes = self.axes.double()
        coordinates = (d.flatten(1) @ axes).reshape(d.shape) * factor
        return (coordinates.flatten(1) @ axes.T).reshape(d.shape)


@dataclass(frozen=True)
class Mixture(Oracle):
    """A mixture of K Gaussians with independent coordinates; ``std=0`` makes it a finite data set.

    Component k contributes mean_k + alpha std_k^2 / (alpha^2 std_k^2 + sigma^2) (x - alpha mean_k), weighted by its
    responsibility, the softmax over k of log weight_k + log N(x; alpha mean_k, alpha^2 std_k^2 + sigma^2).
    """

    means: Tensor  # (K, ...)
    std: Tensor | float  # broadcasts to (K, ...)
    weights: Tensor | None = None  # (K,) positive, normalised here; None: equal

    def x0(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        wide = x.double()
        r, mean, d, spread, std = self._posterior(wide, _level(alpha, wide), _level(sigma, wide))
        alpha = _level(alpha, wide).reshape(-1, 1, 1)
        return (r * (mean + alpha * std**2 / spread * d)).sum(1).reshape(x.shape).to(x.dtype)

    def flow(self, x: Tensor, start: Level, end: Level) -> Tensor:
        """The point at level ``end`` of the flow through ``x``, integrated by DOP853 (relative tolerance 1e-10).

        With z = x / sqrt(alpha^2 + sigma^2) and phi = atan2(sigma, alpha) the flow is dz/dphi = v, regular at both ends
        (phi = pi/2 is pure noise). Point data end at phi = 1e-6 with one straight step, exact unless two points are closer than 1e-5.
        """
        (a0, s0), (a1, s1) = start, end
        phi0, phi1 = math.atan2(s0, a0), math.atan2(s1, a1)
        points = bool((self._std() == 0).any())
        stop = max(phi1, LAST_ANGLE) if points else phi1

        def velocity(phi: float, z: np.ndarray) -> np.ndarray:
            return self._velocity(torch.from_numpy(z).reshape(x.shape), phi).flatten().numpy()

        z = (x.double() / math.hypot(a0, s0)).flatten().numpy()
        solved = solve_ivp(velocity, (phi0, stop), z, method="DOP853", rtol=FLOW_RTOL, atol=FLOW_ATOL, t_eval=[stop])
        assert solved.success, solved.message
        z = torch.from_numpy(solved.y[:, -1]).reshape(x.shape)
        if stop != phi1:
            x0 = self.x0(z, math.cos(stop), math.sin(stop))
            z = math.cos(phi1) * x0 + math.sin(phi1) / math.sin(stop) * (z - math.cos(stop) * x0)
        return (math.hypot(a1, s1) * z).to(x.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        pick = torch.multinomial(self._log_weights().exp(), n, replacement=True, generator=generator)
        z = torch.randn((n, *self.means.shape[1:]), generator=generator, dtype=torch.float64)
        return self.means.double()[pick] + self._std()[pick] * z

    def _std(self) -> Tensor:
        return torch.as_tensor(self.std, dtype=torch.float64).expand(self.means.shape)

    def _log_weights(self) -> Tensor:
        weights = torch.ones(len(self.means)) if self.weights is None else self.weights
        return (weights.double() / weights.sum()).log()

    def _posterior(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Responsibilities (B, K, 1), then mean, x - alpha mean, its variance and std, each broadcasting to (B, K, D)."""
        mean, std = self.means.double().flatten(1), self._std().flatten(1)
        alpha, sigma = alpha.reshape(-1, 1, 1), sigma.reshape(-1, 1, 1)
        spread = alpha**2 * std**2 + sigma**2
        if not (spread > 0).all():
            raise ValueError("sigma=0 on a data set of points (std=0): the posterior is a jump there; ask for sigma > 0")
        d = x.flatten(1)[:, None] - alpha * mean
        log_density = -0.5 * (d**2 / spread + spread.log()).sum(2)
        return (self._log_weights() + log_density).softmax(1)[..., None], mean, d, spread, std

    def _velocity(self, z: Tensor, phi: float) -> Tensor:
        """v = alpha eps - sigma x0 at angle ``phi``, written without a division by sigma."""
        alpha, sigma = math.cos(phi), math.sin(phi)
        r, mean, d, spread, std = self._posterior(z, _level(alpha, z), _level(sigma, z))
        return (r * ((alpha * sigma * (1 - std**2)) / spread * d - sigma * mean)).sum(1).reshape(z.shape)


def finite_data(data: Tensor, weights: Tensor | None = None) -> Mixture:
    """The oracle of a data set (K, ...): x0 is the average of its points p, weighted by softmax(-|x - alpha p|^2 / (2 sigma^2))."""
    return Mixture(data, 0.0, weights)


def _level(value: float | Tensor, x: Tensor) -> Tensor:
    """``value`` in float64, one for the batch or one per sample, shaped to broadcast against ``x`` (B, ...)."""
    level = torch.as_tensor(value, dtype=torch.float64)
    if level.numel() not in (1, len(x)):
        raise ValueError(f"a noise level of shape {tuple(level.shape)} fits neither one number nor {len(x)} samples")
    return level.reshape(-1, *[1] * (x.ndim - 1))
