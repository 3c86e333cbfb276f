"""Hints made of lines, computed with scikit-image and SciPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .hint import Hint, Values
from .metrics import edge_f1


@dataclass(frozen=True, kw_only=True)
class Lines(Hint):
    """A hint of bright lines on black; its error is 1 - ``edge_f1``.

    Args:
        tolerance: of the error, in pixels; see ``edge_f1``.
    """

    tolerance: int = 0

    def distance(self, one: np.ndarray, two: np.ndarray) -> float:
        """1 - ``edge_f1``; gray levels count as parts of a line."""
        return 1 - edge_f1(one[..., 0], two[..., 0], tolerance=self.tolerance)


@dataclass(frozen=True)
class Canny(Lines):
    """White edges one pixel wide on black. The defaults suit photographs and the embedded model's 32 x 32 glyphs alike.

    Source: Canny 1986, "A Computational Approach to Edge Detection"; computed by ``skimage.feature.canny``.

    Args:
        sigma: of the smoothing before, in pixels.
        low, high: an edge is as steep as ``low`` everywhere and as ``high`` somewhere; gradients of Sobel's filter, picture in [0, 1].
    """

    name: ClassVar[str] = "canny"
    values: ClassVar[Values] = "binary"
    sigma: float = 0.7
    low: float = 0.2
    high: float = 0.4

    def __post_init__(self) -> None:
        if not (self.sigma >= 0 and 0 <= self.low <= self.high and self.tolerance >= 0):
            raise ValueError(f"{self}: sigma and tolerance must be at least 0, and low between 0 and high")

    def draw(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W) boolean."""
        from skimage.feature import canny

        return canny(gray(pixels), sigma=self.sigma, low_threshold=self.low, high_threshold=self.high)


@dataclass(frozen=True)
class SoftEdge(Lines):
    """Edges as bright as they are steep: a long step of height h between two areas of one colour is drawn at h, 1 the most.

    The steepest of the three channels counts, so that an edge between colours of one brightness is seen.

    Args:
        sigma: of the smoothing, in pixels; lines become about 2 sigma wide.
    """

    name: ClassVar[str] = "softedge"
    values: ClassVar[Values] = "gray"
    sigma: float = 1.0

    def __post_init__(self) -> None:
        if not (self.sigma > 0 and self.tolerance >= 0):
            raise ValueError(f"{self}: sigma must be positive and tolerance at least 0")

    def draw(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W) in [0, 1]."""
        from scipy.ndimage import gaussian_gradient_magnitude

        slopes = [gaussian_gradient_magnitude(pixels[..., c].astype(np.float64), self.sigma, mode="nearest") for c in range(3)]
        # The blurred step of height 1 is as steep as the Gaussian is high: 1 / (sigma sqrt(2 pi)).
        return np.clip(np.max(slopes, 0) * self.sigma * np.sqrt(2 * np.pi), 0, 1)


@dataclass(frozen=True)
class Scribble(Lines):
    """A few thick white strokes on black, as drawn by hand: the edges that remain of a blurred picture.

    Args:
        sigma: of the blur, in pixels.
        low, high: as ``Canny``'s, of the blurred picture.
        width: of a stroke, in pixels; odd.
    """

    name: ClassVar[str] = "scribble"
    values: ClassVar[Values] = "binary"
    sigma: float = 1.5
    low: float = 0.2
    high: float = 0.4
    width: int = 3

    def __post_init__(self) -> None:
        if not (self.sigma >= 0 and 0 <= self.low <= self.high and self.width % 2 == 1 and self.tolerance >= 0):
            raise ValueError(f"{self}: sigma and tolerance must be at least 0, low between 0 and high, width odd")

    def draw(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W) boolean."""
        from skimage.morphology import dilation, disk

        lines = Canny(self.sigma, self.low, self.high).draw(pixels)
        return dilation(lines, disk(self.width // 2))


@dataclass(frozen=True)
class LineArt(Lines):
    """White lines on black where the picture is darker, in every channel, than what is around it; the median line is half bright.

    Source: "standard line art" of lllyasviel's sd-webui-controlnet and of controlnet-aux, whose numbers these are.

    Args:
        sigma: of the blur that says what is around, in pixels.
        least: a pixel so much darker than that counts for the median, in [0, 1].
    """

    name: ClassVar[str] = "lineart"
    values: ClassVar[Values] = "gray"
    sigma: float = 6.0
    least: float = 8 / 255

    def __post_init__(self) -> None:
        if not (self.sigma > 0 and 0 <= self.least < 1 and self.tolerance >= 0):
            raise ValueError(f"{self}: sigma must be positive, least in [0, 1), tolerance at least 0")

    def draw(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W) in [0, 1]."""
        from scipy.ndimage import gaussian_filter

        around = gaussian_filter(pixels.astype(np.float64), (self.sigma, self.sigma, 0), mode="mirror")
        darker = np.clip((around - pixels).min(-1), 0, 1)
        lines = darker[darker > self.least]
        median = max(16 / 255, float(np.median(lines)) if lines.size else 0.0)  # faint lines stay faint
        return np.clip(darker / median * (127 / 255), 0, 1)


def gray(pixels: np.ndarray) -> np.ndarray:
    """Luma (H, W) of a picture (H, W, 3), by the weights of ITU-R BT.709, as scikit-image takes them."""
    from skimage.color import rgb2gray

    return rgb2gray(pixels)
