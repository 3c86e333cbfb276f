"""Progressive distillation: a student learns in one step what its teacher does in two, and becomes the next teacher."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .level import Level, column, jump, noised
from .objective import Batch, Inference, Loss, Moment, Objective
from .sampling import check_divides, deterministic
from .weights import squared, truncated_snr


@dataclass(frozen=True, kw_only=True)
class Progressive(Objective):
    """Halve the number of calls from ``start``, the teacher's, to ``end``, in stages of equal length.

    Args:
        start, end: calls; start / end is a power of two.
        guidance_scale: of the teacher in the first stage, after which no guidance is needed; 1 is off.

    Source: Salimans and Ho 2022 (arXiv:2202.00512) algorithm 2; guidance inside the teacher is Meng et al. 2023 (arXiv:2210.03142).

    Differs from the paper: no stage is longer than another; guidance is not distilled in a stage of its own.
    """

    start: int
    end: int
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        ratio = self.start / self.end if self.end > 0 else 0
        if self.end < 1 or ratio < 2 or 2 ** round(np.log2(ratio)) != ratio:
            raise ValueError(f"start={self.start}, end={self.end}: start must be end times 2, 4, 8, ...")

    default_lr = 3e-4

    @property
    def stages(self) -> int:
        return round(np.log2(self.start / self.end))

    def check(self, family) -> None:
        super().check(family)
        check_divides(family, self.end)

    def losses(self, nets, batch: Batch, now: Moment) -> dict[str, Loss]:
        calls = self.start // 2 ** (now.stage + 1)
        fine = nets.times.trailing(self.start).every(self.start // (2 * calls))  # the teacher's
        i = 2 * batch.draws.integers("call", 0, calls)
        level, middle, end = fine.at(i), fine.at(i + 1), fine.at(i + 2)
        x = noised(batch.x0, batch.draws.normal("noise", batch.x0), level)
        scale = np.full(len(batch), self.guidance_scale if now.stage == 0 else 1.0)
        first = nets.guided("teacher", x, level, batch.condition, scale)
        x_middle = jump(first, middle)
        second = nets.guided("teacher", x_middle, middle, batch.condition, scale)
        goal = progressive_target(x, jump(second, end), level, end)
        found = nets.predict("student", x, level, batch.condition)
        weight = column(truncated_snr(level.snr), x).flatten()
        return {"student": Loss(weight * squared(found.x0 - goal))}

    def inference(self, family) -> Inference:
        return deterministic(family, self.end)


def progressive_target(x: Tensor, x_end: Tensor, level: Level, end: Level) -> Tensor:
    """The x0 with which one step from ``x`` lands where two steps of the teacher landed.

    Source: Salimans and Ho 2022 (arXiv:2202.00512) algorithm 2.

    Args:
        x: (B, ...) input of the student, at ``level``.
        x_end: (B, ...) the teacher's point after two steps, at ``end``.
    """
    keep = end.sigma / level.sigma
    gain = end.alpha - keep * level.alpha
    return (x_end - column(keep, x) * x) / column(gain, x)
