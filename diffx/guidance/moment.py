"""Where a run stands when its network has answered: what a rule may look at besides the two predictions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from ..objectives.level import Level, from_output, moved
from ..schedulers.process import PredictionType
from .run import Run


@dataclass(frozen=True)
class Moment:
    """One network call: ``x`` (B, ...) is what the network saw of each sample, of alpha^2 + sigma^2 = 1 or of a flow model.

    ``t`` is the train time that it was told; ``call`` counts from 0 to ``run.num_calls - 1``; ``network`` calls it again on other
    ``x``, told the same condition.
    """

    x: Tensor
    t: Any
    call: int
    run: Run
    network: Callable[[Tensor], Tensor]

    @functools.cached_property
    def level(self) -> Level:
        """(B,) noise levels, those of ``t``."""
        t = float(self.t.flatten()[0] if isinstance(self.t, Tensor) else self.t)
        return self.run.times.at(np.full(len(self.x), t))

    @property
    def next_level(self) -> Level:
        """(B,) noise levels of the next call, or of the end."""
        grid = self.run.grid
        return grid.at(np.full(len(self.x), len(grid) - self.run.num_calls + self.call + 1))

    @property
    def sigma(self) -> float:
        """The noise level as the scheduler's ``sigmas`` have it: sigma / alpha, and sigma for flow models."""
        return float(self.run.times.process.sigma_at(self.level.t[:1])[0])

    @property
    def progress(self) -> float:
        """From 0 at the first call to 1 at the last."""
        return self.run.progress(self.call)

    @property
    def prediction_type(self) -> PredictionType:
        """What the network puts out."""
        return self.run.times.process.prediction_type

    def at(self, x: Tensor) -> Moment:
        """The same moment of other samples."""
        return replace(self, x=x)

    def x0(self, out: Tensor) -> Tensor:
        """(B, ...) float32, the clean samples that an output stands for."""
        return from_output(out.float(), self.x.float(), self.level, self.prediction_type).x0

    def moved(self, out: Tensor, by: Tensor) -> Tensor:
        """The output whose clean samples lie ``by`` (B, ...) further."""
        return moved(out, by, self.level, self.prediction_type)
