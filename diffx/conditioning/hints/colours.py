"""Hints made of a picture's own colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from .hint import Hint, Values
from .metrics import colour_difference, palette_difference


@dataclass(frozen=True)
class Tile(Hint):
    """The picture without its detail: reduced by averaging, and enlarged again (bicubic).

    Args:
        factor: by which each side is reduced.
    """

    name: ClassVar[str] = "tile"
    values: ClassVar[Values] = "colour"
    factor: float = 4.0

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ValueError(f"{self}: factor must be at least 1, which leaves the picture as it is")

    def draw(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3)."""
        height, width = pixels.shape[:2]
        small = max(1, round(height / self.factor)), max(1, round(width / self.factor))
        return _resized(_resized(pixels, small, Image.Resampling.BOX), (height, width), Image.Resampling.BICUBIC)

    def distance(self, one: np.ndarray, two: np.ndarray) -> float:
        """``colour_difference``."""
        return colour_difference(one, two)


@dataclass(frozen=True)
class Colour(Hint):
    """Flat squares, each of the mean colour beneath.

    Args:
        cells: squares along the shorter side; the longer has as many more as fit its length best.
    """

    name: ClassVar[str] = "colour"
    values: ClassVar[Values] = "colour"
    cells: int = 8

    def __post_init__(self) -> None:
        if self.cells < 1:
            raise ValueError(f"{self}: cells must be at least 1")

    def draw(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3)."""
        height, width = pixels.shape[:2]
        side = min(height, width) / self.cells
        small = max(1, round(height / side)), max(1, round(width / side))
        return _resized(_resized(pixels, small, Image.Resampling.BOX), (height, width), Image.Resampling.NEAREST)

    def distance(self, one: np.ndarray, two: np.ndarray) -> float:
        """``colour_difference``."""
        return colour_difference(one, two)


@dataclass(frozen=True)
class Shuffle(Hint):
    """The picture's colours without its shapes: every pixel is read from a place given by smooth random noise.

    Source: the "content shuffle" of ControlNet 1.1 (lllyasviel).

    Args:
        waves: bends of the noise along the longer side; more of them leave smaller pieces.
        seed: of the noise.
    """

    name: ClassVar[str] = "shuffle"
    values: ClassVar[Values] = "colour"
    waves: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.waves > 0 or self.seed < 0:
            raise ValueError(f"{self}: waves must be positive, and seed at least 0")

    def draw(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3)."""
        from scipy.ndimage import gaussian_filter, map_coordinates

        height, width = pixels.shape[:2]
        noise = np.random.default_rng(self.seed).standard_normal((2, height, width))
        smooth = gaussian_filter(noise, (0, *[max(height, width) / (4 * self.waves)] * 2), mode="wrap")
        low, high = smooth.min((1, 2), keepdims=True), smooth.max((1, 2), keepdims=True)
        share = (smooth - low) / np.where(high > low, high - low, 1)
        places = share * (np.array([height, width]) - 1)[:, None, None]
        return np.stack([map_coordinates(pixels[..., c], places, order=1, mode="nearest") for c in range(3)], -1)

    def distance(self, one: np.ndarray, two: np.ndarray) -> float:
        """``palette_difference``."""
        return palette_difference(one, two)


def _resized(pixels: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    channels = [Image.fromarray(np.ascontiguousarray(pixels[..., c])).resize((size[1], size[0]), how) for c in range(3)]  # 32-bit floats
    return np.stack([np.asarray(channel) for channel in channels], -1).clip(0, 1)
