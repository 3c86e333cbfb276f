"""``set_attention``: one switch for the attention kernels of any model or pipeline, per model, said aloud and exactly undone."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from .kernels import AUTO, KERNELS, NATIVE, Kind, candidates, check_known, find, is_from_hub, requirement, trial
from .routing import Route, Routing, is_routable, processor_of, stock_of


@dataclass(frozen=True)
class Choice:
    """What the attentions of one model that have heads of one width use, and ``why``.

    ``kernel`` serves their calls of ``dtype`` on ``device``, ``masked`` those with a mask, and PyTorch's own all others. ``refused``
    has the reason for each kernel that was considered before it, and ``failed`` names those of them that were tried. ``unreached``
    counts attentions whose processors calculate everything themselves, by class; they stay as they are.
    """

    model: str  # name in the pipeline, or class
    attentions: int
    head_dim: int  # 0 where it is not known
    dtype: str
    device: str
    kernel: str
    why: str
    masked: str
    refused: Mapping[str, str]
    failed: tuple[str, ...]
    unreached: Mapping[str, int]

    def __str__(self) -> str:
        masked = "" if self.masked == self.kernel else f", with a mask {self.masked}"
        where = f"{self.attentions} attentions {self.head_dim} wide, {self.dtype} on {self.device}"
        lines = [f"{self.model}, {where}: {self.kernel} ({self.why}){masked}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join([*lines, *(f"  as they are: {count} with {name}" for name, count in self.unreached.items())])


def set_attention(
    model: Any, kernel: str = AUTO, *, device: Any = None, dtype: torch.dtype | None = None, training: bool = False
) -> AttentionKernels:
    """An attention kernel for a model, or each model of a pipeline: UNets, ControlNets, transformers, VAEs, with their IP-Adapters.

    Call it where the model is and as it will run. Weights and saved files stay as they are; what is loaded into the model later, such
    as an IP-Adapter, uses the kernel, too. A model that joins the pipeline later, such as a ControlNet, needs a call of its own.
    Diffusers' process-wide choice is neither used nor changed.

    Args:
        model: a pipeline of Diffusers, a model, or several by name.
        kernel: "auto" is the first that runs of those for the device (the table is in ``diffx.acceleration.kernels``); or Diffusers'
            name of one, and one from the Hub ("flash_hub") is downloaded and run. Attentions that it does not serve are PyTorch's
            own, with a warning.
        device, dtype: of the calls; None is where the model is and what its weights are. Under autocast the dtype is autocast's.
        training: gradients are needed, too.

    Example:
        >>> print(set_attention(pipe, "auto"))
        >>> with set_attention(pipe, "xformers"):
        ...     image = pipe("red apple").images[0]

    Raises:
        ValueError: there is no such kernel, it serves no attention of the model, or the model has none.
    """
    groups = _groups(model)
    choices = _chosen(groups, model, kernel, device, dtype, training, download=True)
    unfit: dict[str, list[str]] = {}
    for choice in choices:
        where = f"{choice.model} ({choice.head_dim} wide)"
        for name in choice.failed if kernel == AUTO else choice.refused:
            unfit.setdefault(f"{name} ({choice.refused[name]})", []).append(where)
        for name in choice.unreached if choice.kernel != NATIVE else ():
            unfit.setdefault(f"{choice.kernel} ({name} calculates attention itself)", []).append(where)
    if unfit:
        said = "; ".join(f"{what} for {', '.join(where)}" for what, where in unfit.items())
        warnings.warn(f"attention kernels that cannot be used: {said}; the result, printed, says what is used", stacklevel=2)
    return AttentionKernels(groups, choices)


def choose_attention(
    model: Any, kernel: str = AUTO, *, device: Any = None, dtype: torch.dtype | None = None, training: bool = False
) -> tuple[Choice, ...]:
    """What ``set_attention`` would use, and why; nothing is set, and nothing downloaded: a Hub kernel that fits is named untried.

    Raises:
        ValueError: as ``set_attention``.
    """
    return _chosen(_groups(model), model, kernel, device, dtype, training, download=False)


class AttentionKernels:
    """What ``set_attention`` gives: ``choices`` say what is used, ``undo`` or the end of ``with`` leaves the models as they were."""

    def __init__(self, groups: list[_Group], choices: tuple[Choice, ...]) -> None:
        self.choices = choices
        routes: dict[nn.Module, Route] = {}
        for group, choice in zip(groups, choices, strict=True):
            route = Route(
                choice.kernel,
                head_dim=choice.head_dim,
                dtype=getattr(torch, choice.dtype),
                device_type=torch.device(choice.device).type,
                takes_masks=choice.masked == choice.kernel,
            )
            routes |= dict.fromkeys(group.attentions, route)
        self._routing: Routing | None = Routing(routes)

    def undo(self) -> None:
        """Leave the models as they were: the same processors, and outputs bit for bit. A second time it does nothing.

        Raises:
            ValueError: ``set_attention`` was called on the same model again; that comes first.
        """
        if self._routing is None:
            return
        if not self._routing.is_topmost:
            raise ValueError("set_attention was called again on the same model, and that is in force; undo the later one first")
        self._routing.undo()
        self._routing = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()

    def __str__(self) -> str:
        return "\n".join(map(str, self.choices))


@dataclass(frozen=True)
class _Group:
    """The attentions of one model that have weights of one dtype and heads of one width."""

    name: str
    dtype: torch.dtype
    head_dim: int
    device: torch.device
    attentions: list[nn.Module]


def _groups(model: Any) -> list[_Group]:
    """The attentions of what ``set_attention`` takes.

    Raises:
        ValueError: it holds no model, or none of its attentions can be given a kernel.
    """
    parts = model.components if isinstance(model, DiffusionPipeline) else model
    parts = parts if isinstance(parts, Mapping) else {type(parts).__name__: parts}
    networks = {part: name for name, part in parts.items() if isinstance(part, nn.Module)}
    if not networks:
        raise ValueError(f"{type(model).__name__} is no model; give a pipeline of Diffusers or one of its models")
    found: dict[tuple[str, torch.dtype, int], _Group] = {}
    for network, name in networks.items():
        for module in network.modules():
            if processor_of(module) is not None:
                weights = next(weight for part in (module, network) for weight in part.parameters() if weight.is_floating_point())
                key = name, weights.dtype, _head_dim(module)
                found.setdefault(key, _Group(*key, weights.device, [])).attentions.append(module)
    classes = Counter(stock_of(processor_of(module)) for group in found.values() for module in group.attentions)
    if not any(map(is_routable, classes)):
        why = f"all are calculated by {', '.join(cls.__name__ for cls in classes)}" if classes else "there is none"
        raise ValueError(
            f"{type(model).__name__} has no attention that can be given another kernel ({why}); where processors for slices or xFormers "
            "are in the way, model.set_attn_processor(AttnProcessor2_0()) puts Diffusers' usual ones in"
        )
    return list(found.values())


def _chosen(
    groups: list[_Group], model: Any, kernel: str, device: Any, dtype: torch.dtype | None, training: bool, *, download: bool
) -> tuple[Choice, ...]:
    check_known(kernel)
    made: list[Choice] = []
    for group in groups:
        where = torch.device(device or getattr(model, "_execution_device", group.device))  # weights may wait elsewhere
        kind = Kind(where, dtype or group.dtype, _heads(group.attentions[0]), group.head_dim, training)
        names = candidates(where) if kernel == AUTO else (kernel,)
        found = find(names, kind, download=download)
        classes = Counter(stock_of(processor_of(module)) for module in group.attentions)
        choice = Choice(
            model=group.name,
            attentions=len(group.attentions),
            head_dim=group.head_dim,
            dtype=str(kind.dtype).removeprefix("torch."),
            device=str(where),
            kernel=found.kernel,
            why=found.why,
            masked=found.kernel if found.takes_masks else NATIVE,
            refused=found.refused,
            failed=found.failed,
            unreached={cls.__name__: count for cls, count in classes.items() if not is_routable(cls)},
        )
        made.append(choice)
    if kernel not in (AUTO, *(choice.kernel for choice in made)):
        runs = [
            name for name in KERNELS if name == NATIVE or not (requirement(name, kind) or (not is_from_hub(name) and trial(name, kind)))
        ]
        raise ValueError(
            f"attention kernel {kernel!r} cannot run here ({made[0].refused[kernel]}); here {', '.join(runs)} can, and "
            f"{AUTO!r} takes what suits the device"
        )
    return tuple(made)


def _heads(attention: Any) -> int:
    return getattr(attention, "heads", None) or getattr(attention, "num_heads", None) or 1


def _head_dim(attention: Any) -> int:
    """The width of a head, which Diffusers' classes keep under several names; 0 where under none."""
    for name in ("head_dim", "dim_head"):
        if width := getattr(attention, name, None):
            return width
    inner = getattr(attention, "inner_dim", None) or getattr(getattr(attention, "to_q", None), "out_features", 0)
    return inner // _heads(attention)
