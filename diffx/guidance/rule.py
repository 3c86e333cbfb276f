"""What a guidance rule is, and scales that change during a run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from .moment import Moment

Shape = Literal["linear", "cosine"]


class Rule(ABC):
    """A way to make one prediction of two: frozen numbers, and a function of the two and of the moment."""

    @abstractmethod
    def __call__(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        """(B, ...) the guided prediction, of the type that the network puts out.

        Args:
            cond: (B, ...) what the network says, told the condition.
            uncond: the same told nothing; None where ``needs_uncond`` said no.
        """

    @property
    def guides(self) -> bool:
        """At some call it may need what the network says when told nothing."""
        return True

    def needs_uncond(self, moment: Moment) -> bool:
        """It needs that at this call; where it does not, the call is made with half the batch."""
        return self.guides


@dataclass(frozen=True)
class Ramp:
    """A guidance scale that goes from ``start`` at the first call to ``end`` at the last.

    Source: Wang et al. 2024 (arXiv:2404.13040), linear and cosine.

    Differs from the paper: even in calls instead of in train time, and with free ends.
    """

    start: float
    end: float
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise ValueError(f"shape={self.shape!r} is not one of {', '.join(get_args(Shape))}")

    def at(self, progress: float) -> float:
        """The scale at a share of the run, 0 to 1."""
        share = progress if self.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.start + share * (self.end - self.start)


Scale = float | Ramp


def scale_at(scale: Scale, moment: Moment) -> float:
    """The number that a scale is at that moment."""
    return scale.at(moment.progress) if isinstance(scale, Ramp) else scale
