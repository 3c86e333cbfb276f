"""Consistency distillation: wherever it stands on one of the teacher's paths, the student says where that path ends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..schedulers.few_step import SIGMA_DATA
from .guidance import check_calls, check_range, check_told
from .level import Grid, Level, Prediction, Times, column, jump, noised
from .objective import Batch, Inference, Loss, Moment, Objective
from .sampling import check_divides, deterministic, stochastic
from .weights import pseudo_huber

TIMESTEP_SCALING = 10.0  # of the boundary scaling, in Diffusers' training scripts and in ``LCMScheduler``
MOST_STEPS = 64  # of the teacher, where none are given


@dataclass(frozen=True, kw_only=True)
class Consistency(Objective):
    """What the methods below share: the teacher takes one of ``teacher_steps``, and the student says the same before and after it.

    Args:
        calls: of the exported sampler.
        teacher_steps: from pure noise to data; None is the most up to 64 that ``calls`` and the train times allow.
        guidance_range: of the teacher's scale, drawn per sample; 1 is off. Models that cannot be guided ignore it.
        guidance_scale: told to the exported student, where it is told one.
        embed_guidance: tell the student the scale; None: where a whole network that can be told is trained.
        huber_c: of the distance, in units of the data.
        ema_decay: of the target; None is 0.95 for whole networks, and none for adapters, where the target is the student itself.
    """

    calls: int = 4
    teacher_steps: int | None = None
    guidance_range: tuple[float, float] = (3.0, 15.0)  # "[2, 14]" for w = scale - 1, Luo et al. 2023
    guidance_scale: float = 8.0
    embed_guidance: bool | None = None
    huber_c: float = 1e-3
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        check_calls(self.calls)
        check_range(self.guidance_range, self.guidance_scale)
        if not self.huber_c > 0:
            raise ValueError(f"huber_c={self.huber_c} must be positive: the gradient of a plain norm is NaN where both agree")
        if self.teacher_steps is not None and (self.teacher_steps < 1 or self.teacher_steps % self.phases):
            raise ValueError(f"teacher_steps={self.teacher_steps} must be a positive multiple of the {self.phases} phases")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie between 0, which keeps no average, and 1")

    @property
    def phases(self) -> int:
        """Parts of the path, each with an end of its own."""
        return 1

    @property
    def exported_guidance(self) -> float:
        """The scale that the exported student is called with; 1 is off."""
        return self.guidance_scale if self.embed_guidance else 1.0

    def settled(self, family, lora: bool) -> Self:
        told = family.guidable and family.takes_guidance and not lora if self.embed_guidance is None else self.embed_guidance
        check_told(told, family, lora)
        ema_decay = (0.0 if lora else 0.95) if self.ema_decay is None else self.ema_decay
        steps = self.teacher_steps or most_steps(family, self.calls, self.phases)
        check_divides(family, steps)
        if steps < self.calls:
            raise ValueError(f"calls={self.calls} of the student are more than the teacher_steps={steps} that it learns from")
        self.check(family)
        return replace(self, teacher_steps=steps, embed_guidance=told, ema_decay=ema_decay)

    def build(self, family, network: Any) -> Any:
        return family.with_guidance_embedding(network) if self.embed_guidance else network

    def grid(self, times: Times) -> Grid:
        """Where the teacher's steps begin and end."""
        raise NotImplementedError

    def end(self, found: Prediction, x: Tensor, level: Level, end: Level) -> Tensor:
        """Where the path through ``x`` ends, by what the student found there."""
        raise NotImplementedError

    def losses(self, nets, batch: Batch, now: Moment) -> dict[str, Loss]:
        grid = self.grid(nets.times)
        i = batch.draws.integers("call", 0, len(grid))
        length = len(grid) // self.phases
        edge = (i // length + 1) * length
        level, after, end = grid.at(i), grid.at(i + 1), grid.at(edge)
        scale = batch.draws.uniform("guidance", *self.guidance_range)
        told = scale if self.embed_guidance else None
        x = noised(batch.x0, batch.draws.normal("noise", batch.x0), level)
        x_after = jump(nets.guided("teacher", x, level, batch.condition, scale), after)
        found = self.end(nets.predict("student", x, level, batch.condition, told), x, level, end)
        arrived = i + 1 == edge
        asked = grid.at(np.where(arrived, i, i + 1))  # at clean data there is no train time to ask the target for
        goal = self.end(nets.predict("target", x_after, asked, batch.condition, told), x_after, asked, end)
        goal = torch.where(column(arrived, x).bool(), x_after, goal)
        return {"student": Loss(pseudo_huber(found - goal, self.huber_c))}


@dataclass(frozen=True, kw_only=True)
class LCM(Consistency):
    """Latent consistency: the student says the clean end of the whole path, and is sampled by ``LCMScheduler``.

    Source: Luo et al. 2023 (arXiv:2310.04378) section 4; with adapters arXiv:2311.05556. Unguided it is consistency distillation,
    Song et al. 2023 (arXiv:2303.01469) algorithm 2.

    Differs from the papers: flow models have no boundary scaling, which x0 = x - sigma u makes needless; the distance is that of
    Diffusers' training scripts, pseudo-Huber entry by entry.
    """

    def grid(self, times: Times) -> Grid:
        assert self.teacher_steps
        return times.trailing(self.teacher_steps, to_first=True)

    def end(self, found: Prediction, x: Tensor, level: Level, end: Level) -> Tensor:
        return boundary(found.x0, x, level.t) if end.sigma.any() else found.x0  # flow ends at clean data, betas at train time 0

    def inference(self, family) -> Inference:
        assert self.teacher_steps, "settled() knows the teacher's steps"
        return stochastic(family, self.calls, self.teacher_steps, self.exported_guidance)


@dataclass(frozen=True, kw_only=True)
class PCM(Consistency):
    """Phased consistency: one phase per call, and the student says where its phase ends; sampled by DDIM or Euler without noise.

    Source: Wang et al. 2024 (arXiv:2405.18407), without stochasticity at sampling.

    Differs from the paper: no adversarial loss; phases of equal length, whose edges are the times of the exported scheduler.
    """

    @property
    def phases(self) -> int:
        return self.calls

    def check(self, family) -> None:
        super().check(family)
        check_divides(family, self.calls)

    def grid(self, times: Times) -> Grid:
        assert self.teacher_steps
        return times.trailing(self.teacher_steps)

    def end(self, found: Prediction, x: Tensor, level: Level, end: Level) -> Tensor:
        return jump(found, end)

    def inference(self, family) -> Inference:
        return deterministic(family, self.calls, self.exported_guidance)


def boundary(x0: Tensor, x: Tensor, t: np.ndarray) -> Tensor:
    """c_skip x + c_out x0, which is ``x`` itself at train time 0.

    Source: Luo et al. 2023 (arXiv:2310.04378) section 4, with the scaled time of Diffusers.
    """
    c_skip = SIGMA_DATA**2 / ((TIMESTEP_SCALING * t) ** 2 + SIGMA_DATA**2)
    return column(c_skip, x) * x + column(np.sqrt(1 - c_skip), x) * x0


def most_steps(family: Any, calls: int, phases: int) -> int:
    """Of the teacher: 50 at 1,000 train times and 64 at 1,024, or the next fewer that make whole phases.

    Raises:
        ValueError: the train times cannot be cut so.
    """
    if family.process.frame == "flow":
        return calls * max(1, MOST_STEPS // calls)
    fit = [n for n in range(phases, max(MOST_STEPS, phases) + 1, phases) if family.process.num_train_timesteps % n == 0]
    if not fit:
        check_divides(family, phases)
    return fit[-1]
