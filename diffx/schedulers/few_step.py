"""Samplers for networks distilled to few steps: LCM."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from .scheduler import TableScheduler
from .table import Row, Table

SIGMA_DATA = 0.5  # of the boundary scaling, in the paper and in every published checkpoint


def consistency(alpha: np.ndarray, sigma: np.ndarray, skip: Sequence[float]) -> list[Row]:
    """One row per call of multistep consistency sampling: jump to x0, then add fresh noise up to the next level.

    Source: Song et al. 2023 (arXiv:2303.01469) algorithm 1; the boundary scaling is Luo et al. 2023 (arXiv:2310.04378) section 4.

    Args:
        alpha, sigma: (N + 1,) the noise levels.
        skip: (N,) share c_skip of the sample itself in the jump, sigma_data^2 / (s^2 + sigma_data^2) at the scaled time s; the
            share of x0 is c_out = sqrt(1 - c_skip). 0 is the plain jump; other numbers leave the noise levels a little.
    """
    rows = []
    for a1, s1, c_skip in zip(alpha[1:], sigma[1:], skip, strict=True):
        rows.append(Row((a1 * c_skip, a1 * math.sqrt(1 - c_skip)), noise=s1))
    return rows


def distilled_timesteps(num_steps: int, original_steps: int, num_train_timesteps: int, strength: float = 1.0) -> list[int]:
    """(N,) falling: even picks among the ``original_steps`` train times that the network was distilled on.

    Source: Luo et al. 2023 (arXiv:2310.04378) section 4.3, skipping steps.

    Args:
        strength: share of the original times, counted from low noise, to pick from.

    Raises:
        ValueError: more steps than times to pick from, or more original steps than train times.
    """
    if not 1 <= original_steps <= num_train_timesteps:
        raise ValueError(f"original_inference_steps={original_steps} must lie between 1 and the {num_train_timesteps} train times")
    count = int(original_steps * strength)
    if num_steps != int(num_steps) or not 1 <= num_steps <= count:
        raise ValueError(
            f"num_inference_steps={num_steps} must be a whole number between 1 and the {count} distilled times "
            f"(original_inference_steps={original_steps}, strength={strength})"
        )
    stride = num_train_timesteps // original_steps
    picks = np.floor(np.linspace(0, count, int(num_steps), endpoint=False)).astype(int)
    return [int((count - pick) * stride - 1) for pick in picks]


class LCM(
    TableScheduler,
    options=dict(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
        original_inference_steps=50, timestep_scaling=10.0, set_alpha_to_one=True, clip_sample=False, clip_sample_range=1.0,
        thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0,
    ),
):  # fmt: skip
    """LCM (stochastic, for networks distilled with consistency), the drop-in for ``LCMScheduler`` and ``FlowMatchLCMScheduler``.

    Models with betas visit ``num_inference_steps`` of the ``original_inference_steps`` times of their distillation, whatever
    ``timestep_spacing`` says; ``timesteps`` and ``sigmas`` are taken as given. Flow models keep their own grid and have no
    boundary scaling.
    """

    zero_snr = 0.0

    def _check_options(self) -> None:
        super()._check_options()
        words = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "spacing")
        told = [word for word in words if self.config.get(word)]
        if told and self._process.frame != "flow":
            raise ValueError(
                f"{told[0]}={self.config[told[0]]!r} does not fit LCM, which visits the times of its distillation; switch it off"
            )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        strength: float = 1.0,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """As the base class's; ``original_inference_steps`` and ``strength`` (share of the times, from low noise) choose the times."""
        own = self._process.frame != "flow" and timesteps is None and sigmas is None
        if strength != 1 and not own:
            raise ValueError(f"strength={strength} acts on the times of the distillation only; pass the timesteps that you mean")
        if own and num_inference_steps is not None:
            original = self.config.original_inference_steps if original_inference_steps is None else original_inference_steps
            timesteps = distilled_timesteps(num_inference_steps, original, self.config.num_train_timesteps, strength)
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas, mu)

    def _noise_dtype(self, output_dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self._process.frame == "flow" else output_dtype

    def make_table(self, alpha: np.ndarray, sigma: np.ndarray, begin: int) -> Table:
        alpha, sigma = alpha[begin:], sigma[begin:]
        scaled = self._require_grid().t[begin:] * self.config.timestep_scaling
        skip = np.zeros(len(scaled)) if self._process.frame == "flow" else SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        rows = consistency(alpha, sigma, skip.tolist())
        # By its own definition: c_skip alpha + c_out is not 1, and the jump keeps c_skip of the old noise.
        excess = sum(2 * c + c**2 for c in skip.tolist()) + 1e-9
        return Table(alpha, sigma, tuple(rows), excess=excess)
