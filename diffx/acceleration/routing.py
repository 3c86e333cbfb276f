"""The way of an attention call to another kernel, in any model: stock processors whose call of PyTorch's attention goes elsewhere.

Most of Diffusers' attention processors call ``F.scaled_dot_product_attention`` themselves, and its choice of kernels does not reach
them. Here each keeps its code and its weights, and only the name of that function means another one to it.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor, nn

# What a processor may call: PyTorch's function, or Diffusers' choice of kernels.
CALLED = ("scaled_dot_product_attention", "dispatch_attention_fn")
_CLASS: Any = object.__dict__["__class__"]  # sets the class of an object that says it has another


class Route:
    """A kernel for the attention calls of one kind, that it was tried on; all others go to PyTorch's own.

    Args:
        kernel: as Diffusers names it.
        head_dim: width of a head; with ``dtype`` and ``device_type`` it says which calls are of that kind.
        takes_masks: the kernel also serves calls with a mask.
    """

    # Shapes: B batch, N tokens, H heads, D head width.

    def __init__(self, kernel: str, *, head_dim: int, dtype: torch.dtype, device_type: str, takes_masks: bool) -> None:
        self.kernel, self.takes_masks = AttentionBackendName(kernel), takes_masks
        self.head_dim, self.dtype, self.device_type = head_dim, dtype, device_type
        self._arguments = frozenset(_AttentionBackendRegistry._supported_arg_names[self.kernel])
        self._splits = _AttentionBackendRegistry._is_context_parallel_available(self.kernel)
        self._used = False

    def scaled_dot_product_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """PyTorch's function of that name: (B, H, N, D) in and out."""
        options: dict[str, Any] = dict(attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        if query.ndim != 4:
            return F.scaled_dot_product_attention(query, key, value, **options)
        if attn_mask is not None:  # (queries, keys) to PyTorch, and (B, keys) to Diffusers, unless all four sizes are there
            options["attn_mask"] = attn_mask[(None,) * (4 - attn_mask.ndim)]
        return self.dispatch_attention_fn(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), **options).transpose(1, 2)

    def dispatch_attention_fn(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False, attention_kwargs: dict[str, Any] | None = None, *,
        backend: Any = None, parallel_config: Any = None,
    ) -> Tensor:  # fmt: skip
        """Diffusers' function of that name, (B, N, H, D) in and out, whatever ``backend`` it is told."""
        # What a kernel has no argument for, Diffusers would leave out in silence.
        asked = {
            "attn_mask": attn_mask is not None,
            "dropout_p": dropout_p,
            "is_causal": is_causal,
            "scale": scale,
            "enable_gqa": enable_gqa,
        }
        served = (
            self._of_its_kind(query)
            and self._arguments.issuperset(name for name, value in asked.items() if value)
            and self._arguments.issuperset(attention_kwargs or ())
            and (attn_mask is None or self.takes_masks)
            and (parallel_config is None or self._splits)
        )
        return dispatch_attention_fn(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs,
            backend=self.kernel if served else AttentionBackendName.NATIVE, parallel_config=parallel_config,
        )  # fmt: skip

    def _of_its_kind(self, query: Tensor) -> bool:
        same_device = query.device.type == self.device_type
        same = same_device and query.dtype == self.dtype
        if not torch.compiler.is_compiling():
            lost = not same_device or (not same and self.kernel != AttentionBackendName.NATIVE)
            if lost and not self._used:  # else another part of a run, such as an evaluation
                warnings.warn(
                    f"attention kernel {self.kernel.value!r} was chosen for {self.dtype} on {self.device_type} and is called with "
                    f"{query.dtype} on {query.device.type}: native there; call set_attention when the model is where and as it will run",
                    stacklevel=2,
                )
            self._used = True
        return same and query.shape[-1] == self.head_dim


class Routing:
    """Attention modules whose processors, those that they will have, too, take a route, until ``undo``.

    A processor is not touched: its module holds a second object in its place, of a subclass and with the same attributes and weights.

    Args:
        routes: by attention module.
    """

    def __init__(self, routes: dict[nn.Module, Route]) -> None:
        self._originals: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # second object -> the processor itself
        self._before = {module: type(module) for module in routes}
        self._during: dict[nn.Module, type] = {}
        for module, route in routes.items():
            module.__class__ = self._during[module] = _watching(stock_of(module), self, route)
            module.processor = module.processor

    def routed(self, processor: Any, route: Route) -> Any:
        """What stands in the place of a processor: itself where it calls neither function, or stands there already."""
        stock = stock_of(processor)
        if processor in self._originals or not is_routable(stock):
            return processor
        second: Any = object.__new__(_routed(stock, route))
        object.__setattr__(second, "__dict__", processor.__dict__)
        self._originals[second] = processor
        return second

    @property
    def is_topmost(self) -> bool:
        """Nothing was routed over it in the same modules."""
        return all(type(module) is cls for module, cls in self._during.items())

    def undo(self) -> None:
        """Give every module its own class and processor, those that came later included."""
        for module, cls in self._before.items():
            module.__class__ = cls
            if module.processor in self._originals:
                module.processor = self._originals[module.processor]
        for second in self._originals:  # somebody may hold one, and put it into the model again
            _CLASS.__set__(second, stock_of(second))


def processor_of(module: nn.Module) -> Any:
    """The attention processor of a module; None where it is no attention."""
    return getattr(module, "processor", None)


def is_routable(processor_class: type) -> bool:
    """Whether its code calls one of the functions that a route stands for."""
    return bool(_calling(processor_class))


def stock_of(thing: Any) -> type:
    """The class of a processor or module as Diffusers made it."""
    return getattr(type(thing), "diffx_stock", type(thing))


@functools.lru_cache(maxsize=256)
def _calling(cls: type) -> dict[str, types.FunctionType]:
    """The methods of a class that call one of the functions by its usual name in their file."""
    methods = inspect.getmembers(cls, inspect.isfunction)
    return {
        name: method
        for name, method in methods
        if not set(CALLED).isdisjoint(method.__code__.co_names)
        and (method.__globals__.get("F") is F or method.__globals__.get("dispatch_attention_fn") is dispatch_attention_fn)
    }


@functools.lru_cache(maxsize=256)
def _routed(stock: type, route: Route) -> type:
    """A subclass in whose methods the two functions are the route's; it says that it is ``stock``, which Diffusers asks by identity."""
    functional = types.SimpleNamespace(**{**vars(F), CALLED[0]: route.scaled_dot_product_attention})
    methods: dict[str, Any] = {}
    for name, method in _calling(stock).items():
        known = {**method.__globals__, "F": functional, CALLED[1]: route.dispatch_attention_fn}
        del known["__name__"]  # by which torch.compile would look the names up in the original file
        methods[name] = types.FunctionType(method.__code__, known, name, method.__defaults__, method.__closure__)
        methods[name].__kwdefaults__ = method.__kwdefaults__
    same = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (stock,), {**methods, **same, "__class__": property(lambda self: stock), "diffx_stock": stock})


def _watching(stock: Any, routing: Routing, route: Route) -> type:
    """A subclass of an attention module that routes each processor it is given."""

    def __setattr__(self: Any, name: str, value: Any) -> None:
        stock.__setattr__(self, name, routing.routed(value, route) if name == "processor" else value)

    same = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (stock,), {**same, "__setattr__": __setattr__, "diffx_stock": stock})
