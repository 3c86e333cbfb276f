"""Solvers that look at the newest prediction only: DDIM, and Euler, which is the same map in another frame."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .grid import Convention
from .scheduler import StepOutput, TableScheduler
from .table import Row, Table


def ddim(alpha: np.ndarray, sigma: np.ndarray, *, eta: float = 0.0) -> list[Row]:
    """One row per interval of DDIM; ``eta=1`` is DDPM's posterior, and on ``alpha = 1 - sigma`` or ``alpha = 1`` it is Euler.

    Source: Song et al. 2021 (arXiv:2010.02502) eq. 12, noise level eq. 16.

    Args:
        alpha, sigma: (N + 1,) the noise levels, from the first call to the end point.
        eta: fraction of the posterior's noise, 0 (deterministic) to 1.

    Raises:
        ValueError: eta outside 0 .. 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must lie between 0 (deterministic) and 1 (DDPM's posterior noise)")
    rows = []
    for a0, s0, a1, s1 in zip(alpha, sigma, alpha[1:], sigma[1:], strict=False):
        noise = eta * s1 * math.sqrt(max(0.0, 1 - (a0 * s1 / (a1 * s0)) ** 2))
        keep = math.sqrt(s1**2 - noise**2) / s0  # weight of the current sample
        rows.append(Row((keep, a1 - keep * a0), noise=noise))
    return rows


def ddim_between(alpha: np.ndarray, sigma: np.ndarray, alpha_end: np.ndarray, sigma_end: np.ndarray, *, eta: float = 0.0) -> list[Row]:
    """One DDIM row per call k from level k to an end of its own, which need not be level k + 1.

    Diffusers' DDIMScheduler aims at ``t - T // N`` instead of the next time of its own grid; this reproduces it.

    Source: as ``ddim``.
    """
    pairs = zip(alpha, sigma, alpha_end, sigma_end, strict=True)
    return [ddim(np.array([a0, a1]), np.array([s0, s1]), eta=eta)[0] for a0, s0, a1, s1 in pairs]


class DDIM(
    TableScheduler,
    options=dict(
        timestep_spacing="leading", set_alpha_to_one=True, clip_sample=True, clip_sample_range=1.0,
        thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0,
    ),
    own=dict(stock_step=False),
):  # fmt: skip
    """DDIM (order 1), the drop-in for ``DDIMScheduler``; on flow models it is Euler.

    Each step goes to the next time of the grid. ``stock_step=True`` aims at ``t - T // N`` instead, as Diffusers does, which is
    another time for "linspace" and often for "trailing". Clipping is the consistent form (``use_clipped_model_output=True``).
    """

    zero_snr = 0.0

    def _grid_config(self) -> dict[str, Any]:
        return {**self.config, "final_sigmas_type": "zero" if self.config.set_alpha_to_one else "sigma_min"}

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """As the base class's, with ``eta`` from 0 (deterministic) to 1 (DDPM's posterior noise), one value for a run.

        ``use_clipped_model_output`` is always on: the clipped prediction is what the step uses.
        """
        return self._step(model_output, timestep, sample, generator, variance_noise, return_dict, {"eta": eta})

    def _noise_dtype(self, output_dtype: torch.dtype) -> torch.dtype:
        return output_dtype

    def make_table(self, alpha: np.ndarray, sigma: np.ndarray, begin: int, *, eta: float = 0.0) -> Table:
        if self.config.get("stock_step"):
            return self._stock_table(alpha, sigma, begin, eta)
        return Table(alpha[begin:], sigma[begin:], tuple(ddim(alpha[begin:], sigma[begin:], eta=eta)))

    def _stock_table(self, alpha: np.ndarray, sigma: np.ndarray, begin: int, eta: float) -> Table:
        grid = self._require_grid()
        t_end = grid.t - self.config.num_train_timesteps // len(grid.t)
        ends = np.where(t_end >= 0, self._process.sigma_at(np.maximum(t_end, 0)), grid.sigmas[-1])
        alpha_end, sigma_end = self._process.levels(ends)
        rows = ddim_between(alpha[:-1], sigma[:-1], alpha_end, sigma_end, eta=eta)
        # Every row misses the next level by its own gap and passes on at most what it was handed.
        excess = float(np.abs(alpha_end - alpha[1:]).sum() + np.abs(sigma_end**2 - sigma[1:] ** 2).sum()) + 1e-9
        return Table(alpha[begin:], sigma[begin:], tuple(rows[begin:]), excess=excess)


class Euler(TableScheduler):
    """Euler (order 1), the drop-in for ``EulerDiscreteScheduler`` and ``FlowMatchEulerDiscreteScheduler``.

    Source: Karras et al. 2022 (arXiv:2206.00364) algorithm 1 without churn.
    """

    frame = "ve"
    convention = Convention(whole_t=False, karras_between="spaced")

    def make_table(self, alpha: np.ndarray, sigma: np.ndarray, begin: int) -> Table:
        return Table(alpha[begin:], sigma[begin:], tuple(ddim(alpha[begin:], sigma[begin:])))
