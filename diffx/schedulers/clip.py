"""Bounds on the predicted clean sample: maps of x0 that every solver can apply before it steps."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor


def make_x0_map(config: Mapping[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """The map of every x0 prediction that a config asks for: dynamic thresholding, else clipping, else None.

    Raises:
        ValueError: a bound outside its range.
    """
    if config.get("thresholding"):
        ratio, most = config["dynamic_thresholding_ratio"], config["sample_max_value"]
        if not (0 < ratio <= 1 and most >= 1):
            raise ValueError(
                f"thresholding needs 0 < dynamic_thresholding_ratio <= 1 and sample_max_value >= 1, got {ratio} and {most}: "
                "samples within -1 .. 1 are never touched"
            )
        return partial(threshold, ratio=ratio, most=most)  # no lambda: schedulers are pickled
    if config.get("clip_sample"):
        bound = config["clip_sample_range"]
        if not bound > 0:
            raise ValueError(f"clip_sample_range={bound} must be positive; clip_sample=False switches clipping off")
        return partial(clip, bound=bound)
    return None


def clip(x0: Tensor, bound: float) -> Tensor:
    """``x0`` within -bound .. bound."""
    return x0.clamp(-bound, bound)


def threshold(x0: Tensor, ratio: float, most: float) -> Tensor:
    """``x0`` (B, ...) clipped per sample to -s .. s and divided by s: its ``ratio`` quantile of |x0|, held in 1 .. ``most``.

    For networks on pixels; latents have no bound at 1.

    Source: Saharia et al. 2022 (arXiv:2205.11487) section 2.3, dynamic thresholding.
    """
    s = x0.abs().flatten(1).quantile(ratio, dim=1).clamp(1, most).reshape(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-s, s) / s
