"""Adaptive projected guidance: without the part that saturates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .moment import Moment
from .rule import Rule, Scale, scale_at


@dataclass(frozen=True)
class APG(Rule):
    """Guidance of the clean samples along what is orthogonal to the conditional ones, limited in length.

    Args:
        eta: weight of the parallel part; 1 with the other two off is classifier-free guidance.
        norm_threshold: the largest L2 norm of the difference of a sample's two predictions, so it depends on the size; inf is off.
        momentum: of that difference, from call to call; negative values push away from earlier ones; 0 is off.

    Source: Sadat et al. 2024 (arXiv:2410.02416).

    Differs from the paper: momentum is off by default; -0.5, which it recommends, ruined large scales at 16 calls of the embedded model.
    """

    guidance_scale: Scale = 7.5
    eta: float = 0.0
    norm_threshold: float = math.inf
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if not self.norm_threshold > 0:
            raise ValueError(f"norm_threshold={self.norm_threshold} must be positive; inf switches it off")
        if not -1 < self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must lie between -1 and 1; 0 switches it off")

    def __call__(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        assert uncond is not None
        x0 = moment.x0(cond)
        difference = x0 - moment.x0(uncond) + self.momentum * moment.run.memory.get(self, torch.zeros_like(x0))
        moment.run.memory[self] = difference
        flat, along = difference.flatten(1), torch.nn.functional.normalize(x0.flatten(1))
        norm = flat.norm(dim=1, keepdim=True)
        limited = flat * torch.where(norm > self.norm_threshold, self.norm_threshold / norm, torch.ones_like(norm))
        parallel = (limited * along).sum(1, keepdim=True) * along
        update = (limited - parallel + self.eta * parallel).view_as(x0)
        return moment.moved(cond, (scale_at(self.guidance_scale, moment) - 1) * update)
