"""Depth by a network, and normals from any depth.

Axes: x to the right, y up, z towards the viewer; pixel (row v, column u) is seen along the ray through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from .hint import Hint, Values
from .metrics import depth_error, normal_error
from .models import check_source, load

EXAMPLES = "depth-anything/Depth-Anything-V2-Small-hf, Intel/dpt-large or Intel/zoedepth-nyu-kitti"
METRIC = ("zoedepth", "glpn", "depth_pro", "prompt_depth_anything")  # model types that tell metres; the others tell inverse depth
LEAST = 1e-3  # metres; bicubic enlarging overshoots, even below 0
Tells = Literal["inverse", "distance"]


@dataclass(frozen=True)
class Depth(Hint):
    """Gray levels, near things bright: inverse depth between its least and most in the picture, as MiDaS draws it.

    Args:
        model: folder or Hub id of a depth network of transformers (Depth Anything, DPT and MiDaS, ZoeDepth, GLPN, ...).
        tells: what the network's numbers are, "inverse" depth (up to scale and shift) or "distance"; None goes by its config.
        device: as torch spells it; None is "cuda" where there is one, else "cpu".
    """

    name: ClassVar[str] = "depth"
    values: ClassVar[Values] = "gray"
    model: str | Path | None = None
    tells: Tells | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        check_source(self.name, self.model, EXAMPLES)
        _check_tells(self.tells)

    def draw(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W) in [0, 1]."""
        depth, tells = predict_depth(pixels, self.model, self.tells, self.device)
        return paint_depth(depth, tells=tells)

    def distance(self, one: np.ndarray, two: np.ndarray) -> float:
        """``depth_error``."""
        return depth_error(one[..., 0], two[..., 0])


@dataclass(frozen=True)
class Normals(Hint):
    """Surface normals as colours, from the depth that a network tells: blue faces the viewer, green up, red left.

    That is what ControlNet 1.1 calls its protocol; renderers have red to the right, ``red="right"``.

    Args:
        model, tells, device: as ``Depth``'s.
        red: the side to which red surfaces face.
        focal: focal length over the picture's width, for networks that tell distances.
        relief: how far the nearest point stands out from the farthest, over the picture's width, for networks that tell inverse
            depth: they leave the scale open.
    """

    name: ClassVar[str] = "normals"
    values: ClassVar[Values] = "normal"
    model: str | Path | None = None
    tells: Tells | None = None
    device: str | None = None
    red: Literal["left", "right"] = "left"
    focal: float = 1.0
    relief: float = 0.5

    def __post_init__(self) -> None:
        check_source(self.name, self.model, EXAMPLES)
        _check_tells(self.tells)
        if self.red not in ("left", "right") or not self.focal > 0 or not self.relief > 0:
            raise ValueError(f"{self}: red must be 'left' or 'right', focal and relief positive")

    def draw(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) in [0, 1]."""
        depth, tells = predict_depth(pixels, self.model, self.tells, self.device)
        width = pixels.shape[1]
        if tells == "distance":
            normals = normals_from_depth(depth, focal=self.focal * width)
        else:
            normals = normals_from_depth(-paint_depth(depth) * self.relief * width)
        return paint_normals(normals, red=self.red)

    def distance(self, one: np.ndarray, two: np.ndarray) -> float:
        """``normal_error``, in degrees."""
        return normal_error(one * 2 - 1, two * 2 - 1)


def predict_depth(pixels: np.ndarray, model: Any, tells: Tells | None, device: str | None) -> tuple[np.ndarray, Tells]:
    """What a network tells of a picture (H, W, 3) in [0, 1], as (H, W), and what that is."""
    network = load(model, device, "AutoModelForDepthEstimation")
    outputs, _ = network(pixels)
    height, width = pixels.shape[:2]
    if network.config.model_type == "zoedepth":
        depth = _without_padding(outputs.predicted_depth, height, width)
    else:
        depth = network.processor.post_process_depth_estimation(outputs, target_sizes=[(height, width)])[0]["predicted_depth"]
    metric = network.config.model_type in METRIC or getattr(network.config, "depth_estimation_type", "relative") == "metric"
    tells = tells or ("distance" if metric else "inverse")
    found = depth.reshape(height, width).double().cpu().numpy()
    return (np.maximum(found, LEAST) if tells == "distance" else found), tells


def _without_padding(depth: Any, height: int, width: int) -> Any:
    """What ZoeDepth's own post-processing does, which in transformers needs torchvision: its processor padded the picture."""
    from torch.nn.functional import interpolate

    rows, columns = int(np.sqrt(height / 2) * 3), int(np.sqrt(width / 2) * 3)
    whole = interpolate(depth[:, None], (height + 2 * rows, width + 2 * columns), mode="bicubic", align_corners=False)
    return whole[..., rows : rows + height, columns : columns + width]


