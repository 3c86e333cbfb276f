"""Distribution matching: the student's samples are moved to where the teacher finds them likelier than the student makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .diffusion import output_error
from .guidance import check_calls
from .level import Level, Prediction, column, noised
from .objective import Batch, Inference, Loss, Moment, Objective
from .sampling import check_divides, stochastic
from .weights import absolute, squared


@dataclass(frozen=True, kw_only=True)
class DMD2(Objective):
    """DMD2 without its discriminator, for one call and for few: no clean data is needed, only what the network is told.

    A second network, "fake", learns to denoise what the student makes. Where the teacher denoises the same otherwise, the
    difference says how to make it likelier.

    Args:
        calls: of the student; each is trained on the student's own samples after the calls before it.
        fake_steps: updates of "fake" between two of the student.
        guidance_scale: of the teacher; 1 is off.
        times: range of the noise at which both are compared, as shares of all train times.

    Source: Yin et al. 2024 (arXiv:2405.14867) section 4; the gradient and its norm are Yin et al. 2023 (arXiv:2311.18828) section 3.2.

    Differs from the paper: no discriminator; every sample of a batch has its own number of calls behind it.
    """

    trains: ClassVar[tuple[str, ...]] = ("student", "fake")
    default_lr: ClassVar[float] = 1e-5
    calls: int = 1
    fake_steps: int = 5
    guidance_scale: float = 1.0
    times: tuple[float, float] = (0.02, 0.98)

    def __post_init__(self) -> None:
        check_calls(self.calls)
        if self.fake_steps < 1:
            raise ValueError(f"fake_steps={self.fake_steps} must be at least 1: the fake network has to know what the student makes")
        if not 0 <= self.times[0] < self.times[1] <= 1:
            raise ValueError(f"times={self.times} must be a rising pair between 0 and 1")

    @property
    def period(self) -> int:
        return self.fake_steps + 1

    def check(self, family) -> None:
        super().check(family)
        check_divides(family, self.calls)

    def losses(self, nets, batch: Batch, now: Moment) -> dict[str, Loss]:
        x, level = self.rollout(nets, batch)
        rest = now.step % self.period < self.fake_steps
        with torch.set_grad_enabled(not rest):
            x0 = nets.predict("student", x, level, batch.condition).x0
        noise = batch.draws.normal("noise", x0)
        if rest:
            level = nets.times.between(batch.draws.uniform("time"))
            error = output_error(nets, "fake", noised(x0, noise, level), level, batch.condition, Prediction(x0, noise))
            return {"fake": Loss(squared(error))}
        level = nets.times.between(batch.draws.uniform("time", *self.times))
        x = noised(x0, noise, level).detach()
        with torch.no_grad():
            fake = nets.predict("fake", x, level, batch.condition)
            real = nets.guided("teacher", x, level, batch.condition, np.full(len(batch), self.guidance_scale))
        return {"student": Loss(matching_loss(x0, fake.x0, real.x0))}

    @torch.no_grad()
    def rollout(self, nets, batch: Batch) -> tuple[Tensor, Level]:
        """Where the student is asked: pure noise, or its own samples after some calls, noised again as its sampler does."""
        grid = nets.times.trailing(self.calls)
        done = batch.draws.integers("call", 0, self.calls)
        x = batch.draws.normal("start", batch.x0)
        for k in range(self.calls - 1):  # on every process as often, which sharded weights need
            here, there = grid.at(np.full(len(batch), k)), grid.at(np.full(len(batch), k + 1))
            further = noised(nets.predict("student", x, here, batch.condition).x0, batch.draws.normal(f"call {k}", x), there)
            x = torch.where(column(done > k, x).bool(), further, x)
        return x, grid.at(done)

    def inference(self, family) -> Inference:
        return stochastic(family, self.calls, self.calls)


def matching_loss(x0: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """(B,) a loss whose gradient by ``x0`` is (fake - real) / mean |x0 - real|, over the number of entries.

    Source: Yin et al. 2023 (arXiv:2311.18828) section 3.2, the difference of the two scores times sigma^2 / alpha.

    Args:
        x0: (B, ...) the student's samples.
        fake, real: (B, ...) what the fake network and the teacher make of them after noising.
    """
    scale = absolute(x0.detach() - real).clamp(min=1e-4).view(-1, *[1] * (x0.ndim - 1))
    goal = (x0 - (fake - real) / scale).detach()
    return 0.5 * squared(x0 - goal)
