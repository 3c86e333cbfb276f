"""Whether an adapter is followed, measured while it is trained: likeness to what each sample was shown, less that to what others were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..conditioning.adapter import AdaptedFamily
from ..evaluation.compare import lent
from .cache import read_for, shown_of
from .curve import GAIN, SHUFFLED, TRUE
from .data import DataConfig, Pictures, Prompts
from .pictures import Size, cuts_of, open_picture
from .run import Measured, Metric
from .sheet import sheet

MOST_HELD_OUT = 32
CALLS = 20  # of the network, for each sample that is measured
PIXELS_AT_ONCE = 2**19  # of samples drawn in one call: two of 512 x 512
ON_SHEET = 16


def hold_out(family: AdaptedFamily, data: Any, held_out: Any, config: DataConfig) -> tuple[Pictures, Pictures]:
    """(pictures to train on, pictures to measure on): ``data`` and ``held_out``, or where that is None ``data`` cut in two by the seed.

    Raises:
        ValueError: there are too few pictures, or none.
    """
    source, held = (None if each is None else read_for(family, each, config) for each in (data, held_out))
    if not isinstance(source, Pictures) or isinstance(held, Prompts):
        raise ValueError(f"{type(family.adapter).__name__} learns from pictures, and the data has none; pass a folder of pictures")
    if held is not None:
        return source, held
    num = config.num_held_out or min(MOST_HELD_OUT, max(2, len(source) // 10))
    if num > len(source) // 2:
        raise ValueError(f"num_held_out={num} of {len(source)} pictures leaves fewer to train on; give more pictures, or another metric")
    order = np.random.default_rng(config.seed).permutation(len(source))
    return source.part(sorted(order[num:].tolist())), source.part(sorted(order[:num].tolist()))


class Adherence:
    """A metric of adapters on held-out pictures, of which less is better: minus the gain.

    Each picture is cut in its middle and shown, as in training; the pipeline draws a sample with its caption, from a noise of its own.
    *True* is the mean likeness of samples to what they were shown, *shuffled* that to what four others were shown, *gain* the
    difference: what the pictures have in common is in both.

    Args:
        metric: that says which is better, instead of the gain.
        calls: of the network, for each sample.
    """

    def __init__(
        self, family: AdaptedFamily, held: Pictures, size: Size, metric: Metric | None = None, *, calls: int = CALLS, seed: int = 0
    ) -> None:
        self.family, self.size, self.metric, self.calls, self.seed = family, size, metric, calls, seed
        self.texts = held.texts
        self.shown = [shown_of(held, i, _middle(open_picture(held.files[i]), size), family) for i in range(len(held))]

    def __call__(self, pipe: Any, call_kwargs: Mapping[str, Any]) -> Measured:
        made = self.draw(pipe, dict(call_kwargs) | {"num_inference_steps": self.calls})
        likeness = self.family.likeness(self.shown, made)
        true, shuffled = float(likeness[:, 0].mean()), float(likeness[:, 1:].mean())
        figures, drawn = {TRUE: true, SHUFFLED: shuffled, GAIN: true - shuffled}, pairs(self.shown, made)
        found = self.metric(pipe, call_kwargs) if self.metric else shuffled - true
        if not isinstance(found, Measured):
            return Measured(float(found), figures, drawn)
        return Measured(found.value, {**figures, **found.figures}, found.sheet or drawn)

    @torch.no_grad()
    def draw(self, pipe: Any, call_kwargs: Mapping[str, Any]) -> list[Image.Image]:
        """A sample for each held-out picture."""
        at_once = self.family.most_at_once or max(1, PIXELS_AT_ONCE // (self.size[0] * self.size[1]))
        made: list[Image.Image] = []
        with lent(pipe):
            for first in range(0, len(self.shown), at_once):
                numbers = range(first, min(first + at_once, len(self.shown)))
                shown = [self.shown[i] for i in numbers]
                told = {"prompt": [self.texts[i] if self.texts else "" for i in numbers], **self.family.inputs(shown, call_kwargs)}
                if isinstance(call_kwargs.get("negative_prompt"), str):
                    told["negative_prompt"] = [call_kwargs["negative_prompt"]] * len(numbers)
                generators = [torch.Generator().manual_seed(self.seed + i) for i in numbers]
                size = {"height": self.size[0], "width": self.size[1]}
                made += pipe(**{**call_kwargs, **told}, **size, generator=generators).images
        return made


def _middle(picture: Image.Image, size: Size) -> Any:
    original = picture.height, picture.width
    return cuts_of(original, [size], 1, center=True, flip=False, rng=np.random.default_rng(0))[0]


def pairs(shown: Sequence[Image.Image], made: Sequence[Image.Image]) -> Image.Image:
    """A sheet of what some samples were shown, each beside its sample."""
    both = [image for two in zip(shown[:ON_SHEET], made) for image in two]
    size = made[0].size
    arrays = [np.asarray(image.convert("RGB").resize(size, Image.Resampling.NEAREST), np.float32) / 255 for image in both]
    return sheet(np.stack(arrays), columns=8)
