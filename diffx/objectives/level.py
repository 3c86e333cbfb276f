"""Noise levels of a batch and what a network says there: the (alpha, sigma, x0, eps) in which every objective is written.

Coefficients are float64 on the host and become one float32 column per batch; x = alpha x0 + sigma eps throughout.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..schedulers.process import PredictionType, Process, x0_weights


@dataclass(frozen=True)
class Level:
    """Where the samples of a batch are, and the time that the network is told.

    ``t``, ``alpha``, ``sigma``: (B,) float64. Clean data is alpha = 1, sigma = 0, where no network is called.
    """

    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray

    def columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), each (B, 1, ...), that multiply ``like`` (B, ...)."""
        return column(self.alpha, like), column(self.sigma, like)

    def __len__(self) -> int:
        return len(self.t)

    @property
    def snr(self) -> np.ndarray:
        """(B,) alpha^2 / sigma^2; infinite for clean data."""
        with np.errstate(divide="ignore"):
            return (self.alpha / self.sigma) ** 2


@dataclass(frozen=True)
class Prediction:
    """What a network's output says: clean samples and the noise on them, both (B, ...), with x = alpha x0 + sigma eps."""

    x0: Tensor
    eps: Tensor


def column(values: np.ndarray, like: Tensor) -> Tensor:
    """``values`` (B,) as (B, 1, ...) float32 on the device of ``like``."""
    return torch.as_tensor(values, dtype=torch.float32).to(like.device).view(-1, *[1] * (like.ndim - 1))


def noised(x0: Tensor, eps: Tensor, level: Level) -> Tensor:
    """x = alpha x0 + sigma eps."""
    alpha, sigma = level.columns(x0)
    return alpha * x0 + sigma * eps


def jump(found: Prediction, level: Level) -> Tensor:
    """The sample at ``level`` on the straight line that a prediction draws: one DDIM step on VP levels, one Euler step on flow.

    Source: Song et al. 2021 (arXiv:2010.02502) eq. 12 with eta = 0.
    """
    return noised(found.x0, found.eps, level)


def guided(condition: Prediction, uncond: Prediction, scale: np.ndarray) -> Prediction:
    """Classifier-free guidance of x0 and eps; ``scale`` (B,): 1 is the conditional prediction, 0 the unconditional one.

    Source: Ho and Salimans 2022 (arXiv:2207.12598) eq. 6, whose w is scale - 1.
    """
    by = column(scale, condition.x0)
    return Prediction(torch.lerp(uncond.x0, condition.x0, by), torch.lerp(uncond.eps, condition.eps, by))


def from_output(out: Tensor, x: Tensor, level: Level, prediction_type: PredictionType) -> Prediction:
    """A network's output on ``x`` at ``level`` as x0 and noise.

    Raises:
        ValueError: "epsilon" at alpha = 0, where the noise says nothing about the data.
    """
    weights = np.array([_weights(prediction_type, a, s) for a, s in zip(level.alpha, level.sigma)])
    x0_x, x0_out, eps_x, eps_out = (column(w, x) for w in weights.T)
    return Prediction(x0_x * x + x0_out * out, eps_x * x + eps_out * out)


def to_output(x0: Tensor, eps: Tensor, level: Level, prediction_type: PredictionType) -> Tensor:
    """What the network should put out where clean samples and noise are known: the inverse of ``from_output``."""
    weights = np.array([_output_weights(prediction_type, a, s) for a, s in zip(level.alpha, level.sigma)])
    of_x0, of_eps = (column(w, x0) for w in weights.T)
    return of_x0 * x0 + of_eps * eps


def moved(out: Tensor, by: Tensor, level: Level, prediction_type: PredictionType) -> Tensor:
    """The output whose x0 lies ``by`` (B, ...) further than that of ``out``, for the same x; where that is 0, ``out`` bit for bit."""
    of_out = np.array([x0_weights(prediction_type, a, s)[1] for a, s in zip(level.alpha, level.sigma)])
    return (out + by / column(of_out, out)).to(out.dtype)


