"""Guidance in ordinary pipelines: a hook on the network, which nobody else has to know of.

A pipeline asks its network for both predictions in one batch and computes u + s (c - u). The hook hands it the guided prediction in
the place of both, and g + s (g - g) is g for every s.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers.guiders.guider_utils import BaseGuidance
from torch import Tensor

from .moment import Moment
from .rule import Rule
from .run import Walk
from .stock import Stock

# Networks whose pipelines were run. They are told a train time, and the unconditional half of a batch comes first.
GUIDED = ("UNet2DConditionModel", "SD3Transformer2DModel")
SINGLE = ("UNet2DModel",)  # told nothing: there are no halves, but a gradient guides these, too


def guide(pipe: Any, rule: Rule | BaseGuidance) -> Guide:
    """``rule`` in place of a pipeline's own classifier-free guidance, inside ``with``; afterwards the pipeline is what it was.

    The pipeline is called as always, with any ``guidance_scale`` above 1, so that it asks for both predictions; the number itself
    has no effect. Whatever else calls the same network meanwhile is guided, too; one run at a time.

    Args:
        pipe: Stable Diffusion 1 to 3.5 and SDXL: text to image, image to image, inpainting, ControlNet, IP-Adapter.
        rule: of ``diffx.guidance``, or a guider of ``diffusers.guiders`` that needs predictions only.

    Example:
        >>> with diffx.guide(pipe, Interval(APG(5.0), high=5.0)) as guided:
        ...     image = pipe("red apple on blue").images[0]
        >>> guided.calls, guided.uncond_calls

    Raises:
        ValueError: the pipeline does not guide by a batch of two halves, or the rule is none.
    """
    if isinstance(rule, BaseGuidance):
        rule = Stock(rule)
    if not isinstance(rule, Rule):
        raise ValueError(
            f"rule={rule!r} is no guidance rule; give one of diffx.guidance, such as CFG(5.0), or a guider of diffusers.guiders "
            "(objectives.Guidance trains a student)"
        )
    return Guide(pipe, rule)


@dataclass(frozen=True)
class _Call:
    moment: Moment
    batch: int  # samples in the network's batch, as the pipeline has it
    halves: bool  # the pipeline asked for both predictions
    both: bool  # and both are made


class Guide:
    """What ``guide`` gives; ``attach`` and ``detach`` do what ``with`` does.

    ``calls`` counts the network's calls in all runs so far, ``uncond_calls`` those that made the unconditional half, too.
    """

    def __init__(self, pipe: Any, rule: Rule) -> None:
        self.pipe, self.rule = pipe, rule
        self.network = _network_of(pipe, rule)
        self.calls = self.uncond_calls = 0
        self._signature = inspect.signature(type(self.network).forward)
        self._handles: list[Any] = []
        self._walk = Walk(pipe)
        self._call: _Call | None = None  # under way, or the last one

    def attach(self) -> Self:
        """Guide the network's calls from now on.

        Raises:
            ValueError: something else guides this network.
        """
        if is_guided(self.network):
            raise ValueError("this network is guided already; put one rule around the other instead, such as Rescale(APG(5.0))")
        self._walk = Walk(self.pipe)
        self._handles = [
            self.network.register_forward_pre_hook(self._before, with_kwargs=True),
            self.network.register_forward_hook(self._after),
        ]
        return self

    def detach(self) -> None:
        """Leave the network as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._call = [], None

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *_: Any) -> None:
        self.detach()

    def _before(self, network: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        told = self._signature.bind(network, *args, **kwargs).arguments
        told.pop("self")
        sample = next(iter(told))
        batch, t, last = len(told[sample]), told["timestep"], self._call
        run, number = self._walk.next(t)
        if number == 0 or last is None:
            halves = self._has_halves(told[sample])
        else:
            halves = last.halves
            if batch != last.batch:
                raise ValueError(
                    f"{type(self.pipe).__name__} calls its network with {batch} samples after {last.batch}, for guidance of its own beside "
                    "classifier-free guidance (skip_guidance_layers?); switch that off, or do without guide()"
                )
        asked = {name: _second_half(value, batch) for name, value in told.items()} if halves else told
        x, rest = asked[sample][:, : network.config.out_channels], asked[sample][:, network.config.out_channels :]

        def again(x: Tensor) -> Tensor:
            # Past all hooks, those of conditions that are attached among them: what they add is in ``asked`` already.
            return _predicted(network.forward(**{**asked, sample: torch.cat([x, rest], 1)}))

        moment = Moment(x, t, number, run, again)
        self._call = _Call(moment, batch, halves, halves and self.rule.needs_uncond(moment))
        self.calls += 1
        self.uncond_calls += self._call.both
        return ((), asked) if halves and not self._call.both else None

    def _after(self, network: Any, args: tuple, output: Any) -> Any:
        assert self._call is not None
        out = _predicted(output)
        uncond, cond = out.chunk(2) if self._call.both else (None, out)
        guided = self.rule(cond, uncond, self._call.moment)
        if self._call.halves:
            guided = torch.cat([guided, guided])
        return (guided, *output[1:]) if isinstance(output, tuple) else type(output)(sample=guided)

    def _has_halves(self, x: Tensor) -> bool:
        """Whether the pipeline asks for both predictions.

        Raises:
            ValueError: it does not, and the rule needs both; or it asks otherwise than in two halves, or changes the result.
        """
        name, halves = type(self.pipe).__name__, getattr(self.pipe, "do_classifier_free_guidance", False)
        if not halves and self.rule.guides:
            raise ValueError(
                f"{name} runs without guidance, so that its network is not asked for the unconditional prediction that "
                f"{type(self.rule).__name__} needs: call it with a guidance_scale above 1 (any number), if it is no distilled model"
            )
        if halves and (len(x) % 2 or not torch.equal(*x.chunk(2))):
            raise ValueError(f"{name} calls its network with {len(x)} samples that are not the same half twice; guide() does not know it")
        if halves and getattr(self.pipe, "guidance_rescale", 0):
            raise ValueError(f"guidance_rescale={self.pipe.guidance_rescale} would rescale the guided prediction again; use Rescale(rule)")
        return halves


def is_guided(network: Any) -> bool:
    """Whether a ``Guide`` is attached to the network."""
    return any(isinstance(getattr(hook, "__self__", None), Guide) for hook in network._forward_hooks.values())


def _network_of(pipe: Any, rule: Rule) -> Any:
    components = pipe.components
    network = components.get("unet") or components.get("transformer")
    name = type(network).__name__
    if name in GUIDED or (name in SINGLE and not rule.guides):
        return network
    if name in SINGLE:
        raise ValueError(f"{type(pipe).__name__} tells its network nothing, so that {type(rule).__name__} has no second prediction")
    raise ValueError(
        f"{type(pipe).__name__} has a {name}; guide() works in pipelines that call {' or '.join(GUIDED)} once for both predictions. "
        "Flux has one prediction, told its guidance scale; others call twice, or were not tried"
    )


def _second_half(value: Any, batch: int) -> Any:
    """What the network is told of the conditional half, of anything it is told."""
    if isinstance(value, Tensor):
        return value[batch // 2 :] if value.ndim and len(value) == batch else value
    if isinstance(value, dict):
        return {name: _second_half(each, batch) for name, each in value.items()}
    return type(value)(_second_half(each, batch) for each in value) if isinstance(value, list | tuple) else value


def _predicted(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.sample
