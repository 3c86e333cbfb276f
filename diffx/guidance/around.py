"""Rules around another rule: where it holds, and what becomes of its result."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .moment import Moment
from .rule import Rule


class Around(Rule):
    """A rule around ``rule``, which needs the predictions that that one needs."""

    rule: Rule  # a field of each subclass

    @property
    def guides(self) -> bool:
        return self.rule.guides

    def needs_uncond(self, moment: Moment) -> bool:
        return self.rule.needs_uncond(moment)


@dataclass(frozen=True)
class Interval(Around):
    """``rule`` while low < sigma <= high, and the conditional prediction elsewhere, which costs half.

    Args:
        low, high: in the units of the scheduler's ``sigmas``: sigma / alpha, and sigma, 0 to 1, for flow models.

    Source: Kynkaanniemi et al. 2024 (arXiv:2404.07724).
    """

    rule: Rule
    low: float = 0.0
    high: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ValueError(f"low={self.low}, high={self.high}: an interval of noise levels has 0 <= low < high")

    def needs_uncond(self, moment: Moment) -> bool:
        return self._holds(moment) and super().needs_uncond(moment)

    def _holds(self, moment: Moment) -> bool:
        return self.low < moment.sigma <= self.high

    def __call__(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        return self.rule(cond, uncond, moment) if self._holds(moment) else cond


@dataclass(frozen=True)
class Rescale(Around):
    """``rule``'s prediction with the standard deviation of the conditional one, ``share`` of the way.

    Source: Lin et al. 2023 (arXiv:2305.08891) section 3.4, whose phi is the share.
    """

    rule: Rule
    share: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share} must lie between 0 and 1")

    def __call__(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        guided = self.rule(cond, uncond, moment)
        ratio = _std(cond) / _std(guided)
        return self.share * (guided * ratio) + (1 - self.share) * guided


@dataclass(frozen=True)
class DynamicThresholding(Around):
    """``rule``'s clean samples, clipped at a quantile of their own and scaled back to ``bound``.

    Args:
        quantile: of the absolute values of a sample.
        bound: that data keep: 1 for pixels; samples whose quantile is within it stay as they are.

    Source: Saharia et al. 2022 (arXiv:2205.11487) section 2.3.
    """

    rule: Rule
    quantile: float = 0.995
    bound: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.quantile <= 1:
            raise ValueError(f"quantile={self.quantile} must lie between 0 and 1")
        if not self.bound > 0:
            raise ValueError(f"bound={self.bound} must be positive")

    def __call__(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        guided = self.rule(cond, uncond, moment)
        x0 = moment.x0(guided)
        limit = torch.quantile(x0.flatten(1).abs(), self.quantile, dim=1).view(-1, *[1] * (x0.ndim - 1))
        clipped = x0.clamp(-limit, limit) * (self.bound / limit)
        return moment.moved(guided, torch.where(limit > self.bound, clipped - x0, torch.zeros_like(x0)))


def _std(x: Tensor) -> Tensor:
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)
