"""The networks of one training by role: whole copies, or adapters on one base."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..families import Condition, Family, batched, joined
from ..loading import EMBEDDED_SAMPLERS
from ..objectives.level import Level, Prediction, Times, from_output, guided
from ..objectives.objective import Batch, Objective

TEACHER, STUDENT, TARGET = "teacher", "student", "target"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters: ``alpha`` (None: the rank) is the factor times the rank, ``targets`` (None: the family's) ends of layer names.

    ``start`` is the folder of a LoRA of the same kind whose weights they begin with, or "emoji_progressive_4"; None begins with a
    change of nothing.

    Source: Hu et al. 2021 (arXiv:2106.09685) eq. 3.
    """

    rank: int
    alpha: float | None = None
    targets: Sequence[str] | None = None
    start: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora_rank={self.rank} must be at least 1; None trains the whole network")


class Networks:
    """Every network of a training, by role: those that are trained, "teacher", and "target", the average of the student.

    With ``lora`` all are adapters on one base, and the teacher is the base with none (after the first stage, with one of its
    own): memory holds the base once. Without, each role is a network of its own. "target" without an average is the student.

    ``wrapped`` holds what is called in a role's place, once a process group or a precision has wrapped it.
    """

    def __init__(self, family: Family, objective: Objective, lora: Lora | None, *, size: tuple[int, int]) -> None:
        objective = objective.settled(family, lora is not None)
        self.family, self.objective, self.lora = family, objective, lora
        self.times = Times(family.process)
        self.null = family.null_condition(size=size)
        base = family.base.requires_grad_(False)
        foreign = objective.modules(family)
        own = [role for role in [*objective.trains, *([TARGET] if objective.ema_decay else [])] if role not in foreign]
        self.modules: dict[str, nn.Module] = {}
        self.adapters: tuple[str, ...] = ()
        if lora:
            base = objective.build(family, base)
            if objective.has_teacher and objective.stages > 1:
                own.append(TEACHER)
            self.adapters = tuple(own)
            add_adapters(base, own, lora, family)
            self.modules = {role: base for role in {*own, TEACHER, STUDENT}}
        else:
            self.modules = {role: objective.build(family, copy.deepcopy(base)) for role in own}
            if objective.has_teacher:  # that a student will replace needs weights of its own
                self.modules[TEACHER] = copy.deepcopy(base) if objective.stages > 1 else base
            for role in own:
                self.modules[role].requires_grad_(role in objective.trains)
        self.modules |= {role: network.requires_grad_(True) for role, network in foreign.items()}
        for network in set(self.modules.values()):
            network.eval()  # no dropout: two networks are compared on one input
        self.wrapped: dict[str, Any] = dict(self.modules)

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """What is particular to a role, by name: its adapter's weights, or all of its network's."""
        named = self.modules[role].named_parameters()
        if role not in self.adapters:
            return dict(named)
        return {name: weight for name, weight in named if f".{role}." in name and "lora_" in name}

    def predict(self, role: str, x: Tensor, level: Level, condition: Condition, guidance: np.ndarray | None = None) -> Prediction:
        """What a role's network says of ``x`` (B, ...) at ``level``, told ``condition`` and, where it takes one, the guidance scale (B,).

        No gradient flows through roles that are not trained.
        """
        return from_output(self.output(role, x, level, condition, guidance), x, level, self.family.process.prediction_type)

    def output(self, role: str, x: Tensor, level: Level, condition: Condition, guidance: np.ndarray | None = None) -> Tensor:
        """The same as the network says it: (B, ...) float32 of the type that ``process.prediction_type`` names."""
        told = None if guidance is None else torch.as_tensor(guidance, dtype=torch.float32, device=x.device)
        t = torch.as_tensor(level.t, dtype=torch.float32, device=x.device)
        with self._calling(role) as network:
            return self.family.forward(network, x, t, condition, told).float()

    def guided(self, role: str, x: Tensor, level: Level, condition: Condition, scale: np.ndarray) -> Prediction:
        """The same under classifier-free guidance, both halves in one batch; one half where no scale differs from 1."""
        if self.null is None or np.all(scale == 1):
            return self.predict(role, x, level, condition)
        twice = Level(*(np.concatenate([part, part]) for part in (level.t, level.alpha, level.sigma)))
        null = {k: v.to(x.device) for k, v in batched(self.null, len(x)).items()}
        both = joined(condition, {**condition, **null})
        found = self.predict(role, torch.cat([x, x]), twice, both)
        (x0, x0_null), (eps, eps_null) = found.x0.chunk(2), found.eps.chunk(2)
        return guided(Prediction(x0, eps), Prediction(x0_null, eps_null), scale)

    def dropout(self, batch: Batch, share: float) -> Condition:
        """The batch's condition with nothing said of that share of its samples, and parts left out as the family's ``dropouts`` say."""
        condition = self.without(batch.condition, batch.draws.uniform("dropout") < share)
        for word, (part, is_part) in self.family.dropouts.items():
            condition = self.without(condition, batch.draws.uniform(f"dropout/{word}") < part, is_part)
        return condition

    def without(self, condition: Condition, dropped: np.ndarray, is_part: Callable[[str], bool] = lambda name: True) -> Condition:
        """``condition`` with nothing said of the samples in ``dropped`` (B,), a mask, in the names of a part of it."""
        if self.null is None or not dropped.any():
            return condition
        mask = torch.as_tensor(dropped)
        made = dict(condition)
        for name, null in self.null.items():
            if not is_part(name):
                continue
            value = condition[name]
            rows = mask.to(value.device).view(-1, *[1] * (value.ndim - 1))
            made[name] = torch.where(rows, null.to(value.device), value)
        return made

    @contextlib.contextmanager
    def _calling(self, role: str) -> Iterator[Any]:
        trained = role in self.objective.trains
        if role == TARGET and TARGET not in self.modules and TARGET not in self.adapters:
            role = STUDENT
        with contextlib.nullcontext() if trained else torch.no_grad():
            if self.lora is not None:
                use_adapter(self.modules[role], role if role in self.adapters else None)
            yield self.wrapped[role]

    def act_as(self, role: str) -> None:
        """Let the base act as that role: before it is used from outside, and before a backward pass, in which gradient
        checkpointing runs the network again."""
        if self.lora is not None:
            use_adapter(self.modules[role], role)

    def release(self) -> None:
        """Let the exported weights require gradients, as those do that loaders make: a product of small matrices is summed in another
        order where they do not, and its last bit would differ from that of the saved model."""
        for weight in self.parameters(self.exported()).values():
            weight.requires_grad_(True)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the average a step towards the student: target = decay * target + (1 - decay) * student."""
        average = self.parameters(TARGET)
        for name, weight in self.parameters(STUDENT).items():
            goal = average[self._named(name, STUDENT, TARGET)]
            assign(goal, torch.lerp(whole(goal), whole(weight).to(goal.dtype), 1 - decay))

    @torch.no_grad()
    def promote(self) -> None:
        """The student, or its average where one is kept, becomes the teacher, and the next stage's student starts there."""
        best = self.exported()
        for role in {TEACHER, *self.objective.trains} - {best}:
            goal = self.parameters(role)
            for name, weight in self.parameters(best).items():
                assign(goal[self._named(name, best, role)], whole(weight))

    def _named(self, name: str, role: str, other: str) -> str:
        return name if self.lora is None else name.replace(f".{role}.", f".{other}.")

    def exported(self) -> str:
        """The role whose weights are the result."""
        return TARGET if self.objective.ema_decay else STUDENT

    def state(self) -> dict[str, Tensor]:
        """All weights that training changes, by "role/name"."""
        roles = [*self.objective.trains, *([TARGET] if self.objective.ema_decay else [])]
        if self.objective.has_teacher and self.objective.stages > 1:
            roles.append(TEACHER)
        return {f"{role}/{name}": weight for role in roles for name, weight in self.parameters(role).items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """What ``state`` gave, put back in place."""
        mine = self.state()
        assert mine.keys() == state.keys(), "a checkpoint's config was compared before"
        for name, weight in mine.items():
            assign(weight, state[name])


def whole(value: Tensor) -> Tensor:
    """All of a tensor that may lie in parts on several processes."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def placed_like(goal: Tensor, value: Tensor) -> Tensor:
    """``value`` on the device of ``goal``, and in parts on several processes if ``goal`` is."""
    value = value.to(goal.device)
    return distribute_tensor(value, goal.device_mesh, goal.placements) if isinstance(goal, DTensor) else value


def assign(goal: Tensor, value: Tensor) -> None:
    """Write all of ``value`` into ``goal``."""
    goal.copy_(placed_like(goal, value))


def add_adapters(network: nn.Module, roles: Sequence[str], lora: Lora, family: Family) -> None:
    """Put one adapter per role into the network; all start with the same numbers.

    Raises:
        ValueError: no layer's name ends like one of the targets, or ``lora.start`` holds no such adapter.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    targets = list(lora.targets or family.lora_targets)
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not any(name == end or name.endswith(f".{end}") for name in names for end in targets):
        raise ValueError(
            f"lora_targets={targets} match no layer of {type(network).__name__}; its layers end in "
            f"{', '.join(sorted({name.rsplit('.', 1)[-1] for name in names}))}"
        )
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha or lora.rank, target_modules=targets)  # type: ignore[arg-type]  # floats work
    for role in roles:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inject_adapter_in_model(config, network, adapter_name=role)
        if lora.start is not None:
            set_peft_model_state_dict(network, saved_adapter(lora, network, role, family), adapter_name=role)
    for role in roles:
        for name, weight in network.named_parameters():
            if f".{role}." in name:
                weight.requires_grad_(role not in (TEACHER, TARGET))


