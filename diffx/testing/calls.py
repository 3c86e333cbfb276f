"""How the tiny pipelines are called, and the loop that pipelines write."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AudioLDM2Pipeline, DiTPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from .parts import IMAGE_SIZE, MAX_TOKENS, WIDTH


def call_inputs(pipe: DiffusionPipeline, batch_size: int = 1, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for calling a tiny pipeline, or one made from its components: ``batch_size`` samples to make.

    Each gets a prompt, picture, class or embedding of its own, others for another ``seed``, as far as the pipeline asks for them.
    """
    rng = torch.Generator().manual_seed(seed)
    numbers = [seed * batch_size + i for i in range(batch_size)]
    picture = (batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
    left_half = (torch.arange(IMAGE_SIZE) < IMAGE_SIZE // 2).float().expand(batch_size, 1, IMAGE_SIZE, IMAGE_SIZE)
    known: dict[str, Any] = {
        "prompt": [f"no {i}" for i in numbers],
        "class_labels": numbers,
        "height": IMAGE_SIZE,
        "width": IMAGE_SIZE,
        "max_sequence_length": MAX_TOKENS,  # T5 pads to 256 or 512 tokens otherwise, which would take all the time
        "image": torch.rand(picture, generator=rng),
        "mask_image": left_half,
        "strength": 0.75,
        "use_resolution_binning": False,  # PixArt knows no picture as small as ours
        "clean_caption": False,  # its default needs another package
    }
    if isinstance(pipe, AudioLDM2Pipeline):
        del known["prompt"]
        embeddings = ("prompt_embeds", "negative_prompt_embeds", "generated_prompt_embeds", "negative_generated_prompt_embeds")
        known |= {name: torch.randn(batch_size, MAX_TOKENS, WIDTH, generator=rng) for name in embeddings}
    takes = inspect.signature(type(pipe).__call__).parameters
    return {name: value for name, value in known.items() if name in takes}


def sample_of(inputs: dict[str, Any], i: int) -> dict[str, Any]:
    """The part of ``call_inputs(pipe, batch_size)`` that makes sample ``i`` alone."""
    return {name: value[i : i + 1] if isinstance(value, list | Tensor) else value for name, value in inputs.items()}


def end_of(pipe: DiffusionPipeline, *, decoded: bool = False, **call: Any) -> Tensor:
    """(B, ...) what the call ends with: latents, or what they are decoded to; of DiT, which always decodes, the picture."""
    output_type = "pt" if decoded or isinstance(pipe, DiTPipeline) else "latent"
    made: Any = pipe(**call, output_type=output_type)  # type: ignore[operator]  # the base class has no __call__
    return next(made[kind] for kind in ("images", "frames", "audios") if kind in made)


def denoise(scheduler, network: Callable, x: Tensor, *, begin: int = 0, edit: Callable | None = None, **step_options) -> Tensor:
    """The end sample of the loop that pipelines write, over ``scheduler.timesteps[begin:]`` (``set_timesteps`` is the caller's).

    Args:
        network: (scaled sample, t) -> model output.
        x: (B, ...) the first sample, in the scheduler's own frame.
        edit: (index of the step just done, sample) -> sample, what a callback or a mask does.
        step_options: passed to ``scheduler.step``: generator, eta, ...
    """
    if begin:
        scheduler.set_begin_index(begin)
    scale = getattr(scheduler, "scale_model_input", lambda sample, t: sample)  # flow-matching Euler has none: flow models need none
    for k, t in enumerate(scheduler.timesteps[begin:], begin):
        x = scheduler.step(network(scale(x, t), t), t, x, return_dict=False, **step_options)[0]
        x = x if edit is None else edit(k, x)
    return x
