"""Runs of a pipeline as its network sees them, and which call of which run it is in."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ..families import process_of
from ..objectives.level import Grid, Times


class Run:
    """What stays the same from a ``set_timesteps`` to the next.

    ``memory`` is what rules keep from call to call, empty at the first: a rule writes under itself as the key.
    """

    def __init__(self, scheduler: Any, num_calls: int) -> None:
        self.scheduler, self.num_calls = scheduler, num_calls
        self.memory: dict[Any, Any] = {}

    def progress(self, call: int) -> float:
        """From 0 at the first call to 1 at the last."""
        return call / max(self.num_calls - 1, 1)

    @functools.cached_property
    def times(self) -> Times:
        """The noise levels that the model was trained on."""
        if "sigma_data" in self.scheduler.config:
            raise ValueError(
                f"{type(self.scheduler).__name__} says that this network is preconditioned as EDM's: rules that look at the noise level "
                "or at clean samples know models with betas and flow models; CFG and Rescale at a fixed scale work"
            )
        return Times(process_of(self.scheduler))

    @functools.cached_property
    def grid(self) -> Grid:
        """The noise levels of all calls that the scheduler is set to, and of the end."""
        return self.times.set_in(self.scheduler)


class Walk:
    """Follows the calls of a pipeline's network: a run is what comes after a ``set_timesteps``, with which every pipeline begins."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._timesteps: Tensor | None = None
        self._run: Run | None = None
        self._call = 0

    def next(self, t: Any) -> tuple[Run, int]:
        """The run that a call at train time ``t`` belongs to, and which of its calls it is."""
        scheduler = self.pipe.scheduler
        if self._run is None or self._timesteps is not scheduler.timesteps:
            self._timesteps, self._run, self._call = scheduler.timesteps, Run(scheduler, _calls_from(scheduler.timesteps, t)), 0
        else:
            self._call += 1
        return self._run, self._call


def _calls_from(timesteps: Tensor, t: Any) -> int:
    """How many calls a run makes that begins at ``t``: image to image leaves some out."""
    first = float(t.flatten()[0] if isinstance(t, Tensor) else t)
    at = (timesteps == first).nonzero()
    return len(timesteps) - (int(at[0]) if len(at) else 0)
