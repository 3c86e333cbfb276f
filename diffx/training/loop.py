"""The training loop, a generator: one optimizer step per ``yield``; logging, saving, measuring and stopping stay with the caller."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from torch import Tensor

from ..acceleration import set_attention
from ..families import Condition
from ..objectives.objective import Batch, Moment, Objective
from .config import TrainConfig
from .draws import Draws, batch_order, hashed
from .networks import Networks, placed_like, whole
from .summed import summed

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # what a mixed precision makes of attention calls


class Examples(Protocol):
    """Data with random access: clean samples and what the network is told of them, numbered group after group."""

    @property
    def group_sizes(self) -> Sequence[int]:
        """How many examples of each shape there are; those of a step all have one."""
        ...

    def read(self, indices: list[int]) -> tuple[Tensor, Condition]:
        """(B, ...) float32 samples and their conditions."""
        ...


@dataclass(frozen=True)
class Progress:
    """What one optimizer step came to; the means are over the batch of all processes."""

    step: int  # number of steps done
    stage: int
    losses: Mapping[str, float]  # by role
    logs: Mapping[str, float]
    grad_norms: Mapping[str, float]  # by role, before clipping
    lr: float
    seconds: float  # of this step


class Training:
    """A training under way: networks, optimizers and the number of steps done, which is all there is to save.

    Args:
        data: read by index; its order is a permutation per epoch that depends on the seed.
        accelerator: made by the caller, so that devices, precision and processes are accelerate's affair.

    Raises:
        ValueError: the batch does not divide among processes and parts.
    """

    def __init__(self, nets: Networks, data: Examples, config: TrainConfig, accelerator: Accelerator) -> None:
        self.nets, self.data, self.config, self.accelerator = nets, data, config, accelerator
        self.objective: Objective = nets.objective
        parts = accelerator.num_processes * config.gradient_accumulation_steps
        if config.batch_size % parts:
            raise ValueError(
                f"batch_size={config.batch_size} does not divide into {accelerator.num_processes} processes "
                f"x {config.gradient_accumulation_steps} gradient_accumulation_steps"
            )
        if config.train_steps % self.objective.stages:
            raise ValueError(f"train_steps={config.train_steps} does not divide into the method's {self.objective.stages} stages")
        # Not where weights lie in parts, which only their own layers put together.
        in_parts = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
        self.sums = nets.lora is not None and accelerator.mixed_precision == "no" and not in_parts
        self.step = 0
        self.stage_length = config.train_steps // self.objective.stages
        networks = dict.fromkeys([*nets.modules.values(), *nets.family.frozen])
        if config.gradient_checkpointing:
            for network in networks:
                as_model: Any = network
                as_model.enable_gradient_checkpointing()
        self.kernels: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if config.attention is not None:
            named = {f"network {i}": network for i, network in enumerate(networks)}
            calls: Any = {"device": accelerator.device, "dtype": AUTOCAST.get(accelerator.mixed_precision)}
            self.kernels = set_attention(named, config.attention, **calls, training=True)
        self.optimizers = self._place()

    def _place(self) -> dict[str, Any]:
        """Networks on the device, wrapped for the process group, and an optimizer per trained role."""
        nets, accelerator = self.nets, self.accelerator
        nets.null = nets.null and {name: value.to(accelerator.device) for name, value in nets.null.items()}
        placed: dict[int, Any] = {}
        optimizers: dict[str, Any] = {}
        for network in dict.fromkeys(nets.modules.values()):  # in the same order on every process
            roles = [role for role in self.objective.trains if nets.modules[role] is network]
            if len(roles) > 1:  # a step may leave some of the network's weights alone, which DDP else takes for an error
                handler: Any = DistributedDataParallelKwargs(find_unused_parameters=True)
                accelerator.ddp_handler = handler
            if roles:  # together: sharding replaces the weights that an optimizer holds
                placed[id(network)], *prepared = accelerator.prepare(network, *(self._make_optimizer(role) for role in roles))
                optimizers |= dict(zip(roles, prepared))
            else:
                placed[id(network)] = network.to(accelerator.device)
        nets.wrapped = {role: placed[id(network)] for role, network in nets.modules.items()}
        return optimizers

    def _make_optimizer(self, role: str) -> Any:
        config = self.config
        weights = [weight for weight in self.nets.parameters(role).values() if weight.requires_grad]
        options: dict[str, Any] = dict(lr=self.lr, weight_decay=config.weight_decay)
        match config.optimizer:
            case "sgd":
                made: Any = torch.optim.SGD(weights, **options)
            case "adamw_8bit":
                try:
                    from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]  # optional
                except ImportError as error:
                    raise ValueError('optimizer="adamw_8bit" needs the package bitsandbytes, which is not installed') from error
                made = AdamW8bit(weights, betas=config.adam_betas, **options)
            case "adamw":  # in one pass over each weight
                made = torch.optim.AdamW(weights, betas=config.adam_betas, fused=True, **options)
        return made

    @property
    def lr(self) -> float:
        """The full learning rate."""
        return self.config.lr or self.objective.default_lr

    def steps(self) -> Iterator[Progress]:
        """Train from where it stands to the end, yielding after every optimizer step.

        Raises:
            FloatingPointError: a loss or a gradient that is not finite; the step is not taken.
        """
        while self.step < self.config.train_steps:
            start = time.perf_counter()
            stage, inside = divmod(self.step, self.stage_length)
            if stage and not inside:
                self.nets.promote()
                for optimizer in self.optimizers.values():
                    optimizer.state.clear()
            lr = self.lr * self.config.lr_factor(inside, self.stage_length)
            losses, logs = self._accumulate(Moment(self.step, stage))
            norms = {role: self._clip(role) for role in losses}  # all of them, before any weight moves
            for role in losses:
                self._update(role, lr)
            if self.objective.ema_decay:
                self.nets.follow(self.objective.ema_decay)
            self.step += 1
            yield Progress(self.step, stage, losses, logs, norms, lr, time.perf_counter() - start)

    def _accumulate(self, now: Moment) -> tuple[dict[str, float], dict[str, float]]:
        """Gradients of all parts of the batch; the mean losses and logs of all processes, by name."""
        parts = self.config.gradient_accumulation_steps
        sums: dict[str, Tensor] = {}
        roles: list[str] = []
        for part in range(parts):
            places = self._places(part)
            torch.manual_seed(hashed(self.config.seed, now.step, places[0]) >> 1)  # of what a network itself may draw
            batch = self.batch(now.step, places)
            with contextlib.ExitStack() as stack:
                if self.sums:
                    stack.enter_context(summed(set(self.nets.modules.values())))
                if part < parts - 1:  # gradients meet the other processes' with the last part
                    for network in set(self.nets.wrapped.values()):
                        stack.enter_context(self.accelerator.no_sync(network))
                with self.accelerator.autocast():
                    losses = self.objective.losses(self.nets, batch, now)
                for role, loss in losses.items():
                    mean = loss.per_example.mean()
                    self.nets.act_as(role)
                    self.accelerator.backward(mean / parts)
                    for name, value in {role: mean, **{f"{role}/{k}": v for k, v in loss.logs.items()}}.items():
                        sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach() / parts
            roles = list(losses)
        means = {name: float(value) for name, value in self._over_processes(sums).items()}
        for role in roles:
            self._check(f"the {role}'s loss", means[role])
        return {role: means[role] for role in roles}, {name: value for name, value in means.items() if name not in roles}

    def _over_processes(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        stacked: Any = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="mean")
        return dict(zip(sums, stacked))

    def _check(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        examples = sorted(set(self._examples(self.step, range(self.config.batch_size))))
        raise FloatingPointError(
            f"{what} is {value} at step {self.step + 1}, on examples {examples[:16]}; "
            "nothing of this step was kept: lower lr, or look at those examples"
        )

    def _clip(self, role: str) -> float:
        """The global norm of a role's gradient, which is at most ``grad_clip`` from now on."""
        weights = [weight for group in self.optimizers[role].param_groups for weight in group["params"]]
        norm = self.accelerator.clip_grad_norm_(weights, self.config.grad_clip)
        if norm is None:
            return math.nan  # DeepSpeed clips in its own step
        if self.accelerator.scaler is None:  # which leaves out steps that are not finite, and tries a smaller scale
            self._check(f"the {role}'s gradient", float(norm))
        return float(norm)

    def _update(self, role: str, lr: float) -> None:
        optimizer = self.optimizers[role]
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def batch(self, step: int, places: range) -> Batch:
        """What a step sees at those places of its batch."""
        x0, condition = self.data.read(self._examples(step, places))
        device = self.accelerator.device
        return Batch(x0.to(device), {k: v.to(device) for k, v in condition.items()}, Draws(self.config.seed, step, places))

    def _examples(self, step: int, places: range) -> list[int]:
        return batch_order(self.config.seed, self.data.group_sizes, self.config.batch_size, step, places)

    def _places(self, part: int) -> range:
        """Of this process's part of the batch."""
        share = self.config.batch_size // self.accelerator.num_processes
        size = share // self.config.gradient_accumulation_steps
        first = self.accelerator.process_index * share + part * size
        return range(first, first + size)

    def result(self) -> tuple[Any, dict[str, Any]]:
        """(stock pipeline, call arguments) of the weights as they are now; the network in it is the one that is trained on."""
        role = self.nets.exported()
        self.nets.act_as(role)
        inference = self.objective.inference(self.nets.family)
        return self.nets.family.pipeline(self.nets.modules[role], inference.scheduler), inference.call_kwargs

    # --- all there is to save ---------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors by name, numbers): weights, optimizers, the step; from here ``load_state`` goes on bit for bit."""
        tensors = {f"weights/{name}": whole(weight).detach() for name, weight in self.nets.state().items()}
        numbers: dict[str, Any] = {}
        for role, optimizer in self.optimizers.items():
            for name, weight in self.nets.parameters(role).items():
                for key, value in optimizer.state.get(weight, {}).items():
                    if isinstance(value, Tensor):
                        tensors[f"optimizer/{role}/{name}/{key}"] = whole(value)
                    else:
                        numbers[f"optimizer/{role}/{name}/{key}"] = value
        return tensors, {"step": self.step, "numbers": numbers}

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """What ``state`` gave, put back."""
        self.step = state["step"]
        self.nets.load_state({name.removeprefix("weights/"): value for name, value in tensors.items() if name.startswith("weights/")})
        if self.step and not self.step % self.stage_length:
            return  # a stage begins, with optimizers of its own
        for role, optimizer in self.optimizers.items():
            saved: dict[int, dict[str, Any]] = {}
            trained = [(name, weight) for name, weight in self.nets.parameters(role).items() if weight.requires_grad]
            for i, (name, weight) in enumerate(trained):
                start = f"optimizer/{role}/{name}/"
                moments = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
                numbers = {key.removeprefix(start): value for key, value in state["numbers"].items() if key.startswith(start)}
                like_weight = {key: placed_like(weight, value) for key, value in moments.items() if value.shape == weight.shape}
                if moments or numbers:
                    saved[i] = numbers | moments | like_weight
            optimizer.load_state_dict({**optimizer.state_dict(), "state": saved})
