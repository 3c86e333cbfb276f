"""The numbers of a training run, checked before any work."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Schedule = Literal["constant", "linear", "cosine"]
Optimizer = Literal["adamw", "adamw_8bit", "sgd"]
Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Every field has a unit or a range, and there is no field that nothing reads."""

    train_steps: int = 1000  # optimizer steps of the whole run, over all stages
    batch_size: int = 16  # examples per optimizer step, over all processes and accumulated parts
    gradient_accumulation_steps: int = 1  # parts of a process's share that go through the network one after the other
    lr: float | None = None  # learning rate; None is the method's own
    lr_schedule: Schedule = "constant"  # "linear" and "cosine" fall to 0 over each stage
    warmup_steps: int = 0  # of each stage, in which the rate rises from 0
    optimizer: Optimizer = "adamw"  # "adamw_8bit" needs bitsandbytes
    weight_decay: float = 0.0  # each step also takes lr times this times the weights from them; in "sgd" it joins the gradient
    adam_betas: tuple[float, float] = (0.9, 0.999)  # decay per step of Adam's averages of the gradient and of its square
    grad_clip: float = 1.0  # maximum global L2 norm; inf switches it off
    mixed_precision: Precision = "no"  # "bf16" or "fp16" inside the networks' calls; weights and optimizers keep their own
    attention: str | None = None  # kernel of attention calls: "auto", or Diffusers' name of one; None leaves each model's own
    gradient_checkpointing: bool = False  # less memory, a third more time
    seed: int = 0  # of noise, noise levels and the order of the data; given once, it is also that of its cuts and generated samples
    save_every: int = 500  # optimizer steps between checkpoints; the last step is always saved
    evaluate_every: int = 0  # steps between measurements and sample sheets; 0 only at the end
    patience: int = 0  # measurements without a better one after which the run ends; 0 goes on to train_steps

    def __post_init__(self) -> None:
        for name in ("train_steps", "batch_size", "gradient_accumulation_steps", "save_every"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.patience < 0 or (self.patience and not self.evaluate_every):
            raise ValueError(f"patience={self.patience} counts measurements: at least 0, and with evaluate_every, the steps between them")
        for name, allowed in (("lr_schedule", Schedule), ("optimizer", Optimizer), ("mixed_precision", Precision)):
            if (value := getattr(self, name)) not in get_args(allowed):
                raise ValueError(f"{name}={value!r} is not one of {', '.join(get_args(allowed))}")
        if self.attention is not None:
            from ..acceleration.kernels import check_known  # Diffusers takes seconds to import, and help needs the fields only

            check_known(self.attention)
        if self.warmup_steps > self.train_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} is longer than the run (train_steps={self.train_steps})")
        if not self.grad_clip > 0:
            raise ValueError(f"grad_clip={self.grad_clip} must be positive; inf switches it off")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr={self.lr} must be positive")

    def lr_factor(self, step: int, length: int) -> float:
        """The learning rate of step 0, 1, ... of a stage of ``length`` steps, as a factor."""
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        match self.lr_schedule:
            case "constant":
                return rise
            case "linear":
                return rise * (1 - step / length)
            case "cosine":
                return rise * 0.5 * (1 + math.cos(math.pi * step / length))
