"""Soft inpainting and outpainting by a callback in stock pipelines: what is kept is kept exactly, in latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL import Image

from ..families import family_of
from .attach import Picture, pixels


class SoftInpaint:
    """A ``callback_on_step_end`` that changes each place of a picture as much as a map says; for image-to-image pipelines.

    Where the map is m, the picture is held at its own noise level for the first 1 - m of the run and free afterwards. Where it is
    0 in all pixels of a latent, the latent that the run ends with is the picture's, bit for bit; where it is 1 everywhere, the run is as
    without the callback. Call with ``strength=1.0`` to give 1 its full meaning.

    Args:
        pipe: whose VAE encodes the picture, if it has one.
        image: of the size that is made.
        change: (H, W) map in [0, 1] of the same size, white where it is new.
        seed: of the noise on what is kept.

    Example:
        >>> soft = SoftInpaint(pipe, photo, fading_mask)
        >>> pipe(prompt, image=photo, strength=1.0, callback_on_step_end=soft)

    Source: Levin and Fried 2023 (arXiv:2306.00950).

    Raises:
        ValueError: the map and the picture have two sizes, or values outside of [0, 1].
    """

    def __init__(self, pipe: Any, image: Picture, change: Picture, *, seed: int = 0) -> None:
        picture, wanted = pixels(image, "image", 3), pixels(change, "change", 1)
        if picture.shape[-2:] != wanted.shape[-2:]:
            (h, w), (height, width) = wanted.shape[-2:], picture.shape[-2:]
            raise ValueError(f"the map of changes has {w} x {h} pixels and the picture {width} x {height}; they must be equal")
        self.kept = family_of(pipe).encode_images(picture * 2 - 1)  # (1, C, h, w)
        self.change = torch.nn.functional.interpolate(wanted, self.kept.shape[-2:], mode="area")
        self.noise = torch.randn(self.kept.shape, generator=torch.Generator().manual_seed(seed))

    def __call__(self, pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        latents, scheduler, calls = given["latents"], pipe.scheduler, pipe.num_timesteps
        if latents.shape[1:] != self.kept.shape[1:]:
            raise ValueError(f"the picture's latents are {tuple(self.kept.shape[1:])}, those of the run {tuple(latents.shape[1:])}")
        kept: Any = self.kept.to(latents)
        change = self.change.to(latents)
        if step + 1 < calls:
            at = scheduler.timesteps[len(scheduler.timesteps) - calls + step + 1].reshape(1)
            noise: Any = self.noise.to(latents)
            flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)  # which has no add_noise
            kept = scheduler.scale_noise(kept, at, noise) if flow else scheduler.add_noise(kept, noise, at)
        held = change == 0 if step + 1 == calls else (step + 1) / calls < 1 - change
        # In the memory layout of ``latents``: convolutions on another one differ in the last bits.
        return {"latents": torch.empty_like(latents).copy_(torch.where(held, kept.to(latents), latents))}


def outpaint(
    image: Image.Image, *, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0, feather: int = 0
) -> tuple[Image.Image, Image.Image]:
    """(a larger picture, its map of changes) for ``SoftInpaint``: the new parts continue the edges, and are to be made anew.

    Args:
        left, right, top, bottom: pixels that are added there.
        feather: pixels of the old picture, along the new parts, over which the change fades to nothing.

    Raises:
        ValueError: a negative number, or nothing to add.
    """
    sides = {"left": left, "right": right, "top": top, "bottom": bottom, "feather": feather}
    if negative := [name for name, value in sides.items() if value < 0]:
        raise ValueError(f"{negative[0]}={sides[negative[0]]} must not be negative")
    if not left + right + top + bottom:
        raise ValueError("nothing to add: give left, right, top or bottom, in pixels")
    old = np.asarray(image.convert("RGB"))
    canvas = np.pad(old, ((top, bottom), (left, right), (0, 0)), mode="edge")
    rows, columns = (_distance(size, *added) for size, added in ((old.shape[0], (top, bottom)), (old.shape[1], (left, right))))
    inside = np.minimum(rows[:, None], columns[None, :])  # pixels to the nearest new part; 0 and less is new
    change = np.clip(1 - inside / (feather + 1), 0, 1)
    return Image.fromarray(canvas), Image.fromarray((change * 255).round().astype(np.uint8))


def _distance(size: int, before: int, after: int) -> np.ndarray:
    """(before + size + after,) how far each pixel of a line is inside the old part, from its new ends alone."""
    place = np.arange(before + size + after)
    far = np.full(len(place), np.inf)
    return np.minimum(place - before + 1 if before else far, before + size - place if after else far)
