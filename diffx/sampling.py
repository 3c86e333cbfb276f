"""Pictures from prompts, with any text-to-image pipeline."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .schedulers import Calibrated


@dataclass(frozen=True)
class Picture:
    """One picture and what it was made from: ``prompt`` and ``seed`` alone give it again."""

    prompt: str
    seed: int
    image: Image.Image


def sample(
    pipe: Any,
    prompts: Sequence[str],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int = 0,
    num_images_per_prompt: int = 1,
) -> list[Picture]:
    """``num_images_per_prompt`` pictures of each prompt, prompt by prompt; picture i is drawn from ``seed + i``.

    Raises:
        ValueError: no prompt, a count below one, or a pipeline that takes no prompt.
        FloatingPointError: a picture holds NaN or infinity.
    """
    if not prompts:
        raise ValueError("no prompt given; at least one is needed")
    for name, value in (("num_inference_steps", num_inference_steps), ("num_images_per_prompt", num_images_per_prompt)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if "prompt" not in inspect.signature(type(pipe).__call__).parameters:
        raise ValueError(f"{type(pipe).__name__} takes no prompt; a text-to-image pipeline is needed")
    if isinstance(pipe.scheduler, Calibrated):
        pipe.scheduler.warn_of_misfits(pipe, guidance_scale)
    wanted = [prompt for prompt in prompts for _ in range(num_images_per_prompt)]
    seeds = range(seed, seed + len(wanted))
    pixels = pipe(
        wanted,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],  # on the CPU: the same noise on every device
        output_type="np",
    ).images
    if not np.isfinite(pixels).all():
        raise FloatingPointError(
            f"{type(pipe.scheduler).__name__} with {num_inference_steps} steps gave NaN or infinity; "
            "try more steps, a smaller guidance scale or float32"
        )
    images = [Image.fromarray(picture) for picture in (pixels * 255).round().astype(np.uint8)]
    return [Picture(*each) for each in zip(wanted, seeds, images)]


def picture_files(output: str | Path, count: int) -> list[Path]:
    """Where ``count`` pictures go: ``output`` itself for one, with -1, -2, ... before its suffix for several; its folder is made.

    Raises:
        ValueError: the suffix names no picture format, or the folder cannot be made.
    """
    output = Path(output)
    if output.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"output={str(output)!r} must end in a picture format such as .png, .jpg or .webp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output={str(output)!r}: its folder cannot be made ({error.strerror})") from error
    return [output] if count == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(1, count + 1)]
