"""Classifier-free guidance and its nearest relatives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .moment import Moment
from .rule import Rule, Scale, scale_at


@dataclass(frozen=True)
class CFG(Rule):
    """Classifier-free guidance, the same bits as Diffusers' pipelines compute; 1 is the conditional prediction, 0 the unconditional one.

    Source: Ho and Salimans 2022 (arXiv:2207.12598) eq. 6, whose w is the scale - 1.
    """

    guidance_scale: Scale = 7.5

    @property
    def guides(self) -> bool:
        return self.guidance_scale != 1

    def needs_uncond(self, moment: Moment) -> bool:
        return scale_at(self.guidance_scale, moment) != 1

    def __call__(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        return cond if uncond is None else uncond + scale_at(self.guidance_scale, moment) * (cond - uncond)


CONDITIONAL = CFG(1.0)


@dataclass(frozen=True)
class CFGZeroStar(Rule):
    """Classifier-free guidance from the unconditional prediction times s, the multiple of it that is nearest to the conditional one.

    Args:
        zero_calls: at the beginning, in which a flow model's sample stays where it is.

    Source: Fan et al. 2025 (arXiv:2503.18886).

    Differs from the paper: ``zero_calls`` is 0 unless given, and the rule also takes models that are not flow models.
    """

    guidance_scale: Scale = 7.5
    zero_calls: int = 0

    def __call__(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        assert uncond is not None
        if self.zero_calls and moment.prediction_type != "flow_prediction":
            raise ValueError(
                f"zero_calls={self.zero_calls} keeps a flow model's sample where it is; this one predicts {moment.prediction_type}: use 0"
            )
        if moment.call < self.zero_calls:
            return torch.zeros_like(cond)
        dot, square = ((uncond.float() * other.float()).flatten(1).sum(1) for other in (cond, uncond))
        nearest = uncond * (dot / (square + 1e-8)).to(cond.dtype).view(-1, *[1] * (cond.ndim - 1))
        return nearest + scale_at(self.guidance_scale, moment) * (cond - nearest)


@dataclass(frozen=True)
class CFGPlusPlus(Rule):
    """CFG++: the guided clean samples, noised again with the unconditional noise.

    For deterministic one-step samplers (DDIM, Euler) that is classifier-free guidance at the scale
    ``guidance_scale`` s / (s - s'), where s and s' are sigma / alpha of this call and the next; other samplers are guided at that scale.

    Args:
        guidance_scale: 0 to 1, the paper's lambda.

    Source: Chung et al. 2024 (arXiv:2406.08070).
    """

    guidance_scale: float = 0.6

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_scale <= 1:
            raise ValueError(f"guidance_scale={self.guidance_scale} must lie between 0 and 1: CFG++ interpolates; CFG extrapolates")

    def __call__(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        assert uncond is not None
        now, then = moment.level, moment.next_level
        kept = float(then.sigma[0] * now.alpha[0] / (then.alpha[0] * now.sigma[0])) if then.alpha[0] else math.inf
        if kept >= 1:
            raise ValueError(
                f"CFGPlusPlus needs a sampler whose noise falls from call to call, and this one's ({type(moment.run.scheduler).__name__}) "
                "does not; DDIM and Euler do"
            )
        return uncond + self.guidance_scale / (1 - kept) * (cond - uncond)