def _weights(prediction_type: PredictionType, alpha: float, sigma: float) -> tuple[float, float, float, float]:
    """(a, b, c, d) with x0 = a x + b out and eps = c x + d out."""
    if prediction_type == "epsilon" and alpha == 0:
        raise ValueError('prediction_type="epsilon" says nothing about the data where alpha is 0 (zero terminal SNR)')
    a, b = x0_weights(prediction_type, alpha, sigma)
    return a, b, (1 - alpha * a) / sigma, -alpha * b / sigma


def _output_weights(prediction_type: PredictionType, alpha: float, sigma: float) -> tuple[float, float]:
    """(p, q) with out = p x0 + q eps."""
    a, b = x0_weights(prediction_type, alpha, sigma)
    return (1 - a * alpha) / b, -a * sigma / b


@dataclass(frozen=True)
class Grid:
    """The noise levels of a sampling run of N calls, from noise to data: ``t`` (N + 1,), ``alpha`` and ``sigma`` (N + 1,) float64.

    The last is where the run ends; its ``t`` is told to no network.
    """

    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray

    def __len__(self) -> int:
        return len(self.t) - 1

    def at(self, calls: np.ndarray) -> Level:
        """The levels of those entries, 0 being the noisiest; ``calls`` (B,) whole numbers from 0 to N."""
        return Level(self.t[calls], self.alpha[calls], self.sigma[calls])

    def every(self, stride: int) -> "Grid":
        """The grid of every ``stride``-th call."""
        if len(self) % stride:
            raise ValueError(f"a grid of {len(self)} calls has no whole number of strides of {stride}")
        return Grid(self.t[::stride], self.alpha[::stride], self.sigma[::stride])


class Times:
    """The noise levels that a model was trained on, by its train time: 0 .. T - 1 with betas, (0, T] for flow."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.num_train_timesteps = process.num_train_timesteps
        self.flow = process.frame == "flow"

    def at(self, t: np.ndarray) -> Level:
        """(B,) levels of train times."""
        t = np.asarray(t, np.float64)
        return Level(t, *self.process.levels(self.process.sigma_at(t)))

    def between(self, share: np.ndarray) -> Level:
        """(B,) levels by their place among all train times, 0 to 1: whole times with betas, any but 0 for flow."""
        if self.flow:
            return self.at(np.maximum(share, 1e-4) * self.num_train_timesteps)
        return self.at(np.minimum(np.floor(share * self.num_train_timesteps), self.num_train_timesteps - 1))

    def trailing(self, calls: int, *, to_first: bool = False) -> Grid:
        """Evenly spaced times from pure noise to clean data, as "trailing" samplers and flow models at shift 1 visit them.

        Args:
            to_first: end at train time 0, which is a little noisy with betas, instead of at clean data.
        """
        steps = self.num_train_timesteps
        if self.flow:
            t = steps * np.linspace(1.0, 0.0, calls + 1)
            return self._ending(t[:-1], 0.0)
        return self._ending(np.round(np.arange(steps, 0, -steps / calls)) - 1, self._first if to_first else 0.0)

    def of(self, scheduler: Any, calls: int) -> Grid:
        """The grid that a stock scheduler walks in ``calls`` steps, read from it: training on it is training for it."""
        scheduler.set_timesteps(calls)
        return self.set_in(scheduler)

    def set_in(self, scheduler: Any) -> Grid:
        """The grid that a scheduler is set to."""
        t = scheduler.timesteps.cpu().numpy().astype(np.float64)
        if self.flow:
            sigma = scheduler.sigmas.cpu().numpy().astype(np.float64)
            return Grid(np.append(t, 0.0), 1 - sigma, sigma)
        return self._ending(t, 0.0 if scheduler.config.get("set_alpha_to_one", True) else self._first)

    @property
    def _first(self) -> float:
        return float(self.process.sigma_at(np.zeros(1))[0])

    def _ending(self, t: np.ndarray, final: float) -> Grid:
        alpha, sigma = self.process.levels(np.append(self.process.sigma_at(t), final))
        return Grid(np.append(t, 0.0), alpha, sigma)
