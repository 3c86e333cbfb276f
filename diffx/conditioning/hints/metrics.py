"""How much two control images agree."""

import numpy as np


def edge_f1(one: np.ndarray, two: np.ndarray, *, tolerance: int = 0) -> float:
    """The harmonic mean of precision and recall of edges ``two`` among edges ``one``: 1 is the same, 0 nothing in common.

    Gray levels count as parts of an edge. Symmetric. Two maps without an edge agree; one without disagrees with any other.

    Args:
        one, two: (H, W) boolean, or in [0, 1].
        tolerance: an edge is found where the other map has one at most so many pixels away, rows and columns apart.

    Raises:
        ValueError: the maps differ in shape or are not such maps, or the tolerance is negative.
    """
    if one.shape != two.shape or one.ndim != 2:
        raise ValueError(f"edge maps of shapes {one.shape} and {two.shape}; both must be (H, W), and the same")
    if tolerance < 0:
        raise ValueError(f"tolerance={tolerance} is negative; 0 asks for edges at the same pixels")
    one, two = _unit(one), _unit(two)
    if not one.any() or not two.any():
        return float(not one.any() and not two.any())
    precision = np.minimum(two, _widen(one, tolerance)).sum() / two.sum()
    recall = np.minimum(one, _widen(two, tolerance)).sum() / one.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _widen(edges: np.ndarray, pixels: int) -> np.ndarray:
    from scipy import ndimage  # here, because most users of this file's neighbours never measure

    return ndimage.maximum_filter(edges, size=2 * pixels + 1, mode="constant") if pixels else edges


def _unit(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    if not (np.isfinite(values).all() and values.min(initial=0) >= 0 and values.max(initial=0) <= 1):
        raise ValueError(f"values from {values.min():.4g} to {values.max():.4g} are no map in [0, 1]; divide levels by 255")
    return values
