"""Diffusers' own guiders as rules."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from diffusers.guiders.guider_utils import BaseGuidance
from torch import Tensor

from .moment import Moment
from .rule import Rule


@dataclass(frozen=True, eq=False)
class Stock(Rule):
    """A guider of ``diffusers.guiders`` that combines a conditional and an unconditional prediction; it is copied for each run.

    Raises:
        ValueError: a guider that needs other predictions, or the network changed.
    """

    guider: BaseGuidance

    def __post_init__(self) -> None:
        kind: Any = type(self.guider)
        if kind._input_predictions != ["pred_cond", "pred_uncond"]:
            raise ValueError(
                f"{kind.__name__} combines {', '.join(kind._input_predictions)}; a pipeline's own network calls give pred_cond and "
                "pred_uncond only"
            )
        if kind.prepare_models is not BaseGuidance.prepare_models:
            raise ValueError(f"{kind.__name__} changes the network between the two predictions, which a pipeline makes in one call")

    def needs_uncond(self, moment: Moment) -> bool:
        return self._at(moment).num_conditions > 1

    def _at(self, moment: Moment) -> Any:
        guider = moment.run.memory.setdefault(self, copy.copy(self.guider))
        if guider._step != moment.call:
            guider.set_state(moment.call, moment.run.num_calls, moment.t)
            guider.prepare_inputs({})  # of no data: it resets what is kept from call to call
        return guider

    def __call__(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        return self._at(moment).forward(cond, uncond).pred