def saved_adapter(lora: Lora, network: Any, role: str, family: Family) -> dict[str, Tensor]:
    """The weights in the folder ``lora.start``, by the names of PEFT.

    Raises:
        ValueError: they do not load, or are not those of this adapter: the message says what differs.
    """
    from peft import get_peft_model_state_dict

    assert lora.start is not None
    source = EMBEDDED_SAMPLERS.get(lora.start, lora.start)
    try:
        loaded: Any = type(family.pipe).lora_state_dict(source, return_lora_metadata=True, local_files_only=True)
        state, config = loaded[0], loaded[-1] or {}
    except (OSError, ValueError) as error:
        raise ValueError(f"lora_start={lora.start!r} holds no LoRA that Diffusers reads ({error})") from error
    part = f"{family.network}."
    state = {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
    mine = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(network, adapter_name=role).items()}
    theirs = {name: tuple(value.shape) for name, value in state.items()}
    alpha = config.get(f"{part}lora_alpha", lora.alpha or lora.rank)
    if mine != theirs or alpha != (lora.alpha or lora.rank):
        other = next((name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)), None)
        differs = f"{other} is {theirs.get(other)} there, {mine.get(other)} here" if other else f"its alpha is {alpha:g}"
        raise ValueError(f"lora_start={lora.start!r} is another kind of adapter ({differs}); give its rank, alpha and targets")
    return state


def use_adapter(network: nn.Module, role: str | None) -> None:
    """Make one adapter act, or none; what is trained stays trainable, which PEFT's own switch changes."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            layer._disable_adapters = role is None
            if role is not None:
                layer._active_adapter = role
