"""Sample sheets: a few pictures of what is being trained, always from the same noise."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

LABELS = 8  # classes shown of a model that is told one
MOST = 1024  # pixels of a sheet's longer side


def pictures(
    pipe: Any, call_kwargs: Mapping[str, Any], prompts: Sequence[str] | None, *, count: int = 8, at_once: int = 8, seed: int = 0
) -> np.ndarray:
    """(count, H, W, C) pictures in [0, 1] from ``pipe(..., **call_kwargs)``; picture i is drawn from ``seed + i``.

    Args:
        prompts: told in turn, to a pipeline that takes prompts.
        at_once: pictures of one call.
    """
    parts = [range(i, min(i + at_once, count)) for i in range(0, count, at_once)]
    return np.concatenate([_pictures(pipe, call_kwargs, prompts, some, seed) for some in parts])


def _pictures(pipe: Any, call_kwargs: Mapping[str, Any], prompts: Sequence[str] | None, some: range, seed: int) -> np.ndarray:
    takes = inspect.signature(type(pipe).__call__).parameters
    told: dict[str, Any] = {}
    if "prompt" in takes:
        told["prompt"] = [(prompts or [""])[i % len(prompts or [""])] for i in some]
    elif "class_labels" in takes:
        told["class_labels"] = [i % LABELS for i in some]
    else:
        told["batch_size"] = len(some)
    generators: Any = [torch.Generator().manual_seed(seed + i) for i in some]  # on the CPU: the same on every device
    if "class_labels" in takes and "batch_size" not in takes:
        generators = generators[0]  # DiT draws all latents from one
    with torch.no_grad():
        made = pipe(**told, **call_kwargs, generator=generators, output_type="np").images
    return np.asarray(made)


def sheet(images: np.ndarray, columns: int = 4) -> Image.Image:
    """``images`` (N, H, W, C) in [0, 1] side by side, enlarged where they are small."""
    rows = -(-len(images) // columns)
    _, height, width, channels = images.shape
    canvas = np.ones((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), np.float32)
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + 1), (i % columns) * (width + 1)
        canvas[y : y + height, x : x + width] = np.nan_to_num(image[..., :3] if channels >= 3 else image[..., :1].repeat(3, -1))
    drawn = Image.fromarray((canvas.clip(0, 1) * 255).round().astype(np.uint8))
    scale = max(1, MOST // (2 * max(drawn.size)))
    return drawn.resize((drawn.width * scale, drawn.height * scale), Image.Resampling.NEAREST)
