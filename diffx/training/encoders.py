"""What a pipeline's encoders and networks are, as keys of what they made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ..calibration.problem import sketch
from ..families import Family

FORMAT = 1  # of what is stored; another one is another cache
TEXT_ENCODERS = ("text_encoder", "tokenizer")  # beginnings of names
VAE = ("vae",)


def made_by(family: Family, prefixes: tuple[str, ...]) -> dict[str, Any]:
    """What the outputs of those components depend on whose names begin so: weights, type, config, vocabulary, loaded adapters."""
    found: dict[str, Any] = {"format": FORMAT, "family": type(family).__name__}
    for name, component in family.pipe.components.items():
        if not name.startswith(prefixes) or component is None:
            continue
        if isinstance(component, nn.Module):
            network: Any = component
            config = network.config if isinstance(network.config, dict) else network.config.to_dict()
            public = {key: value for key, value in config.items() if not key.startswith("_")}
            found[name] = [str(network.dtype), sketch(network), public, _adapters(network)]
        else:
            found[name] = [type(component).__name__, component.model_max_length, hash_of(sorted(component.get_vocab().items()))]
    return found


def _adapters(network: nn.Module) -> str:
    """Which adapters of PEFT act, and how strongly: their weights are parameters, this is not."""
    layers = (vars(module) for module in network.modules())
    return hash_of(
        (layer["scaling"], layer["_active_adapter"], layer["_disable_adapters"]) for layer in layers if "_active_adapter" in layer
    )


def hash_of(rows: Iterable[Any]) -> str:
    """32 hexadecimal digits that stand for rows of plain numbers and strings."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(repr(row).encode() + b"\n")
    return digest.hexdigest()


def finite(x0: Tensor, name: Callable[[int], str]) -> Tensor:
    """``x0`` (B, ...) itself.

    Raises:
        FloatingPointError: one of them is not; ``name`` says of what.
    """
    for i, sample in enumerate(x0):
        if not sample.isfinite().all():
            raise FloatingPointError(f"{name(i)} became NaN or infinity; load the model in float32 or bfloat16")
    return x0
