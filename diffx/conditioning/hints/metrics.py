"""How much two control images agree: of edges, depths, normals, labels and colours."""

from __future__ import annotations

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
    if tolerance < 0:
        raise ValueError(f"tolerance={tolerance} is negative; 0 asks for edges at the same pixels")
    one, two = _map("edge maps", one), _map("edge maps", two)
    _same_shape("edge maps", one, two)
    for edges in (one, two):
        if edges.min() < 0 or edges.max() > 1:
            raise ValueError(f"an edge map has values from {edges.min():.4g} to {edges.max():.4g}; they must lie in [0, 1]: divide by 255")
    if not one.any() or not two.any():
        return float(not one.any() and not two.any())
    precision = np.minimum(two, _widen(one, tolerance)).sum() / two.sum()
    recall = np.minimum(one, _widen(two, tolerance)).sum() / one.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def depth_error(one: np.ndarray, two: np.ndarray) -> float:
    """The share of the spread of depths ``two`` that the best scale (not negative) and shift of ``one`` leave, as RMS: 0 to 1.

    Scale and shift are free, because that is all that networks for relative depth leave open. Symmetric. Two flat maps agree;
    a flat one says nothing about any other.

    Source: free scale and shift are Ranftl et al.'s 2019 (arXiv:1907.01341); here by least squares.

    Args:
        one, two: (H, W), both depths or both inverse depths.

    Raises:
        ValueError: the maps differ in shape, or hold NaN or infinity.
    """
    one, two = _map("depth maps", one), _map("depth maps", two)
    _same_shape("depth maps", one, two)
    one, two = one - one.mean(), two - two.mean()
    scale = np.sqrt((one**2).sum() * (two**2).sum())
    if not scale:
        return float(one.any() or two.any())
    correlation = min(1.0, max(0.0, (one * two).sum() / scale))
    return float(np.sqrt(1 - correlation**2))


def normal_error(one: np.ndarray, two: np.ndarray) -> float:
    """The mean angle between the normals of two maps, in degrees; pixels where one is unknown (NaN) are left out.

    Args:
        one, two: (H, W, 3), of any length but 0.

    Raises:
        ValueError: the maps differ in shape or have no pixel in common.
    """
    _same_shape("normal maps", one, two)
    if one.ndim != 3 or one.shape[-1] != 3:
        raise ValueError(f"normal maps have shape {one.shape}; they must be (H, W, 3)")
    one, two = one.astype(np.float64), two.astype(np.float64)
    # atan2 of sine and cosine: an arc cosine is off by 1e-6 degrees near 0.
    angles = np.degrees(np.arctan2(np.linalg.norm(np.cross(one, two), axis=-1), (one * two).sum(-1)))
    known = np.isfinite(angles)
    if not known.any():
        raise ValueError("the two normal maps are unknown (NaN) at every pixel of one or the other")
    return float(angles[known].mean())


def mean_iou(one: np.ndarray, two: np.ndarray, *, ignore: int | None = None) -> float:
    """Intersection over union, the mean over the labels that either map has: 1 is the same, 0 nothing in common.

    Args:
        one, two: (H, W) integers.
        ignore: a label that does not count, for instance a background's; maps with no other label agree.

    Raises:
        ValueError: the maps differ in shape or are not of integers.
    """
    one, two = _labels(one, two)
    labels = [label for label in np.union1d(one, two) if label != ignore]
    shares = [np.sum((one == label) & (two == label)) / np.sum((one == label) | (two == label)) for label in labels]
    return float(np.mean(shares)) if shares else 1.0


def covering(one: np.ndarray, two: np.ndarray) -> float:
    """How well two divisions of a picture match, whatever their labels are called: 1 is the same division.

    Each segment of one counts, by its size, with its best intersection over union among the segments of the other; the mean of
    both directions.

    Source: the segmentation covering of Arbelaez et al. 2011, "Contour Detection and Hierarchical Image Segmentation".

    Args:
        one, two: (H, W) integers.

    Raises:
        ValueError: the maps differ in shape or are not of integers.
    """
    one, two = _labels(one, two)
    _, one = np.unique(one, return_inverse=True)
    _, two = np.unique(two, return_inverse=True)
    shape = one.max() + 1, two.max() + 1
    common = np.bincount((one * shape[1] + two).ravel(), minlength=shape[0] * shape[1]).reshape(shape)
    sizes = common.sum(1, keepdims=True), common.sum(0, keepdims=True)
    iou = common / (sizes[0] + sizes[1] - common)
    return float(((iou.max(1) * sizes[0][:, 0]).sum() + (iou.max(0) * sizes[1][0]).sum()) / (2 * common.sum()))


def colour_difference(one: np.ndarray, two: np.ndarray) -> float:
    """The mean CIEDE2000 difference of two pictures' pixels: 0 is the same, 1 just visible, 100 black against white.

    Args:
        one, two: (H, W, 3) sRGB in [0, 1].

    Raises:
        ValueError: the pictures differ in shape.
    """
    from skimage.color import deltaE_ciede2000, rgb2lab

    _same_shape("pictures", one, two)
    return float(deltaE_ciede2000(rgb2lab(one), rgb2lab(two)).mean())


def palette_difference(one: np.ndarray, two: np.ndarray) -> float:
    """The distance between the colours of two pictures, wherever they stand: 0 is the same colours as often.

    The mean difference of sorted L, a and b (each channel's Wasserstein distance), taken together as Euclid does.

    Args:
        one, two: (H, W, 3) sRGB in [0, 1].

    Raises:
        ValueError: the pictures differ in shape.
    """
    from skimage.color import rgb2lab

    _same_shape("pictures", one, two)
    one, two = (np.sort(rgb2lab(pixels).reshape(-1, 3), axis=0) for pixels in (one, two))
    return float(np.linalg.norm(np.abs(one - two).mean(0)))


def codes(pixels: np.ndarray) -> np.ndarray:
    """(H, W) integers, one for each colour of (H, W, 3) in [0, 1], black 0: what ``mean_iou`` reads of a picture of labels."""
    levels = np.rint(pixels * 255).astype(np.int64)
    return levels @ np.array([1 << 16, 1 << 8, 1])


def _widen(edges: np.ndarray, pixels: int) -> np.ndarray:
    from scipy import ndimage

    return ndimage.maximum_filter(edges, size=2 * pixels + 1, mode="constant") if pixels else edges


def _map(what: str, values: np.ndarray) -> np.ndarray:
    if values.ndim != 2 or not values.size:
        raise ValueError(f"{what} have shape {values.shape}; they must be (H, W)")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{what} hold NaN or infinity at {int((~np.isfinite(values)).sum())} pixels; fill or cut these")
    return values


def _labels(one: np.ndarray, two: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    _same_shape("label maps", one, two)
    if not (np.issubdtype(one.dtype, np.integer) and np.issubdtype(two.dtype, np.integer)):
        raise ValueError(f"label maps of {one.dtype} and {two.dtype}; labels are integers")
    return one, two


def _same_shape(what: str, one: np.ndarray, two: np.ndarray) -> None:
    if one.shape != two.shape:
        raise ValueError(f"{what} of shapes {one.shape} and {two.shape}; they must be the same")
