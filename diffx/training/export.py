"""What is saved is stock Diffusers: a pipeline folder or a LoRA file, with the scheduler and the call arguments of the student."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..conditioning.adapter import AdaptedFamily
from ..families import remade
from ..files import replacing
from ..loading import CALL_KWARGS
from ..objectives.objective import Inference
from .networks import Networks

Form = Literal["full", "lora", "merged", "adapter"]
KOHYA = "lora_kohya.safetensors"


def export(nets: Networks, inference: Inference, folder: str | Path, form: Form | None = None, *, kohya: bool = False) -> Path:
    """The folder, written whole or not at all; an older export in its place is replaced.

    Args:
        form: "full" is a pipeline with the trained network, for networks trained as a whole; "lora" is
            pytorch_lora_weights.safetensors and scheduler/, for ``pipe.load_lora_weights(folder)``; "merged" is a pipeline with the
            adapter added to the network's weights; "adapter" is what a ControlNet or IP-Adapter is loaded from beside its model, with
            adapter.json. None is the smallest that stock Diffusers loads.
        kohya: write the adapter for other programs, too, as lora_kohya.safetensors.

    Raises:
        ValueError: this network has no such form, or the folder holds something else.
    """
    form = form or default_form(nets)
    folder = Path(folder)
    check(nets, inference, folder, form, kohya)
    with replacing(folder) as scratch:
        if form == "lora":
            inference.scheduler.save_pretrained(scratch / "scheduler")
            save_lora(nets, scratch)
            if kohya:
                save_file(kohya_state(nets), scratch / KOHYA, metadata={"format": "pt"})
        elif isinstance(nets.family, AdaptedFamily):
            nets.family.save_described(nets.modules[nets.exported()], scratch)
        else:
            network = merged(nets) if form == "merged" else nets.modules[nets.exported()]
            in_full_precision(nets.family.pipeline(network, inference.scheduler)).save_pretrained(scratch)
        (scratch / CALL_KWARGS).write_text(json.dumps(inference.call_kwargs, indent=1) + "\n")
    return folder


def default_form(nets: Networks) -> Form:
    """The smallest form that stock Diffusers loads."""
    if isinstance(nets.family, AdaptedFamily):
        return "adapter"
    if nets.lora is None:
        return "full"
    return "merged" if not nets.family.loads_lora or changed_config(nets) else "lora"


def check(nets: Networks, inference: Inference, folder: Path, form: Form, kohya: bool) -> None:
    """Refuse, before any work, what ``export`` cannot do; its arguments."""
    family, pipeline, network = nets.family, type(nets.family.pipe).__name__, type(nets.family.base).__name__
    if form not in get_args(Form):
        raise ValueError(f"form={form!r} is not one of {', '.join(get_args(Form))}")
    if (form == "adapter") != isinstance(family, AdaptedFamily):
        is_one = (
            "is for a ControlNet or IP-Adapter, and a network was trained" if form == "adapter" else f"is not of the {network} trained here"
        )
        raise ValueError(f"form={form!r} {is_one}; form=None is the one there is")
    if form == "full" and nets.lora is not None:
        raise ValueError(
            'form="full" is for networks trained as a whole, and this one has an adapter; form="merged" adds it to the weights'
        )
    if form in ("lora", "merged") and nets.lora is None:
        raise ValueError(
            f'form={form!r} is for adapters, and this network was trained as a whole; use form="full", or train with lora_rank'
        )
    if form == "lora" and not family.loads_lora:
        raise ValueError(f'{pipeline} loads no LoRA in stock Diffusers; form="merged" adds the adapter to the weights of its {network}')
    if form == "lora" and (changed := changed_config(nets)):
        raise ValueError(
            f'the {network} was trained with another {", ".join(changed)} than its model has, which no LoRA can bring; use form="merged"'
        )
    if kohya and (form != "lora" or family.network != "unet"):
        raise ValueError(f'kohya=True writes the adapters of UNets with form="lora"; this is form={form!r} of a {network}')
    if not type(inference.scheduler).__module__.startswith("diffusers."):
        raise ValueError(f"{type(inference.scheduler).__name__} is not a scheduler of Diffusers, and others could not load the export")
    if folder.exists() and not (folder.is_dir() and ((folder / CALL_KWARGS).is_file() or not any(folder.iterdir()))):
        raise ValueError(f"{str(folder)!r} holds something else than an export; give a folder that is new or empty")


def changed_config(nets: Networks) -> list[str]:
    """Keys in which the trained network's config differs from its model's."""
    network: Any = nets.modules[nets.exported()]
    mine, base = dict(network.config), dict(nets.family.base.config)
    return [key for key in mine if key[0] != "_" and mine[key] != base.get(key)]


# adapters


def adapter(nets: Networks) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights as PEFT names them, its config) of the exported adapter.

    Without the config a loader takes alpha for the rank, and with converted names it drops layers.
    """
    from peft.utils import get_peft_model_state_dict

    network: Any = nets.modules[nets.exported()]
    config = network.peft_config[nets.exported()].to_dict()
    state = get_peft_model_state_dict(network, adapter_name=nets.exported())
    return state, {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def save_lora(nets: Networks, folder: Path) -> None:
    """Write the exported adapter as its pipeline's class does."""
    state, config = adapter(nets)
    part = nets.family.network
    given: dict[str, Any] = {f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": config}
    type(nets.family.pipe).save_lora_weights(folder, **given)


def kohya_state(nets: Networks) -> dict[str, Tensor]:
    """The exported adapter under the names that kohya's scripts gave, which other programs read."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    state, config = adapter(nets)
    named: Mapping[str, Tensor] = convert_state_dict_to_kohya({f"{nets.family.network}.{name}": value for name, value in state.items()})
    # Diffusers writes the rank where alpha belongs.
    alpha = torch.tensor(float(config["lora_alpha"]))
    return {name: alpha.clone() if name.endswith(".alpha") else value.contiguous() for name, value in named.items()}


@torch.no_grad()
def merged(nets: Networks) -> Any:
    """A copy of the trained network, its adapter added to the weights: a plain Diffusers model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    role = nets.exported()
    network: Any = copy.deepcopy(nets.modules[role])
    for name, layer in list(network.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(adapter_names=[role])
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, layer.get_base_layer())
    del network.peft_config
    return network


# pipelines


def in_full_precision(pipe: Any) -> Any:
    """The pipeline, text encoders in half precision replaced by copies in float32.

    Transformers loads those as they were saved and Diffusers its own networks in float32: such a folder would not run as it is.
    """
    half = (torch.float16, torch.bfloat16)
    encoders = {name: part for name, part in pipe.components.items() if isinstance(part, PreTrainedModel)}
    cast = {
        name: copy.deepcopy(part).float() for name, part in encoders.items() if any(weight.dtype in half for weight in part.parameters())
    }
    return remade(pipe, **cast)
