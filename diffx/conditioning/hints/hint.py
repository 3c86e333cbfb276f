"""What a hint is: a picture in, a control image of the same size out, and how far another picture is from that control image."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Literal

import numpy as np
from PIL import Image

# What the pixels of a control image mean: 0 or 255 alone; gray levels; colours; unit vectors as (n + 1) / 2; colours of a palette.
Values = Literal["binary", "gray", "colour", "normal", "labels"]
COLOURLESS = 0.1  # most that channels of gray levels differ, after a lossy file
MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


class Hint(ABC):
    """A control image of a picture, drawn by calling the hint; the same picture always gives the same control image.

    A hint is a frozen dataclass: its fields are its options, and ``get("canny", sigma=0.5)`` makes one by its name.
    """

    name: ClassVar[str]
    values: ClassVar[Values]

    def __call__(self, image: Image.Image, *, at: tuple[int, int] | None = None) -> Image.Image:
        """The control image, in mode RGB and as large as ``image``.

        Args:
            image: transparent parts are put on white.
            at: (height, width) of the control image instead: the picture is resized before anything is drawn, so that lines stay sharp.

        Raises:
            ValueError: it is no picture of 8 bits a channel, or ``at`` is no size.
        """
        return to_image(self.draw(to_pixels(image, at)))

    def error(self, hint: Image.Image, image: Image.Image) -> float:
        """How far ``image`` is from showing what the control image ``hint`` says; 0 is exactly there.

        Raises:
            ValueError: ``check`` finds fault, or one is no picture of 8 bits a channel.
        """
        return self.distance(self.check(hint, image.size), to_pixels(self(image)))

    def check(self, hint: Image.Image, size: tuple[int, int]) -> np.ndarray:
        """The pixels of a control image, (H, W, 3) in [0, 1], wherever it comes from: a column of a data set, a file, a call.

        Args:
            size: (width, height) that it must have, that of its picture.

        Raises:
            ValueError: another size; colours where this hint has gray levels; or it is no picture of 8 bits a channel.
        """
        pixels = to_pixels(hint)
        if hint.size != size:
            raise ValueError(
                f"the {self.name} hint has {hint.width} x {hint.height} pixels and the picture {size[0]} x {size[1]}; "
                "draw the hint at the picture's size: hint(image, at=(height, width))"
            )
        if self.values in ("binary", "gray") and np.ptp(pixels, axis=-1).max() > COLOURLESS:
            raise ValueError(
                f"this is no {self.name} hint, which has gray levels: it has colours; is it the picture? hint(image) draws one"
            )
        return pixels

    @abstractmethod
    def draw(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) or (H, W) in [0, 1], or boolean, of a picture (H, W, 3), float32 in [0, 1]."""

    @abstractmethod
    def distance(self, one: np.ndarray, two: np.ndarray) -> float:
        """Between two control images (H, W, 3), float32 in [0, 1]; 0 where they say the same."""


def to_pixels(image: Image.Image, at: tuple[int, int] | None = None) -> np.ndarray:
    """(H, W, 3) float32 in [0, 1], resized to ``at`` = (height, width) where that is given; transparent parts are put on white.

    Raises:
        ValueError: it is no picture of 8 bits a channel, or ``at`` is no size.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"a hint is drawn of a PIL image, not of {type(image).__name__}; for an array: Image.fromarray(uint8_array)")
    if image.mode not in MODES:
        raise ValueError(f"a picture of mode {image.mode!r} has no known range; convert it to one of {', '.join(MODES)}")
    if at is not None and not (len(at) == 2 and all(isinstance(side, int) and side > 0 for side in at)):
        raise ValueError(f"at={at!r} is no size; give (height, width) in pixels, for instance {(image.height, image.width)}")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    opaque = canvas.convert("RGB")
    if at is not None and at != (image.height, image.width):
        opaque = opaque.resize((at[1], at[0]), Image.Resampling.BICUBIC)  # Pillow's reducing averages, so nothing aliases
    return np.asarray(opaque, np.float32) / 255


def to_image(drawn: np.ndarray) -> Image.Image:
    """A picture in mode RGB of (H, W) or (H, W, 3), boolean or in [0, 1]."""
    levels = np.rint(drawn.astype(np.float32) * 255).astype(np.uint8)
    return Image.fromarray(levels).convert("RGB")


def spelled_like(word: str, known: Iterable[str]) -> str:
    """The known word that is spelled most like ``word``; for messages."""
    return difflib.get_close_matches(word, list(known), 1, 0.0)[0]
