"""Consistency training without a teacher, for networks preconditioned as EDM's: students of ``ConsistencyModelPipeline``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .guidance import check_calls
from .level import Level, column, noised
from .objective import Batch, Inference, Loss, Moment, Objective
from .weights import pseudo_huber


@dataclass(frozen=True, kw_only=True)
class ConsistencyTraining(Objective):
    """Easy consistency tuning: diffusion training at first, whose two noise levels then draw together.

    Args:
        calls: of the exported sampler.
        halve_every: optimizer steps after which the distance of the two levels halves; the first as many are diffusion training.
        log_sigma_mean, log_sigma_std: of the natural logarithm of the noise level.
        huber_c: of the distance, in units of the data.

    Source: Geng et al. 2024 (arXiv:2406.14548), with q = 2, k = 8, b = 1; log-normal levels, pseudo-Huber distance and weights
    are Song and Dhariwal 2023 (arXiv:2310.14189); the preconditioning is Song et al. 2023 (arXiv:2303.01469) appendix C.

    Differs from the papers: the pseudo-Huber distance is taken entry by entry; dropout is off, so no mask has to be shared.
    """

    has_teacher: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-4
    ema_decay: float | None = 0.999
    calls: int = 2
    halve_every: int = 1000
    log_sigma_mean: float = -1.1
    log_sigma_std: float = 2.0
    huber_c: float = 5.4e-4

    def __post_init__(self) -> None:
        check_calls(self.calls)
        if self.halve_every < 1:
            raise ValueError(f"halve_every={self.halve_every} must be at least 1 optimizer step")
        for name in ("huber_c", "log_sigma_std"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name}={value} must be positive")

    def check(self, family) -> None:
        if "sigma_data" not in (config := family.pipe.scheduler.config) or "sigma_min" not in config:
            raise ValueError(
                f"ConsistencyTraining trains networks of ConsistencyModelPipeline, with a CMStochasticIterativeScheduler; this one has "
                f"{type(family.pipe.scheduler).__name__}: LCM and PCM distil such"
            )

    def losses(self, nets, batch: Batch, now: Moment) -> dict[str, Loss]:
        config = nets.family.pipe.scheduler.config
        drawn = np.exp(batch.draws.gaussian("sigma", self.log_sigma_mean, self.log_sigma_std))
        sigma = drawn.clip(config.sigma_min * 1.01, config.sigma_max)
        nearer = np.maximum(nearer_sigma(sigma, now.step // self.halve_every), config.sigma_min)
        noise = batch.draws.normal("noise", batch.x0)
        found = self.end(nets, config, batch, noise, sigma)
        with torch.no_grad():  # the student itself, not its average
            goal = self.end(nets, config, batch, noise, nearer)
        weight = column(1 / (sigma - nearer), noise).flatten()
        return {"student": Loss(weight * pseudo_huber(found - goal, self.huber_c))}

    def end(self, nets, config: Any, batch: Batch, noise: Tensor, sigma: np.ndarray) -> Tensor:
        """The clean sample that the student finds at noise level ``sigma`` (B,)."""
        level = Level(250 * np.log(sigma), np.ones_like(sigma), sigma)  # the time that Diffusers tells such networks
        x = noised(batch.x0, noise, level)
        c_skip, c_out, c_in = (column(c, x) for c in scalings(sigma, config.sigma_min, config.sigma_data))
        return c_skip * x + c_out * nets.output("student", c_in * x, level, batch.condition)

    def inference(self, family) -> Inference:
        return Inference(family.pipe.scheduler, family.call_kwargs(self.calls))


def nearer_sigma(sigma: np.ndarray, halvings: int) -> np.ndarray:
    """(B,) the noise level of the target: 0 without halvings, and nearer to ``sigma`` with each.

    Source: Geng et al. 2024 (arXiv:2406.14548): r / t = 1 - n(t) / q^a with n(t) = 1 + k sigmoid(-b t).
    """
    return sigma * np.maximum(1 - 2.0**-halvings * (1 + 8 / (1 + np.exp(sigma))), 0)


def scalings(sigma: np.ndarray, sigma_min: float, sigma_data: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(c_skip, c_out, c_in), each (B,): the sample itself at ``sigma_min``.

    Source: Song et al. 2023 (arXiv:2303.01469) appendix C, and ``CMStochasticIterativeScheduler``.
    """
    spread = np.hypot(sigma, sigma_data)
    return sigma_data**2 / ((sigma - sigma_min) ** 2 + sigma_data**2), (sigma - sigma_min) * sigma_data / spread, 1 / spread
