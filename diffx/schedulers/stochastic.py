"""Solvers that add fresh noise in every interval: Euler ancestral, and DDPM with each of its variances."""

import math
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .grid import Convention
from .one_step import ddim
from .scheduler import StepOutput, TableScheduler
from .table import Row, Table

VarianceType = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]


def flow_ancestral(sigma: np.ndarray, *, eta: float = 1.0) -> list[Row]:
    """One row per interval of Euler ancestral on alpha = 1 - sigma: a step to below the next level, then noise up to it.

    The step goes to s1 (1 + eta (s1 / s0 - 1)); what it keeps of x0 is scaled to 1 - s1, and the noise fills the variance.

    Source: the flow form is that of Diffusers' LTXEulerAncestralRFScheduler; it has no paper.

    Args:
        sigma: (N + 1,) the noise levels.
        eta: 0 (deterministic) to 1.
    """
    rows = []
    for s0, s1 in pairwise(sigma):
        down = s1 * (1 + eta * (s1 / s0 - 1))
        keep = down / s0 * (1 - s1) / (1 - down)
        rows.append(Row((keep, 1 - s1 - keep * (1 - s0)), noise=math.sqrt(max(0.0, s1**2 - (keep * s0) ** 2))))
    return rows


def ddpm(alpha: np.ndarray, sigma: np.ndarray, *, large: bool = False) -> list[Row]:
    """One row per interval of ancestral sampling with the posterior's mean; the last one, to sigma 0, has no noise.

    Source: Ho et al. 2020 (arXiv:2006.11239) eq. 7 and section 3.2.

    Args:
        alpha, sigma: (N + 1,) the noise levels.
        large: the variance of the forward step instead of the posterior's.
    """
    if not large:
        return ddim(alpha, sigma, eta=1.0)
    rows = []
    for row, (a0, a1), (s0, s1) in zip(ddim(alpha, sigma, eta=1.0), pairwise(alpha), pairwise(sigma), strict=True):
        rows.append(Row(row.sample, noise=math.sqrt(max(0.0, s0**2 - (a0 / a1 * s1) ** 2)) if row.noise else 0.0))
    return rows


class EulerAncestral(TableScheduler, options=dict(eta=1.0, s_noise=1.0)):
    """Euler ancestral (order 1, stochastic), the drop-in for ``EulerAncestralDiscreteScheduler`` and ``LTXEulerAncestralRFScheduler``.

    Options besides Diffusers' own:
        eta: share of the ancestral noise, 0 (Euler) to 1.
        s_noise: factor on every draw; other values than 1 leave the noise levels of the grid, on purpose.

    Source: ``ddim`` at alpha = 1 for models with betas, ``flow_ancestral`` for flow.
    """

    frame = "ve"
    convention = Convention(whole_t=False, karras_between="spaced")

    def _check_options(self) -> None:
        super()._check_options()
        if not 0 <= self.config.eta <= 1:
            raise ValueError(f"eta={self.config.eta} must lie between 0 (deterministic) and 1 (all of the ancestral noise)")
        if not 0 <= self.config.s_noise < math.inf:
            raise ValueError(f"s_noise={self.config.s_noise} must be a finite factor of at least 0")

    def _noise_dtype(self, output_dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self._process.frame == "flow" else output_dtype

    def make_table(self, alpha: np.ndarray, sigma: np.ndarray, begin: int) -> Table:
        alpha, sigma, eta, factor = alpha[begin:], sigma[begin:], self.config.eta, self.config.s_noise
        rows = flow_ancestral(sigma, eta=eta) if self._process.frame == "flow" else ddim(alpha, sigma, eta=eta)
        # Rows keep less than the whole of the variance that they are handed.
        excess = sum(abs(factor**2 - 1) * row.noise**2 for row in rows) + 1e-9
        return Table(alpha, sigma, tuple(Row(row.sample, noise=factor * row.noise) for row in rows), excess=excess)


class DDPM(
    TableScheduler,
    options=dict(
        variance_type="fixed_small", timestep_spacing="leading", clip_sample=True, clip_sample_range=1.0,
        thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0,
    ),
):  # fmt: skip
    """DDPM (order 1, stochastic), the drop-in for ``DDPMScheduler``; each step goes to the next time of the grid.

    ``variance_type``: "fixed_small" is the posterior's variance, "fixed_large" that of the forward step (which leaves the noise
    levels of the grid, by its definition); "_log" names the same numbers. "learned" and "learned_range" take the variance from the
    second half of the network's channels: itself, or where it lies between small (-1) and large (1) on a log scale.

    Source: ``ddpm``; the learned range is Nichol and Dhariwal 2021 (arXiv:2102.09672) eq. 15.
    """

    zero_snr = 0.0

    def _check_options(self) -> None:
        super()._check_options()
        if self._variance_type not in get_args(VarianceType):
            raise ValueError(f"variance_type={self._variance_type!r} is not one of {', '.join(get_args(VarianceType))}")

    @property
    def _variance_type(self) -> str:
        return self.config.variance_type or "fixed_small"  # None in files of DPM-Solver configs, which stock reads like this, too

    def _noise_dtype(self, output_dtype: torch.dtype) -> torch.dtype:
        return output_dtype

    def make_table(self, alpha: np.ndarray, sigma: np.ndarray, begin: int) -> Table:
        alpha, sigma, large = alpha[begin:], sigma[begin:], self._variance_type.startswith("fixed_large")
        rows = ddpm(alpha, sigma, large=large)
        # What each row adds too much; rows keep less than the whole of it.
        excess = sum(row.noise**2 - small.noise**2 for row, small in zip(rows, ddpm(alpha, sigma), strict=True)) + 1e-9
        return Table(alpha, sigma, tuple(rows), excess=excess)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """As the base class's; with a learned variance ``model_output`` is (B, 2 C, ...) for a ``sample`` of (B, C, ...)."""
        if not self._variance_type.startswith("learned"):
            return self._step(model_output, timestep, sample, generator, variance_noise, return_dict, {})
        channels = sample.shape[1]
        if model_output.shape[1] != 2 * channels:
            raise ValueError(
                f"variance_type={self._variance_type!r} needs {2 * channels} channels of model_output, x0 or noise and variance; "
                f"it has {model_output.shape[1]}: variance_type='fixed_small' samples networks without a variance"
            )
        out, variance = model_output.split(channels, dim=1)
        return self._step(
            out, timestep, sample, generator, variance_noise, return_dict, {}, lambda index: self._noise_scale(index, variance)
        )

    def _noise_scale(self, index: int, predicted: Tensor) -> Tensor:
        """(B, C, ...) the learned standard deviation of call ``index``, in units of the row's."""
        alpha, sigma = (level[index : index + 2] for level in self._levels)
        small, large = (ddpm(alpha, sigma, large=which)[0].noise for which in (False, True))
        wide = predicted.float() if predicted.dtype in (torch.float16, torch.bfloat16) else predicted
        if self._variance_type == "learned":
            return wide.sqrt() / small
        return ((wide + 1) * (0.5 * math.log(large / small))).exp()
