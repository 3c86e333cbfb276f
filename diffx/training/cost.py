"""What an update costs before any is made: parameters, memory, network calls, counted on shapes without numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..conditioning.adapter import AdaptedFamily
from ..families import Family, batched
from ..objectives.objective import Batch, Moment, Objective
from .config import TrainConfig
from .draws import Draws
from .networks import Lora, Networks

MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2, "sgd": 0}  # of an optimizer, per trained number


@dataclass(frozen=True)
class Cost:
    """Per process; ``calls`` are network calls per example and update, by role, a guided pair counting two."""

    trained_parameters: int
    frozen_parameters: int
    weight_gb: float  # of all weights, gradients and moments; what passes through the networks comes on top
    calls: Mapping[str, float]
    calls_with_gradient: float

    def __str__(self) -> str:
        lines = [f"{'trained parameters':<22} {self.trained_parameters:>14,}", f"{'frozen parameters':<22} {self.frozen_parameters:>14,}"]
        lines.append(f"{'memory of weights':<22} {self.weight_gb:>11.2f} GB  (gradients and optimizer included, activations not)")
        lines += [f"{'calls of ' + role:<22} {count:>14.2f}  per example and update" for role, count in self.calls.items()]
        return "\n".join([*lines, f"{'of these, with gradient':<22} {self.calls_with_gradient:>13.2f}"])


def cost_of(family: Family, objective: Objective, lora: Lora | None, config: TrainConfig, size: tuple[int, int]) -> Cost:
    """What one update costs; the family's network is emptied of its numbers on the way."""
    nets = Networks(family, objective, lora, size=size)
    objective, condition = nets.objective, {**family.size_condition(size), **(family.null_condition(size=size) or {})}
    if isinstance(family, AdaptedFamily):
        condition |= family.encode_shown([family.shown(Image.new("RGB", (size[1], size[0])), None)])
    networks = {*nets.modules.values(), *family.frozen}
    numbers = {id(w): w for network in networks for w in network.parameters()}.values()
    trained = sum(weight.numel() for weight in numbers if weight.requires_grad)
    frozen = sum(weight.numel() for weight in numbers) - trained
    held = sum(weight.numel() * weight.element_size() for weight in numbers) + trained * (4 + MOMENT_BYTES[config.optimizer])
    counts: dict[str, float] = {}
    with_gradient = 0.0
    for network in networks:
        network.to("meta")
    nets.null = nets.null and {name: value.to("meta") for name, value in nets.null.items()}
    count = 2
    told = {name: value.to("meta") for name, value in batched(condition, count).items()}
    x0 = torch.zeros(count, *family.sample_shape(size), device="meta")
    rounds = 4 * objective.period
    output = nets.output

    def counted(role: str, x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        nonlocal with_gradient
        out = output(role, x, *rest, **more)
        counts[role] = counts.get(role, 0.0) + len(x) / count / rounds
        with_gradient += out.requires_grad * len(x) / count / rounds
        return out

    nets.output = counted  # type: ignore[method-assign]  # of this object alone
    for step in range(rounds):
        objective.losses(nets, Batch(x0, told, Draws(0, step, range(count))), Moment(step, 0))
    return Cost(trained, frozen, held / 2**30, counts, with_gradient)
