"""Cheaper training of adapters: where one is wide beside its layer, both weights are added before they act."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def summed(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, layers with adapters say the same for fewer operations; outside they are PEFT's own.

    For float32 alone: in half precision the sum would round away an adapter that is small beside its layer.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for network in networks for layer in network.modules() if isinstance(layer, BaseTunerLayer) and can_be_summed(layer)]
    for layer in layers:
        layer.forward = functools.partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def can_be_summed(layer: Any) -> bool:
    """Whether the weights of a layer of PEFT and of its adapters add up to those of one layer."""
    base = layer.get_base_layer()
    return base.weight.dtype == torch.float32 and (type(base) is nn.Linear or (type(base) is nn.Conv2d and base.groups == 1))


def is_cheaper(rows: int, width_in: int, width_out: int, rank: int, *, trained: bool) -> bool:
    """Whether a product of ``rows`` with a summed weight takes fewer multiplications than one with a layer and one with its adapter.

    Each with what it makes for the adapter's gradient where it is ``trained``: summing does three times the work of adding up, and
    the gradient of the sum; adapting does three times the work of the adapter's two products.
    """
    adding, gradient = rank * width_in * width_out, rows * width_in * width_out
    adapting = rank * rows * (width_in + width_out)
    return 3 * adding + gradient < 3 * adapting if trained else adding < adapting


def _forward(layer: Any, x: Tensor) -> Tensor:
    base = layer.get_base_layer()
    if layer.disable_adapters:
        return base(x)
    (role,) = layer.active_adapters
    weight, down, up = base.weight.flatten(1), layer.lora_A[role].weight.flatten(1), layer.lora_B[role].weight.flatten(1)
    rows = x.numel() // (x.shape[1] * math.prod(base.stride) if isinstance(base, nn.Conv2d) else x.shape[-1])
    if not is_cheaper(rows, weight.shape[1], weight.shape[0], len(down), trained=torch.is_grad_enabled() and down.requires_grad):
        return type(layer).forward(layer, x)
    weight = torch.addmm(weight, up, down, alpha=layer.scaling[role]).view_as(base.weight)
    return base._conv_forward(x, weight, base.bias) if isinstance(base, nn.Conv2d) else nn.functional.linear(x, weight, base.bias)
