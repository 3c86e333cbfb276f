"""Guidance distillation: one network call that says what a guided pair says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .diffusion import output_error
from .level import noised
from .objective import Batch, Inference, Loss, Moment, Objective
from .weights import squared


@dataclass(frozen=True, kw_only=True)
class Guidance(Objective):
    """Teach the guided prediction to a network called once: half the cost at the same number of calls.

    Args:
        guidance_scale: with which the teacher is guided, and which is exported; 1 is off.
        guidance_range: draw the scale from it and tell it to the student, so that a user still chooses; None trains one scale.
        calls: of the exported sampler.

    Source: Meng et al. 2023 (arXiv:2210.03142) section 3, stage one, whose w is the scale - 1.

    Differs from the paper: the error is that of the network's output, unweighted; the student is told the scale through the sines
    and cosines that Diffusers' pipelines compute.
    """

    guidance_scale: float = 3.0
    guidance_range: tuple[float, float] | None = None
    calls: int = 50

    def __post_init__(self) -> None:
        if self.guidance_scale == 1:
            raise ValueError("guidance_scale=1 is no guidance, so there is nothing to learn; pass the scale that the teacher is used with")
        if self.guidance_range is not None:
            check_range(self.guidance_range, self.guidance_scale)
        check_calls(self.calls)

    def settled(self, family, lora: bool) -> Guidance:
        check_told(self.guidance_range is not None, family, lora)
        self.check(family)
        return self

    def check(self, family) -> None:
        super().check(family)
        if not family.guidable:
            raise ValueError(f"{type(family.pipe).__name__} cannot be guided: its network knows no condition that says nothing")

    def build(self, family, network: Any) -> Any:
        return network if self.guidance_range is None else family.with_guidance_embedding(network)

    def losses(self, nets, batch: Batch, now: Moment) -> dict[str, Loss]:
        level = nets.times.between(batch.draws.uniform("time"))
        x = noised(batch.x0, batch.draws.normal("noise", batch.x0), level)
        if self.guidance_range is None:
            scale, told = np.full(len(batch), self.guidance_scale), None
        else:
            scale = told = batch.draws.uniform("guidance", *self.guidance_range)
        goal = nets.guided("teacher", x, level, batch.condition, scale)
        return {"student": Loss(squared(output_error(nets, "student", x, level, batch.condition, goal, told)))}

    def inference(self, family) -> Inference:
        told = self.guidance_scale if self.guidance_range else 1.0
        return Inference(family.pipe.scheduler, family.call_kwargs(self.calls, told))


def check_range(guidance_range: tuple[float, float], guidance_scale: float) -> None:
    """Refuse an empty range of guidance scales, or one that the exported scale is not in."""
    low, high = guidance_range
    if not 0 <= low <= high:
        raise ValueError(f"guidance_range={guidance_range} must rise from a scale of at least 0; 1 is no guidance")
    if not low <= guidance_scale <= high:
        raise ValueError(
            f"guidance_scale={guidance_scale} is what the student is exported with; it must lie in guidance_range={guidance_range}"
        )


def check_told(told: bool, family: Any, lora: bool) -> None:
    """Refuse a student that is told its guidance scale where nothing can hold that."""
    if told and lora:
        raise ValueError(
            "adapters cannot hold the new layer through which a student is told its guidance scale: train the whole network "
            "(lora_rank=None), or a student that is not told"
        )
    if told and not family.takes_guidance:
        raise ValueError(f"{type(family.base).__name__} cannot be told a guidance scale; train a student that is not told")


def check_calls(calls: int) -> None:
    """Refuse fewer than one network call."""
    if calls < 1:
        raise ValueError(f"calls={calls} must be at least 1")