def paint_depth(depth: np.ndarray, *, tells: Tells = "inverse") -> np.ndarray:
    """(H, W) in [0, 1], the nearest point 1 and the farthest 0, even in inverse depth; unknown (NaN) is 0.

    Args:
        depth: (H, W), what ``tells`` says; distances are positive, and infinity is the sky.

    Raises:
        ValueError: another shape, distances that are not positive, or nothing that is known.
    """
    _check_tells(tells)
    if depth.ndim != 2 or not np.isfinite(depth).any():
        raise ValueError(f"a depth map has shape {depth.shape} and {np.isfinite(depth).sum()} known values; it must be (H, W) with some")
    if tells == "distance":
        if np.nanmin(depth) <= 0:
            raise ValueError(f"distances start at {np.nanmin(depth):.4g}; they must be positive (tells='inverse' for inverse depth)")
        depth = 1 / depth
    near, far = np.nanmax(depth), np.nanmin(depth)
    return np.nan_to_num((depth - far) / (near - far) if near > far else np.where(np.isnan(depth), np.nan, 0.5))


def normals_from_depth(depth: np.ndarray, *, focal: float | None = None, centre: tuple[float, float] | None = None) -> np.ndarray:
    """(H, W, 3) unit normals that face the viewer, by central differences of the surface's points (one-sided at the border).

    Planes are exact, with and without perspective; the error on smooth surfaces falls as the square of the pixels' size. Where
    depth or a neighbour that is needed is unknown (NaN, infinity), so is the normal (NaN).

    Args:
        depth: (H, W), distance along the viewing axis: in any unit with ``focal``, else in pixels, growing away from the viewer.
        focal: focal length in pixels; None sees along parallel rays.
        centre: (row, column) where the axis meets the picture; None is its middle. Only perspective knows one.

    Raises:
        ValueError: another shape, less than 2 x 2 pixels, a focal length that is not positive, or with it depths that are not.
    """
    if depth.ndim != 2 or min(depth.shape) < 2:
        raise ValueError(f"a depth map of shape {depth.shape} has no normals; it must be (H, W), at least 2 x 2")
    depth = np.where(np.isfinite(depth), depth, np.nan).astype(np.float64)
    rows, columns = np.indices(depth.shape, dtype=np.float64)
    if focal is None:
        points = np.stack([columns, -rows, -depth], -1)
    else:
        if not focal > 0 or np.nanmin(depth, initial=np.inf) <= 0:
            raise ValueError(f"focal={focal} and depths from {np.nanmin(depth):.4g}; with perspective both must be positive")
        v, u = centre or ((depth.shape[0] - 1) / 2, (depth.shape[1] - 1) / 2)
        points = depth[..., None] * np.stack([(columns - u) / focal, (v - rows) / focal, -np.ones_like(depth)], -1)
    along_u, along_v = np.gradient(points, axis=1), np.gradient(points, axis=0)
    normals = np.cross(along_v, along_u)  # rows run down, so that this points to the viewer
    normals[np.isnan(depth)] = np.nan
    return normals / np.linalg.norm(normals, axis=-1, keepdims=True)


def paint_normals(normals: np.ndarray, *, red: Literal["left", "right"] = "left") -> np.ndarray:
    """(H, W, 3) in [0, 1] of unit normals (x right, y up, z to the viewer): (n + 1) / 2, x turned where red is left.

    Unknown ones (NaN) are drawn as facing the viewer.
    """
    known = np.where(np.isnan(normals), [0.0, 0.0, 1.0], normals)
    return (known * [-1 if red == "left" else 1, 1, 1] + 1) / 2


def _check_tells(tells: Any) -> None:
    if tells not in (None, "inverse", "distance"):
        raise ValueError(f"tells={tells!r} is not one of 'inverse', 'distance'")
