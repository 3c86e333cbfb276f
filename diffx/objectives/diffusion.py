"""Ordinary diffusion and flow training: noise a sample, ask what was there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from .level import Level, Prediction, Times, column, noised, to_output
from .objective import Batch, Inference, Loss, Moment, Objective
from .weights import absolute, pseudo_huber, squared

Distance = Literal["mse", "l1", "huber"]
TimeSampling = Literal["uniform", "gaussian", "logit_normal"]
Weighting = Literal["unit", "min_snr", "edm"]


@dataclass(frozen=True, kw_only=True)
class Diffusion(Objective):
    """Train a model on data, from where it stands or from random weights.

    Args:
        distance: of the network's output from its target.
        huber_c: of "huber", in units of the output.
        times: how train times are drawn: evenly, normally around the middle one, or as the logistic function of a normal number.
        times_mean, times_std: of that normal number: in units of all train times for "gaussian", of the logit otherwise.
        weighting: of a sample's loss; ``min_snr`` clips at 5.
        offset_noise: standard deviation of noise that is the same at all pixels of a channel; 0 is none.
        condition_dropout: share of samples about which the network is told nothing, so that it can be guided.

    Source: Ho et al. 2020 (arXiv:2006.11239) eq. 14; v is Salimans and Ho 2022 (arXiv:2202.00512); flow is Lipman et al. 2023
    (arXiv:2210.02747) and its logit-normal times Esser et al. 2024 (arXiv:2403.03206) eq. 19; min-SNR is Hang et al. 2023
    (arXiv:2303.09556); EDM's weight is Karras et al. 2022 (arXiv:2206.00364) table 1 with sigma_data = 1; dropout is Ho and
    Salimans 2022 (arXiv:2207.12598).

    Differs from the papers: flow times are not shifted by picture size.
    """

    has_teacher: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-4
    ema_decay: float | None = 0.999
    distance: Distance = "mse"
    huber_c: float = 0.1
    times: TimeSampling = "uniform"
    times_mean: float | None = None
    times_std: float | None = None
    weighting: Weighting = "unit"
    offset_noise: float = 0.0
    condition_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name, allowed in (("distance", Distance), ("times", TimeSampling), ("weighting", Weighting)):
            if (value := getattr(self, name)) not in get_args(allowed):
                raise ValueError(f"{name}={value!r} is not one of {', '.join(get_args(allowed))}")
        for name, low, high in (("condition_dropout", 0, 1), ("ema_decay", 0, 1), ("offset_noise", 0, 1)):
            if not low <= (value := getattr(self, name)) <= high:
                raise ValueError(f"{name}={value} must lie between {low} and {high}")
        if not self.huber_c > 0:
            raise ValueError(f"huber_c={self.huber_c} must be positive: the gradient of a plain norm is NaN where both agree")

    def losses(self, nets: Any, batch: Batch, now: Moment) -> dict[str, Loss]:
        level = self.sample_level(nets.times, batch)
        noise = batch.draws.normal("noise", batch.x0)
        if self.offset_noise:
            noise = noise + self.offset_noise * batch.draws.normal("offset", batch.x0[:, :, *[slice(0, 1)] * (batch.x0.ndim - 2)])
        x = noised(batch.x0, noise, level)
        condition = nets.dropout(batch, self.condition_dropout)
        difference = output_error(nets, "student", x, level, condition, Prediction(batch.x0, noise))
        match self.distance:
            case "mse":
                distance = squared(difference)
            case "l1":
                distance = absolute(difference)
            case "huber":
                distance = pseudo_huber(difference, self.huber_c)
        weight = self.weight(level, nets.family.process.prediction_type)
        return {"student": Loss(column(weight, distance) * distance)}

    def sample_level(self, times: Times, batch: Batch) -> Level:
        """(B,) levels at random train times."""
        match self.times:
            case "uniform":
                share = batch.draws.uniform("time")
            case "gaussian":
                mean, std = self.times_mean or 0.5, self.times_std or 0.25
                share = np.clip(batch.draws.gaussian("time", mean, std), 0, 1)
            case "logit_normal":
                share = 1 / (1 + np.exp(-batch.draws.gaussian("time", self.times_mean or 0.0, self.times_std or 1.0)))
        return times.between(share)

    def weight(self, level: Level, prediction_type: str) -> np.ndarray:
        """(B,) factors of the squared error of the network's output."""
        if self.weighting == "unit":
            return np.ones(len(level))
        snr = level.snr
        # An error of x0 weighed by w is an error of the output weighed by w / |d out / d x0|^2.
        per_x0 = {"epsilon": snr, "sample": np.ones_like(snr), "v_prediction": snr + 1, "flow_prediction": 1 / level.sigma**2}[
            prediction_type
        ]
        of_x0 = np.minimum(snr, 5.0) if self.weighting == "min_snr" else 1 + snr
        return np.divide(of_x0, per_x0, out=np.zeros_like(snr), where=per_x0 > 0)

    def inference(self, family: Any) -> Inference:
        scheduler: SchedulerMixin = family.pipe.scheduler
        return Inference(scheduler, family.call_kwargs(50, 3.0 if family.guidable else 1.0))


def output_error(
    nets: Any, role: str, x: Tensor, level: Level, condition: Any, wanted: Prediction, guidance: np.ndarray | None = None
) -> Tensor:
    """(B, ...) the output of a role's network on ``x`` less the one that would say ``wanted``."""
    out = nets.output(role, x, level, condition, guidance)
    return out - to_output(wanted.x0, wanted.eps, level, nets.family.process.prediction_type)
