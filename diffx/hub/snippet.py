"""How a published checkpoint is loaded: a few lines of Python for stock Diffusers."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import diffusers

from ..conditioning.adapter import DESCRIPTION
from ..loading import SHOWN
from .artifact import Artifact


def snippet(made: Artifact, repo_id: str, base: str | None, prompt: str) -> str:
    """Python, as text, that loads it from the Hub and makes one picture; a scheduler is put into a pipeline that is there."""
    parameters = _parameters(made)
    told: dict[str, Any] = {"prompt": prompt} if "prompt" in parameters else {"class_labels": [0]} if "class_labels" in parameters else {}
    call = {**told, **made.call_kwargs}
    there = f'hf_hub_download("{repo_id}", "{SHOWN}")' if made.shown else '"picture.png"'  # without one, a picture of the reader's
    match made.kind:
        case "scheduler":
            return f'import diffx\n\npipe.scheduler = diffx.AutoScheduler.from_pretrained("{repo_id}")'
        case "lora":
            scheduler = made.read("scheduler/scheduler_config.json")["_class_name"]
            lines = [
                f"from diffusers import {', '.join(sorted(('DiffusionPipeline', scheduler)))}",
                "",
                f'pipe = DiffusionPipeline.from_pretrained("{base}")',
                f'pipe.load_lora_weights("{repo_id}")',
                f'pipe.scheduler = {scheduler}.from_pretrained("{repo_id}", subfolder="scheduler")',
                f"image = pipe({_arguments(call)}).images[0]",
            ]
        case "controlnet":
            pipeline = _pipeline(made)
            lines = [
                f"from diffusers import ControlNetModel, {pipeline}",
                "from diffusers.utils import load_image",
                "from huggingface_hub import hf_hub_download",
                "",
                f'controlnet = ControlNetModel.from_pretrained("{repo_id}")',
                f'pipe = {pipeline}.from_pretrained("{base}", controlnet=controlnet)',
                f"shown = load_image({there})  # a control image",
                f"image = pipe({_arguments(call)}, image=shown).images[0]",
            ]
        case "ip-adapter":
            lines = [
                "from diffusers import DiffusionPipeline",
                "from diffusers.utils import load_image",
                "from huggingface_hub import hf_hub_download, snapshot_download",
                "",
                f'folder = snapshot_download("{repo_id}")',
                f'pipe = DiffusionPipeline.from_pretrained("{base}")',
                f"pipe.load_ip_adapter(folder, {_arguments(made.read(DESCRIPTION)['load'])})",
                f"shown = load_image({there})  # a reference",
                f"image = pipe({_arguments(call)}, ip_adapter_image=shown).images[0]",
            ]
        case _:
            place = f'model, custom_pipeline="{repo_id}", trust_remote_code=True' if made.kind == "custom pipeline" else f'"{repo_id}"'
            lines = [
                "from diffusers import DiffusionPipeline",
                "",
                f"pipe = DiffusionPipeline.from_pretrained({place})",
                f"image = pipe({_arguments(call)}).images[0]",
            ]
    return "\n".join(lines)


def task(made: Artifact) -> str | None:
    """The Hub's word for what it does; None where that is another pipeline's business."""
    if made.kind in ("scheduler", "custom pipeline"):
        return None
    return "text-to-image" if "prompt" in _parameters(made) else "unconditional-image-generation"


def _pipeline(made: Artifact) -> str:
    """The name of the pipeline class that calls it."""
    if made.kind in ("controlnet", "ip-adapter"):
        told = made.read(DESCRIPTION)
        return told["load"].get("pipeline") or told["model"]["pipeline"]
    if made.kind == "pipeline":
        return made.read("model_index.json")["_class_name"]
    return made.described.get("model", {}).get("pipeline", "StableDiffusionPipeline")


def _parameters(made: Artifact) -> Mapping[str, Any]:
    cls = getattr(diffusers, str(_pipeline(made)), None)
    return inspect.signature(cls.__call__).parameters if cls else {"prompt": None}


def _arguments(call: Mapping[str, Any]) -> str:
    """As they stand in a call: the prompt first and without its name, f-strings where a text names the downloaded folder."""
    words = [json.dumps(call["prompt"])] if "prompt" in call else []
    for name, value in call.items():
        if name != "prompt":
            said = json.dumps(value) if isinstance(value, str) else repr(value)
            words.append(f"{name}=f{said}" if "{folder}" in said else f"{name}={said}")
    return ", ".join(words)
