"""Hints made of lines, computed with scikit-image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .hint import Hint, Values
from .metrics import edge_f1


@dataclass(frozen=True)
class Canny(Hint):
    """White edges one pixel wide on black. The defaults suit photographs and the embedded model's 32 x 32 glyphs alike.

    Source: Canny 1986, "A Computational Approach to Edge Detection"; computed by ``skimage.feature.canny``.

    Args:
        sigma: of the smoothing before, in pixels.
        low, high: an edge is as steep as ``low`` everywhere and as ``high`` somewhere; gradients of Sobel's filter, picture in [0, 1].
        tolerance: of ``error``, in pixels; see ``edge_f1``.
    """

    name: ClassVar[str] = "canny"
    values: ClassVar[Values] = "binary"
    sigma: float = 0.7
    low: float = 0.2
    high: float = 0.4
    tolerance: int = 0

    def __post_init__(self) -> None:
        if not (self.sigma >= 0 and 0 <= self.low <= self.high and self.tolerance >= 0):
            raise ValueError(f"{self}: sigma and tolerance must be at least 0, and low between 0 and high")

    def draw(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W) boolean."""
        from skimage.feature import canny

        return canny(gray(pixels), sigma=self.sigma, low_threshold=self.low, high_threshold=self.high)

    def distance(self, one: np.ndarray, two: np.ndarray) -> float:
        """1 - ``edge_f1``."""
        return 1 - edge_f1(one[..., 0] > 0.5, two[..., 0] > 0.5, tolerance=self.tolerance)


def gray(pixels: np.ndarray) -> np.ndarray:
    """Luma (H, W) of a picture (H, W, 3), by the weights of ITU-R BT.709, as scikit-image takes them."""
    from skimage.color import rgb2gray

    return rgb2gray(pixels)
